"""The standard ONNX operator DeformConv, for onnx's own evaluator of models.

onnx.reference runs a model operator by operator; its implementation of this one is a specification, pixel by
pixel in Python. Given `DeformConv`, it runs these nodes here and all others as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray
from onnx.reference.op_run import OpRun, RuntimeTypeError

import dcn_np

__all__ = ["DeformConv"]


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
