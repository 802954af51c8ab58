"""Memory: what a model will hold, what this process holds, and the bytes that a token reads."""
