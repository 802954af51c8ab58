"""Measuring speed and memory of a model on this machine: ``python -m runtime_cpu.bench MODEL``."""
