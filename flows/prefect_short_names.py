"""Lets ``prefect deployment run NAME`` mean ``NAME/default``, as the flows here are deployed.

A ``prefect.plugins`` entry point, active where ``prefect.toml`` enables plugins (the project folder). Stock Prefect
only takes ``FLOW/DEPLOYMENT``. It wraps a private method of the pinned Prefect; ``tests/flows`` checks that it works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect.client.orchestration._deployments import client
from prefect.plugins import register_hook


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def read_deployment_by_name(self: object, name: str) -> Any:
        return original(self, name if "/" in name else f"{name}/default")

    return read_deployment_by_name


@register_hook
def setup_environment(*, ctx: object) -> None:
    """Called by Prefect at start-up."""
    for cls in (client.DeploymentClient, client.DeploymentAsyncClient):
        cls.read_deployment_by_name = _wrap(cls.read_deployment_by_name)  # type: ignore[method-assign]
