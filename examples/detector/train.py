"""python -m examples.detector.train: train the six variants, each from several seeds, and compare them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import tqdm

import dcn_np

from .data import Scene
from .evaluation import average_precision, detect_all
from .network import Detector
from .runs import Run, read_runs, save_run, table
from .training import OFFSET_FACTOR, QUICK_STEPS, SEEDS, STEPS, made, test_scenes, train
from .variants import VARIANTS

OUTPUT = Path("detector_output")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.detector.train", description=__doc__)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help=f"default: {SEEDS}")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a training (default: {STEPS})")
    parser.add_argument(
        "--quick", action="store_true", help=f"one seed and {QUICK_STEPS} steps: not yet a comparison"
    )
    parser.add_argument(
        "--offset-factor", type=float, default=OFFSET_FACTOR, help=f"default: {OFFSET_FACTOR:g}"
    )
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--missing", action="store_true", help="train only what the folder has not")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the folder of runs (./{OUTPUT})")
    args = parser.parse_args(arguments)
    if args.quick:
        args.seeds, args.steps = SEEDS[:1], QUICK_STEPS
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train what is asked for, and print the table of all runs in the folder."""
    args = parsed(arguments)
    torch.set_num_threads(args.threads)
    dcn_np.set_num_threads(args.threads)
    test = test_scenes()
    done = [run[:4] for run in read_runs(args.output)] if args.missing else []
    for seed in args.seeds:
        for variant in args.variants:
            if (variant, seed, args.steps, args.offset_factor) not in done:
                save_run(args.output, *trained(variant, seed, args, test))
    print(table(read_runs(args.output)))


def trained(variant: str, seed: int, args: argparse.Namespace, test: Sequence[Scene]) -> tuple[Run, Detector]:
    """Train one detector under a progress bar, and test it when all is done."""
    detector = made(VARIANTS[variant], seed)
    losses = train(detector, VARIANTS[variant], seed, args.steps, args.offset_factor)
    begin, means = time.perf_counter(), dict[str, float]()
    with tqdm.tqdm(
        losses, f"{variant}, seed {seed}", args.steps, unit="step", leave=False, disable=None
    ) as bar:
        for step, found in enumerate(bar):
            for name, loss in found.items():
                means[name] = means.get(name, 0.0) + (loss - means.get(name, 0.0)) / min(step + 1, 50)
            bar.set_postfix({name: f"{mean:.2f}" for name, mean in means.items()}, refresh=False)
    seconds = time.perf_counter() - begin
    precision = average_precision(test, detect_all(detector, test))
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    run = Run(variant, seed, args.steps, args.offset_factor, parameters, seconds, precision)
    print(
        f"{variant:<16} seed {seed}: box AP {precision['box AP']:.1f}, mask AP {precision['mask AP']:.1f}, "
        f"last losses {sum(means.values()):.2f}, {seconds:.0f} s",
        flush=True,
    )
    return run, detector


if __name__ == "__main__":
    main()
