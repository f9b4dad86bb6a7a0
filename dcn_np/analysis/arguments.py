"""What the analyses check of their arguments, and of what a callable gives them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray

from ..arrays import on_host
from ..messages import count, shown

Array: TypeAlias = NDArray[Any]
# Of an image (channels, *spatial): a number, and its gradient in the shape of the image.
ValueAndGrad: TypeAlias = Callable[[Array], tuple[Any, Any]]

NORMS = 1, 2, numpy.inf


def norm_over(values: Array, norm: float, axis: int) -> Array:
    """Return the norm of float64 vectors along an axis: the sum of sizes, the length, or the largest size."""
    if isinstance(norm, bool) or not isinstance(norm, int | float) or norm not in NORMS:
        raise ValueError(f"norm is {shown(norm)}; wanted 1, 2 or numpy.inf")
    found: Array = numpy.linalg.norm(values.astype(numpy.float64), norm, axis=axis)
    return found


def all_on_host(**arrays: Any) -> tuple[Any, ...]:
    """Return arrays as NumPy's, and None where there is none."""
    return tuple(None if array is None else on_host(name, array) for name, array in arrays.items())


def checked_image(name: str, value: Any) -> Array:
    """Return an image (channels, *spatial) of finite floating-point numbers."""
    image = on_host(name, value)
    if image.dtype.kind != "f":
        raise TypeError(f"{name} has dtype {image.dtype}; wanted floating-point numbers, such as float32")
    if not 2 <= image.ndim <= 4 or 0 in image.shape:
        hint = f". One image of a batch is {name}[0]" if image.ndim == 5 else ""
        raise ValueError(
            f"{name} has {count(image.ndim, 'axis')}, shape {image.shape}; wanted (channels, *spatial), none "
            f"of them empty{hint}"
        )
    if wrong := image.size - numpy.count_nonzero(numpy.isfinite(image)):
        raise ValueError(f"{name} holds {count(int(wrong), 'number')} that are NaN or infinite; wanted none")
    return image


def evaluated(value_and_grad: ValueAndGrad, image: Array) -> tuple[float, Array]:
    """Call a value_and_grad; return its value and its gradient in float64, both finite."""
    value, gradient = value_and_grad(image)
    value, gradient = float(value), on_host("the gradient", gradient)
    if gradient.shape != image.shape:
        raise ValueError(
            f"value_and_grad returned a gradient of shape {gradient.shape}; wanted that of the image, "
            f"{image.shape}"
        )
    if not math.isfinite(value) or not numpy.isfinite(gradient).all():
        raise ValueError("value_and_grad returned what is NaN or infinite; wanted finite numbers")
    return value, gradient.astype(numpy.float64)
