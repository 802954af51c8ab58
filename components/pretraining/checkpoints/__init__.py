"""What a run keeps to go on: saving, loading on other processes, evaluations and metrics."""
