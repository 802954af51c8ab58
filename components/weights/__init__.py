"""Weights on disk and on a device, for every stage: model folders, checkpoints of a run, devices, optimizer groups."""
