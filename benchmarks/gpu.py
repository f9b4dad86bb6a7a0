"""Time dcn_np's CUDA engine beside torchvision's deformable convolution and torch's ordinary one.

    make bench-gpu
    python benchmarks/gpu.py --shapes C256-56x56-N16 --passes forward --modes float16 --rounds 30
    python benchmarks/gpu.py --device cpu --quick     a rehearsal of the steps: its figures mean nothing

Needs one NVIDIA GPU, CuPy, torch with CUDA, torchvision, and ml_dtypes for bfloat16; downloads nothing. Every
result is validated against torchvision in float64 before it is timed, and what is wrong is not timed. All
implementations of a dtype take turns in rounds, each round in a new random order; inputs rotate, so that none
is in the cache from the call before. Times are the device's, between CUDA events, with the calls queued
beforehand; "host" is the time to queue one. The exit status is 0 whatever was reached.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from on_gpu import gates, problems
from on_gpu.problems import MODES, Accuracy, Result, Shape

from dcn_np.commands import bench, machine

SCHEMA = "gpu-1"
RESULTS = Path(__file__).parent / "results"
ROUNDS, QUICK_ROUNDS = 15, 5


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    shapes = {**problems.SHAPES, **problems.REHEARSAL}
    add("--shapes", type=bench.subset(shapes), help=f"of {', '.join(problems.SHAPES)}; default all")
    add("--passes", type=bench.subset(problems.PASSES), default=list(problems.PASSES))
    add("--modes", type=bench.subset(MODES), default=list(MODES), help=f"of {', '.join(MODES)}; default all")
    add("--offsets", type=bench.subset(problems.OFFSETS), default=list(problems.OFFSETS))
    add("--rounds", type=int, help=f"default {ROUNDS}, with --quick {QUICK_ROUNDS}")
    add("--json", type=Path, metavar="FILE", help="default: benchmarks/results/gpu-DEVICE-DATE.json")
    add("--quick", action="store_true", help=f"only {', '.join(problems.QUICK)} and few rounds")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small shapes, NumPy, no file")
    return parser


def chosen_shapes(arguments: argparse.Namespace) -> list[Shape]:
    """Those named, or all or a few of the device's."""
    named = {**problems.SHAPES, **problems.REHEARSAL}
    if arguments.shapes:
        return [named[name] for name in arguments.shapes]
    if arguments.device == "cpu":
        names: Sequence[str] = tuple(problems.REHEARSAL)
        return [named[name] for name in (problems.REHEARSAL_QUICK if arguments.quick else names)]
    return [named[name] for name in (problems.QUICK if arguments.quick else problems.SHAPES)]


def groups(modes: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The modes by the dtype of their arrays: each group is timed in the same rounds."""
    ordered = [mode for mode in MODES if mode in modes]
    return [(dtype, list(group)) for dtype, group in itertools.groupby(ordered, MODES.__getitem__)]


def environment(device: Any) -> dict[str, Any]:
    """What was timed, where, with which versions."""
    record = bench.environment() | {"schema": SCHEMA, "commit": machine.commit()}
    for name in ("torch", "torchvision", "cupy", "ml_dtypes"):
        with contextlib.suppress(ImportError):
            record["versions"][name] = importlib.import_module(name).__version__
    return record | {"gpu": device.about()}


def result_file(folder: Path, device: str, date: str) -> Path:
    """A file that is not there yet, named by device and date."""
    name = f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{date}"
    numbered = (folder / f"{name}-{number}.json" for number in itertools.count(2))
    return next(path for path in itertools.chain([folder / f"{name}.json"], numbered) if not path.exists())


class Record:
    """All that is written, and where; after each step, so that a run that is cut short leaves what it has."""

    def __init__(self, about: dict[str, Any], path: Path | None) -> None:
        self.about, self.path = about, path
        self.results: list[Result] = []
        self.accuracy: list[Accuracy] = []
        self.failed: list[str] = []

    def gates(self) -> list[gates.Row]:
        return gates.rows(self.results, self.accuracy)

    def write(self) -> None:
        """Write the file, if there is to be one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        measured: Mapping[str, Sequence[Result | Accuracy | gates.Row]] = {
            "results": self.results,
            "accuracy": self.accuracy,
            "gates": self.gates(),
        }
        lists = {name: [row.record() for row in rows] for name, rows in measured.items()}
        bench.write(self.path, {**self.about, **lists, "failed": self.failed})

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Print a title, do, write; an error is noted and the next step goes on."""
        print(title, flush=True)
        try:
            yield
        except Exception as error:
            self.failed.append(f"{title}: {type(error).__name__}: {error}")
            print(f"  FAILED: {type(error).__name__}: {error}", flush=True)
        self.write()


def measure(arguments: argparse.Namespace, device: Any, record: Record) -> None:
    """Accuracy, then times."""
    layers, timing = (importlib.import_module(f"on_gpu.{name}") for name in ("layers", "timing"))
    rehearsed = arguments.device == "cpu"
    images = problems.REHEARSAL_ACCURACY if rehearsed else problems.ACCURACY
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    if "float16" in arguments.modes:
        with record.step("float16 forward, relative error against float64"):
            for row in timing.accuracy(device, images, arguments.offsets):
                record.accuracy.append(row)
                words = f"  {row.image:10}{row.offsets:12}{row.implementation:13}{row.layout:14}"
                print(f"{words}{row.error:.2e}", flush=True)
    choices = itertools.product(chosen_shapes(arguments), arguments.offsets, groups(arguments.modes))
    for shape, offsets, (dtype, modes) in choices:
        with record.step(f"\n{shape.name}, {offsets} offsets, {dtype}"):
            widest = "both" if "both" in arguments.passes else "forward"
            sets = timing.Sets.of(device, shape, offsets, dtype, widest)
            for passes in arguments.passes:
                found = layers.layers_of(device, modes)
                results = timing.time_sets(device, sets, passes, found, rounds)
                record.results += results
                print(f" {passes}", problems.HEADER, *map(problems.line, results), sep="\n", flush=True)
            del sets, results
            device.free()


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser()
    arguments = options.parse_args(words)
    if arguments.rounds is not None and arguments.rounds < 1:
        options.error("--rounds must be positive")
    try:
        devices = importlib.import_module("on_gpu.devices")
        importlib.import_module("torchvision")
        device = devices.opened(arguments.device)
    # A broken torchvision raises RuntimeError, a missing library of CUDA OSError.
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torch, torchvision and, on a GPU, CuPy must work: {error}", file=sys.stderr)
        return 1
    about = environment(device)
    path = arguments.json
    if path is None and arguments.device == "cuda":
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        path = result_file(RESULTS, about["gpu"]["device"], today)
    print(f"dcn_np at {about['commit']}, {about['gpu']['device']}, {about['versions']}\n")
    record = Record(about, path)
    measure(arguments, device, record)
    rows = record.gates()
    print("\nratios", *gates.means(record.results), "", gates.table(rows), sep="\n")
    if record.failed:
        print(f"{len(record.failed)} steps failed:", *record.failed, sep="\n  ")
    if arguments.device == "cpu":
        print("a rehearsal on a CPU: none of these figures means anything")
    if path is not None:
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
