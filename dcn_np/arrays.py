"""Arrays in, the caller's kind of array out: NumPy's on a CPU, CuPy's on a GPU.

Which shapes, dtypes and numbers fit together is decided in geometry.py; here, only what counts as an array.
CuPy is never imported: who has an array of its kind has done so.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy

from .messages import shown

# numpy.ndarray or cupy.ndarray; CuPy has no types, and need not be there.
Array: TypeAlias = Any

_WANTED = "a numpy.ndarray or a cupy.ndarray"

_MMCV_ORDER = (
    ". A number belongs to stride, padding or dilation: mmcv's deform_conv2d(x, offset, weight, stride, "
    "padding, ...) has stride where bias is here; name them, as in deform_conv(x, offset, weight, stride=1, "
    "padding=1)"
)
_NO_MASK = ". Without a mask, call deform_conv(x, offset, weight, ...)"


def array(name: str, value: Any) -> Array:
    """Return a required argument as a plain array over the same memory.

    Subclasses such as numpy.memmap are taken for the memory they are; results are plain arrays. A masked
    array is refused, since its mask would be lost without a word.
    """
    return value if type(value) is numpy.ndarray else _viewed(name, value, _WANTED)


def optional_array(name: str, value: Any) -> Array | None:
    """Return an argument that may be None as a plain array over the same memory, or None."""
    if value is None or type(value) is numpy.ndarray:
        return value
    return _viewed(name, value, f"{_WANTED}, or None")


def place_of(array: Array) -> str:
    """Say where an array is, and of which kind: equal for arrays that can be computed on together."""
    if isinstance(array, numpy.ndarray):
        return "a numpy.ndarray"
    return f"a cupy.ndarray on CUDA device {array.device.id}"


def _viewed(name: str, value: Any, wanted: str) -> Array:
    if isinstance(value, numpy.ndarray) and not isinstance(value, numpy.ma.MaskedArray):
        return value.view(numpy.ndarray)
    if _is_of_cupy(value):
        _check_alignment(name, value)
        return value
    raise TypeError(f"{name} is {shown(value)}; wanted {wanted}{_hint(name, value)}")


def _is_of_cupy(value: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def _check_alignment(name: str, value: Any) -> None:
    """Refuse what a GPU would stop at: a read across the borders of an element."""
    size = value.dtype.itemsize
    steps = [stride for stride, extent in zip(value.strides, value.shape, strict=True) if extent > 1]
    if any(number % size for number in (value.data.ptr, *steps)):
        raise ValueError(
            f"{name} lies at address {value.data.ptr:#x} with strides of {value.strides} bytes; wanted "
            f"multiples of {size}, the size of {value.dtype}: {name}.copy() has them"
        )


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
