"""What a GPU kernel is launched with: the record that it is given, and what runs it.

`ARGUMENTS_DTYPE` has the bytes of `Arguments` in kernels/arguments.hpp, `ROI_ARGUMENTS_DTYPE` those of
`RoIArguments` in kernels/roi_arguments.hpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy

from ..geometry import GEOMETRY_DTYPE, RANKS, Geometry
from ..roi_geometry import ROI_GEOMETRY_DTYPE

if TYPE_CHECKING:
    from .modules import Module

ARRAY_DTYPE = numpy.dtype(
    [
        ("data", numpy.uint64),
        ("batch", numpy.int64),
        ("channel", numpy.int64),
        ("axis", numpy.int64, (max(RANKS),)),
    ]
)
_ARRAYS = ("x", "grad_x", "offset", "mask", "output", "grad_offset", "grad_mask")
_ROI_ARRAYS = (*_ARRAYS, "rois")
_POINTERS = ("bias", "weight", "between")
_ROI_POINTERS = ("bins", "boxes")
ARGUMENTS_DTYPE = numpy.dtype(
    [
        ("geometry", GEOMETRY_DTYPE),
        *((name, ARRAY_DTYPE) for name in _ARRAYS),
        *((name, numpy.uint64) for name in _POINTERS),
        *((name, numpy.int64) for name in ("first", "count", "parts")),
    ]
)
ROI_ARGUMENTS_DTYPE = numpy.dtype(
    [
        ("geometry", ROI_GEOMETRY_DTYPE),
        *((name, ARRAY_DTYPE) for name in _ROI_ARRAYS),
        *((name, numpy.uint64) for name in _ROI_POINTERS),
        *((name, numpy.int64) for name in ("first", "count", "float_rois", "float_positions")),
    ]
)
_RECORDS = {GEOMETRY_DTYPE: ARGUMENTS_DTYPE, ROI_GEOMETRY_DTYPE: ROI_ARGUMENTS_DTYPE}

# Blocks along the one axis of a grid: CUDA takes 2^31 - 1.
MOST_BLOCKS = 2**30


@dataclass(frozen=True)
class Launch:
    """A kernel for one problem.

    Attributes
    ----------
    module : Module
        The compilation that it is in.
    kernel : str
        Its name.
    blocks : int
        Blocks for each tile of positions.
    positions : int
        Positions of a tile.
    threads, shared : int
        Threads and bytes of dynamic shared memory per block.
    tile : str
        Which of several it is.
    time : float
        Of one block, predicted, in units of nothing: to choose among several.
    """

    module: Module
    kernel: str
    blocks: int
    positions: int
    threads: int = 256
    shared: int = 0
    tile: str = ""
    time: float = 0.0


class Device(Protocol):
    """Where kernels run: allocates arrays and launches, all in the order of one stream.

    An array has `shape`, `strides` in bytes and `dtype`, whatever library it is of.
    """

    @property
    def name(self) -> str:
        """What the maker calls it."""

    @property
    def architecture(self) -> int:
        """The compute capability as one number, such as 90."""

    @property
    def multiprocessors(self) -> int:
        """How many blocks run side by side, at least."""

    @property
    def most_shared(self) -> int:
        """The most bytes of shared memory that a block may have."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a new array in C order."""

    def empty_like(self, array: Any, shape: tuple[int, ...]) -> Any:
        """Return a new array with the dtype and memory order of another."""

    def fill_with_zeros(self, array: Any) -> None:
        """Write zeros to an array without gaps, in any order of axes."""

    def pointer(self, array: Any) -> int:
        """Return the address of the first element."""

    def launch(self, launch: Launch, blocks: int, record: Any) -> None:
        """Run a kernel with so many blocks."""

    def seconds(self, launch: Launch, blocks: int, record: Any) -> float | None:
        """Run a kernel several times and return what one run takes; None where it cannot be timed now."""


def arguments(device: Device, geometry: numpy.ndarray[Any, Any], **fields: Any) -> numpy.ndarray[Any, Any]:
    """Return the record for one launch: arrays by name, numbers as they are; what is left out is 0.

    Parameters
    ----------
    device : Device
        Whose arrays these are.
    geometry : numpy.ndarray
        A record of GEOMETRY_DTYPE or ROI_GEOMETRY_DTYPE.
    **fields
        Fields of the result's dtype; None is left out.

    Returns
    -------
    numpy.ndarray
        Shape (1,), dtype ARGUMENTS_DTYPE or ROI_ARGUMENTS_DTYPE.
    """
    record = numpy.zeros(1, _RECORDS[geometry.dtype])
    record["geometry"] = geometry
    for name, value in fields.items():
        if value is None:
            continue
        if name in _ROI_ARRAYS:
            place(record[name][0], device.pointer(value), value.strides)
        else:
            record[name] = device.pointer(value) if name in _POINTERS + _ROI_POINTERS else value
    return record


def place(record: Any, pointer: int, strides: tuple[int, ...]) -> None:
    """Fill in where an array (batch, channels, *axes) lies, or one without axes."""
    record["data"], record["batch"], record["channel"] = pointer, strides[0], strides[1]
    record["axis"][: len(strides) - 2] = strides[2:]


def shape_record(batch: int, channels: int, axes: tuple[int, ...]) -> numpy.ndarray[Any, Any]:
    """Return a geometry that says the shape of an array, as the kernels of copies.cu want it."""
    record = numpy.ones((), GEOMETRY_DTYPE)
    record["ndim"], record["batch"], record["in_channels"] = len(axes), batch, channels
    record["input"][: len(axes)] = axes
    return record


def positions_of(geometry: Geometry) -> int:
    """Return the number of output positions of all images."""
    count = geometry.batch
    for extent in geometry.output:
        count *= extent
    return count
