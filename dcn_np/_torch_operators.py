"""What the operators of `dcn_np.torch` share: tensors in and out, their autograd, and autocast."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("dcn_np", "DEF")


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


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an operator of torch's dispatcher, for every device; its results are new tensors.

    `torch.library.custom_op` does so through layers of Python that take longer than a small convolution.
    """

    def define(compute: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(compute, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _untraced(compute), "CompositeExplicitAutograd")
        return getattr(torch.ops.dcn_np, name).default

    return define


def _untraced(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of a function; its import takes a second and is left to those who use it."""

    @lru_cache(maxsize=1)
    def disabled() -> Any:
        return torch.compiler.disable(compute)

    def kernel(*arguments: Any) -> Any:
        return (disabled() if "torch._dynamo" in sys.modules else compute)(*arguments)

    return kernel


def folded(array: Tensor | None, dim: int | None, count: int) -> Tensor | None:
    """Return an array with the axis of vmap as part of its first one, repeated where it has no such axis."""
    if array is None:
        return None
    moved = array.expand(count, *array.shape) if dim is None else array.movedim(dim, 0)
    return moved.flatten(0, 1)


def one_by_one(operator: Any) -> Callable[..., tuple[Any, Any]]:
    """Return the rule of vmap that calls an operator for each entry."""

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        results = [
            operator(
                *(
                    a.select(dim, index) if isinstance(a, Tensor) and dim is not None else a
                    for a, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(each) for each in zip(*results, strict=True)]
        return stacked, [0] * len(stacked)

    return rule


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

    def remember(ctx: Any, inputs: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs[:saved])
        ctx.parameters = inputs[tensors:]

    def differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[1 : 1 + tensors])
        for index in constant:
            needs[index] = False
        gradients = backward(grad_output, *ctx.saved_tensors, *ctx.parameters, needs, *settings())
        found = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
        return (None, *found, *[None] * len(ctx.parameters))

    def refuse(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"what {backward} computes cannot be differentiated")

    _record(operator, remember, differentiate)
    _record(backward, lambda ctx, inputs: None, refuse)


def _record(
    operator: Any,
    remember: Callable[[Any, tuple[Any, ...]], None],
    differentiate: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Make an operator a node of autograd's graph.

    `torch.library.register_autograd` takes 30 us more, and `torch.func.grad` does not know its nodes. The key
    set of a call is a node's first input, for which `differentiate` returns None.
    """

    def below(keyset: Any, inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
            remember(ctx, inputs)
            with torch.enable_grad():  # of transforms around this one
                result = below(keyset, inputs)
            return tuple(result) if isinstance(result, list) else result

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            return differentiate(ctx, *gradients)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
            raise NotImplementedError(f"{operator} has derivatives backward only, none in forward mode")

    # The graph shows the operator's name; Function.apply itself asks torch.func how to transform the node.
    named: Any = type(str(operator), (Node,), {})
    apply = super(torch.autograd.Function, named).apply

    def dispatch(keyset: Any, *inputs: Any) -> Any:
        if not _is_recorded(inputs):
            return below(keyset, inputs)
        with enable_single_level_autograd_function():
            result = apply(keyset, *inputs)
        return list(result) if isinstance(result, tuple) else result

    _LIBRARY.impl(operator, dispatch, "Autograd", with_keyset=True)


def _is_recorded(inputs: tuple[Any, ...]) -> bool:
    """Tell whether autograd has to know; in forward mode always, so that a tangent is refused, not lost."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in inputs)


def autocasts(x: Tensor) -> bool:
    """Return whether autocast is on, for the device of `x`."""
    kind = x.device.type
    on: bool = kind != "meta" and torch.is_autocast_enabled(kind)
    return on


def cast(
    x: Tensor, values: Sequence[Tensor | None], positions: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return `values` in the dtype of autocast on the device of `x`, then `positions` in float32."""
    dtype = torch.get_autocast_dtype(x.device.type)
    wanted = [dtype] * len(values) + [torch.float32] * len(positions)
    arrays = zip((*values, *positions), wanted, strict=True)
    return [None if array is None else array.to(dtype) for array, dtype in arrays]
