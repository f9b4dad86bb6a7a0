"""Where the taps of deformable convolutions read: one layer's, and traced through several to the image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import numpy
from numpy.typing import NDArray

from ..arrays import on_host
from ..backends import backend_of
from ..geometry import RANKS, Geometry, checked_integers, numbers_per_axis, pads_per_axis
from ..messages import count, number, span

Array: TypeAlias = NDArray[Any]

# Points of one trace; while it is computed, each takes about a hundred bytes.
LARGEST_TRACE = 2**24

# ---- one layer


def sampling_positions(
    offset: Any,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    offset_groups: int = 1,
) -> Array:
    """Tell where each tap of each output position reads.

    Parameters
    ----------
    offset : array, shape (batch, offset_groups * taps * ndim, *output)
        The offsets of a convolution with 1 to 3 spatial axes, as `dcn_np.deform_conv` takes them.
    kernel_size : int or sequence of int
        Taps per spatial axis.
    stride : int or sequence of int
        Pixels from one output position to the next, per spatial axis.
    padding : int, or sequence of int or of (begin, end) pairs
        Zeros thought around the image, in pixels, per spatial axis.
    dilation : int or sequence of int
        Pixels from one tap to the next, per spatial axis.
    offset_groups : int
        Blocks of channels with offsets of their own.

    Returns
    -------
    numpy.ndarray, shape (batch, offset_groups, taps, ndim, *output), float64
        Coordinates in pixels of the convolution's input, axes in its order: (y, x) in 2-D. Pixel centres are
        whole numbers. Nothing is rounded, and nothing is held inside the image.

    Raises
    ------
    TypeError
        An argument of the wrong kind.
    ValueError
        Numbers that do not fit.

    See Also
    --------
    trace_sampling : The same through several layers.
    effective_sampling : How much each of them counts.

    Notes
    -----
    At output position p, tap k reads at ``p * stride - padding_begin + k * dilation + offset[k, p]``.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import sampling_positions
    >>> offset = numpy.zeros((1, 18, 4, 4), "float32")
    >>> offset[0, :2] = 0.25  # (y, x) of the first tap
    >>> positions = sampling_positions(offset, kernel_size=3, padding=1)
    >>> positions.shape
    (1, 1, 9, 2, 4, 4)
    >>> positions[0, 0, :3, :, 1, 2]
    array([[0.25, 1.25],
           [0.  , 2.  ],
           [0.  , 3.  ]])
    """
    offset = on_host("offset", offset)
    if offset.ndim - 2 not in RANKS:
        raise ValueError(
            f"offset has {count(offset.ndim, 'axis')}, shape {offset.shape}; wanted 3, 4 or 5: (batch, "
            "offset_groups * taps * ndim, *output)"
        )
    input_size = _smallest_input(offset.shape[2:], kernel_size, stride, padding, dilation)
    geometry = _geometry(input_size, kernel_size, stride, padding, dilation, offset, None, offset_groups)
    rigid = _taps_at(numpy.indices(geometry.output).reshape(geometry.ndim, -1).T, geometry)
    grid = numpy.moveaxis(rigid, 0, -1).reshape(geometry.taps, geometry.ndim, *geometry.output)
    return grid + _per_tap(offset, geometry)


def _smallest_input(
    output: Sequence[int], kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[int, ...]:
    """Return the smallest extents of an input that give such an output; padding may make them negative."""
    ndim = len(output)
    kernel = _kernel(kernel_size, ndim)
    strides = numbers_per_axis("stride", checked_integers("stride", stride, 1), ndim)
    dilations = numbers_per_axis("dilation", checked_integers("dilation", dilation, 1), ndim)
    pads = pads_per_axis("padding", checked_integers("padding", padding, 2), ndim)
    axes = zip(output, kernel, strides, pads, dilations, strict=True)
    return tuple((out - 1) * step + span(taps, apart) - sum(pad) for out, taps, step, pad, apart in axes)


def _kernel(kernel_size: Any, ndim: int) -> tuple[int, ...]:
    return numbers_per_axis("kernel_size", checked_integers("kernel_size", kernel_size, 1), ndim)


def _geometry(
    input_size: tuple[int, ...],
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    offset: Array | None,
    mask: Array | None,
    offset_groups: Any,
) -> Geometry:
    """Check a layer's numbers and arrays against each other, as the operators do."""
    positions = [array for array in (offset, mask) if array is not None]
    batch, dtype = (positions[0].shape[0], positions[0].dtype) if positions else (1, numpy.dtype("float64"))
    groups = checked_integers("offset_groups", offset_groups, 0)
    x = SimpleNamespace(shape=(batch, groups, *input_size), dtype=dtype)
    weight = SimpleNamespace(shape=(1, groups, *_kernel(kernel_size, len(input_size))), dtype=dtype)
    computed = backend_of(numpy.empty(0)).dtypes()
    return Geometry.of(computed, x, offset, mask, weight, None, stride, padding, dilation, 1, groups)


def _per_tap(array: Array, geometry: Geometry) -> Array:
    """View offsets as (batch, offset_groups, taps, ndim, *output), masks with 1 in place of ndim."""
    numbers = array.shape[1] // (geometry.offset_groups * geometry.taps)
    return array.reshape(-1, geometry.offset_groups, geometry.taps, numbers, *geometry.output)


def _taps_at(positions: Array, geometry: Geometry) -> Array:
    """Return where the rigid grid reads for output positions (points, ndim): (points, taps, ndim)."""
    begin = [pad[0] for pad in geometry.padding]
    taps = numpy.indices(geometry.kernel).reshape(geometry.ndim, -1).T * geometry.dilation
    first = positions * numpy.array(geometry.stride) - begin
    found: Array = first[:, None] + taps
    return found


# ---- several layers


@dataclass(frozen=True, eq=False)
class SampledLayer:
    """How one layer reads its input: its window, and the offsets and masks that it made of given images.

    Parameters
    ----------
    input_size : sequence of int
        The spatial extents of the layer's input.
    kernel_size : int or sequence of int
        Taps per spatial axis.
    stride : int or sequence of int
        Pixels of the input from one output position to the next, per spatial axis.
    padding : int, or sequence of int or of (begin, end) pairs
        Zeros thought around the input, in pixels, per spatial axis.
    dilation : int or sequence of int
        Pixels of the input from one tap to the next, per spatial axis.
    offset : array, shape (batch, offset_groups * taps * ndim, *output), or None
        Offsets as `dcn_np.deform_conv` takes them; None for a layer on the rigid grid, such as an ordinary
        convolution or a pooling.
    mask : array, shape (batch, offset_groups * taps, *output), or None
        Modulation scalars; None for ones.
    offset_groups : int
        Blocks of channels with offsets and masks of their own.
    scale : float or sequence of float
        Pixels of the image from one pixel of the input to the next, per spatial axis: the product of the
        strides below. `offset_statistics` and `view_node` read it.

    Attributes
    ----------
    geometry : dcn_np.geometry.Geometry
        The same numbers, checked, with those that follow from them, such as the extents of the output.

    Raises
    ------
    TypeError
        An argument of the wrong kind.
    ValueError
        Numbers that do not fit.
    """

    input_size: Sequence[int]
    kernel_size: int | Sequence[int]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    offset: Any = None
    mask: Any = None
    offset_groups: int = 1
    scale: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        for name in ("offset", "mask"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, on_host(name, getattr(self, name)))
        _ = self.geometry

    @cached_property
    def geometry(self) -> Geometry:
        size = checked_integers("input_size", self.input_size, 1)
        if not isinstance(size, tuple) or len(size) not in RANKS:
            raise ValueError(f"input_size is {self.input_size!r}; wanted one extent per spatial axis, 1 to 3")
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return _geometry(size, *window, self.offset, self.mask, self.offset_groups)


class SamplingTrace(NamedTuple):
    """The points of the image that nodes read, through all layers.

    Parameters
    ----------
    positions : numpy.ndarray, shape (nodes, points, ndim), float64
        In pixels of the input of the first layer. Points are in the order of the taps, those of the last
        layer slowest.
    modulation : numpy.ndarray, shape (nodes, points), float64
        The factor of each point, before any filter.
    """

    positions: Array
    modulation: Array


def trace_sampling(
    layers: Sequence[SampledLayer],
    nodes: Any,
    *,
    image: int = 0,
    groups: Sequence[int] | None = None,
) -> SamplingTrace:
    """Trace nodes through several layers to the points of the image that they read.

    Parameters
    ----------
    layers : sequence of SampledLayer
        A chain from the image to the nodes: each reads the output of the one before it. Functions of single
        pixels in between, such as an activation, are left out.
    nodes : array_like, shape (nodes, ndim)
        Positions in the output of the last layer, whole or not.
    image : int
        Which image of the batch; layers without offsets and masks have no batch.
    groups : sequence of int or None
        For each layer which of its offset groups is followed; None is the first everywhere.

    Returns
    -------
    SamplingTrace
        Of each node as many points as the product of the layers' taps: 9**n for n layers of 3 x 3.

    Raises
    ------
    TypeError
        An argument of the wrong kind.
    ValueError
        Layers that do not fit on each other, a node outside the output, or more than 2**24 points.

    See Also
    --------
    sampling_positions : One layer alone.

    Notes
    -----
    From a point q in the output of a layer, tap k leads to the point ::

        q * stride - padding_begin + k * dilation + offset[k](q)

    of its input. q is a real number below the nodes, and is never rounded. The papers do not say what the
    offset is there; here offsets are interpolated linearly along each axis, as the layer above interpolates
    the features that were made with them, and at the border the nearest is taken. Exactly, a feature between
    positions mixes features that read at the points of each position; the traced point is the mean of
    theirs, with the weights of the mixture.

    The modulation is the product over layers of ::

        mask[k](q) * prod over axes of clip(min(q + 1, extent - q), 0, 1)

    where masks are interpolated as offsets are, and the second factor is what interpolation with zeros
    outside leaves of a feature at q: 1 within the feature map, 0 from a pixel beyond it. The image counts as
    the lowest map, so a point outside it has no modulation. An infinite offset leads to a point at infinity,
    of modulation 0; a NaN to NaN.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import SampledLayer, trace_sampling
    >>> ordinary = SampledLayer((16, 16), 3, padding=1)
    >>> offset = numpy.full((1, 18, 16, 16), 0.5)
    >>> trace = trace_sampling([ordinary, SampledLayer((16, 16), 3, padding=1, offset=offset)], [[8, 8]])
    >>> trace.positions.shape
    (1, 81, 2)
    >>> trace.positions[0].min(axis=0), trace.positions[0].max(axis=0)
    (array([6.5, 6.5]), array([10.5, 10.5]))
    """
    geometries = _checked_chain(layers)
    points = _checked_nodes(nodes, geometries[-1])
    _check_points(len(points), geometries)
    chosen, image = _checked_groups(groups, geometries), checked_integers("image", image, 0)
    nodes_count, modulation = len(points), numpy.ones(len(points))
    with numpy.errstate(invalid="ignore"):
        for layer, group in zip(reversed(layers), reversed(chosen), strict=True):
            offset, mask = _fields_at(points, layer, group, image)
            below = _taps_at(points, layer.geometry) + offset
            points = below.reshape(-1, below.shape[-1])
            factor = (modulation[:, None] * mask).reshape(-1)
            modulation = factor * _inside(points, layer.geometry.input)
    return SamplingTrace(
        points.reshape(nodes_count, -1, points.shape[-1]), modulation.reshape(nodes_count, -1)
    )


def _checked_chain(layers: Sequence[SampledLayer]) -> list[Geometry]:
    if not layers:
        raise ValueError("layers is empty; wanted at least one")
    for index, layer in enumerate(layers):
        if not isinstance(layer, SampledLayer):
            raise TypeError(f"layers[{index}] is a {type(layer).__name__}; wanted a SampledLayer")
    geometries = [layer.geometry for layer in layers]
    for index, (below, above) in enumerate(itertools.pairwise(geometries)):
        if below.output != above.input:
            raise ValueError(
                f"layers[{index + 1}].input_size is {above.input}; the output of layers[{index}] is "
                f"{below.output}: wanted a chain from the image to the nodes"
            )
    return geometries


def _checked_nodes(nodes: Any, geometry: Geometry) -> Array:
    points = numpy.asarray(nodes, numpy.float64)
    if points.ndim != 2 or points.shape[1] != geometry.ndim:
        raise ValueError(f"nodes has shape {points.shape}; wanted (nodes, {geometry.ndim})")
    outside = ~((points >= 0) & (points <= numpy.array(geometry.output) - 1)).all(axis=1)
    if outside.any():
        first = int(outside.argmax())
        raise ValueError(
            f"nodes[{first}] is {points[first].tolist()}, outside the output of the last layer, which is "
            f"{geometry.output}: wanted 0 to {', '.join(str(extent - 1) for extent in geometry.output)}"
        )
    return points


def _check_points(nodes: int, geometries: Sequence[Geometry]) -> None:
    points = nodes * math.prod(geometry.taps for geometry in geometries)
    if points > LARGEST_TRACE:
        raise ValueError(f"{nodes} nodes reach {number(points)} points; wanted at most {LARGEST_TRACE}")


def _checked_groups(groups: Sequence[int] | None, geometries: Sequence[Geometry]) -> Sequence[int]:
    if groups is None:
        return [0] * len(geometries)
    if len(groups) != len(geometries):
        raise ValueError(f"groups has {len(groups)} entries; wanted one per layer, {len(geometries)}")
    for index, (group, geometry) in enumerate(zip(groups, geometries, strict=True)):
        checked_integers(f"groups[{index}]", group, 0)
        if not 0 <= group < geometry.offset_groups:
            raise ValueError(
                f"groups[{index}] is {group}; the layer has {count(geometry.offset_groups, 'offset group')}"
            )
    return groups


def _fields_at(points: Array, layer: SampledLayer, group: int, image: int) -> tuple[Array, Array]:
    """Return a group's offsets (points, taps, ndim) and masks (points, taps) at real-valued positions."""
    geometry = layer.geometry
    taps, ndim = geometry.taps, geometry.ndim
    offset, mask = numpy.zeros((1, 1, ndim)), numpy.ones((1, taps))
    if layer.offset is not None:
        offset = _interpolated(_field(layer.offset, geometry, group, image), points).reshape(-1, taps, ndim)
    if layer.mask is not None:
        mask = _interpolated(_field(layer.mask, geometry, group, image), points)
    return offset, mask


def _field(array: Array, geometry: Geometry, group: int, image: int) -> Array:
    """Return a group's numbers of one image with the channels last: (*output, channels)."""
    if not 0 <= image < len(array):
        raise ValueError(f"image is {image}; the layers have a batch of {len(array)}")
    one = _per_tap(array, geometry)[image, group].reshape(-1, *geometry.output)
    return numpy.ascontiguousarray(numpy.moveaxis(one, 0, -1), numpy.float64)


def _interpolated(field: Array, points: Array) -> Array:
    """Interpolate (*extents, channels) linearly at points (points, ndim), the nearest beyond the border."""
    last = numpy.array(field.shape[:-1]) - 1
    held = numpy.clip(points, 0, last)
    cell = numpy.floor(numpy.where(numpy.isnan(held), 0, held)).astype(numpy.intp)
    fraction = held - cell
    found = numpy.zeros((len(points), field.shape[-1]))
    for corner in itertools.product((0, 1), repeat=len(last)):
        weight = numpy.where(corner, fraction, 1 - fraction).prod(axis=1)[:, None]
        values = field[tuple(numpy.minimum(cell + corner, last).T)]
        # A corner without weight is not read: it may be infinite.
        found += numpy.where(weight == 0, 0, weight * values)
    return found


def _inside(points: Array, extents: Sequence[int]) -> Array:
    """Return the weight of what lies inside, of an interpolation with zeros outside."""
    along = numpy.clip(numpy.minimum(points + 1, numpy.array(extents) - points), 0, 1)
    weight: Array = along.prod(axis=1)
    return weight
