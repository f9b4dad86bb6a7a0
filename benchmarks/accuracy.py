"""Print the largest measured errors of rounding, per dtype and instruction set, in units of u * D.

    python benchmarks/accuracy.py            the table of the documentation
    python benchmarks/accuracy.py --cases    a line per case as well

The cases, the units and what the tests allow are those of tests/test_accuracy.py (it needs the extra `test`).
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))

import numpy
import test_accuracy as accuracy
from problems import DTYPES

import dcn_np

NAMES = ("y", "x", "offset", "mask", "weight", "bias")


def line(label: str, errors: dict[str, float]) -> str:
    return f"| {label:32} | " + " | ".join(f"{errors.get(name, 0):6.2f}" for name in NAMES) + " |"


def header() -> str:
    titles = ["dtype, instruction set, terms", "y", *(f"grad_{name}" for name in NAMES[1:])]
    return f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"


def measured(dtype: numpy.dtype[Any], signs: str, every_case: bool) -> dict[str, dict[str, float]]:
    """The maxima over all cases, by instruction set. The reference, which takes long, runs once per case."""
    largest = {isa: dict.fromkeys(NAMES, 0.0) for isa in dcn_np.available_isas()}
    for name in accuracy.CASES:
        for isa, maxima in largest.items():
            with dcn_np.use_isa(isa):
                errors = accuracy.measure(name, signs, dtype)
            maxima.update({key: max(maxima[key], error) for key, error in errors.items()})
            if every_case:
                print(line(f"  {isa}, {name}", errors), flush=True)
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", action="store_true", help="a line per case as well")
    every_case = parser.parse_args().cases
    print(header())
    for dtype in DTYPES:
        for signs in accuracy.SIGNS:
            for isa, errors in measured(dtype, signs, every_case).items():
                print(line(f"{dtype}, {isa}, {signs}", errors), flush=True)


if __name__ == "__main__":
    main()
