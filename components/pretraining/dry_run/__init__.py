"""A training step of the full size without its arithmetic: memory and operations, counted."""
