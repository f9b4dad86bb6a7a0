"""What the library wants to reach, and rows 'goal / reached' from measured cases.

Deformable convolution at the price of an ordinary one: most goals are ratios of our time to that of another
implementation, taken inside the rounds; "faster" turns the ratio round.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dcn_np.commands.bench import BASELINE
from dcn_np.commands.bench_timing import Case, in_round_ratio

DENSE = ("S1", "S2", "S3", "S4", "S5", "S8")
LARGE = ("S2", "S3", "S4", "S5")
SPARSE = ("S6", "S7", "S10")
TIMES_FASTER_THAN_TORCHVISION = {1: 10.0, 2: 18.0}
CALL_SECONDS = 0.05e-3


@dataclasses.dataclass(frozen=True)
class Row:
    """One goal and what was reached, over the shapes that were measured."""

    title: str
    at_least: bool
    goal: float
    reached: float  # NaN: not measured
    shapes: tuple[str, ...]
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if math.isnan(self.reached):
            return None
        return self.reached >= self.goal if self.at_least else self.reached <= self.goal

    def record(self) -> dict[str, Any]:
        """The row as JSON."""
        return dataclasses.asdict(self) | {"met": self.met}

    def __str__(self) -> str:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        goal = f"{'at least' if self.at_least else 'at most'} {self.goal:g}{self.unit}"
        reached = "-" if self.met is None else f"{self.reached:.3f}{self.unit}"
        return f"{self.title:66}{goal:>16}{reached:>12}  {verdict:14}{','.join(self.shapes)}"


class Measured:
    """The cases of one run, found by what they are."""

    def __init__(self, cases: Sequence[Case], own: str) -> None:
        self.own = own
        self._cases = {self._key(case): case for case in cases}

    @staticmethod
    def _key(case: Case) -> tuple[str, str, str, str, int]:
        return case.problem.name, case.passes, case.implementation.name, case.dtype, case.threads

    def seconds(
        self, shape: str, passes: str, name: str, threads: int, dtype: str = "float32"
    ) -> list[float]:
        """Seconds per round, empty where it was not timed."""
        case = self._cases.get((shape, passes, name, dtype, threads))
        return case.seconds if case else []

    def against(self, shape: str, passes: str, threads: int, other: str) -> float:
        """Our time over the time of another implementation."""
        ours, theirs = (self.seconds(shape, passes, name, threads) for name in (self.own, other))
        return in_round_ratio(ours, theirs)


Ratio = Callable[[str], float]


def rows(cases: Sequence[Case], own: str = "dcn_np") -> list[Row]:
    """Every goal that the passes and threads of ``cases`` speak of."""
    measured = Measured(cases, own)
    threads = sorted({case.threads for case in cases})
    found: list[Row] = []
    for count in threads:
        found += _one_count(measured, count)
    found += _second_thread(measured, threads)
    found += _variants(measured, threads)
    return found


def _one_count(measured: Measured, threads: int) -> Iterator[Row]:
    suffix = f"{threads} thread{'s' if threads > 1 else ''}"

    def against(other: str, passes: str) -> Ratio:
        return lambda shape: measured.against(shape, passes, threads, other)

    forward, both = f"forward, {suffix}", f"forward + backward, {suffix}"
    yield _mean(f"{forward}: to the ordinary convolution, mean", 1.1, DENSE, against(BASELINE, "forward"))
    yield _worst(f"{forward}: to the ordinary convolution, worst", 1.25, DENSE, against(BASELINE, "forward"))
    yield _mean(f"{forward}: to openvino, mean", 0.95, DENSE, against("openvino", "forward"))
    yield _worst(f"{forward}: to openvino, worst", 1.05, DENSE, against("openvino", "forward"))
    yield _mean(f"{both}: to the ordinary convolution, mean", 1.2, DENSE, against(BASELINE, "both"))
    yield _worst(f"{both}: to the ordinary convolution, worst", 1.5, DENSE, against(BASELINE, "both"))
    for shape in SPARSE:
        ratio = against("onnxruntime", "forward")
        yield _faster(f"{forward}: faster than onnxruntime", 3.0, (shape,), ratio)
    if threads in TIMES_FASTER_THAN_TORCHVISION:
        goal = TIMES_FASTER_THAN_TORCHVISION[threads]
        for shapes in (DENSE, *((shape,) for shape in SPARSE)):
            yield _faster(f"{both}: faster than torchvision", goal, shapes, against("torchvision", "both"))
    seconds = measured.seconds("S9", "forward", measured.own, threads)
    reached = statistics.median(seconds) * 1e3 if seconds else math.nan
    yield Row(f"{forward}: one small call", False, CALL_SECONDS * 1e3, reached, ("S9",), " ms")


def _second_thread(
    measured: Measured, threads: Sequence[int], shapes: Sequence[str] = LARGE
) -> Iterator[Row]:
    if not {1, 2} <= set(threads):
        return
    for passes in ("forward", "both"):

        def ratio(shape: str, passes: str = passes) -> float:
            one, two = (measured.seconds(shape, passes, measured.own, count) for count in (1, 2))
            return in_round_ratio(one, two)

        for shape in shapes:
            yield _mean(f"{passes}: gain of the second thread", 1.8, (shape,), ratio, at_least=True)


def _variants(measured: Measured, threads: Sequence[int]) -> Iterator[Row]:
    """AVX2 beside AVX-512, float64 beside float32: rows only where both were timed."""
    for passes in ("forward", "both"):
        for count in threads:

            def isa(shape: str, passes: str = passes, count: int = count) -> float:
                names = ("dcn_np-avx2", "dcn_np-avx512")
                return in_round_ratio(*(measured.seconds(shape, passes, name, count) for name in names))

            def dtype(shape: str, passes: str = passes, count: int = count) -> float:
                key = (shape, passes, measured.own, count)
                return in_round_ratio(*(measured.seconds(*key, name) for name in ("float64", "float32")))

            for title, goal, ratio in (("avx2 to avx512", 1.15, isa), ("float64 to float32", 2.3, dtype)):
                row = _worst(f"{passes}, threads {count}: {title}, worst", goal, DENSE, ratio)
                if row.met is not None:
                    yield row


def region_rows(cases: Sequence[Case], own: str = "dcn_np") -> list[Row]:
    """The goals of regions.py: R1 is roi_align, R2 and R3 are deformable, R4 is position-sensitive."""
    measured = Measured(cases, own)
    threads = sorted({case.threads for case in cases})
    found: list[Row] = []
    for count in threads:
        suffix = f"{count} thread{'s' if count > 1 else ''}"
        rivals = (("R1", "forward", "onnxruntime"), ("R1", "both", "paddle"), ("R4", "forward", "openvino"))
        for shape, passes, other in rivals:

            def ratio(shape: str, passes: str = passes, count: int = count, other: str = other) -> float:
                return measured.against(shape, passes, count, other)

            found.append(_faster(f"{passes}, {suffix}: faster than {other}", 3.0, (shape,), ratio))
        for shape, passes in itertools.product(("R2", "R3"), ("forward", "both")):
            reached = in_round_ratio(*(measured.seconds(name, passes, own, count) for name in (shape, "R1")))
            found.append(Row(f"{passes}, {suffix}: to roi_align", False, 1.3, reached, (shape,)))
    return found + list(_second_thread(measured, threads, ("R1", "R2", "R3", "R4")))


def _timed(shapes: Sequence[str], ratio: Ratio) -> dict[str, float]:
    ratios = {shape: ratio(shape) for shape in shapes}
    return {shape: value for shape, value in ratios.items() if not math.isnan(value)}


def _mean(title: str, goal: float, shapes: Sequence[str], ratio: Ratio, at_least: bool = False) -> Row:
    ratios = _timed(shapes, ratio)
    reached = statistics.geometric_mean(ratios.values()) if ratios else math.nan
    return Row(title, at_least, goal, reached, tuple(ratios or shapes))


def _worst(title: str, goal: float, shapes: Sequence[str], ratio: Ratio) -> Row:
    ratios = _timed(shapes, ratio)
    return Row(title, False, goal, max(ratios.values(), default=math.nan), tuple(ratios or shapes))


def _faster(title: str, goal: float, shapes: Sequence[str], ratio: Ratio) -> Row:
    return _mean(title, goal, shapes, lambda shape: 1 / ratio(shape), at_least=True)
