"""The argument checking of pooling over regions: shapes, dtypes and numbers in, one `RoIGeometry` out.

geometry.py does the same for convolutions; what holds for both is taken from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy

from . import messages
from .geometry import (
    HALVES,
    LARGEST_BYTES,
    Shape,
    check_dtype,
    checked_integers,
    checked_number,
    checked_whole,
)
from .messages import count, shown

# Each sample of a bin along an axis is looked at.
LARGEST_SAMPLES = 2**16

_WHOLE = ("batch", "channels", "rois", "outputs", "position_sensitive", "group", "classes", "samples")
_PAIRS = ("input", "output", "part")
_REAL = ("spatial_scale", "offset_scale")
ROI_GEOMETRY_DTYPE = numpy.dtype(
    [(name, numpy.int64) for name in _WHOLE]
    + [(name, numpy.int64, (2,)) for name in _PAIRS]
    + [(name, numpy.float64) for name in _REAL]
)


@dataclass(frozen=True)
class RoIGeometry:
    """The sizes of one pooling over regions, all checked: what every layer below trusts.

    Attributes
    ----------
    batch, channels : int
        Of `x`; channels = outputs * group**2.
    rois : int
        Number of regions.
    outputs : int
        Channels of the result, a multiple of `classes`.
    position_sensitive : bool
        Rule P of docs/semantics.md rather than rule R.
    group, classes : int
        Side of the grid of channels that each output reads; classes with offsets of their own.
    samples : int
        Of each bin along an axis; 0 for as many as the bin is long.
    input, output, part : tuple of int
        (height, width) of `x`, of the bins and of the offsets of a region.
    spatial_scale, offset_scale : float
        From the coordinates of regions to pixels; gamma or trans_std.
    dtype : numpy.dtype
        Of `x` and the result.
    position_dtype : numpy.dtype
        Of `offset` and `mask`: the same, or float32 with a half.
    """

    batch: int
    channels: int
    rois: int
    outputs: int
    position_sensitive: bool
    group: int
    classes: int
    samples: int
    input: Shape
    output: Shape
    part: Shape
    spatial_scale: float
    offset_scale: float
    dtype: numpy.dtype[Any]
    position_dtype: numpy.dtype[Any]

    @staticmethod
    def of(
        dtypes: Sequence[numpy.dtype[Any]],
        x: Any,
        rois: Any,
        offset: Any,
        mask: Any,
        output_size: Any,
        spatial_scale: Any,
        sampling_ratio: Any,
        gamma: Any,
    ) -> RoIGeometry:
        """Check the arguments of `modulated_deform_roi_pool`; of the arrays, read `.shape` and `.dtype`
        only."""
        dtype, position_dtype = _common_dtypes(dtypes, x, rois, offset, mask)
        _check_axes(x, rois)
        output = _pair("output_size", output_size)
        geometry = RoIGeometry(
            batch=x.shape[0],
            channels=x.shape[1],
            rois=rois.shape[0],
            outputs=x.shape[1],
            position_sensitive=False,
            group=1,
            classes=1,
            samples=_checked_samples("sampling_ratio", sampling_ratio, 0),
            input=x.shape[2:],
            output=output,
            part=output,
            spatial_scale=_checked_scale(spatial_scale),
            offset_scale=checked_real("gamma", gamma),
            dtype=dtype,
            position_dtype=position_dtype,
        )
        _check_shape("offset", offset, (rois.shape[0], 2, *output), "(R, 2, *output_size)")
        _check_shape("mask", mask, (rois.shape[0], 1, *output), "(R, 1, *output_size)")
        _check_bytes(geometry)
        return geometry

    @staticmethod
    def of_position_sensitive(
        dtypes: Sequence[numpy.dtype[Any]],
        x: Any,
        rois: Any,
        offset: Any,
        output_dim: Any,
        group_size: Any,
        output_size: Any,
        spatial_scale: Any,
        part_size: Any,
        sample_per_part: Any,
        trans_std: Any,
    ) -> RoIGeometry:
        """Check the arguments of `deform_psroi_pool`; of the arrays, read `.shape` and `.dtype` only."""
        dtype, position_dtype = _common_dtypes(dtypes, x, rois, offset, None)
        _check_axes(x, rois)
        output = _pair("output_size", output_size)
        outputs, group = checked_whole("output_dim", output_dim), checked_whole("group_size", group_size)
        _check_channels(x.shape[1], outputs, group)
        part = output if part_size is None else _pair("part_size", part_size)
        geometry = RoIGeometry(
            batch=x.shape[0],
            channels=x.shape[1],
            rois=rois.shape[0],
            outputs=outputs,
            position_sensitive=True,
            group=group,
            classes=_checked_classes(offset, rois.shape[0], outputs, part),
            samples=_checked_samples("sample_per_part", sample_per_part, 1),
            input=x.shape[2:],
            output=output,
            part=part,
            spatial_scale=_checked_scale(spatial_scale),
            offset_scale=checked_real("trans_std", trans_std),
            dtype=dtype,
            position_dtype=position_dtype,
        )
        _check_bytes(geometry)
        return geometry

    @cached_property
    def output_shape(self) -> Shape:
        """Shape of the result: (rois, outputs, *output)."""
        return (self.rois, self.outputs, *self.output)

    @cached_property
    def struct(self) -> numpy.ndarray[Any, Any]:
        """The same numbers as one read-only record of ROI_GEOMETRY_DTYPE, for the compiled code."""
        record = numpy.zeros((), ROI_GEOMETRY_DTYPE)
        for name in (*_WHOLE, *_PAIRS, *_REAL):
            record[name] = getattr(self, name)
        record.setflags(write=False)
        return record


def check_roi_grad_output(geometry: RoIGeometry, grad_output: Any) -> None:
    """Check that `grad_output` has the shape and dtype of the forward's result."""
    check_dtype("grad_output", grad_output.dtype, geometry.dtype)
    if grad_output.shape != geometry.output_shape:
        raise ValueError(
            f"grad_output has shape {grad_output.shape}; wanted (R, channels, *output_size) = "
            f"{geometry.output_shape}"
        )


def check_roi_values(geometry: RoIGeometry, rois: Any) -> None:
    """Check the numbers in `rois`, on a CPU; a GPU would have to be waited for.

    Every region must be finite, in pixels too, and name an image that exists.
    """
    if not isinstance(rois, numpy.ndarray):
        return
    regions = numpy.asarray(rois, numpy.float64)
    _check_regions(~numpy.isfinite(regions).all(axis=1), rois, "wanted finite numbers")
    image = regions[:, 0]
    batch = geometry.batch
    wrong = (image < 0) | (image >= batch) | (image != numpy.floor(image))
    wanted = f"0 to {batch - 1}" if batch else "none, since the batch is empty"
    _check_regions(
        wrong, rois, f"x has a batch of {batch}: wanted a whole index of an image in front, {wanted}"
    )
    scale = geometry.spatial_scale
    with numpy.errstate(over="ignore", invalid="ignore"):
        pixels = regions[:, 1:] * scale
        moves = (pixels[:, 2:] - pixels[:, :2]) * geometry.offset_scale
    finite = numpy.isfinite(pixels).all(axis=1) & numpy.isfinite(moves).all(axis=1)
    _check_regions(
        ~finite, rois, f"with spatial_scale={scale:g} its place or size is no finite number of pixels"
    )


def _check_regions(wrong: Any, rois: Any, wanted: str) -> None:
    if wrong.any():
        first = int(numpy.argmax(wrong))
        others = f" (and {wrong.sum() - 1} more)" if wrong.sum() > 1 else ""
        numbers = ", ".join(f"{float(value):g}" for value in rois[first])
        raise ValueError(f"rois[{first}] is ({numbers}){others}; {wanted}")


# ---- numbers


def _pair(name: str, value: Any) -> Shape:
    """Return (height, width) of an integer or a pair."""
    whole = checked_integers(name, value, 1)
    if isinstance(whole, int):
        return (checked_number(name, whole, 1),) * 2
    if len(whole) != 2:
        raise ValueError(f"{name} has {count(len(whole), 'entry')}; wanted an integer or (height, width)")
    return checked_number(f"{name}[0]", whole[0], 1), checked_number(f"{name}[1]", whole[1], 1)


def _checked_samples(name: str, value: Any, least: int) -> int:
    samples: int = checked_integers(name, value, 0)
    if samples < least:
        adaptive = ", which takes as many samples as the bin is long" if least == 0 else ""
        raise ValueError(f"{name} is {messages.number(samples)}; wanted at least {least}{adaptive}")
    if samples > LARGEST_SAMPLES:
        raise ValueError(f"{name} is {messages.number(samples)}; wanted at most {LARGEST_SAMPLES}")
    return samples


def checked_real(name: str, value: Any) -> float:
    """Return `value` if it is a finite number."""
    if isinstance(value, bool | numpy.bool_) or not isinstance(
        value, int | float | numpy.floating | numpy.integer
    ):
        raise TypeError(f"{name} is {shown(value)}; wanted a number{messages.array_hint(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {shown(value)}; wanted a finite number")
    return number


def _checked_scale(value: Any) -> float:
    scale = checked_real("spatial_scale", value)
    if scale <= 0:
        raise ValueError(f"spatial_scale is {scale:g}; wanted more than 0: a stride of 16 pixels is 1/16")
    return scale


# ---- dtypes and shapes


def _common_dtypes(
    computed: Sequence[numpy.dtype[Any]], x: Any, rois: Any, offset: Any, mask: Any
) -> tuple[numpy.dtype[Any], numpy.dtype[Any]]:
    """Return the dtype of x and that of offset and mask; with a half x, others may be float32."""
    arrays = {"x": x, "rois": rois, "offset": offset, "mask": mask}
    given = {name: array.dtype for name, array in arrays.items() if array is not None}
    for name, dtype in given.items():
        if dtype not in computed:
            raise TypeError(f"{name} has dtype {dtype}; wanted {messages.dtype_wanted(dtype, computed)}")
    common = computed[computed.index(x.dtype)]
    for name, dtype in given.items():
        if not (common.name in HALVES and dtype == numpy.float32 and name != "x"):
            check_dtype(name, dtype, common, "rois, offset and mask")
    if offset is not None and mask is not None and offset.dtype != mask.dtype:
        raise TypeError(
            f"mask has dtype {mask.dtype} but offset has {offset.dtype}; wanted one dtype for both"
        )
    positions = offset if offset is not None else mask
    return common, common if positions is None else computed[computed.index(positions.dtype)]


def _check_axes(x: Any, rois: Any) -> None:
    if len(x.shape) != 4:
        hint = ". A map without a batch axis is given as x[None]" if len(x.shape) == 3 else ""
        raise ValueError(
            f"x has {count(len(x.shape), 'axis')}, shape {x.shape}; wanted 4: (batch, channels, height, "
            f"width){hint}"
        )
    check_rois_shape(rois.shape)


def check_rois_shape(shape: Shape) -> None:
    """Check that each region is five numbers."""
    if len(shape) != 2 or shape[1] != 5:
        raise ValueError(
            f"rois has shape {shape}; wanted (R, 5): index of the image, x1, y1, x2, y2 of each region"
            f"{messages.rois_hint(shape)}"
        )


def _check_channels(channels: int, outputs: int, group: int) -> None:
    if channels != outputs * group**2:
        raise ValueError(
            f"x has {count(channels, 'channel')}; output_dim={outputs} and group_size={group} need "
            f"{outputs}*{group}*{group} = {outputs * group**2}"
        )


def _check_shape(name: str, array: Any, wanted: Shape, words: str) -> None:
    if array is not None and array.shape != wanted:
        raise ValueError(
            f"{name} has shape {array.shape}; wanted {words} = {wanted}"
            f"{messages.transposed_hint(array.shape, wanted)}"
        )


def _checked_classes(offset: Any, rois: int, outputs: int, part: Shape) -> int:
    """Return the number of classes that `offset` has displacements for: 1 without offsets."""
    if offset is None:
        return 1
    channels = offset.shape[1] if len(offset.shape) == 4 else 0
    classes = channels // 2
    words = f"(R, 2 * classes, *part_size) = ({rois}, 2 * classes, {part[0]}, {part[1]})"
    if len(offset.shape) != 4 or offset.shape != (rois, channels, *part):
        raise ValueError(f"offset has shape {offset.shape}; wanted {words}")
    if channels % 2 or classes == 0 or outputs % classes:
        raise ValueError(
            f"offset has {count(channels, 'channel')}; wanted {words}: two for each class, of a number of "
            f"classes that divides output_dim={outputs}"
        )
    return classes


def _check_bytes(geometry: RoIGeometry) -> None:
    elements = math.prod(max(extent, 1) for extent in geometry.output_shape)
    size = elements * max(geometry.dtype.itemsize, 8)
    if size > LARGEST_BYTES:
        raise ValueError(
            f"the output has shape {geometry.output_shape}: up to {size} bytes; wanted at most 2^63-1"
        )
