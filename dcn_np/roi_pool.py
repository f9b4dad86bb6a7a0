"""The public functions that pool over regions of interest, and their gradients.

Regular pooling is deformable pooling without offsets, and that is modulated pooling without masks, so they
are one computation; the position-sensitive form samples by another rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .arrays import Array, kind_of
from .backends import RoIGradients, backend_of
from .docstrings import documented
from .geometry import checked_needs
from .roi_geometry import RoIGeometry, check_roi_grad_output, check_roi_values

Size = int | Sequence[int]

_SHARED = {
    "x": """
x : array, shape (batch, channels, height, width)
    The feature maps: any strides; float32, float64, float16, or bfloat16 of ml_dtypes. All other arrays have
    this dtype and are of the same library, on the same device; beside half maps `rois`, `offset` and `mask`
    may be float32.""",
    "rois": """
rois : array, shape (R, 5)
    The regions: index of the image in `x`, x1, y1, x2, y2, in any order of images. They have no gradient. A
    GPU does not check their values: one that is not finite, or whose image does not exist, gives NaN.""",
    "offset": """
offset : array, shape (R, 2, P_h, P_w), or None
    How far each bin moves, as a part of the region's size, before `gamma`. Channel 0 is x, channel 1 is y:
    the opposite order of `deform_conv`. None leaves the bins in place.""",
    "mask": """
mask : array, shape (R, 1, P_h, P_w), or None
    A factor for each bin, of any value. None is all ones.""",
    "sizes": """
output_size : int or (int, int)
    Bins (P_h, P_w) of each region.
spatial_scale : float
    From the coordinates of `rois` to pixels of `x`: 1/16 for a map of stride 16.
sampling_ratio : int
    Samples of each bin along each axis; 0 takes ceil(size / P) of them, by the region's size in pixels.""",
    "gamma": """
gamma : float
    A bin moves by gamma * (region's size) * offset.""",
    "position_sensitive": """
output_dim : int
    Channels of the result.
group_size : int
    `x` has output_dim * group_size**2 channels: a grid of maps for each output, of which each bin reads one.
output_size : int or (int, int)
    Bins (P_h, P_w) of each region.
spatial_scale : float
    From the coordinates of `rois` to pixels of `x`.
part_size : int, (int, int) or None
    The grid of offsets of a region; None is `output_size`.
sample_per_part : int
    Samples of each bin along each axis.
trans_std : float
    A bin moves by trans_std * (region's size) * offset.""",
    "class_offset": """
offset : array, shape (R, 2 * classes, *part_size), or None
    How far the bins move, as a part of the region's size, before `trans_std`. Channel 2k is x and channel 2k
    + 1 is y of class k; a class is output_dim / classes channels of the result. None leaves the bins in
    place.""",
    "grad_output": """
grad_output : array, shape (R, channels of the result, P_h, P_w)
    The gradient of a scalar with respect to the result of the forward function.""",
    "needs": """
needs : iterable of str
    The names of the gradients to compute; the others cost nothing and are None.""",
    "result": """
array, shape (R, channels, P_h, P_w)
    A new array with the dtype and memory order of `x`.""",
    "gradients": """
RoIGradients
    A named tuple (x, offset, mask). Each gradient has the dtype, shape and memory order of its input; those
    not needed, and those of an input that is None, are None.""",
    "errors": """
TypeError
    An argument of the wrong kind, a dtype that is not computed, arrays of different dtypes.
ValueError
    Shapes or numbers that do not fit; on a CPU, a region that is not finite or whose image does not exist.
MemoryError
    No memory for the result or for the working space.""",
    "rule": """
With start and size of the region in pixels, along each axis of extent E, bin p has its samples at::

    start + (p + (i + 0.5) / samples) * size / P + gamma * size * offset

where start = low * spatial_scale - 0.5: the "aligned" form. A sample below -1 or above E is 0; others
interpolate between the pixels around their point, clamped to [0, E - 1]. All samples count, so a bin that
reaches outside fades. A region of no size has no samples if `sampling_ratio` is 0, and is 0. A NaN in
`offset` makes its bin NaN. The result has the same bits in every run and
for any number of threads. See
docs/semantics.md.""",
    "gradient_rule": """
Each sample gives grad_output * mask / count to the pixels it interpolates, and its derivative to `offset`:
that of the cell to the right at whole coordinates, and 0 where the point was clamped. Gradients are exact in
the bands at the border too.""",
    "dai": """
.. [1] Dai et al., "Deformable Convolutional Networks", 2017, arXiv:1703.06211, section 2.2.""",
    "zhu": """
.. [1] Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", 2018, arXiv:1811.11168,
   eq. (2).""",
}


@documented(_SHARED)
def roi_align(
    x: Array, rois: Array, output_size: Size, spatial_scale: float = 1.0, sampling_ratio: int = 0
) -> Array:
    """Average the samples of a regular grid of bins in each region (RoIAlign).

    Parameters
    ----------
    {x}
    {rois}
    {sizes}

    Returns
    -------
    {result}

    Raises
    ------
    {errors}

    See Also
    --------
    roi_align_backward : The gradient.
    deform_roi_pool : The same with bins that move.

    Notes
    -----
    {rule}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x = numpy.arange(16.0).reshape(1, 1, 4, 4)
    >>> rois = numpy.array([[0.0, 0.0, 0.0, 4.0, 4.0]])
    >>> dcn_np.roi_align(x, rois, output_size=2)
    array([[[[ 2.5,  4.5],
             [10.5, 12.5]]]])
    """
    return modulated_deform_roi_pool(x, rois, None, None, output_size, spatial_scale, sampling_ratio)


@documented(_SHARED)
def roi_align_backward(
    grad_output: Array,
    x: Array,
    rois: Array,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    *,
    needs: Iterable[str] = ("x",),
) -> RoIGradients:
    """Compute the gradient of `roi_align`.

    Parameters
    ----------
    {grad_output}
    {x}
    {rois}
    {sizes}
    {needs}

    Returns
    -------
    {gradients}

    Raises
    ------
    {errors}

    See Also
    --------
    roi_align : The forward function.

    Notes
    -----
    Each sample gives grad_output / count to the pixels it interpolates. The values of `x` do not matter.

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x = numpy.arange(16.0).reshape(1, 1, 4, 4)
    >>> rois = numpy.array([[0.0, 0.0, 0.0, 4.0, 4.0]])
    >>> dcn_np.roi_align_backward(numpy.ones((1, 1, 2, 2)), x, rois, output_size=2).x[0, 0, 0]
    array([0.25, 0.25, 0.25, 0.25])
    """
    return modulated_deform_roi_pool_backward(
        grad_output,
        x,
        rois,
        None,
        None,
        output_size,
        spatial_scale,
        sampling_ratio,
        needs=checked_needs(needs, ("x",)),
    )


@documented(_SHARED)
def deform_roi_pool(
    x: Array,
    rois: Array,
    offset: Array | None,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Array:
    """Average the samples of each bin where the offsets say.

    Parameters
    ----------
    {x}
    {rois}
    {offset}
    {sizes}
    {gamma}

    Returns
    -------
    {result}

    Raises
    ------
    {errors}

    See Also
    --------
    deform_roi_pool_backward : The gradients.
    modulated_deform_roi_pool : The same with a factor for each bin.

    Notes
    -----
    {rule}

    References
    ----------
    {dai}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x = numpy.arange(16.0).reshape(1, 1, 4, 4)
    >>> rois = numpy.array([[0.0, 0.0, 0.0, 4.0, 4.0]])
    >>> offset = numpy.zeros((1, 2, 2, 2))
    >>> offset[0, 0, 0, 0] = 2.5  # the first bin moves to the right, by gamma * 4 * 2.5 = 1 pixel
    >>> dcn_np.deform_roi_pool(x, rois, offset, output_size=2)
    array([[[[ 3.5,  4.5],
             [10.5, 12.5]]]])
    """
    return modulated_deform_roi_pool(x, rois, offset, None, output_size, spatial_scale, sampling_ratio, gamma)


@documented(_SHARED)
def deform_roi_pool_backward(
    grad_output: Array,
    x: Array,
    rois: Array,
    offset: Array | None,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    *,
    needs: Iterable[str] = ("x", "offset"),
) -> RoIGradients:
    """Compute the gradients of `deform_roi_pool`.

    Parameters
    ----------
    {grad_output}
    {x}
    {rois}
    {offset}
    {sizes}
    {gamma}
    {needs}

    Returns
    -------
    {gradients}

    Raises
    ------
    {errors}

    See Also
    --------
    deform_roi_pool : The forward function.

    Notes
    -----
    {gradient_rule}
    Here every mask is 1.

    References
    ----------
    {dai}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x = numpy.arange(16.0).reshape(1, 1, 4, 4)
    >>> rois = numpy.array([[0.0, 0.0, 0.0, 4.0, 4.0]])
    >>> offset = numpy.full((1, 2, 1, 1), 0.25)
    >>> dcn_np.deform_roi_pool_backward(numpy.ones((1, 1, 1, 1)), x, rois, offset, 1).offset.ravel()
    array([0.3, 1.2])
    """
    return modulated_deform_roi_pool_backward(
        grad_output,
        x,
        rois,
        offset,
        None,
        output_size,
        spatial_scale,
        sampling_ratio,
        gamma,
        needs=checked_needs(needs, ("x", "offset")),
    )


@documented(_SHARED)
def modulated_deform_roi_pool(
    x: Array,
    rois: Array,
    offset: Array | None,
    mask: Array | None,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Array:
    """Average the samples of each bin where the offsets say, scaled by the bin's mask.

    Parameters
    ----------
    {x}
    {rois}
    {offset}
    {mask}
    {sizes}
    {gamma}

    Returns
    -------
    {result}

    Raises
    ------
    {errors}

    See Also
    --------
    modulated_deform_roi_pool_backward : The gradients.
    deform_roi_pool : The same without masks.

    Notes
    -----
    {rule}

    References
    ----------
    {zhu}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x = numpy.arange(16.0).reshape(1, 1, 4, 4)
    >>> rois = numpy.array([[0.0, 0.0, 0.0, 4.0, 4.0]])
    >>> mask = numpy.array([0.0, 1.0, 0.5, 2.0]).reshape(1, 1, 2, 2)
    >>> dcn_np.modulated_deform_roi_pool(x, rois, None, mask, output_size=2)
    array([[[[ 0.  ,  4.5 ],
             [ 5.25, 25.  ]]]])
    """
    kind = kind_of(x=x, rois=rois, offset=offset, mask=mask)
    x, rois = kind.take("x", x), kind.take("rois", rois)
    offset, mask = kind.take_optional("offset", offset), kind.take_optional("mask", mask)
    backend = backend_of(x)
    geometry = RoIGeometry.of(
        backend.dtypes(), x, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma
    )
    check_roi_values(geometry, rois)
    return kind.give(backend.roi_pool(geometry, x, rois, offset, mask))


@documented(_SHARED)
def modulated_deform_roi_pool_backward(
    grad_output: Array,
    x: Array,
    rois: Array,
    offset: Array | None,
    mask: Array | None,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    *,
    needs: Iterable[str] = ("x", "offset", "mask"),
) -> RoIGradients:
    """Compute the gradients of `modulated_deform_roi_pool`.

    Parameters
    ----------
    {grad_output}
    {x}
    {rois}
    {offset}
    {mask}
    {sizes}
    {gamma}
    {needs}

    Returns
    -------
    {gradients}

    Raises
    ------
    {errors}

    See Also
    --------
    modulated_deform_roi_pool : The forward function.

    Notes
    -----
    {gradient_rule}

    References
    ----------
    {zhu}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x = numpy.arange(16.0).reshape(1, 1, 4, 4)
    >>> rois = numpy.array([[0.0, 0.0, 0.0, 4.0, 4.0]])
    >>> mask, grad_output = numpy.ones((2, 1, 1, 2, 2))
    >>> arrays = (grad_output, x, rois, None, mask)
    >>> dcn_np.modulated_deform_roi_pool_backward(*arrays, output_size=2, needs=["mask"]).mask
    array([[[[ 2.5,  4.5],
             [10.5, 12.5]]]])
    """
    needs = checked_needs(needs, RoIGradients._fields)
    kind = kind_of(x=x, rois=rois, offset=offset, mask=mask, grad_output=grad_output)
    x, rois = kind.take("x", x), kind.take("rois", rois)
    offset, mask = kind.take_optional("offset", offset), kind.take_optional("mask", mask)
    geometry = RoIGeometry.of(
        backend_of(x).dtypes(), x, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma
    )
    return _backward(kind, geometry, grad_output, x, rois, offset, mask, needs)


@documented(_SHARED)
def deform_psroi_pool(
    x: Array,
    rois: Array,
    offset: Array | None,
    output_dim: int,
    group_size: int,
    output_size: Size,
    spatial_scale: float = 1.0,
    part_size: Size | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
) -> Array:
    """Average the samples of each bin where the offsets say, each bin from maps of its own (PS-RoI pooling).

    Parameters
    ----------
    {x}
    {rois}
    {class_offset}
    {position_sensitive}

    Returns
    -------
    {result}

    Raises
    ------
    {errors}

    See Also
    --------
    deform_psroi_pool_backward : The gradients.
    deform_roi_pool : The form without position-sensitive maps.

    Notes
    -----
    Bin (i, j) of output o reads channel (o * group_size + i * group_size // P_h) * group_size + j *
    group_size // P_w. Regions are rounded, half away from zero: start = round(low) * spatial_scale - 0.5, and
    size = max((round(high) + 1) * spatial_scale - 0.5 - start, 0.1). Samples lie at start + (p + i /
    sample_per_part) * size / P + trans_std * size * offset; those below -0.5 or above E - 0.5 do not count,
    others interpolate between the pixels around their point, clamped to [0, E - 1]. A bin without samples is
    0. See docs/semantics.md.

    References
    ----------
    {dai}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x = numpy.arange(4.0).reshape(1, 4, 1, 1) * numpy.ones((4, 4))
    >>> rois = numpy.array([[0.0, 0.0, 0.0, 3.0, 3.0]])
    >>> dcn_np.deform_psroi_pool(x, rois, None, output_dim=1, group_size=2, output_size=2)
    array([[[[0., 1.],
             [2., 3.]]]])
    """
    kind = kind_of(x=x, rois=rois, offset=offset)
    x, rois, offset = kind.take("x", x), kind.take("rois", rois), kind.take_optional("offset", offset)
    sizes = (output_dim, group_size, output_size, spatial_scale, part_size, sample_per_part, trans_std)
    backend = backend_of(x)
    geometry = RoIGeometry.of_position_sensitive(backend.dtypes(), x, rois, offset, *sizes)
    check_roi_values(geometry, rois)
    return kind.give(backend.roi_pool(geometry, x, rois, offset, None))


@documented(_SHARED)
def deform_psroi_pool_backward(
    grad_output: Array,
    x: Array,
    rois: Array,
    offset: Array | None,
    output_dim: int,
    group_size: int,
    output_size: Size,
    spatial_scale: float = 1.0,
    part_size: Size | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    *,
    needs: Iterable[str] = ("x", "offset"),
) -> RoIGradients:
    """Compute the gradients of `deform_psroi_pool`.

    Parameters
    ----------
    {grad_output}
    {x}
    {rois}
    {class_offset}
    {position_sensitive}
    {needs}

    Returns
    -------
    {gradients}

    Raises
    ------
    {errors}

    See Also
    --------
    deform_psroi_pool : The forward function.

    Notes
    -----
    {gradient_rule}
    Samples that do not count have no gradient, and every mask is 1.

    References
    ----------
    {dai}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x, rois = numpy.ones((1, 4, 4, 4)), numpy.array([[0.0, 0.0, 0.0, 3.0, 3.0]])
    >>> grad_output = numpy.arange(4.0).reshape(1, 1, 2, 2)
    >>> gradients = dcn_np.deform_psroi_pool_backward(grad_output, x, rois, None, 1, 2, output_size=2)
    >>> gradients.x.sum(axis=(2, 3))
    array([[0., 1., 2., 3.]])
    """
    needs = checked_needs(needs, ("x", "offset"))
    kind = kind_of(x=x, rois=rois, offset=offset, grad_output=grad_output)
    x, rois, offset = kind.take("x", x), kind.take("rois", rois), kind.take_optional("offset", offset)
    sizes = (output_dim, group_size, output_size, spatial_scale, part_size, sample_per_part, trans_std)
    geometry = RoIGeometry.of_position_sensitive(backend_of(x).dtypes(), x, rois, offset, *sizes)
    return _backward(kind, geometry, grad_output, x, rois, offset, None, needs)


def _backward(
    kind: Any,
    geometry: RoIGeometry,
    grad_output: Array,
    x: Array,
    rois: Array,
    offset: Array | None,
    mask: Array | None,
    needs: frozenset[str],
) -> RoIGradients:
    grad_output = kind.take("grad_output", grad_output)
    check_roi_grad_output(geometry, grad_output)
    check_roi_values(geometry, rois)
    missing = [name for name, given in (("offset", offset), ("mask", mask)) if given is None]
    wanted = needs.difference(missing)
    gradients = backend_of(x).roi_pool_backward(geometry, grad_output, x, rois, offset, mask, wanted)
    return RoIGradients(*map(kind.give, gradients))
