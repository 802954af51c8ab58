"""The catalogue of registry-borne data: ``load_catalogue()["evals"].version``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.artifacts import StageError

CATALOGUE_PATH = Path(__file__).with_name("packages.toml")


class SourceError(StageError):
    """A source cannot be used; the message names the package and says what to do."""


class SourceUnavailable(SourceError):
    """The source cannot be had here (no client, no network, no longer served); a caller may leave it out."""


class Package(BaseModel):
    """One entry of ``packages.toml``; the file's header explains the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    client: Literal["pip", "npm", "apt"]
    package: str
    version: str = Field(min_length=1, pattern=r"^[^\s/-][^\s/]*$")
    form: Literal["wheel", "sdist"] | None = None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    strip: int = Field(default=0, ge=0, le=4)
    members: tuple[str, ...] = Field(min_length=1)
    size_mb: float = Field(gt=0)
    licence: str
    purpose: str

    @property
    def slug(self) -> str:
        """Name of the source's folder in the cache."""
        return f"{self.name}-{self.version}".replace(":", "_").replace("~", "_")


def load_catalogue(path: Path = CATALOGUE_PATH) -> dict[str, Package]:
    """Read and validate the catalogue, in the file's order.

    Raises:
        SourceError: the file is not valid TOML, or an entry is wrong; the message names entry and field.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SourceError(f"the catalogue {path.name} cannot be read: {error}") from error
    catalogue = {}
    for name, table in tables.items():
        try:
            entry = Package(**{"package": name, **table, "name": name})
        except (ValidationError, TypeError) as error:
            raise SourceError(f"entry [{name}] of {path.name} is wrong: {error}") from error
        if (entry.client == "pip") != (entry.form is not None):
            raise SourceError(
                f"entry [{name}] of {path.name}: pip needs form = 'wheel' or 'sdist', others none"
            )
        catalogue[name] = entry
    return catalogue
