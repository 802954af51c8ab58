"""Evaluation: the sets, the prompt formats shared with SFT data, and the scores. See ``docs/evaluation.md``."""
