"""Files of state dicts: .npz and safetensors. `dcn_np.layers` has these functions for its users."""

from __future__ import annotations

import importlib
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy

from .arrays import Array, on_host
from .messages import shown

Path = str | os.PathLike[str]


def save_npz(path: Path, state: Mapping[str, Array]) -> None:
    """Write a state dict to a file that `numpy.load` reads.

    Parameters
    ----------
    path : str or os.PathLike
        The file, replaced if it is there. Nothing is added to its name.
    state : mapping of str to array
        Arrays of NumPy or CuPy.

    Raises
    ------
    TypeError
        A value is no array, or has a dtype that the format cannot say: Python objects, bfloat16.

    See Also
    --------
    load_npz : The way back.
    save_safetensors : The same for a format that has bfloat16.
    """
    arrays = _on_host(state)
    for key, value in arrays.items():
        if value.dtype.hasobject or value.dtype.kind == "V":
            raise TypeError(
                f"{key} has dtype {value.dtype}; wanted one that NumPy's files have, such as float32"
            )
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                numpy.lib.format.write_array(file, value, allow_pickle=False)


def load_npz(path: Path) -> dict[str, Array]:
    """Read a state dict that `save_npz` or `numpy.savez` wrote; nothing in the file is run.

    Parameters
    ----------
    path : str or os.PathLike
        The file.

    Returns
    -------
    dict of str to numpy.ndarray
        All arrays of the file.

    Raises
    ------
    ValueError
        The file is no .npz file, or is broken, or holds Python objects.

    See Also
    --------
    save_npz : The way back.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            raise ValueError(f"path is {path!r}, no .npz file; wanted what save_npz or numpy.savez writes")
        file.seek(0)
        try:
            with numpy.load(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        except MemoryError:
            raise
        except Exception as error:  # of zipfile, zlib and NumPy, which raise of many kinds
            raise ValueError(f"path is {path!r}, a broken .npz file: {error}") from error


def save_safetensors(path: Path, state: Mapping[str, Array]) -> None:
    """Write a state dict to a .safetensors file, by the package safetensors.

    Parameters
    ----------
    path : str or os.PathLike
        The file, replaced if it is there.
    state : mapping of str to array
        Arrays of NumPy or CuPy.

    Raises
    ------
    ImportError
        The package safetensors is not installed.
    TypeError
        A value is no array.

    See Also
    --------
    load_safetensors : The way back.
    """
    arrays = _on_host(state)
    _safetensors().save_file(arrays, os.fspath(path))


def load_safetensors(path: Path) -> dict[str, Array]:
    """Read a .safetensors file, by the package safetensors.

    Parameters
    ----------
    path : str or os.PathLike
        The file.

    Returns
    -------
    dict of str to numpy.ndarray
        All arrays of the file.

    Raises
    ------
    ImportError
        The package safetensors is not installed.
    ValueError
        The file is no .safetensors file, or is broken.

    See Also
    --------
    save_safetensors : The way back.
    """
    try:
        loaded: dict[str, Array] = _safetensors().load_file(os.fspath(path))
    except (ImportError, OSError, MemoryError):
        raise
    except Exception as error:  # the package's own kind is no ValueError
        raise ValueError(f"path is {path!r}, no .safetensors file or a broken one: {error}") from error
    return loaded


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise ImportError(
            "files of safetensors need the package safetensors: pip install safetensors"
        ) from error


def _on_host(state: Mapping[str, Array]) -> dict[str, Array]:
    """Return a state dict's arrays in NumPy's, C-contiguous."""
    arrays = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"state has the key {shown(key)}; wanted strings")
        arrays[key] = numpy.asarray(on_host(key, value), order="C")
    return arrays
