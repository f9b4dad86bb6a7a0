"""Validate implementations of one layer, then time them in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy

from dcn_np.commands.bench_problems import Data, Expected, Problem, WrongResultError

CALL_SECONDS = 0.02  # a round repeats shorter calls until they take as long as this
SETTLE_SECONDS = 0.01  # pools were seen to spin for up to 4 ms after their work; see `interleave`
FIRST_SETTLE_SECONDS = 0.2  # NumPy's BLAS, which the reference uses


@dataclasses.dataclass(frozen=True)
class Work:
    """One layer made ready by one implementation."""

    run: Callable[[], Any]
    results: Callable[[Any], Mapping[str, numpy.ndarray]]  # of what `run` returns: "y", and gradients by name
    settings: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext  # entered untimed


class Implementation(Protocol):
    """A library that can be timed."""

    name: str
    version: str
    deforms: bool  # False: an ordinary convolution, which ignores offsets and masks

    def prepare(self, problem: Problem, data: Data, passes: str, threads: int) -> Work | None:
        """Make a layer ready to run, or return None for what this library does not have."""


@dataclasses.dataclass
class Case:
    """One implementation on one shape, and what became of it."""

    implementation: Implementation
    problem: Problem
    passes: str
    dtype: str
    threads: int
    calls: int = 1  # in each round
    seconds: list[float] = dataclasses.field(default_factory=list)  # per call, one entry for each round
    residuals: dict[str, float] = dataclasses.field(default_factory=dict)
    refused: str | None = None  # why there are no times

    @property
    def residual(self) -> float:
        return max(self.residuals.values(), default=math.nan)

    @property
    def spread(self) -> float:
        """The slowest round over the fastest."""
        return max(self.seconds) / min(self.seconds) if self.seconds else math.nan

    def record(self) -> dict[str, Any]:
        """The case as JSON."""
        implementation = self.implementation
        fields = ("passes", "dtype", "threads", "calls", "seconds", "residuals", "refused")
        record = {"shape": self.problem.name, "implementation": implementation.name}
        record |= {"version": implementation.version} | {name: getattr(self, name) for name in fields}
        return record | {"median": statistics.median(self.seconds) if self.seconds else None}


class Timed(Protocol):
    """What `interleave` knows of a case."""

    calls: int
    seconds: list[float]


def measure(work: Work, calls: int) -> float:
    """Seconds per call; before a series of short calls, one more to warm the caches."""
    with work.settings():
        if calls > 1:
            work.run()
        start = time.perf_counter()
        for _ in range(calls):
            work.run()
        return (time.perf_counter() - start) / calls


def validate(work: Work, expected: Expected, passes: str) -> dict[str, float]:
    """Run once and compare with the reference; raises WrongResultError."""
    with work.settings():
        results = work.results(work.run())
        return expected.residuals(results, passes)


def interleave(
    cases: Sequence[tuple[Timed, Work]],
    rounds: int,
    settle: float = SETTLE_SECONDS,
    progress: Callable[[list[int]], Iterable[int]] = iter,
) -> None:
    """Time all cases in every round, in a new random order each round; nothing is discarded.

    Threads of the libraries wait for work by spinning. Each implementation has as many threads as its case
    says, and the pause before each turn is longer than they spin: nobody computes beside a spinning pool.
    `progress` is given all turns, and gives them back one by one.
    """
    generator = numpy.random.default_rng()
    time.sleep(FIRST_SETTLE_SECONDS)
    turns = [int(index) for _ in range(rounds) for index in generator.permutation(len(cases))]
    for index in progress(turns):
        case, work = cases[index]
        time.sleep(settle)
        case.seconds.append(measure(work, case.calls))


def time_problem(
    problem: Problem,
    passes: str,
    implementations: Iterable[Implementation],
    dtypes: Sequence[str] = ("float32",),
    threads: Sequence[int] = (1,),
    rounds: int = 7,
) -> list[Case]:
    """Validate every implementation on one shape, then time those that are right, all in the same rounds."""
    implementations = list(implementations)
    cases, ready = [], []
    for dtype in dtypes:
        data = Data.of(problem, dtype)
        layers = {True: (data, Expected(problem, data))}
        if not all(implementation.deforms for implementation in implementations):
            layers[False] = (data.rigid(), Expected(problem, data.rigid()))
        for implementation in implementations:
            for count in threads:
                case = Case(implementation, problem, passes, dtype, count)
                work = validated(case, *layers[implementation.deforms])
                if work is not None:
                    ready.append((case, work))
                if work is not None or case.refused:
                    cases.append(case)
    gc.collect()
    interleave(ready, rounds)
    return cases


def validated(case: Case, data: Data, expected: Expected) -> Work | None:
    """The work of a case that is right; one that is wrong keeps the reason."""
    work = case.implementation.prepare(case.problem, data, case.passes, case.threads)
    if work is None:
        return None
    try:
        case.residuals = validate(work, expected, case.passes)
    except WrongResultError as wrong:
        case.refused = str(wrong)
        return None
    case.calls = calls_in_a_round(work)
    return work


def calls_in_a_round(work: Work) -> int:
    """How many calls take as long as a round should; the fastest of a few decides, unless they are long."""
    fastest = measure(work, 1)
    if fastest < 10 * CALL_SECONDS:
        fastest = min(fastest, *(measure(work, 1) for _ in range(4)))
    return max(1, min(1000, math.ceil(CALL_SECONDS / fastest)))


def in_round_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """The median of the ratios inside the rounds; NaN where one of the two was not timed."""
    if not seconds or not baseline:
        return math.nan
    return statistics.median(one / other for one, other in zip(seconds, baseline, strict=True))
