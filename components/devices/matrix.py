"""The device matrix: which machines there are and how a measurement is started on each.

for device in read_matrix(path):
    report = device.measure(model, runs=5, prompt_tokens=128, decode_tokens=64, timeout_s=600)
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.artifacts import PROJECT, StageError

LOCAL = "local"
_REPORT_VERSION = 2


class DeviceUnavailable(Exception):
    """A device could not be measured; the message is the reason that goes into the table."""


class Device(BaseModel):
    """One machine. Commands are templates, split as a shell would but run without one.

    Their names: ``{python}`` this interpreter, ``{host}``, ``{folder}``, ``{model}`` (path here), ``{file}`` (its
    name), ``{runs}``, ``{prompt}``, ``{decode}``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    description: str
    host: str = ""
    folder: str = ""
    probe: str = Field(default="", description="succeeds when the device is there; empty: always")
    copy_model: str = Field(default="", description="brings the model file to the device; empty: not needed")
    bench: str = Field(description="prints runtime_cpu.bench's JSON on standard output")
    probe_timeout_s: float = Field(default=15.0, gt=0)

    def measure(
        self, model: Path, *, runs: int, prompt_tokens: int, decode_tokens: int, timeout_s: float
    ) -> dict[str, Any]:
        """The bench report of one model file.

        Raises:
            DeviceUnavailable: the device cannot be reached, or a command failed, timed out or printed no report.
        """
        values = {
            "python": sys.executable,
            "host": self.host,
            "folder": self.folder,
            "model": str(model),
            "file": model.name,
            "runs": str(runs),
            "prompt": str(prompt_tokens),
            "decode": str(decode_tokens),
        }
        if self.probe:
            self._call("probe", self.probe, values, self.probe_timeout_s)
        if self.copy_model:
            self._call("copy_model", self.copy_model, values, timeout_s)
        output = self._call("bench", self.bench, values, timeout_s)
        try:
            report = json.loads(output)
            if report["format_version"] != _REPORT_VERSION or not report["rows"]:
                raise ValueError(f"format {report['format_version']}")
        except (ValueError, KeyError, TypeError) as error:
            raise DeviceUnavailable(f"bench printed no report that can be read ({error!r})") from error
        result: dict[str, Any] = report
        return result

    def _call(self, step: str, template: str, values: dict[str, str], timeout_s: float) -> str:
        command = [part.format(**values) for part in shlex.split(template)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                stdin=subprocess.DEVNULL,
                cwd=PROJECT,
            )
        except FileNotFoundError as error:
            raise DeviceUnavailable(f"{step}: there is no command {command[0]!r} here") from error
        except subprocess.TimeoutExpired as error:
            raise DeviceUnavailable(f"{step} did not end within {timeout_s:g} s") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise DeviceUnavailable(f"{step} failed with code {done.returncode}: {last[:300]}")
        return done.stdout


class _Matrix(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    device: tuple[Device, ...] = Field(min_length=1)


def read_matrix(path: Path) -> dict[str, Device]:
    """The devices by name, in the file's order.

    Raises:
        StageError: the file is missing or malformed; the sentence names the field.
    """
    try:
        devices = _Matrix.model_validate(tomllib.loads(path.read_text())).device
    except OSError as error:
        raise StageError(f"the device matrix {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StageError(f"the device matrix {path.name} is not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise StageError(
            f"the device matrix {path.name} has a wrong value: {field}: {first['msg']}"
        ) from error
    for device in devices:
        for template in (device.probe, device.copy_model, device.bench):
            _check_template(path, device.name, template)
    if len({device.name for device in devices}) != len(devices):
        raise StageError(f"the device matrix {path.name} names a device twice; names have to differ")
    return {device.name: device for device in devices}


def _check_template(path: Path, name: str, template: str) -> None:
    known = dict.fromkeys(("python", "host", "folder", "model", "file", "runs", "prompt", "decode"), "")
    try:
        for part in shlex.split(template):
            part.format(**known)
    except (ValueError, KeyError, IndexError) as error:
        raise StageError(
            f"the device matrix {path.name}: the command {template!r} of {name} is malformed ({error!r}); "
            f"names in braces are {', '.join(known)}"
        ) from error
