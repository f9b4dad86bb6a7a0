"""The only argument checking: shapes, dtypes and numbers in, one `Geometry` out.

Everything is computed in Python's unbounded integers and narrowed to 64 bits only once it is known to fit.
TypeError is for kinds of argument and dtypes, ValueError for shapes and numbers; every message names the
argument, what came, what was wanted, and the arithmetic between them (messages.py has the words).
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy

from . import messages
from .messages import count, listed, number, shown

RANKS = (1, 2, 3)
# Offsets and masks of an array of these may be float32: in half precision a coordinate loses what is computed
# carefully.
HALVES = ("float16", "bfloat16")


def half_dtypes() -> tuple[numpy.dtype[Any], ...]:
    """Return the dtypes of HALVES; bfloat16 once ml_dtypes, whose dtype it is, has been imported."""
    ml_dtypes = sys.modules.get("ml_dtypes")
    return _FLOAT16 if ml_dtypes is None else (*_FLOAT16, numpy.dtype(ml_dtypes.bfloat16))


_FLOAT16 = (numpy.dtype(numpy.float16),)

FLOAT32_MATMULS = ("strict", "tf32")

# A coordinate is an integer of at most this size plus floor(offset), |floor(offset)| < 2^31: no sum the
# kernels form of such numbers leaves 64 bits.
LARGEST = 2**62
LARGEST_BYTES = 2**63 - 1
# Every number divides zero channels; unbounded, a loop over groups that hold nothing could run for years.
LARGEST_EMPTY_GROUPS = 2**16

_ARRAYS = ("x", "offset", "mask", "weight", "bias")

_WHOLE = ("ndim", "batch", "in_channels", "out_channels", "groups", "offset_groups")
_PER_AXIS = ("input", "kernel", "stride", "padding", "dilation", "output")
GEOMETRY_DTYPE = numpy.dtype(
    [(name, numpy.int64) for name in _WHOLE] + [(name, numpy.int64, (max(RANKS),)) for name in _PER_AXIS]
)

Shape = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Geometry:
    """The sizes of one deformable convolution, all checked: what every layer below trusts.

    Attributes
    ----------
    ndim : int
        Number of spatial axes, 1 to 3.
    batch, in_channels, out_channels, groups, offset_groups : int
        Counts; `groups` and `offset_groups` divide `in_channels`, `groups` divides `out_channels`.
    input, kernel, stride, dilation, output : tuple of int
        One number per spatial axis, in pixels or taps.
    padding : tuple of (int, int)
        Zeros before and after, per spatial axis.
    dtype : numpy.dtype
        The dtype of all arrays but `offset` and `mask`.
    position_dtype : numpy.dtype
        The dtype of `offset` and `mask`: the same, or float32 with a half.
    """

    ndim: int
    batch: int
    in_channels: int
    out_channels: int
    groups: int
    offset_groups: int
    input: Shape
    kernel: Shape
    stride: Shape
    padding: Pads
    dilation: Shape
    output: Shape
    dtype: numpy.dtype[Any]
    position_dtype: numpy.dtype[Any]

    @staticmethod
    def of(
        dtypes: tuple[numpy.dtype[Any], ...],
        x: Any,
        offset: Any,
        mask: Any,
        weight: Any,
        bias: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: Any,
        offset_groups: Any,
    ) -> Geometry:
        """Check the arguments of a public function; of the arrays, read `.shape` and `.dtype` only.

        `dtypes` are those that the backend computes in.
        """
        # One key per distinct call: to a dictionary 1, True and 1.0 are equal, hence exact ints only.
        return _checked_geometry(
            dtypes,
            (
                x.shape,
                None if offset is None else offset.shape,
                None if mask is None else mask.shape,
                weight.shape,
                None if bias is None else bias.shape,
            ),
            (
                x.dtype,
                None if offset is None else offset.dtype,
                None if mask is None else mask.dtype,
                weight.dtype,
                None if bias is None else bias.dtype,
            ),
            stride if type(stride) is int else checked_integers("stride", stride, 1),
            padding if type(padding) is int else checked_integers("padding", padding, 2),
            dilation if type(dilation) is int else checked_integers("dilation", dilation, 1),
            groups if type(groups) is int else checked_integers("groups", groups, 0),
            offset_groups
            if type(offset_groups) is int
            else checked_integers("offset_groups", offset_groups, 0),
        )

    @cached_property
    def taps(self) -> int:
        """Number of taps of the kernel."""
        return math.prod(self.kernel)

    @cached_property
    def output_shape(self) -> Shape:
        """Shape of the result: (batch, out_channels, *output)."""
        return (self.batch, self.out_channels, *self.output)

    @cached_property
    def struct(self) -> numpy.ndarray[Any, Any]:
        """The same numbers as one read-only record of GEOMETRY_DTYPE, for the compiled code.

        Unused trailing axes are 1, their padding 0; of the padding only the beginning is kept, since the end
        acts through `output` alone.
        """
        begins = [begin for begin, _ in self.padding]
        record = numpy.ones((), GEOMETRY_DTYPE)
        for name in _WHOLE:
            record[name] = getattr(self, name)
        for name in _PER_AXIS:
            record[name][: self.ndim] = getattr(self, name) if name != "padding" else begins
        record["padding"][self.ndim :] = 0
        record.setflags(write=False)
        return record


def check_grad_output(geometry: Geometry, grad_output: Any) -> None:
    """Check that `grad_output` has the shape and dtype of the forward's result."""
    _check_like_output(geometry, "grad_output", grad_output)


def check_out(
    geometry: Geometry, may_share_memory: Callable[[Any, Any], bool], out: Any, *inputs: Any
) -> None:
    """Check that the result can be written to `out`: shape, dtype, writeable, memory of its own.

    Overlap is judged by the first and last byte of each array, since exact answers can take exponential time:
    two interleaved views of one buffer are refused although they share no element.
    """
    _check_like_output(geometry, "out", out)
    if not getattr(out.flags, "writeable", True):
        raise ValueError("out is read-only; wanted an array that can be written to")
    if not out.flags.c_contiguous and _may_overlap_itself(out):
        raise ValueError(
            f"out has strides of {out.strides} bytes for shape {out.shape}, so that elements share memory; "
            "wanted one place per element"
        )
    for name, array in zip(_ARRAYS, inputs, strict=True):
        if array is not None and may_share_memory(out, array):
            raise ValueError(f"out and {name} lie in overlapping memory; wanted out apart from every input")


def checked_needs(needs: Any, names: Sequence[str]) -> frozenset[str]:
    """Return the set of gradients asked for; `names` are those that the function called can compute."""
    if isinstance(needs, str | bytes):
        raise TypeError(f"needs is the string {needs!r}; wanted several names, such as needs=({needs!r},)")
    try:
        asked = frozenset(needs)
    except TypeError:
        raise TypeError(f"needs is {shown(needs)}; wanted a tuple of names out of {listed(names)}") from None
    for name in asked.difference(names):
        kind = ValueError if isinstance(name, str) else TypeError
        raise kind(f"needs holds {shown(name)}; wanted names out of {listed(names)}")
    return asked


def checked_choice(name: str, value: Any, names: Iterable[str]) -> str:
    """Return `value` if it is one of some names."""
    wanted = list(names)
    if not isinstance(value, str) or value not in wanted:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} is {shown(value)}; wanted one of {listed(wanted)}")
    return value


def checked_float32_matmul(value: Any) -> str:
    """Return the name of a way to multiply float32 matrices."""
    return checked_choice("float32_matmul", value, FLOAT32_MATMULS)


def checked_flag(name: str, value: Any) -> bool:
    """Return what is True or False, such as `deterministic`, as a bool."""
    if not isinstance(value, bool | numpy.bool_):
        raise TypeError(f"{name} is {shown(value)}; wanted True or False")
    return bool(value)


# 1024 distinct calls: more layers than a network has, and about a megabyte. Errors are not cached.
@lru_cache(maxsize=1024)
def _checked_geometry(
    computed: tuple[numpy.dtype[Any], ...],
    shapes: tuple[Any, ...],
    dtypes: tuple[Any, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    offset_groups: int,
) -> Geometry:
    dtype, position_dtype = _common_dtypes(computed, dtypes)
    _check_axes(*shapes)
    x, offset, mask, weight, bias = shapes
    ndim = len(x) - 2
    window = Geometry(
        ndim=ndim,
        batch=x[0],
        in_channels=x[1],
        out_channels=weight[0],
        groups=checked_number("groups", groups, 1),
        offset_groups=checked_number("offset_groups", offset_groups, 1),
        input=x[2:],
        kernel=weight[2:],
        stride=numbers_per_axis("stride", stride, ndim),
        padding=pads_per_axis("padding", padding, ndim),
        dilation=numbers_per_axis("dilation", dilation, ndim),
        output=(),
        dtype=dtype,
        position_dtype=position_dtype,
    )
    _check_weight(window, weight)
    geometry = replace(window, output=_checked_output(window))
    _check_bias(geometry, bias)
    _check_per_tap(geometry, "offset", offset, ndim, f". {messages.layout(ndim)}")
    _check_per_tap(geometry, "mask", mask, 1, ". A mask has one channel per offset group and tap")
    _check_bytes(geometry, shapes)
    return geometry


# ---- numbers


def checked_integers(name: str, value: Any, depth: int) -> Any:
    """Return an int, or tuples of ints at most `depth` deep, all of exact type int."""
    if depth and isinstance(value, (tuple, list)):
        return tuple(
            entry if type(entry) is int else checked_integers(f"{name}[{i}]", entry, depth - 1)
            for i, entry in enumerate(value)
        )
    if isinstance(value, numpy.ndarray) and 0 < value.ndim <= depth and value.dtype.kind in "iu":
        return checked_integers(name, value.tolist(), depth)
    return _integer(name, value)


_WANTED = {
    "stride": "an integer, or one per axis",
    "dilation": "an integer, or one per axis",
    "padding": "an integer, one per axis, or one (begin, end) pair per axis",
}


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool | numpy.bool_):
        raise TypeError(f"{name} is {value}, a bool; wanted an integer")
    try:
        return int(operator.index(value))
    except TypeError:
        wanted = _WANTED.get(name, "an integer") + messages.array_hint(value)
    raise TypeError(f"{name} is {shown(value)}; wanted {wanted}")


def checked_whole(name: str, value: Any) -> int:
    """Return `value` if it is an integer of at least 1."""
    return checked_number(name, _integer(name, value), 1)


def checked_number(name: str, value: int, least: int) -> int:
    if value < least:
        raise ValueError(f"{name} is {number(value)}; wanted at least {least}")
    if value > LARGEST:
        raise ValueError(f"{name} is {number(value)}; wanted at most 2^62, to keep coordinates in 64 bits")
    return value


def numbers_per_axis(name: str, value: Any, ndim: int) -> Shape:
    if isinstance(value, int):
        return (checked_number(name, value, 1),) * ndim
    _check_entries(name, value, ndim)
    return tuple(checked_number(f"{name}[{axis}]", entry, 1) for axis, entry in enumerate(value))


def pads_per_axis(name: str, value: Any, ndim: int) -> Pads:
    if isinstance(value, int):
        return ((checked_number(name, value, 0),) * 2,) * ndim
    _check_entries(name, value, ndim)
    return tuple(_pad_of_axis(f"{name}[{axis}]", entry) for axis, entry in enumerate(value))


def _pad_of_axis(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return (checked_number(name, value, 0),) * 2
    if len(value) != 2:
        raise ValueError(f"{name} has {count(len(value), 'entry')}; wanted an integer or a (begin, end) pair")
    return checked_number(f"{name}[0]", value[0], 0), checked_number(f"{name}[1]", value[1], 0)


def _check_entries(name: str, value: Sequence[Any], ndim: int) -> None:
    if len(value) != ndim:
        pairs = str((("begin", "end"),) * ndim).replace("'", "")
        raise ValueError(
            f"{name} has {count(len(value), 'entry')}; x has {count(ndim, 'spatial axis')}: wanted an "
            f"integer or {count(ndim, 'entry')}" + (f", such as {pairs}" if name == "padding" else "")
        )


# ---- kinds and axes


def _common_dtypes(
    computed: Sequence[numpy.dtype[Any]], dtypes: Sequence[Any]
) -> tuple[numpy.dtype[Any], numpy.dtype[Any]]:
    """Return the dtype of x, weight and bias, and that of offset and mask."""
    given = {name: dtype for name, dtype in zip(_ARRAYS, dtypes, strict=True) if dtype is not None}
    for name, dtype in given.items():
        if dtype not in computed:
            raise TypeError(f"{name} has dtype {dtype}; wanted {messages.dtype_wanted(dtype, computed)}")
    common = computed[computed.index(dtypes[0])]
    positions = {name: dtype for name, dtype in given.items() if name in ("offset", "mask")}
    for name, dtype in given.items():
        if name not in positions:
            check_dtype(name, dtype, common)
    for name, dtype in positions.items():
        if not (common.name in HALVES and dtype == numpy.float32):
            check_dtype(name, dtype, common)
    if len(set(positions.values())) > 1:
        raise TypeError(
            f"mask has dtype {positions['mask']} but offset has {positions['offset']}; wanted one dtype for "
            "both"
        )
    return common, next((computed[computed.index(dtype)] for dtype in positions.values()), common)


def check_dtype(name: str, dtype: Any, common: Any, positions: str = "offset and mask") -> None:
    """Check that an array has the dtype of x; that `positions` may be float32 the caller has seen to."""
    if dtype != common:
        or_float32 = f" ({positions} may be float32)" if common.name in HALVES else ""
        raise TypeError(
            f"{name} has dtype {dtype} but x has {common}; wanted one dtype for all arrays{or_float32}"
        )


def _check_axes(
    x: Shape, offset: Shape | None, mask: Shape | None, weight: Shape, bias: Shape | None
) -> None:
    axes = len(x)
    if axes - 2 not in RANKS:
        raise ValueError(
            f"x has {count(axes, 'axis')}, shape {x}; wanted 3, 4 or 5: batch, channels, 1 to 3 spatial axes"
        )
    if bias is not None and len(bias) != 1:
        hint = messages.bias_hint(bias, axes)
        raise ValueError(
            f"bias has {count(len(bias), 'axis')}, shape {bias}; wanted 1: (out_channels,){hint}"
        )
    wanted = "(out_channels, in_channels / groups, *kernel)"
    _check_as_many(x, "weight", weight, wanted + messages.weight_hint(weight, axes))
    wanted = f"(batch, offset_groups * taps * {axes - 2}, *output). {messages.layout(axes - 2)}"
    _check_as_many(x, "offset", offset, wanted)
    _check_as_many(x, "mask", mask, "(batch, offset_groups * taps, *output)")


def _check_as_many(x: Shape, name: str, shape: Shape | None, wanted: str) -> None:
    if shape is not None and len(shape) != len(x):
        raise ValueError(
            f"{name} has {count(len(shape), 'axis')}, shape {shape}, but x has {len(x)}, shape {x}; wanted "
            f"as many: {wanted}"
        )


# ---- shapes


def _check_weight(geometry: Geometry, weight: Shape) -> None:
    for axis, taps in enumerate(geometry.kernel):
        if taps < 1:
            raise ValueError(
                f"weight has shape {weight}: {taps} taps on spatial axis {axis}; wanted at least 1"
            )
    channels, groups = geometry.in_channels, geometry.groups
    _check_divides("groups", groups, "x", "channel", channels)
    _check_divides("groups", groups, "weight", "output channel", geometry.out_channels)
    _check_divides("offset_groups", geometry.offset_groups, "x", "channel", channels)
    if weight[1] != channels // groups:
        raise ValueError(
            f"weight has {count(weight[1], 'channel')} on axis 1; x has {channels} and groups is {groups}: "
            f"wanted {channels}/{groups} = {channels // groups}{messages.groups_hint(geometry, weight[1])}"
        )


def _check_divides(name: str, groups: int, array: str, thing: str, things: int) -> None:
    if things % groups:
        raise ValueError(
            f"{name} is {groups}; {array} has {count(things, thing)}, and {things}/{groups} leaves a rest of "
            f"{things % groups}: wanted a divisor of {things}"
        )
    if groups > max(things, LARGEST_EMPTY_GROUPS):
        raise ValueError(f"{name} is {groups}; {array} has {count(things, thing)}: wanted at most 2^16")


def _checked_output(geometry: Geometry) -> Shape:
    for axis, (extent, (begin, end)) in enumerate(zip(geometry.input, geometry.padding, strict=True)):
        if extent + begin + end > LARGEST:
            raise ValueError(
                f"padding is ({begin}, {end}) on spatial axis {axis}: x with its padding is "
                f"{extent}+{begin}+{end} = {extent + begin + end}; wanted at most 2^62, to keep coordinates "
                "in 64 bits"
            )
    output = messages.output_extents(geometry)
    for axis, extent in enumerate(output):
        if extent < 1:
            raise ValueError(messages.no_output(geometry, axis))
    return output


def _check_bias(geometry: Geometry, bias: Shape | None) -> None:
    outputs = geometry.out_channels
    if bias is not None and bias != (outputs,):
        raise ValueError(
            f"bias has {count(bias[0], 'entry')}; weight has {count(outputs, 'output channel')}: wanted "
            f"shape ({outputs},)"
        )


def _check_per_tap(geometry: Geometry, name: str, shape: Shape | None, per_tap: int, layout: str) -> None:
    """Check `offset`, ndim numbers per tap, or `mask`, one."""
    if shape is None:
        return
    if shape[0] != geometry.batch:
        raise ValueError(f"{name} has a batch of {shape[0]}; x has {geometry.batch}: wanted the same{layout}")
    if shape[1] != per_tap * geometry.taps * geometry.offset_groups:
        raise ValueError(messages.wrong_channels(geometry, name, shape, per_tap) + layout)
    if shape[2:] != geometry.output:
        raise ValueError(messages.wrong_extents(geometry, name, shape[2:]) + layout)


def _check_bytes(geometry: Geometry, shapes: Sequence[Shape | None]) -> None:
    """Refuse what no 64-bit address reaches; like NumPy, count an extent of 0 as 1."""
    for name, shape in zip(("the output", *_ARRAYS), (geometry.output_shape, *shapes), strict=True):
        elements = math.prod(max(extent, 1) for extent in shape or ())
        if elements * geometry.dtype.itemsize > LARGEST_BYTES:
            raise ValueError(
                f"{name} has shape {shape}: {elements}*{geometry.dtype.itemsize} = "
                f"{elements * geometry.dtype.itemsize} bytes; wanted at most 2^63-1"
            )


def _check_like_output(geometry: Geometry, name: str, array: Any) -> None:
    check_dtype(name, array.dtype, geometry.dtype)
    if array.shape != geometry.output_shape:
        raise ValueError(
            f"{name} has shape {array.shape}; wanted (batch, out_channels, *output) = "
            f"{geometry.output_shape}: {messages.output_arithmetic(geometry)}"
        )


def _may_overlap_itself(array: numpy.ndarray[Any, Any]) -> bool:
    """Tell whether, strides in ascending order, one leaves less room than what it steps over takes."""
    span = array.itemsize
    for stride, extent in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if extent > 1:
            if stride < span:
                return array.size > 0
            span += stride * (extent - 1)
    return False
