"""What the errors about arguments say: the arithmetic, and the mistake that the numbers betray.

Nothing here decides whether an argument is right; geometry.py does, and asks for words when it is not.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .geometry import Geometry

Shape = tuple[int, ...]

_AXES = {1: "x", 2: "yx", 3: "zyx"}
_PLURALS = {"entry": "entries", "axis": "axes", "spatial axis": "spatial axes"}

# ---- words


def count(number_of: int, thing: str) -> str:
    """Write "1 axis" or "3 axes"."""
    return f"{number(number_of)} {thing if number_of == 1 else _PLURALS.get(thing, thing + 's')}"


def number(value: int) -> str:
    """Write an int; str() refuses those of more than 4300 digits."""
    return str(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"


def listed(names: Sequence[str]) -> str:
    """Write the names that are allowed."""
    return ", ".join(map(repr, names))


class _Repr(reprlib.Repr):
    """Shortens a value at any depth; Python refuses to write an int of more than 4300 digits."""

    def repr_int(self, x: int, level: int) -> str:
        return number(x)


_repr = _Repr().repr
# Lists in lists are written at every depth: an image would fill a page.
_LONGEST = 80


def shown(value: Any) -> str:
    """Write a value in a few words, with its type."""
    if value is None or isinstance(value, str):
        return _repr(value)
    kind = type(value).__name__
    if isinstance(getattr(value, "shape", None), tuple | list):
        return f"an array ({kind}) of shape {tuple(value.shape)}"
    text = _repr(value)
    return f"{text if len(text) <= _LONGEST else text[: _LONGEST - 3] + '...'} ({kind})"


def extents(values: Shape) -> str:
    """Write "80x80", or "80 long" where there is one axis."""
    return "x".join(map(str, values)) if len(values) > 1 else f"{values[0]} long"


def per_axis(values: Sequence[Any]) -> str:
    """Write one value per axis as the caller would: once if they are equal."""
    once = [value[0] if isinstance(value, tuple) and value[0] == value[1] else value for value in values]
    return str(once[0]) if len(set(once)) == 1 else str(tuple(once))


def no_second_derivative(module: str) -> str:
    """Say that the gradients of a module's functions have none."""
    return (
        f"the gradients of {module}'s functions cannot be differentiated: second derivatives are not computed"
    )


# ---- dtypes and axes


def dtype_wanted(dtype: Any, supported: Sequence[Any]) -> str:
    """Say which dtypes are computed, and how to get there from this one."""
    *others, last = map(str, supported)
    names = f"{', '.join(others)} or {last}"
    if dtype.kind == "f" and not dtype.isnative:
        return f"{names} in the byte order of this machine: astype(dtype.newbyteorder('=')) converts"
    if dtype.kind in "iub":
        return f"{names}: astype(numpy.float32) converts"
    return names


def bias_hint(bias: Shape, axes: int) -> str:
    """Recognise a weight where bias belongs: a mask was given to the form that takes none."""
    if len(bias) != axes:
        return ""
    return (
        ". That could be a weight: deform_conv takes no mask, "
        "modulated_deform_conv(x, offset, mask, weight, bias) does"
    )


def weight_hint(weight: Shape, axes: int) -> str:
    """Recognise a bias where weight belongs, or an image without a batch."""
    if len(weight) == 1:
        return ". That could be a bias: without a mask, call deform_conv(x, offset, weight, bias)"
    return ". An image without a batch axis is given as x[None]" if len(weight) == axes + 1 else ""


def layout(ndim: int) -> str:
    """Say how the channels of `offset` are laid out: no shape can show that they were laid out otherwise."""
    if ndim == 1:
        return "Channels of offset: one displacement per tap, taps in order, offset groups outermost"
    axes = _AXES[ndim]
    interleaved = ", ".join(f"{axis}{tap}" for tap in (0, 1) for axis in axes)
    split = ", then ".join(f"all {axis}" for axis in axes)
    return (
        f"Channels of offset are interleaved, ({', '.join(axes)}) of tap 0, then of tap 1 and so on: "
        f"{interleaved}, ..., offset groups outermost; not {split}"
    )


def array_hint(value: Any) -> str:
    """Say where an array belongs that came in place of a number."""
    if not hasattr(value, "shape"):
        return ""
    return ". Arrays come first: a mask only in modulated_deform_conv, a bias in no backward function"


# ---- channels


def groups_hint(geometry: Geometry, channels: int) -> str:
    """Say what would fit a weight of so many channels: channels in another place, or so many groups."""
    # An image as wide as it has channels times groups is common, and so is a weight made without groups.
    if channels != geometry.in_channels and geometry.input[-1] == channels * geometry.groups:
        return (
            f". The last axis of x has {geometry.input[-1]}: channels come before the spatial axes, where "
            "numpy.moveaxis(x, -1, 1) puts them without a copy"
        )
    groups, rest = divmod(geometry.in_channels, channels) if channels else (0, 0)
    if groups and not rest and geometry.out_channels % groups == 0:
        return f". This weight fits groups={groups}"
    return ""


def wrong_channels(geometry: Geometry, name: str, shape: Shape, per_tap: int) -> str:
    """Say how many channels `offset` or `mask` needs, and what those that came may be."""
    channels, taps, groups = shape[1], geometry.taps, geometry.offset_groups
    wanted = (geometry.batch, per_tap * taps * groups, *geometry.output)
    product = f"{per_tap}*{taps}*{groups}" if name == "offset" else f"{taps}*{groups}"
    return (
        f"{name} has {count(channels, 'channel')}; a {extents(geometry.kernel)} kernel with "
        f"{count(groups, 'offset group')} needs {product} = {per_tap * taps * groups}"
        f"{transposed_hint(shape, wanted) or _channels_hint(geometry, name, channels, per_tap)}"
    )


def _channels_hint(geometry: Geometry, name: str, channels: int, per_tap: int) -> str:
    ndim, each = geometry.ndim, geometry.taps * geometry.offset_groups
    hint = ""
    if channels == each * (ndim + 1):
        hint += (
            f". {channels} = {ndim + 1}*{each} could be offsets and masks in one tensor: split it into "
            f"offset = t[:, :{ndim * each}] and mask = t[:, {ndim * each}:], the mask through a sigmoid"
        )
    if channels == each * (1 if name == "offset" else ndim):
        hint += f". {channels} is what {'mask' if name == 'offset' else 'offset'} needs; they may be swapped"
    groups, rest = divmod(channels, per_tap * geometry.taps)
    if groups and not rest and geometry.in_channels % groups == 0:
        hint += f". {channels} channels fit offset_groups={groups}"
    return hint


# ---- extents


def span(kernel: int, dilation: int) -> int:
    """Return how many pixels a dilated kernel reaches over."""
    return dilation * (kernel - 1) + 1


def output_extents(geometry: Geometry) -> Shape:
    """Return the output extents by the rule of an ordinary convolution; less than 1 where nothing fits."""
    return tuple(
        (extent + begin + end - span(kernel, dilation)) // stride + 1
        for extent, (begin, end), kernel, dilation, stride in _axes(geometry)
    )


def output_arithmetic(geometry: Geometry) -> str:
    """Spell `output_extents` out, axis by axis."""
    return ", ".join(
        f"floor(({extent}+{begin}+{end}-{span(kernel, dilation)})/{stride})+1 = {output}"
        for (extent, (begin, end), kernel, dilation, stride), output in zip(
            _axes(geometry), geometry.output, strict=True
        )
    )


def _axes(geometry: Geometry) -> Any:
    window = geometry.input, geometry.padding, geometry.kernel, geometry.dilation, geometry.stride
    return zip(*window, strict=True)


def no_output(geometry: Geometry, axis: int) -> str:
    """Say why no position of the kernel fits."""
    begin, end = geometry.padding[axis]
    extent, kernel, dilation = geometry.input[axis], geometry.kernel[axis], geometry.dilation[axis]
    return (
        f"the output would be empty on axis {axis}: with dilation {dilation} a kernel of "
        f"{count(kernel, 'tap')} spans {dilation}*({kernel}-1)+1 = {span(kernel, dilation)}, but x with its "
        f"padding is {extent}+{begin}+{end} = {extent + begin + end}; wanted at least the span"
    )


def wrong_extents(geometry: Geometry, name: str, came: Shape) -> str:
    """Say which spatial size `offset` or `mask` needs, and which parameter was forgotten if it is one."""
    return (
        f"{name} is {extents(came)} in space; the output is {extents(geometry.output)}: "
        f"{output_arithmetic(geometry)}, and {name} needs one value per output position. "
        f"{_forgotten_there(geometry, name, came) or _forgotten_here(geometry, name, came) or _unknown(name)}"
    )


# What a layer is built without, the commonest first.
_LEFT_OUT = (
    ("stride",),
    ("dilation",),
    ("stride", "dilation"),
    ("padding",),
    ("dilation", "padding"),
    ("stride", "dilation", "padding"),
)


def _forgotten_there(geometry: Geometry, name: str, came: Shape) -> str:
    ones = (1,) * geometry.ndim
    defaults: dict[str, Any] = {"stride": ones, "dilation": ones, "padding": ((0, 0),) * geometry.ndim}
    for left_out in _LEFT_OUT:
        if output_extents(replace(geometry, **{what: defaults[what] for what in left_out})) == came:
            given = " and ".join(f"{what}={per_axis(getattr(geometry, what))}" for what in left_out)
            return (
                f"{extents(came)} is what {' and '.join(left_out)} left at the default would give: {given} "
                f"was probably forgotten in the layer that makes the {name}s"
            )
    return ""


def _forgotten_here(geometry: Geometry, name: str, came: Shape) -> str:
    for steps in (2, 3, 4):
        for what in ("stride", "dilation"):
            values: dict[str, Any] = {what: (steps,) * geometry.ndim}
            if output_extents(replace(geometry, **values)) == came:
                return (
                    f"{extents(came)} is what {what}={steps} would give: {what} was forgotten in this "
                    f"call, or is one too many in the layer that makes the {name}s"
                )
    return ""


def _unknown(name: str) -> str:
    return (
        f"The layer that makes the {name}s needs the kernel size, stride, padding and dilation of this call; "
        "stride or dilation is what is usually forgotten there"
    )


# ---- regions


def rois_hint(shape: Shape) -> str:
    """Recognise boxes without the index of their image."""
    if len(shape) == 2 and shape[1] == 4:
        return ". Boxes need the index of their image before them: numpy.insert(boxes, 0, image, axis=1)"
    return ""


def transposed_hint(came: Shape, wanted: Shape) -> str:
    """Recognise offsets or masks whose channels come last."""
    if came == (wanted[0], *wanted[2:], wanted[1]):
        return ". Its channels are last: numpy.moveaxis(array, -1, 1)"
    return ""
