"""The shipped Kubernetes files: strict schemas, agreement with recipe and launcher, and that a slip is caught."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError

from components.artifacts import EXIT_INTERRUPTED, EXIT_RETRY, EXIT_USER_ERROR
from components.pretraining.launcher import launch_command
from components.pretraining.presets import PRESETS
from flows.pretrain import main

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "kubernetes"
VERSIONS = ("1.31", "1.37")  # the first with stable podFailurePolicy, and the newest that has schemas


def objects(folder: Path = FOLDER) -> list[dict[str, Any]]:
    return [
        found
        for path in sorted(folder.glob("*.yaml"))
        for found in yaml.safe_load_all(path.read_text())
        if found
    ]


def job_set() -> dict[str, Any]:
    (found,) = [entry for entry in objects() if entry["kind"] == "JobSet"]
    return found


def complaints(entry: dict[str, Any]) -> list[str]:
    """What the API would refuse, or silently ignore."""
    if entry["kind"] != "JobSet":
        return _core(entry)
    found = []
    try:
        parsed = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(entry))
        assert parsed is not None
        # Fields that the API does not have are left out by the models: look what has come through.
        found += _lost(entry, parsed.to_dict())
    except ValidationError as error:
        found += [str(error)]
    for part in entry["spec"].get("replicatedJobs", []):
        found += _core(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **part["template"]}
        )
    return found


def _core(entry: dict[str, Any]) -> list[str]:
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(entry, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {error.message}")
    return found


def _lost(given: Any, kept: Any, path: str = "") -> list[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        lost = [f"no field {path}.{name}" for name in given.keys() - kept.keys()]
        return lost + [
            line
            for name in given.keys() & kept.keys()
            for line in _lost(given[name], kept[name], f"{path}.{name}")
        ]
    if isinstance(given, list) and isinstance(kept, list):
        return [line for one, other in zip(given, kept, strict=True) for line in _lost(one, other, path)]
    return []


def test_the_shipped_files_are_what_the_apis_take() -> None:
    assert objects()
    assert {entry["metadata"]["name"]: complaints(entry) for entry in objects()} == {
        "smallthinker-pretrain": []
    }


def _job(entry: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = entry["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job


def _container(entry: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = _job(entry)["template"]["spec"]["containers"][0]
    return container


SLIPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a field of the set": lambda e: e["spec"].update(failurPolicy={"maxRestarts": 1}),
    "a field of its network": lambda e: e["spec"]["network"].update(enableDNSHostname=True),
    "a field of its failure policy": lambda e: e["spec"]["failurePolicy"].update(maxRestart=3),
    "a type in the set": lambda e: e["spec"]["failurePolicy"].update(maxRestarts="3"),
    "a field of the job": lambda e: _job(e).update(completionsMode="Indexed"),
    "a field of the pod": lambda e: _job(e)["template"]["spec"].update(restartpolicy="Never"),
    "a field of the container": lambda e: _container(e).update(comand=["python"]),
    "a field of its security": lambda e: _container(e)["securityContext"].update(capability={}),
    "a type in the container": lambda e: _container(e)["ports"].append({"containerPort": "29501"}),
    "a field that is missing": lambda e: _container(e)["volumeMounts"][0].pop("mountPath"),
}


@pytest.mark.parametrize("slip", SLIPS.values(), ids=SLIPS)
def test_a_slip_is_caught(slip: Callable[[dict[str, Any]], Any]) -> None:
    entry = copy.deepcopy(job_set())
    slip(entry)
    assert complaints(entry)


def test_pods_train_as_the_launcher_and_the_recipe_say(capsys: pytest.CaptureFixture[str]) -> None:
    entry = job_set()
    container, job, config = _container(entry), _job(entry), PRESETS["21b"]()
    values = {variable["name"]: variable.get("value", "3") for variable in container["env"]}
    nodes = int(values["PET_NNODES"])
    assert job["completions"] == job["parallelism"] == nodes == config.hardware.gpus // config.processes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == config.processes
    pod = f"{entry['metadata']['name']}-{entry['spec']['replicatedJobs'][0]['name']}-0-0"
    assert values["PET_MASTER_ADDR"] == f"{pod}.{entry['metadata']['name']}"
    assert launch_command(Path("/r"), values)[-3:] == [
        f"--nodes={nodes}", f"--rendezvous={values['PET_MASTER_ADDR']}:29500", "--node-number=3"
    ]  # fmt: skip
    assert container["command"] == ["python", "-m", "flows.pretrain"]
    assert main([*container["args"], "--plan"]) == 0
    assert "256" in capsys.readouterr().out


def test_pods_are_given_time_memory_and_adapters() -> None:
    entry, grace_s = job_set(), PRESETS["21b"]().save_grace_s
    container, pod = _container(entry), _job(entry)["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= grace_s + 30
    assert "IPC_LOCK" in container["securityContext"]["capabilities"]["add"]
    assert any(name.startswith("rdma/") for name in container["resources"]["limits"])
    assert {"NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"} <= {variable["name"] for variable in container["env"]}
    assert any(volume.get("emptyDir", {}).get("medium") == "Memory" for volume in pod["volumes"])
    assert "kueue.x-k8s.io/queue-name" in entry["metadata"]["labels"]


def test_what_a_user_has_to_mend_is_not_tried_again_and_all_else_is() -> None:
    entry = job_set()
    (rule,) = _job(entry)["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [EXIT_USER_ERROR]
    assert not {EXIT_RETRY, EXIT_INTERRUPTED, 1, 137, 143} & set(rule["onExitCodes"]["values"])
    policy = entry["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 1
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert (
        _job(entry)["template"]["spec"]["restartPolicy"] == "Never"
    )  # else the policy may not look at exit codes


def test_the_image_holds_what_the_files_start() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    project = FOLDER.parents[1]
    for source in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
        assert (project / source).exists()
    ignored = (project / ".dockerignore").read_text().split()
    assert {".venv*", "build", "runs"} <= set(ignored) and not {"flows", "components", "model"} & set(ignored)
    pinned = re.search(r"uv==[\d.]+", (project / "infra" / "setup" / "environment.sh").read_text())
    assert pinned is not None and pinned[0] in text
    assert "FROM python:3.1" in text and "ibverbs-providers" in text and "g++" in text
