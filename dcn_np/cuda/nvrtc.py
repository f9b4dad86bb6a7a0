"""NVRTC, the compiler library of CUDA: kernel text in, machine code for one architecture out.

Called through ctypes, so that neither CUDA headers nor a particular version of CuPy is needed.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

NOT_FOUND = (
    "NVRTC, which compiles the GPU kernels, was not found: install it with "
    "pip install nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12 (CUDA 12), or set CUDA_PATH"
)


class Nvrtc:
    """One loaded NVRTC library.

    Parameters
    ----------
    path : str
        The file, or a name that the dynamic linker finds.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = major.value, minor.value

    @property
    def architectures(self) -> tuple[int, ...]:
        """The compute capabilities it compiles for, such as 75 and 90."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        architectures = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(architectures))
        return tuple(architectures)

    def compile(
        self, name: str, text: str, headers: Mapping[str, str], options: Sequence[str]
    ) -> tuple[bytes, str]:
        """Compile a source; headers are found by name alone.

        Parameters
        ----------
        name : str
            What messages call the source.
        text : str
            The source.
        headers : mapping of str to str
            Name, as the source includes it, to text.
        options : sequence of str
            Options of NVRTC, with ``-arch=sm_..`` among them.

        Returns
        -------
        cubin : bytes
            The machine code.
        log : str
            What the compiler said.

        Raises
        ------
        RuntimeError
            It does not compile; the message holds the compiler's log.
        """
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers))
        self._check(
            self._library.nvrtcCreateProgram(
                ctypes.byref(program), text.encode(), name.encode(), len(headers), texts, names
            )
        )
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), given)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise RuntimeError(f"{name} does not compile with {' '.join(options)}:\n{log}")
            return self._read(program, "CUBIN"), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            reason = self._library.nvrtcGetErrorString(status).decode()
            raise RuntimeError(f"NVRTC ({self.path}) failed: {reason}")


@cache
def nvrtc(major: int | None = None) -> Nvrtc:
    """Return the library, of CUDA `major` if there is one of that.

    Raises
    ------
    ImportError
        There is none.
    """
    found = None
    for path in _candidates():
        try:
            library = Nvrtc(path)
        except OSError:
            continue
        if major in (None, library.version[0]):
            return library
        found = found or library
    if found is None:
        raise ImportError(NOT_FOUND)
    return found


def _candidates() -> Iterator[str]:
    """Yield where it may be: among Python's packages, in CUDA's folder, or where the linker looks."""
    yield from _newest_first(
        path for folder in _package_folders() for path in folder.glob("*/lib/libnvrtc.so.*")
    )
    root = os.environ.get("CUDA_PATH") or os.environ.get("CUDA_HOME")
    if root:
        yield from _newest_first(Path(root).glob("lib64/libnvrtc.so*"))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12")
    named = ctypes.util.find_library("nvrtc")
    if named:
        yield named


def _package_folders() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def _newest_first(paths: Iterable[Path]) -> list[str]:
    named = [path for path in paths if re.fullmatch(r"libnvrtc\.so(\.\d+)*", path.name)]
    return [str(path) for path in sorted(named, key=lambda path: path.name, reverse=True)]
