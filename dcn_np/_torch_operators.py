"""What the operators of `dcn_np.torch` share: tensors in and out, their autograd, and autocast."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def detached(array: Tensor | None) -> Any:
    """Return what a function of `dcn_np` takes: where gradients are recorded, no tensor that requires one."""
    return array.detach() if array is not None and array.requires_grad else array


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the order in which the result of an operator over `x` lies."""
    return torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x)


def per_axis(value: int | Sequence[int], ndim: int) -> list[int]:
    """Return one number for each axis."""
    return [value] * ndim if isinstance(value, int) else list(value)


def as_tensors(gradients: Iterable[Tensor | None], x: Tensor) -> list[Tensor]:
    """Return the gradients as an operator must, all of them tensors: an empty one stands for None."""
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]


def empty_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool], x: Tensor) -> list[Tensor]:
    """Return what `as_tensors` does, without numbers: one for each input that is there and needed."""
    given = (
        array if needed and array is not None else None for array, needed in zip(inputs, needs, strict=True)
    )
    return as_tensors([None if array is None else torch.empty_like(array) for array in given], x)


def register_autograd(
    operator: Any,
    backward: Any,
    tensors: int,
    saved: int,
    constant: Collection[int] = (),
    settings: Callable[[], tuple[Any, ...]] = tuple,
) -> None:
    """Make an operator differentiable once, by an operator of its own.

    Parameters
    ----------
    operator
        Takes `tensors` tensors, then parameters.
    backward
        Takes the gradient of the result, the first `saved` tensors, the parameters, for each of the tensors
        whether its gradient is needed, and the settings; returns a list of a tensor for each of the tensors,
        of which those not needed are not looked at.
    tensors, saved : int
        How many.
    constant
        Which of the tensors get no gradient, though they may require one.
    settings
        Returns what the backward has to know of the moment when it is called.
    """

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:saved])
        ctx.parameters = inputs[tensors:]
        ctx.needs = list(ctx.needs_input_grad[:tensors])
        for index in constant:
            ctx.needs[index] = False

    def differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = backward(grad_output, *ctx.saved_tensors, *ctx.parameters, ctx.needs, *settings())
        found = [gradient if needed else None for gradient, needed in zip(gradients, ctx.needs, strict=True)]
        return (*found, *[None] * len(ctx.parameters))

    operator.register_autograd(differentiate, setup_context=remember)


def autocasts(x: Tensor) -> bool:
    """Return whether autocast is on, for the device of `x`."""
    on: bool = torch.is_autocast_enabled(x.device.type)
    return on


def cast(
    x: Tensor, values: Sequence[Tensor | None], positions: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return `values` in the dtype of autocast on the device of `x`, then `positions` in float32."""
    dtype = torch.get_autocast_dtype(x.device.type)
    wanted = [dtype] * len(values) + [torch.float32] * len(positions)
    arrays = zip((*values, *positions), wanted, strict=True)
    return [None if array is None else array.to(dtype) for array, dtype in arrays]
