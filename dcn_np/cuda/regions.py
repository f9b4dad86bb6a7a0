"""Which kernels a pooling over regions launches, as engine.py says it for convolutions."""

from __future__ import annotations

import math
from typing import Any

import numpy

from ..backends import RoIGradients
from ..roi_geometry import RoIGeometry
from .copying import Copying, pieces
from .launching import MOST_BLOCKS, Device, Launch, arguments
from .modules import roi_pool as kernels

# Bins, and parts, of a block of roi_pool.cu; bytes of the sums of a warp, one for each channel.
_BINS, _BYTES = 8, 512


def roi_pool(device: Device, geometry: RoIGeometry, x: Any, rois: Any, offset: Any, mask: Any) -> Any:
    """Compute the average of every bin into a new array in x's memory order."""
    out = device.empty_like(x, geometry.output_shape)
    if not math.prod(geometry.output_shape):
        return out
    work = _Work(device, geometry, rois, offset, mask)
    work.over_bins("average_bins", x=work.channels_last(work.in_slices(x)), output=out)
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
        work.over_bins("scatter_bins", output=grads, grad_x=sums)
        if sums is not result:
            work.copy("copy_sums", sums, result)
    if geometry.rois and needs & {"offset", "mask"}:
        last = work.channels_last(work.in_slices(x))
        work.over_parts(x=last, output=grads, grad_offset=gradients.offset, grad_mask=gradients.mask)
    return gradients


class _Work(Copying):
    """One call on a device: its launches and the arrays between them."""

    def __init__(self, device: Device, geometry: RoIGeometry, rois: Any, offset: Any, mask: Any) -> None:
        super().__init__(device, geometry.dtype)
        self.geometry = geometry
        self.module = kernels(geometry.dtype)
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

    def over_bins(self, kernel: str, **fields: Any) -> None:
        """Launch a kernel over the bins of all regions, for each block of channels of each class."""
        geometry = self.geometry
        channels = _BYTES // self.sum_dtype.itemsize
        blocks = geometry.classes * -(-(geometry.outputs // geometry.classes) // channels)
        self._over(kernel, blocks, geometry.rois * math.prod(geometry.output), fields)

    def over_parts(self, **fields: Any) -> None:
        """Sum the gradients of offsets and masks: in each part of a region, for each class."""
        geometry = self.geometry
        self._over("sum_parts", 1, geometry.rois * geometry.classes * math.prod(geometry.part), fields)

    def _over(self, kernel: str, blocks: int, total: int, fields: dict[str, Any]) -> None:
        """Launch a kernel with `blocks` for every _BINS items, a part of them where a grid has no room."""
        launch = Launch(self.module, kernel, blocks, _BINS)
        if not blocks:
            return
        for first, count in pieces(total, max(1, MOST_BLOCKS // blocks) * _BINS):
            record = arguments(
                self.device, self.geometry.struct, first=first, count=count, **self.given, **fields
            )
            self.device.launch(launch, -(-count // _BINS) * blocks, record)
