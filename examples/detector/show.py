"""python -m examples.detector.show: print the table of all runs, and draw what the detectors find."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from .data import Array, Scene
from .evaluation import detect_all, whole_masks
from .runs import read_detector, read_runs, table
from .train import OUTPUT
from .training import test_scenes
from .variants import VARIANTS

SHOWN = 6  # scenes of a picture
LEAST_SCORE = 0.3  # of what is drawn
INCHES = 2.2  # along a side of a scene
COLOURS = "tab10"  # a colour for each digit


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write a picture of the first scenes of the test set, a column for each variant."""
    parser = argparse.ArgumentParser(prog="python -m examples.detector.show", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the detectors that are drawn (default: 0)")
    parser.add_argument(
        "--first", type=int, default=0, help="scene of the test set to begin with (default: 0)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the folder of runs (./{OUTPUT})")
    args = parser.parse_args(arguments)
    runs = read_runs(args.output)
    print(table(runs))
    test = test_scenes()[args.first : args.first + SHOWN]
    # The last of a variant is that of the largest number of steps.
    chosen = {run.variant: run for run in sorted(runs, key=lambda run: run.steps) if run.seed == args.seed}
    columns = [("ground truth", [true_objects(scene) for scene in test])]
    for variant in VARIANTS:
        if variant in chosen:
            found = detect_all(read_detector(args.output, chosen[variant]), test)
            title = f"{variant}\n{chosen[variant].steps} steps"
            columns.append((title, [objects(one, len(test[0].image)) for one in found]))
    path = args.output / f"detections-seed{args.seed}.png"
    draw(test, columns).savefig(path, dpi=100)
    print(f"{path}: {len(test)} scenes, {', '.join(title.split()[0] for title, _ in columns[1:])}")


Objects = list[tuple[Array, Array, int, str]]  # box, mask, label and what is written beside it


def true_objects(scene: Scene) -> Objects:
    """Return what a scene holds."""
    objects = zip(scene.boxes, scene.masks, scene.labels, strict=True)
    return [(box, mask, int(label), str(label)) for box, mask, label in objects]


def objects(found: Any, side: int) -> Objects:
    """Return what was found with some certainty."""
    parts = zip(
        found.boxes.numpy(), whole_masks(found, side), found.labels.tolist(), found.scores, strict=True
    )
    return [
        (box, mask, label, f"{label} {100 * score:.0f} %")
        for box, mask, label, score in parts
        if score >= LEAST_SCORE
    ]


def draw(scenes: Sequence[Scene], columns: Sequence[tuple[str, Sequence[Objects]]]) -> Any:
    """Draw a row for each scene and a column for each title."""
    from matplotlib.figure import Figure

    size = INCHES * len(columns), INCHES * len(scenes)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(scenes), len(columns), squeeze=False)
    for place, (title, every) in enumerate(columns):
        axes[0, place].set_title(title)
        for ax, scene, found in zip(axes[:, place], scenes, every, strict=True):
            draw_objects(ax, scene.image, found)
    return figure


def draw_objects(ax: Any, image: Array, found: Objects) -> None:
    """Draw boxes, masks and labels over an image."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    painted = image / 255
    for box, mask, label, text in found:
        colour = numpy.array(colormaps[COLOURS](label)[:3])
        painted[mask] = 0.35 * painted[mask] + 0.65 * colour
        left, top, right, bottom = map(float, box)
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, lw=1.5))
        ax.text(left, top, text, fontsize=7, color="white", backgroundcolor=(*colour, 0.8), va="bottom")
    ax.imshow(painted, extent=(0, image.shape[1], image.shape[0], 0))
    ax.set_axis_off()


if __name__ == "__main__":
    main()
