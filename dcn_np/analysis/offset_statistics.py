"""How far offsets reach, by layer and by stage: what training made of them, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy
from numpy.typing import NDArray

from ..messages import shown
from .sampling import SampledLayer, sampling_positions

Array: TypeAlias = NDArray[Any]


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


def offset_statistics(
    layers: Mapping[Any, SampledLayer],
    *,
    stages: Mapping[Any, str] | None = None,
    threshold: float = 0.05,
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

    Returns
    -------
    list of OffsetRecord
        The layers in their order, then the stages. Each record is a tuple with names, so that the list is a
        table: ``pandas.DataFrame(records)`` has its columns.

    Raises
    ------
    TypeError
        A layer that is no `SampledLayer`.

    See Also
    --------
    offset_table : The same as text.

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
    measured: dict[str, _Samples] = {}
    by_stage: dict[str, list[_Samples]] = {}
    for name, layer in layers.items():
        if not isinstance(layer, SampledLayer):
            raise TypeError(f"layers[{name!r}] is {shown(layer)}; wanted a SampledLayer")
        if layer.offset is None and layer.mask is None:
            continue
        found = measured[str(name)] = _Samples.of(layer)
        before, dot, _ = str(name).partition(".")
        stage = (before if dot else None) if stages is None else stages.get(name)
        if stage is not None:
            by_stage.setdefault(stage, []).append(found)
    records = [_record(name, [samples], threshold) for name, samples in measured.items()]
    return records + [_record(name, samples, threshold) for name, samples in by_stage.items()]


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
        cells = (record.name, *(f"{length:.2g}" for length in lengths), outside, mask, near_zero)
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        " | ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in lines
    )


class _Samples(NamedTuple):
    """All samples of a layer, flat."""

    lengths: Array
    in_image: Array
    dilations: Array
    outside: Array
    finite: Array
    masks: Array

    @staticmethod
    def of(layer: SampledLayer) -> _Samples:
        geometry = layer.geometry
        batch, ndim, taps = geometry.batch, geometry.ndim, geometry.taps
        shape = (batch, geometry.offset_groups, taps, ndim, *geometry.output)
        offset = numpy.zeros(shape) if layer.offset is None else layer.offset.reshape(shape)
        components = numpy.moveaxis(offset, 3, 0).astype(numpy.float64)
        finite = numpy.isfinite(components).all(axis=0)
        window = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.offset_groups
        channels = offset.reshape(batch, -1, *geometry.output)
        positions = numpy.moveaxis(sampling_positions(channels, *window), 3, 0)
        extents = numpy.array(geometry.input).reshape(-1, *[1] * (positions.ndim - 1))
        reads_nothing = ((positions <= -1) | (positions >= extents)).any(axis=0)
        scale = numpy.broadcast_to(layer.scale, (ndim,)).reshape(extents.shape)
        masks = numpy.zeros(0) if layer.mask is None else layer.mask.astype(numpy.float64)
        return _Samples(
            numpy.linalg.norm(components, axis=0)[finite],
            numpy.linalg.norm(components * scale, axis=0)[finite],
            _neighbours(positions, geometry.kernel),
            (reads_nothing & ~numpy.isnan(positions).any(axis=0)).reshape(-1),
            finite.reshape(-1),
            masks.reshape(-1),
        )


def _neighbours(positions: Array, kernel: Sequence[int]) -> Array:
    """Return the finite distances of neighbouring taps; positions (ndim, batch, groups, taps, *output)."""
    on_grid = positions.reshape(*positions.shape[:3], *kernel, -1)
    with numpy.errstate(invalid="ignore"):
        steps = [numpy.diff(on_grid, axis=3 + axis) for axis in range(len(kernel))]
    distances = numpy.concatenate([numpy.linalg.norm(step, axis=0).reshape(-1) for step in steps])
    found: Array = distances[numpy.isfinite(distances)]
    return found


def _record(name: str, samples: Sequence[_Samples], threshold: float) -> OffsetRecord:
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
    )


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else float("nan")
