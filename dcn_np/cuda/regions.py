"""Which kernels a pooling over regions launches, as engine.py says it for convolutions."""

from __future__ import annotations

import math
from typing import Any

import numpy

from ..backends import RoIGradients
from ..roi_geometry import RoIGeometry
from .copying import Copying, pieces
from .launching import MOST_BLOCKS, Device, Launch, arguments
from .modules import Module
from .modules import roi_gradients as gradient_kernels
from .modules import roi_pool as kernels

# Bins of a block, or parts; bytes of the sums of a warp, one for each channel.
_BINS, _BYTES = 8, 512

# The side of a tile of pixels; threads of a block.
_SIDE, _THREADS, _LOCATORS = 8, 256, 64

# Of what is kept of a bin and of a region for grad_x; and of all of that at a time.
_BIN_BYTES, _BOX_BYTES, _KEPT_BYTES = 288, 40, 2**28


def roi_pool(device: Device, geometry: RoIGeometry, x: Any, rois: Any, offset: Any, mask: Any) -> Any:
    """Compute the average of every bin into a new array in x's memory order."""
    out = device.empty_like(x, geometry.output_shape)
    if not math.prod(geometry.output_shape):
        return out
    work = _Work(device, geometry, rois, offset, mask)
    work.average_bins(x=work.channels_last(work.in_slices(x)), output=out)
    return out


def roi_pool_backward(
    device: Device,
    geometry: RoIGeometry,
    grad_output: Any,
    x: Any,
    rois: Any,
    offset: Any,
    mask: Any,
    needs: frozenset[str],
) -> RoIGradients:
    """Compute the gradients in `needs`, each in its input's memory order."""
    inputs = {"x": x, "offset": offset, "mask": mask}
    gradients = RoIGradients(
        **{name: device.empty_like(array, array.shape) for name, array in inputs.items() if name in needs}
    )
    if not needs:
        return gradients
    work = _Work(device, geometry, rois, offset, mask)
    grads = work.channels_last(grad_output)
    if gradients.x is not None:
        result = work.in_slices(gradients.x)
        sums = work.sums_of(result)
        device.fill_with_zeros(sums)
        work.sum_tiles(grads, sums)
        if sums is not result:
            work.copy("copy_sums", sums, result)
    if geometry.rois and needs & {"offset", "mask"}:
        last = work.channels_last(work.in_slices(x))
        work.sum_parts(x=last, output=grads, grad_offset=gradients.offset, grad_mask=gradients.mask)
    return gradients


class _Work(Copying):
    """One call on a device: its launches and the arrays between them."""

    def __init__(self, device: Device, geometry: RoIGeometry, rois: Any, offset: Any, mask: Any) -> None:
        super().__init__(device, geometry.dtype)
        self.geometry = geometry
        self.gradient_kernels = gradient_kernels(geometry.dtype)
        self.given = {
            "rois": rois,
            "offset": offset,
            "mask": mask,
            "float_rois": rois.dtype == numpy.float32,
            "float_positions": geometry.position_dtype == numpy.float32,
        }

    def in_slices(self, images: Any) -> Any:
        """Return a view (batch, outputs, slices, height, width) of images."""
        geometry = self.geometry
        return images.reshape(geometry.batch, geometry.outputs, geometry.group**2, *geometry.input)

    def average_bins(self, **fields: Any) -> None:
        """Average the bins of all regions, for each block of channels."""
        geometry = self.geometry
        bins = geometry.rois * math.prod(geometry.output)
        self._over(kernels(geometry.dtype), "average_bins", self._channel_blocks(), bins, fields)

    def sum_tiles(self, grads: Any, sums: Any) -> None:
        """Add the gradients of all bins to `sums`: to each pixel in the order of regions and bins."""
        geometry = self.geometry
        bins = geometry.classes * math.prod(geometry.output)
        at_once = max(1, min(geometry.rois, _KEPT_BYTES // (bins * _BIN_BYTES)))
        fields = {
            "output": grads,
            "grad_x": sums,
            "bins": self.device.empty((at_once * bins * _BIN_BYTES // 8,), numpy.float64),
            "boxes": self.device.empty((at_once * geometry.classes * _BOX_BYTES // 8,), numpy.float64),
        }
        tiles = geometry.batch * math.prod(-(-extent // _SIDE) for extent in geometry.input)
        blocks = self._channel_blocks() * geometry.group**2 * tiles
        module = self.gradient_kernels
        for first, count in pieces(geometry.rois if blocks else 0, at_once):
            numbers = {"first": first, "count": count}
            self._launch(module, "locate_bins", count * geometry.classes, _LOCATORS, fields | numbers)
            self._launch(module, "sum_tiles", blocks, _THREADS, fields | numbers)

    def sum_parts(self, **fields: Any) -> None:
        """Sum the gradients of offsets and masks: in each part of a region, for each class."""
        geometry = self.geometry
        parts = geometry.rois * geometry.classes * math.prod(geometry.part)
        self._over(self.gradient_kernels, "sum_parts", 1, parts, fields)

    def _over(self, module: Module, kernel: str, blocks: int, total: int, fields: dict[str, Any]) -> None:
        """Launch a kernel with `blocks` for every _BINS items, a part of them where a grid has no room."""
        for first, count in pieces(total, max(1, MOST_BLOCKS // blocks) * _BINS):
            numbers = {"first": first, "count": count}
            self._launch(module, kernel, -(-count // _BINS) * blocks, _THREADS, fields | numbers)

    def _channel_blocks(self) -> int:
        """Return how many blocks of channels there are, none of which is of two classes."""
        classes, outputs = self.geometry.classes, self.geometry.outputs
        return classes * -(-(outputs // classes) // (_BYTES // self.sum_dtype.itemsize))

    def _launch(self, module: Module, kernel: str, blocks: int, threads: int, fields: dict[str, Any]) -> None:
        record = arguments(self.device, self.geometry.struct, **self.given, **fields)
        self.device.launch(Launch(module, kernel, blocks, 1, threads), blocks, record)
