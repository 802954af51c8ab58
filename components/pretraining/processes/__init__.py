"""The processes of a run: ranks and mesh, collectives outside training steps, and signals."""
