"""The training loop: ``trainer.py`` tells it from beginning to end."""
