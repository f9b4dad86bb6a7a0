"""The DeformConv operator of onnxruntime: inference only, weights known in advance."""

from __future__ import annotations

import importlib
from typing import Any

import numpy

from dcn_np.commands.bench_problems import Data, Problem
from dcn_np.commands.bench_timing import Work

OPSET = 22
INPUTS = ("x", "offset", "mask")
onnx: Any = importlib.import_module("onnx")
onnxruntime: Any = importlib.import_module("onnxruntime")


def _model(problem: Problem, data: Data) -> bytes:
    """One node; weight and bias are constants, as in a trained network."""
    helper, tensor_type = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype(data.x.dtype)
    node = helper.make_node(
        "DeformConv",
        ["x", "weight", "offset", "bias", "mask"],
        ["y"],
        kernel_shape=problem.kernel,
        strides=[problem.stride] * problem.ndim,
        pads=[problem.padding] * (2 * problem.ndim),
        dilations=[problem.dilation] * problem.ndim,
        group=problem.groups,
        offset_group=problem.offset_groups,
    )
    *inputs, y = (
        helper.make_tensor_value_info(name, tensor_type, problem.shapes[name]) for name in (*INPUTS, "y")
    )
    constants = [onnx.numpy_helper.from_array(getattr(data, name), name) for name in ("weight", "bias")]
    graph = helper.make_graph([node], problem.name, inputs, [y], constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


class OnnxRuntime:
    """A session for each layer and number of threads."""

    name = "onnxruntime"
    version = onnxruntime.__version__
    deforms = True

    def prepare(self, problem: Problem, data: Data, passes: str, threads: int) -> Work | None:
        """None for the backward pass and for other ranks than two."""
        if passes != "forward" or problem.ndim != 2:
            return None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads may spin inside a call, not while another library is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = _model(problem, data)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        inputs = {name: getattr(data, name) for name in INPUTS}

        def run() -> list[numpy.ndarray]:
            results: list[numpy.ndarray] = session.run(None, inputs)
            return results

        return Work(run, lambda results: {"y": results[0]})


def load() -> OnnxRuntime:
    """Return the peer."""
    return OnnxRuntime()
