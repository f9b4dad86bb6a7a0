"""What a small network takes on the disk and in memory: dcn_np beside onnxruntime, OpenVINO and torch.

    python benchmarks/footprint.py --rounds 9 --threads 2

The network is the trained DCNv2 of examples/digits, the input one image. Each run is a process of its own
(footprint_once.py). Its logits are compared with dcn_np's before anything is measured; then all packages take
turns in rounds. Times of imports are the least of all rounds, peaks of memory (VmHWM, with libraries) the
median. Sizes are those of installed files, compiled Python too. A package that is not there has a row that
says so; one that fails or answers otherwise too, and then the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import footprint_once
import numpy
from footprint_models import write_model
from footprint_once import IMAGE, MODELS, RUNS, example

OWN = "dcn_np"
# What is installed with a package for it to run the network. numpy is of all.
BESIDE = {"torch": (OWN,)}
# What writes the model that a package reads.
WRITTEN_BY = {"onnxruntime": "onnx", "openvino": "openvino"}
TOLERANCE = 1e-4  # of the largest logit
MEGA, MIB, MILLI = 1e6, 2**20, 1e-3


class FailedError(Exception):
    """A package that does not run the network, or answers otherwise."""


def write_image(folder: Path) -> None:
    """Write an image as the network takes it."""
    frames = importlib.import_module("examples.edge.frames")
    image = next(frames.drawn(example("runs").read_weights()[2])).pixels
    numpy.save(folder / IMAGE, example("data").as_input(image[None]))


# ---- what is installed


def is_there(module: str) -> bool:
    """Whether a module can be imported, found without importing it."""
    return importlib.util.find_spec(module) is not None


def installed_bytes(names: Sequence[str]) -> int:
    """Return the bytes of distributions and of all that they require."""
    return sum(own_bytes() if name == OWN else distribution_bytes(name) for name in required(names))


def required(names: Sequence[str]) -> set[str]:
    """Return distributions with all that they require here, without extras."""
    requirements: Any = importlib.import_module("packaging.requirements")
    utils: Any = importlib.import_module("packaging.utils")
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        canonical = name if name == OWN else utils.canonicalize_name(name)
        if canonical not in found:
            found.add(canonical)
            # dcn_np need not be installed, and requires numpy alone.
            texts = ["numpy"] if name == OWN else importlib.metadata.requires(name) or []
            wanted = map(requirements.Requirement, texts)
            waiting += [
                one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})
            ]
    return found


def distribution_bytes(name: str) -> int:
    """Return the bytes of the files that a distribution installed."""
    paths = [Path(str(file.locate())) for file in importlib.metadata.files(name) or []]
    return sum(path.stat().st_size for path in paths if path.is_file())


def own_bytes() -> int:
    """Return the bytes of dcn_np's folder and of the libraries that a wheel has beside it."""
    (folder,) = map(Path, importlib.import_module(OWN).__path__)
    folders = folder, folder.with_name(f"{OWN}.libs")
    return sum(path.stat().st_size for one in folders for path in one.rglob("*") if path.is_file())


def version(package: str) -> str:
    """Return the version of a package."""
    return (
        str(importlib.import_module(OWN).__version__)
        if package == OWN
        else importlib.metadata.version(package)
    )


# ---- runs


def once(package: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run the network in a process of its own."""
    command = [sys.executable, footprint_once.__file__, package, str(folder), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = (said or [f"exit status {done.returncode}"])[-1].strip()
        raise FailedError(f"failed: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(package: str, found: Sequence[Any], expected: Sequence[Any]) -> None:
    """Raise an error where the logits of a package are not dcn_np's."""
    if package == "numpy":
        return
    error = numpy.abs(numpy.subtract(found, expected)).max()
    if not error <= TOLERANCE * numpy.abs(expected).max():
        raise FailedError(f"WRONG: logits differ by {error:.2g} from {OWN}'s")


def problem(package: str) -> str | None:
    """Return why a package cannot be measured here, None if it can."""
    needed = package, *BESIDE.get(package, ()), WRITTEN_BY.get(package, package)
    missing = [module for module in dict.fromkeys(needed) if not is_there(module)]
    return f"absent: {', '.join(missing)}" if missing else None


def measure(rounds: int, threads: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Return the runs of each package, and of the others why there are none."""
    problems = {name: reason for name in RUNS if (reason := problem(name))}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS if name not in problems}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_image(folder)
        for name in MODELS.keys() & runs.keys():
            write_model(name, folder)
        expected = once(OWN, folder, threads)["logits"]
        for name in list(runs):
            try:
                check(name, once(name, folder, threads)["logits"], expected)
            except FailedError as error:
                problems[name] = str(error)
                del runs[name]
        for _ in range(rounds):
            for name, found in runs.items():
                found.append(once(name, folder, threads))
    return runs, problems


# ---- the table


def row(package: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the line of a package."""
    extra = BESIDE.get(package, ())
    size = installed_bytes(["numpy", package, *extra]) / MEGA
    time = min(run["numpy_seconds" if package == "numpy" else "import_seconds"] for run in runs) / MILLI
    peaks = [statistics.median(run[when] for run in runs) / MIB for when in ("imported", "run")]
    names = " + ".join(f"{name} {version(name)}" for name in (package, *extra))
    return f"| {names} | {size:.1f} | {time:.0f} | {peaks[0]:.1f} | {peaks[1]:.1f} |"


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 where a package failed or answers otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="processes for each package (default: 9)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; wanted at least 1")
    runs, problems = measure(options.rounds, options.threads)
    print(f"{options.threads} threads, {options.rounds} processes each, Python {sys.version.split()[0]}\n")
    print("| package | installed, MB | import, ms | peak after it, MiB | after a run, MiB |")
    print("|---|---|---|---|---|")
    for name in RUNS:
        print(row(name, runs[name]) if name in runs else f"| {name} | {problems[name]} | – | – | – |")
    print("\nInstalled with numpy and all that is required; imports are after numpy's, but for numpy's own.")
    return int(any(not reason.startswith("absent") for reason in problems.values()))


if __name__ == "__main__":
    sys.exit(main())
