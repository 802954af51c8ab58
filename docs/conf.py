"""How Sphinx makes the API reference of docs/api out of the docstrings: ``make docs``.

A broken reference, a malformed docstring and a public name that the reference lacks are warnings, and a warning fails
the build.
"""

from __future__ import annotations

import importlib
from typing import Any

from sphinx.application import Sphinx
from sphinx.domains.python import ObjectEntry, PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

project = "SmallThinker"
author = "The SmallThinker authors"
root_doc = "api/index"
include_patterns = ["api/**.rst"]
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_show_copyright = False
html_show_sourcelink = False

napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute that is also a property is described once
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
# A dataclass's and a NamedTuple's fields are described under "Attributes" of the class.
autodoc_default_options = {"members": True}

nitpicky = True
# The reference is made without a network, so others' types cannot be links. Ours have to be.
nitpick_ignore_regex = [
    (r"py:.*", rf"{package}\..*")
    for package in ("collections", "np", "numpy", "os", "pathlib", "starlette", "torch", "transformers")
]

PACKAGES = ("model", "runtime_cpu")
# Users get these from the package; how they are made is its own business.
NOT_MADE_BY_USERS = {
    "model.SmallThinkerConfig": "by keywords, all of which have defaults",
    "runtime_cpu.Engine": "Engine.open",
    "runtime_cpu.Generation": "Engine.generate",
    "runtime_cpu.ModelInfo": "Engine.info",
    "runtime_cpu.Stats": "Generation.stats",
    "runtime_cpu.text.tokenizer.StreamDecoder": "Tokenizer.stream",
    "runtime_cpu.text.tokenizer.Tokenizer": "Engine.tokenizer",
}


class OwnPackageFirst(PythonDomain):
    """Python names, where a name that two packages have means the one of the package that it is used in."""

    def find_obj(
        self,
        env: BuildEnvironment,
        modname: str,
        classname: str,
        name: str,
        type: str | None,
        searchmode: int = 0,
    ) -> list[tuple[str, ObjectEntry]]:
        found = super().find_obj(env, modname, classname, name, type, searchmode)
        package = modname.partition(".")[0] if modname else ""
        return [match for match in found if match[0].startswith(f"{package}.")] or found


def hide_constructor(app: Sphinx, what: str, name: str, *_: Any) -> tuple[str, None] | None:
    """No signature for a class of NOT_MADE_BY_USERS."""
    return ("", None) if name in NOT_MADE_BY_USERS else None


def report_missing(app: Sphinx, env: BuildEnvironment) -> None:
    """Every name of a package's ``__all__`` is in the reference."""
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            if f"{package}.{name}" not in env.domains.python_domain.objects:
                logging.getLogger(__name__).warning("%s.%s is public and not in docs/api", package, name)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_domain(OwnPackageFirst, override=True)
    app.connect("autodoc-process-signature", hide_constructor)
    app.connect("env-check-consistency", report_missing)
