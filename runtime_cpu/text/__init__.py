"""Text and token ids: the tokenizer inside a model file, and its chat template."""
