"""Every compilation of the kernels' text that can run, once; and where its machine code lies.

The text is compiled at first use and kept on disk: a folder of the user's own, keyed by all that decides what
comes out.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from .nvrtc import Nvrtc, nvrtc

# dtype -> its type in kernels/scalar.hpp
TYPES = {"float32": "float", "float64": "double", "float16": "Float16", "bfloat16": "BFloat16"}
HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Module:
    """A source of kernels with the macros that it is compiled with.

    Attributes
    ----------
    source : str
        File in dcn_np/kernels.
    defines : tuple of (str, str)
        Name and value of each macro.
    least_architecture : int
        The lowest compute capability that it runs on.
    """

    source: str
    defines: tuple[tuple[str, str], ...]
    least_architecture: int = 0


@cache
def plain(dtype: Any, position_dtype: Any, ndim: int) -> Module:
    """Return the plain kernels of a dtype, a dtype of offsets and masks, and a rank."""
    types = TYPES[str(dtype)], TYPES[str(position_dtype)]
    return Module("plain.cu", (("DCN_T", types[0]), ("DCN_P", types[1]), ("DCN_NDIM", str(ndim))))


@cache
def copies(dtype: Any) -> Module:
    """Return the kernels that copy and add up arrays of a dtype."""
    return Module("copies.cu", (("DCN_T", TYPES[str(dtype)]),))


@cache
def roi_pool(dtype: Any) -> Module:
    """Return the kernel that pools over regions, in maps of a dtype."""
    return Module("roi_pool.cu", (("DCN_T", TYPES[str(dtype)]),))


@cache
def roi_gradients(dtype: Any) -> Module:
    """Return the kernels that make the gradients of that."""
    return Module("roi_gradients.cu", (("DCN_T", TYPES[str(dtype)]),))


def every_plain_module() -> Iterator[Module]:
    """Yield all that a call can ask for, without the fused kernels."""
    for dtype in TYPES:
        yield copies(dtype)
        yield roi_pool(dtype)
        yield roi_gradients(dtype)
        for position_dtype in (dtype, "float32") if dtype in HALVES else (dtype,):
            for ndim in (1, 2, 3):
                yield plain(dtype, position_dtype, ndim)


def options(module: Module, architecture: int) -> list[str]:
    """Return the options of NVRTC; a float keeps its denormals and its divisions their last bit."""
    return [
        f"-arch=sm_{architecture}",
        "--std=c++17",
        *(f"-D{name}={value}" for name, value in module.defines),
    ]


@cache
def _texts() -> dict[str, str]:
    folder = resources.files("dcn_np.kernels")
    return {file.name: file.read_text() for file in folder.iterdir() if file.name.endswith((".cu", ".hpp"))}


def compile_module(module: Module, architecture: int, *more: str) -> tuple[bytes, str]:
    """Compile for one architecture; return machine code and log.

    Raises
    ------
    ImportError
        There is no NVRTC.
    RuntimeError
        It does not compile, or NVRTC does not know the architecture.
    """
    compiler = nvrtc(_cuda_major())
    headers = {name: text for name, text in _texts().items() if name.endswith(".hpp")}
    chosen = [*options(module, _known(compiler, architecture)), *more]
    return compiler.compile(module.source, _texts()[module.source], headers, chosen)


def cubin_path(module: Module, architecture: int) -> Path:
    """Return the file with a module's machine code, compiled now if need be."""
    compiler = nvrtc(_cuda_major())
    key = hashlib.sha256()
    for part in (
        *(f"{name}\n{text}" for name, text in sorted(_texts().items())),
        *(module.source, *options(module, _known(compiler, architecture)), str(compiler.version)),
    ):
        key.update(f"{len(part)}:{part}".encode())
    name = f"{module.source.removesuffix('.cu')}-{architecture}-{key.hexdigest()[:32]}.cubin"
    with _lock:
        path = cache_folder() / name
        if not _is_whole(path):
            _write(path, compile_module(module, architecture)[0])
        return path


_lock = threading.Lock()


def _known(compiler: Nvrtc, architecture: int) -> int:
    """Return the architecture to compile for: the device's, or the newest older one whose code it runs."""
    known = compiler.architectures
    usable = [
        candidate
        for candidate in known
        if candidate // 10 == architecture // 10 and candidate <= architecture
    ]
    if not usable:
        version = ".".join(map(str, compiler.version))
        raise RuntimeError(
            f"NVRTC {version} compiles for compute capability {_dotted(min(known))} to "
            f"{_dotted(max(known))}; this GPU has {_dotted(architecture)}: "
            + (
                'pip install "dcn_np[cuda12]" has one that knows older GPUs'
                if architecture < min(known)
                else "a newer nvidia-cuda-nvrtc may know it"
            )
        )
    return max(usable)


def _dotted(architecture: int) -> str:
    return f"{architecture // 10}.{architecture % 10}"


def _cuda_major() -> int | None:
    """Return the major version of CUDA that CuPy was built for, which NVRTC should have too; None without."""
    cupy = sys.modules.get("cupy")
    version = getattr(getattr(getattr(cupy, "cuda", None), "runtime", None), "runtimeGetVersion", None)
    return None if version is None else version() // 1000


# ---- the folder on disk


@cache
def cache_folder() -> Path:
    """Return the folder of compiled kernels: DCN_NP_CACHE_DIR, or dcn_np in the user's cache.

    Where there is none, or it cannot be written or belongs to somebody else, a folder that ends with the
    process takes its place: code is loaded from here, so nobody else may put any there.
    """
    chosen = os.environ.get("DCN_NP_CACHE_DIR")
    try:
        folder = Path(chosen) if chosen else _users_cache() / "dcn_np"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_ours(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    temporary = tempfile.TemporaryDirectory(prefix="dcn_np-")
    _kept.append(temporary)
    return Path(temporary.name)


def _users_cache() -> Path:
    """Return the user's folder for caches; RuntimeError where there is no such user, as in containers."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _is_ours(folder: Path) -> bool:
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_whole(path: Path) -> bool:
    """Tell whether the file is there and as it was written: a digest stands beside it."""
    try:
        return path.with_suffix(".sha256").read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def _write(path: Path, content: bytes) -> None:
    replace_file(path, content)
    replace_file(path.with_suffix(".sha256"), hashlib.sha256(content).hexdigest().encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step, whoever else writes it at the same time."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
