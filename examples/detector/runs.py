"""What a training leaves, a file of figures and one of parameters for each run, and the table of all runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..digits.runs import mean_and_spread
from .evaluation import COLUMNS
from .network import Detector
from .variants import VARIANTS


class Run(NamedTuple):
    """How a detector came about, and what it finds."""

    variant: str
    seed: int
    steps: int
    offset_factor: float
    parameters: int
    seconds: float  # of training
    precision: Mapping[str, float]  # in percent, by COLUMNS

    @property
    def name(self) -> str:
        """The beginning of the names of its files: what was asked for."""
        return f"{self.variant}-{self.steps}-{self.offset_factor:g}-{self.seed}"


def save_run(folder: Path, run: Run, detector: Detector) -> None:
    """Write a run, in place of an earlier one of the same settings."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(detector.state_dict(), folder / f"{run.name}.pt")
    (folder / f"{run.name}.json").write_text(json.dumps(run._asdict(), indent=1) + "\n")


def read_runs(folder: Path) -> list[Run]:
    """Read all runs of a folder, the variants in the order of VARIANTS."""
    runs = [Run(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return sorted(runs, key=lambda run: (list(VARIANTS).index(run.variant), run.seed))


def read_detector(folder: Path, run: Run) -> Detector:
    """Return the detector of a run."""
    detector = Detector(VARIANTS[run.variant])
    detector.load_state_dict(torch.load(folder / f"{run.name}.pt", weights_only=True))
    return detector


def table(runs: Sequence[Run]) -> str:
    """Write the precisions as a Markdown table: means and standard deviations over seeds."""
    lines = [
        f"| variant | parameters | steps | offset rate | seeds | {' | '.join(COLUMNS)} | s each |",
        f"|---|---|---|---|---|{'---|' * len(COLUMNS)}---|",
    ]
    for settings in sorted({(run.steps, run.offset_factor) for run in runs}):
        for variant in VARIANTS:
            same = [run for run in runs if run.variant == variant and run[2:4] == settings]
            if same:
                lines.append(row(same))
    return "\n".join(lines)


def row(runs: Sequence[Run]) -> str:
    """One line of the table: runs that differ by seed alone."""
    first = runs[0]
    cells = [
        *(first.variant, first.parameters, first.steps),
        "–" if first.variant == "regular" else f"{first.offset_factor:g}x",
        len(runs),
        *(mean_and_spread([run.precision[column] for run in runs]) for column in COLUMNS),
        f"{statistics.mean(run.seconds for run in runs):.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"
