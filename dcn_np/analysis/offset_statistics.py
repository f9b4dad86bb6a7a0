"""How far offsets reach, by layer and by stage: what training made of them, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy
from numpy.typing import NDArray

from ..messages import count, shown
from .sampling import SampledLayer, sampling_positions

Array: TypeAlias = NDArray[Any]

ELSEWHERE = "elsewhere"


class OffsetRecord(NamedTuple):
    """The statistics of a layer, or of all layers of a stage together: a row of the table.

    Lengths are Euclidean, over the finite samples; NaN where there is none to measure.

    Parameters
    ----------
    name : str
        Of the layer or stage.
    layers : int
        How many layers: 1 for a layer.
    samples : int
        How many samples: images, offset groups, taps and positions.
    mean, median, percentile_95, largest : float
        Of the lengths of the offsets, in pixels of the layer's input.
    in_image : float
        The mean length in pixels of the image: each component times the layer's scale.
    dilation : float
        The effective dilation: the mean distance between taps that are neighbours in the kernel, in pixels of
        the layer's input. On the rigid grid it is the dilation.
    outside : float
        The part of the samples that read nothing, a pixel or more beyond the border of the input.
    not_finite : float
        The part of the samples whose offset is NaN or infinite.
    mask_mean : float or None
        The mean mask; None where there are no masks.
    near_zero : float or None
        The part of the masks whose size is below the threshold; None where there are no masks.
    where : str or None
        Which of the `places` the samples are of; None for all positions.
    """

    name: str
    layers: int
    samples: int
    mean: float
    median: float
    percentile_95: float
    largest: float
    in_image: float
    dilation: float
    outside: float
    not_finite: float
    mask_mean: float | None
    near_zero: float | None
    where: str | None = None


def offset_statistics(
    layers: Mapping[Any, SampledLayer],
    *,
    stages: Mapping[Any, str] | None = None,
    threshold: float = 0.05,
    places: Mapping[str, Any] | None = None,
) -> list[OffsetRecord]:
    """Measure the offsets and masks of the layers of a network.

    Parameters
    ----------
    layers : mapping of str to SampledLayer
        By name, such as `LayersNode.sampled_layers` returns. Layers with neither offsets nor masks are left
        out.
    stages : mapping of str to str, or None
        The stage of each layer, by the layer's name. None takes what stands before the first dot of a name:
        "layer2.0.conv2" is of the stage "layer2", "conv4" of none.
    threshold : float
        Masks of a size below it count as near 0.
    places : mapping of str to array_like, shape (boxes, 4), or None
        Boxes y1, x1, y2, x2 by a name, such as "small" and "large" for the objects of an image by their
        scale: borders in pixels of the image, as `NodeView.box` has them. Samples count for a name if their
        output position lies in one of its boxes; those that lie in none are "elsewhere".

    Returns
    -------
    list of OffsetRecord
        The layers in their order, then the stages; each followed by the same of each of the `places` that has
        samples. Each record is a tuple with names, so that the list is a table: ``pandas.DataFrame(records)``
        has its columns.

    Raises
    ------
    TypeError
        A layer that is no `SampledLayer`.
    ValueError
        Boxes of another shape, or an empty one.

    See Also
    --------
    offset_table : The same as text.

    Notes
    -----
    An output position p of a layer is taken to lie at ``scale * stride * p`` of the image, as `view_node`
    takes it. Effective dilations of small, medium and large objects and of the background are Table 2 of
    [1]_.

    References
    ----------
    .. [1] Dai et al., "Deformable Convolutional Networks", 2017, arXiv:1703.06211.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import SampledLayer, offset_statistics
    >>> offset = numpy.zeros((1, 18, 8, 8))
    >>> offset[:, ::2] = 3.0  # all taps move down by three pixels
    >>> layer = SampledLayer((8, 8), 3, padding=1, offset=offset, scale=4)
    >>> record, = offset_statistics({"conv4": layer})
    >>> record.mean, record.in_image, record.dilation, record.outside
    (3.0, 12.0, 1.0, 0.4270833333333333)
    """
    chosen = _checked_places(places)
    measured: dict[str, _Group] = {}
    by_stage: dict[str, list[_Group]] = {}
    for name, layer in layers.items():
        if not isinstance(layer, SampledLayer):
            raise TypeError(f"layers[{name!r}] is {shown(layer)}; wanted a SampledLayer")
        if layer.offset is None and layer.mask is None:
            continue
        found = measured[str(name)] = _samples(layer, chosen)
        before, dot, _ = str(name).partition(".")
        stage = (before if dot else None) if stages is None else stages.get(name)
        if stage is not None:
            by_stage.setdefault(stage, []).append(found)
    groups = [(name, [found]) for name, found in measured.items()] + list(by_stage.items())
    return [
        _record(name, [group[where] for group in together if where in group], threshold, where)
        for name, together in groups
        for where in (None, *chosen, ELSEWHERE)
        if any(where in group for group in together)
    ]


def offset_table(records: Sequence[OffsetRecord]) -> str:
    """Write the statistics as a table of text.

    Parameters
    ----------
    records : sequence of OffsetRecord
        What `offset_statistics` returned.

    Returns
    -------
    str
        A line of headings with units ("px" are pixels of a layer's input), and one for each record.

    See Also
    --------
    offset_statistics : Measures them.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import SampledLayer, offset_statistics, offset_table
    >>> layer = SampledLayer((8, 8), 3, offset=numpy.full((1, 18, 6, 6), 0.5), scale=4)
    >>> print(offset_table(offset_statistics({"conv4": layer})))
    layer | mean, px | median | 95 % | largest | in the image | dilation | outside | mask | near 0
    conv4 |     0.71 |   0.71 | 0.71 |    0.71 |          2.8 |        1 |   0.0 % |    – |      –
    """
    heading = (
        *("layer", "mean, px", "median", "95 %", "largest", "in the image", "dilation", "outside"),
        *("mask", "near 0"),
    )
    lines: list[tuple[str, ...]] = [heading]
    for record in records:
        lengths = record[3:9]
        mask = "–" if record.mask_mean is None else f"{record.mask_mean:.2f}"
        shares = (record.outside, record.near_zero)
        outside, near_zero = ("–" if share is None else f"{100 * share:.1f} %" for share in shares)
        name = record.name if record.where is None else f"{record.name}, {record.where}"
        cells = (name, *(f"{length:.2g}" for length in lengths), outside, mask, near_zero)
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        " | ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in lines
    )


def _checked_places(places: Mapping[str, Any] | None) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name, given in (places or {}).items():
        if not isinstance(name, str) or name == ELSEWHERE:
            raise ValueError(f"places has the name {shown(name)}; wanted strings other than {ELSEWHERE!r}")
        boxes = found[name] = numpy.asarray(given, numpy.float64)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"places[{name!r}] has shape {boxes.shape}; wanted (boxes, 4): y1, x1, y2, x2")
        if not (boxes[:, :2] < boxes[:, 2:]).all():
            first = int((boxes[:, :2] < boxes[:, 2:]).all(axis=1).argmin())
            raise ValueError(
                f"places[{name!r}][{first}] is {boxes[first].tolist()}, an empty box; wanted y1 < y2, x1 < x2"
            )
    return found


class _Samples(NamedTuple):
    """Samples of a layer, flat."""

    lengths: Array
    in_image: Array
    dilations: Array
    outside: Array
    finite: Array
    masks: Array

    @staticmethod
    def of(layer: SampledLayer, where: Any) -> _Samples:
        """Return the samples of the output positions at an index into all of them, in one row."""
        geometry = layer.geometry
        batch, ndim, taps = geometry.batch, geometry.ndim, geometry.taps
        shape = (batch, geometry.offset_groups, taps, ndim, *geometry.output)
        offset = numpy.zeros(shape) if layer.offset is None else layer.offset.reshape(shape)
        window = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.offset_groups
        positions = sampling_positions(offset.reshape(batch, -1, *geometry.output), *window)
        components, positions = (
            numpy.moveaxis(array.reshape(*shape[:4], -1)[..., where], 3, 0).astype(numpy.float64)
            for array in (offset, positions)
        )
        finite = numpy.isfinite(components).all(axis=0)
        extents = numpy.array(geometry.input).reshape(-1, *[1] * (positions.ndim - 1))
        reads_nothing = ((positions <= -1) | (positions >= extents)).any(axis=0)
        scale = numpy.broadcast_to(layer.scale, (ndim,)).reshape(extents.shape)
        masks = numpy.zeros(0)
        if layer.mask is not None:
            masks = layer.mask.reshape(batch, -1, math.prod(geometry.output))[..., where]
        return _Samples(
            numpy.linalg.norm(components, axis=0)[finite],
            numpy.linalg.norm(components * scale, axis=0)[finite],
            _neighbours(positions, geometry.kernel),
            (reads_nothing & ~numpy.isnan(positions).any(axis=0)).reshape(-1),
            finite.reshape(-1),
            masks.astype(numpy.float64).reshape(-1),
        )


# The samples of a layer by the place that they are of; None has all of them.
_Group: TypeAlias = dict[str | None, _Samples]


def _samples(layer: SampledLayer, places: Mapping[str, Array]) -> _Group:
    found: _Group = {None: _Samples.of(layer, slice(None))}
    if not places:
        return found
    output = layer.geometry.output
    if len(output) != 2:
        raise ValueError(f"places is given for a layer with {count(len(output), 'spatial axis')}; wanted 2")
    points = (numpy.indices(output).reshape(2, -1).T * layer.geometry.stride) * layer.scale
    inside = {
        name: ((boxes[:, None, :2] <= points) & (points < boxes[:, None, 2:])).all(axis=2).any(axis=0)
        for name, boxes in places.items()
    }
    inside[ELSEWHERE] = ~numpy.any(list(inside.values()), axis=0)
    return found | {name: _Samples.of(layer, where) for name, where in inside.items() if where.any()}


def _neighbours(positions: Array, kernel: Sequence[int]) -> Array:
    """Return the finite distances of neighbouring taps; positions (ndim, batch, groups, taps, *output)."""
    on_grid = positions.reshape(*positions.shape[:3], *kernel, -1)
    with numpy.errstate(invalid="ignore"):
        steps = [numpy.diff(on_grid, axis=3 + axis) for axis in range(len(kernel))]
    distances = numpy.concatenate([numpy.linalg.norm(step, axis=0).reshape(-1) for step in steps])
    found: Array = distances[numpy.isfinite(distances)]
    return found


def _record(name: str, samples: Sequence[_Samples], threshold: float, where: str | None) -> OffsetRecord:
    together = _Samples(*map(numpy.concatenate, zip(*samples, strict=True)))
    lengths = together.lengths if together.lengths.size else numpy.array([numpy.nan])
    masks = together.masks
    return OffsetRecord(
        name,
        len(samples),
        together.finite.size,
        float(lengths.mean()),
        float(numpy.median(lengths)),
        float(numpy.percentile(lengths, 95)),
        float(lengths.max()),
        _mean(together.in_image),
        _mean(together.dilations),
        _mean(together.outside),
        1 - _mean(together.finite),
        _mean(masks) if masks.size else None,
        _mean(numpy.abs(masks) < threshold) if masks.size else None,
        where,
    )


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else float("nan")
