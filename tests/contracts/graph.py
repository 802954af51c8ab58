"""Cycles in a graph of arrows: ``cycles({"a": {"b": 3}, "b": {"a": 7}})`` is ``["a:3 -> b:7 -> a"]``."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

Arrows = Mapping[str, Mapping[str, int | str]]


def _way_back(arrows: Arrows, start: str, first: str) -> list[str] | None:
    """The shortest way from ``first`` to ``start``, both included; ``None`` where there is none."""
    came_from: dict[str, str | None] = {first: None}
    waiting = deque([first])
    while waiting:
        here = waiting.popleft()
        if here == start:
            way = []
            step: str | None = here
            while step is not None:
                way.append(step)
                step = came_from[step]
            return way[::-1]
        for there in sorted(arrows.get(here, {})):
            if there not in came_from:
                came_from[there] = here
                waiting.append(there)
    return None


def cycles(arrows: Arrows) -> list[str]:
    """For every arrow that lies on a cycle, the shortest one through it; each cycle once, as a chain.

    The values of ``arrows`` say where an arrow is (a line, or ``file:line``); the chain shows them.
    """
    found: dict[tuple[str, ...], str] = {}
    for start in sorted(arrows):
        for first in sorted(arrows[start]):
            way = _way_back(arrows, start, first)
            if way is None:
                continue
            ring = [start, *way[:-1]]
            least = ring.index(min(ring))
            ring = ring[least:] + ring[:least]
            steps = [
                f"{here}:{arrows[here][there]}"
                for here, there in zip(ring, [*ring[1:], ring[0]], strict=True)
            ]
            found.setdefault(tuple(ring), " -> ".join([*steps, ring[0]]))
    return [found[ring] for ring in sorted(found, key=lambda ring: (len(ring), ring))]


def merged(arrows: Arrows, room_of: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Arrows between rooms: modules of one room become one, arrows within it go; they keep ``module:line``."""
    rooms: dict[str, dict[str, str]] = {room: {} for room in room_of.values()}
    for here, targets in arrows.items():
        for there, where in targets.items():
            if here in room_of and there in room_of and room_of[here] != room_of[there]:
                at = str(where) if here == room_of[here] else f"{here}:{where}"
                rooms[room_of[here]].setdefault(room_of[there], at)
    return rooms
