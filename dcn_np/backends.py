"""What a backend provides, and which backend computes on given arrays.

A backend is a module. It is handed arrays and a `Geometry` that fit together (geometry.py has checked them)
and computes; it never raises about arguments.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy

if TYPE_CHECKING:
    from .geometry import Geometry
    from .roi_geometry import RoIGeometry


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


class RoIGradients(NamedTuple):
    """The gradients of a pooling over regions, named after the inputs; None where not computed.

    Each has the shape and dtype of its input, and follows its memory order. Regions have no gradient.

    Parameters
    ----------
    x : array or None
        By the feature maps.
    offset : array or None
        By the offsets; always None without any.
    mask : array or None
        By the masks; always None without any.
    """

    x: Any = None
    offset: Any = None
    mask: Any = None


class PreparedConv(Protocol):
    """A convolution of one geometry with what its calls need, made beforehand: one call at a time."""

    def run(self, x: Any, offset: Any, mask: Any, out: Any) -> Any:
        """Compute as `Backend.deform_conv` does, with the weights and the bias as they were."""

    def beside(self) -> PreparedConv:
        """Return another for calls at the same time, with the same packed weights."""


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

    def prepare_deform_conv(
        self, geometry: Geometry, weight: Any, bias: Any, logistic_from: int, factor: int
    ) -> PreparedConv | None:
        """Pack the weights and take working space; None where calls have nothing to keep.

        The output's channels from `logistic_from` on are to become factor / (1 + exp(-output)).
        """

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

    def roi_pool(self, geometry: RoIGeometry, x: Any, rois: Any, offset: Any, mask: Any) -> Any:
        """Return the average of every bin, in x's memory order."""

    def roi_pool_backward(
        self,
        geometry: RoIGeometry,
        grad_output: Any,
        x: Any,
        rois: Any,
        offset: Any,
        mask: Any,
        needs: frozenset[str],
    ) -> RoIGradients:
        """Return the gradients named in `needs`, each in its input's memory order."""


def backend_of(array: Any) -> Backend:
    """Return the backend that computes on an array of NumPy or CuPy.

    Raises
    ------
    ImportError
        The backend needs what is not installed.
    """
    kind: Any = type(array)
    return _backend_of_type(kind)


@lru_cache(maxsize=16)
def _backend_of_type(kind: Any) -> Backend:
    from . import cpu

    if issubclass(kind, numpy.ndarray):
        return cast(Backend, cpu)
    from . import cuda

    return cast(Backend, cuda)
