"""The build of the API reference fails on what it should fail on; ``make docs`` shows that the reference is whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.docs.commands import PROJECT

_MODULE = '''
def first(count: int) -> None:
    """Refers to :func:`second`, :func:`.third` and :class:`torch.Tensor`.

    Args:
        count: how often.
    """


def second() -> None:
    """Refers to :func:`nowhere`.

    Raises:
        NoSuchError: never.
    """


def third() -> None:
    """A list:
    - that begins
      without an empty line, and ``does not end
    """
'''
_PAGE = """
Page
====

.. currentmodule:: sample
.. autofunction:: first
.. autofunction:: second
.. autofunction:: third
.. autofunction:: fourth
"""


def test_a_broken_reference_a_bad_docstring_and_a_missing_name_fail_the_build(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    (source / "api").mkdir(parents=True)
    shutil.copy(PROJECT / "docs/conf.py", source)
    (source / "api/index.rst").write_text(_PAGE)
    (tmp_path / "sample.py").write_text(_MODULE)
    (line,) = [line for line in (PROJECT / "Makefile").read_text().splitlines() if "bin/sphinx-build" in line]
    program, *arguments = line.split()
    assert program.endswith("sphinx-build")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    for wrong in (
        "py:func reference target not found: nowhere",
        "py:exc reference target not found: NoSuchError",
        "docstring of sample.third:3: ERROR: Unexpected indentation",
        "Inline literal start-string without end-string",
        "failed to import 'fourth' from module 'sample'",
        "model.preset is public and not in docs/api",
        "runtime_cpu.Engine is public and not in docs/api",
    ):
        assert wrong in done.stderr, done.stderr
    for right in ("second", "third", "torch.Tensor"):
        assert f"not found: {right}" not in done.stderr
