"""Counters of the server in Prometheus' text format.

metrics = ServerMetrics()
metrics.count_request("/v1/models", 200)
metrics.render()
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict

from runtime_cpu.engine.stats import Stats
from runtime_cpu.memory.process import peak_resident_bytes, resident_bytes

PREFIX = "smallthinker"


class ServerMetrics:
    """Thread safe; every value starts at zero."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._finished: Counter[str] = Counter()
        self._totals: defaultdict[str, float] = defaultdict(float)
        self.running = 0
        self.admitted = 0

    def count_request(self, route: str, status: int) -> None:
        """One HTTP answer."""
        with self._lock:
            self._requests[route, status] += 1

    def count_running(self, change: int) -> None:
        """A generation begins (+1) or ends (-1)."""
        with self._lock:
            self.running += change

    def count_generation(self, stats: Stats) -> None:
        """One generation that has ended, for whatever reason."""
        with self._lock:
            self._finished[stats.finish_reason or "error"] += 1
            self._totals["prompt_tokens"] += stats.prompt_tokens
            self._totals["prompt_tokens_reused"] += stats.reused_tokens
            self._totals["generated_tokens"] += stats.generated_tokens
            self._totals["decode_steps"] += stats.decode_steps
            self._totals["prompt_s"] += stats.prompt_s
            self._totals["decode_s"] += stats.decode_s
            if stats.first_token_s:
                self._totals["first_token_s"] += stats.first_token_s
                self._totals["first_tokens"] += 1

    def render(self) -> str:
        """The exposition text."""
        with self._lock:
            totals = self._totals
            lines: list[str] = []
            _add(
                lines,
                "http_requests_total",
                "counter",
                "HTTP answers by route and status.",
                {
                    f'{{route="{route}",status="{status}"}}': count
                    for (route, status), count in sorted(self._requests.items())
                },
            )
            _add(
                lines,
                "generations_total",
                "counter",
                "Generations by the reason they ended.",
                {f'{{finish="{name}"}}': count for name, count in sorted(self._finished.items())},
            )
            for name, help_text in (
                ("prompt_tokens", "Prompt tokens received."),
                ("prompt_tokens_reused", "Prompt tokens found in the KV cache."),
                ("generated_tokens", "Tokens given out."),
            ):
                _add(lines, f"{name}_total", "counter", help_text, {"": totals[name]})
            _add(
                lines, "prompt_seconds_total", "counter", "Time computing prompts.", {"": totals["prompt_s"]}
            )
            _add(
                lines, "decode_seconds_total", "counter", "Time computing answers.", {"": totals["decode_s"]}
            )
            _add(
                lines,
                "decode_steps_total",
                "counter",
                "Tokens computed one by one; over decode_seconds_total: the decoding speed.",
                {"": totals["decode_steps"]},
            )
            _add(
                lines,
                "first_token_seconds",
                "summary",
                "From the start of a generation to its first token.",
                {"_sum": totals["first_token_s"], "_count": totals["first_tokens"]},
            )
            _add(lines, "running", "gauge", "Generations being computed.", {"": self.running})
            _add(
                lines,
                "waiting",
                "gauge",
                "Generations in the queue.",
                {"": max(self.admitted - self.running, 0)},
            )
            _add(lines, "resident_bytes", "gauge", "Memory held by the process.", {"": resident_bytes()})
            _add(
                lines, "peak_resident_bytes", "gauge", "Most memory held so far.", {"": peak_resident_bytes()}
            )
        return "\n".join(lines) + "\n"


def _add(lines: list[str], name: str, kind: str, help_text: str, values: dict[str, float]) -> None:
    lines.append(f"# HELP {PREFIX}_{name} {help_text}")
    lines.append(f"# TYPE {PREFIX}_{name} {kind}")
    lines.extend(f"{PREFIX}_{name}{suffix} {value:.17g}" for suffix, value in values.items())
