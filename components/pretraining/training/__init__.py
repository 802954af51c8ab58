"""The training loop: ``training/trainer.py`` tells it from beginning to end."""
