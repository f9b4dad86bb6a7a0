"""Where the layers run and what measures them: a CUDA device, or a CPU to rehearse on.

dcn_np gets CuPy's arrays over the memory of torch's tensors, on torch's stream. No function of CuPy that
compiles a kernel is called: those need CUDA headers.
"""

from __future__ import annotations

import gc
import importlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy

from dcn_np.commands import machine

torch: Any = importlib.import_module("torch")

Run = Callable[[], Mapping[str, Any]]

MOST_HEAD_START = 0.05  # seconds
CYCLES_PER_SECOND = 2e9


class Device(Protocol):
    """What a rehearsal and a measurement do differently."""

    kind: str  # as torch calls it
    cache_bytes: int  # of the last cache before memory

    def array(self, tensor: Any) -> Any:
        """Return a tensor as what dcn_np takes, over the same memory if that can be."""

    def numbers(self, array: Any) -> numpy.ndarray[Any, Any]:
        """Return a result, whatever library it is of, as float64 in host memory."""

    def seconds(self, run: Run, calls: int, head_start: float) -> tuple[float, float]:
        """Return the time of a call on the device, and on the host to queue it; ``head_start`` as below."""

    def extra_bytes(self, run: Run) -> int | None:
        """Return the memory that a call needs at its peak beyond inputs and results; None if not known."""

    def free(self) -> None:
        """Give back memory that nobody uses."""

    def about(self) -> dict[str, Any]:
        """Return what somebody needs to know who reads the times later."""


class Cuda:
    """The current device of torch; everything runs on one stream that both libraries know."""

    kind = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("torch finds no CUDA device; --device cpu rehearses without one")
        self.cupy: Any = importlib.import_module("cupy")
        # The default stream would do, but is a null pointer, which not every version of CuPy wraps.
        self.torch_stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.torch_stream)
        self.stream = self._wrapped(torch.cuda.current_stream())
        self.stream.use()
        self.sleep = getattr(torch.cuda, "_sleep", None)  # not public, there for years
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache_bytes = int(getattr(self.properties, "L2_cache_size", 0)) or 2**26

    def _wrapped(self, stream: Any) -> Any:
        try:
            return self.cupy.cuda.Stream.from_external(stream)
        except (
            AttributeError,
            TypeError,
        ):  # an older CuPy, or a torch whose streams do not say what they are
            return self.cupy.cuda.ExternalStream(stream.cuda_stream)

    def array(self, tensor: Any) -> Any:
        """Return a CuPy array over the tensor's memory."""
        return self.cupy.from_dlpack(tensor.detach())

    def numbers(self, array: Any) -> numpy.ndarray[Any, Any]:
        """Copy as it lies in memory: another order would be a kernel of CuPy's."""
        if isinstance(array, torch.Tensor):
            return _of_tensor(array)
        order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        host = array.transpose(order).get()
        wide: numpy.ndarray[Any, Any] = host.transpose(numpy.argsort(order)).astype(numpy.float64)
        return wide

    def seconds(self, run: Run, calls: int, head_start: float) -> tuple[float, float]:
        """Time between two events; the device waits ``head_start`` seconds before the first.

        Calls are queued meanwhile, so that what is timed is the device, not Python: both are reported.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.sleep is not None:
            self.sleep(int(min(head_start, MOST_HEAD_START) * CYCLES_PER_SECOND) + 1)
        start.record()
        begun = time.perf_counter()
        for _ in range(calls):
            run()
        queued = time.perf_counter() - begun
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls, queued / calls

    def extra_bytes(self, run: Run) -> int:
        """Count what torch's allocator had at most, and what a new pool of CuPy's took from the device."""
        pool = self.cupy.cuda.MemoryPool()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with self.cupy.cuda.using_allocator(pool.malloc):
            results = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before + pool.total_bytes()
        return int(peak - sum(array.nbytes for array in results.values()))

    def free(self) -> None:
        """Give unused memory of both pools back."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.cupy.get_default_memory_pool().free_all_blocks()

    def about(self) -> dict[str, Any]:
        """Versions of everything between Python and the device."""
        runtime = self.cupy.cuda.runtime
        cuda_nvrtc = importlib.import_module("dcn_np.cuda.nvrtc")
        compiler = cuda_nvrtc.nvrtc(runtime.runtimeGetVersion() // 1000)
        return {
            "device": self.properties.name,
            "compute_capability": f"{self.properties.major}.{self.properties.minor}",
            "multiprocessors": self.properties.multi_processor_count,
            "memory_bytes": self.properties.total_memory,
            "cache_bytes": self.cache_bytes,
            "nvidia_smi": machine.gpus(),  # name, driver version, memory
            "driver": next((gpu.split(", ")[1] for gpu in machine.gpus() if ", " in gpu), None),
            "cuda": {
                "driver": runtime.driverGetVersion(),
                "runtime of cupy": runtime.runtimeGetVersion(),
                "runtime of torch": torch.version.cuda,
                "nvrtc of dcn_np": ".".join(map(str, compiler.version)),
                "cudnn of torch": torch.backends.cudnn.version(),
            },
            "head_start": self.sleep is not None,
            "autotune": os.environ.get("DCN_NP_AUTOTUNE"),
        }


class Host:
    """A CPU in place of the device: the same steps, figures of no interest."""

    kind = "cpu"
    cache_bytes = 2**20

    def array(self, tensor: Any) -> Any:
        """Return what dcn_np takes: the tensor."""
        return tensor.detach()

    def numbers(self, array: Any) -> numpy.ndarray[Any, Any]:
        """Widen."""
        if isinstance(array, torch.Tensor):
            return _of_tensor(array)
        wide: numpy.ndarray[Any, Any] = array.astype(numpy.float64)
        return wide

    def seconds(self, run: Run, calls: int, head_start: float) -> tuple[float, float]:
        """Time by the clock on the wall."""
        begun = time.perf_counter()
        for _ in range(calls):
            run()
        seconds = (time.perf_counter() - begun) / calls
        return seconds, seconds

    def extra_bytes(self, run: Run) -> None:
        """Not measured."""
        return

    def free(self) -> None:
        """Collect garbage."""
        gc.collect()

    def about(self) -> dict[str, Any]:
        """The processor, marked as a rehearsal."""
        return {"device": f"rehearsal on {machine.cpu_model()}", "driver": None}


def _of_tensor(tensor: Any) -> numpy.ndarray[Any, Any]:
    host: numpy.ndarray[Any, Any] = tensor.detach().cpu().double().numpy()
    return host


def opened(kind: str) -> Device:
    """Return the device ``cuda`` or ``cpu``."""
    return Cuda() if kind == "cuda" else Host()
