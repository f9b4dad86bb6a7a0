"""The CuPy backend: arrays on a CUDA device, computed there, on the caller's current stream.

    deform_conv, deform_conv_backward ─► engine     which kernels, in which order
    roi_pool, roi_pool_backward ───────► regions    the same for pooling over regions
                                      └► device ─► modules ─► nvrtc     who runs and compiles them

Only `device` imports CuPy, when the first array comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy

from ..backends import Gradients, PreparedConv, RoIGradients
from ..geometry import Geometry, half_dtypes
from ..roi_geometry import RoIGeometry
from . import engine, regions


def dtypes() -> tuple[numpy.dtype[Any], ...]:
    """Return what arrays may hold."""
    return (*_WIDE, *half_dtypes())


_WIDE = (numpy.dtype(numpy.float32), numpy.dtype(numpy.float64))


def may_share_memory(a: Any, b: Any) -> bool:
    """Tell whether two arrays overlap, judged by their first and last byte."""
    from . import device

    return device.may_share_memory(a, b)


@contextmanager
def borrowed(buffers: Sequence[Any], stream: int) -> Iterator[list[Any]]:
    """Make CuPy's arrays of another library's buffers, and its stream the current one, for one call.

    Parameters
    ----------
    buffers : sequence
        At least one, all on one device, dense and in C order: each with `shape`, `dtype`,
        `__cuda_array_interface__` and `__dlpack_device__`.
    stream : int
        The address of the CUDA stream in whose order they are valid.
    """
    from .device import array_over, on_stream

    _, number = buffers[0].__dlpack_device__()
    with on_stream(number, stream):
        yield [array_over(buffer, number) for buffer in buffers]


def deform_conv(
    geometry: Geometry, x: Any, offset: Any, mask: Any, weight: Any, bias: Any, out: Any, float32_matmul: str
) -> Any:
    """Queue the forward pass; nothing waits for it."""
    from .device import on_device_of

    with on_device_of(x) as device:
        return engine.deform_conv(device, geometry, x, offset, mask, weight, bias, out, float32_matmul)


def prepare_deform_conv(
    geometry: Geometry, weight: Any, bias: Any, logistic_from: int, factor: int
) -> PreparedConv | None:
    """Return None: kernels pack nothing for later, and CuPy's pool keeps memory."""
    return None


def deform_conv_backward(
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
    """Queue the gradients in `needs`; nothing waits for them."""
    from .device import on_device_of

    with on_device_of(x) as device:
        gradients = engine.new_gradients(device, geometry, x, offset, mask, weight, needs)
        engine.deform_conv_backward(
            device, geometry, grad_output, x, offset, mask, weight, gradients, deterministic, float32_matmul
        )
        return gradients


def deform_conv_backward_into(
    geometry: Geometry,
    grad_output: Any,
    x: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    gradients: Gradients,
    deterministic: bool,
    float32_matmul: str,
) -> None:
    """Queue those gradients that have an array, without gaps, into it."""
    from .device import on_device_of

    with on_device_of(x) as device:
        engine.deform_conv_backward(
            device, geometry, grad_output, x, offset, mask, weight, gradients, deterministic, float32_matmul
        )


def roi_pool(geometry: RoIGeometry, x: Any, rois: Any, offset: Any, mask: Any) -> Any:
    """Queue the averages of all bins; nothing waits for them."""
    from .device import on_device_of

    with on_device_of(x) as device:
        return regions.roi_pool(device, geometry, x, rois, offset, mask)


def roi_pool_backward(
    geometry: RoIGeometry,
    grad_output: Any,
    x: Any,
    rois: Any,
    offset: Any,
    mask: Any,
    needs: frozenset[str],
) -> RoIGradients:
    """Queue the gradients in `needs`; nothing waits for them."""
    from .device import on_device_of

    with on_device_of(x) as device:
        return regions.roi_pool_backward(device, geometry, grad_output, x, rois, offset, mask, needs)
