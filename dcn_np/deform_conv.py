"""The public functions: deformable convolution, with and without masks, and the gradients of both.

v1 is v2 without a mask, so each pair is one computation and its description one text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .arrays import Array, kind_of
from .backends import Gradients, backend_of
from .docstrings import documented
from .geometry import (
    Geometry,
    check_grad_output,
    check_out,
    checked_flag,
    checked_float32_matmul,
    checked_needs,
)

Extents = int | Sequence[int]
Padding = int | Sequence[int | tuple[int, int]]

_float32_matmul = "strict"

_SHARED = {
    "x": """
x : array, shape (batch, in_channels, *input)
    The images: 1 to 3 spatial axes, any strides; float32, float64, float16, or bfloat16 of ml_dtypes. All
    other arrays have this dtype, library (NumPy or CuPy) and device; beside half images `offset` and `mask`
    may be float32.""",
    "offset": """
offset : array, shape (batch, offset_groups * taps * ndim, *output), or None
    How far each tap moves, in pixels of `x`, at each output position. The channels of one tap lie side by
    side, in the order of the spatial axes of `x`: (y, x) of the first tap, (y, x) of the second and so on,
    taps row by row, offset groups outermost. None leaves every tap on the rigid grid.""",
    "mask": """
mask : array, shape (batch, offset_groups * taps, *output), or None
    A factor for each tap at each output position, of any value. None is all ones.""",
    "weight": """
weight : array, shape (out_channels, in_channels / groups, *kernel)
    The filters. `taps` is the product of `kernel`.""",
    "bias": """
bias : array, shape (out_channels,), or None
    Added to every output position.""",
    "grad_output": """
grad_output : array, shape (batch, out_channels, *output)
    The gradient of a scalar with respect to the result of the forward function.""",
    "window": """
stride : int or sequence of int
    Pixels of `x` from one output position to the next, per spatial axis.
padding : int, or sequence of int or of (begin, end) pairs
    Zeros thought around `x`, in pixels, per spatial axis.
dilation : int or sequence of int
    Pixels of `x` from one tap to the next, per spatial axis.
groups : int
    Divides the channels of `x` and of the output into independent convolutions.
offset_groups : int
    Divides the channels of `x` into blocks, each with offsets and masks of its own.""",
    "out": """
out : array, shape (batch, out_channels, *output), or None
    Where to write the result: dtype of `x`, in memory that no input overlaps. Nothing is written to it before
    every argument is checked.""",
    "needs": """
needs : iterable of str
    The names of the gradients to compute; the others cost nothing and are None.
deterministic : bool
    Ask a GPU for the same bits of the gradient of `x` in every run, at a cost: docs/semantics.md, rule 6. The
    rest, and all on a CPU, has them anyway.""",
    "float32_matmul": """
float32_matmul : {"strict", "tf32"} or None
    How a GPU may round the factors of float32 products; a CPU is always strict. None is what
    `dcn_np.set_float32_matmul` last set.""",
    "result": """
array, shape (batch, out_channels, *output)
    `out` if given; else a new array with the dtype and memory order of `x`. Per spatial axis,
    output = floor((input + begin + end - dilation * (kernel - 1) - 1) / stride) + 1.""",
    "gradients": """
Gradients
    A named tuple (x, offset, mask, weight, bias). Each gradient has the dtype, shape and memory order of its
    input; those not needed, and those of an input that is None, are None.""",
    "errors": """
TypeError
    An argument of the wrong kind, a dtype that is not computed, or arrays of different dtypes.
ValueError
    Shapes or numbers that do not fit; the message shows the arithmetic.
MemoryError
    No memory for the result or for the working space.""",
    "rule": """
where k counts within the offset group of channel c, and S(x, q) is the N-linear interpolation of x at the
point q, with zeros outside. Points outside the image, infinite ones included, give exactly 0; a NaN in
`offset` gives a NaN sample. On a CPU the result is the same, bit for bit, for any number of threads, memory
alignment and batch; instruction sets round differently. See docs/semantics.md.""",
    "gradient_rule": """
With c = sum over o of weight[o, c', k] * grad_output[n, o, p], the gradient of one sample::

    grad_x        every pixel gets c * mask * its interpolation weight
    grad_offset   sum over channels of c * mask * dS/dq
    grad_mask     sum over channels of c * S
    grad_weight   sum over images and positions of grad_output * mask * S
    grad_bias     sum over images and positions of grad_output

Where the interpolation has a kink, at whole coordinates, dS/dq is the derivative to the right.""",
    "dai": """
.. [1] Dai et al., "Deformable Convolutional Networks", 2017, arXiv:1703.06211, eq. (2).""",
    "zhu": """
.. [1] Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", 2018, arXiv:1811.11168,
   eq. (1).""",
}


@documented(_SHARED)
def deform_conv(
    x: Array,
    offset: Array | None,
    weight: Array,
    bias: Array | None = None,
    stride: Extents = 1,
    padding: Padding = 0,
    dilation: Extents = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    out: Array | None = None,
    float32_matmul: str | None = None,
) -> Array:
    """Convolve where the offsets say.

    Parameters
    ----------
    {x}
    {offset}
    {weight}
    {bias}
    {window}
    {out}
    {float32_matmul}

    Returns
    -------
    {result}

    Raises
    ------
    {errors}

    See Also
    --------
    deform_conv_backward : The gradients.
    modulated_deform_conv : The same with a factor for each tap.

    Notes
    -----
    Equation (2) of [1]_ with groups, for output position p and tap k, c' being c within its group::

        y[n, o, p] = bias[o] + sum over c, k of weight[o, c', k] * S(x[n, c], q)
        q          = p * stride - begin + k * dilation + offset[n, k, :, p]

    {rule}

    References
    ----------
    {dai}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x = numpy.arange(6.0).reshape(1, 1, 2, 3)
    >>> offset = numpy.full((1, 2, 2, 3), 0.5)
    >>> dcn_np.deform_conv(x, offset, numpy.ones((1, 1, 1, 1)))
    array([[[[2.  , 3.  , 1.75],
             [1.75, 2.25, 1.25]]]])
    """
    return modulated_deform_conv(
        x,
        offset,
        None,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        offset_groups,
        out=out,
        float32_matmul=float32_matmul,
    )


@documented(_SHARED)
def deform_conv_backward(
    grad_output: Array,
    x: Array,
    offset: Array | None,
    weight: Array,
    stride: Extents = 1,
    padding: Padding = 0,
    dilation: Extents = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    needs: Iterable[str] = ("x", "offset", "weight", "bias"),
    deterministic: bool = False,
    float32_matmul: str | None = None,
) -> Gradients:
    """Compute the gradients of `deform_conv`.

    Parameters
    ----------
    {grad_output}
    {x}
    {offset}
    {weight}
    {window}
    {needs}
    {float32_matmul}

    Returns
    -------
    {gradients}

    Raises
    ------
    {errors}

    See Also
    --------
    deform_conv : The forward function.

    Notes
    -----
    {gradient_rule}
    Here every mask is 1; the notes of `deform_conv` define the rest.

    References
    ----------
    {dai}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x = numpy.arange(6.0).reshape(1, 1, 2, 3)
    >>> offset = numpy.full((1, 2, 2, 3), 0.5)
    >>> grad_output = numpy.ones((1, 1, 2, 3))
    >>> dcn_np.deform_conv_backward(grad_output, x, offset, numpy.ones((1, 1, 1, 1)), needs=["x"]).x
    array([[[[0.25, 0.5 , 0.5 ],
             [0.5 , 1.  , 1.  ]]]])
    """
    return modulated_deform_conv_backward(
        grad_output,
        x,
        offset,
        None,
        weight,
        stride,
        padding,
        dilation,
        groups,
        offset_groups,
        needs=checked_needs(needs, ("x", "offset", "weight", "bias")),
        deterministic=deterministic,
        float32_matmul=float32_matmul,
    )


@documented(_SHARED)
def modulated_deform_conv(
    x: Array,
    offset: Array | None,
    mask: Array | None,
    weight: Array,
    bias: Array | None = None,
    stride: Extents = 1,
    padding: Padding = 0,
    dilation: Extents = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    out: Array | None = None,
    float32_matmul: str | None = None,
) -> Array:
    """Convolve where the offsets say, each tap scaled by its mask.

    Parameters
    ----------
    {x}
    {offset}
    {mask}
    {weight}
    {bias}
    {window}
    {out}
    {float32_matmul}

    Returns
    -------
    {result}

    Raises
    ------
    {errors}

    See Also
    --------
    modulated_deform_conv_backward : The gradients.
    deform_conv : The same without masks.

    Notes
    -----
    Equation (1) of [1]_ with groups, for output position p and tap k, c' being c within its group::

        y[n, o, p] = bias[o] + sum over c, k of weight[o, c', k] * mask[n, k, p] * S(x[n, c], q)
        q          = p * stride - begin + k * dilation + offset[n, k, :, p]

    {rule}

    References
    ----------
    {zhu}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x = numpy.arange(6.0).reshape(1, 1, 2, 3)
    >>> offset = numpy.full((1, 2, 2, 3), 0.5)
    >>> mask = numpy.array([0.0, 1.0, 2.0, 0.0, 1.0, 2.0]).reshape(1, 1, 2, 3)
    >>> dcn_np.modulated_deform_conv(x, offset, mask, numpy.ones((1, 1, 1, 1)))
    array([[[[0.  , 3.  , 3.5 ],
             [0.  , 2.25, 2.5 ]]]])
    """
    kind = kind_of(x=x, offset=offset, mask=mask, weight=weight, bias=bias, out=out)
    x, weight = kind.take("x", x), kind.take("weight", weight)
    offset, mask, bias = (
        kind.take_optional("offset", offset),
        kind.take_optional("mask", mask),
        kind.take_optional("bias", bias),
    )
    backend = backend_of(x)
    geometry = Geometry.of(
        backend.dtypes(), x, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups
    )
    matmul = chosen_float32_matmul(float32_matmul)
    destination = kind.take_optional("out", out)
    if destination is not None:
        check_out(geometry, backend.may_share_memory, destination, x, offset, mask, weight, bias)
    result = backend.deform_conv(geometry, x, offset, mask, weight, bias, destination, matmul)
    return kind.give(result) if out is None else out


@documented(_SHARED)
def modulated_deform_conv_backward(
    grad_output: Array,
    x: Array,
    offset: Array | None,
    mask: Array | None,
    weight: Array,
    stride: Extents = 1,
    padding: Padding = 0,
    dilation: Extents = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    needs: Iterable[str] = ("x", "offset", "mask", "weight", "bias"),
    deterministic: bool = False,
    float32_matmul: str | None = None,
) -> Gradients:
    """Compute the gradients of `modulated_deform_conv`.

    Parameters
    ----------
    {grad_output}
    {x}
    {offset}
    {mask}
    {weight}
    {window}
    {needs}
    {float32_matmul}

    Returns
    -------
    {gradients}

    Raises
    ------
    {errors}

    See Also
    --------
    modulated_deform_conv : The forward function.

    Notes
    -----
    {gradient_rule}
    The notes of `modulated_deform_conv` define the rest.

    References
    ----------
    {zhu}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> x = numpy.arange(6.0).reshape(1, 1, 2, 3)
    >>> offset = numpy.full((1, 2, 2, 3), 0.5)
    >>> mask, grad_output = numpy.ones((2, 1, 1, 2, 3))
    >>> weight = numpy.ones((1, 1, 1, 1))
    >>> arrays = (grad_output, x, offset, mask, weight)
    >>> dcn_np.modulated_deform_conv_backward(*arrays, needs=["mask"]).mask
    array([[[[2.  , 3.  , 1.75],
             [1.75, 2.25, 1.25]]]])
    """
    needs = checked_needs(needs, Gradients._fields)
    deterministic = checked_flag("deterministic", deterministic)
    kind = kind_of(x=x, offset=offset, mask=mask, weight=weight, grad_output=grad_output)
    grad_output, x = kind.take("grad_output", grad_output), kind.take("x", x)
    weight = kind.take("weight", weight)
    offset, mask = kind.take_optional("offset", offset), kind.take_optional("mask", mask)
    backend = backend_of(x)
    geometry = Geometry.of(
        backend.dtypes(), x, offset, mask, weight, None, stride, padding, dilation, groups, offset_groups
    )
    check_grad_output(geometry, grad_output)
    matmul = chosen_float32_matmul(float32_matmul)
    missing = [name for name, given in (("offset", offset), ("mask", mask)) if given is None]
    gradients = backend.deform_conv_backward(
        geometry, grad_output, x, offset, mask, weight, needs.difference(missing), deterministic, matmul
    )
    return gradients if kind.importer is None else Gradients(*map(kind.give, gradients))


def set_float32_matmul(value: str) -> None:
    """Set how a GPU multiplies float32 matrices where a call does not say; for the whole process.

    Parameters
    ----------
    value : {"strict", "tf32"}
        "strict" keeps every bit of the factors, "tf32" may round them to 11 bits for speed. A CPU is always
        strict.

    Raises
    ------
    TypeError
        `value` is no string.
    ValueError
        `value` is another string.

    See Also
    --------
    get_float32_matmul : Read it.
    """
    global _float32_matmul
    _float32_matmul = checked_float32_matmul(value)


def get_float32_matmul() -> str:
    """Return what `set_float32_matmul` last set.

    Returns
    -------
    str
        "strict", which is the default, or "tf32".

    See Also
    --------
    set_float32_matmul : Set it.
    """
    return _float32_matmul


def chosen_float32_matmul(value: str | None) -> str:
    """Return what a call says of float32_matmul, or what is set where it says nothing."""
    return _float32_matmul if value is None else checked_float32_matmul(value)
