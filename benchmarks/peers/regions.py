"""What pools over regions: dcn_np, and the operators that other libraries have. None of them is needed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy

import dcn_np
from dcn_np.commands.bench_timing import Work
from dcn_np.threads import exactly


class RegionPeer(Protocol):
    """A library that can be timed."""

    name: str
    version: str

    def prepare(self, problem: Any, data: Any, passes: str, threads: int) -> Work | None:
        """Make a problem ready to run, or return None for what this library does not have."""


class DcnNp:
    """The library itself."""

    name, version = "dcn_np", dcn_np.__version__

    def prepare(self, problem: Any, data: Any, passes: str, threads: int) -> Work:
        """Forward, or forward and all gradients."""
        arrays = (data.x, data.rois, *data.moved(problem))
        pool = getattr(dcn_np, problem.operator)
        backward = getattr(dcn_np, f"{problem.operator}_backward")

        def run() -> dict[str, numpy.ndarray]:
            y = pool(*arrays, **problem.sizes)
            if passes == "forward":
                return {"y": y}
            return {"y": y, **backward(data.grad_output, *arrays, **problem.sizes)._asdict()}

        return Work(run, lambda results: results, lambda: exactly(threads))


class OnnxRuntime:
    """RoiAlign with half_pixel coordinates, forward."""

    name = "onnxruntime"

    def __init__(self) -> None:
        self.onnx: Any = importlib.import_module("onnx")
        self.runtime: Any = importlib.import_module("onnxruntime")
        self.version = self.runtime.__version__

    def prepare(self, problem: Any, data: Any, passes: str, threads: int) -> Work | None:
        """None for all but the forward pass of roi_align."""
        if problem.operator != "roi_align" or passes != "forward":
            return None
        helper, count = self.onnx.helper, problem.regions
        node = helper.make_node(
            "RoiAlign",
            ["x", "rois", "images"],
            ["y"],
            output_height=problem.bins,
            output_width=problem.bins,
            sampling_ratio=problem.samples,
            spatial_scale=problem.sizes["spatial_scale"],
            coordinate_transformation_mode="half_pixel",
        )
        tensor = helper.make_tensor_value_info
        inputs = [tensor("x", 1, data.x.shape), tensor("rois", 1, (count, 4)), tensor("images", 7, (count,))]
        graph = helper.make_graph([node], "align", inputs, [tensor("y", 1, data.grad_output.shape)])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = self.runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        rois = numpy.ascontiguousarray(data.rois[:, 1:])
        feed = {"x": data.x, "rois": rois, "images": data.rois[:, 0].astype(numpy.int64)}
        return Work(lambda: session.run(None, feed), lambda results: {"y": results[0]})


class OpenVino:
    """DeformablePSROIPooling, forward."""

    name = "openvino"

    def __init__(self) -> None:
        self.openvino: Any = importlib.import_module("openvino")
        self.opset: Any = importlib.import_module("openvino.opset9")
        self.version = self.openvino.__version__.split("-")[0]

    def prepare(self, problem: Any, data: Any, passes: str, threads: int) -> Work | None:
        """None for all but the forward pass of deform_psroi_pool."""
        if passes != "forward" or problem.operator != "deform_psroi_pool":
            return None
        arrays = (data.x, data.rois, data.offset)
        inputs = [self.opset.parameter(array.shape, array.dtype) for array in arrays]
        scale, per_part, mode = problem.sizes["spatial_scale"], problem.samples, "bilinear_deformable"
        sizes = (problem.outputs, scale, problem.group, mode, per_part, per_part, 0.1, problem.bins)
        node = self.opset.deformable_psroi_pooling(inputs[0], inputs[1], *sizes, offsets=inputs[2])
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        settings["ENABLE_CPU_PINNING"] = False
        model = self.openvino.Model([node], inputs, problem.name)
        request = self.openvino.compile_model(model, "CPU", settings).create_infer_request()
        for index, array in enumerate(arrays):
            request.set_input_tensor(index, self.openvino.Tensor(array, shared_memory=True))
        return Work(request.infer, lambda _: {"y": request.get_output_tensor(0).data})


class Torchvision:
    """roi_align, forward and backward."""

    name = "torchvision"

    def __init__(self) -> None:
        self.arrays: Any = importlib.import_module("peers.torch_arrays")
        torchvision: Any = importlib.import_module("torchvision")
        self.version, self.align = torchvision.__version__, torchvision.ops.roi_align

    def prepare(self, problem: Any, data: Any, passes: str, threads: int) -> Work | None:
        """None for all but roi_align."""
        if problem.operator != "roi_align":
            return None
        rois = self.arrays.torch.from_numpy(data.rois)
        sizes = (problem.bins, problem.sizes["spatial_scale"], problem.samples, True)
        work: Work = self.arrays.work(
            lambda x: self.align(x, rois, *sizes), {"x": data.x}, data.grad_output, passes, threads
        )
        return work


class Paddle:
    """roi_align, forward and backward."""

    name = "paddle"

    def __init__(self) -> None:
        self.paddle: Any = importlib.import_module("paddle")
        self.ops: Any = importlib.import_module("paddle.vision.ops")
        self.paddle.set_device("cpu")
        self.version = self.paddle.__version__

    def prepare(self, problem: Any, data: Any, passes: str, threads: int) -> Work | None:
        """None for all but roi_align."""
        if problem.operator != "roi_align":
            return None
        paddle = self.paddle
        x = paddle.to_tensor(data.x, stop_gradient=passes == "forward")
        boxes, count = paddle.to_tensor(data.rois[:, 1:]), paddle.to_tensor([problem.regions], dtype="int32")
        sizes = (problem.bins, problem.sizes["spatial_scale"], problem.samples, True)
        grad = paddle.to_tensor(data.grad_output)

        def run() -> tuple[Any, ...]:
            y = self.ops.roi_align(x, boxes, count, *sizes)
            return (y,) if passes == "forward" else (y, *paddle.grad(y, x, grad))

        def results(tensors: tuple[Any, ...]) -> dict[str, numpy.ndarray]:
            return {name: tensor.numpy() for name, tensor in zip(("y", "x"), tensors, strict=False)}

        def settings() -> contextlib.AbstractContextManager[Any]:
            paddle.set_num_threads(threads) if hasattr(paddle, "set_num_threads") else None
            return contextlib.nullcontext()

        return Work(run, results, settings)


PEERS = {peer.name: peer for peer in (OnnxRuntime, OpenVino, Torchvision, Paddle)}
NAMES = tuple(PEERS)


def load(names: Iterable[str]) -> tuple[list[RegionPeer], dict[str, str]]:
    """The peers that can be imported, and for each of the others the reason why it cannot."""
    found: list[RegionPeer] = []
    missing = {}
    for name in names:
        try:
            found.append(PEERS[name]())
        # A broken installation raises anything (RuntimeError, OSError): the caller reports it.
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing
