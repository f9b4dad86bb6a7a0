"""The NumPy backend: memory order and allocation here, the arithmetic in `_native`."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy

from .._requirements import engine_problem
from ..backends import Gradients, PreparedConv, RoIGradients
from ..geometry import Geometry, half_dtypes
from ..messages import shown
from ..roi_geometry import RoIGeometry
from ..threads import get_num_threads

try:
    from . import _native
except ImportError as error:
    raise ImportError(engine_problem(Path(__file__).parent, error)) from error

NO_OPENMP = (
    "OpenMP's runtime library cannot be loaded ({}), so dcn_np runs on one thread. If libgomp.so.1 is "
    "missing, install it (Debian: apt install libgomp1). If this says 'static TLS block', import dcn_np "
    "before other libraries, or start Python with the library that it names in LD_PRELOAD."
)


def _load_openmp() -> str | None:
    """Give the engine threads, or return why there are none: it computes the same on one."""
    try:
        from . import _openmp
    except ImportError as error:
        return str(error)
    _native.use_runtime(_openmp.runtime())
    return None


# Why there is no OpenMP; None if there is.
openmp_problem = _load_openmp()
if openmp_problem is not None:
    warnings.warn(NO_OPENMP.format(openmp_problem), RuntimeWarning, stacklevel=2)

if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_native.after_fork_in_child)

_ISAS = [name for name, _ in _native.isas()]
# What is computed in, and what else is stored, by the kernels' numbers.
_DTYPES = {numpy.dtype(name): number for number, name in enumerate(_native.dtypes())}
_FLOAT32 = numpy.dtype(numpy.float32)
_STORAGES = {name: number for number, name in enumerate(_native.halves(), 1)}


def dtypes() -> tuple[numpy.dtype[Any], ...]:
    """Return what arrays may hold."""
    return (*_DTYPES, *half_dtypes())


def available_isas() -> tuple[str, ...]:
    """Return the names of the instruction sets that a call can use here.

    Returns
    -------
    tuple of str
        Those that this build has and this processor supports, weakest first.
    """
    return tuple(name for name, supported in reversed(_native.isas()) if supported)


def _chosen_isa() -> int:
    # An unknown or unsupported name is refused: running something else would hide what was measured.
    name = os.environ.get("DCN_NP_ISA") or available_isas()[-1]
    if name not in available_isas():
        names = ", ".join(available_isas())
        raise ImportError(f"DCN_NP_ISA is {name!r}; this build and processor have {names}")
    return _ISAS.index(name)


_process_isa = _chosen_isa()
_context_isa: ContextVar[int | None] = ContextVar("dcn_np_isa", default=None)


def isa() -> str:
    """Return the name of the instruction set that calls made here and now use.

    Returns
    -------
    str
        One of `available_isas`.
    """
    return _ISAS[_isa()]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Use another instruction set inside a ``with`` block, in this thread or task only.

    Parameters
    ----------
    name : str
        One of `available_isas`.

    Raises
    ------
    TypeError, ValueError
        `name` is no string, or none of these.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {shown(name)}; wanted one of {', '.join(available_isas())}")
    if name not in available_isas():
        raise ValueError(f"name is {name!r}; wanted one of {', '.join(available_isas())}")
    token = _context_isa.set(_ISAS.index(name))
    try:
        yield
    finally:
        _context_isa.reset(token)


def xla_handlers() -> tuple[Any, Any]:
    """Return the forward and the backward as XLA calls them (src/xla.hpp), without Python.

    They run on the instruction set of the process: XLA's threads see no `use_isa`.
    """
    return _native.xla_handlers(_process_isa)


def may_share_memory(a: Any, b: Any) -> bool:
    """Tell whether two arrays overlap, judged by their first and last byte."""
    return numpy.may_share_memory(a, b)


def deform_conv(
    geometry: Geometry, x: Any, offset: Any, mask: Any, weight: Any, bias: Any, out: Any, float32_matmul: str
) -> Any:
    """Compute the forward pass; a CPU is always strict about float32."""
    if out is None:
        out = _empty_like(x, geometry.output_shape)
    result = _flat_place(out)
    _native.deform_conv(
        *_how(geometry),
        _bits(_in_elements(x)),
        _bits(_flat(offset)),
        _bits(_flat(mask)),
        _wide(weight),
        _wide(bias),
        _bits(result),
    )
    return _copied(result, out)


class _PreparedConv:
    """For as many threads as a call made here and now may use, or fewer; on the instruction set of now."""

    def __init__(
        self, geometry: Geometry, native: _native.PreparedForward, arguments: tuple[Any, ...]
    ) -> None:
        self._geometry, self._native, self._arguments = geometry, native, arguments

    def beside(self) -> _PreparedConv:
        native = _native.PreparedForward(self._native, *self._arguments)
        return _PreparedConv(self._geometry, native, self._arguments)

    def run(self, x: Any, offset: Any, mask: Any, out: Any) -> Any:
        if out is None:
            out = _empty_like(x, self._geometry.output_shape)
        result = _flat_place(out)
        # What one thread computes does not pay for asking how many there may be.
        threads = 1 if self._native.threads == 1 else get_num_threads()
        self._native.run(threads, _bits(_in_elements(x)), _bits(offset), _bits(mask), _bits(result))
        return _copied(result, out)


def prepare_deform_conv(
    geometry: Geometry, weight: Any, bias: Any, logistic_from: int, factor: int
) -> PreparedConv | None:
    """Pack the weights and take working space, for any memory order of x."""
    how, kept = _how(geometry), None if bias is None else _wide(bias).copy()
    native = _native.PreparedForward(None, *how, _wide(weight), kept, logistic_from, factor)
    return _PreparedConv(geometry, native, (*how, None, kept, logistic_from, factor))


def logistic(values: Any, factor: int) -> Any:
    """Write the logistic function over the values; a copy of them where their axes do not lie as one."""
    values = _flat(values)
    storage = _storage(values.dtype)
    _native.logistic(_isa(), _DTYPES[_FLOAT32 if storage else values.dtype], storage, _bits(values), factor)
    return values


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
    """Compute the gradients in `needs`; a CPU is always deterministic and strict."""
    asked = Gradients(
        _empty_like(x, x.shape) if "x" in needs else None,
        _empty_like(offset, offset.shape) if "offset" in needs else None,
        _empty_like(mask, mask.shape) if "mask" in needs else None,
        _empty_like(weight, weight.shape) if "weight" in needs else None,
        _empty_like(weight, (geometry.out_channels,)) if "bias" in needs else None,
    )
    computed = Gradients(
        asked.x,
        _flat_place(asked.offset),
        _flat_place(asked.mask),
        _wide_place(asked.weight),
        _wide_place(asked.bias),
    )
    _native.deform_conv_backward(
        *_how(geometry),
        _bits(_flat(grad_output)),
        _bits(_in_elements(x)),
        _bits(_flat(offset)),
        _bits(_flat(mask)),
        _wide(weight),
        _bits(computed.x),
        _bits(computed.offset),
        _bits(computed.mask),
        computed.weight,
        computed.bias,
    )
    return Gradients(*map(_copied, computed, asked))


def roi_pool(geometry: RoIGeometry, x: Any, rois: Any, offset: Any, mask: Any) -> Any:
    """Compute the average of every bin."""
    out = _empty_like(x, geometry.output_shape)
    result = _flat_place(out)
    _native.roi_pool(
        *_how(geometry),
        _by_image(geometry, rois),
        _bits(_in_elements(x)),
        _bits(_flat(offset)),
        _bits(_flat(mask)),
        _bits(result),
    )
    return _copied(result, out)


def roi_pool_backward(
    geometry: RoIGeometry,
    grad_output: Any,
    x: Any,
    rois: Any,
    offset: Any,
    mask: Any,
    needs: frozenset[str],
) -> RoIGradients:
    """Compute the gradients in `needs`."""
    asked = RoIGradients(
        _empty_like(x, x.shape) if "x" in needs else None,
        _empty_like(offset, offset.shape) if "offset" in needs else None,
        _empty_like(mask, mask.shape) if "mask" in needs else None,
    )
    computed = RoIGradients(asked.x, _flat_place(asked.offset), _flat_place(asked.mask))
    _native.roi_pool_backward(
        *_how(geometry),
        _by_image(geometry, rois),
        _bits(_flat(grad_output)),
        _bits(_in_elements(x)),
        _bits(_flat(offset)),
        _bits(_flat(mask)),
        *map(_bits, computed),
    )
    return RoIGradients(*map(_copied, computed, asked))


def _by_image(geometry: RoIGeometry, rois: Any) -> tuple[Any, Any, Any]:
    """Return the regions, their indices by image, and where in that order those of each image begin.

    Those of an image follow its longer side: neighbours find each other's pixels in the cache, and fewer have
    to be kept there than along the shorter one.
    """
    regions = _contiguous(numpy.asarray(rois, numpy.float64))
    images = regions[:, 0].astype(numpy.int64)
    height, width = geometry.input
    low, high = (1, 3) if width > height else (2, 4)
    order = numpy.lexsort((regions[:, low] + regions[:, high], images))
    return regions, order, numpy.searchsorted(images[order], numpy.arange(geometry.batch + 1))


_ALIGNMENT = 64  # of a line of cache, and what jax asks for before it takes an array without a copy


def _empty_like(array: Any, shape: tuple[int, ...]) -> Any:
    """Return a new array with the dtype and memory order of another, aligned."""
    strides = None if array.flags.c_contiguous else numpy.empty_like(array, shape=shape).strides
    raw = numpy.empty(math.prod(shape) * array.itemsize + _ALIGNMENT, numpy.uint8)
    start = -_native.address(raw) % _ALIGNMENT
    return numpy.ndarray(shape, array.dtype, raw, start, strides)


def _isa() -> int:
    chosen = _context_isa.get()
    return _process_isa if chosen is None else chosen


def _how(geometry: Geometry | RoIGeometry) -> tuple[int, int, int, int, int, Any]:
    images, positions = _storage(geometry.dtype), _storage(geometry.position_dtype)
    dtype = _DTYPES[_FLOAT32 if images else geometry.dtype]
    return _isa(), dtype, images, positions, get_num_threads(), geometry.struct


def _storage(dtype: Any) -> int:
    # The name of a dtype takes NumPy microseconds.
    return _STORAGES[dtype.name] if dtype.itemsize == 2 else 0


def _copied(computed: Any, wanted: Any) -> Any:
    if computed is not wanted:
        with numpy.errstate(over="ignore"):
            wanted[...] = computed
    return wanted


def _bits(array: Any) -> Any:
    """Return the bits of halves, since bfloat16 has no place in the buffer protocol; others as they are."""
    return array.view(numpy.uint16) if array is not None and array.itemsize == 2 else array


def _wide(array: Any) -> Any:
    """Return weights or a bias contiguous, of what is computed in."""
    if array is not None and array.itemsize == 2:
        return numpy.ascontiguousarray(array, numpy.float32)
    return _contiguous(array)


def _wide_place(wanted: Any) -> Any:
    """Return where the kernels write for `wanted`, weights or a bias: itself, or an array to copy from."""
    if wanted is not None and wanted.itemsize == 2:
        return numpy.empty(wanted.shape, numpy.float32)
    return wanted if wanted is None or _is_contiguous(wanted) else numpy.empty(wanted.shape, wanted.dtype)


def _in_elements(array: Any) -> Any:
    """Return the array, or a copy where it is not aligned or its strides are no multiples of an element."""
    flags = array.flags
    if flags.c_contiguous and flags.aligned:
        return array
    whole = flags.aligned and not any(stride % array.itemsize for stride in array.strides)
    return array if whole else array.copy()


def _is_flat(array: Any) -> bool:
    """Tell whether the spatial axes lie in memory as one axis of positions at a constant distance."""
    flags = array.flags
    if flags.c_contiguous:
        return bool(flags.aligned)
    if not flags.aligned or any(stride % array.itemsize for stride in array.strides):
        return False
    axes = [(n, stride) for n, stride in zip(array.shape[2:], array.strides[2:], strict=True) if n != 1]
    return all(outer == n * stride for (_, outer), (n, stride) in pairwise(axes))


def _is_contiguous(array: Any) -> bool:
    flags = array.flags
    return bool(flags.c_contiguous and flags.aligned)


def _flat(array: Any) -> Any:
    return array if array is None or _is_flat(array) else array.copy("C")


def _contiguous(array: Any) -> Any:
    return array if array is None or _is_contiguous(array) else array.copy("C")


def _flat_place(wanted: Any) -> Any:
    """Return where the kernels write for `wanted`: itself, or an array to copy from."""
    return wanted if wanted is None or _is_flat(wanted) else numpy.empty(wanted.shape, wanted.dtype)
