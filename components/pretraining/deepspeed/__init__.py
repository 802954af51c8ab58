"""Everything that depends on DeepSpeed: engine, expert parallelism, master weights, skipped steps."""
