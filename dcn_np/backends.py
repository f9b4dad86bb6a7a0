"""What a backend provides, and which backend computes on given arrays.

A backend is a module. It is handed arrays and a `Geometry` that fit together (geometry.py has checked them)
and computes; it never raises about arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy

from .arrays import place_of

if TYPE_CHECKING:
    from .geometry import Geometry


class Gradients(NamedTuple):
    """The gradients of a deformable convolution, named after the inputs; None where not computed.

    Each has the shape and dtype of its input, and follows its memory order.

    Parameters
    ----------
    x : array or None
        By the image.
    offset : array or None
        By the offsets; always None for ``offset=None``.
    mask : array or None
        By the mask; always None for v1 and for ``mask=None``.
    weight : array or None
        By the filters.
    bias : array or None
        By the bias, (out_channels,), whether the convolution had one or not.
    """

    x: Any = None
    offset: Any = None
    mask: Any = None
    weight: Any = None
    bias: Any = None


class Backend(Protocol):
    """The functions of a backend module; v1 is the call with mask=None, the rigid grid with offset=None."""

    def dtypes(self) -> tuple[Any, ...]:
        """Return what arrays may hold; bfloat16 once ml_dtypes, whose dtype it is, has been imported."""

    def may_share_memory(self, a: Any, b: Any) -> bool:
        """Tell whether two arrays overlap, judged by their first and last byte."""

    def deform_conv(
        self,
        geometry: Geometry,
        x: Any,
        offset: Any,
        mask: Any,
        weight: Any,
        bias: Any,
        out: Any,
        float32_matmul: str,
    ) -> Any:
        """Return the convolution, in `out` if it is not None, else in a new array in x's memory order."""

    def deform_conv_backward(
        self,
        geometry: Geometry,
        grad_output: Any,
        x: Any,
        offset: Any,
        mask: Any,
        weight: Any,
        needs: frozenset[str],
        deterministic: bool,
        float32_matmul: str,
    ) -> Gradients:
        """Return the gradients named in `needs`, each in its input's memory order."""


def backend_of(**arrays: Any) -> Backend:
    """Return the backend that computes on these arrays: name=array, those that are None left out.

    Raises
    ------
    ValueError
        They are not all of one library, or not all on one device.
    ImportError
        The backend needs what is not installed.
    """
    from . import cpu

    given = [(name, array) for name, array in arrays.items() if array is not None]
    first_name, first = given[0]
    if all(type(array) is numpy.ndarray for _, array in given):
        return cast(Backend, cpu)
    for name, array in given[1:]:
        if place_of(array) != place_of(first):
            raise ValueError(
                f"{name} is {place_of(array)}, but {first_name} is {place_of(first)}; wanted all arrays of "
                "one library and on one device"
            )
    from . import cuda

    return cast(Backend, cuda)
