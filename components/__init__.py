"""One folder per stage of the pipeline: how a stage does its one job to files."""
