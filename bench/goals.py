"""Speed goals next to what was measured. A goal is a ratio to the fastest of its rivals in the same run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

__all__ = ["COLUMNS", "Goal", "human_time", "row"]

COLUMNS = ("measure", "ours", "rival", "rival's", "times as fast", "must be", "aim", "")


@dataclasses.dataclass(frozen=True)
class Goal:
    """`ours` must be `must` times as fast as the fastest of `rivals`, and should be `aim` times. None: only
    reported."""

    measure: str
    ours: str
    rivals: tuple[str, ...]
    must: float | None = None
    aim: float | None = None


def row(goal: Goal, seconds: Mapping[str, float], show: Callable[[float], str]) -> tuple[str, ...]:
    """The goal's row under `COLUMNS`. seconds: name -> measured seconds. show: formats them."""
    must, aim = ("" if value is None else f"{value:g}" for value in (goal.must, goal.aim))
    rivals = [name for name in goal.rivals if name in seconds]
    if goal.ours not in seconds or not rivals:
        return (goal.measure, goal.ours, " or ".join(goal.rivals), "-", "-", must, aim, "not measured")
    rival = min(rivals, key=seconds.__getitem__)
    ratio = seconds[rival] / seconds[goal.ours]
    ours = f"{goal.ours}: {show(seconds[goal.ours])}"
    return (goal.measure, ours, rival, show(seconds[rival]), f"{ratio:.2f}", must, aim, _verdict(goal, ratio))


def human_time(seconds: float) -> str:
    """Microseconds up to ten thousand, milliseconds from there on."""
    return f"{seconds * 1e6:.0f} us" if seconds < 0.01 else f"{seconds * 1e3:.1f} ms"


def _verdict(goal: Goal, ratio: float) -> str:
    if goal.must is None:
        return "reported"
    if ratio < goal.must:
        return "short of it"
    return "aim reached" if goal.aim is not None and ratio >= goal.aim else "reached"
