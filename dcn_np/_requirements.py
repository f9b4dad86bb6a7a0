"""What must be there, checked before anything else is imported, so that the error names what is wrong.

The syntax of this file is that of Python 3.7: an older one than wanted has to read it.
"""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PYTHON = (3, 11)
NUMPY = (1, 26)

# The numbers of machines in the header of a shared library of Linux.
_MACHINES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}


def check() -> None:
    """Raise an error where Python or NumPy is too old."""
    if sys.version_info < PYTHON:
        raise ImportError(
            f"dcn_np needs Python {_dotted(PYTHON)} or newer; this is Python "
            f"{_dotted(sys.version_info[:3])} ({sys.executable})"
        )
    import numpy

    if tuple(int(part) for part in numpy.__version__.split(".")[:2]) < NUMPY:
        raise ImportError(
            f"dcn_np needs NumPy {_dotted(NUMPY)} or newer; this is NumPy {numpy.__version__} "
            f"({Path(numpy.__file__).parent}): pip install --upgrade numpy"
        )


def engine_problem(folder: Path, error: ImportError) -> str:
    """Say why the extension module in a folder cannot be loaded: what is there, and what is wanted."""
    import sysconfig  # not for those who see no error

    python = f"{sys.implementation.name} {_dotted(sys.version_info[:3])}"
    wanted = f"one for {sysconfig.get_platform()} and {python}, which loads {', '.join(EXTENSION_SUFFIXES)}"
    found = [path for path in sorted(folder.glob("_native.*")) if path.suffix in (".so", ".pyd", ".dylib")]
    if not found:
        cure = "Run `make build` in a source tree that was not built, or pip install it"
        return f"{folder} has no engine, _native{EXTENSION_SUFFIXES[-1]}; wanted {wanted}. {cure}"
    there = ", ".join(path.name + _machine(path) for path in found)
    cure = "Install the wheel for this machine and this Python"
    return f"the engine in {folder} cannot be loaded: {there}; wanted {wanted}. {cure} ({error})"


def _machine(path: Path) -> str:
    with path.open("rb") as file:
        header = file.read(20)
    if header[:4] != b"\x7fELF":
        return ""
    number = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    return f" for {_MACHINES.get(number, f'machine {number}')}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


check()
