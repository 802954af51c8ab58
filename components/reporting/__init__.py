"""The report page: one HTML file generated from manifests and the artefacts they vouch for."""

from components.reporting.page import write_report

__all__ = ["write_report"]
