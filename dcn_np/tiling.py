"""Cutting a deformable convolution into tiles of the output: what of the image each tile reads.

A tile is a box of output positions. On the rigid grid its taps read a window of the image; offsets reach
beyond it, by no more than a halo. Since a coordinate is an integer and a fraction of its offset alone, moving
the origin to the corner of a slice changes integers only, and a tile gives the bits of the whole.

Nothing here knows who computes the tiles, or computes one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray

from .geometry import checked_integers, numbers_per_axis, pads_per_axis
from .messages import count, shown

__all__ = ["required_halo"]

Array: TypeAlias = NDArray[Any]
Pairs: TypeAlias = tuple[tuple[int, int], ...]

# An offset whose floor is at least this in size reads nothing: docs/semantics.md, rule 3.
_LIMIT = 2.0**31


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution, in pixels; `extent` is that of the image without padding."""

    extent: int
    kernel: int
    stride: int
    begin: int
    dilation: int

    @property
    def reach(self) -> int:
        """Pixels from the first tap of a position to its last."""
        return (self.kernel - 1) * self.dilation

    def first_pixel(self, position: int) -> int:
        """Return where the first tap of an output position lies on the rigid grid."""
        return position * self.stride - self.begin

    def span(self, positions: int) -> int:
        """Return the pixels of the window of so many output positions."""
        return (positions - 1) * self.stride + self.reach + 1

    def read(self, first: int, positions: int, halo: tuple[int, int]) -> tuple[int, int]:
        """Return start and stop of the pixels that a tile reads, within the image; may be none."""
        low = self.first_pixel(first) - halo[0]
        high = self.first_pixel(first) + self.span(positions) + halo[1]
        start = min(max(low, 0), self.extent)
        return start, min(max(high, start), self.extent)


@dataclass(frozen=True)
class Placement:
    """How to compute a tile on a slice of the image: the padding, and positions to compute beyond it.

    Padding is never negative. So a slice that begins before the window of the tile, or ends behind it, gets
    positions of its own there; they are to read nothing, and are cut off again.
    """

    start: int
    stop: int
    padding: tuple[int, int]
    surplus: tuple[int, int]


def place(axis: Axis, first: int, positions: int, halo: tuple[int, int]) -> Placement:
    """Place a tile of one axis on the pixels that it reads."""
    start, stop = axis.read(first, positions, halo)
    if start == stop:
        return Placement(start, stop, (0, axis.span(positions)), (0, 0))
    begin = start - axis.first_pixel(first)
    before = max(0, -(begin // axis.stride))
    begin += before * axis.stride
    beyond = begin + (stop - start) - axis.span(before + positions)
    after = max(0, beyond // axis.stride)
    return Placement(start, stop, (begin, max(0, after * axis.stride - beyond)), (before, after))


def required_halo(
    offset: Array, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> Pairs:
    """Tell how far beyond its rigid window any output position reads.

    The window of a position is the box from its first tap to its last, before the offsets move them. So
    taps that offsets move inwards, or by less than their distance to the border of the window, need no halo.
    A tile of any size reads no further beyond its own window than this.

    Parameters
    ----------
    offset : numpy.ndarray, shape (batch, offset_groups * taps * ndim, *output)
        The offsets of a whole convolution, as `deform_conv` takes them. Their shape says how large the image
        is, up to ``stride - 1`` pixels.
    kernel_size : int or sequence of int
        Taps per spatial axis.
    stride : int or sequence of int
        Pixels from one output position to the next, per spatial axis.
    padding : int, or sequence of int or of (begin, end) pairs
        Zeros thought around the image, in pixels, per spatial axis.
    dilation : int or sequence of int
        Pixels from one tap to the next, per spatial axis.

    Returns
    -------
    tuple of (int, int)
        Pixels before and after the window, per spatial axis.

    Raises
    ------
    TypeError
        An argument of the wrong kind.
    ValueError
        Numbers that do not fit.

    Notes
    -----
    Only pixels inside the image count, so the halo is never larger than the image. A sample that is outside
    on any axis reads nothing and needs no halo, and neither does an infinite or NaN offset: training that
    diverges does not make tiles grow.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.tiling import required_halo
    >>> offset = numpy.zeros((1, 18, 8, 8))
    >>> offset[0, 0, 4, 4], offset[0, 1, 4, 4], offset[0, 0, 5, 5] = -2.5, 1.5, numpy.inf
    >>> required_halo(offset, 3, padding=1)
    ((3, 0), (0, 0))
    """
    if not hasattr(offset, "ndim"):
        raise TypeError(f"offset is {shown(offset)}; wanted an array")
    ndim = offset.ndim - 2
    if ndim not in (1, 2, 3):
        raise ValueError(
            f"offset has {count(offset.ndim, 'axis')}; wanted 3, 4 or 5: (batch, channels, *output)"
        )
    kernels = numbers_per_axis("kernel_size", checked_integers("kernel_size", kernel_size, 1), ndim)
    strides = numbers_per_axis("stride", checked_integers("stride", stride, 1), ndim)
    dilations = numbers_per_axis("dilation", checked_integers("dilation", dilation, 1), ndim)
    pads = pads_per_axis("padding", checked_integers("padding", padding, 2), ndim)
    channels = math.prod(kernels) * ndim
    if offset.shape[1] % channels:
        raise ValueError(
            f"offset has {count(offset.shape[1], 'channel')}; {math.prod(kernels)} taps on "
            f"{count(ndim, 'spatial axis')} need a multiple of {channels}"
        )
    axes = []
    for axis, (begin, end) in enumerate(pads):
        bare = Axis(0, kernels[axis], strides[axis], begin, dilations[axis])
        largest = bare.span(offset.shape[2 + axis]) + strides[axis] - 1 - begin - end
        axes.append(Axis(max(0, largest), kernels[axis], strides[axis], begin, dilations[axis]))
    return halo_of_tile(offset, axes, (0,) * ndim)


def halo_of_tile(offset: Array, axes: Sequence[Axis], first: Sequence[int]) -> Pairs:
    """Tell how far beyond its window any position of a tile reads; `first` is the tile's first position."""
    halo = numpy.zeros((len(axes), 2), numpy.int64)
    if offset.size:
        for tap_offset, tap in _by_tap(offset, axes):
            numpy.maximum(halo, _halo_of_tap(tap_offset, tap, axes, first), out=halo)
    return tuple((before, after) for before, after in halo.tolist())


def halo_within(offset: Array, axes: Sequence[Axis], first: Sequence[int], allowed: Pairs) -> Pairs:
    """Return what `halo_of_tile` does, or more of what is allowed where that is cheaper to tell."""
    if not offset.size:
        return halo_of_tile(offset, axes, first)
    kernel = tuple(axis.kernel for axis in axes)
    everywhere = (0, 1, *range(4, 4 + len(axes)))
    split = _split(offset, axes)
    taps = numpy.indices(kernel).reshape(len(axes), -1).T
    moved = taps * [axis.dilation for axis in axes]
    reach = [axis.reach for axis in axes]
    lowest = moved + numpy.floor(split.min(everywhere).astype(numpy.float64))
    highest = moved + numpy.ceil(split.max(everywhere).astype(numpy.float64))
    halo = numpy.maximum(numpy.stack([-lowest.min(0), highest.max(0) - reach], axis=-1), 0)
    if (halo <= allowed).all():  # which a NaN is not
        return tuple((int(before), int(after)) for before, after in halo)
    return halo_of_tile(offset, axes, first)


def _split(offset: Array, axes: Sequence[Axis]) -> Array:
    """View `offset` as (batch, offset_groups, taps, ndim, *output)."""
    taps = math.prod(axis.kernel for axis in axes)
    batch, channels, *output = offset.shape
    return offset.reshape(batch, channels // (taps * len(axes)), taps, len(axes), *output)


def _by_tap(offset: Array, axes: Sequence[Axis]) -> Iterator[tuple[Array, tuple[int, ...]]]:
    """Yield (batch, offset_groups, ndim, *output) of each tap, and its index in the kernel."""
    split = _split(offset, axes)
    for number, tap in enumerate(numpy.ndindex(*(axis.kernel for axis in axes))):
        yield split[:, :, number], tap


def _halo_of_tap(offset: Array, tap: Sequence[int], axes: Sequence[Axis], first: Sequence[int]) -> Array:
    """Return (ndim, 2): pixels before and after the windows of their positions that samples of a tap read."""
    reads: Any = True
    beyond = []
    for number, axis in enumerate(axes):
        along = offset[:, :, number]
        # Half precision has no room for the numbers below; of float32 and float64, floors are exact.
        along = along.astype(numpy.float32) if along.itemsize < 4 else along
        in_range = numpy.abs(along) < _LIMIT
        along = numpy.where(in_range, along, 0)
        floor = numpy.floor(along)
        shape = [-1 if axis_of == number else 1 for axis_of in range(len(axes))]
        positions = numpy.arange(along.shape[2 + number]).reshape(shape) + first[number]
        window = positions * axis.stride - axis.begin
        low = window + tap[number] * axis.dilation + floor.astype(numpy.int64)
        high = low + (along > floor)
        low, high = numpy.maximum(low, 0), numpy.minimum(high, axis.extent - 1)
        reads = reads & in_range & (low <= high)
        beyond.append((window - low, high - (window + axis.reach)))
    zero = numpy.int64(0)
    return numpy.array([[numpy.max(side, where=reads, initial=zero) for side in pair] for pair in beyond])


def checked_halo(halo: Any, ndim: int) -> Pairs:
    """Return (before, after) per axis, of one integer, one per axis or one pair per axis."""
    return pads_per_axis("halo", checked_integers("halo", halo, 2), ndim)
