"""Which kernels a call launches, in which order, with what between them.

Nothing here knows CuPy: a `Device` allocates and launches, so that the tests run this on an emulated one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..backends import Gradients
from ..geometry import Geometry
from . import fused, tuning
from .copying import COPY_TILE, Copying, channels_last, pieces
from .launching import MOST_BLOCKS, Device, Launch, arguments, positions_of, shape_record
from .modules import plain

# Tile sizes of the plain kernels.
_TILE, _WARP, _THREADS = 64, 32, 256

# Fewer outputs or channels per group than this leave most of a tile empty.
_LEAST_IN_TILE = 16
_LEAST_WEIGHTS_IN_TILE = 256

# A sum over positions is cut into parts of about this many positions, at most so many parts: a function of
# the geometry alone, so that the bits do not depend on the device.
_POSITIONS_PER_PART = 1024
_MOST_PARTS = 64
_MOST_WORK_ITEMS = 4096

# With deterministic=True the gradients of the columns are kept, for as many positions as fit in this.
_COLUMNS_BYTES = 2**28


def deform_conv(
    device: Device,
    geometry: Geometry,
    x: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    bias: Any,
    out: Any,
    float32_matmul: str,
) -> Any:
    """Compute the forward pass into `out`, or a new array in x's memory order."""
    if out is None:
        out = device.empty_like(x, geometry.output_shape)
    if not math.prod(geometry.output_shape):
        return out
    work = _Work(device, geometry)
    given = {
        "offset": offset,
        "mask": mask,
        "bias": None if bias is None else work.contiguous(bias),
        "output": out,
    }
    launches = fused.forward_launches(geometry, float32_matmul, device)
    if launches:
        fields = {"x": work.chunked(x), "weight": work.packed(weight, (2, 0, 1)), **given}
        work.over_positions(work.chosen(launches, **fields), **fields)
        return out
    launch = work.plain_launch("direct_forward", -(-geometry.out_channels // _WARP), _THREADS // _WARP)
    outputs = geometry.out_channels // geometry.groups
    if outputs >= _LEAST_IN_TILE:
        launch = work.plain_launch("tiled_forward", geometry.groups * -(-outputs // _TILE), _TILE)
    channels_last, packed = work.channels_last(x), work.packed(weight, (2, 1, 0))
    work.over_positions(launch, x=channels_last, weight=packed, **given)
    return out


def new_gradients(
    device: Device, geometry: Geometry, x: Any, offset: Any, mask: Any, weight: Any, needs: frozenset[str]
) -> Gradients:
    """Return arrays for the gradients in `needs`, each in its input's memory order."""
    inputs = {"x": x, "offset": offset, "mask": mask, "weight": weight}
    like = {name: inputs[name] for name in inputs if name in needs}
    gradients = Gradients(**{name: device.empty_like(array, array.shape) for name, array in like.items()})
    if "bias" in needs:
        gradients = gradients._replace(bias=device.empty((geometry.out_channels,), geometry.dtype))
    return gradients


def deform_conv_backward(
    device: Device,
    geometry: Geometry,
    grad_output: Any,
    x: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    gradients: Gradients,
    deterministic: bool,
    float32_matmul: str,
) -> None:
    """Compute the gradients into those arrays that are given, without gaps between their elements."""
    work = _Work(device, geometry)
    needs = {name for name, array in gradients._asdict().items() if array is not None}
    if not positions_of(geometry):
        for gradient in gradients:
            if gradient is not None:
                device.fill_with_zeros(gradient)
        return

    if not needs:
        return
    positions = weights = []
    parts = work.parts_of_weights()
    if needs & {"x", "offset", "mask"}:
        positions = fused.positions_launches(geometry, float32_matmul, device)
    if "weight" in needs:
        weights = fused.weights_launches(geometry, float32_matmul, device, parts)
    read = work.chunked if positions or weights else work.channels_last
    given = {"offset": offset, "mask": mask, "output": read(grad_output)}
    if needs != {"bias"}:
        given["x"] = read(x)
    if needs & {"x", "offset", "mask"}:
        _walk_positions(work, positions, given, weight, gradients, deterministic)
    if gradients.weight is not None and gradients.weight.size:
        _sum_weights(work, weights, parts, given, gradients.weight)
    if gradients.bias is not None:
        _sum_positions(work, given["output"], gradients.bias)


def _walk_positions(
    work: _Work,
    launches: list[Launch],
    given: dict[str, Any],
    weight: Any,
    gradients: Gradients,
    deterministic: bool,
) -> None:
    geometry = work.geometry
    sums = None if gradients.x is None else work.sums_of(gradients.x)
    fields = {**given, "grad_x": sums, "grad_offset": gradients.offset, "grad_mask": gradients.mask}
    if launches:
        fields["weight"] = work.packed(weight, (2, 1, 0))
        launch = work.chosen(launches, **fields)
    else:
        shared = (
            geometry.out_channels // geometry.groups,
            geometry.in_channels // max(geometry.groups, geometry.offset_groups),
        )
        kernel = "tiled_positions" if min(shared) >= _LEAST_IN_TILE else "direct_positions"
        launch = work.plain_launch(kernel, geometry.taps * geometry.offset_groups, _TILE)
        fields["weight"] = work.packed(weight, (2, 0, 1))
    if sums is not None:
        work.device.fill_with_zeros(sums)
    if deterministic and sums is not None:
        work.over_positions(launch, _add_in_order(work, fields), _positions_kept(work), **fields)
    else:
        work.over_positions(launch, **fields)
    if sums is not None and sums is not gradients.x:
        work.copy("copy_sums", sums, gradients.x)


def _positions_kept(work: _Work) -> int:
    """Return of how many positions the gradients of the columns are kept, whole images if possible."""
    geometry = work.geometry
    per_position = max(1, geometry.taps * geometry.in_channels * work.sum_dtype.itemsize)
    kept = max(1, min(positions_of(geometry), _COLUMNS_BYTES // per_position))
    per_image = math.prod(geometry.output)
    return kept // per_image * per_image or kept


def _add_in_order(work: _Work, fields: dict[str, Any]) -> Callable[[int, int, Any], Any]:
    """Return what to do with the columns' gradients of some positions once they are there."""
    geometry = work.geometry
    per_image = math.prod(geometry.output)
    given = {name: fields[name] for name in ("x", "offset", "mask", "grad_x")}

    def add(first: int, count: int, columns: Any) -> None:
        images = (first + count - 1) // per_image - first // per_image + 1
        blocks = images * -(-geometry.in_channels // _THREADS)
        numbers = {"first": first, "count": count}
        work.launch(work.plain, "add_in_order", blocks, geometry.struct, between=columns, **numbers, **given)

    return add


def _sum_weights(work: _Work, launches: list[Launch], parts: int, given: dict[str, Any], result: Any) -> None:
    geometry = work.geometry
    outputs, channels = geometry.out_channels // geometry.groups, geometry.in_channels // geometry.groups
    fields = {
        **given,
        "parts": parts,
        "between": work.device.empty((parts, geometry.taps, geometry.out_channels, channels), work.sum_dtype),
    }
    if launches:
        launch = work.chosen(launches, **fields)
    else:
        kernel, blocks = "direct_weights", -(-geometry.out_channels * channels // _THREADS)
        if outputs * channels >= _LEAST_WEIGHTS_IN_TILE:
            kernel, blocks = "tiled_weights", -(-channels // _TILE) * -(-outputs // _TILE) * geometry.groups
        launch = work.plain_launch(kernel, blocks * geometry.taps * parts, positions_of(geometry))
    work.over_positions(launch, **fields)
    work.add_parts(fields["between"], result)


def _sum_positions(work: _Work, grads: Any, result: Any) -> None:
    """Add `grads` over images and positions."""
    if not result.size:
        return
    parts = work.parts()
    sums = work.device.empty((parts, 1, grads.shape[1], 1), work.sum_dtype)
    record = shape_record(grads.shape[0], grads.shape[1], grads.shape[2:])
    blocks = parts * -(-grads.shape[1] // COPY_TILE)
    work.launch(work.copies, "add_positions", blocks, record, x=grads, between=sums, parts=parts)
    work.add_parts(sums, result.reshape(-1, 1, 1))


class _Work(Copying):
    """One call on a device: its launches and the arrays between them."""

    def __init__(self, device: Device, geometry: Geometry) -> None:
        super().__init__(device, geometry.dtype)
        self.geometry = geometry
        self.plain = plain(geometry.dtype, geometry.position_dtype, geometry.ndim)

    def plain_launch(self, kernel: str, blocks: int, positions: int) -> Launch:
        """Return the launch of a plain kernel."""
        return Launch(self.plain, kernel, blocks, positions)

    def over_positions(
        self,
        launch: Launch,
        then: Callable[[int, int, Any], Any] | None = None,
        most: int | None = None,
        **fields: Any,
    ) -> None:
        """Launch a kernel over all positions, a part of them at a time where a grid has no room.

        With `then`, the kernel also leaves the gradients of the columns of at most `most` positions between
        it and a call of `then`.
        """
        at_once = max(1, MOST_BLOCKS // launch.blocks) * launch.positions
        if then is not None and most is not None:
            at_once = min(at_once, most)
            shape = (at_once, self.geometry.taps, self.geometry.in_channels)
            fields["between"] = self.device.empty(shape, self.sum_dtype)
        for first, count in pieces(positions_of(self.geometry), at_once):
            self.device.launch(launch, *self._piece(launch, first, count, fields))
            if then is not None:
                then(first, count, fields["between"])

    def chosen(self, launches: list[Launch], **fields: Any) -> Launch:
        """Return the launch to use; where they are timed, what they write is garbage afterwards."""

        def seconds(launch: Launch) -> float | None:
            count = min(positions_of(self.geometry), max(1, MOST_BLOCKS // launch.blocks) * launch.positions)
            return self.device.seconds(launch, *self._piece(launch, 0, count, fields))

        return tuning.chosen(self.device, self.geometry, launches, seconds)

    def _piece(self, launch: Launch, first: int, count: int, fields: dict[str, Any]) -> tuple[int, Any]:
        """Return blocks and record for some of the positions."""
        record = arguments(self.device, self.geometry.struct, first=first, count=count, **fields)
        return -(-count // launch.positions) * launch.blocks, record

    def chunked(self, array: Any) -> Any:
        """Return images without gaps, channels-last, on a border of 16 bytes: itself, or a copy."""
        channels, height, width = array.shape[1:]
        pixel = channels * array.dtype.itemsize
        wanted = (height * width * pixel, array.dtype.itemsize, width * pixel, pixel)
        extents = zip(array.shape, array.strides, wanted, strict=True)
        dense = all(stride == right for extent, stride, right in extents if extent > 1)
        if dense and self.device.pointer(array) % 16 == 0:
            return array
        return self.copy("copy", array, channels_last(self.device, array.shape, array.dtype))

    def packed(self, weight: Any, order: tuple[int, int, int]) -> Any:
        """Return the weights with (out_channels, channels, taps) in another order of axes, contiguous."""
        outputs, channels, *kernel = weight.shape
        shape = (outputs, channels, math.prod(kernel))
        packed = self.device.empty(tuple(shape[axis] for axis in order), weight.dtype)
        view = packed.transpose([order.index(axis) for axis in range(3)]).reshape(weight.shape)
        self.copy("copy", weight, view)
        return packed

    def contiguous(self, vector: Any) -> Any:
        """Return a vector without gaps: itself, or a copy."""
        if vector.strides[0] == vector.dtype.itemsize or vector.size <= 1:
            return vector
        new = self.device.empty(vector.shape, vector.dtype)
        self.copy("copy", vector.reshape(-1, 1, 1), new.reshape(-1, 1, 1))
        return new

    def parts(self, most: int = _MOST_PARTS) -> int:
        """Return into how many parts a sum over positions is cut."""
        return max(1, min(most, positions_of(self.geometry) // _POSITIONS_PER_PART))

    def parts_of_weights(self) -> int:
        """Return the same for the weights' gradient: the more numbers it has, the fewer parts fill a GPU."""
        geometry = self.geometry
        outputs, channels = geometry.out_channels // geometry.groups, geometry.in_channels // geometry.groups
        tiles = geometry.groups * -(-outputs // _TILE) * -(-channels // _TILE) * geometry.taps
        return self.parts(min(_MOST_PARTS, -(-_MOST_WORK_ITEMS // max(1, tiles))))

    def add_parts(self, sums: Any, result: Any) -> None:
        """Add partial sums (parts, taps, outputs, channels) to a result (outputs, channels, *axes)."""
        parts, taps, outputs, channels = sums.shape
        record = shape_record(outputs, channels, result.shape[2:])
        blocks = taps * -(-outputs * channels // _THREADS)
        self.launch(self.copies, "add_parts", blocks, record, between=sums, output=result, parts=parts)
