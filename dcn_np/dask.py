"""Deformable convolution of dask arrays, tile by tile, for images too large for one call.

Each chunk of the output is one call of `dcn_np` on the slice of `x` that it reads. A tile gives the bits that
the whole would give at its positions. Slicing, merging and scheduling are dask's.

Tasks that run side by side share the processors: where dask runs several in one process, as its threads do,
``dcn_np.set_num_threads(1)`` in that process keeps each to one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import dask.array
import numpy
from numpy.typing import NDArray

from .cpu import dtypes
from .deform_conv import modulated_deform_conv as convolve
from .geometry import Geometry
from .tiling import Axis, Pairs, checked_halo, halo_within, place

# A dask array, for which there is no type; the arrays of a tile are NumPy's.
DaskArray: TypeAlias = Any
Array: TypeAlias = NDArray[Any]
Chunks: TypeAlias = tuple[tuple[int, ...], ...]

__all__ = ["deform_conv", "modulated_deform_conv"]


@dataclass(frozen=True)
class _Plan:
    """What every tile must know; per axis, then per tile along it."""

    axes: tuple[Axis, ...]
    tiles: Chunks  # output positions
    starts: Chunks  # the first of them
    slices: tuple[Pairs, ...]  # start and stop of the pixels it is given: at least one, if there is one
    halo: Pairs
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    offset_groups: int

    @staticmethod
    def of(geometry: Geometry, tiles: Sequence[tuple[int, ...]], halo: Pairs) -> _Plan:
        begins = [begin for begin, _ in geometry.padding]
        per_axis = (geometry.input, geometry.kernel, geometry.stride, begins, geometry.dilation)
        axes = tuple(Axis(*numbers) for numbers in zip(*per_axis, strict=True))
        starts = tuple(tuple(accumulate(extents[:-1], initial=0)) for extents in tiles)
        along = zip(axes, starts, tiles, halo, strict=True)
        return _Plan(
            axes=axes,
            tiles=tuple(tiles),
            starts=starts,
            slices=tuple(_slices(*numbers) for numbers in along),
            halo=halo,
            stride=geometry.stride,
            dilation=geometry.dilation,
            groups=geometry.groups,
            offset_groups=geometry.offset_groups,
        )


def _slices(axis: Axis, starts: tuple[int, ...], tiles: tuple[int, ...], halo: tuple[int, int]) -> Pairs:
    slices = []
    for first, extent in zip(starts, tiles, strict=True):
        start, stop = axis.read(first, extent, halo)
        start = min(start, max(axis.extent - 1, 0))
        slices.append((start, min(max(stop, start + 1), axis.extent)))
    return tuple(slices)


def deform_conv(
    x: DaskArray,
    offset: DaskArray | None,
    weight: DaskArray,
    bias: DaskArray | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    halo: Any,
) -> DaskArray:
    """Convolve where the offsets say, tile by tile.

    Parameters
    ----------
    x, offset : dask.array.Array
        As `dcn_np.deform_conv` takes them, in any chunks. The result has the chunks of `offset`.
    weight, bias : dask.array.Array or numpy.ndarray
        As `dcn_np.deform_conv` takes them. `bias` may be None.
    stride, padding, dilation, groups, offset_groups : int or sequence
        As `dcn_np.deform_conv` takes them.
    halo : int, or sequence of int or of (before, after) pairs
        How many pixels beyond its rigid window a tile may read, per spatial axis.

    Returns
    -------
    dask.array.Array, shape (batch, out_channels, *output)
        The chunks of `offset`, with all output channels in one.

    Raises
    ------
    TypeError
        An argument of the wrong kind or dtype.
    ValueError
        Shapes or numbers that do not fit. When computed: offsets reach beyond the halo.

    See Also
    --------
    modulated_deform_conv : The same with a factor for each tap; its notes hold here.
    dcn_np.tiling.required_halo : The halo that offsets need.
    """
    return modulated_deform_conv(
        x, offset, None, weight, bias, stride, padding, dilation, groups, offset_groups, halo=halo
    )


def modulated_deform_conv(
    x: DaskArray,
    offset: DaskArray | None,
    mask: DaskArray | None,
    weight: DaskArray,
    bias: DaskArray | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    halo: Any,
) -> DaskArray:
    """Convolve where the offsets say, each tap scaled by its mask, tile by tile.

    Parameters
    ----------
    x, offset, mask : dask.array.Array
        As `dcn_np.modulated_deform_conv` takes them, in any chunks; `offset` and `mask` may be None. The
        chunks of `offset` along batch and space are the tiles; without it those of `mask`, and without both
        as many as `x` has chunks.
    weight, bias : dask.array.Array or numpy.ndarray
        As `dcn_np.modulated_deform_conv` takes them. `bias` may be None.
    stride, padding, dilation, groups, offset_groups : int or sequence
        As `dcn_np.modulated_deform_conv` takes them.
    halo : int, or sequence of int or of (before, after) pairs
        How many pixels beyond its rigid window a tile may read, per spatial axis. Without `offset` it has no
        use.

    Returns
    -------
    dask.array.Array, shape (batch, out_channels, *output)
        One chunk per tile, with all output channels.

    Raises
    ------
    TypeError
        An argument of the wrong kind or dtype.
    ValueError
        Shapes or numbers that do not fit. When computed: offsets reach beyond the halo; the message names
        the halo that the tile needs.

    See Also
    --------
    deform_conv : The same without masks.
    dcn_np.tiling.required_halo : The halo that offsets need.

    Notes
    -----
    On CPUs that use one instruction set the result is that of `dcn_np.modulated_deform_conv` bit for bit,
    in any chunks. Each tile gets `x` up to the halo and computes on what its own offsets reach; the cost of
    a tile grows with that reach, as if it were so many positions larger on each side, so that tiles should be
    several times as large. The chunks hold NumPy arrays.

    Examples
    --------
    >>> import dask.array
    >>> import numpy
    >>> import dcn_np.dask
    >>> x = dask.array.arange(36.0, chunks=6).reshape(1, 1, 6, 6)
    >>> offset = dask.array.full((1, 2, 6, 6), 0.5, chunks=(1, 2, 3, 3))
    >>> weight = numpy.ones((1, 1, 1, 1))
    >>> y = dcn_np.dask.modulated_deform_conv(x, offset, None, weight, halo=1)
    >>> y[0, 0, 2:4].compute()
    array([[15.5, 16.5, 17.5, 18.5, 19.5, 10. ],
           [21.5, 22.5, 23.5, 24.5, 25.5, 13. ]])
    """
    arrays = {"x": x, "offset": offset, "mask": mask, "weight": weight, "bias": bias}
    x, offset, mask, weight, bias = (_lazy(name, array) for name, array in arrays.items())
    geometry = Geometry.of(
        dtypes(), x, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups
    )
    batches, *tiles = _tile_extents(geometry, x, offset, mask)
    plan = _Plan.of(geometry, tiles, checked_halo(halo, geometry.ndim))
    whole = {0: batches, 1: -1}
    per_tile = whole | dict(enumerate(tiles, 2))
    return dask.array.map_blocks(
        _tile,
        _sliced(x.rechunk(whole), plan.slices),
        None if offset is None else offset.rechunk(per_tile),
        None if mask is None else mask.rechunk(per_tile),
        weight=weight,
        bias=bias,
        plan=plan,
        chunks=(batches, (geometry.out_channels,), *tiles),
        meta=numpy.empty((0,) * (geometry.ndim + 2), geometry.dtype),
    )


def _lazy(name: str, array: Any) -> DaskArray:
    """Return an argument as a dask array of known shape; small ones may be NumPy's."""
    if array is None:
        return None
    if not isinstance(array, dask.array.Array):
        if name not in ("weight", "bias") or not isinstance(array, numpy.ndarray):
            raise TypeError(f"{name} is a {type(array).__name__}; wanted a dask.array.Array")
        return dask.array.from_array(array, chunks=-1)
    if any(extent != extent for extent in array.shape):
        raise ValueError(f"{name} has chunks of unknown sizes; {name}.compute_chunk_sizes() finds them")
    return array


def _tile_extents(
    geometry: Geometry, x: DaskArray, offset: DaskArray | None, mask: DaskArray | None
) -> Chunks:
    """Return the chunks of the output along batch and space."""
    shape = (geometry.batch, *geometry.output)
    if 0 in x.shape:  # no pixel to put into a chunk: one call says what comes out
        return tuple((extent,) for extent in shape)
    for array in (offset, mask):
        if array is not None:
            chunks: Chunks = (array.chunks[0], *array.chunks[2:])
            return tuple(tuple(extent for extent in along if extent) for along in chunks)
    blocks = (x.numblocks[0], *x.numblocks[2:])
    even = tuple(-(-extent // number) for extent, number in zip(shape, blocks, strict=True))
    return (x.chunks[0], *dask.array.core.normalize_chunks(even, shape)[1:])


def _sliced(x: DaskArray, slices: Sequence[Pairs]) -> DaskArray:
    """Return the slices of `x` side by side, one chunk each; where they overlap, pixels are in several."""
    for axis, along in enumerate(slices, 2):
        before = (slice(None),) * axis
        parts = [x[(*before, slice(start, stop))] for start, stop in along]
        x = dask.array.concatenate(parts, axis=axis).rechunk(
            {axis: tuple(stop - start for start, stop in along)}
        )
    return x


def _tile(
    x: Array,
    offset: Array | None,
    mask: Array | None,
    *,
    weight: Array,
    bias: Array | None,
    plan: _Plan,
    block_id: tuple[int, ...],
) -> Array:
    """Compute one chunk of the output from the slice of `x` that it was given."""
    numbers = block_id[2:]
    firsts = tuple(starts[number] for starts, number in zip(plan.starts, numbers, strict=True))
    extents = tuple(tiles[number] for tiles, number in zip(plan.tiles, numbers, strict=True))
    given = tuple(slices[number][0] for slices, number in zip(plan.slices, numbers, strict=True))
    halo: Pairs = ((0, 0),) * len(plan.axes)
    if offset is not None:
        halo = halo_within(offset, plan.axes, firsts, plan.halo)
    _check_fits(halo, plan.halo, firsts, extents)
    places = [place(*numbers) for numbers in zip(plan.axes, firsts, extents, halo, strict=True)]
    read = [slice(at.start - start, at.stop - start) for at, start in zip(places, given, strict=True)]
    surplus = [at.surplus for at in places]
    y: Array = convolve(
        x[:, :, *read],
        _grown(offset, surplus, numpy.inf),  # which reads nothing
        _grown(mask, surplus, 0),
        weight,
        bias,
        plan.stride,
        [at.padding for at in places],
        plan.dilation,
        plan.groups,
        plan.offset_groups,
    )
    if not any(map(any, surplus)):
        return y
    kept = [slice(before, before + extent) for (before, _), extent in zip(surplus, extents, strict=True)]
    result: Array = y[:, :, *kept].copy(order="K")
    return result


def _check_fits(halo: Pairs, allowed: Pairs, firsts: tuple[int, ...], extents: tuple[int, ...]) -> None:
    if (numpy.array(halo) > allowed).any():
        raise ValueError(
            f"halo is {allowed}; the offsets of the {'x'.join(map(str, extents))} output positions from "
            f"{firsts} need {halo}, pixels before and after on each axis: wanted at least that"
        )


def _grown(array: Array | None, surplus: Sequence[tuple[int, int]], value: float) -> Array | None:
    """Return an array with more positions before and after, of one value."""
    if array is None or not any(map(any, surplus)):
        return array
    return numpy.pad(array, [(0, 0), (0, 0), *surplus], constant_values=value)
