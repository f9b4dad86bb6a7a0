"""python -m examples.digits.train: train the three networks, each from several seeds, and compare them."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

import numpy
import tqdm

import dcn_np

from .architecture import KINDS
from .data import Digits, count_right, originals, test_set
from .runs import WEIGHTS, Run, read_runs, save_run, save_weights, table
from .schedule import EPOCHS, OFFSET_FACTOR, QUICK_EPOCHS, SEEDS, count_steps


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits.train", description=__doc__)
    parser.add_argument("--variants", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help=f"default: {SEEDS}")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"default: {EPOCHS}")
    parser.add_argument(
        "--quick", action="store_true", help=f"one seed and {QUICK_EPOCHS} epochs: not yet a comparison"
    )
    parser.add_argument("--numpy", action="store_true", help="train without torch")
    parser.add_argument(
        "--offset-factor", type=float, default=OFFSET_FACTOR, help=f"default: {OFFSET_FACTOR:g}"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("digits_output"), help="the folder of runs (./digits_output)"
    )
    args = parser.parse_args(arguments)
    if args.quick:
        args.seeds, args.epochs = SEEDS[:1], QUICK_EPOCHS
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train what is asked for, and print the table of all runs in the folder."""
    args = parsed(arguments)
    training, test_originals = originals()
    test = test_set(test_originals)
    print(
        f"{len(training.labels)} digits to train on, {len(test.labels)} warped from "
        f"{len(test_originals.labels)} others to test on; {dcn_np.get_num_threads()} threads, {dcn_np.isa()}"
    )
    for seed in args.seeds:
        for variant in args.variants:
            save_run(args.output, trained(variant, seed, args, training, test))
    runs = read_runs(args.output)
    print(table(runs))
    same = [run for run in runs if same_settings(run, args)]
    first = [run for run in same if run.seed == min(other.seed for other in same)]
    save_weights(args.output / WEIGHTS.name, first, test_originals)


def same_settings(run: Run, args: argparse.Namespace) -> bool:
    """Whether a run was made with the settings that were asked for."""
    trainer = "numpy" if args.numpy else "torch"
    return (run.trained_with, run.epochs, run.offset_factor) == (trainer, args.epochs, args.offset_factor)


def trained(variant: str, seed: int, args: argparse.Namespace, training: Digits, test: Digits) -> Run:
    """Train one network under a progress bar, and test it when all is done."""
    trainer = "numpy" if args.numpy else "torch"
    library: Any = importlib.import_module(f".{trainer}_network", __package__)
    network = library.Network(variant, seed)
    losses = library.train(network, training, seed, args.epochs, args.offset_factor)
    begin, mean = time.perf_counter(), 0.0
    steps = count_steps(training, args.epochs)
    with tqdm.tqdm(losses, f"{variant}, seed {seed}", steps, unit="step", leave=False, disable=None) as bar:
        for step, loss in enumerate(bar):
            mean += (loss - mean) / min(step + 1, 20)
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
    seconds = time.perf_counter() - begin
    right = count_right(network.logits, test)
    state = {key: numpy.array(value, copy=None) for key, value in network.state_dict().items()}
    run = Run(
        variant, trainer, seed, args.epochs, args.offset_factor, right, len(test.labels), seconds, state
    )
    print(
        f"{variant:<6} seed {seed}: {run.parameters} parameters, test accuracy {100 * run.accuracy:.1f} %, "
        f"last losses {mean:.3f}, {seconds:.0f} s with {trainer}",
        flush=True,
    )
    return run


if __name__ == "__main__":
    main()
