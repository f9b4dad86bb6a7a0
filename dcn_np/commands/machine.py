"""What can be learnt about this process and machine without importing anything: for `doctor` and `bench`."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from dcn_np import threads
from dcn_np.cpu import _native
from dcn_np.cuda import nvrtc as cuda_nvrtc

OPENMP_RUNTIME = re.compile(r"/lib(?:gomp|omp|iomp5)[^/]*\.so[^/]*$")

# Module to look for, and the distributions that may have brought it.
OPTIONAL_PACKAGES = {
    "cupy": ("cupy", "cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x"),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "jax": ("jax",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "paddle": ("paddlepaddle", "paddlepaddle-gpu"),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "scipy": ("scipy",),
    "skimage": ("scikit-image",),
    "matplotlib": ("matplotlib",),
    "threadpoolctl": ("threadpoolctl",),
}


def cpu_model() -> str:
    """The processor's name as Linux gives it, or what Python knows."""
    found = re.search(
        r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", read_or_empty(Path("/proc/cpuinfo")), re.MULTILINE
    )
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def affinity() -> int | None:
    """How many processors the scheduler lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def openmp_runtimes(maps: str = "/proc/self/maps") -> list[str]:
    """Paths of the OpenMP runtimes loaded in this process."""
    fields = (line.split(maxsplit=5) for line in read_or_empty(Path(maps)).splitlines())
    return sorted({entry[5] for entry in fields if len(entry) == 6 and OPENMP_RUNTIME.search(entry[5])})


def optional_packages() -> dict[str, str | None]:
    """Version of each optional package; None if absent, "unknown" if only its module is there."""
    return {module: version_of(module, distributions) for module, distributions in OPTIONAL_PACKAGES.items()}


def version_of(module: str, distributions: tuple[str, ...]) -> str | None:
    """Version of the distribution that brought a module, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # without an origin it is a mere folder of that name
        return None
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def gpus() -> list[str]:
    """NVIDIA GPUs with driver version and memory, as nvidia-smi tells them; their device files without it."""
    program = shutil.which("nvidia-smi")
    if program:
        query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
            return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
        except (OSError, subprocess.SubprocessError):
            pass
    return sorted(path for path in glob.glob("/dev/nvidia*") if re.fullmatch(r"/dev/nvidia\d+", path))


def gpu() -> dict[str, str]:
    """The first GPU's name, driver and memory, as nvidia-smi tells them; "unknown" without it."""
    entries = [entry.split(", ") for entry in gpus()]
    fields = next((entry for entry in entries if len(entry) == 3), ["unknown"] * 3)
    return dict(zip(("device", "driver", "memory"), fields, strict=True))


def commit() -> str | None:
    """The commit that this package lies in, with a + where the working tree differs; None outside of git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def nvrtc() -> dict[str, str | None]:
    """Version and file of the compiler of GPU kernels; None where it is not."""
    try:
        found = cuda_nvrtc.nvrtc()
    except ImportError:
        return {"version": None, "path": None}
    return {"version": ".".join(map(str, found.version)), "path": found.path}


def gpu_advice(devices: list[str], cupy: str | None, compiler: str | None) -> str:
    """Say in a sentence what is missing for CuPy's arrays to be computed on, or that nothing is."""
    if not devices:
        return (
            "CuPy is installed, but no NVIDIA driver was found"
            if cupy
            else "without a GPU nothing is missing"
        )
    if not cupy:
        return 'pip install "dcn_np[cuda13]" (or [cuda12]) brings CuPy, whose arrays are computed on the GPU'
    return "everything for CuPy's arrays is there" if compiler else cuda_nvrtc.NOT_FOUND


def thread_limits() -> dict[str, int | str | None]:
    """Everything that bounds the number of threads of a call; None where nothing is set."""
    return {
        "DCN_NP_NUM_THREADS": os.environ.get("DCN_NP_NUM_THREADS"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "OMP_THREAD_LIMIT": os.environ.get("OMP_THREAD_LIMIT"),
        "threads that OpenMP would start": _native.openmp_threads(),
        "processors that the affinity mask leaves": affinity(),
        "processors that the cgroup's quota allows": threads.cgroup_cpus(),
        "processors of the machine": os.cpu_count(),
    }


def read_or_empty(path: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
