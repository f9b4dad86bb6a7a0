"""Deformable convolution for PaddlePaddle: differentiable in dynamic graphs.

The computation is `dcn_np.modulated_deform_conv` over the tensors' own memory: of any strides, they go in and
out without a copy. Tested on the CPU.

Inside ``paddle.jit.to_static(full_graph=False)`` a call runs as it would outside; a whole graph holds no
numbers to call it with, and ``full_graph=True`` is an error. Nothing is cast, under ``paddle.amp`` neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.jit import not_to_static
from paddle.jit.sot.psdb import fallback

import dcn_np

from .messages import no_second_derivative, shown

__all__ = ["deform_conv", "modulated_deform_conv"]

# Marks for to_static, which else rewrites what is called (`not_to_static`) or follows it with tensors that
# hold no numbers (`fallback`). Elsewhere they do nothing.

_INPUTS = dcn_np.Gradients._fields


class _Convolve(PyLayer):
    @staticmethod
    def forward(ctx: Any, window: Any, float32_matmul: Any, needs: Any, *tensors: Any) -> Tensor:
        """Convolve x, offset, mask, weight and bias."""
        ctx.save_for_backward(*tensors[:4])
        ctx.arguments, ctx.needs = (window, float32_matmul, needs), needs
        ctx.given = [name for name, tensor in zip(_INPUTS, tensors, strict=True) if tensor is not None]
        return dcn_np.modulated_deform_conv(*tensors, *window, float32_matmul=float32_matmul)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return a gradient or None for each tensor that was given."""
        fallback(recursive=True)
        gradients = _Differentiate.apply(*ctx.arguments, grad_output, *ctx.saved_tensor())
        found = dict(zip(ctx.needs, gradients, strict=True))
        return tuple(found.get(name) for name in ctx.given)


class _Differentiate(PyLayer):
    @staticmethod
    def forward(ctx: Any, window: Any, float32_matmul: Any, needs: Any, *tensors: Any) -> tuple[Tensor, ...]:
        """Compute the gradients that are needed, in the order of the inputs."""
        gradients = dcn_np.modulated_deform_conv_backward(
            *tensors, *window, needs=needs, float32_matmul=float32_matmul
        )
        return tuple(gradient for gradient in gradients if gradient is not None)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(no_second_derivative("dcn_np.paddle"))


@not_to_static
def deform_conv(
    x: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    float32_matmul: str | None = None,
) -> Tensor:
    """Convolve where the offsets say (DCNv1), differentiably.

    Parameters, result and errors are those of `dcn_np.deform_conv`, for tensors.

    Parameters
    ----------
    x, offset, weight, bias : Tensor or None
        As there.
    stride, padding, dilation, groups, offset_groups
        As there.
    float32_matmul : {"strict", "tf32"} or None
        As there.

    Returns
    -------
    Tensor
        Shape (batch, out_channels, *output), in the memory order of `x`.

    See Also
    --------
    modulated_deform_conv : The same with masks.
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
        float32_matmul=float32_matmul,
    )


@not_to_static
def modulated_deform_conv(
    x: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    float32_matmul: str | None = None,
) -> Tensor:
    """Convolve where the offsets say, each tap scaled by a mask (DCNv2), differentiably.

    Parameters, result and errors are those of `dcn_np.modulated_deform_conv`, for tensors.

    Parameters
    ----------
    x, offset, mask, weight, bias : Tensor or None
        As there.
    stride, padding, dilation, groups, offset_groups
        As there.
    float32_matmul : {"strict", "tf32"} or None
        As there.

    Returns
    -------
    Tensor
        Shape (batch, out_channels, *output), in the memory order of `x`.

    Raises
    ------
    TypeError, ValueError
        As there.
    OSError
        A gradient of a gradient was asked for: paddle's name for what its PyLayer raises.

    See Also
    --------
    dcn_np.modulated_deform_conv : The computation, without gradients.

    Notes
    -----
    `x` may be the view of a channels-last tensor that ``x.transpose([0, 3, 1, 2])`` gives: it is read as it
    is, and the result lies channels last too.

    Only the gradients of tensors with ``stop_gradient=False`` are computed. As with every PyLayer,
    ``paddle.grad`` takes all of them or none: set ``stop_gradient`` for fewer.
    """
    fallback(recursive=True)
    tensors = (x, offset, mask, weight, bias)
    for name, tensor in zip(_INPUTS, tensors, strict=True):
        _check_tensor(name, tensor)
    needs = [
        name
        for name, tensor in zip(_INPUTS, tensors, strict=True)
        if tensor is not None and not tensor.stop_gradient
    ]
    window = (stride, padding, dilation, groups, offset_groups)
    y: Tensor = _Convolve.apply(window, float32_matmul, needs, *tensors)
    return y


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) and (value is not None or name in ("x", "weight")):
        raise TypeError(
            f"{name} is {shown(value)}; wanted a paddle.Tensor, which under paddle.jit.to_static takes "
            "full_graph=False"
        )
