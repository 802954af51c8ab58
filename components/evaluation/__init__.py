"""Evaluation: the sets, the prompt formats shared with SFT data, and the scores (``docs/evaluation.md``)."""
