"""Deformable convolution for JAX: functions for jit, grad, vmap and shard_map, on a CPU or a CUDA device.

On a CPU XLA calls the engine, from threads of its own and on its own buffers: nothing is copied, and Python
has no part in it. Hence `dcn_np.num_threads` and `dcn_np.use_isa`, which are of a Python thread, have no
effect; `dcn_np.set_num_threads` has, at once, also on what is compiled already.

On a CUDA device XLA calls Python, which queues the kernels on XLA's stream, over its buffers, through CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import mlir

from . import cuda
from .arrays import cupy_for
from .backends import Gradients
from .cpu import dtypes, xla_handlers
from .deform_conv import chosen_float32_matmul
from .geometry import Geometry, checked_flag
from .threads import share_process_limit

__all__ = ["deform_conv", "modulated_deform_conv"]

Array: TypeAlias = jax.Array
# x, offset, mask, weight, bias and, in the backward, grad_output; None where there is none.
Arrays: TypeAlias = Sequence[Array | None]
Flags: TypeAlias = Sequence[bool | None]

# Arrays of a call, in the order of src/xla.hpp: "output" is the result of the forward, and in the backward
# its gradient, an argument.
_NAMES = ("x", "offset", "mask", "weight", "bias", "output")

_FORWARD, _BACKWARD = "dcn_np_deform_conv", "dcn_np_deform_conv_backward"
for _target, _handler in zip((_FORWARD, _BACKWARD), xla_handlers(), strict=True):
    jax.ffi.register_ffi_target(_target, _handler, platform="cpu")
share_process_limit()


def deform_conv(
    x: Array,
    offset: Array | None,
    weight: Array,
    bias: Array | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    deterministic: bool = False,
    float32_matmul: str | None = None,
) -> Array:
    """Convolve where the offsets say (DCNv1), differentiably.

    Parameters and result are those of `dcn_np.deform_conv`, for arrays of JAX.

    Parameters
    ----------
    x, offset, weight, bias : jax.Array, numpy.ndarray or None
        As there.
    stride, padding, dilation, groups, offset_groups
        As there; they are constants of a compiled function.
    deterministic : bool
        On a CUDA device: whether the gradient of `x` has the same bits in every run, for some time and
        memory. On a CPU it always has.
    float32_matmul : {"strict", "tf32"} or None
        As there: for a CUDA device. None is what `dcn_np.set_float32_matmul` set when the function is traced.

    Returns
    -------
    jax.Array
        Shape (batch, out_channels, *output).

    Raises
    ------
    TypeError, ValueError
        As there, when the function is called or traced.

    See Also
    --------
    modulated_deform_conv : The same with masks; its notes hold here.
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
        deterministic=deterministic,
        float32_matmul=float32_matmul,
    )


def modulated_deform_conv(
    x: Array,
    offset: Array | None,
    mask: Array | None,
    weight: Array,
    bias: Array | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    deterministic: bool = False,
    float32_matmul: str | None = None,
) -> Array:
    """Convolve where the offsets say, each tap scaled by a mask (DCNv2), differentiably.

    Parameters and result are those of `dcn_np.modulated_deform_conv`, for arrays of JAX.

    Parameters
    ----------
    x, offset, mask, weight, bias : jax.Array, numpy.ndarray or None
        As there.
    stride, padding, dilation, groups, offset_groups
        As there; they are constants of a compiled function.
    deterministic : bool
        On a CUDA device: whether the gradient of `x` has the same bits in every run, for some time and
        memory. On a CPU it always has.
    float32_matmul : {"strict", "tf32"} or None
        As there: for a CUDA device. None is what `dcn_np.set_float32_matmul` set when the function is traced.

    Returns
    -------
    jax.Array
        Shape (batch, out_channels, *output).

    Raises
    ------
    TypeError, ValueError
        As there, when the function is called or traced.
    NotImplementedError
        When it is lowered for a device that is neither a CPU nor of CUDA.
    ImportError
        When it is lowered for a CUDA device without CuPy.
    jax.errors.JaxRuntimeError
        No memory for the working space; on a CUDA device also what CuPy or the compiler of its kernels says.

    See Also
    --------
    deform_conv : The same without masks.

    Notes
    -----
    The numbers are those of `dcn_np.modulated_deform_conv`, bit for bit. Gradients that nobody asks for are
    not computed; the gradients themselves cannot be differentiated, and there is no forward mode. `jax.vmap`
    over weights, or of their gradients, makes one call after another; else its axis joins the batch. Over
    several devices use `jax.shard_map`: under `jax.jit` alone XLA would gather the whole batch on each.
    Dtypes follow JAX: without ``jax_enable_x64`` there is no float64. Ctrl-C waits for a call to end.

    On a CUDA device CuPy runs the kernels, on XLA's stream and buffers (`pip install 'dcn_np[cuda13]'`); what
    lies between them is in CuPy's memory, so leave some of the GPU's to it: XLA takes three quarters
    (``XLA_PYTHON_CLIENT_MEM_FRACTION``). Such a program cannot be exported to run in another process. This
    was tested in an emulation of a GPU, not yet on one.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import dcn_np.jax
    >>> x = jnp.arange(6.0).reshape(1, 1, 2, 3)
    >>> offset = jnp.full((1, 2, 2, 3), 0.5)
    >>> weight = jnp.ones((1, 1, 1, 1))
    >>> jax.jit(dcn_np.jax.deform_conv)(x, offset, weight)
    Array([[[[2.  , 3.  , 1.75],
             [1.75, 2.25, 1.25]]]], dtype=float32)
    """
    deterministic = checked_flag("deterministic", deterministic)
    matmul = chosen_float32_matmul(float32_matmul)
    x, weight = _taken("x", x), _taken("weight", weight)
    offset, mask, bias = (
        None if array is None else _taken(name, array)
        for name, array in (("offset", offset), ("mask", mask), ("bias", bias))
    )
    geometry = Geometry.of(
        dtypes(), x, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups
    )
    y: Array = _compiled(_Problem(geometry, deterministic, matmul), x, offset, mask, weight, bias)
    return y


@dataclass(frozen=True)
class _Problem:
    """What a call is compiled for: its sizes, and how a CUDA device computes."""

    geometry: Geometry
    deterministic: bool
    float32_matmul: str

    def together(self, size: int) -> _Problem:
        """Return that of `size` calls as one, of a longer batch."""
        return replace(self, geometry=replace(self.geometry, batch=size * self.geometry.batch))


def _taken(name: str, array: Any) -> Any:
    """Return an argument as an array of JAX, with a shape of numbers."""
    if isinstance(array, numpy.ndarray):
        array = jax.numpy.asarray(array)
    if not isinstance(array, jax.Array):
        raise TypeError(f"{name} is a {type(array).__name__}; wanted a jax.Array or a numpy.ndarray")
    if not all(type(extent) is int for extent in array.shape):
        raise ValueError(f"{name} has shape {array.shape}; wanted extents that are known when it is traced")
    return array


# ---- derivatives; where x holds halves, weight and bias are float32 from here on, as the engine wants them


@partial(jax.jit, static_argnums=0, inline=True)
def _compiled(problem: _Problem, *arrays: Array | None) -> Any:
    x, offset, mask, *filters = arrays
    if problem.geometry.dtype.itemsize == 2:
        filters = [None if array is None else array.astype(numpy.float32) for array in filters]
    return _convolve(problem, *_alike([x, offset, mask, *filters]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(problem: _Problem, *arrays: Array | None) -> Any:
    return _forward(problem, *arrays)


@jax.tree_util.register_static
class _Needs(tuple[bool, ...]):
    """Which gradients are needed, in the order of Gradients, where JAX looks for arrays and finds none."""

    __slots__ = ()


def _remember(problem: _Problem, *primals: Any) -> tuple[Any, tuple[_Needs, Arrays]]:
    arrays = [None if primal is None else primal.value for primal in primals]
    needs = _Needs(primal is not None and primal.perturbed for primal in primals)
    return _convolve(problem, *arrays), (needs, arrays[:4])


def _differentiate(
    problem: _Problem, residuals: tuple[_Needs, Arrays], grad_output: Any
) -> tuple[Array | None, ...]:
    needs, arrays = residuals
    if isinstance(grad_output, SymbolicZero):
        return (None,) * len(needs)
    gradients = iter(_backward(problem, needs, *arrays, grad_output))
    return tuple(next(gradients) if needed else None for needed in needs)


_convolve.defvjp(_remember, _differentiate, symbolic_zeros=True)


# ---- calls of the engine, each with its rule for jax.vmap


def _forward(problem: _Problem, *arrays: Array | None) -> Any:
    call = custom_vmap(partial(_call_forward, problem))
    call.def_vmap(partial(_forward_over_axis, problem))
    return call(*arrays)


def _call_forward(problem: _Problem, *arrays: Array | None) -> Array:
    y = jax.ShapeDtypeStruct(problem.geometry.output_shape, problem.geometry.dtype)
    return _call(problem, (*arrays, None), (None, None, None, None, None, y))[0]


def _forward_over_axis(
    problem: _Problem, size: int, batched: Flags, *arrays: Array | None
) -> tuple[Array, bool]:
    if any(batched[3:]):
        return _one_by_one(partial(_forward, problem), batched, arrays), True
    x, offset, mask = _as_one_batch(size, batched[:3], arrays[:3])
    y = _forward(problem.together(size), x, offset, mask, *arrays[3:])
    return y.reshape(size, *problem.geometry.output_shape), True


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _backward(problem: _Problem, needs: Flags, *arrays: Array | None) -> Any:
    """Return those gradients that are needed, from x, offset, mask, weight and grad_output."""
    call = custom_vmap(partial(_call_backward, problem, needs))
    call.def_vmap(partial(_backward_over_axis, problem, needs))
    return call(*arrays)


@_backward.defjvp
def _(problem: _Problem, needs: Flags, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError("the gradients of a deformable convolution cannot be differentiated")


def _call_backward(problem: _Problem, needs: Flags, *arrays: Any) -> list[Array]:
    x, offset, mask, weight, grad_output = arrays
    bias = jax.ShapeDtypeStruct((problem.geometry.out_channels,), weight.dtype)
    gradients = [
        like if needed else None for like, needed in zip((x, offset, mask, weight, bias), needs, strict=True)
    ]
    return _call(problem, (x, offset, mask, weight, None, grad_output), (*gradients, None))


def _backward_over_axis(
    problem: _Problem, needs: Flags, size: int, batched: Flags, *arrays: Array | None
) -> tuple[list[Array], list[bool]]:
    if batched[3] or any(needs[3:]):  # gradients of weight and bias are sums over the batch
        gradients = _one_by_one(partial(_backward, problem, needs), batched, arrays)
        return gradients, [True] * len(gradients)
    *images, weight, grad_output = arrays
    *images, grad_output = _as_one_batch(size, [*batched[:3], batched[4]], [*images, grad_output])
    together = _backward(problem.together(size), needs, *images, weight, grad_output)
    gradients = [gradient.reshape(size, problem.geometry.batch, *gradient.shape[1:]) for gradient in together]
    return gradients, [True] * len(gradients)


def _as_one_batch(size: int, batched: Flags, arrays: Arrays) -> list[Array | None]:
    """Return arrays with `size` batches in one, from those with an axis of that size in front, or without."""
    merged = []
    for array, is_batched in zip(arrays, batched, strict=True):
        if array is not None:
            each = array if is_batched else jax.numpy.broadcast_to(array, (size, *array.shape))
            array = each.reshape(size * each.shape[1], *each.shape[2:])
        merged.append(array)
    return merged


def _one_by_one(function: Callable[..., Any], batched: Flags, arrays: Arrays) -> Any:
    moving = [array if is_batched else None for array, is_batched in zip(arrays, batched, strict=True)]

    def one(slices: Arrays) -> Any:
        return function(*(kept if part is None else part for part, kept in zip(slices, arrays, strict=True)))

    return jax.lax.map(one, moving)


# ---- the call itself: a primitive that each platform has its own meaning of


def _call(problem: _Problem, arrays: Arrays, like: Sequence[Any]) -> list[Array]:
    """Return the results that `like` describes; both in the order of _NAMES, None where there is none."""
    given = [array for array in arrays if array is not None]
    results = tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in like if each is not None)
    computed = _bound(*given, problem=problem, given=_named(arrays), wanted=_named(like), results=results)
    axes = _varying(given)
    return [_vary(result, axes) for result in computed]


def _named(arrays: Sequence[Any]) -> tuple[str, ...]:
    return tuple(name for name, array in zip(_NAMES, arrays, strict=True) if array is not None)


# Compiled always: custom_vmap evaluates its function at once, and the primitive means nothing but compiled.
@partial(jax.jit, static_argnames=("problem", "given", "wanted", "results"))
def _bound(*arrays: Array, **static: Any) -> list[Array]:
    bound: list[Array] = _engine.bind(*arrays, **static)
    return bound


_engine = Primitive("dcn_np_deform_conv")
_engine.multiple_results = True


@_engine.def_abstract_eval
def _(*arrays: Any, results: Sequence[Any], **static: Any) -> list[Any]:
    return [jax.core.ShapedArray(result.shape, result.dtype) for result in results]


def _on_cpu(
    *arrays: Array, problem: _Problem, given: Sequence[str], wanted: Sequence[str], results: Sequence[Any]
) -> Any:
    """Let XLA call the engine: src/xla.hpp says what crosses."""
    call = jax.ffi.ffi_call(_FORWARD if "output" in wanted else _BACKWARD, results)
    geometry = numpy.frombuffer(problem.geometry.struct, numpy.int64)
    return call(*arrays, geometry=geometry, given=_bits(given), needs=_bits(wanted))


def _bits(names: Sequence[str]) -> numpy.int64:
    return numpy.int64(sum(1 << _NAMES.index(name) for name in names))


def _on_cuda(
    *arrays: Array, problem: _Problem, given: Sequence[str], wanted: Sequence[str], results: Sequence[Any]
) -> list[Array]:
    """Let XLA call Python; of halves this engine takes the weights and the bias as halves too."""
    cupy_for("dcn_np.jax is lowered to compute")
    dtypes = {"weight": problem.geometry.dtype, "bias": problem.geometry.dtype}
    taken = [array.astype(dtypes.get(name, array.dtype)) for name, array in zip(given, arrays, strict=True)]
    made = [
        jax.ShapeDtypeStruct(result.shape, dtypes.get(name, result.dtype))
        for name, result in zip(wanted, results, strict=True)
    ]
    computed = buffer_callback(partial(_queue, problem, given, wanted), made)(*taken)
    return [array.astype(result.dtype) for array, result in zip(computed, results, strict=True)]


def _queue(
    problem: _Problem, given: Sequence[str], wanted: Sequence[str], context: Any, out: Any, *buffers: Any
) -> None:
    """Queue the kernels on XLA's stream, from its buffers into its buffers."""
    geometry, matmul = problem.geometry, problem.float32_matmul
    with cuda.borrowed([*buffers, *out], context.stream) as arrays:
        named = dict.fromkeys(_NAMES) | dict(zip(given, arrays[: len(given)], strict=True))
        made = dict(zip(wanted, arrays[len(given) :], strict=True))
        x, offset, mask, weight, bias, grad_output = named.values()
        if "output" in made:
            cuda.deform_conv(geometry, x, offset, mask, weight, bias, made["output"], matmul)
        else:
            inputs = (grad_output, x, offset, mask, weight)
            cuda.deform_conv_backward_into(
                geometry, *inputs, Gradients(**made), problem.deterministic, matmul
            )


def _elsewhere(context: Any, *arrays: Any, **static: Any) -> Any:
    platforms = ", ".join(context.module_context.platforms)
    raise NotImplementedError(
        f"dcn_np.jax computes on a CPU or a CUDA device, but is lowered for {platforms}: jax.device_put the "
        "arrays on jax.devices('cpu')[0]"
    )


mlir.register_lowering(_engine, _elsewhere)
for _platform, _lowered in (("cpu", _on_cpu), ("cuda", _on_cuda)):
    mlir.register_lowering(_engine, mlir.lower_fun(_lowered, multiple_results=True), platform=_platform)


# ---- jax.shard_map, which types each array by the axes of the mesh along which it varies


def _alike(arrays: Arrays) -> list[Array | None]:
    """Let all vary along the same axes; the gradient of that sums over devices, as it must for weights."""
    axes = _varying([array for array in arrays if array is not None])
    return [None if array is None else _vary(array, axes) for array in arrays]


def _vary(array: Array, axes: frozenset[str]) -> Array:
    missing = tuple(axes - _varying([array]))
    varying: Array = jax.lax.pcast(array, missing, to="varying") if missing else array
    return varying


def _varying(arrays: Sequence[Array]) -> frozenset[str]:
    return frozenset().union(*map(_axes, arrays))


def _axes(array: Array) -> frozenset[str]:
    kind: Any = jax.typeof(array)
    # Before version 0.10 of JAX they stand in the type itself.
    axes: frozenset[str] = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    return axes
