"""``python -m dcn_np bench``: validate, then time the operators on the shapes of real layers.

The benchmarks folder of the repository adds peers, goals and memory to it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

import dcn_np
from dcn_np.commands import machine
from dcn_np.commands.bench_problems import PROBLEMS, Data, Problem
from dcn_np.commands.bench_timing import Case, Implementation, Work, in_round_ratio, time_problem
from dcn_np.threads import exactly

SCHEMA = 1
DTYPES = ("float32", "float64")
PASSES = ("forward", "both")
SHORT = ("S1", "S3", "S6", "S9")  # what is timed when no shape is named
BASELINE = "ordinary"  # the implementation that ratios refer to, where there is one


class DcnNp:
    """The library itself, with the instruction set it chooses or a given one."""

    deforms = True
    version = dcn_np.__version__

    def __init__(self, isa: str | None = None) -> None:
        self.isa = isa
        self.name = f"dcn_np-{isa}" if isa else "dcn_np"

    def prepare(self, problem: Problem, data: Data, passes: str, threads: int) -> Work:
        """Forward, or forward and all five gradients, through the public functions."""
        x, offset, mask, weight, bias = data.arguments
        parameters = problem.parameters

        def forward() -> numpy.ndarray:
            y: numpy.ndarray = dcn_np.modulated_deform_conv(x, offset, mask, weight, bias, **parameters)
            return y

        def both() -> tuple[numpy.ndarray, dcn_np.Gradients]:
            y = forward()
            return y, dcn_np.modulated_deform_conv_backward(
                data.grad_output, x, offset, mask, weight, **parameters
            )

        def settings() -> contextlib.ExitStack:
            stack = contextlib.ExitStack()
            stack.enter_context(exactly(threads))  # torch may have limited the OpenMP that it shares with us
            if self.isa:
                stack.enter_context(dcn_np.use_isa(self.isa))
            return stack

        if passes == "forward":
            return Work(forward, lambda y: {"y": y}, settings)
        return Work(both, lambda pair: {"y": pair[0], **pair[1]._asdict()}, settings)


def table(cases: Sequence[Case]) -> str:
    """One line per case of one shape and pass."""
    header = f"{'implementation':22}{'dtype':9}{'threads':>7}{'median ms':>12}{'spread':>8}{'GFLOP/s':>9}"
    lines = [f"{cases[0].problem}, {cases[0].passes}", f"{header}{'x ' + BASELINE:>12}{'residual':>10}"]
    return "\n".join([*lines, *(_line(case, _baseline_of(case, cases)) for case in cases)])


def _line(case: Case, baseline: Sequence[float]) -> str:
    start = f"{case.implementation.name:22}{case.dtype:9}{case.threads:7}"
    if case.refused:
        return f"{start}  refused: {case.refused}"
    median = statistics.median(case.seconds)
    rate = 2e-9 * case.problem.multiplications * (3 if case.passes == "both" else 1) / median
    ratio = in_round_ratio(case.seconds, baseline)
    text = f"{start}{median * 1e3:12.3f}{case.spread:8.2f}{rate:9.1f}"
    return text + (f"{'-':>12}" if math.isnan(ratio) else f"{ratio:12.3f}") + f"{case.residual:10.1e}"


def _baseline_of(case: Case, cases: Iterable[Case]) -> Sequence[float]:
    for other in cases:
        if (other.implementation.name, other.dtype, other.threads) == (BASELINE, case.dtype, case.threads):
            return other.seconds
    return ()


def environment() -> dict[str, Any]:
    """What somebody needs to know who reads the times later."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.cpu_model(),
        "cores": machine.affinity() or os.cpu_count(),
        "platform": platform.platform(),
        "isa": dcn_np.isa(),
        "available_isas": list(dcn_np.available_isas()),
        "versions": {
            "dcn_np": dcn_np.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }


def add_arguments(parser: argparse.ArgumentParser, shapes: Sequence[str] = SHORT) -> None:
    """Add the options to the parser of the command or of the benchmarks folder; ``shapes`` is the default."""
    words = "comma-separated; default"
    add = parser.add_argument
    names = f"{', '.join(PROBLEMS)}; {words} {','.join(shapes)}"
    add("--shapes", type=subset(PROBLEMS), default=list(shapes), help=names)
    add_pass_arguments(parser)
    add("--dtype", type=subset(DTYPES), default=["float32"], help=f"{', '.join(DTYPES)}; {words} float32")
    add("--isa", type=subset(dcn_np.available_isas()), default=[], help=f"{words} the one in use")
    add_run_arguments(parser)


def add_pass_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the passes and threads to time."""
    words = "comma-separated; default"
    passes = f"forward, or both: forward and backward; {words} forward,both"
    parser.add_argument("--passes", type=subset(PASSES), default=list(PASSES), help=passes)
    parser.add_argument("--threads", type=counts, default=None, help=f"{words} 1 and all that may be used")


def add_run_arguments(parser: argparse.ArgumentParser, rounds: int = 7) -> None:
    """Add how often to time, and where to write."""
    parser.add_argument("--rounds", type=_count, default=rounds, help=f"default {rounds}")
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write the measurements there"
    )


def subset(names: Iterable[str]) -> Callable[[str], list[str]]:
    """A type for argparse: comma-separated words out of ``names``."""
    known = list(names)

    def parse(text: str) -> list[str]:
        chosen = [word.strip() for word in text.split(",")]
        unknown = [word for word in chosen if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} not in {', '.join(known)}")
        return chosen

    return parse


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def counts(text: str) -> list[int]:
    """A type for argparse: comma-separated positive numbers."""
    return [_count(word) for word in text.split(",")]


def own_implementations(isas: Sequence[str]) -> list[DcnNp]:
    """The library once for each instruction set that was asked for, or with the one it chooses."""
    return [DcnNp(isa) for isa in isas] or [DcnNp()]


def thread_counts(arguments: argparse.Namespace) -> list[int]:
    """Those that were asked for, or 1 and as many as the library would take; more than that is refused."""
    most = dcn_np.get_num_threads()
    counts: list[int] = arguments.threads or sorted({1, most})
    if max(counts) > most:
        raise SystemExit(f"--threads {max(counts)}: this process may use {most}")
    return counts


def run(arguments: argparse.Namespace, peers: Sequence[Implementation] = ()) -> list[Case]:
    """Time what the options say, print a table for each shape and pass as soon as it is there."""
    implementations = [*own_implementations(arguments.isa), *peers]
    threads = thread_counts(arguments)
    cases = []
    for shape in arguments.shapes:
        for passes in arguments.passes:
            timed = time_problem(
                PROBLEMS[shape], passes, implementations, arguments.dtype, threads, arguments.rounds
            )
            cases += timed
            print(table(timed), end="\n\n", flush=True)
    return cases


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write the measurements as JSON, NaN as null."""
    path.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: argparse.Namespace) -> int:
    """Run the command; the exit status is 1 where a result was wrong."""
    about = environment()
    print(f"dcn_np {dcn_np.__version__}, {about['isa']}, {about['cores']} cores of {about['machine']}\n")
    if arguments.json:
        try:
            arguments.json.open("a").close()  # before minutes are spent
        except OSError as error:
            print(f"bench: --json cannot be written: {error}", file=sys.stderr)
            return 1
    cases = run(arguments)
    if arguments.json:
        write(arguments.json, about | {"results": [case.record() for case in cases]})
    refused = [case for case in cases if case.refused]
    if refused:
        print(f"{len(refused)} wrong results were not timed", file=sys.stderr)
    return 1 if refused else 0
