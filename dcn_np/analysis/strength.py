"""How much each sampling location counts: the gradient of a node by the place that is read."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray

from ..deform_conv import modulated_deform_conv_backward
from ..docstrings import documented
from .arguments import all_on_host, norm_over

Array: TypeAlias = NDArray[Any]

SHARED = {
    "norm": """
norm : {1, 2, numpy.inf}
    What makes one number of the gradient's components along the spatial axes: the sum of their sizes, the
    Euclidean length, or the largest size.""",
    "zhu": """
.. [1] Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", 2018, arXiv:1811.11168,
   section 3.1.""",
}


@documented(SHARED)
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
    grad_output, x, offset, mask, weight = all_on_host(
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
