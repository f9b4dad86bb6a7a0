"""How far the memory of a process grows in one call, beyond its inputs and outputs (Linux).

Each case runs in a forked process of its own. A call on a small layer comes first, so that threads and
libraries have started; then making the layer ready and one call on it are watched together.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from dcn_np.commands.bench_problems import PROBLEMS, Data, Problem
from dcn_np.commands.bench_timing import Implementation

MIB = 2**20
PER_THREAD = 8 * MIB
SMALL = "S9"


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one implementation."""

    implementation: Implementation
    problem: Problem
    passes: str
    dtype: str
    threads: int

    def call(self, problem: Problem, data: Data) -> Mapping[str, numpy.ndarray] | None:
        """The results, or None for what the implementation does not have."""
        work = self.implementation.prepare(problem, data, self.passes, self.threads)
        if work is None:
            return None
        with work.settings():
            return work.results(work.run())

    @property
    def budget(self) -> int:
        """The goal in bytes, without the corner dots of a band of positions that the backward may have too.

        A channels-last copy of one image of x and a packed copy of the weights; backward of x, grad_x and
        grad_output, and two copies of the weights; and some MiB for each thread.
        """
        shapes, size = self.problem.shapes, numpy.dtype(self.dtype).itemsize
        image, result = (math.prod(shapes[name][1:]) for name in ("x", "y"))
        weights = math.prod(shapes["weight"])
        values = 2 * image + result + 2 * weights if self.passes == "both" else image + weights
        return values * size + self.threads * PER_THREAD

    def record(self, grown: float) -> dict[str, Any]:
        """The case as JSON."""
        names = ("passes", "dtype", "threads", "budget")
        record = {"shape": self.problem.name, "implementation": self.implementation.name, "growth": grown}
        return record | {name: getattr(self, name) for name in names}


def growth(case: Case) -> float | None:
    """Bytes beyond inputs and outputs; NaN where the process died, None where there is nothing to run."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sender.send(_grown(case)))
    process.start()
    sender.close()
    try:
        grown: float | None = receiver.recv()
    except EOFError:
        grown = math.nan
    process.join()
    return grown


def _grown(case: Case) -> float | None:
    small = PROBLEMS[SMALL]
    if case.call(small, Data.of(small, case.dtype)) is None:
        return None
    data = Data.of(case.problem, case.dtype)
    # Memory that making the data needed and freed would hide as much growth: give it back.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    results = case.call(case.problem, data)
    if results is None:
        return None
    return _status("VmHWM") - before - sum(result.nbytes for result in results.values())


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


HEADER = (
    f"{'shape':6}{'pass':9}{'dtype':9}{'threads':>7}  {'implementation':16}{'growth MiB':>12}{'goal MiB':>12}"
)


def line(record: Mapping[str, Any]) -> str:
    """One row of the table."""
    words = f"{record['shape']:6}{record['passes']:9}{record['dtype']:9}{record['threads']:7}  "
    sizes = f"{record['growth'] / MIB:12.1f}{record['budget'] / MIB:12.1f}"
    return f"{words}{record['implementation']:16}{sizes}"
