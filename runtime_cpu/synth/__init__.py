"""Random models of the real sizes, for measuring speed: ``python -m runtime_cpu.synth 4b OUT.gguf --check``."""
