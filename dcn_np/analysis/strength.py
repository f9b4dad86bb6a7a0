"""How much each sampling or bin location counts: the gradient of a node by the place that is read."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray

from ..arrays import on_host
from ..backends import backend_of
from ..deform_conv import modulated_deform_conv_backward
from ..docstrings import documented
from ..geometry import LARGEST
from ..roi_geometry import RoIGeometry, check_roi_values
from ..roi_pool import modulated_deform_roi_pool_backward
from .arguments import norm_over

Array: TypeAlias = NDArray[Any]

_SHARED = {
    "norm": """
norm : {1, 2, numpy.inf}
    What makes one number of the gradient's components along the spatial axes: the sum of their sizes, the
    Euclidean length, or the largest size.""",
    "zhu": """
.. [1] Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", 2018, arXiv:1811.11168,
   section 3.1.""",
}


@documented(_SHARED)
def effective_sampling(
    grad_output: Any,
    x: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    norm: float = 2,
) -> Array:
    """Tell how much each sampling location of a convolution counts for a node.

    Parameters
    ----------
    grad_output : array, shape (batch, out_channels, *output)
        The gradient of the node with respect to the convolution's output. Where the node is one number of
        that output, all zeros but for a one there.
    x, offset, mask, weight : array
        As for `dcn_np.modulated_deform_conv`. A `mask` of None is all ones; an `offset` of None is the rigid
        grid, for ordinary convolutions.
    stride, padding, dilation : int or sequence
        As there.
    groups, offset_groups : int
        As there.
    {norm}

    Returns
    -------
    numpy.ndarray, shape (batch, offset_groups, taps, *output), float64
        The strength of each location of `sampling_positions`; per pixel of `x`.

    Raises
    ------
    TypeError
        An argument of the wrong kind.
    ValueError
        Numbers that do not fit.

    See Also
    --------
    sampling_positions : Where the locations are.
    effective_bins : The same for bins of a pooling over regions.

    Notes
    -----
    The effective sampling locations of [1]_ are judged by the gradient of the network node with respect to
    the sampling locations. How a gradient becomes one strength is not said there; here it is a norm::

        strength[g, k, p] = || d node / d (position of tap k at p) ||

    over the spatial axes. A position is a constant plus its offset, so this is the norm of the gradient by
    the offset, as `dcn_np.modulated_deform_conv_backward` computes it: the mask is a factor of it, and at
    whole coordinates, where interpolation has a kink, it is the derivative from the right.

    References
    ----------
    {zhu}

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import effective_sampling
    >>> x = numpy.arange(25.0).reshape(1, 1, 5, 5)  # rises by 5 along y and by 1 along x
    >>> node = numpy.zeros((1, 1, 3, 3))
    >>> node[0, 0, 1, 1] = 1
    >>> weight = numpy.array([[[[0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]]])
    >>> effective_sampling(node, x, None, None, weight, norm=1)[0, 0, :, 1, 1]
    array([ 0.,  0.,  0.,  0., 12.,  0.,  0.,  0.,  6.])
    """
    grad_output, x, offset, mask, weight = _all_on_host(
        grad_output=grad_output, x=x, offset=offset, mask=mask, weight=weight
    )
    ndim, taps = x.ndim - 2, math.prod(weight.shape[2:])
    if offset is None:
        shape = (x.shape[0], offset_groups * taps * ndim, *grad_output.shape[2:])
        offset = numpy.zeros(shape, x.dtype if mask is None else mask.dtype)
    window = stride, padding, dilation, groups, offset_groups
    found = modulated_deform_conv_backward(
        grad_output, x, offset, mask, weight, *window, needs=("offset",)
    ).offset
    shape = (x.shape[0], offset_groups, taps, ndim, *found.shape[2:])
    return norm_over(found.reshape(shape), norm, axis=3)


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
    grad_output, x, rois, offset, mask = _all_on_host(
        grad_output=grad_output, x=x, rois=rois, offset=offset, mask=mask
    )
    if offset is None:
        shape = (len(rois), 2, *grad_output.shape[2:])
        offset = numpy.zeros(shape, x.dtype if mask is None else mask.dtype)
    if gamma == 0:
        raise ValueError("gamma is 0; wanted another number: with 0 no bin can move")
    sizes = output_size, spatial_scale, sampling_ratio, gamma
    found = modulated_deform_roi_pool_backward(
        grad_output, x, rois, offset, mask, *sizes, needs=("offset",)
    ).offset
    extents = _box_sizes(rois) * spatial_scale
    return norm_over(found / (gamma * extents)[:, :, None, None], norm, axis=1)


def bin_positions(
    rois: Any, offset: Any, output_size: Any, spatial_scale: float = 1.0, gamma: float = 0.1
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

    Notes
    -----
    Along x, with the box from x1 to x2, the bins of column j have their centres at ::

        x1 * spatial_scale - 0.5 + width * ((j + 0.5) / P_w + gamma * offset[0])
        width = (x2 - x1) * spatial_scale

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import bin_positions
    >>> bin_positions(numpy.array([[0.0, 2, 2, 6, 10]]), None, (2, 1))[0, :, :, 0]
    array([[3.5, 7.5],
           [3.5, 3.5]])
    """
    rois, offset = _all_on_host(rois=rois, offset=offset)
    x = SimpleNamespace(shape=(LARGEST, 1, 1, 1), dtype=rois.dtype)  # a batch that any index is within
    computed = backend_of(rois).dtypes()
    geometry = RoIGeometry.of(computed, x, rois, offset, None, output_size, spatial_scale, 0, gamma)
    check_roi_values(geometry, rois)
    size = (_box_sizes(rois) * geometry.spatial_scale)[:, ::-1, None, None]
    low = rois[:, 2:0:-1, None, None] * geometry.spatial_scale - 0.5
    bins = numpy.array(geometry.output)[:, None, None]
    place = (numpy.indices(geometry.output) + 0.5) / bins
    moved = 0 if offset is None else geometry.offset_scale * offset[:, ::-1].astype(numpy.float64)
    positions: Array = low + size * (place + moved)
    return positions


def _all_on_host(**arrays: Any) -> tuple[Any, ...]:
    """Return arrays as NumPy's, and None where there is none."""
    return tuple(None if array is None else on_host(name, array) for name, array in arrays.items())


def _box_sizes(rois: Array) -> Array:
    """Return (width, height) of each box, in the coordinates of the boxes."""
    boxes = rois.astype(numpy.float64)
    sizes: Array = boxes[:, 3:5] - boxes[:, 1:3]
    empty = ~(sizes > 0).all(axis=1)
    if empty.any():
        first = int(empty.argmax())
        raise ValueError(f"rois[{first}] is {rois[first].tolist()}, an empty box; wanted x1 < x2 and y1 < y2")
    return sizes
