"""Run by test_dry_run.py in a process of its own: ``python -m tests.pretraining.dry_job``; prints JSON."""

from __future__ import annotations

from components.pretraining.dry_run.fake_cuda import load_fake_cuda

load_fake_cuda()

import json  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import model.modeling as modeling  # noqa: E402
from components.pretraining.config import PretrainConfig  # noqa: E402
from components.pretraining.dry_run.dry_run import dry_config, dry_run, parser  # noqa: E402
from components.pretraining.dry_run.step_ledger import StepLedger  # noqa: E402
from model.attention import Attention  # noqa: E402
from model.experts import Router  # noqa: E402


def config(*arguments: str, **changes: Any) -> PretrainConfig:
    small = dry_config(
        parser().parse_args(["--preset", "smoke", "--processes", "1", "--layers", "2", *arguments])
    )
    return small.model_copy(update=changes)


def run(settings: PretrainConfig, processes: int = 1) -> dict[str, Any]:
    torch._dynamo.reset()
    return dry_run(settings, processes, 100.0, 1.0)


def toy() -> dict[str, Any]:
    """Two products and a sum, to be counted by hand."""
    with FakeTensorMode(), StepLedger(1e12, 1e12) as ledger:
        a = torch.empty(100, 1000, device="cuda", requires_grad=True)
        b = torch.empty(1000, 50, device="cuda")
        ledger.label([b], "weights")
        y = a @ b
        z = y + 1.0
        del y
        live = ledger.live_bytes
        z.sum().backward()
        assert a.grad is not None
        total, peak = ledger.total(), ledger.peak
        del a, b, z
        return {
            "live": live,
            "peak": peak.live_bytes,
            "weights": peak.by_kind["weights"],
            "left": ledger.live_bytes,
            "flops": total.flops,
            "product": next(vars(cost) for key, cost in ledger.costs.items() if key[1:] == ("forward", "mm")),
        }


def misaligned() -> str:
    """The products' own checks apply: rows of 5 bf16 values are not multiples of 16 bytes."""
    with FakeTensorMode():
        a = torch.empty(8, 5, device="cuda", dtype=torch.bfloat16)
        b = torch.empty(2, 5, 8, device="cuda", dtype=torch.bfloat16)
        try:
            torch.nn.functional.grouped_mm(a, b, offs=torch.empty(2, device="cuda", dtype=torch.int32))
        except RuntimeError as error:
            return str(error)
    return ""


def spoiled(owner: type[nn.Module], spoil: Any) -> str:
    """The error of a run whose ``owner.forward`` does something more."""
    forward = owner.forward

    def replaced(self: Any, x: Tensor, *rest: Any) -> Any:
        spoil(x)
        return forward(self, x, *rest)

    owner.forward = replaced  # type: ignore[method-assign]
    try:
        run(config("--layers", "1", compile_layers=True))
    except Exception as error:  # its name is what the test asks for
        return type(error).__name__
    finally:
        owner.forward = forward  # type: ignore[method-assign]
    return ""


def waiting() -> dict[str, int]:
    """The host waits of a step with a copy from the host that is waited for."""
    full = modeling.torch.full

    def waited(size: Any, value: Any, device: Any) -> Tensor:
        return torch.tensor(value).to(device)

    modeling.torch.full = waited  # type: ignore[assignment]
    try:
        waits: dict[str, int] = run(config("--layers", "1"))["host_waits"]
        return waits
    finally:
        modeling.torch.full = full  # type: ignore[assignment]


def main() -> None:
    """All of it."""
    recipe = {"compile_layers": True, "activation_checkpointing": True, "zero_stage": 2}
    print(
        json.dumps(
            {
                "toy": toy(),
                "misaligned": misaligned(),
                "plain": run(config()),
                "recipe": run(config(**recipe), processes=4),
                "item": spoiled(Router, lambda x: x.sum().item()),
                "break": spoiled(Attention, lambda x: torch._dynamo.graph_break()),
                "waiting": waiting(),
            }
        )
    )


if __name__ == "__main__":
    main()
