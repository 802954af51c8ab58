"""The processes of a run: their ranks, what they tell one another, and signals."""
