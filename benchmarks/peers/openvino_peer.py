"""The DeformableConvolution operator of OpenVINO: inference only, weights known in advance."""

from __future__ import annotations

import importlib
from typing import Any

import numpy

from dcn_np.commands.bench_problems import Data, Problem
from dcn_np.commands.bench_timing import Work

openvino: Any = importlib.import_module("openvino")
opset: Any = importlib.import_module("openvino.opset8")


def _model(problem: Problem, data: Data) -> Any:
    """Weights and bias are constants, as in a trained network."""
    shapes = problem.shapes
    inputs = [opset.parameter(shapes[name], numpy.float32, name) for name in ("x", "offset", "mask")]
    x, offset, mask = inputs
    convolved = opset.deformable_convolution(
        x,
        offset,
        opset.constant(data.weight),
        strides=[problem.stride] * problem.ndim,
        pads_begin=[problem.padding] * problem.ndim,
        pads_end=[problem.padding] * problem.ndim,
        dilations=[problem.dilation] * problem.ndim,
        mask=mask,
        group=problem.groups,
        deformable_group=problem.offset_groups,
        # Without it samples beyond the border are clamped: another operator.
        bilinear_interpolation_pad=True,
    )
    bias = opset.constant(data.bias.reshape(1, -1, *[1] * problem.ndim))
    return openvino.Model([opset.add(convolved, bias)], inputs, problem.name)


class OpenVino:
    """A compiled model and one request for each layer and number of threads."""

    name = "openvino"
    version = openvino.__version__.split("-")[0]
    deforms = True

    def prepare(self, problem: Problem, data: Data, passes: str, threads: int) -> Work | None:
        """None for the backward pass, other ranks than two and float64."""
        if passes != "forward" or problem.ndim != 2 or data.x.dtype != numpy.float32:
            return None
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 otherwise, where the processor has it
            "ENABLE_CPU_PINNING": False,  # the affinity of our thread stays as it is
        }
        request = openvino.compile_model(_model(problem, data), "CPU", settings).create_infer_request()
        for index, array in enumerate((data.x, data.offset, data.mask)):
            request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
        return Work(request.infer, lambda _: {"y": request.get_output_tensor(0).data})


def load() -> OpenVino:
    """Return the peer."""
    return OpenVino()
