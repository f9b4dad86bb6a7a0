"""Do other libraries, where they define the same thing, compute the same?

onnxruntime's DeformConv, the DeformConv cases of the onnx backend suite, SciPy's interpolation and its
convolution. Each is skipped where its library is not installed.
"""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from problems import DTYPES, Problem, assert_close, random_problem

import dcn_np

BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def drawn(seed, **sizes) -> Problem:
    """A problem that other libraries take too: some pixels and channels, no huge or non-finite offsets."""
    for attempt in itertools.count():
        problem = random_problem([*seed, attempt], batch=2, **sizes)
        if problem.x.size and problem.weight.size:
            break
    return problem if problem.offset is None else problem.replace(offset=np.clip(problem.offset, -40, 40))


# --- onnx ---------------------------------------------------------------------------------------------------


def deform_conv_node(problem: Problem):
    """The problem as one DeformConv node; inputs that are not there have no name."""
    helper = pytest.importorskip("onnx.helper")
    inputs = [
        name if getattr(problem, name) is not None else ""
        for name in ("x", "weight", "offset", "bias", "mask")
    ]
    begins, ends = zip(*problem.padding, strict=True)
    return helper.make_node(
        "DeformConv",
        inputs,
        ["y"],
        kernel_shape=problem.weight.shape[2:],
        strides=problem.stride,
        dilations=problem.dilation,
        pads=[*begins, *ends],
        group=problem.groups,
        offset_group=problem.offset_groups,
    )


def onnxruntime_result(problem: Problem) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime")
    helper = pytest.importorskip("onnx.helper")
    node = deform_conv_node(problem)
    kind = helper.np_dtype_to_tensor_dtype(problem.dtype)
    graph = helper.make_graph(
        [node],
        "problem",
        [helper.make_tensor_value_info(name, kind, None) for name in node.input if name],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: getattr(problem, name) for name in node.input if name})[0]


@BY_DTYPE
@pytest.mark.parametrize("seed", range(40))
def test_onnxruntime(seed, dtype):
    """onnxruntime adds position and offset in the dtype: coordinates up to 64 cost up to 64 units a tap."""
    problem = drawn([seed, 1], rank=2, dtype=dtype, vector_channels=seed % 4 == 0, with_offset=True)
    y = problem.forward(dcn_np)
    assert_close(y, onnxruntime_result(problem), dtype, problem.scales()["y"], units=300)


@pytest.fixture(scope="module")
def backend_cases():
    loader = pytest.importorskip("onnx.backend.test.loader")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases of other operators overflow on purpose
        cases = loader.load_model_tests(kind="node")
    return {case.name: case for case in cases}


def run_node(node, arrays: dict) -> np.ndarray:
    """A DeformConv node by dcn_np, attributes and optional inputs as the operator's definition has them."""
    settings = {attribute.name: list(attribute.ints) or attribute.i for attribute in node.attribute}
    inputs = [arrays.get(name) for name in node.input]
    x, weight, offset, bias, mask = inputs + [None] * (5 - len(inputs))
    pads = settings.get("pads", [0, 0, 0, 0])
    return dcn_np.modulated_deform_conv(
        x,
        offset,
        mask,
        weight,
        bias,
        settings.get("strides", 1),
        list(zip(pads[:2], pads[2:], strict=True)),
        settings.get("dilations", 1),
        settings.get("group", 1),
        settings.get("offset_group", 1),
    )


@pytest.mark.parametrize(
    "name",
    [
        "test_basic_deform_conv_with_padding",
        "test_basic_deform_conv_without_padding",
        "test_deform_conv_with_mask_bias",
        "test_deform_conv_with_multiple_offset_groups",
    ],
)
def test_onnx_backend_case(name, backend_cases):
    case = backend_cases[name]
    node = case.model.graph.node[0]
    assert case.data_sets
    for inputs, outputs in case.data_sets:
        y = run_node(node, dict(zip(node.input, inputs, strict=True)))
        np.testing.assert_allclose(y, outputs[0], rtol=1e-6, atol=1e-7)


# --- scipy.ndimage ------------------------------------------------------------------------------------------


def rigid_coordinates(problem: Problem) -> np.ndarray:
    """(taps, ndim, *output)"""
    output, kernel = problem.grad_output.shape[2:], problem.weight.shape[2:]
    ndim = len(output)
    tap = np.indices(kernel).reshape(ndim, -1).T.reshape(-1, ndim, *[1] * ndim)
    shape = (ndim, *[1] * ndim)
    begins = np.array([begin for begin, _ in problem.padding]).reshape(shape)
    return (
        np.indices(output) * np.reshape(problem.stride, shape)
        - begins
        + tap * np.reshape(problem.dilation, (1, *shape))
    )


def interpolated_columns(problem: Problem, interpolate) -> np.ndarray:
    """mask times x at every sampling point: (batch, in_channels, taps, *output)."""
    batch, channels = problem.x.shape[:2]
    rigid, output = rigid_coordinates(problem), problem.grad_output.shape[2:]
    offset = problem.offset.reshape(batch, problem.offset_groups, *rigid.shape)
    mask = problem.mask.reshape(batch, problem.offset_groups, len(rigid), *output)
    columns = np.empty((batch, channels, len(rigid), *output), problem.dtype)
    for image, channel in itertools.product(range(batch), range(channels)):
        group = channel * problem.offset_groups // channels
        for tap, coordinates in enumerate(rigid + offset[image, group]):
            sampled = interpolate(problem.x[image, channel], coordinates)
            columns[image, channel, tap] = sampled * mask[image, group, tap]
    return columns


def contracted(problem: Problem, columns: np.ndarray) -> np.ndarray:
    """weight x columns within each weight group, plus bias."""
    ndim = columns.ndim - 3
    columns = np.array_split(columns, problem.groups, axis=1)
    weights = np.array_split(problem.weight.reshape(*problem.weight.shape[:2], -1), problem.groups)
    parts = [np.einsum("nck...,ock->no...", *pair) for pair in zip(columns, weights, strict=True)]
    bias = np.zeros(1) if problem.bias is None else problem.bias
    return np.concatenate(parts, axis=1) + bias.reshape(-1, *[1] * ndim)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_map_coordinates(seed, rank):
    """SciPy's linear interpolation in an endless field of zeros samples; einsum contracts."""
    ndimage = pytest.importorskip("scipy.ndimage")

    def interpolate(image, coordinates):
        return ndimage.map_coordinates(image, coordinates, order=1, mode="grid-constant", cval=0.0)

    problem = drawn(
        [seed, rank, 2],
        rank=rank,
        dtype=np.float64,
        with_offset=True,
        with_mask=True,
        in_channels=4,
        out_channels=6,
        groups=2,
        offset_groups=(1, 2, 4)[seed % 3],
    )
    want = contracted(problem, interpolated_columns(problem, interpolate))
    # SciPy adds position and offset: at coordinates up to 64 that alone costs up to 64 units.
    assert_close(problem.forward(dcn_np), want, problem.dtype, problem.scales()["y"], units=500)


# --- an ordinary convolution --------------------------------------------------------------------------------


def spread_out(array: np.ndarray, steps) -> np.ndarray:
    """Zeros between the elements of the last axes, so that they are `steps` apart."""
    lead = array.ndim - len(steps)
    shape = [(extent - 1) * step + 1 for extent, step in zip(array.shape[lead:], steps, strict=True)]
    spread = np.zeros((*array.shape[:lead], *shape))
    spread[(..., *(slice(None, None, step) for step in steps))] = array
    return spread


class OrdinaryConvolution:
    """y and gradients of a problem of one weight group without offsets, by scipy.signal."""

    def __init__(self, problem: Problem):
        self.signal = pytest.importorskip("scipy.signal")
        self.problem = problem
        self.padded = np.pad(problem.x, [(0, 0), (0, 0), *problem.padding])
        self.kernels = spread_out(problem.weight, problem.dilation)
        self.outputs = spread_out(problem.grad_output, problem.stride)
        self.pairs = [(o, c) for o, c in np.ndindex(*problem.weight.shape[:2])]

    def y(self):
        steps = tuple(slice(None, None, step) for step in self.problem.stride)
        y = np.zeros(self.problem.grad_output.shape)
        for image, (o, c) in itertools.product(range(len(y)), self.pairs):
            full = self.signal.correlate(self.padded[image, c], self.kernels[o, c], "valid", "direct")
            y[image, o] += full[steps]
        return y + (0 if self.problem.bias is None else self.problem.bias.reshape(-1, *[1] * (y.ndim - 2)))

    def grad_x(self):
        grad = np.zeros(self.padded.shape)
        for image, (o, c) in itertools.product(range(len(grad)), self.pairs):
            part = self.signal.convolve(self.outputs[image, o], self.kernels[o, c], "full", "direct")
            grad[(image, c, *map(slice, part.shape))] += part
        inner = (
            slice(begin, begin + extent)
            for (begin, _), extent in zip(self.problem.padding, self.problem.x.shape[2:], strict=True)
        )
        return grad[(..., *inner)]

    def grad_weight(self):
        grad = np.zeros(self.problem.weight.shape)
        steps = tuple(slice(None, None, step) for step in self.problem.dilation)
        reach = [
            outputs + kernel - 1
            for outputs, kernel in zip(self.outputs.shape[2:], self.kernels.shape[2:], strict=True)
        ]
        seen = self.padded[(..., *map(slice, reach))]
        for image, (o, c) in itertools.product(range(len(seen)), self.pairs):
            part = self.signal.correlate(seen[image, c], self.outputs[image, o], "valid", "direct")
            grad[o, c] += part[steps]
        return grad


@pytest.mark.parametrize("offset", ["none", "zeros"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_ordinary_convolution(seed, rank, offset):
    problem = drawn(
        [seed, rank, 3],
        rank=rank,
        dtype=np.float64,
        in_channels=3,
        out_channels=4,
        groups=1,
        offset_groups=1,
        with_offset=offset == "zeros",
        with_mask=False,
    )
    if offset == "zeros":
        problem = problem.replace(offset=np.zeros_like(problem.offset))
    ordinary, scales = OrdinaryConvolution(problem), problem.scales()
    assert_close(problem.forward(dcn_np), ordinary.y(), problem.dtype, scales["y"], units=64)
    got = problem.backward(dcn_np, needs=("x", "weight"))
    assert_close(got.x, ordinary.grad_x(), problem.dtype, scales["x"], units=64)
    assert_close(got.weight, ordinary.grad_weight(), problem.dtype, scales["weight"], units=64)
