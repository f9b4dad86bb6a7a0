"""Time dcn_np beside other libraries on the layers of real networks; every result is validated first.

    python benchmarks/run.py --shapes S1,S3 --peers ordinary,openvino --threads 1,2 --json now.json
    python benchmarks/run.py --memory

All implementations, numbers of threads and dtypes of a shape take turns in rounds, each round in a new random
order; ratios are taken inside a round. No round is discarded: "spread" is the slowest over the fastest. Every
library is limited to the number of threads of its row, and a pause before each turn lets the pool of the one
before fall asleep.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import goals
import memory
import peers

import dcn_np
from dcn_np.commands import bench, bench_timing, machine
from dcn_np.commands.bench_problems import PROBLEMS
from dcn_np.commands.bench_timing import Implementation

BUSY_SPREAD = 1.5


def parser() -> argparse.ArgumentParser:
    """The options of ``python -m dcn_np bench``, and those that need this folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench.add_arguments(parser, shapes=tuple(PROBLEMS))
    parser.add_argument(
        "--peers",
        type=bench.subset((*peers.NAMES, "none")),
        default=list(peers.NAMES),
        help=f"{', '.join(peers.NAMES)} or none; default all that are installed",
    )
    parser.add_argument(
        "--memory", action="store_true", help="how far memory grows in one call, instead of times"
    )
    return parser


def begin(versions: Mapping[str, str], missing: Mapping[str, str]) -> dict[str, Any]:
    """Print what is missing and what is timed; return the environment, the commit and all versions."""
    for name, reason in missing.items():
        print(f"without {name}: {reason}", file=sys.stderr)
    record = bench.environment() | {"commit": machine.commit(), "missing": dict(missing)}
    record["versions"] |= versions
    print(f"dcn_np {dcn_np.__version__} at {record['commit']}, {record['isa']}, {record['machine']}\n")
    return record


def time_all(arguments: argparse.Namespace, found: Sequence[Implementation]) -> tuple[dict[str, Any], int]:
    """Times, then goals; the exit status is 1 where a result of ours was wrong."""
    cases = bench.run(arguments, found)
    own = bench.own_implementations(arguments.isa)
    rows = goals.rows(cases, own[0].name)
    print_goals(rows)
    print_busy(cases)
    names = {implementation.name for implementation in own}
    wrong = any(case.refused for case in cases if case.implementation.name in names)
    record = {"results": [case.record() for case in cases], "goals": [row.record() for row in rows]}
    return record, int(wrong)


def print_goals(rows: Sequence[goals.Row]) -> None:
    """The rows that were measured, and how many were not."""
    measured = [row for row in rows if row.met is not None]
    print("goal / reached; means are geometric, over the shapes at the end of the row", *measured, sep="\n")
    if len(measured) < len(rows):
        print(f"not measured: {len(rows) - len(measured)} goals that need other shapes, passes or peers")


def print_busy(cases: Sequence[bench_timing.Case]) -> None:
    """Name the cases whose times scatter too much to mean anything; they are in every figure all the same."""
    busy = [case for case in cases if case.spread > BUSY_SPREAD]
    if busy:
        print(f"\nCAUTION: in {len(busy)} of {len(cases)} cases the slowest round took more than")
        print(f"{BUSY_SPREAD} times the fastest. Something else was running: do not trust their ratios.")
        for case in busy:
            words = (case.problem.name, case.passes, case.dtype, case.implementation.name)
            print(f"  {' '.join(words)}, threads {case.threads}: spread {case.spread:.1f}")


def measure_memory(arguments: argparse.Namespace, found: Sequence[Implementation]) -> dict[str, Any]:
    """Memory of every case, each in its own process."""
    implementations = [*bench.own_implementations(arguments.isa), *found]
    problems = [PROBLEMS[name] for name in arguments.shapes]
    threads = bench.thread_counts(arguments)
    print(memory.HEADER)
    measured = []
    for choice in itertools.product(implementations, problems, arguments.passes, arguments.dtype, threads):
        case = memory.Case(*choice)
        grown = memory.growth(case)
        if grown is not None:
            measured.append(case.record(grown))
            print(memory.line(measured[-1]), flush=True)
    return {"memory": measured}


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    arguments = parser().parse_args(words)
    found, missing = peers.load(name for name in arguments.peers if name != "none")
    record = begin({peer.name: peer.version for peer in found}, missing)
    status = 0
    if arguments.memory:
        measured = measure_memory(arguments, found)
    else:
        measured, status = time_all(arguments, found)
    if arguments.json:
        bench.write(arguments.json, record | measured)
    return status


if __name__ == "__main__":
    sys.exit(main())
