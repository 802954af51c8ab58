"""Files of weights: checkpoints in Hugging Face's and torch's formats are read, GGUF files are written."""
