"""The digits network in a file for onnxruntime, and for OpenVINO, which reads no DeformConv of ONNX."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from footprint_once import MODELS, VARIANT, example, state

OPSET = 19  # of ONNX, the first that has DeformConv
MASK_FACTOR = 2.0  # of the sigmoid, in this network


def write_model(package: str, folder: Path) -> None:
    """Write the file that a package reads, through onnx or through OpenVINO itself."""
    architecture = example("architecture")
    canvas = example("data").CANVAS
    writer: Any = WRITERS[package](state(), (1, 1, canvas, canvas), (1, architecture.CLASSES, 1, 1))
    y = writer.x
    *convs, classifier = architecture.convolutions(VARIANT).items()
    for name, conv in convs:
        deformed = f"{name}.conv_offset.weight" in writer.state
        y = writer.relu(writer.deform_conv(y, name, conv) if deformed else writer.conv(y, name, conv))
    y = writer.conv(writer.mean(y), *classifier)
    writer.save(y, folder / MODELS[package])


class OnnxWriter:
    """Nodes of an ONNX graph; a value is its name."""

    x = "x"

    def __init__(
        self, state: Mapping[str, Any], shape: tuple[int, ...], result_shape: tuple[int, ...]
    ) -> None:
        self.onnx: Any = importlib.import_module("onnx")
        self.state, self.shapes = state, (shape, result_shape)
        self.constants, self.nodes = dict(state), list[Any]()

    def _node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{kind}.{len(self.nodes)}.{index}" for index in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, names, **attributes))
        return names if outputs > 1 else names[0]

    def conv(self, x: str, name: str, conv: Any) -> Any:
        """Add an ordinary convolution."""
        return self._node("Conv", x, f"{name}.weight", f"{name}.bias", **self._window(conv))

    def deform_conv(self, x: str, name: str, conv: Any) -> Any:
        """Add a modulated deformable convolution with its branch."""
        taps = conv.kernel_size**2
        self.constants |= {"sizes": numpy.array([2 * taps, taps]), "factor": numpy.float32(MASK_FACTOR)}
        offset, raw = self._node(
            "Split", self.conv(x, f"{name}.conv_offset", conv), "sizes", outputs=2, axis=1
        )
        mask = self._node("Mul", self._node("Sigmoid", raw), "factor")
        arrays = x, f"{name}.weight", offset, f"{name}.bias", mask
        return self._node("DeformConv", *arrays, **self._window(conv))

    def relu(self, x: str) -> Any:
        """Add max(0, x)."""
        return self._node("Relu", x)

    def mean(self, x: str) -> Any:
        """Add the mean of all positions."""
        return self._node("GlobalAveragePool", x)

    def save(self, y: str, path: Path) -> None:
        """Write the graph."""
        helper, real = self.onnx.helper, self.onnx.TensorProto.FLOAT
        inputs, outputs = (
            [helper.make_tensor_value_info(name, real, shape)]
            for name, shape in zip((self.x, y), self.shapes, strict=True)
        )
        constant = self.onnx.numpy_helper.from_array
        constants = [constant(numpy.asarray(value), name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, VARIANT, inputs, outputs, constants)
        opsets = [helper.make_opsetid("", OPSET)]
        path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())

    def _window(self, conv: Any) -> dict[str, Any]:
        return {"strides": [conv.stride] * 2, "pads": [conv.kernel_size // 2] * 4}


class OpenVinoWriter:
    """Nodes of an OpenVINO model."""

    def __init__(
        self, state: Mapping[str, Any], shape: tuple[int, ...], result_shape: tuple[int, ...]
    ) -> None:
        self.openvino: Any = importlib.import_module("openvino")
        self.opset: Any = importlib.import_module("openvino.opset8")
        self.state, self.x = state, self.opset.parameter(shape, numpy.float32, "x")

    def conv(self, x: Any, name: str, conv: Any) -> Any:
        """Add an ordinary convolution."""
        filters = self.opset.constant(self.state[f"{name}.weight"])
        return self._biased(self.opset.convolution(x, filters, *self._window(conv)), name)

    def deform_conv(self, x: Any, name: str, conv: Any) -> Any:
        """Add a modulated deformable convolution with its branch."""
        taps = conv.kernel_size**2
        branch = self.conv(x, f"{name}.conv_offset", conv)
        offset, raw = self.opset.variadic_split(branch, 1, [2 * taps, taps]).outputs()
        mask = self.opset.multiply(self.opset.sigmoid(raw), numpy.float32(MASK_FACTOR))
        filters = self.opset.constant(self.state[f"{name}.weight"])
        # Without the last argument samples beyond the border are clamped: another operator.
        convolved = self.opset.deformable_convolution(
            x, offset, filters, *self._window(conv), mask=mask, bilinear_interpolation_pad=True
        )
        return self._biased(convolved, name)

    def relu(self, x: Any) -> Any:
        """Add max(0, x)."""
        return self.opset.relu(x)

    def mean(self, x: Any) -> Any:
        """Add the mean of all positions."""
        return self.opset.reduce_mean(x, numpy.array([2, 3]), keep_dims=True)

    def save(self, y: Any, path: Path) -> None:
        """Write the model, and its parameters beside it."""
        self.openvino.save_model(
            self.openvino.Model([y], [self.x], VARIANT), str(path), compress_to_fp16=False
        )

    def _biased(self, y: Any, name: str) -> Any:
        return self.opset.add(y, self.opset.constant(self.state[f"{name}.bias"].reshape(1, -1, 1, 1)))

    def _window(self, conv: Any) -> tuple[list[int], ...]:
        """Strides, padding at either end, dilation."""
        padding = [conv.kernel_size // 2] * 2
        return [conv.stride] * 2, padding, padding, [1, 1]


WRITERS = {"onnxruntime": OnnxWriter, "openvino": OpenVinoWriter}
