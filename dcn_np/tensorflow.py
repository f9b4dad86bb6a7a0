"""Deformable convolution for TensorFlow: differentiable by tf.GradientTape, eagerly and inside tf.function.

The computation is `dcn_np.modulated_deform_conv` over the tensors' own memory: they go in and out without a
copy, in a graph too. Tested on the CPU.

A graph calls back into this process by ``tf.py_function``, with its limits: ``jit_compile=True`` is an error
of TensorFlow's that names EagerPyFunc; a SavedModel is written, but another process that runs it finds no
callback; a graph cannot run it on another machine. Under a graph, threads are those of the process:
`dcn_np.set_num_threads` counts, `dcn_np.num_threads` around the call need not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy
import tensorflow as tf
from tensorflow.python.eager import record

import dcn_np

from .cpu import dtypes
from .geometry import Geometry, checked_float32_matmul
from .messages import no_second_derivative, shown

__all__ = ["deform_conv", "modulated_deform_conv"]

_INPUTS = dcn_np.Gradients._fields


# Autograph would rewrite all that is called from here, which takes half a second.
@tf.autograph.experimental.do_not_convert
def deform_conv(
    x: tf.Tensor,
    offset: tf.Tensor | None,
    weight: tf.Tensor,
    bias: tf.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    float32_matmul: str | None = None,
) -> tf.Tensor:
    """Convolve where the offsets say (DCNv1), differentiably.

    Parameters, result and errors are those of `dcn_np.deform_conv`, for tensors and variables.

    Parameters
    ----------
    x, offset, weight, bias : tf.Tensor, tf.Variable or None
        As there: channels first.
    stride, padding, dilation, groups, offset_groups
        As there.
    float32_matmul : {"strict", "tf32"} or None
        As there.

    Returns
    -------
    tf.Tensor
        Shape (batch, out_channels, *output).

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
        float32_matmul=float32_matmul,
    )


@tf.autograph.experimental.do_not_convert
def modulated_deform_conv(
    x: tf.Tensor,
    offset: tf.Tensor | None,
    mask: tf.Tensor | None,
    weight: tf.Tensor,
    bias: tf.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    float32_matmul: str | None = None,
) -> tf.Tensor:
    """Convolve where the offsets say, each tap scaled by a mask (DCNv2), differentiably.

    Parameters, result and errors are those of `dcn_np.modulated_deform_conv`, for tensors and variables.

    Parameters
    ----------
    x, offset, mask, weight, bias : tf.Tensor, tf.Variable or None
        As there: channels first.
    stride, padding, dilation, groups, offset_groups
        As there.
    float32_matmul : {"strict", "tf32"} or None
        As there.

    Returns
    -------
    tf.Tensor
        Shape (batch, out_channels, *output).

    Raises
    ------
    TypeError, ValueError
        As there. In a graph this happens while it is traced, except for what a shape leaves open beside the
        batch: that is checked when the graph runs, and is an InvalidArgumentError with the same text.
    NotImplementedError
        A gradient of a gradient was asked for.

    See Also
    --------
    dcn_np.modulated_deform_conv : The computation, without gradients: a tape that watches its arguments gives
        None.

    Notes
    -----
    Eagerly, only the gradients that a tape asks for are computed; in a graph, those of all arguments.

    TensorFlow's layout is channels last, and its tensors are contiguous: transposing copies. For `x` of shape
    (batch, height, width, channels) and `kernel` (height, width, in_channels / groups, out_channels)::

        x = tf.transpose(x, (0, 3, 1, 2))
        weight = tf.transpose(kernel, (3, 2, 0, 1))
        y = tf.transpose(modulated_deform_conv(x, offset, mask, weight), (0, 2, 3, 1))

    Without gradients no copy is needed: `dcn_np.modulated_deform_conv` takes
    ``numpy.from_dlpack(x).transpose(0, 3, 1, 2)`` as it is.
    """
    given = zip(_INPUTS, (x, offset, mask, weight, bias), strict=True)
    tensors = {
        name: _tensor(name, value) for name, value in given if value is not None or name in ("x", "weight")
    }
    window = (stride, padding, dilation, groups, offset_groups)
    if float32_matmul is not None:
        checked_float32_matmul(float32_matmul)
    shape = None if tf.executing_eagerly() else _shape_in_graph(tensors, window)
    call = _Call(tuple(tensors), _watched(tensors), window, float32_matmul)
    y: tf.Tensor = tf.custom_gradient(call.convolve)(*tensors.values())
    y.set_shape(shape)
    return y


# The computations of a call take tensors that hold numbers; the operators around them may be traced.


@dataclass(frozen=True)
class _Call:
    """One convolution: the names of its tensors, those whose gradients are needed, the other arguments."""

    names: tuple[str, ...]
    needs: tuple[str, ...]
    window: tuple[Any, ...]
    float32_matmul: str | None

    def convolve(self, *tensors: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        """Return the result, and the function that turns its gradient into theirs: a tf.custom_gradient."""

        def gradients(grad_output: tf.Tensor) -> list[tf.Tensor | None]:
            # Of a result that was gathered from, the gradient is sparse.
            inputs = (tf.convert_to_tensor(grad_output), *tensors)
            found = dict(zip(self.needs, tf.custom_gradient(self.differentiate)(*inputs), strict=True))
            return [found.get(name) for name in self.names]

        return _computed(self.forward, tensors, [tensors[0].dtype])[0], gradients

    def differentiate(self, grad_output: tf.Tensor, *tensors: tf.Tensor) -> tuple[list[tf.Tensor], Any]:
        """Return the gradients that are needed, and what refuses to go on: a tf.custom_gradient too."""
        like = [tensor for name, tensor in zip(self.names, tensors, strict=True) if name in self.needs]
        gradients = _computed(self.backward, (grad_output, *tensors), [tensor.dtype for tensor in like])
        for gradient, tensor in zip(gradients, like, strict=True):
            gradient.set_shape(tensor.shape)
        return gradients, _refuse

    def forward(self, *tensors: tf.Tensor) -> list[tf.Tensor]:
        inputs = self._inputs(tensors)
        return [dcn_np.modulated_deform_conv(*inputs, *self.window, float32_matmul=self.float32_matmul)]

    def backward(self, grad_output: tf.Tensor, *tensors: tf.Tensor) -> list[tf.Tensor]:
        arrays = (grad_output, *self._inputs(tensors)[:4])
        gradients = dcn_np.modulated_deform_conv_backward(
            *arrays, *self.window, needs=self.needs, float32_matmul=self.float32_matmul
        )
        return [gradient for gradient in gradients if gradient is not None]

    def _inputs(self, tensors: Sequence[tf.Tensor]) -> list[Any]:
        given = dict(zip(self.names, tensors, strict=True))
        return [given.get(name) for name in _INPUTS]


def _computed(
    function: Callable[..., list[tf.Tensor]], tensors: Sequence[tf.Tensor], result_dtypes: list[tf.DType]
) -> list[tf.Tensor]:
    """Return what a function gives, now or when the graph that is being traced runs."""
    if tf.executing_eagerly():
        return function(*tensors)
    results: list[tf.Tensor] = tf.py_function(function, tensors, result_dtypes)
    return results


def _refuse(*_: Any) -> None:
    raise NotImplementedError(no_second_derivative("dcn_np.tensorflow"))


def _tensor(name: str, value: Any) -> Any:
    """Return a tensor, or the value of a variable, TensorFlow's or Keras's, which is no copy."""
    if isinstance(value, tf.Variable) or hasattr(value, "__tf_tensor__"):
        return tf.convert_to_tensor(value)
    raise TypeError(f"{name} is {shown(value)}; wanted a tf.Tensor or a tf.Variable")


def _watched(tensors: Mapping[str, tf.Tensor]) -> tuple[str, ...]:
    """Return the names of the tensors whose gradients may be asked for.

    In a graph all may be: a tape outside of it is not seen from inside. Without a tape it is a
    tf.autodiff.ForwardAccumulator that asks, if any.
    """
    if tf.executing_eagerly():
        watched = [name for name, tensor in tensors.items() if record.should_record_backprop([tensor])]
        return tuple(watched or tensors)
    return tuple(tensors)


def _shape_in_graph(tensors: Mapping[str, tf.Tensor], window: Sequence[Any]) -> tf.TensorShape:
    """Return what is known of the result's shape; check the arguments if only the batch may be unknown."""
    if any(tensor.shape.rank is None for tensor in tensors.values()):
        return tf.TensorShape(None)
    shapes = {name: tensor.shape.as_list() for name, tensor in tensors.items()}
    per_image = [shapes[name] for name in ("x", "offset", "mask") if shapes.get(name)]
    batch = next((shape[0] for shape in per_image if shape[0] is not None), None)
    for shape in per_image:
        if shape[0] is None:
            shape[0] = 1 if batch is None else batch
    if any(None in shape for shape in shapes.values()):
        return tf.TensorShape([batch, *shapes["weight"][:1], *[None] * (len(shapes["x"]) - 2)])
    arrays = {
        name: SimpleNamespace(shape=tuple(shapes[name]), dtype=numpy.dtype(tensor.dtype.as_numpy_dtype))
        for name, tensor in tensors.items()
    }
    geometry = Geometry.of(dtypes(), *map(arrays.get, _INPUTS), *window)
    return tf.TensorShape([batch, *geometry.output_shape[1:]])
