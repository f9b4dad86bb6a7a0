"""Where the bins of a pooling over regions are, and how much the place of each counts for a node."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray

from ..backends import backend_of
from ..docstrings import documented
from ..geometry import LARGEST, checked_flag
from ..roi_geometry import RoIGeometry, check_roi_values
from ..roi_pool import deform_psroi_pool_backward, modulated_deform_roi_pool_backward
from .arguments import all_on_host, norm_over
from .strength import SHARED

Array: TypeAlias = NDArray[Any]

LEAST_SIZE = 0.1  # pixels of the map, of a box by rule P of docs/semantics.md

_SHARED = SHARED | {
    "position_sensitive": """
position_sensitive : bool
    Whether the pooling has the rule of `dcn_np.deform_psroi_pool`, with one group, as layers have that are
    `position_sensitive`: `sampling_ratio` is then its sample_per_part, at least 1, and `gamma` its trans_std.
    Boxes then end with their last pixel, and one without a width or height is not empty.""",
}


@documented(_SHARED)
def bin_positions(
    rois: Any,
    offset: Any,
    output_size: Any,
    spatial_scale: float = 1.0,
    gamma: float = 0.1,
    *,
    position_sensitive: bool = False,
) -> Array:
    """Tell where the centre of each bin of a pooling over regions lies.

    Parameters
    ----------
    rois : array, shape (R, 5)
        Index of the image, x1, y1, x2, y2 of each region.
    offset : array, shape (R, 2, P_h, P_w), or None
        As for `dcn_np.deform_roi_pool`: x first, in parts of the box's size. None is all zeros.
    output_size : int or (int, int)
        Bins along (height, width).
    spatial_scale : float
        From the coordinates of regions to pixels of the map.
    gamma : float
        The factor of the offsets.
    {position_sensitive}

    Returns
    -------
    numpy.ndarray, shape (R, 2, P_h, P_w), float64
        (y, x) of each bin in pixels of the map, as `sampling_positions` has them: other than in offsets, y is
        first.

    Raises
    ------
    TypeError
        An argument of the wrong kind.
    ValueError
        Numbers that do not fit, or an empty box.

    See Also
    --------
    effective_bins : How much each of them counts.
    SampledRegions : The same in pixels of the image.

    Notes
    -----
    Along x, with the box from x1 to x2, the bins of column j have their centres at ::

        x1 * spatial_scale - 0.5 + width * ((j + 0.5) / P_w + gamma * offset[0])
        width = (x2 - x1) * spatial_scale

    and by the rule of `dcn_np.deform_psroi_pool`, where round() is half away from zero, at ::

        round(x1) * spatial_scale - 0.5 + width * ((j + 0.5) / P_w + gamma * offset[0])
        width = max((round(x2) + 1 - round(x1)) * spatial_scale, 0.1)

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import bin_positions
    >>> bin_positions(numpy.array([[0.0, 2, 2, 6, 10]]), None, (2, 1))[0, :, :, 0]
    array([[3.5, 7.5],
           [3.5, 3.5]])
    """
    rois, offset = all_on_host(rois=rois, offset=offset)
    x = SimpleNamespace(shape=(LARGEST, 1, 1, 1), dtype=rois.dtype)  # a batch that any index is within
    computed = backend_of(rois).dtypes()
    if checked_flag("position_sensitive", position_sensitive):
        numbers = 1, 1, output_size, spatial_scale, None, 1, gamma
        geometry = RoIGeometry.of_position_sensitive(computed, x, rois, offset, *numbers)
    else:
        geometry = RoIGeometry.of(computed, x, rois, offset, None, output_size, spatial_scale, 0, gamma)
    check_roi_values(geometry, rois)
    corner, size = _boxes(rois, geometry.spatial_scale, position_sensitive)
    bins = numpy.array(geometry.output)[:, None, None]
    place = (numpy.indices(geometry.output) + 0.5) / bins
    moved = 0 if offset is None else geometry.offset_scale * offset[:, ::-1].astype(numpy.float64)
    positions: Array = corner[:, ::-1, None, None] + size[:, ::-1, None, None] * (place + moved)
    return positions


@documented(_SHARED)
def effective_bins(
    grad_output: Any,
    x: Any,
    rois: Any,
    offset: Any,
    mask: Any,
    output_size: Any,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    *,
    position_sensitive: bool = False,
    norm: float = 2,
) -> Array:
    """Tell how much the location of each bin of a pooling over regions counts for a node.

    Parameters
    ----------
    grad_output : array, shape (R, channels, P_h, P_w)
        The gradient of the node, such as a feature of the region's head, with respect to the pooling's
        output.
    x, rois, offset, mask : array
        As for `dcn_np.modulated_deform_roi_pool`. A `mask` of None is all ones, an `offset` of None all
        zeros.
    output_size : int or (int, int)
        As there.
    spatial_scale : float
        As there.
    sampling_ratio : int
        As there.
    gamma : float
        As there, but not 0.
    {position_sensitive}
    {norm}

    Returns
    -------
    numpy.ndarray, shape (R, P_h, P_w), float64
        The strength of each bin; per pixel of `x`.

    Raises
    ------
    TypeError
        An argument of the wrong kind, or arrays on a GPU.
    ValueError
        Numbers that do not fit, or an empty box.

    See Also
    --------
    effective_sampling : The same for the taps of a convolution.
    bin_positions : Where the bins are.

    Notes
    -----
    As the sampling locations, effective bin locations are judged by the gradient of the node with respect to
    the bin's place [1]_; its norm is taken over the two axes::

        strength[r, b] = || d node / d (position of bin b of region r) ||

    A bin's position is a constant plus gamma * (width, height) * offset, with the size of the box in pixels
    of `x`: this is the gradient by the offset, divided by gamma * (width, height).

    References
    ----------
    {zhu}

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import effective_bins
    >>> x = numpy.arange(64.0).reshape(1, 1, 8, 8)  # rises by 8 along y and by 1 along x
    >>> node = numpy.array([[[[1.0, 0.0], [0.0, 0.5]]]])
    >>> effective_bins(node, x, numpy.array([[0.0, 2, 2, 6, 6]]), None, None, 2, norm=numpy.inf).round(6)
    array([[[8., 0.],
            [0., 4.]]])
    """
    grad_output, x, rois, offset, mask = all_on_host(
        grad_output=grad_output, x=x, rois=rois, offset=offset, mask=mask
    )
    if offset is None:
        shape = (len(rois), 2, *grad_output.shape[2:])
        offset = numpy.zeros(shape, x.dtype if mask is None else mask.dtype)
    if gamma == 0:
        raise ValueError("gamma is 0; wanted another number: with 0 no bin can move")
    needs = ("offset",)
    if checked_flag("position_sensitive", position_sensitive):
        if mask is not None:
            grad_output = (grad_output * mask).astype(grad_output.dtype)
        of_psroi = grad_output.shape[1], 1, output_size, spatial_scale, None, sampling_ratio, gamma
        found = deform_psroi_pool_backward(grad_output, x, rois, offset, *of_psroi, needs=needs).offset
    else:
        sizes = output_size, spatial_scale, sampling_ratio, gamma
        found = modulated_deform_roi_pool_backward(
            grad_output, x, rois, offset, mask, *sizes, needs=needs
        ).offset
    _, extents = _boxes(rois, spatial_scale, position_sensitive)
    return norm_over(found / (gamma * extents)[:, :, None, None], norm, axis=1)


def _boxes(rois: Array, spatial_scale: float, position_sensitive: bool) -> tuple[Array, Array]:
    """Return the first corner (x, y) and the size (width, height) of each box, in pixels of the map."""
    boxes = rois[:, 1:].astype(numpy.float64)
    if position_sensitive:
        whole = numpy.trunc(boxes)
        boxes = whole + numpy.where(numpy.abs(boxes - whole) >= 0.5, numpy.copysign(1, boxes), 0)
        boxes[:, 2:] += 1
    sizes = boxes[:, 2:] - boxes[:, :2]
    empty = ~(sizes > 0).all(axis=1)
    if empty.any():
        first = int(empty.argmax())
        raise ValueError(f"rois[{first}] is {rois[first].tolist()}, an empty box; wanted x1 < x2 and y1 < y2")
    least = LEAST_SIZE if position_sensitive else 0
    return boxes[:, :2] * spatial_scale - 0.5, numpy.maximum(sizes * spatial_scale, least)


@dataclass(frozen=True, eq=False)
class SampledRegions:
    """How a pooling over regions reads its map: the regions, and the offsets and masks that it made of them.

    Parameters
    ----------
    rois : array, shape (R, 5)
        Index of the image, x1, y1, x2, y2 of each region, in pixels of the image.
    output_size : int or (int, int)
        Bins along (height, width).
    spatial_scale : float
        From the coordinates of regions to pixels of the map.
    offset : array, shape (R, 2, P_h, P_w), or None
        As for `dcn_np.deform_roi_pool`; None for bins in their places.
    mask : array, shape (R, 1, P_h, P_w), or None
        Modulation scalars; None for ones.
    gamma : float
        The factor of the offsets.
    position_sensitive : bool
        As for `bin_positions`.

    Attributes
    ----------
    positions : numpy.ndarray, shape (R, 2, P_h, P_w), float64
        (y, x) of the centre of each bin in pixels of the image, whose centres are whole numbers.
    boxes : numpy.ndarray, shape (R, 4), float64
        The borders y1, x1, y2, x2 of each region, likewise: those around pixel 0 are at -0.5 and 0.5.

    Raises
    ------
    TypeError
        An argument of the wrong kind.
    ValueError
        Numbers that do not fit, or an empty box.

    Notes
    -----
    A pooling takes pixel q of its map to lie at ``(q + 0.5) / spatial_scale - 0.5`` of the image, as its
    regions are; so are its bins told here. Windows padded by half of their reach put a feature at
    ``q / spatial_scale``, which is how `view_node` tells the samples of a convolution: by up to half a pixel
    of the map apart.
    """

    rois: Any
    output_size: Any
    spatial_scale: float = 1.0
    offset: Any = None
    mask: Any = None
    gamma: float = 0.1
    position_sensitive: bool = False

    def __post_init__(self) -> None:
        names = "rois", "offset", "mask"
        arrays = all_on_host(**{name: getattr(self, name) for name in names})
        for name, array in zip(names, arrays, strict=True):
            # Of one dtype, whatever the network computes in.
            object.__setattr__(self, name, None if array is None else array.astype(numpy.float64))
        wanted = len(self.positions), 1, *self.positions.shape[2:]
        if self.mask is not None and self.mask.shape != wanted:
            raise ValueError(f"mask has shape {self.mask.shape}; wanted (R, 1, *output_size) = {wanted}")

    @cached_property
    def positions(self) -> Array:
        numbers = self.output_size, self.spatial_scale, self.gamma
        on_map = bin_positions(self.rois, self.offset, *numbers, position_sensitive=self.position_sensitive)
        return (on_map + 0.5) / self.spatial_scale - 0.5

    @cached_property
    def boxes(self) -> Array:
        corner, size = _boxes(self.rois, 1.0, self.position_sensitive)
        return numpy.concatenate([corner[:, ::-1], (corner + size)[:, ::-1]], axis=1)
