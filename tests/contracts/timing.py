"""Finds in a test's source what hangs on time: ``findings(source)`` gives a line and a sentence for each place.

It looks for comparisons of what was read from a clock, bounds on measured seconds and speeds, waiting for time instead
of for a condition (``tests.waiting.wait_for``), limits that a busy machine may exceed, and limits of libraries that
nobody asked for. Programs within strings are looked at like the file around them. A place where time is the very
subject says so in a comment of the form of :data:`ALLOWANCE`, with its reason.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# What ends a hang lies above the floor; what sleeps for longer than the idle time is there to be killed.
FLOOR_S, IDLE_S = 60.0, 600.0
ALLOWANCE = re.compile(r"#.*\btime is the subject: \S.{11,}")
_CLOCKS = frozenset(
    name + unit
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time", "clock_gettime")
    for unit in ("", "_ns")
)
_MEASURED = re.compile(r"(_s|_ms|_us|_ns|elapsed|duration|seconds)$")
_LIMITS = re.compile(r"^(timeout|.*(timeout|ceiling|limit|patience|wait)_s)$")
# Functions and methods that take their limit by position, and where.
_LIMIT_AT = {
    "wait": 0,
    "join": 0,
    "result": 0,
    "wait_ready": 0,
    "communicate": 1,
    "acquire": 1,
    "get": 1,
    "create_connection": 1,
    "run_program": 1,
    "judge_programs": 1,
    "engine_command": 2,
    "wait_for": 2,
}
_ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_COMPARISONS = (*_ORDERS, ast.Eq, ast.NotEq)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class _Module:
    """What the names of one source mean."""

    tree: ast.Module
    times: set[str] = field(default_factory=set)  # what the module ``time`` is called
    clocks: set[str] = field(default_factory=set)  # functions that give a time
    sleeps: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                self.times |= {alias.asname or "time" for alias in node.names if alias.name == "time"}
            elif isinstance(node, ast.ImportFrom) and node.module in ("time", "asyncio", "timeit"):
                for alias in node.names:
                    if alias.name in _CLOCKS or alias.name == "default_timer":
                        self.clocks.add(alias.asname or alias.name)
                    if alias.name == "sleep":
                        self.sleeps.add(alias.asname or alias.name)

    def is_clock(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            return (name in self.times and node.attr in _CLOCKS) or (
                name == "datetime" and node.attr in ("now", "utcnow")
            )
        return isinstance(node, ast.Name) and node.id in self.clocks

    def is_sleep(self, node: ast.AST) -> bool:
        if not isinstance(node, ast.Call):
            return False
        function = node.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            return function.attr == "sleep" and function.value.id in (*self.times, "asyncio")
        return isinstance(function, ast.Name) and function.id in self.sleeps


def findings(source: str, first_line: int = 1) -> list[tuple[int, str]]:
    """Places of a Python source whose verdict hangs on time, as (line, sentence), and allowances without need."""
    lines = source.splitlines()
    allowed = {number for number, line in enumerate(lines, 1) if ALLOWANCE.search(line)}
    used: set[int] = set()
    found: list[tuple[int, str]] = []
    module = _Module(ast.parse(source))
    for node, sentence in _places(module):
        # Beside the place, within it, or on the line above it.
        excuses = allowed & set(range(node.lineno - 1, (node.end_lineno or node.lineno) + 1))
        used |= excuses
        if not excuses:
            found.append((node.lineno + first_line - 1, sentence))
    inner = [node for node in ast.walk(module.tree) if isinstance(node, ast.Constant)]
    for node in inner:
        if isinstance(node.value, str) and (program := _program(node.value)):
            found += findings(program, node.lineno + first_line - 1)
            # The allowances of a program are its own.
            used |= allowed & set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found += [(n + first_line - 1, "nothing here needs to be allowed") for n in sorted(allowed - used)]
    return sorted(found)


def _program(text: str) -> str | None:
    """The text itself when it is a Python program that imports something."""
    if "import " not in text:
        return None
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
    return text if imports else None


def _places(module: _Module) -> Iterator[tuple[ast.expr, str]]:
    read = _read_from_clocks(module)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Compare) and any(isinstance(op, _COMPARISONS) for op in node.ops):
            operands = [node.left, *node.comparators]
            if any(_touches(operand, module, read) for operand in operands):
                yield node, "compares what was read from a clock"
            elif any(isinstance(op, _ORDERS) for op in node.ops) and _bounds_a_measurement(operands):
                yield node, "bounds a measured time or speed"
        elif isinstance(node, ast.Call):
            limit = _limit(node)
            if limit is not None and limit < FLOOR_S:
                yield node, f"{limit:g} s may be too short on a busy machine: {FLOOR_S:g} at least"
            if _is_httpx_without_limit(node):
                yield node, "httpx gives up after 5 s unless it is given a timeout"
            yield from ((node, sentence) for sentence in _property_settings(node))
    for node in _bare_sleeps(module.tree, module, polling=False):
        yield node, "sleeps instead of waiting for a condition"


def _read_from_clocks(module: _Module) -> set[str]:
    """Names of variables and functions that hold or give what was read from a clock, whatever their scope."""
    read: set[str] = set()
    while True:
        before = len(read)
        for node in ast.walk(module.tree):
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
                targets = [node.target]
            elif isinstance(node, _FUNCTIONS):
                returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value]
                if any(_touches(value, module, read) for value in returned):
                    read.add(node.name)
            for target in targets:
                read |= _taken(target, node.value, module, read)  # type: ignore[attr-defined]
        if len(read) == before:
            return read


def _taken(target: ast.expr, value: ast.expr | None, module: _Module, read: set[str]) -> set[str]:
    """Names in ``target`` that get what was read from a clock; tuples are taken element by element."""
    if value is None:
        return set()
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        pairs = zip(target.elts, value.elts, strict=True)
        return {name for one, other in pairs for name in _taken(one, other, module, read)}
    if not _touches(value, module, read):
        return set()
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


def _touches(expression: ast.expr, module: _Module, read: set[str]) -> bool:
    return any(
        module.is_clock(node) or (isinstance(node, ast.Name) and node.id in read)
        for node in ast.walk(expression)
    )


def _bounds_a_measurement(operands: list[ast.expr]) -> bool:
    numbers = [number for operand in operands if (number := _number(operand)) is not None]
    return any(numbers) and any(_is_measured(operand) for operand in operands)


def _is_measured(operand: ast.expr) -> bool:
    for node in ast.walk(operand):
        name = ""
        if isinstance(node, ast.Name):
            name = node.id
        elif isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            name = str(node.slice.value)
        if _MEASURED.search(name):
            return True
    return False


def _number(node: ast.expr | None) -> float | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return None if isinstance(node.value, bool) else float(node.value)
    return None


def _limit(call: ast.Call) -> float | None:
    """The smallest literal among a call's limits, in seconds."""
    values = [word.value for word in call.keywords if word.arg and _LIMITS.match(word.arg)]
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
    place = _LIMIT_AT.get(name)
    # dict.get(key, 0) is no queue's get(True, 5).
    is_dict = name == "get" and not (call.args and isinstance(getattr(call.args[0], "value", None), bool))
    if place is not None and len(call.args) > place and not is_dict:
        values.append(call.args[place])
    numbers = [number for value in values if (number := _number(value)) is not None]
    return min(numbers, default=None)


def _is_httpx_without_limit(call: ast.Call) -> bool:
    function = call.func
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "httpx"
        and function.attr in {"get", "post", "put", "delete", "request", "stream", "Client", "AsyncClient"}
        and all(word.arg != "timeout" for word in call.keywords)
    )


def _property_settings(call: ast.Call) -> Iterator[str]:
    if not (isinstance(call.func, ast.Name) and call.func.id == "settings"):
        return
    for word in call.keywords:
        if word.arg == "deadline" and _number(word.value) is not None:
            yield "hypothesis fails examples that take longer"
        if word.arg == "suppress_health_check" and "too_slow" not in ast.unparse(word.value):
            yield "hypothesis complains of slow drawing unless too_slow is suppressed too"


def _bare_sleeps(node: ast.AST, module: _Module, polling: bool) -> Iterator[ast.Call]:
    for child in ast.iter_child_nodes(node):
        if module.is_sleep(child):
            assert isinstance(child, ast.Call)
            length = _number(child.args[0]) if child.args else None
            if not polling and (length is None or 0 < length < IDLE_S):
                yield child
        inside = polling
        if isinstance(child, (*_FUNCTIONS, ast.Lambda)):
            inside = False
        elif isinstance(child, ast.While):
            inside = not isinstance(child.test, ast.Constant) or _may_end(child)
        elif isinstance(child, ast.For | ast.AsyncFor):
            inside = _may_end(child)
        yield from _bare_sleeps(child, module, inside)


def _may_end(loop: ast.AST) -> bool:
    return any(isinstance(node, ast.Break | ast.Return | ast.Raise | ast.Assert) for node in ast.walk(loop))
