"""Prefect flows and recipes: what runs, in which order, at which size."""
