"""CuPy as the `Device` of launching.py: memory from its pool, kernels on the current stream.

No function of CuPy that compiles anything is called: those need CUDA headers, which a user need not have.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import cupy

from .launching import Launch
from .modules import Module, cubin_path

# After one that may have to load the kernel.
_TIMED_RUNS = 5


def may_share_memory(a: Any, b: Any) -> bool:
    """Tell whether two arrays overlap, judged by their first and last byte."""
    return bool(cupy.may_share_memory(a, b))


def array_over(buffer: Any, device: int) -> Any:
    """Return an array over a buffer of another library on a device, dense and in C order.

    Of `__cuda_array_interface__` the address alone is taken: it has no name for bfloat16.
    """
    address, _ = buffer.__cuda_array_interface__["data"]
    size = math.prod(buffer.shape) * buffer.dtype.itemsize
    memory = cupy.cuda.UnownedMemory(address, size, buffer, device)
    return cupy.ndarray(buffer.shape, buffer.dtype, cupy.cuda.MemoryPointer(memory, 0))


@contextmanager
def on_stream(device: int, stream: int) -> Iterator[None]:
    """Make a device and a stream of another library on it, given by its address, the current ones."""
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream, device):
        yield


@contextmanager
def on_device_of(array: Any) -> Iterator[CupyDevice]:
    """Make the device of an array the current one."""
    with array.device:
        yield _device(array.device.id)


class CupyDevice:
    """The current device, which has to be number `number`."""

    def __init__(self, number: int) -> None:
        self.number = number
        device = cupy.cuda.Device(number)
        self.name = cupy.cuda.runtime.getDeviceProperties(number)["name"].decode()
        self.architecture = int(device.compute_capability)
        self.multiprocessors = int(device.attributes["MultiProcessorCount"])
        self.most_shared = int(device.attributes["MaxSharedMemoryPerBlockOptin"])
        self._functions: dict[tuple[Module, str], Any] = {}
        self._modules: dict[Module, Any] = {}
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a new array in C order."""
        return cupy.empty(shape, dtype)

    def empty_like(self, array: Any, shape: tuple[int, ...]) -> Any:
        """Return a new array with the dtype and memory order of another."""
        return cupy.empty_like(array, shape=shape)

    def fill_with_zeros(self, array: Any) -> None:
        """Write zeros to an array without gaps, in any order of axes."""
        if array.nbytes:
            array.data.memset_async(0, array.nbytes)

    def pointer(self, array: Any) -> int:
        """Return the address of the first element."""
        return int(array.data.ptr)

    def launch(self, launch: Launch, blocks: int, record: Any) -> None:
        """Queue a kernel on the current stream."""
        function = self._function(launch)
        function((blocks, 1, 1), (launch.threads, 1, 1), (record,), shared_mem=launch.shared)

    def seconds(self, launch: Launch, blocks: int, record: Any) -> float | None:
        """Run a kernel several times and return what one run takes; None in the capture of a graph."""
        if cupy.cuda.get_current_stream().is_capturing():
            return None
        times = []
        for _ in range(_TIMED_RUNS + 1):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            self.launch(launch, blocks, record)
            end.record()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(begin, end) / 1000)
        return float(statistics.median(times[1:]))

    def _function(self, launch: Launch) -> Any:
        module, key = launch.module, (launch.module, launch.kernel)
        function = self._functions.get(key)
        if function is None:
            with self._lock:
                if module not in self._modules:
                    path = cubin_path(module, self.architecture)
                    self._modules[module] = cupy.RawModule(path=str(path))
                function = self._modules[module].get_function(launch.kernel)
                # How much it is depends on the call; what may be asked for does not.
                if launch.shared:
                    function.max_dynamic_shared_size_bytes = self.most_shared
                self._functions[key] = function
        return function


@cache
def _device(number: int) -> CupyDevice:
    return CupyDevice(number)
