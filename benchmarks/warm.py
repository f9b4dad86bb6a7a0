"""What it gains to prepare a layer: calls before and after, and how evenly a prepared layer answers.

    python benchmarks/warm.py --rounds 15 --calls 10000 --json now.json

S9 is nearly all overhead, S12 has many weights for few pixels. "operator" is the convolution by given offsets
and masks, as the backend prepares it; the layers make theirs by a branch, which is a convolution too. Every
result is validated against the reference first, and prepared calls must give the bits of others; then all
take turns in rounds, each round in a new random order. Last, S1 is called many times in a row, and each call
timed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import goals
import numpy
import run

import dcn_np
from dcn_np import layers
from dcn_np.backends import PreparedConv, backend_of
from dcn_np.commands import bench, bench_timing
from dcn_np.commands.bench_problems import PROBLEMS, Data, Expected, Problem, WrongResultError
from dcn_np.commands.bench_timing import Case, Work
from dcn_np.geometry import Geometry
from dcn_np.threads import exactly

SHAPES = ("S9", "S12")
EVEN = "S1"  # called many times in a row
LAYERS = ("Conv2d", "ModulatedDeformConv2d")
OPERATOR = "operator"
OFFSET_SIGMA = 2.0  # pixels
SECONDS, FASTER, UNEVEN = 0.03e-3, 1.6, 1.3

# ---- what is called


def layer_of(problem: Problem, kind: str) -> Any:
    """A layer whose branch, if it has one, makes offsets of OFFSET_SIGMA from normal images."""
    numbers = dict(problem.parameters)
    if kind == "Conv2d":
        numbers.pop("offset_groups")
    made = getattr(layers, kind)(problem.in_channels, problem.out_channels, problem.kernel, rng=0, **numbers)
    if "conv_offset_weight" in made.parameters():
        shape = made.conv_offset_weight.shape
        sigma = OFFSET_SIGMA / math.sqrt(math.prod(shape[1:]))
        made.conv_offset_weight[:] = numpy.random.default_rng(1).normal(0, sigma, shape)
    return made


def data_of(problem: Problem, layer: Any) -> Data:
    """The images of a problem with what the layer makes of them."""
    data = Data.of(problem)
    offset, mask = layer.branch(data.x)
    if offset is None:
        data, offset, mask = data.rigid(), data.rigid().offset, data.rigid().mask
    return dataclasses.replace(data, weight=layer.weight, bias=layer.bias, offset=offset, mask=mask)


def check_branch(problem: Problem, layer: Any, x: numpy.ndarray) -> None:
    """Compare what the branch makes with the reference; raises WrongResultError."""
    offset, mask = layer.branch(x)
    if offset is None:
        return
    weight, bias = layer.conv_offset_weight, layer.conv_offset_bias
    numbers: dict[str, Any] = {"groups": 1, "offset_groups": 1, "out_channels": len(weight)}
    branch = dataclasses.replace(problem, **numbers)
    made = dcn_np.deform_conv(x, None, weight, bias, **branch.parameters)
    data = dataclasses.replace(Data.of(branch).rigid(), x=x, weight=weight, bias=bias)
    Expected(branch, data).residuals({"y": made}, "forward")
    logits = made[:, offset.shape[1] :].astype(numpy.float64)
    if not numpy.array_equal(offset, made[:, : offset.shape[1]]):
        raise WrongResultError("offsets: not the first channels of the branch")
    if not numpy.allclose(mask, 1 / (1 + numpy.exp(-logits)), rtol=1e-6, atol=0):
        raise WrongResultError("mask: not the logistic function of the other channels")


@dataclasses.dataclass
class Caller:
    """A layer or the operator, prepared or not."""

    name: str
    call: Callable[[Data], Callable[[], Any]]  # called for as many threads as it is to use
    version: str = dcn_np.__version__
    deforms: bool = True

    def prepare(self, problem: Problem, data: Data, passes: str, threads: int) -> Work:
        """The forward pass; there is no other."""
        with exactly(threads):
            call = self.call(data)
        return Work(call, lambda y: {"y": y}, lambda: exactly(threads))


def prepared_operator(problem: Problem, data: Data) -> Callable[[], Any]:
    """The convolution by given offsets and masks, with its weights packed."""
    backend, out = backend_of(data.x), numpy.empty(problem.shapes["y"], data.x.dtype)
    geometry = Geometry.of(backend.dtypes(), *data.arguments, **problem.parameters)
    conv = backend.prepare_deform_conv(geometry, data.weight, data.bias, geometry.out_channels, 1)
    assert conv is not None
    prepared: PreparedConv = conv
    return lambda: prepared.run(data.x, data.offset, data.mask, out)


def prepared_layer(layer: Any, data: Data) -> Callable[[], Any]:
    """Calls of a copy of a layer, prepared, that write to one array."""
    warm = copy.deepcopy(layer)
    warm.prepare(data.x.shape)
    out = warm.forward(data.x)
    return lambda: warm.forward(data.x, out=out)


def pairs(problem: Problem, kind: str) -> tuple[Data, list[Caller]]:
    """One kind of call, not prepared and prepared, and their data."""
    if kind == OPERATOR:
        plain = Caller(kind, lambda data: bench.DcnNp().prepare(problem, data, "forward", 1).run)
        return Data.of(problem), [plain, Caller(warm(kind), lambda data: prepared_operator(problem, data))]
    layer = layer_of(problem, kind)
    data = data_of(problem, layer)
    check_branch(problem, layer, data.x)
    plain = Caller(kind, lambda data: lambda: layer.forward(data.x))
    return data, [plain, Caller(warm(kind), lambda data: prepared_layer(layer, data))]


def warm(kind: str) -> str:
    """The name of the prepared call."""
    return f"{kind}, prepared"


# ---- what is measured


def validated_pair(problem: Problem, kind: str, threads: int) -> list[tuple[Case, Work]]:
    """Both calls of a kind, compared with the reference and with each other."""
    data, callers = pairs(problem, kind)
    expected, found = Expected(problem, data), []
    for caller in callers:
        case = Case(caller, problem, "forward", "float32", threads)
        work = bench_timing.validated(case, data, expected)
        if work is None:
            raise WrongResultError(f"{caller.name}: {case.refused}")
        found.append((case, work))
    results = [numpy.array(work.run()) for _, work in found]
    if results[0].tobytes() != results[1].tobytes():
        raise WrongResultError(f"{callers[1].name}: other bits than {callers[0].name}")
    return found


def time_shape(problem: Problem, threads: Sequence[int], rounds: int) -> list[Case]:
    """All kinds of calls on one shape, in turns."""
    kinds = itertools.product((OPERATOR, *LAYERS), threads)
    ready = [pair for kind, count in kinds for pair in validated_pair(problem, kind, count)]
    gc.collect()
    bench_timing.interleave(ready, rounds)
    return [case for case, _ in ready]


@dataclasses.dataclass
class Latencies:
    """Seconds of each of many calls in a row."""

    kind: str
    threads: int
    seconds: numpy.ndarray

    @property
    def median(self) -> float:
        return float(numpy.median(self.seconds))

    @property
    def p99(self) -> float:
        return float(numpy.quantile(self.seconds, 0.99))

    def record(self) -> dict[str, Any]:
        """The latencies as JSON."""
        named = {"kind": self.kind, "threads": self.threads, "calls": len(self.seconds)}
        return named | {"median": self.median, "p99": self.p99, "longest": float(self.seconds.max())}

    def __str__(self) -> str:
        calls = f"{self.kind}, prepared, threads {self.threads}: {len(self.seconds)} calls in a row"
        times = (1e3 * seconds for seconds in (self.median, self.p99, float(self.seconds.max())))
        return "{}: median {:.3f} ms, p99 {:.3f} ms, longest {:.3f} ms".format(calls, *times)


def latencies(problem: Problem, kind: str, threads: int, calls: int) -> Latencies:
    """Time every call of a prepared layer, after it was validated."""
    _, (_, work) = validated_pair(problem, kind, threads)
    seconds, clock = numpy.empty(calls), time.perf_counter
    with work.settings():
        for _ in range(10):
            work.run()
        for index in range(calls):
            begin = clock()
            work.run()
            seconds[index] = clock() - begin
    return Latencies(kind, threads, seconds)


# ---- what comes out


def table(cases: Sequence[Case]) -> str:
    """One line per call, the prepared one below the other."""
    lines = [
        str(cases[0].problem),
        f"{'call':34}{'threads':>7}{'us':>10}{'spread':>8}{'faster':>8}{'residual':>10}",
    ]
    for index, case in enumerate(cases):
        start = f"{case.implementation.name:34}{case.threads:7}{1e6 * statistics.median(case.seconds):10.1f}"
        gain = f"{faster(*cases[index - 1 : index + 1]):8.2f}" if index % 2 else f"{'':8}"
        lines.append(f"{start}{case.spread:8.2f}{gain}{case.residual:10.1e}")
    return "\n".join(lines)


def faster(plain: Case, prepared: Case) -> float:
    """How many times faster the prepared call is, the median over the rounds."""
    return bench_timing.in_round_ratio(plain.seconds, prepared.seconds)


def rows(cases: Sequence[Case], rows_of: Sequence[Latencies]) -> list[goals.Row]:
    """The goals, and what was reached of them."""
    found = []
    for plain, prepared in zip(cases[::2], cases[1::2], strict=True):
        shape, title = (plain.problem.name,), f"{prepared.implementation.name}, threads {plain.threads}"
        if shape == ("S9",):
            milliseconds = 1e3 * statistics.median(prepared.seconds)
            found.append(goals.Row(title, False, 1e3 * SECONDS, milliseconds, shape, " ms"))
        else:
            found.append(
                goals.Row(f"{title}: faster than before", True, FASTER, faster(plain, prepared), shape)
            )
    for one in rows_of:
        title = f"{warm(one.kind)}, threads {one.threads}: p99 to the median"
        found.append(goals.Row(title, False, UNEVEN, one.p99 / one.median, (EVEN,)))
    return found


def parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--threads", type=bench.counts, default=None, help="default 1 and all that may be used"
    )
    parser.add_argument("--calls", type=int, default=10_000, help=f"of {EVEN} in a row; default 10000")
    bench.add_run_arguments(parser, rounds=15)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 where a result was wrong."""
    arguments = parser().parse_args(words)
    threads = bench.thread_counts(arguments)
    record, cases, even = run.begin({}, {}), [], []
    try:
        for shape in SHAPES:
            cases += time_shape(PROBLEMS[shape], threads, arguments.rounds)
            print(table([case for case in cases if case.problem.name == shape]), end="\n\n", flush=True)
        for count in threads:
            even.append(latencies(PROBLEMS[EVEN], LAYERS[-1], count, arguments.calls))
            print(even[-1], flush=True)
    except WrongResultError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    reached = rows(cases, even)
    print()
    run.print_goals(reached)
    run.print_busy(cases)
    if arguments.json:
        measured = {"results": [case.record() for case in cases], "latencies": [one.record() for one in even]}
        bench.write(arguments.json, record | measured | {"goals": [row.record() for row in reached]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
