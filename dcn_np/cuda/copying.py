"""What every call on a device does with arrays: copies between memory orders, pieces of what has no room."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy

from .launching import Device, Launch, arguments, shape_record
from .modules import Module, copies

# The side of a tile of copies.cu.
COPY_TILE = 32


class Copying:
    """One call on a device, for arrays of one dtype."""

    def __init__(self, device: Device, dtype: numpy.dtype[Any]) -> None:
        self.device = device
        self.sum_dtype = numpy.dtype(numpy.float32 if dtype.itemsize == 2 else dtype)
        self.copies = copies(dtype)

    def launch(self, module: Module, kernel: str, blocks: int, record: Any, **fields: Any) -> None:
        """Launch a kernel that is not for tiles of positions."""
        given = arguments(self.device, record, **fields)
        self.device.launch(Launch(module, kernel, blocks, 1), blocks, given)

    def copy(self, kernel: str, source: Any, destination: Any) -> Any:
        """Copy between memory orders; return the destination."""
        batch, channels, *axes = source.shape
        record = shape_record(batch, channels, tuple(axes))
        blocks = -(-channels // COPY_TILE) * -(-math.prod(axes) // COPY_TILE) * batch
        if blocks:
            self.launch(self.copies, kernel, blocks, record, x=source, output=destination)
        return destination

    def channels_last(self, array: Any) -> Any:
        """Return an array whose channels lie side by side: itself, or a copy."""
        if array.shape[1] == 1 or array.strides[1] == array.dtype.itemsize:
            return array
        return self.copy("copy", array, channels_last(self.device, array.shape, array.dtype))

    def sums_of(self, result: Any) -> Any:
        """Return an array for the sums of grad_x, channels-last: the result itself if it is so."""
        direct = result.dtype == self.sum_dtype and result.strides[1] == result.dtype.itemsize
        return result if direct else channels_last(self.device, result.shape, self.sum_dtype)


def pieces(total: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield first and count of pieces of at most so many."""
    for first in range(0, total, most):
        yield first, min(most, total - first)


def channels_last(device: Device, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a new array whose channels lie side by side."""
    batch, channels, *axes = shape
    last = device.empty((batch, *axes, channels), dtype)
    return last.transpose(0, len(shape) - 1, *range(1, len(shape) - 1))
