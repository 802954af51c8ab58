"""The SmallThinker CPU engine: runs GGUF files of the architecture without torch."""
