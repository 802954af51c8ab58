"""Packing a model into the engine's own layout: ``python -m runtime_cpu.pack SRC OUT``."""
