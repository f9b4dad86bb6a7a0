"""Arrays in, the caller's kind of array out: for now NumPy's.

Which shapes, dtypes and numbers fit together is decided in geometry.py; here, only what counts as an array.
"""

from __future__ import annotations

from typing import Any

import numpy

from .messages import shown

Array = numpy.ndarray[Any, Any]

_MMCV_ORDER = (
    ". A number belongs to stride, padding or dilation: mmcv's deform_conv2d(x, offset, weight, stride, "
    "padding, ...) has stride where bias is here; name them, as in deform_conv(x, offset, weight, stride=1, "
    "padding=1)"
)
_NO_MASK = ". Without a mask, call deform_conv(x, offset, weight, ...)"


def array(name: str, value: Any) -> Array:
    """Return a required argument as a plain numpy.ndarray over the same memory.

    Subclasses such as numpy.memmap are taken for the memory they are; results are plain arrays. A masked
    array is refused, since its mask would be lost without a word.
    """
    return value if type(value) is numpy.ndarray else _viewed(name, value, "a numpy.ndarray")


def optional_array(name: str, value: Any) -> Array | None:
    """Return an argument that may be None as a plain numpy.ndarray over the same memory, or None."""
    if value is None or type(value) is numpy.ndarray:
        return value
    return _viewed(name, value, "a numpy.ndarray or None")


def _viewed(name: str, value: Any, wanted: str) -> Array:
    if isinstance(value, numpy.ndarray) and not isinstance(value, numpy.ma.MaskedArray):
        return value.view(numpy.ndarray)
    raise TypeError(f"{name} is {shown(value)}; wanted {wanted}{_hint(name, value)}")


def _hint(name: str, value: Any) -> str:
    if isinstance(value, numpy.ma.MaskedArray):
        return f": its masked entries would be taken for numbers; {name}.filled(0) makes them zero"
    if name == "bias" and _is_numbers(value):
        return _MMCV_ORDER
    if name == "weight" and _is_numbers(value):
        return _NO_MASK
    if hasattr(value, "__dlpack__"):
        return f"; numpy.from_dlpack({name}) or numpy.asarray({name}) converts"
    return f"; numpy.asarray({name}) converts" if isinstance(value, list) else ""


def _is_numbers(value: Any) -> bool:
    """Tell whether `value` could be meant for stride: a number, a bool, or a few of them."""
    entries = value if isinstance(value, tuple | list) else (value,)
    return all(isinstance(entry, int | float | numpy.generic) for entry in entries)
