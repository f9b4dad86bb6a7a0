"""The problem that the demo solves: a photograph, filters, and a visible rule for offsets and masks.

The rule: the grid of sampling points is turned and shrunk about the centre of the photo, so the photo seems
turned the other way and magnified; the modulation is 1 at the centre and fades to 0 at the borders.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy

Array = Any

KERNEL = 5
DILATION = 2
PADDING = DILATION * (KERNEL // 2)
TURN_DEGREES = 25.0
MAGNIFICATION = 1.4
LUMINANCE = (0.299, 0.587, 0.114)
RED_AGAINST_GREEN = (1.0, -1.0, 0.0)


@dataclass(frozen=True)
class Problem:
    """One call of `modulated_deform_conv`; all arrays are float32."""

    x: Array  # (1, 3, size, size), 0 black to 1 white
    offset: Array  # (1, KERNEL**2 * 2, size, size), input pixels, (y, x) interleaved
    mask: Array  # (1, KERNEL**2, size, size)
    weight: Array  # (filters, 3, KERNEL, KERNEL)
    bias: Array  # (filters,)
    names: tuple[str, ...]  # of the filters

    @property
    def size(self) -> int:
        """Width and height of the photo in pixels."""
        return int(self.x.shape[-1])


def make_problem(size: int) -> Problem:
    """Return the demo's problem on the photo scaled to `size` x `size` pixels."""
    names, weight = filter_bank()
    rigid = rigid_points(size)
    return Problem(
        x=photograph(size),
        offset=as_channels(deformed_points(rigid, size) - rigid),
        mask=as_channels(modulation(rigid, size)[..., None]),
        weight=weight,
        bias=numpy.zeros(len(names), numpy.float32),
        names=names,
    )


def photograph(size: int) -> Array:
    """Return scikit-image's photograph of an astronaut (NASA, public domain) as (1, 3, size, size)."""
    import skimage.data
    import skimage.transform

    data: Any = skimage.data  # parts of scikit-image have no types
    transform: Any = skimage.transform
    photo = data.astronaut() / 255.0
    if size != photo.shape[0]:
        photo = transform.resize(photo, (size, size), anti_aliasing=True)
    return numpy.ascontiguousarray(photo.transpose(2, 0, 1)[None], numpy.float32)


def filter_bank() -> tuple[tuple[str, ...], Array]:
    """Return the names of the filters and their weights, (filters, 3, KERNEL, KERNEL)."""
    filters = [
        ("smoothing (Gaussian)", gaussian, LUMINANCE),
        ("upright edges (Gaussian derivative)", slope(0), LUMINANCE),
        ("slanting edges /", slope(45), LUMINANCE),
        ("level edges", slope(90), LUMINANCE),
        ("slanting edges \\", slope(135), LUMINANCE),
        ("spots (Laplacian of Gaussian)", spot, LUMINANCE),
        ("upright stripes (Gabor)", stripes, LUMINANCE),
        ("red against green", gaussian, RED_AGAINST_GREEN),
    ]
    weight = [numpy.multiply.outer(colours, pattern_of(pattern)) for _, pattern, colours in filters]
    return tuple(name for name, _, _ in filters), numpy.array(weight, numpy.float32)


def pattern_of(pattern: Callable[[Array, Array], Array]) -> Array:
    """Return a filter as a (KERNEL, KERNEL) array whose absolute values sum to 1."""
    y, x = numpy.mgrid[:KERNEL, :KERNEL] - float(KERNEL // 2)
    taps = pattern(y, x)
    return taps / numpy.abs(taps).sum()


def gaussian(y: Array, x: Array) -> Array:
    """A Gaussian of standard deviation one tap."""
    return numpy.exp(-(y**2 + x**2) / 2)


def slope(degrees: float) -> Callable[[Array, Array], Array]:
    """The derivative of the Gaussian in a direction: 0 is to the right, 90 is down."""
    angle = math.radians(degrees)
    return lambda y, x: (math.cos(angle) * x + math.sin(angle) * y) * gaussian(y, x)


def spot(y: Array, x: Array) -> Array:
    """The negative Laplacian of the Gaussian, shifted so that an even area gives no response."""
    taps = (2 - y**2 - x**2) * gaussian(y, x)
    return taps - taps.mean()


def stripes(y: Array, x: Array) -> Array:
    """A Gabor filter for upright stripes four taps apart, shifted so that an even area gives no response."""
    taps = numpy.cos(math.pi / 2 * x) * gaussian(y, x)
    return taps - taps.mean()


def rigid_points(size: int) -> Array:
    """Where an ordinary convolution samples: (size, size, taps, 2), in pixels, as (y, x)."""
    position = numpy.moveaxis(numpy.indices((size, size)), 0, -1)
    tap = numpy.moveaxis(numpy.indices((KERNEL, KERNEL)), 0, -1).reshape(-1, 2)
    return (position[:, :, None, :] - PADDING + tap * DILATION).astype(numpy.float64)


def deformed_points(rigid: Array, size: int) -> Array:
    """The rule of the offsets: turn clockwise and shrink about the centre of the photo."""
    angle = math.radians(TURN_DEGREES)
    turn = numpy.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])  # on (y, x)
    centre = (size - 1) / 2
    return centre + (rigid - centre) @ turn.T / MAGNIFICATION


def modulation(rigid: Array, size: int) -> Array:
    """The rule of the masks: 1 at the centre of the photo, smoothly down to exactly 0 at its borders."""
    nearness = 1 - numpy.abs(rigid - (size - 1) / 2) / (size / 2)
    return numpy.sin(math.pi / 2 * numpy.maximum(nearness, 0)).prod(axis=-1)


def as_channels(values: Array) -> Array:
    """Lay (height, width, taps, components) out for the operators: (1, taps * components, height, width)."""
    height, width = values.shape[:2]
    return numpy.ascontiguousarray(values.reshape(height, width, -1).transpose(2, 0, 1)[None], numpy.float32)
