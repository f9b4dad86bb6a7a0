"""Handwritten digits, scaled, turned and warped onto a larger canvas, each by a geometry of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

Array = Any

SIDE = 8  # pixels of an original digit
LARGEST = 16  # the largest grey value of an original
TRAINING = 1000  # the first so many of scikit-learn's 1797 digits; the others are the test set
TEST_WARPS = 2  # of each original of the test set
TEST_SEED = 20_261_125

CANVAS = 28  # pixels of a warped digit
PIXELS_PER_PIXEL = 2.0  # of the canvas per pixel of the original, at scale 1
SCALES = 0.6, 1.6  # log-uniformly between
DEGREES = 60.0  # turned uniformly by at most so much to either side
SHIFT = 2.5  # pixels of the canvas, likewise along each axis
BEND = 1.2  # standard deviation, in pixels of the canvas, of the displacement at the nodes ...
NODES = 4  # ... of a lattice of so many by so many, cubic between them


class Digits(NamedTuple):
    """Images and what they show."""

    images: Array  # (count, height, width), uint8
    labels: Array  # (count,), 0 to 9


def originals() -> tuple[Digits, Digits]:
    """Read scikit-learn's digits: a training set and a test set that share none.

    They come writer after writer, so that a split by place leaves most writers in one set.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    arrays = found.images.astype(numpy.uint8), found.target.astype(numpy.uint8)
    return Digits(*(array[:TRAINING] for array in arrays)), Digits(*(array[TRAINING:] for array in arrays))


def test_set(digits: Digits) -> Digits:
    """Return the warped digits that networks are judged by: always the same TEST_WARPS of each original."""
    repeated = Digits(*(array.repeat(TEST_WARPS, axis=0) for array in digits))
    return warped(repeated, numpy.random.default_rng(TEST_SEED))


def warped(digits: Digits, rng: numpy.random.Generator) -> Digits:
    """Warp each digit in a way of its own: images (count, CANVAS, CANVAS), 0 to 255."""
    return digits._replace(images=numpy.array([warp(image, rng) for image in digits.images], numpy.uint8))


@functools.cache
def between_nodes() -> Array:
    """Return how much each node of the lattice moves each pixel of an axis: (CANVAS, NODES)."""
    from scipy.ndimage import zoom

    weights: Array = zoom(numpy.eye(NODES), (CANVAS / NODES, 1), order=3, mode="nearest")
    return weights


def warp(image: Array, rng: numpy.random.Generator) -> Array:
    """Sample an original where a random similarity and a smooth random displacement say."""
    from scipy.ndimage import map_coordinates  # the trained networks run without it: examples/edge

    angle = numpy.deg2rad(rng.uniform(-DEGREES, DEGREES))
    scale = PIXELS_PER_PIXEL * numpy.exp(rng.uniform(*numpy.log(SCALES)))
    shift = rng.uniform(-SHIFT, SHIFT, (2, 1, 1))
    bend = between_nodes() @ rng.normal(0, BEND, (2, NODES, NODES)) @ between_nodes().T
    turn = numpy.array([[numpy.cos(angle), -numpy.sin(angle)], [numpy.sin(angle), numpy.cos(angle)]])
    place = numpy.indices((CANVAS, CANVAS)) - (CANVAS - 1) / 2 - shift + bend
    source = numpy.tensordot(turn, place, 1) / scale + (SIDE - 1) / 2
    sampled = map_coordinates(image.astype(numpy.float64), source, order=3, mode="grid-constant")
    return numpy.rint(sampled.clip(0, LARGEST) * (255 / LARGEST))


def as_input(images: Array) -> Array:
    """Make of grey values what the networks take: (count, 1, height, width), float32, 0 to 1."""
    return images[:, None].astype(numpy.float32) / 255


def count_right(logits_of: Callable[[Array], Array], digits: Digits, batch: int = 200) -> int:
    """Count the digits whose label has the largest logit."""
    starts = range(0, len(digits.labels), batch)
    found = [logits_of(as_input(digits.images[start : start + batch])).argmax(axis=1) for start in starts]
    return int((numpy.concatenate(found) == digits.labels).sum())
