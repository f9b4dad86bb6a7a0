"""Time pooling over regions beside other libraries: every result is validated first.

    python benchmarks/regions.py --peers onnxruntime,openvino --threads 1,2 --json now.json

All implementations of all problems take turns in rounds, for problems are compared with each other too;
the clock is that of run.py. Regions lie inside the map, with sides of 32 to 512 pixels of an image sixteen
times as large."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import goals
import numpy
from peers import regions as peers

from dcn_np import reference
from dcn_np.commands import bench, bench_timing, machine
from dcn_np.commands.bench_problems import Problem, WrongResultError
from dcn_np.commands.bench_timing import Case

STRIDE = 16
TOLERANCE = 1e-4  # of the largest: others compute coordinates in float32
SAMPLED = 40  # every so many regions are checked
CHANNELS = 2  # of grad_x are checked, whole


@dataclasses.dataclass(frozen=True)
class RegionProblem:
    """One pooling of 512 regions of a 50 x 84 map, 7 x 7 bins."""

    name: str
    operator: str
    channels: int
    samples: int
    outputs: int
    group: int = 1
    regions: int = 512
    bins: int = 7
    input: tuple[int, int] = (50, 84)

    @property
    def sizes(self) -> dict[str, Any]:
        """The keyword arguments of the public function."""
        sizes: dict[str, Any] = {"output_size": self.bins, "spatial_scale": 1 / STRIDE}
        if self.operator == "deform_psroi_pool":
            own = {"output_dim": self.outputs, "group_size": self.group, "sample_per_part": self.samples}
            return sizes | own
        return sizes | {"sampling_ratio": self.samples}

    @property
    def multiplications(self) -> int:
        """Multiply-adds of four corners of each sample, forward."""
        return 4 * self.samples**2 * self.bins**2 * self.regions * self.outputs

    def __str__(self) -> str:
        extents = "x".join(map(str, self.input))
        text = f"{self.name}: {self.operator}, {self.channels} channels, {extents}, {self.regions} regions, "
        return f"{text}{self.bins}x{self.bins} bins of {self.samples}x{self.samples} samples"


PROBLEMS = {
    problem.name: problem
    for problem in (
        RegionProblem("R1", "roi_align", 256, 2, 256),
        RegionProblem("R2", "deform_roi_pool", 256, 2, 256),
        RegionProblem("R3", "modulated_deform_roi_pool", 256, 2, 256),
        RegionProblem("R4", "deform_psroi_pool", 490, 4, 10, group=7),
    )
}


@dataclasses.dataclass(frozen=True)
class RegionData:
    """The arrays of one problem, in float32."""

    x: numpy.ndarray
    rois: numpy.ndarray
    offset: numpy.ndarray
    mask: numpy.ndarray
    grad_output: numpy.ndarray

    @classmethod
    def of(cls, problem: RegionProblem) -> RegionData:
        """The same numbers in every run."""
        generator = numpy.random.default_rng(0)
        count, bins = problem.regions, problem.bins
        limits = numpy.array([problem.input[1], problem.input[0]]) * STRIDE - 1
        side = numpy.exp(generator.uniform(math.log(32), math.log(512), (count, 1)))
        aspect = numpy.exp(generator.uniform(-0.7, 0.7, (count, 1)))
        size = numpy.minimum(numpy.concatenate([side * aspect, side / aspect], axis=1), limits)
        low = generator.uniform(0, 1, (count, 2)) * (limits - size)
        rois = numpy.concatenate([numpy.zeros((count, 1)), low, low + size], axis=1)

        def normal(*shape: int) -> numpy.ndarray:
            return generator.standard_normal(shape, dtype=numpy.float32)

        return cls(
            x=normal(1, problem.channels, *problem.input),
            rois=rois.astype(numpy.float32),
            offset=normal(count, 2, bins, bins) / 2,
            mask=generator.random((count, 1, bins, bins), dtype=numpy.float32),
            grad_output=normal(count, problem.outputs, bins, bins),
        )

    def moved(self, problem: RegionProblem) -> tuple[numpy.ndarray, ...]:
        """The arrays of the operator after x and rois."""
        moves = {"roi_align": (), "modulated_deform_roi_pool": (self.offset, self.mask)}
        return moves.get(problem.operator, (self.offset,))


class Expected:
    """What the reference says in float64: some regions whole, and some channels of grad_x whole."""

    def __init__(self, problem: RegionProblem, data: RegionData) -> None:
        self.problem, self.data = problem, data
        self._checks: dict[str, tuple[Any, numpy.ndarray]] = {}

    def residuals(self, results: Mapping[str, numpy.ndarray], passes: str) -> dict[str, float]:
        """The largest error of each result over the largest expected value; raises WrongResultError."""
        if not self._checks:
            self._checks = {**self._of_regions(), **self._of_channels()}
        given = {name: result for name, result in results.items() if result is not None}
        residuals = {name: self._residual(name, result) for name, result in given.items()}
        if "y" not in residuals:
            raise WrongResultError("no result y")
        for name, residual in residuals.items():
            if not residual <= TOLERANCE:
                raise WrongResultError(f"{name}: residual {residual:.1e} above {TOLERANCE:.1e}")
        return residuals

    def _residual(self, name: str, result: numpy.ndarray) -> float:
        part, want = self._checks[name]
        return float(numpy.abs(result[part] - want).max() / numpy.abs(want).max())

    def _of_regions(self) -> dict[str, tuple[Any, numpy.ndarray]]:
        part = slice(None, None, SAMPLED)
        data = self.data
        arrays = (data.x, data.rois[part], *(array[part] for array in data.moved(self.problem)))
        operator, sizes = self.problem.operator, self.problem.sizes | {"dtype": numpy.float64}
        y = getattr(reference, operator)(*arrays, **sizes)
        gradients = getattr(reference, f"{operator}_backward")(data.grad_output[part], *arrays, **sizes)
        local = {name: getattr(gradients, name) for name in ("offset", "mask")}
        return {"y": (part, y)} | {name: (part, want) for name, want in local.items() if want is not None}

    def _of_channels(self) -> dict[str, tuple[Any, numpy.ndarray]]:
        problem, data = self.problem, self.data
        maps, sizes = slice(CHANNELS * problem.group**2), problem.sizes | {"dtype": numpy.float64}
        if problem.group > 1:
            sizes["output_dim"] = CHANNELS
        function = getattr(reference, f"{problem.operator}_backward")
        arrays = (data.x[:, maps], data.rois, *data.moved(problem))
        gradients = function(data.grad_output[:, :CHANNELS], *arrays, **sizes, needs=("x",))
        return {"x": ((slice(None), maps), gradients.x)}


def time_problems(
    problems: Sequence[Expected],
    passes: str,
    implementations: Sequence[peers.RegionPeer],
    threads: Sequence[int],
    rounds: int,
) -> list[Case]:
    """Validate every implementation, then time those that are right, all in the same rounds."""
    cases, ready = [], []
    for expected, implementation, count in itertools.product(problems, implementations, threads):
        case = Case(cast(Any, implementation), cast(Problem, expected.problem), passes, "float32", count)
        work = bench_timing.validated(case, cast(Any, expected.data), cast(Any, expected))
        if work is not None:
            ready.append((case, work))
        if work is not None or case.refused:
            cases.append(case)
    bench_timing.interleave(ready, rounds)
    return cases


def table(cases: Sequence[Case]) -> str:
    """One line per case of one problem and pass."""
    lines = [f"{cases[0].problem}, {cases[0].passes}"]
    lines.append(f"{'implementation':16}{'threads':>8}{'median ms':>11}{'spread':>8}{'residual':>10}")
    for case in cases:
        start = f"{case.implementation.name:16}{case.threads:8}"
        if case.refused:
            lines.append(f"{start}  refused: {case.refused}")
            continue
        median = statistics.median(case.seconds) * 1e3
        lines.append(f"{start}{median:11.2f}{case.spread:8.2f}{case.residual:10.1e}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*peers.NAMES, "none")
    parser.add_argument("--problems", type=bench.subset(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--passes", type=bench.subset(bench.PASSES), default=list(bench.PASSES))
    parser.add_argument("--threads", type=bench.counts, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", type=bench.subset(names), default=list(peers.NAMES))
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 where a result of ours was wrong."""
    arguments = parser().parse_args(words)
    found, missing = peers.load(name for name in arguments.peers if name != "none")
    for name, reason in missing.items():
        print(f"without {name}: {reason}", file=sys.stderr)
    about = bench.environment() | {"commit": machine.commit(), "missing": missing}
    print(f"dcn_np at {about['commit']}, {about['isa']}, {about['machine']}\n")
    implementations, threads = [peers.DcnNp(), *found], bench.thread_counts(arguments)
    problems = [Expected(PROBLEMS[name], RegionData.of(PROBLEMS[name])) for name in arguments.problems]
    cases: list[Case] = []
    for passes in arguments.passes:
        timed = time_problems(problems, passes, implementations, threads, arguments.rounds)
        for _, of_one in itertools.groupby(timed, key=lambda case: case.problem.name):
            print(table(list(of_one)), end="\n\n", flush=True)
        cases += timed
    rows = [row for row in goals.region_rows(cases) if row.met is not None]
    print("goal / reached", *rows, sep="\n")
    if arguments.json:
        bench.write(arguments.json, about | {"results": [case.record() for case in cases]})
    return int(any(case.refused for case in cases if case.implementation.name == "dcn_np"))


if __name__ == "__main__":
    sys.exit(main())
