"""GPUs that kernels are compiled for on a machine without one: ``with stand_in(TARGETS["h100"]): ...``.

Inductor and Triton ask the GPU for its properties, make it current and take its stream; they need no more to write and
compile kernels. Within ``stand_in`` these questions are answered from a table. It belongs into a process of its own
that called ``load_fake_cuda()``.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch


@dataclass(frozen=True)
class Target:
    """A GPU as its kernels see it.

    The limits are those of CUDA's programming guide, table "technical specifications per compute capability"; they are
    the same for both architectures here.

    Attributes:
        name: as the driver reports it; Inductor looks for some.
        capability: compute capability; Triton compiles for ``sm_<capability>a``.
        multiprocessors: of the whole GPU.
        memory_bytes: of the whole GPU.
        block_shared_bytes: shared memory that one block can ask for (227 KiB).
        thread_registers: that one thread can address.
        block_registers: of one multiprocessor, so also the most that one block can have.
        tensor_columns: of tensor memory, which Blackwell's matrix products accumulate in.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    block_shared_bytes: int = 232_448
    thread_registers: int = 255
    block_registers: int = 65_536
    tensor_columns: int = 0

    @property
    def arch(self) -> int:
        """The capability as Triton writes it: 90, 100."""
        return 10 * self.capability[0] + self.capability[1]

    @property
    def properties(self) -> SimpleNamespace:
        """What ``torch.cuda.get_device_properties`` would give, as far as Inductor asks."""
        return SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.multiprocessors,
            total_memory=self.memory_bytes,
            warp_size=32,
            max_threads_per_block=1024,
            max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=self.block_registers,
            shared_memory_per_block=49_152,
            shared_memory_per_block_optin=self.block_shared_bytes,
            shared_memory_per_multiprocessor=self.block_shared_bytes + 1024,
            gcnArchName="",
        )


TARGETS = {
    "h100": Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 80 * 2**30),
    "b200": Target("NVIDIA B200", (10, 0), 148, 180 * 2**30, tensor_columns=512),
}


def _triton_driver(target: Target) -> Any:
    """What Triton asks instead of libcuda."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", target.arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        is_active=lambda: True,
    )


def _on_cpu(make: Any, *arguments: Any, **options: Any) -> Any:
    return make(*arguments, **{**options, "device": "cpu"})


@cache
def _constants_on_cpu() -> Any:
    """From now on tensors that are made on the GPU for real are on the CPU: Inductor's constants and examples."""
    import torch

    library = torch.library.Library("aten", "IMPL")
    for name, make in (("empty.memory_format", torch.empty), ("empty_strided", torch.empty_strided)):
        library.impl(name, partial(_on_cpu, make), "CUDA")
    return library


@contextmanager
def stand_in(target: Target) -> Iterator[None]:
    """Within, torch and Triton take the machine's GPU for a ``target``; nothing can run on it.

    Constants that Inductor computes on the GPU while it compiles are computed on the CPU.
    """
    import torch
    import triton
    from torch._dynamo.device_interface import CudaInterface, device_interfaces, get_interface_for_device
    from torch._inductor.runtime import triton_helpers
    from torch.utils._triton import has_triton

    properties = target.properties

    class Interface(CudaInterface):
        """Dynamo's and Inductor's view of the GPU."""

        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        is_available = staticmethod(lambda: True)
        get_device_properties = staticmethod(lambda device=None: properties)  # type: ignore[assignment]
        get_compute_capability = staticmethod(lambda device=None: target.arch)
        is_triton_capable = staticmethod(lambda device=None: True)

        class Worker:
            """The same for Inductor's own processes."""

            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: properties)

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: target.capability,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    get_interface_for_device("cpu")  # the first call registers torch's own, which ours must follow
    _constants_on_cpu()
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.version, "cuda", "12.8"))
        stack.enter_context(
            patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True)
        )
        stack.enter_context(patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        stack.enter_context(patch.dict(device_interfaces, {"cuda": Interface, "cuda:0": Interface}))
        triton.runtime.driver.set_active(_triton_driver(target))
        has_triton.cache_clear()
        yield
