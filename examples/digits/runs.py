"""What a training leaves: a file for each run, the table of all, and the file that the repository keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

import dcn_np.layers

from .architecture import KINDS
from .data import Array, Digits

WEIGHTS = Path(__file__).with_name("weights.npz")


class Run(NamedTuple):
    """A trained network and how it came about."""

    variant: str
    trained_with: str  # "torch" or "numpy"
    seed: int
    epochs: int
    offset_factor: float
    right: int  # digits of the test set that it tells
    digits: int  # of the test set
    seconds: float  # of training
    state: Mapping[str, Array]

    @property
    def parameters(self) -> int:
        """How many numbers were learnt, those of the offset branches too."""
        return sum(value.size for value in self.state.values())

    @property
    def accuracy(self) -> float:
        """The part of the test set that it tells."""
        return self.right / self.digits


def save_run(folder: Path, run: Run) -> None:
    """Write a run to a file of its own, in place of an earlier one of the same settings."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{run.variant}-{run.trained_with}-{run.epochs}-{run.offset_factor:g}-{run.seed}.npz"
    facts = {key: numpy.array(value) for key, value in run._asdict().items() if key != "state"}
    dcn_np.layers.save_npz(folder / name, facts | {f"state.{key}": a for key, a in run.state.items()})


def read_runs(folder: Path) -> list[Run]:
    """Read all runs of a folder, the networks in the order of KINDS."""
    runs = [read_run(path) for path in sorted(folder.glob("*-*.npz"))]
    return sorted(runs, key=lambda run: list(KINDS).index(run.variant))


def read_run(path: Path) -> Run:
    """Read the run of a file."""
    found = dcn_np.layers.load_npz(path)
    state = {key.removeprefix("state."): found.pop(key) for key in list(found) if key.startswith("state.")}
    return Run(**{key: value.item() for key, value in found.items()}, state=state)


def table(runs: list[Run]) -> str:
    """Write the test accuracies of all seeds as a Markdown table; the spread is the standard deviation."""
    lines = [
        "| network | parameters | trained with | epochs | offset rate | seeds "
        "| test accuracy, mean ± spread | least | most | s each |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    settings = dict.fromkeys((run.epochs, run.offset_factor, run.trained_with) for run in runs)
    for epochs, factor, trainer in settings:
        for variant in KINDS:
            same = [run for run in runs if run[:2] == (variant, trainer) and run[3:5] == (epochs, factor)]
            if same:
                lines.append(row(same))
    return "\n".join(lines)


def row(runs: list[Run]) -> str:
    """One line of the table: runs that differ by seed alone."""
    first, found = runs[0], [100 * run.accuracy for run in runs]
    cells = [
        *(first.variant, first.parameters, first.trained_with, first.epochs),
        "–" if first.variant == "plain" else f"{first.offset_factor:g}x",
        len(runs),
        f"{mean_and_spread(found)} %",
        f"{min(found):.1f} %",
        f"{max(found):.1f} %",
        f"{numpy.mean([run.seconds for run in runs]):.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def mean_and_spread(values: Sequence[float]) -> str:
    """Write a mean, and a standard deviation if there is one."""
    spread = f" ± {numpy.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{numpy.mean(values):.1f}{spread}"


def save_weights(path: Path, runs: list[Run], digits: Digits) -> None:
    """Write one run of each variant, with the originals of the test set, into one small file."""
    arrays: dict[str, Any] = {
        f"{run.variant}.{key}": value for run in runs for key, value in run.state.items()
    }
    arrays |= {f"{run.variant}.right": numpy.array(run.right) for run in runs} | digits._asdict()
    numpy.savez_compressed(path, **arrays)


def read_weights(path: Path = WEIGHTS) -> tuple[dict[str, dict[str, Array]], dict[str, int], Digits]:
    """Read what `save_weights` wrote: state dicts and right answers by variant, and the originals."""
    found = dcn_np.layers.load_npz(path)
    digits = Digits(found.pop("images"), found.pop("labels"))
    states: dict[str, dict[str, Array]] = {}
    for key, value in found.items():
        variant, _, name = key.partition(".")
        states.setdefault(variant, {})[name] = value
    counts = {variant: int(state.pop("right")) for variant, state in states.items()}
    return states, counts, digits
