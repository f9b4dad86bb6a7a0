"""What every training shares, with torch and with NumPy: data, budget and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy

from .data import Array, Digits, as_input, warped

SEEDS = [0, 1, 2, 3, 4]
EPOCHS = 100
QUICK_EPOCHS = 20
BATCH = 100
RATE = 0.01  # the largest learning rate of Adam
WARM_UP = 0.1  # part of all steps in which the rate rises
OFFSET_FACTOR = 1.0  # the offset branches' rate by that of all else; README.md says what 0.1 does


def rate_factor(step: int, steps: int) -> float:
    """The part of RATE that a step learns with: rising in a line, then half a cosine down to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))


def count_steps(digits: Digits, epochs: int) -> int:
    """How many batches `batches` gives."""
    return epochs * (len(digits.labels) // BATCH)


def batches(digits: Digits, seed: int, epochs: int) -> Iterator[tuple[Array, Array]]:
    """Yield (images, labels) of each step; every epoch warps every digit anew, the same for all networks."""
    for epoch in range(epochs):
        rng = numpy.random.default_rng((seed, epoch))
        images, labels = warped(digits, rng)
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield as_input(images[chosen]), labels[chosen].astype(numpy.int64)
