"""MLflow as reviewers want it: a parent run per pipeline, a child per stage, models with their lineage."""

from components.tracking.mlflow_tracker import MlflowTracker

__all__ = ["MlflowTracker"]
