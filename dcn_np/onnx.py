"""The standard ONNX operator DeformConv: in onnx's own evaluator of models, and out of PyTorch.

onnx.reference runs a model operator by operator; its implementation of this one is a specification, pixel by
pixel in Python. Given `DeformConv`, it runs these nodes here and all others as before. `translation_table`
makes such nodes of the layers of `dcn_np.torch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray
from onnx import TensorProto
from onnx.reference.op_run import OpRun, RuntimeTypeError

import dcn_np

__all__ = ["DeformConv", "translation_table"]


class DeformConv(OpRun):
    """The operator DeformConv of opset 19 and later, for ``onnx.reference.ReferenceEvaluator``.

    Give the class to the evaluator, as in the example; it makes one object per node. The rules are those of
    `dcn_np.modulated_deform_conv` on a CPU, for 1 to 3 spatial axes: X, W and B of the operator's definition
    are `x`, `weight` and `bias`, and the attribute `pads` holds all begins, then all ends.

    Parameters
    ----------
    onnx_node : onnx.NodeProto
        The node.
    run_params : dict
        What the evaluator says to all its nodes.
    schema : onnx.defs.OpSchema or None
        The definition; None is that of onnx.

    Raises
    ------
    ValueError
        Shapes or attributes that do not fit, when the model runs; the message names the node's inputs and
        shows the arithmetic.
    onnx.reference.op_run.RuntimeTypeError
        Inputs of different dtypes, or of a dtype that is not computed: float16, float32, float64 and bfloat16
        are.

    See Also
    --------
    dcn_np.modulated_deform_conv : The computation.
    translation_table : Make models with this operator from PyTorch.

    Notes
    -----
    The definition gives the mask of N spatial axes N channels per tap; onnx and all else take one, as here.

    The evaluator does not hand operators on to the functions of a model. ``onnx.inliner`` writes them out:
    ``inline_local_functions(model)``.

    Examples
    --------
    >>> import numpy
    >>> import onnx.parser
    >>> from dcn_np.onnx import DeformConv
    >>> from onnx.reference import ReferenceEvaluator
    >>> model = onnx.parser.parse_model('''
    ...     <ir_version: 9, opset_import: ["": 19]>
    ...     half_a_pixel (float[1, 1, 2, 3] x, float[1, 2, 2, 3] offset, float[1, 1, 1, 1] w) => (float[] y)
    ...     { y = DeformConv(x, w, offset) }''')
    >>> evaluator = ReferenceEvaluator(model, new_ops=[DeformConv])
    >>> x = numpy.arange(6, dtype="float32").reshape(1, 1, 2, 3)
    >>> offset = numpy.full((1, 2, 2, 3), 0.5, "float32")
    >>> evaluator.run(None, {"x": x, "offset": offset, "w": numpy.ones((1, 1, 1, 1), "float32")})[0]
    array([[[[2.  , 3.  , 1.75],
             [1.75, 2.25, 1.25]]]], dtype=float32)
    """

    op_domain = ""

    # The evaluator passes inputs by position and attributes by name; those that a node leaves out are None,
    # or the default where the definition has one.
    def _run(
        self,
        x: NDArray[Any],
        weight: NDArray[Any],
        offset: NDArray[Any],
        bias: NDArray[Any] | None = None,
        mask: NDArray[Any] | None = None,
        *,
        dilations: Sequence[int] | None,
        group: int,
        kernel_shape: Sequence[int] | None,
        offset_group: int,
        pads: Sequence[int] | None,
        strides: Sequence[int] | None,
    ) -> tuple[NDArray[Any]]:
        with _errors_of(self):
            if offset is None:
                raise ValueError("offset is not given; DeformConv needs it")
            if kernel_shape is not None and list(weight.shape[2:]) != list(kernel_shape):
                raise ValueError(
                    f"kernel_shape is {list(kernel_shape)}; weight has shape {weight.shape}, a kernel of "
                    f"{list(weight.shape[2:])}"
                )
            y = dcn_np.modulated_deform_conv(
                x,
                offset,
                mask,
                weight,
                bias,
                1 if strides is None else strides,
                0 if pads is None else _pairs(pads, x.ndim - 2),
                1 if dilations is None else dilations,
                group,
                offset_group,
            )
        return (y,)


def _pairs(pads: Sequence[int], axes: int) -> list[tuple[int, int]]:
    if len(pads) != 2 * axes:
        raise ValueError(
            f"pads is {list(pads)}; x has {axes} spatial axes: wanted {2 * axes} entries, every axis's begin "
            "and then every axis's end"
        )
    return list(zip(pads[:axes], pads[axes:], strict=True))


@contextmanager
def _errors_of(operator: OpRun) -> Iterator[None]:
    """Begin messages with the node, and hide TypeError: the evaluator would put a text of its own over it."""
    node = operator.onnx_node
    inputs = zip(("x", "weight", "offset", "bias", "mask"), node.input, strict=False)
    where = f"DeformConv {node.name!r} ({', '.join(f'{ours} is {name!r}' for ours, name in inputs if name)})"
    try:
        yield
    except TypeError as error:
        raise RuntimeTypeError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Tell ``torch.onnx.export`` how to write the operator of `dcn_np.torch`: as a standard DeformConv.

    The model needs nothing of this library then. torch, onnxscript and `dcn_np.torch` must be there, and the
    layers need offsets. Beside half images with float32 offsets, as autocast makes them, the node computes in
    float32, for ONNX has one dtype for all inputs.

    Returns
    -------
    dict
        For ``custom_translation_table=`` of ``torch.onnx.export(..., dynamo=True, opset_version=19)``, or a
        later opset; bfloat16 is in the operator's definition from 22 on.

    Raises
    ------
    ModuleNotFoundError
        torch is not there; without onnxscript the export says so.
    AttributeError
        `dcn_np.torch` has not been imported.

    See Also
    --------
    DeformConv : Run such models here.
    """
    import torch

    return {torch.ops.dcn_np.modulated_deform_conv.default: _translated}


# Called with symbols for tensors. torch reads the annotations: those of integers and strings are passed as
# they are, not as constants of the graph.
def _translated(
    x: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_groups: int,
    float32_matmul: str,
) -> Any:
    from onnxscript import opset19  # type: ignore[import-not-found,unused-ignore]

    if offset is None:
        raise ValueError("offset is None; ONNX's DeformConv needs offsets: use an ordinary convolution")
    arrays = [x, weight, offset, bias, mask]
    if mixed := offset.dtype != x.dtype:
        arrays = [None if array is None else opset19.Cast(array, to=TensorProto.FLOAT) for array in arrays]
    y = opset19.DeformConv(
        *arrays,
        strides=list(stride),
        pads=[*padding[::2], *padding[1::2]],
        dilations=list(dilation),
        group=groups,
        offset_group=offset_groups,
    )
    return opset19.CastLike(y, x) if mixed else y
