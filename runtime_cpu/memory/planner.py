"""How much of what an engine holds within a memory budget: context, sessions, and room for experts.

planner = Planner(model, threads=2, kv_type="auto", chunk_tokens=256, kernels="auto", budget=1 << 30)
context, sessions, plan = planner.fit(context=None, sessions=None)
"""

from __future__ import annotations

from contextlib import suppress

from runtime_cpu import _core
from runtime_cpu.memory.plan import MemoryBudgetError, MemoryPlan, format_bytes
from runtime_cpu.memory.process import release_free_memory, resident_bytes
from runtime_cpu.text.tokenizer import Tokenizer, TokenizerError

DEFAULT_SESSIONS = 4
_CONTEXT_STEP = 256
_WORTH_OFFLOADING = 4096  # a shorter context than this is not worth keeping all experts in memory
_RESERVE_BYTES = 24 << 20  # for what Python allocates while it serves
_HUGE_PAGE = 2 << 20


def preload(model: _core.Model) -> Tokenizer | None:
    """Load now what an engine would load later: Jinja, and the tokenizer, which is returned if there is one.

    A budget is for the whole process: what came after the plan was made would break its promise.
    """
    import runtime_cpu.text.chat_template  # noqa: F401

    tokenizer = None
    with suppress(TokenizerError):
        tokenizer = Tokenizer.from_model(model)
    release_free_memory()
    return tokenizer


class Planner:
    """Finds context, sessions and room for experts within a budget."""

    def __init__(
        self,
        model: _core.Model,
        threads: int,
        kv_type: str,
        chunk_tokens: int,
        kernels: str,
        budget: int | None,
        head: str = "exact",
        experts_in_memory: int | None = None,
    ) -> None:
        self._slots = experts_in_memory
        self._predict_head = head == "predictor"
        self._model = model
        self._budget = budget
        self._arguments = (threads, kv_type, chunk_tokens, kernels)
        self._interpreter_bytes = resident_bytes() + (0 if budget is None else _RESERVE_BYTES)
        self._all_experts = model.layers * model.experts

    def plan(self, context: int, sessions: int, slots: int | None = None) -> MemoryPlan:
        """With all experts in memory, or room for ``slots`` of them."""
        threads, kv_type, chunk_tokens, kernels = self._arguments
        base = _core.plan(
            self._model,
            threads=threads,
            context=context,
            kv_type=kv_type,
            chunk_tokens=chunk_tokens,
            kernels=kernels,
            offload=slots is not None,
            predict_head=self._predict_head,
        )
        experts = self._all_experts if base.expert_bytes else 0
        held = experts if slots is None else min(slots, experts)
        return MemoryPlan(
            weight_bytes=base.weight_bytes,
            expert_bytes=_whole_pages(held * base.expert_bytes),
            experts_in_memory=held,
            experts=experts,
            kv_bytes=base.kv_bytes_per_session * sessions,
            scratch_bytes=base.scratch_bytes + (base.offload_bytes if held < experts else 0),
            interpreter_bytes=self._interpreter_bytes,
            budget_bytes=self._budget,
        )

    def fit(self, context: int | None, sessions: int | None) -> tuple[int, int, MemoryPlan]:
        """What was asked for, else the most that the budget allows.

        Everything in memory comes first, if need be with a shorter context; then as many experts as fit beside a
        context whose KV cache takes at most an eighth of the budget.

        Raises:
            MemoryBudgetError: the budget is too small for anything; it says what would do.
        """
        whole = self._model.context_length
        if self._budget is None:
            context, sessions = context or whole, sessions or DEFAULT_SESSIONS
            return context, sessions, self.plan(context, sessions, self._slots)
        session_choices = [sessions] if sessions else list(range(DEFAULT_SESSIONS, 0, -1))
        least = session_choices[-1]
        steps = range((whole - 1) // _CONTEXT_STEP * _CONTEXT_STEP, 0, -_CONTEXT_STEP)
        contexts = [context] if context else [whole, *steps]
        can_offload = self._can_offload()
        for size in contexts:
            if can_offload and size < min(contexts[0], _WORTH_OFFLOADING):
                break
            if self._fits(self.plan(size, least)):
                # One long sequence is worth more than several short ones: first the context, then the sessions.
                for count in session_choices:
                    plan = self.plan(size, count)
                    if self._fits(plan):
                        return size, count, plan
        smallest = context or min(whole, _CONTEXT_STEP)
        needed = self.plan(smallest, least, self._model.experts_per_token if can_offload else None)
        if not self._fits(needed):
            total = needed.total_bytes
            raise MemoryBudgetError(
                f"memory is {format_bytes(self._budget)} and the smallest plan needs {needed}; "
                f"allow at least {total} bytes ({total / 2**20:.1f} MiB)",
                total,
            )
        if not can_offload:
            return smallest, least, needed
        offloading = [size for size in contexts if size <= _WORTH_OFFLOADING] or contexts[-1:]
        for size in offloading:
            candidate = self._with_most_experts(size, least)
            modest = context or size == offloading[-1] or self.plan(size, least).kv_bytes <= self._budget // 8
            if candidate is not None and modest:
                return size, least, candidate
        return smallest, least, self._with_most_experts(smallest, least) or needed

    def _fits(self, plan: MemoryPlan) -> bool:
        return self._budget is None or plan.total_bytes <= self._budget

    def _can_offload(self) -> bool:
        return self.plan(1, 1, 1).experts > 0

    def _with_most_experts(self, context: int, sessions: int) -> MemoryPlan | None:
        assert self._budget is not None
        empty = self.plan(context, sessions, 0)
        room = (self._budget - empty.total_bytes) // _HUGE_PAGE * _HUGE_PAGE
        slots = room // self._model.expert_bytes
        return self.plan(context, sessions, slots) if slots >= self._model.experts_per_token else None


def _whole_pages(size: int) -> int:
    return -(-size // _HUGE_PAGE) * _HUGE_PAGE
