"""The specification: deformable convolution in plain NumPy, of any rank, forward and backward.

Slow and obvious, and written from the definitions, not from a kernel: a kernel is checked against this.
It imports numpy only and computes its own sizes; it checks no arguments.

**Definition** ([1]_, eq. 1, with padding, groups and offset groups written out)::

    y[n, o, p] = bias[o] + sum over c, k of weight[o, c, k] * mask[n, g(c), k, p] * S(x[n, c], q)
    q          = p * stride - padding_begin + k * dilation + offset[n, g(c), k, :, p]

with position p and tap k as vectors of one integer per spatial axis, c over the channels of o's weight group,
and g(c) = c // (channels / offset_groups) the channel's offset group. S interpolates N-linearly::

    S(image, q) = sum over corners j in {0, 1}^ndim of (product over axes of weight_j[axis]) * image[cell + j]

**Coordinates** are split. floor and fraction are those of the offset alone, in the offset's own dtype or, for
a half, in float32 (a fraction that rounds to 1 becomes 0 of the next cell); the cell is the integer
p * stride - padding_begin + k * dilation + floor. Along an axis the low corner has weight 1 - fraction, the
high corner has weight fraction, and a corner outside the image has weight 0. A sample is *inside* if
-1 <= cell < extent on every axis and |floor| < 2^31.

**Columns** are the samples before the contraction: columns[n, c, k, p] = mask * S, and y = weight x columns
+ bias. A corner with weight exactly 0 is not read, and keeps weight 0 whatever the mask is; otherwise the
mask is multiplied into each corner's weight. So a sample outside is exactly 0, and a pixel reaches only the
outputs that weigh it. A coordinate that is NaN on any axis makes its sample NaN.

**Gradients**, with grad_columns = weight' x grad_output and the dots s_j = sum over the channels c of an
offset group of grad_columns[n, c, k, p] * x[n, c, cell + j]::

    grad_bias[o]         = sum over n, p of grad_output[n, o, p]
    grad_weight[o, c, k] = sum over n, p of grad_output[n, o, p] * columns[n, c, k, p]
    grad_mask            = sum over corners of non-zero weight of weight_j * s_j
    grad_offset[axis]    = mask * sum over corners inside the image, of non-zero weight on the other axes, of
                           (+1 if j is high on this axis, else -1) * (product of those weights) * s_j
    grad_x[cell + j]    += weight_j * mask * grad_columns[n, c, k, p], for corners of non-zero weight

At a kink of S this is the derivative from the right: the cell is [floor, floor + 1), also the cell that
starts at -1. A sample outside has gradients of exactly 0. A sample with a NaN coordinate has grad_mask and
grad_offset NaN on all its axes (also if there are no channels to sample), and adds nothing to grad_x.

References
----------
.. [1] Zhu, Hu, Lin, Dai: Deformable ConvNets v2, arXiv:1811.11168.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any
PerAxis = int | Sequence[int]
Padding = int | Sequence[int] | Sequence[tuple[int, int]]

ALL = ("x", "offset", "mask", "weight", "bias")


class Gradients(NamedTuple):
    """One gradient per input, in the shape of that input; None where it was not asked for."""

    x: Array = None
    offset: Array = None
    mask: Array = None
    weight: Array = None
    bias: Array = None


def deform_conv(
    x: Array,
    offset: Array,
    weight: Array,
    bias: Array = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    out: Array = None,
    float32_matmul: str | None = None,
    dtype: Any = None,
) -> Array:
    """Deformable convolution v1: `modulated_deform_conv` with every mask equal to one."""
    return modulated_deform_conv(
        x,
        offset,
        None,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        offset_groups,
        out=out,
        float32_matmul=float32_matmul,
        dtype=dtype,
    )


def deform_conv_backward(
    grad_output: Array,
    x: Array,
    offset: Array,
    weight: Array,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    needs: Sequence[str] = ("x", "offset", "weight", "bias"),
    deterministic: bool = False,
    float32_matmul: str | None = None,
    dtype: Any = None,
) -> Gradients:
    """Gradients of `deform_conv`."""
    return modulated_deform_conv_backward(
        grad_output,
        x,
        offset,
        None,
        weight,
        stride,
        padding,
        dilation,
        groups,
        offset_groups,
        needs=needs,
        deterministic=deterministic,
        float32_matmul=float32_matmul,
        dtype=dtype,
    )


@np.errstate(all="ignore")
def modulated_deform_conv(
    x: Array,
    offset: Array,
    mask: Array,
    weight: Array,
    bias: Array = None,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    out: Array = None,
    float32_matmul: str | None = None,
    dtype: Any = None,
) -> Array:
    """Deformable convolution v2, as the module's equations say.

    Parameters
    ----------
    x : array, shape (batch, in_channels, *spatial)
    offset : array, shape (batch, offset_groups * taps * ndim, *output_spatial), or None for the rigid grid
        In pixels of x, axis fastest.
    mask : array, shape (batch, offset_groups * taps, *output_spatial), or None for ones
    weight : array, shape (out_channels, in_channels // groups, *kernel)
    bias : array, shape (out_channels,), or None
    stride, padding, dilation : int or one per axis; padding also one (begin, end) pair per axis
    groups, offset_groups : int
    out : array, optional
        Takes the result.
    float32_matmul : ignored
        Here for the sake of the public signature; so is `deterministic` in the backward.
    dtype : dtype, optional
        What to compute in and to return; by default that of x, or float32 for a half. The sampling points do
        not depend on it.

    Returns
    -------
    array, shape (batch, out_channels, *output_spatial)
    """
    problem = _Problem(x, offset, mask, weight, stride, padding, dilation, groups, offset_groups, dtype)
    y = problem.contract(problem.columns())
    if bias is not None:
        y = y + np.asarray(bias, problem.dtype).reshape(-1, *[1] * problem.ndim)
    if out is None:
        return y
    out[...] = y
    return out


@np.errstate(all="ignore")
def modulated_deform_conv_backward(
    grad_output: Array,
    x: Array,
    offset: Array,
    mask: Array,
    weight: Array,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    needs: Sequence[str] = ALL,
    deterministic: bool = False,
    float32_matmul: str | None = None,
    dtype: Any = None,
) -> Gradients:
    """Gradients of `modulated_deform_conv`, as the module's equations say.

    Parameters
    ----------
    grad_output : array, shape (batch, out_channels, *output_spatial)
    needs : names of the wanted gradients
        An offset or a mask that is None has no gradient.

    Returns
    -------
    Gradients
    """
    problem = _Problem(x, offset, mask, weight, stride, padding, dilation, groups, offset_groups, dtype)
    wanted = set(needs) - ({"offset"} if offset is None else set()) - ({"mask"} if mask is None else set())
    rule = {
        "x": _grad_x,
        "offset": _grad_offset,
        "mask": _grad_mask,
        "weight": _grad_weight,
        "bias": _grad_bias,
    }
    grad_output = problem.grouped_output(grad_output)
    grad_columns = problem.grad_columns(grad_output)
    return Gradients(
        **{name: rule[name](problem, grad_output, grad_columns) for name in ALL if name in wanted}
    )


@np.errstate(all="ignore")
def error_scales(
    grad_output: Array,
    x: Array,
    offset: Array,
    mask: Array,
    weight: Array,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    bias: Array = None,
) -> dict[str, Array]:
    """The size that rounding errors of each result are measured in: the sum of the sizes of its terms.

    A result r is accurate to n units if ``|r - exact| <= n * u * scale``, u the unit roundoff of the dtype.
    For y the scale is the sum over channels and taps of ``|weight * mask|`` times the largest corner of the
    sample, plus ``|bias|``; the gradients' scales follow the same rule. Values that are not finite count as
    0.

    Returns
    -------
    dict of float64 arrays
        Keys y, x, offset, mask, weight, bias; each in the shape of what it measures. Without an offset or a
        mask those keys are None; grad_output=None leaves y only.
    """
    x, weight = _sizes(x), _sizes(weight)
    problem = _Problem(
        x,
        offset,
        None if mask is None else _sizes(mask),
        weight,
        stride,
        padding,
        dilation,
        groups,
        offset_groups,
        np.float64,
    )
    largest = problem.largest_corner()
    columns = np.abs(problem.mask)[:, :, None] * largest
    y = problem.contract(columns)
    scales = {"y": y if bias is None else y + _sizes(bias).reshape(-1, *[1] * problem.ndim)}
    if grad_output is None:
        return scales
    grad_output = problem.grouped_output(_sizes(grad_output))
    grad_columns = problem.grad_columns(grad_output)
    dots = np.sum(grad_columns * largest, axis=2)
    scales["x"] = _grad_x(problem, grad_output, grad_columns)
    scales["weight"] = _contract_weight(problem, grad_output, columns)
    scales["bias"] = _grad_bias(problem, grad_output, grad_columns)
    scales["mask"] = None if mask is None else dots.reshape(np.shape(mask))
    scales["offset"] = (
        None if offset is None else problem.spread(problem.mask * dots).reshape(np.shape(offset))
    )
    return scales


class _Corner(NamedTuple):
    """One corner of every sample; arrays (batch, offset_groups, taps, positions)."""

    pixel: Array  # flat index into a plane; problem.nowhere if the corner is outside the image
    weight: Array  # product over the axes, 0 outside, NaN where a coordinate is NaN
    slope: list[Array]  # per axis: d weight / d coordinate; 0 where nothing may be read


class _Problem:
    """Arrays and sizes in the shapes of the equations: grouped, with taps and positions flat."""

    def __init__(
        self,
        x: Array,
        offset: Array,
        mask: Array,
        weight: Array,
        stride: PerAxis,
        padding: Padding,
        dilation: PerAxis,
        groups: int,
        offset_groups: int,
        dtype: Any,
    ) -> None:
        x, weight = np.asarray(x), np.asarray(weight)
        self.dtype = np.dtype(_at_least_float32(x[:0]).dtype if dtype is None else dtype)
        self.ndim = x.ndim - 2
        self.batch, self.channels, *self.extent = x.shape
        self.out_channels, _, *self.kernel = weight.shape
        self.stride, self.dilation = self._per_axis(stride), self._per_axis(dilation)
        self.padding = [self._pair(p) for p in self._per_axis(padding)]
        self.output = [
            (extent + sum(padding) - (dilation * (kernel - 1) + 1)) // stride + 1
            for extent, padding, dilation, kernel, stride in zip(
                self.extent, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        ]
        self.taps, self.positions = math.prod(self.kernel), math.prod(self.output)
        self.nowhere = math.prod(self.extent)
        self.groups = groups
        self.offset_groups = 1 if offset is None and mask is None else offset_groups
        self.plane_channels = self.channels // self.offset_groups
        self._take(x, offset, mask, weight)

    def _take(self, x: Array, offset: Array, mask: Array, weight: Array) -> None:
        samples = (self.batch, self.offset_groups, self.taps)
        self.x_shape, self.weight_shape = x.shape, weight.shape
        self.pixels = self._with_zero_pixel(x)
        self.offset_shape = None if offset is None else np.shape(offset)
        self.offset = (
            np.zeros((*samples, self.ndim, self.positions), self.dtype)
            if offset is None
            else _at_least_float32(np.asarray(offset)).reshape(*samples, self.ndim, self.positions)
        )
        self.mask_shape = None if mask is None else np.shape(mask)
        self.mask = (
            np.ones((*samples, self.positions), self.dtype)
            if mask is None
            else np.asarray(mask, self.dtype).reshape(*samples, self.positions)
        )
        self.weight = weight.astype(self.dtype).reshape(
            self.groups, self.out_channels // self.groups, self.channels // self.groups * self.taps
        )

    def _per_axis(self, value: Any) -> list[Any]:
        return [value] * self.ndim if np.ndim(value) == 0 else list(value)

    @staticmethod
    def _pair(padding: Any) -> tuple[int, int]:
        return (padding, padding) if np.ndim(padding) == 0 else tuple(padding)

    def _with_zero_pixel(self, x: Array) -> Array:
        """(batch, offset_groups, channels of a group, pixels + 1): what may not be read reads a last 0."""
        planes = (self.batch, self.offset_groups, self.plane_channels)
        pixels = np.zeros((*planes, self.nowhere + 1), self.dtype)
        pixels[..., :-1] = x.reshape(*planes, self.nowhere)
        return pixels

    @functools.cached_property
    def located(self) -> tuple[Array, Array, Array, Array]:
        """Cell, fraction (both with an axis of ndim before positions), inside and NaN of every sample."""
        floor = np.floor(self.offset)
        fraction = self.offset - floor
        carry = fraction >= 1
        floor, fraction = np.where(carry, floor + 1, floor), np.where(carry, 0, fraction)
        near = np.abs(floor) < 2.0**31
        cell = self.base() + np.where(near, floor, 0).astype(np.int64)
        inside = np.all(near & (cell >= -1) & (cell < np.array(self.extent)[:, None]), axis=3)
        return cell, fraction.astype(self.dtype), inside, np.any(np.isnan(self.offset), axis=3)

    def base(self) -> Array:
        """The rigid grid, (taps, ndim, positions): position * stride - padding + tap * dilation."""
        position = np.indices(self.output).reshape(self.ndim, 1, self.positions)
        tap = np.indices(self.kernel).reshape(self.ndim, self.taps, 1)
        axes = [
            p * s - begin + t * d
            for p, t, s, (begin, _), d in zip(
                position, tap, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        return np.stack(axes, axis=1).astype(np.int64)

    @functools.cached_property
    def corners(self) -> list[_Corner]:
        """The 2^ndim corners of all samples."""
        return list(self._each_corner())

    def _each_corner(self) -> Iterator[_Corner]:
        cell, fraction, inside, nan = self.located
        cells, fractions = np.moveaxis(cell, 3, 0), np.moveaxis(fraction, 3, 0)
        for high in itertools.product((0, 1), repeat=self.ndim):
            place = [cell + step for cell, step in zip(cells, high, strict=True)]
            exists = [(p >= 0) & (p < extent) & inside for p, extent in zip(place, self.extent, strict=True)]
            reach = [f if step else 1 - f for f, step in zip(fractions, high, strict=True)]
            weights = [np.where(e, r, 0) for e, r in zip(exists, reach, strict=True)]
            readable = np.logical_and.reduce(exists)
            slope = []
            for axis in range(self.ndim):
                others = _product(weights[:axis] + weights[axis + 1 :], inside, self.dtype)
                slope.append(np.where(readable, others if high[axis] else -others, 0))
            weight = np.where(nan, np.nan, _product(weights, inside, self.dtype))
            yield _Corner(np.where(readable, self._flat(place), self.nowhere), weight, slope)

    def _flat(self, place: Sequence[Array]) -> Array:
        """The index into a plane's pixels of one index per axis."""
        flat = np.zeros_like(place[0])
        for index, extent in zip(place, self.extent, strict=True):
            flat = flat * extent + index
        return flat

    def read(self, pixel: Array) -> Array:
        """x at one pixel per sample: (batch, offset_groups, channels, taps, positions)."""
        flat = pixel.reshape(self.batch, self.offset_groups, 1, self.taps * self.positions)
        values = np.take_along_axis(self.pixels, flat, axis=3)
        return values.reshape(self.batch, self.offset_groups, self.plane_channels, self.taps, self.positions)

    def columns(self) -> Array:
        """mask * S: (batch, offset_groups, channels, taps, positions)."""
        shape = (self.batch, self.offset_groups, self.plane_channels, self.taps, self.positions)
        columns = np.zeros(shape, self.dtype)
        for corner in self.corners:
            weighed = np.where(corner.weight == 0, 0, corner.weight * self.mask)
            columns += weighed[:, :, None] * self.read(self.only_weighed(corner))
        return columns

    def only_weighed(self, corner: _Corner) -> Array:
        """The corner's pixel, or the zero pixel where its weight is 0 or NaN."""
        return np.where((corner.weight == 0) | np.isnan(corner.weight), self.nowhere, corner.pixel)

    def largest_corner(self) -> Array:
        """The largest |x| of each sample's corners, in the shape of columns."""
        return functools.reduce(np.maximum, (self.read(corner.pixel) for corner in self.corners))

    def by_weight_group(self, columns: Array) -> Array:
        """Columns as matrices: (batch, groups, channels of a weight group * taps, positions)."""
        return columns.reshape(self.batch, self.groups, self.weight.shape[2], self.positions)

    def contract(self, columns: Array) -> Array:
        """weight x columns: (batch, out_channels, *output)."""
        y = self.weight @ self.by_weight_group(columns)
        return y.reshape(self.batch, self.out_channels, *self.output)

    def grouped_output(self, grad_output: Array) -> Array:
        """grad_output as matrices: (batch, groups, out_channels of a group, positions)."""
        shape = (self.batch, self.groups, self.weight.shape[1], self.positions)
        return np.asarray(grad_output, self.dtype).reshape(shape)

    def grad_columns(self, grad_output: Array) -> Array:
        """weight' x grad_output, in the shape of columns."""
        columns = self.weight.swapaxes(1, 2) @ grad_output
        return columns.reshape(self.batch, self.offset_groups, self.plane_channels, self.taps, self.positions)

    def poison(self, samples: Array) -> Array:
        """NaN for the samples with a NaN coordinate."""
        return np.where(self.located[3], np.nan, samples)

    def spread(self, samples: Array) -> Array:
        """The same value for each axis of a sample: (batch, offset_groups, taps, ndim, positions)."""
        return np.repeat(samples[:, :, :, None], self.ndim, axis=3)


def _sizes(array: Array) -> Array:
    """Absolute values in float64, 0 for what is not finite."""
    return np.abs(np.nan_to_num(np.asarray(array, np.float64), nan=0.0, posinf=0.0, neginf=0.0))


def _at_least_float32(array: Array) -> Array:
    """Return an array of a half as float32, others as they are."""
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def _product(weights: Sequence[Array], like: Array, dtype: Any) -> Array:
    """The product over axes; ones in the shape of `like` for no axes."""
    return functools.reduce(np.multiply, weights, np.ones(like.shape, dtype))


def _grad_bias(problem: _Problem, grad_output: Array, grad_columns: Array) -> Array:
    return grad_output.sum(axis=(0, 3)).reshape(problem.out_channels)


def _grad_weight(problem: _Problem, grad_output: Array, grad_columns: Array) -> Array:
    return _contract_weight(problem, grad_output, problem.columns())


def _contract_weight(problem: _Problem, grad_output: Array, columns: Array) -> Array:
    """grad_output x columns', added over the batch."""
    grad = grad_output @ problem.by_weight_group(columns).swapaxes(2, 3)
    return grad.sum(axis=0).reshape(problem.weight_shape)


def _grad_mask(problem: _Problem, grad_output: Array, grad_columns: Array) -> Array:
    grad = np.zeros(problem.mask.shape, problem.dtype)
    for corner in problem.corners:
        dots = np.sum(grad_columns * problem.read(corner.pixel), axis=2)
        grad += np.where(corner.weight == 0, 0, corner.weight * dots)
    return problem.poison(grad).reshape(problem.mask_shape)


def _grad_offset(problem: _Problem, grad_output: Array, grad_columns: Array) -> Array:
    slopes = [np.zeros(problem.mask.shape, problem.dtype) for _ in range(problem.ndim)]
    for corner in problem.corners:
        dots = np.sum(grad_columns * problem.read(corner.pixel), axis=2)
        for axis, slope in enumerate(corner.slope):
            slopes[axis] += np.where(slope == 0, 0, slope * dots)
    inside = problem.located[2]
    grads = [problem.poison(np.where(inside, problem.mask * slope, 0)) for slope in slopes]
    return np.stack(grads, axis=3).reshape(problem.offset_shape)


def _grad_x(problem: _Problem, grad_output: Array, grad_columns: Array) -> Array:
    grad = np.zeros_like(problem.pixels.swapaxes(2, 3))
    planes = (problem.batch, problem.offset_groups, problem.plane_channels)
    image, group = np.ogrid[: problem.batch, : problem.offset_groups]
    for corner in problem.corners:
        parts = (corner.weight * problem.mask)[:, :, None] * grad_columns
        rows = parts.reshape(*planes, problem.taps * problem.positions).swapaxes(2, 3)
        pixel = problem.only_weighed(corner).reshape(*planes[:2], problem.taps * problem.positions)
        np.add.at(grad, (image[:, :, None], group[:, :, None], pixel), rows)
    return grad.swapaxes(2, 3)[..., :-1].reshape(problem.x_shape)
