"""What the CUDA engine has to reach, and the table of what it reached.

Ratios of times are taken inside the rounds, their median counts. A gate is met if every shape meets it; the
table names the shape that is furthest from doing so. A layer of ours that was refused meets no gate.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dcn_np.commands.bench_timing import in_round_ratio

from .problems import LAYOUTS, OFFSETS, Accuracy, Result, Shape

OWN, TORCHVISION, CONVOLUTION = "dcn_np", "torchvision", "convolution"
FLOAT16_ERROR = 3e-4
# A pool hands out whole blocks of 512 bytes, for a handful of arrays.
ROUNDING_BYTES = 4096
VERDICTS = {True: "met", False: "NOT MET", None: "not measured"}


@dataclasses.dataclass(frozen=True)
class Gate:
    """A ratio between times: ours in ``mode`` and of another implementation in ``other_mode``."""

    passes: str
    mode: str
    other: str
    other_mode: str
    limit: Callable[[Shape], float]
    goal: float
    faster: bool = True  # their time over ours, at least; else ours over theirs, at most

    @property
    def title(self) -> str:
        work = "forward + backward" if self.passes == "both" else self.passes
        other = f"{self.other} {self.other_mode}" if self.other_mode != self.mode else self.other
        return f"{self.mode} {work}, {'faster than' if self.faster else 'time to'} {other}"


def _half_limit(shape: Shape) -> float:
    return 1.5 if shape.channels >= 512 else 2.5


GATES = (
    Gate("forward", "float16", TORCHVISION, "float16", _half_limit, 5.0),
    Gate("forward", "float16", CONVOLUTION, "float16", lambda shape: 2.0, 1.4, faster=False),
    Gate("forward", "tf32", TORCHVISION, "float32", lambda shape: 4.0, 8.0),
    Gate("forward", "float32", TORCHVISION, "float32", lambda shape: 1.5, 2.5),
    Gate("both", "float16", TORCHVISION, "float16", lambda shape: 3.0, 7.0),
)


@dataclasses.dataclass(frozen=True)
class Reached:
    """What one shape reached and has to."""

    where: str
    value: float
    limit: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A gate under one kind of offsets and one memory layout."""

    title: str
    at_least: bool
    reached: tuple[Reached, ...]
    goal: float | None = None
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        return self._all(lambda one: one.limit)

    @property
    def goal_met(self) -> bool | None:
        """None where nothing was measured, or there is no goal beyond the gate."""
        goal = self.goal
        return None if goal is None else self._all(lambda one: goal)

    def _all(self, limit: Callable[[Reached], float]) -> bool | None:
        if not self.reached:
            return None
        if self.at_least:
            return all(one.value >= limit(one) for one in self.reached)
        return all(one.value <= limit(one) for one in self.reached)

    @property
    def worst(self) -> Reached | None:
        """The one furthest from its limit; not a number is further than any."""

        def lack(one: Reached) -> float:
            lacking = one.limit - one.value if self.at_least else one.value - one.limit
            return math.inf if math.isnan(lacking) else lacking / max(one.limit, 1e-9)

        return max(self.reached, key=lack, default=None)

    def record(self) -> dict[str, Any]:
        """The row as JSON."""
        names = ("title", "at_least", "goal", "unit", "met", "goal_met")
        return {name: getattr(self, name) for name in names} | {
            "reached": [dataclasses.asdict(one) for one in self.reached]
        }

    def __str__(self) -> str:
        worst = self.worst
        if worst is None:
            return f"{self.title:84}{VERDICTS[None]}"
        bound = f"{'>=' if self.at_least else '<='} {worst.limit:g}{self.unit}"
        goal = "" if self.goal is None else f"  (goal {self.goal:g}{self.unit}: {VERDICTS[self.goal_met]})"
        found = f"{worst.value:.3g}{self.unit}"
        return f"{self.title:84}{bound:>11}{found:>11}  {VERDICTS[self.met]:9}{worst.where}{goal}"


def rows(results: Sequence[Result], accuracy: Sequence[Accuracy]) -> list[Row]:
    """Every gate, measured or not."""
    found = [_timed(results, *choice) for choice in _choices()]
    errors = tuple(
        Reached(f"{row.image}, {row.offsets}, {row.layout}", row.error, FLOAT16_ERROR)
        for row in accuracy
        if row.implementation == OWN
    )
    found.append(Row("float16 forward, relative error", False, errors, unit=""))
    found += [_memory(results, layout) for layout in LAYOUTS]
    return found


def _choices() -> Iterator[tuple[Gate, str, str]]:
    for gate in GATES:
        for offsets in OFFSETS:
            for layout in LAYOUTS:
                yield gate, offsets, layout


def _timed(results: Sequence[Result], gate: Gate, offsets: str, layout: str) -> Row:
    chosen = [result for result in results if (result.offsets, result.passes) == (offsets, gate.passes)]
    theirs = {
        result.shape: result.seconds
        for result in chosen
        if (result.implementation, result.mode) == (gate.other, gate.other_mode)
    }
    reached = []
    for ours in chosen:
        if (ours.implementation, ours.mode, ours.layout) == (OWN, gate.mode, layout):
            pair = ours.seconds, theirs.get(ours.shape, [])
            ratio = in_round_ratio(*(reversed(pair) if gate.faster else pair))
            if ours.refused or not math.isnan(ratio):
                where = f"{ours.shape.name}{' refused' if ours.refused else ''}"
                reached.append(Reached(where, ratio, gate.limit(ours.shape)))
    return Row(f"{gate.title}: {offsets}, {layout}", gate.faster, tuple(reached), gate.goal)


def _memory(results: Iterable[Result], layout: str) -> Row:
    """Extra memory of the forward pass in copies of x; the packed copy of the weights is not counted."""
    limit = 0.0 if layout == "channels-last" else 1.0
    reached = tuple(
        Reached(
            f"{result.shape.name}, {result.mode}, {result.offsets}",
            max(0, result.extra_bytes - result.weight_bytes - ROUNDING_BYTES) / result.x_bytes,
            limit,
        )
        for result in results
        if (result.implementation, result.passes, result.layout) == (OWN, "forward", layout)
        and result.extra_bytes is not None
    )
    title = f"forward, extra memory beside packed weights, in copies of x: {layout}"
    return Row(title, False, reached, unit="")


def table(found: Sequence[Row]) -> str:
    """The rows, and how many of them are what."""
    counts = dict.fromkeys(VERDICTS.values(), 0)
    for row in found:
        counts[VERDICTS[row.met]] += 1
    header = f"{'gate, offsets, layout':84}{'gate':>11}{'worst':>11}  {'verdict':9}where"
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join([header, *map(str, found), summary])


def means(results: Sequence[Result]) -> list[str]:
    """A line for each ratio of the gates with its value on every shape and their geometric mean."""
    lines = []
    for choice in _choices():
        row = _timed(results, *choice)
        if row.reached:
            values = [one.value for one in row.reached if not math.isnan(one.value)] or [math.nan]
            each = ", ".join(f"{one.where} {one.value:.2f}" for one in row.reached)
            lines.append(
                f"{row.title}: mean {math.exp(statistics.fmean(map(math.log, values))):.2f} ({each})"
            )
    return lines
