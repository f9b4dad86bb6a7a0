"""Any array in, the caller's kind of array out, over the same memory.

NumPy's and CuPy's arrays are what the backends compute on. An array of another library comes in through
DLPack, and results leave the same way; whatever else has a buffer is read as NumPy would, and gives NumPy's
arrays. Which shapes, dtypes and numbers fit together is decided in geometry.py.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import numpy

from . import _dlpack
from .messages import shown

# An array of any library: there is no type for that.
Array: TypeAlias = Any

_WANTED = "a numpy.ndarray, or an array of another library with __dlpack__"

_MMCV_ORDER = (
    ". A number belongs to stride, padding or dilation: mmcv's deform_conv2d(x, offset, weight, stride, "
    "padding, ...) has stride where bias is here; name them, as in deform_conv(x, offset, weight, stride=1, "
    "padding=1)"
)
_NO_MASK = ". Without a mask, call deform_conv(x, offset, weight, ...)"

# DLPack's device types: memory that a CPU reads, and a GPU's.
_HOST = {1, 3}
_CUDA = {2, 13}

# How a library takes what has __dlpack__, by the module that its arrays are of: a module and a function
# there. Others have `from_dlpack` at the top, or in the namespace that the array itself names.
_IMPORTERS = {
    "jax": ("jax.dlpack", "from_dlpack"),
    "jaxlib": ("jax.dlpack", "from_dlpack"),
    "tensorflow": ("tensorflow.experimental.dlpack", "from_dlpack"),
    "paddle": ("paddle.utils.dlpack", "from_dlpack"),
}
# These want the capsule itself.
_TAKES_CAPSULES = {"tensorflow", "paddle"}
# Nothing may write to the tensors of these, though their capsules cannot say so.
_IMMUTABLE = {"tensorflow"}
# A tensor of these says whether it requires a gradient, and is_grad_enabled() whether gradients are recorded.
_RECORDERS = {"torch", "paddle"}


# Library, DLPack's type of the device, its number.
_Place: TypeAlias = tuple[str, int, int]


class Kind(NamedTuple):
    """The library and the device that all arrays of a call are of.

    Attributes
    ----------
    library : str
        The module that the arrays come from: "numpy", "cupy", "torch", ...
    device_type : int
        DLPack's number for the type of their device.
    importer : callable or None
        How the library takes a result; None where results are its own as they are.
    """

    library: str
    device_type: int
    importer: Callable[[Any], Any] | None = None

    def take(self, name: str, value: Any) -> Array:
        """Return a required argument as an array of NumPy or CuPy over the same memory.

        Subclasses such as numpy.memmap are taken for the memory they are. A masked array is refused, since
        its mask would be lost without a word.
        """
        return value if type(value) is numpy.ndarray else self._viewed(name, value, _WANTED)

    def take_optional(self, name: str, value: Any) -> Array | None:
        """Return the same of an argument that may be None."""
        if value is None or type(value) is numpy.ndarray:
            return value
        return self._viewed(name, value, f"{_WANTED}, or None")

    def give(self, result: Array | None) -> Array | None:
        """Return a result as an array of this kind, over the same memory."""
        if result is None or self.importer is None:
            return result
        exported = result
        if isinstance(result, numpy.ndarray):
            # The name of a dtype takes NumPy microseconds.
            is_bfloat16 = result.dtype.itemsize == 2 and result.dtype.name == "bfloat16"
            exported = _dlpack.Exported(result.view(numpy.uint16) if is_bfloat16 else result, is_bfloat16)
        return self.importer(exported)

    def _viewed(self, name: str, value: Any, wanted: str) -> Array:
        if self.importer is not None and _is_foreign(value):
            return _from_dlpack(name, value, self.device_type)
        if isinstance(value, numpy.ndarray) and not isinstance(value, numpy.ma.MaskedArray):
            return value.view(numpy.ndarray)
        if _is_of_cupy(value):
            return _aligned_on_gpu(name, value)
        if not isinstance(value, numpy.ndarray) and _has_buffer(value):
            return numpy.asarray(memoryview(value))
        raise TypeError(f"{name} is {shown(value)}; wanted {wanted}{_hint(name, value)}")


_NUMPY = Kind("numpy", 1)


def kind_of(**arrays: Any) -> Kind:
    """Return the kind of all arrays of a call; None and what is no array are left out.

    Raises
    ------
    TypeError
        They are on a device that is none of ours, or of a library that takes no result back.
    ValueError
        They are not all of one library, or not all on one device.
    """
    for value in arrays.values():
        if value is not None and type(value) is not numpy.ndarray:
            return _kind_of_any(arrays)
    return _NUMPY


def on_host(name: str, value: Any) -> numpy.ndarray[Any, Any]:
    """Return one argument as an array of NumPy; of arrays on a CPU over the same memory."""
    taken = kind_of(**{name: value}).take(name, value)
    return taken if isinstance(taken, numpy.ndarray) else numpy.asarray(taken.get())


def _kind_of_any(arrays: dict[str, Any]) -> Kind:
    first_name, first, first_place = "", None, None
    for name, value in arrays.items():
        if first_place is not None and _is_beside(value, first, first_place):
            continue
        place = None if value is None else _place_of(value)
        if place is None:
            continue
        if first_place is None:
            first_name, first, first_place = name, value, place
        elif place != first_place:
            raise ValueError(
                f"{name} is {_in_words(place)}, but {first_name} is {_in_words(first_place)}; wanted all "
                "arrays of one library and on one device"
            )
    if first_place is None or not _is_foreign(first):
        return _NUMPY
    library, device_type, _ = first_place
    if device_type not in _HOST | _CUDA:
        raise TypeError(
            f"{first_name} is {shown(first)} on a device of DLPack's type {device_type}; wanted an array on "
            "the CPU or a CUDA device"
        )
    kind: Any = type(first)
    exchange = _exchange_of(kind) if device_type in _HOST else None
    if exchange is not None:
        return Kind(library, device_type, partial(_dlpack.array_by, exchange))
    return Kind(library, device_type, _importer(library, first))


def _place_of(value: Any) -> _Place | None:
    """Return where an array is, equal for those that can be computed on together; None for what is none."""
    if _is_foreign(value):
        return (_library_of(value), *_device_of(value))
    if _is_of_cupy(value):
        return "cupy", 2, value.device.id
    return ("numpy", 1, 0) if isinstance(value, numpy.ndarray) or _has_buffer(value) else None


def _is_beside(value: Any, first: Any, first_place: _Place) -> bool:
    """Tell quickly that an array is where another one is; False leaves it to `_place_of`.

    For the CPU only, where the device is looked at again when the array is taken.
    """
    try:
        same = type(value) is type(first) and first_place[1] in _HOST and value.device == first.device
        return bool(same)
    except Exception:  # there is no such attribute
        return False


def _in_words(place: _Place) -> str:
    library, device_type, number = place
    if library == "numpy":
        return "a numpy.ndarray"
    where = f"CUDA device {number}" if device_type in _CUDA else "the CPU"
    if device_type not in _HOST | _CUDA:
        where = f"a device of DLPack's type {device_type}"
    return f"a {library} array on {where}"


def _is_of_cupy(value: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def _is_foreign(value: Any) -> bool:
    """Tell whether a value is an array of a library that is neither NumPy nor CuPy."""
    kind: Any = type(value)
    return _is_foreign_type(kind)


@lru_cache(maxsize=64)
def _is_foreign_type(kind: Any) -> bool:
    cupy = sys.modules.get("cupy")
    if issubclass(kind, numpy.ndarray | numpy.generic) or (
        cupy is not None and issubclass(kind, cupy.ndarray)
    ):
        return False
    return hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__")


def _library_of(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _device_of(value: Any) -> tuple[int, int]:
    """Return type and number of the device that an array says it is on; (0, 0) where that fails."""
    try:
        device_type, number = _by_c(_dlpack.device_by, value) or value.__dlpack_device__()
        return int(device_type), int(number or 0)  # paddle's CPU has None for a number
    except Exception:  # whatever another library raises: taking the array says what is wrong
        return 0, 0


def _has_buffer(value: Any) -> bool:
    if isinstance(value, bytes | str | numpy.generic):
        return False
    try:
        memoryview(value).release()
    except TypeError:
        return False
    return True


def _from_dlpack(name: str, value: Any, device_type: int) -> Array:
    """Return the memory of another library's array."""
    value = _without_gradient(name, value)
    _check_sign(name, value)
    if device_type in _CUDA:
        cupy = cupy_for(f"{name} is")
        return _aligned_on_gpu(name, _asked(name, value, cupy.from_dlpack))
    array = _asked(name, value, _on_cpu)
    if _library_of(value) in _IMMUTABLE:
        array.setflags(write=False)
    return array


def _asked(name: str, value: Any, take: Any) -> Array:
    """Call a function that takes another library's array, and name the argument in what it raises."""
    try:
        return take(value)
    except MemoryError:
        raise
    except Exception as error:
        # Of the kinds that the caller expects of a bad argument, whatever the other library raises.
        raise TypeError(f"{name} is {shown(value)}, which cannot be read through DLPack: {error}") from error


def _on_cpu(value: Any) -> numpy.ndarray[Any, Any]:
    memory = _by_c(_dlpack.memory_by, value)
    if memory is None:
        try:
            capsule = value.__dlpack__(max_version=(1, 0))
        except TypeError:  # from before there were versions
            capsule = value.__dlpack__()
        memory = _dlpack.memory_of(capsule)
    array = numpy.asarray(memory)
    return array.view(_bfloat16()) if memory.is_bfloat16 else array


@lru_cache(maxsize=64)
def _exchange_of(kind: Any) -> Any:
    """Return DLPack's C functions of a type of arrays; None where there are none.

    A type that inherits them may have overridden what `__dlpack__` does: they are of the type itself only.
    """
    capsule = vars(kind).get("__dlpack_c_exchange_api__")
    return capsule if _dlpack.is_exchange(capsule) else None


def _by_c(ask: Callable[[Any, Any], Any], value: Any) -> Any:
    """Return what the C functions of the array's type say; None where the array's methods say why not."""
    kind: Any = type(value)
    exchange = _exchange_of(kind)
    if exchange is None:
        return None
    try:
        return ask(exchange, value)
    except (BufferError, RuntimeError, TypeError):
        return None


def _bfloat16() -> Any:
    try:
        return importlib.import_module("ml_dtypes").bfloat16
    except ImportError:
        raise TypeError("bfloat16 needs a package: pip install ml_dtypes") from None


def cupy_for(what: str) -> Any:
    """Return CuPy, which computes `what` on a CUDA device.

    Raises
    ------
    ImportError
        It is not installed, or does not work.
    """
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise ImportError(
            f"{what} on a CUDA device, where CuPy computes: pip install 'dcn_np[cuda13]' (or [cuda12])"
        ) from error


def _without_gradient(name: str, value: Any) -> Any:
    """Return a tensor of torch or paddle without its gradient, or refuse it where it would be missed."""
    if not getattr(value, "requires_grad", False):
        return value
    library = _library_of(value)
    if library in _RECORDERS and sys.modules[library].is_grad_enabled():
        raise TypeError(
            f"{name} is a {library}.Tensor that requires a gradient, which this function does not record; "
            f"dcn_np.{library} has the same functions with gradients, and under {library}.no_grad() or with "
            f"{name}.detach() this one computes the value"
        )
    return value.detach()


def _check_sign(name: str, value: Any) -> None:
    """Refuse what torch negates as it reads: DLPack has no word for that, and torch exports it unnegated."""
    is_neg = getattr(value, "is_neg", None)
    if is_neg is not None and is_neg():
        raise TypeError(f"{name} is a torch.Tensor with the negative bit set; wanted {name}.resolve_neg()")


def _importer(library: str, sample: Any) -> Any:
    """Return the function by which a library takes a result.

    Raises
    ------
    TypeError
        It has none.
    """
    module, function = _IMPORTERS.get(library, (library, "from_dlpack"))
    found = getattr(_imported(module), function, None)
    if found is None and hasattr(sample, "__array_namespace__"):
        found = getattr(sample.__array_namespace__(), "from_dlpack", None)
    if found is None:
        raise TypeError(
            f"an array of {library} can be read through DLPack, but {library} has no from_dlpack for the "
            "result: convert with numpy.from_dlpack"
        )
    take = found
    return (lambda exported: take(exported.__dlpack__())) if library in _TAKES_CAPSULES else take


def _imported(module: str) -> Any:
    try:
        return sys.modules.get(module) or importlib.import_module(module)
    except ImportError:
        return None


def _aligned_on_gpu(name: str, value: Any) -> Any:
    """Refuse what a GPU would stop at: a read across the borders of an element."""
    size = value.dtype.itemsize
    steps = [stride for stride, extent in zip(value.strides, value.shape, strict=True) if extent > 1]
    if any(number % size for number in (value.data.ptr, *steps)):
        raise ValueError(
            f"{name} lies at address {value.data.ptr:#x} with strides of {value.strides} bytes; wanted "
            f"multiples of {size}, the size of {value.dtype}: {name}.copy() has them"
        )
    return value


def _hint(name: str, value: Any) -> str:
    if isinstance(value, numpy.ma.MaskedArray):
        return f": its masked entries would be taken for numbers; {name}.filled(0) makes them zero"
    if name == "bias" and _is_numbers(value):
        return _MMCV_ORDER
    if name == "weight" and _is_numbers(value):
        return _NO_MASK
    if type(value).__module__.startswith("jax."):  # a tracer
        return "; dcn_np.jax has the same functions for what JAX traces"
    if _library_of(value) == "tensorflow":
        return "; dcn_np.tensorflow takes variables, and tensors of a graph"
    if hasattr(value, "__dlpack__"):
        return f"; numpy.from_dlpack({name}) or numpy.asarray({name}) converts"
    return f"; numpy.asarray({name}) converts" if isinstance(value, list) else ""


def _is_numbers(value: Any) -> bool:
    """Tell whether `value` could be meant for stride: a number, a bool, or a few of them."""
    entries = value if isinstance(value, tuple | list) else (value,)
    return all(isinstance(entry, int | float | numpy.generic) for entry in entries)
