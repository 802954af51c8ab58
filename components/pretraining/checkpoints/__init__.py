"""What a run needs to resume: checkpoints, resharding to another mesh, finished evaluations and metrics."""
