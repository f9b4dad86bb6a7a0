"""Compiles the text of GPU kernels for this CPU and launches it: see emulation/emulation.hpp."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests" / "emulation"
KERNELS = ROOT / "dcn_np" / "kernels"
CACHE = ROOT / "build" / "emulation"

FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=default", "-Wno-psabi", "-Wno-attributes"]
SANITIZED = ["-g", "-fsanitize=address", "-fno-omit-frame-pointer"]
# Conversions of float16 are many times faster with the instruction for it.
MACHINE = ["-mf16c", "-mavx2", "-mfma"]


class EmulationError(RuntimeError):
    """A launch that would hang on a GPU."""


class EmulatedModule:
    """A compiled source of kernels."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        for size in (self.library.arguments_size, self.library.roi_arguments_size):
            size.restype = ctypes.c_size_t

    @property
    def arguments_sizes(self) -> dict[str, int]:
        """Of what kernels are given."""
        return {
            "Arguments": self.library.arguments_size(),
            "RoIArguments": self.library.roi_arguments_size(),
        }

    def launch(self, kernel, grid, block, shared_bytes, arguments, *, order=0):
        """Run a kernel; `arguments` is a record of ARGUMENTS_DTYPE or ROI_ARGUMENTS_DTYPE."""
        record = np.frombuffer(np.ascontiguousarray(arguments).tobytes(), np.uint8)
        assert record.size in self.arguments_sizes.values()
        message = ctypes.create_string_buffer(256)
        failed = self.library.emulate(
            ctypes.cast(getattr(self.library, kernel), ctypes.c_void_p),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_size_t(shared_bytes),
            ctypes.c_void_p(record.ctypes.data),
            ctypes.c_size_t(record.size),
            ctypes.c_uint(order),
            message,
            ctypes.c_size_t(len(message)),
        )
        if failed:
            raise EmulationError(f"{kernel}: {message.value.decode()}")


@cache
def _inputs() -> bytes:
    files = sorted([*KERNELS.glob("*.hpp"), *EMULATION.glob("*.?pp")])
    return b"".join(file.name.encode() + file.read_bytes() for file in files)


def _machine_flags() -> list[str]:
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().split() if cpu.exists() else []
    return [flag for flag in MACHINE if flag.removeprefix("-m") in flags]


def library(source: Path, defines: dict[str, str], *, sanitize: bool = False) -> Path:
    """Compile a source, or find it compiled; several processes may do so at once."""
    flags = [*FLAGS, *(SANITIZED if sanitize else []), *_machine_flags(), "-DDCN_EMULATION"]
    flags += [f"-D{name}={value}" for name, value in defines.items()]
    key = hashlib.sha256(b"\0".join([_inputs(), source.read_bytes(), " ".join(flags).encode()])).hexdigest()
    path = CACHE / f"{source.stem}-{key[:16]}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        mine = path.with_suffix(f".{os.getpid()}")
        command = ["g++", *flags, f'-DDCN_SOURCE="{source}"', f"-I{KERNELS}", f"-I{EMULATION}"]
        done = subprocess.run(
            [*command, str(EMULATION / "driver.cpp"), "-o", str(mine)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        mine.rename(path)
    return path


_modules: dict[Path, EmulatedModule] = {}


def compiled(source: Path, defines: dict[str, str]) -> EmulatedModule:
    """Return the compiled source, loaded once per process; under tools/sanitize.sh a sanitized one."""
    path = library(source, defines, sanitize="address" in os.environ.get("DCN_NP_SANITIZE", ""))
    if path not in _modules:
        _modules[path] = EmulatedModule(path)
    return _modules[path]
