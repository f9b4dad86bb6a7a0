"""A GPU for tests on machines without one: stands in for CuPy, and runs the kernels' text on the CPU.

Only the little of CuPy that dcn_np uses is here. Memory is poisoned: what is read before it was written is
NaN. `emulated_gpu()` puts it in place. Inside, the operators of this module take NumPy's arrays to the
emulated GPU, call dcn_np's and bring the results back.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np

import dcn_np

CONVOLUTIONS = ("deform_conv", "modulated_deform_conv")
POOLINGS = ("roi_align", "deform_roi_pool", "modulated_deform_roi_pool", "deform_psroi_pool")
KERNELS = Path(__file__).parent.parent / "dcn_np" / "kernels"


class Device:
    """The one device."""

    compute_capability = "90"
    attributes = types.MappingProxyType(
        {"MultiProcessorCount": 2, "MaxSharedMemoryPerBlockOptin": 227 * 1024}
    )

    def __init__(self, number=0):
        self.id = number

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


class Event:
    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        return None


class ExternalStream:
    """Another library's stream, by its address; 0 is what is current without any."""

    _current = threading.local()

    @classmethod
    def current(cls):
        return getattr(cls._current, "address", 0)

    def __init__(self, address, device):
        assert device == Device().id
        self.address = address

    def __enter__(self):
        self.before = self.current()
        self._current.address = self.address

    def __exit__(self, *error):
        self._current.address = self.before


class UnownedMemory:
    """Another library's memory."""

    def __init__(self, address, size, owner, device):
        assert device == Device().id
        self.bytes = (ctypes.c_char * size).from_address(address) if size else b""


class MemoryPointer:
    def __init__(self, memory, offset):
        if isinstance(memory, UnownedMemory):
            memory = np.frombuffer(memory.bytes, np.uint8)[offset:]
        self.array = memory
        self.ptr = memory.ctypes.data

    def memset_async(self, value, size):
        assert size == self.array.nbytes
        assert value == 0
        self.array[...] = 0


class ndarray:  # noqa: N801 - CuPy's name
    """The attributes of CuPy's array that dcn_np uses, around one of NumPy's, or over memory."""

    def __init__(self, array, dtype=None, memory=None):
        if memory is not None:
            array = memory.array.view(dtype).reshape(array)
        self._array = array
        for name in ("shape", "strides", "dtype", "size", "itemsize", "nbytes", "ndim", "flags"):
            setattr(self, name, getattr(array, name))
        self.data = MemoryPointer(array, 0)
        self.device = Device()

    def get(self):
        return self._array

    def transpose(self, *axes):
        return ndarray(self._array.transpose(*axes))

    def reshape(self, *shape):
        view = self._array.reshape(*shape)
        assert np.may_share_memory(view, self._array) or not view.size, "CuPy would launch a kernel"
        return ndarray(view)


def on_gpu(array):
    """The same array, on the emulated GPU; its memory order is kept."""
    return None if array is None else ndarray(np.array(array, copy=True, order="K"))


def _poisoned(array):
    array[...] = np.nan
    return ndarray(array)


def empty(shape, dtype):
    return _poisoned(np.empty(shape, dtype))


def empty_like(array, shape=None):
    return _poisoned(np.empty_like(array.get(), shape=shape))


def may_share_memory(a, b):
    return np.may_share_memory(a.get(), b.get())


class RawModule:
    def __init__(self, path):
        self.library = _libraries[path]

    def get_function(self, name):
        return Function(self.library, name)


class Function:
    max_dynamic_shared_size_bytes = 48 * 1024

    def __init__(self, library, name):
        self.library, self.name = library, name

    def __call__(self, grid, block, arguments, shared_mem):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        (record,) = arguments
        assert record.size == 1
        with _one_at_a_time:
            streams.append(ExternalStream.current())
            self.library.launch(self.name, grid, block, shared_mem, record, order=order)


# The order of threads and blocks in every launch: see emulated.py.
order = 0
# The stream of every launch so far.
streams: list[int] = []
_one_at_a_time = threading.Lock()
_libraries: dict[str, object] = {}


def compiled(module, architecture):
    """Stand in for `modules.cubin_path`: compile for this CPU."""
    import emulated

    library = emulated.compiled(KERNELS / module.source, dict(module.defines))
    _libraries[str(library.path)] = library
    return library.path


@contextlib.contextmanager
def emulated_gpu():
    """Put the emulation in the place of CuPy, and dcn_np.cuda on top of it."""
    fake = types.ModuleType("cupy")
    fake.cuda = types.ModuleType("cupy.cuda")
    fake.cuda.Device = Device
    fake.cuda.Event = Event
    fake.cuda.ExternalStream = ExternalStream
    fake.cuda.UnownedMemory, fake.cuda.MemoryPointer = UnownedMemory, MemoryPointer
    fake.cuda.get_elapsed_time = lambda begin, end: end.time - begin.time
    fake.cuda.get_current_stream = lambda: types.SimpleNamespace(is_capturing=lambda: False)
    fake.cuda.runtime = types.SimpleNamespace(getDeviceProperties=lambda number: {"name": b"emulated"})
    fake.__dict__.update(
        ndarray=ndarray,
        empty=empty,
        empty_like=empty_like,
        may_share_memory=may_share_memory,
        from_dlpack=lambda array: array.__dlpack__(),  # what is on the emulated GPU needs no capsule
        RawModule=RawModule,
    )
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "cupy"}
    sys.modules |= {"cupy": fake, "cupy.cuda": fake.cuda}
    try:
        importlib.import_module("dcn_np.cuda.device").cubin_path = compiled
        yield fake
    finally:
        del sys.modules["dcn_np.cuda.device"]
        del importlib.import_module("dcn_np.cuda").device
        del sys.modules["cupy"], sys.modules["cupy.cuda"]
        sys.modules |= hidden


def through(to_gpu, from_gpu):
    """Every operator and its gradient for NumPy's arrays: there and back by two functions.

    `out` has to be on the GPU.
    """

    def wrapped(function):
        @functools.wraps(function)
        def call(*arguments, **keywords):
            arguments = [to_gpu(a) if isinstance(a, np.ndarray) else a for a in arguments]
            keywords = {name: to_gpu(a) if isinstance(a, np.ndarray) else a for name, a in keywords.items()}
            result = function(*arguments, **keywords)
            if isinstance(result, tuple):
                return type(result)(*(None if array is None else from_gpu(array) for array in result))
            return from_gpu(result)

        return call

    names = [name for plain in (*CONVOLUTIONS, *POOLINGS) for name in (plain, f"{plain}_backward")]
    return types.SimpleNamespace(**{name: wrapped(getattr(dcn_np, name)) for name in names})


def _with_out(function):
    @functools.wraps(function)
    def call(*arguments, out=None, **keywords):
        return (
            function(*arguments, **keywords)
            if out is None
            else function(*arguments, out=ndarray(out), **keywords)
        )

    return call


_functions = through(on_gpu, ndarray.get)
deform_conv = _with_out(_functions.deform_conv)
deform_conv_backward = _functions.deform_conv_backward
modulated_deform_conv = _with_out(_functions.modulated_deform_conv)
modulated_deform_conv_backward = _functions.modulated_deform_conv_backward
roi_align, roi_align_backward = _functions.roi_align, _functions.roi_align_backward
deform_roi_pool, deform_roi_pool_backward = _functions.deform_roi_pool, _functions.deform_roi_pool_backward
modulated_deform_roi_pool = _functions.modulated_deform_roi_pool
modulated_deform_roi_pool_backward = _functions.modulated_deform_roi_pool_backward
deform_psroi_pool, deform_psroi_pool_backward = (
    _functions.deform_psroi_pool,
    _functions.deform_psroi_pool_backward,
)
