"""The specification of pooling over regions of interest: regular, deformable, modulated, position-sensitive.

A region is (image, x1, y1, x2, y2). It is cut into P_h x P_w bins; samples lie on a grid in each bin, and the
result of a bin is their average. Two rules say where, along one axis (y or x) of extent E:

Rule R (`roi_align`, `deform_roi_pool`, `modulated_deform_roi_pool`)::

    start  = low * spatial_scale - 0.5                 size = (high * spatial_scale - 0.5) - start
    number = sampling_ratio, or ceil(size / P) if that is 0; none if it is not positive
    q_i    = start + p * size/P + shift + (i + 0.5) * size/P/number
    shift  = gamma * size * offset
    a sample with q < -1 or q > E on either axis is 0, and counts

Rule P (`deform_psroi_pool`), round() being half away from zero::

    start  = round(low) * spatial_scale - 0.5
    size   = max((round(high) + 1) * spatial_scale - 0.5 - start, 0.1)
    q_i    = p * size/P + start + shift + i * size/P/sample_per_part
    shift  = trans_std * size * offset
    a sample with q < -0.5 or q > E - 0.5 on either axis does not count

Other samples interpolate linearly between the pixels around q clamped to [0, E - 1]. Coordinates are float64,
whatever the arrays are. An infinite offset is outside, whatever the size.

**The average** of a bin. Its samples form a grid, so it is separable: with the line weights

    rows[h] = sum over the samples i along y of max(0, 1 - |clamped q_i - h|), and columns[w] alike,

it is y = sum over h, w of rows[h] * columns[w] * x[h, w] / count, times the bin's mask. Rule R counts all
samples; rule P those inside on both axes. A pixel with a line weight of 0 is not read. Without a pixel the
bin is exactly 0, whatever the mask. A NaN offset makes its bin NaN, unless the region has no samples.

**Gradients.** A sample with 0 <= q < E - 1 moves with its offset: with low = floor(q), the *line slopes* sum
-1 at low and +1 at low + 1 (at whole q the derivative from the right), and 0 where q is clamped. Then::

    grad_x[h, w]  += g * mask * rows[h] * columns[w] / count
    grad_mask      = sum over channels, h, w of g * rows[h] * columns[w] * x[h, w] / count
    grad_offset_y  = mask * scale * size_y / count * sum of g * row_slopes[h] * columns[w] * x[h, w]

and grad_offset_x with slopes for columns; scale is gamma or trans_std. Lines whose factor is 0 are left out.
Bins that are NaN have grad_mask and grad_offset NaN and add nothing to grad_x. rois have no gradient.

**Position-sensitive**: bin (i, j) of output channel o reads channel (o * group + i*group//P_h) * group +
j*group//P_w; output channel o is of class o // (output_dim / classes), and the offset of its class at part
(i*part//P_h, j*part//P_w) moves it.

References
----------
.. [1] Dai et al.: Deformable Convolutional Networks, arXiv:1703.06211, section 2.2.
.. [2] Zhu, Hu, Lin, Dai: Deformable ConvNets v2, arXiv:1811.11168, eq. (2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .deform_conv import Array, _at_least_float32, _sizes

Size = int | Sequence[int]


class RoIGradients(NamedTuple):
    """One gradient per input, in the shape of that input; None where it was not asked for."""

    x: Array = None
    offset: Array = None
    mask: Array = None


def roi_align(
    x: Array,
    rois: Array,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    *,
    dtype: Any = None,
) -> Array:
    """Regular pooling: `modulated_deform_roi_pool` without offsets and masks."""
    return _forward(_align(x, rois, None, None, output_size, spatial_scale, sampling_ratio, dtype=dtype))


def roi_align_backward(
    grad_output: Array,
    x: Array,
    rois: Array,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    *,
    needs: Sequence[str] = ("x",),
    dtype: Any = None,
) -> RoIGradients:
    """Gradients of `roi_align`."""
    pool = _align(x, rois, None, None, output_size, spatial_scale, sampling_ratio, dtype=dtype)
    return _backward(pool, grad_output, needs)


def deform_roi_pool(
    x: Array,
    rois: Array,
    offset: Array,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    *,
    dtype: Any = None,
) -> Array:
    """Deformable pooling: `modulated_deform_roi_pool` without masks."""
    return _forward(
        _align(x, rois, offset, None, output_size, spatial_scale, sampling_ratio, gamma, dtype=dtype)
    )


def deform_roi_pool_backward(
    grad_output: Array,
    x: Array,
    rois: Array,
    offset: Array,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    *,
    needs: Sequence[str] = ("x", "offset"),
    dtype: Any = None,
) -> RoIGradients:
    """Gradients of `deform_roi_pool`."""
    pool = _align(x, rois, offset, None, output_size, spatial_scale, sampling_ratio, gamma, dtype=dtype)
    return _backward(pool, grad_output, needs)


def modulated_deform_roi_pool(
    x: Array,
    rois: Array,
    offset: Array,
    mask: Array,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    *,
    dtype: Any = None,
) -> Array:
    """Deformable pooling with a mask per bin, as the module's equations say.

    Parameters
    ----------
    x : array, shape (batch, channels, height, width)
    rois : array, shape (R, 5)
        Index of the image, x1, y1, x2, y2.
    offset : array, shape (R, 2, P_h, P_w), or None for none
        Channel 0 is x, channel 1 is y.
    mask : array, shape (R, 1, P_h, P_w), or None for ones
    dtype : dtype, optional
        What to compute in and to return; by default that of x, or float32 for a half. Coordinates are
        float64.

    Returns
    -------
    array, shape (R, channels, P_h, P_w)
    """
    return _forward(
        _align(x, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, dtype=dtype)
    )


def modulated_deform_roi_pool_backward(
    grad_output: Array,
    x: Array,
    rois: Array,
    offset: Array,
    mask: Array,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    *,
    needs: Sequence[str] = ("x", "offset", "mask"),
    dtype: Any = None,
) -> RoIGradients:
    """Gradients of `modulated_deform_roi_pool`."""
    pool = _align(x, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, dtype=dtype)
    return _backward(pool, grad_output, needs)


def deform_psroi_pool(
    x: Array,
    rois: Array,
    offset: Array,
    output_dim: int,
    group_size: int,
    output_size: Size,
    spatial_scale: float = 1.0,
    part_size: Size | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    *,
    dtype: Any = None,
) -> Array:
    """Position-sensitive pooling by rule P.

    Parameters
    ----------
    x : array, shape (batch, output_dim * group_size**2, height, width)
    rois : array, shape (R, 5)
    offset : array, shape (R, 2 * classes, *part_size), or None for none
        Channel 2k is x, channel 2k + 1 is y of class k. part_size None is output_size.

    Returns
    -------
    array, shape (R, output_dim, P_h, P_w)
    """
    sizes = (output_dim, group_size, output_size, spatial_scale, part_size, sample_per_part, trans_std)
    return _forward(_position_sensitive(x, rois, offset, *sizes, dtype=dtype))


def deform_psroi_pool_backward(
    grad_output: Array,
    x: Array,
    rois: Array,
    offset: Array,
    output_dim: int,
    group_size: int,
    output_size: Size,
    spatial_scale: float = 1.0,
    part_size: Size | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    *,
    needs: Sequence[str] = ("x", "offset"),
    dtype: Any = None,
) -> RoIGradients:
    """Gradients of `deform_psroi_pool`."""
    sizes = (output_dim, group_size, output_size, spatial_scale, part_size, sample_per_part, trans_std)
    return _backward(_position_sensitive(x, rois, offset, *sizes, dtype=dtype), grad_output, needs)


@np.errstate(all="ignore")
def roi_error_scales(
    operator: str, grad_output: Array, x: Array, rois: Array, *arguments: Any, **keywords: Any
) -> dict[str, Array]:
    """The size that rounding errors are measured in: the sum of the sizes of the terms of each result.

    Parameters
    ----------
    operator : str
        The name of a forward function here; the other arguments are those of its backward.

    Returns
    -------
    dict of float64 arrays
        Keys y, x, offset, mask, as for `error_scales`.
    """
    if operator == "deform_psroi_pool":
        pool = _position_sensitive(_sizes(x), rois, *arguments, **keywords, dtype=np.float64)
    else:
        given = {"roi_align": 0, "deform_roi_pool": 1, "modulated_deform_roi_pool": 2}[operator]
        moved = (*arguments[:given], None, None)[:2]
        pool = _align(_sizes(x), rois, *moved, *arguments[given:], **keywords, dtype=np.float64)
    pool.make_sizes()
    gradients = _backward(pool, _sizes(grad_output), RoIGradients._fields)
    return {"y": _forward(pool), **gradients._asdict()}


# ---- lines


def _lines(coordinates: Array, extent: int, margin: float) -> tuple[Array, Array, int]:
    """Line weights and line slopes of the samples along one axis, and how many of them are inside."""
    weights, slopes, inside = np.zeros(extent), np.zeros(extent), 0
    for q in coordinates:
        if extent == 0 or not -margin <= q <= extent - 1 + margin:
            continue
        inside += 1
        clamped = min(max(q, 0.0), extent - 1.0)
        low = math.floor(clamped)
        weights[low] += 1 - (clamped - low)
        if low + 1 < extent:
            weights[low + 1] += clamped - low
        if 0 <= q < extent - 1:
            slopes[low] -= 1
            slopes[low + 1] += 1
    return weights, slopes, inside


def _round_half_away(value: Array) -> Array:
    whole = np.trunc(value)
    return np.where(np.abs(value - whole) >= 0.5, whole + np.copysign(1, value), whole)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if np.ndim(size) == 0 else tuple(size)


# ---- bins


class _AxisOfBin(NamedTuple):
    """Along one axis: the lines, the numbers of samples and of those inside, d coordinate / d offset."""

    weights: Array
    slopes: Array
    samples: int
    inside: int
    scale: float
    is_nan: bool


class _Bin(NamedTuple):
    """One bin of one region, for the output channels of one class."""

    roi: int
    image: int
    at: tuple[int, int]
    outputs: slice  # channels of the output
    inputs: Array  # the channels of x that they read
    class_id: int
    part: tuple[int, int]
    mask: Any
    rows: Array
    columns: Array
    row_slopes: Array
    column_slopes: Array
    divisor: float
    scale: tuple[float, float]  # d coordinate / d offset, of y and x
    is_nan: bool

    @property
    def touches(self) -> bool:
        return bool(np.any(self.rows) and np.any(self.columns))


class _Pool:
    """The arrays and sizes of one call; `bins` cuts it into bins."""

    margin = 0.0
    classes = 1

    def __init__(
        self, x: Array, rois: Array, offset: Array, output_size: Size, spatial_scale: float, dtype: Any
    ):
        x = np.asarray(x)
        self.dtype = np.dtype(_at_least_float32(x[:0]).dtype if dtype is None else dtype)
        self.x = x.astype(self.dtype)
        self.rois = np.asarray(rois).astype(np.float64)
        self.offset = None if offset is None else np.asarray(offset).astype(np.float64)
        self.mask: Array = None
        self.output = _pair(output_size)
        self.part = self.output
        self.spatial_scale = float(spatial_scale)
        self.outputs = x.shape[1]
        self.group = 1
        self.scale = 1.0
        self.sizes_only = False

    def make_sizes(self) -> None:
        """From now on slopes and masks are their absolute values."""
        self.sizes_only = True
        self.mask = None if self.mask is None else _sizes(self.mask)

    def axis(self, roi: Array, axis: int) -> tuple[float, float, int]:
        """Start, size and number of samples per bin along y (axis 0) or x (axis 1)."""
        raise NotImplementedError

    def coordinate(
        self, start: float, step_of_bin: float, bin_index: int, shift: float, step: float, i: Array
    ) -> Array:
        """Of the samples i."""
        raise NotImplementedError

    def divisor(self, numbers: Sequence[int], inside: Sequence[int]) -> float:
        """How many samples a bin's sum is divided by."""
        raise NotImplementedError

    def bins(self) -> Iterator[_Bin]:
        """Every bin of every region and class."""
        per_class = self.outputs // self.classes
        for roi, class_id, i, j in np.ndindex(len(self.rois), self.classes, *self.output):
            part = i * self.part[0] // self.output[0], j * self.part[1] // self.output[1]
            group = i * self.group // self.output[0] * self.group + j * self.group // self.output[1]
            outputs = slice(class_id * per_class, (class_id + 1) * per_class)
            y, x = (self._axis_of_bin(roi, class_id, axis, (i, j)[axis], part) for axis in (0, 1))
            yield _Bin(
                roi=roi,
                image=int(self.rois[roi, 0]),
                at=(i, j),
                outputs=outputs,
                inputs=np.arange(outputs.start, outputs.stop) * self.group**2 + group,
                class_id=class_id,
                part=part,
                mask=self.dtype.type(1) if self.mask is None else self.mask[roi, 0, i, j],
                rows=y.weights,
                columns=x.weights,
                row_slopes=y.slopes,
                column_slopes=x.slopes,
                divisor=self.divisor((y.samples, x.samples), (y.inside, x.inside)),
                scale=(y.scale, x.scale),
                is_nan=(y.is_nan or x.is_nan) and y.samples > 0 and x.samples > 0,
            )

    def _axis_of_bin(
        self, roi: int, class_id: int, axis: int, bin_index: int, part: tuple[int, int]
    ) -> _AxisOfBin:
        start, size, number = self.axis(self.rois[roi], axis)
        offset = 0.0 if self.offset is None else float(self.offset[(roi, 2 * class_id + 1 - axis, *part)])
        scale = self.scale * size
        shift = offset if np.isinf(offset) else scale * offset
        step_of_bin = size / self.output[axis]
        step = step_of_bin / number if number else 0.0
        samples = np.arange(number, dtype=np.float64)
        coordinates = self.coordinate(start, step_of_bin, bin_index, shift, step, samples)
        weights, slopes, inside = _lines(coordinates, self.x.shape[2 + axis], self.margin)
        if self.sizes_only:
            slopes, scale = np.abs(slopes), abs(scale)
        return _AxisOfBin(weights, slopes, number, inside, scale, bool(np.isnan(offset)))


class _AlignPool(_Pool):
    margin = 1.0
    sampling_ratio = 0

    def axis(self, region: Array, axis: int) -> tuple[float, float, int]:
        low, high = region[2 - axis] * self.spatial_scale - 0.5, region[4 - axis] * self.spatial_scale - 0.5
        size = high - low
        number = self.sampling_ratio or max(0, math.ceil(size / self.output[axis]))
        return low, size, number

    def coordinate(
        self, start: float, step_of_bin: float, bin_index: int, shift: float, step: float, i: Array
    ) -> Array:
        return (start + bin_index * step_of_bin) + shift + (i + 0.5) * step

    def divisor(self, numbers: Sequence[int], inside: Sequence[int]) -> float:
        return numbers[0] * numbers[1]


class _PositionSensitivePool(_Pool):
    margin = 0.5
    sample_per_part = 1

    def axis(self, region: Array, axis: int) -> tuple[float, float, int]:
        low = _round_half_away(region[2 - axis]) * self.spatial_scale - 0.5
        high = (_round_half_away(region[4 - axis]) + 1) * self.spatial_scale - 0.5
        return float(low), max(float(high - low), 0.1), self.sample_per_part

    def coordinate(
        self, start: float, step_of_bin: float, bin_index: int, shift: float, step: float, i: Array
    ) -> Array:
        return (bin_index * step_of_bin + start) + shift + i * step

    def divisor(self, numbers: Sequence[int], inside: Sequence[int]) -> float:
        return inside[0] * inside[1]


def _align(
    x: Array,
    rois: Array,
    offset: Array,
    mask: Array,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    *,
    dtype: Any = None,
) -> _Pool:
    pool = _AlignPool(x, rois, offset, output_size, spatial_scale, dtype)
    pool.sampling_ratio = sampling_ratio
    pool.scale = float(gamma)
    pool.mask = None if mask is None else np.asarray(mask).astype(pool.dtype)
    return pool


def _position_sensitive(
    x: Array,
    rois: Array,
    offset: Array,
    output_dim: int,
    group_size: int,
    output_size: Size,
    spatial_scale: float = 1.0,
    part_size: Size | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    *,
    dtype: Any = None,
) -> _Pool:
    pool = _PositionSensitivePool(x, rois, offset, output_size, spatial_scale, dtype)
    pool.outputs, pool.group = output_dim, group_size
    pool.part = pool.output if part_size is None else _pair(part_size)
    pool.classes = 1 if offset is None else np.shape(offset)[1] // 2
    pool.sample_per_part, pool.scale = sample_per_part, float(trans_std)
    return pool


# ---- sums


def _weighed(pool: _Pool, bin_: _Bin, rows: Array, columns: Array) -> Array:
    """Sum over the pixels of rows * columns * x, per channel; lines of weight 0 are not read."""
    h, w = np.flatnonzero(rows), np.flatnonzero(columns)
    pixels = pool.x[bin_.image][np.ix_(bin_.inputs, h, w)]
    return rows[h].astype(pool.dtype) @ (pixels @ columns[w].astype(pool.dtype)[:, None])[..., 0].T


@np.errstate(all="ignore")
def _forward(pool: _Pool) -> Array:
    y = np.zeros((len(pool.rois), pool.outputs, *pool.output), pool.dtype)
    for bin_ in pool.bins():
        at = (bin_.roi, bin_.outputs, *bin_.at)
        if bin_.is_nan:
            y[at] = np.nan
        elif bin_.touches:
            y[at] = _weighed(pool, bin_, bin_.rows, bin_.columns) / bin_.divisor * bin_.mask
    return y


@np.errstate(all="ignore")
def _backward(pool: _Pool, grad_output: Array, needs: Sequence[str]) -> RoIGradients:
    grad_output = np.asarray(grad_output).astype(pool.dtype)
    grad_x = np.zeros_like(pool.x)
    grad_offset = None if pool.offset is None else np.zeros(pool.offset.shape, pool.dtype)
    grad_mask = None if pool.mask is None else np.zeros(pool.mask.shape, pool.dtype)
    for bin_ in pool.bins():
        g = grad_output[(bin_.roi, bin_.outputs, *bin_.at)]
        by_mask, by_y, by_x = _position_gradients(pool, bin_, g)
        if grad_mask is not None:
            grad_mask[(bin_.roi, 0, *bin_.at)] = by_mask
        if grad_offset is not None:
            grad_offset[(bin_.roi, 2 * bin_.class_id, *bin_.part)] += by_x
            grad_offset[(bin_.roi, 2 * bin_.class_id + 1, *bin_.part)] += by_y
        if bin_.touches and not bin_.is_nan:
            h, w = np.flatnonzero(bin_.rows), np.flatnonzero(bin_.columns)
            weights = (np.outer(bin_.rows[h], bin_.columns[w]) / bin_.divisor).astype(pool.dtype)
            grad_x[bin_.image][np.ix_(bin_.inputs, h, w)] += g[:, None, None] * (weights * bin_.mask)
    computed = {"x": grad_x, "offset": grad_offset, "mask": grad_mask}
    return RoIGradients(**{name: grad for name, grad in computed.items() if name in needs})


def _position_gradients(pool: _Pool, bin_: _Bin, g: Array) -> tuple[Any, Any, Any]:
    """By the mask, and by the offset along y and x."""
    if bin_.is_nan:
        return np.nan, np.nan, np.nan
    if not bin_.touches:
        return 0, 0, 0
    by_mask = np.sum(g * _weighed(pool, bin_, bin_.rows, bin_.columns)) / bin_.divisor
    by_y = np.sum(g * _weighed(pool, bin_, bin_.row_slopes, bin_.columns))
    by_x = np.sum(g * _weighed(pool, bin_, bin_.rows, bin_.column_slopes))
    scale_y, scale_x = (scale / bin_.divisor for scale in bin_.scale)
    return by_mask, bin_.mask * (scale_y * by_y), bin_.mask * (scale_x * by_x)
