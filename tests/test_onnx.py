"""DeformConv inside onnx's evaluator of models: the operator's own cases, onnxruntime, errors."""

from __future__ import annotations

import doctest
import time
import warnings

import numpy as np
import pytest
from problems import DTYPES, HALVES, Problem, assert_close, random_problem
from test_peers import deform_conv_node, drawn, onnxruntime_result

import dcn_np

onnx = pytest.importorskip("onnx")

from onnx import helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import RuntimeTypeError  # noqa: E402

import dcn_np.onnx  # noqa: E402

PROBLEM_INPUTS = ("x", "weight", "offset", "bias", "mask")


def model_of(nodes, dtype, inputs, outputs=("y",), initializers=(), opset=22, functions=()):
    """A model of nodes, all of whose inputs and outputs have one dtype."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, None) for name in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        initializers,
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(f.domain, 1) for f in functions)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def evaluated(model, arrays) -> np.ndarray:
    return ReferenceEvaluator(model, new_ops=[dcn_np.onnx.DeformConv]).run(None, arrays)[0]


def result(problem: Problem, opset: int = 22) -> np.ndarray:
    arrays = {name: getattr(problem, name) for name in PROBLEM_INPUTS if getattr(problem, name) is not None}
    return evaluated(model_of([deform_conv_node(problem)], problem.dtype, arrays, opset=opset), arrays)


def arrays_of(dtype=np.float32, seed=0, size=6, channels=4):
    """Inputs of a 3x3 convolution that keeps the size."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((1, channels, size, size)).astype(dtype),
        "weight": rng.standard_normal((channels, channels, 3, 3)).astype(dtype),
        "offset": rng.uniform(-2, 2, (1, 18, size, size)).astype(dtype),
    }


def node_of(inputs=("x", "weight", "offset"), **attributes):
    return helper.make_node("DeformConv", inputs, ["y"], **{"pads": [1, 1, 1, 1], **attributes})


# --- the values ---------------------------------------------------------------------------------------------


def test_the_cases_of_the_operator():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases of other operators overflow on purpose
        cases = [
            case
            for case in collect_testcases("DeformConv")
            if any(node.op_type == "DeformConv" for node in case.model.graph.node)
        ]
    assert {
        "test_basic_deform_conv_with_padding",
        "test_basic_deform_conv_without_padding",
        "test_deform_conv_with_mask_bias",
        "test_deform_conv_with_multiple_offset_groups",
    } <= {case.name for case in cases}
    for case in cases:
        names = [value.name for value in case.model.graph.input]
        assert case.data_sets
        for inputs, outputs in case.data_sets:
            y = evaluated(case.model, dict(zip(names, inputs, strict=True)))
            assert y.dtype == outputs[0].dtype
            np.testing.assert_allclose(y, outputs[0], rtol=1e-6, atol=1e-7, err_msg=case.name)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_the_reference(seed, dtype, rank):
    problem = random_problem([seed, rank, 9], rank, dtype, special=False, with_offset=True)
    y = result(problem)
    assert y.dtype == dtype
    assert_close(y, problem.expected_forward(), dtype, problem.scales()["y"], what=str(problem))


@pytest.mark.parametrize("opset", [19, 22])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_onnxruntime(seed, dtype, opset):
    """onnxruntime adds position and offset in the dtype: test_peers.py."""
    problem = drawn([seed, 10], rank=2, dtype=dtype, with_offset=True)
    y = result(problem, opset)
    assert_close(y, onnxruntime_result(problem), dtype, problem.scales()["y"], units=300)


@pytest.mark.parametrize("with_mask", [False, True], ids=["rigid mask", "mask"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    "different",
    [
        {"groups": 2},
        {"offset_groups": 2},
        {"groups": 3, "offset_groups": 2},
        {"padding": ((0, 3), (2, 1))},
        {"stride": (3, 2)},
        {"dilation": (1, 3)},
    ],
    ids=lambda different: ", ".join(different),
)
def test_onnxruntime_on_each_attribute(different, with_bias, with_mask):
    sizes = {
        "in_channels": 6,
        "out_channels": 6,
        "extent": (9, 8),
        "kernel": (3, 2),
        "stride": (1, 1),
        "padding": ((1, 1), (1, 1)),
        "dilation": (1, 1),
        "groups": 1,
        "offset_groups": 1,
        "with_offset": True,
        **different,
    }
    problem = drawn([11], rank=2, dtype=np.dtype("d"), with_bias=with_bias, with_mask=with_mask, **sizes)
    assert (problem.bias is not None, problem.mask is not None) == (with_bias, with_mask)
    y = result(problem)
    assert_close(y, onnxruntime_result(problem), problem.dtype, problem.scales()["y"], units=300)


@pytest.mark.parametrize(
    "left_out", ["dilations", "group", "kernel_shape", "offset_group", "pads", "strides"]
)
def test_attributes_left_out_have_the_defaults_of_the_definition(left_out):
    given = {
        "dilations": [1, 1],
        "group": 1,
        "kernel_shape": [3, 3],
        "offset_group": 1,
        "pads": [0, 0, 0, 0],
        "strides": [1, 1],
    }
    arrays = arrays_of()
    arrays["offset"] = arrays["offset"][..., :4, :4]
    nodes = [
        helper.make_node("DeformConv", ["x", "weight", "offset"], ["y"], **attributes)
        for attributes in (given, {name: value for name, value in given.items() if name != left_out})
    ]
    y, same = (evaluated(model_of([node], np.float32, arrays), arrays) for node in nodes)
    np.testing.assert_array_equal(y, same)


# --- whole models -------------------------------------------------------------------------------------------


def network(rng, channels=4):
    """Conv -> offsets and masks of a DeformConv -> Relu, as layers of DCNv2 are exported."""
    shapes = {
        "branch_weight": (27, channels, 3, 3),
        "branch_bias": (27,),
        "weight": (6, channels, 3, 3),
        "bias": (6,),
    }
    constants = {name: rng.standard_normal(shape).astype("f") for name, shape in shapes.items()}
    constants |= {name: np.array([int(name)]) for name in ("0", "1", "18", "27")}
    nodes = [
        helper.make_node(
            "Conv", ["x", "branch_weight", "branch_bias"], ["branch"], pads=[1] * 4, strides=[2, 2]
        ),
        helper.make_node("Slice", ["branch", "0", "18", "1"], ["offset"]),
        helper.make_node("Slice", ["branch", "18", "27", "1"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["mask"]),
        helper.make_node(
            "DeformConv", ["x", "weight", "offset", "bias", "mask"], ["z"], pads=[1] * 4, strides=[2, 2]
        ),
        helper.make_node("Relu", ["z"], ["y"]),
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return model_of(nodes, np.float32, ["x"], initializers=initializers)


def test_a_network():
    onnxruntime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(12)
    model, x = network(rng), rng.standard_normal((2, 4, 11, 13)).astype("f")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, {"x": x})[0]
    assert (want > 0).mean() > 0.2
    np.testing.assert_allclose(evaluated(model, {"x": x}), want, rtol=1e-4, atol=1e-4)


def test_inside_an_if():
    arrays = arrays_of()
    kind = helper.np_dtype_to_tensor_dtype(np.dtype("f"))
    branch = helper.make_graph([node_of()], "then", [], [helper.make_tensor_value_info("y", kind, None)])
    choice = numpy_helper.from_array(np.array(True), "choice")
    model = model_of(
        [helper.make_node("If", ["choice"], ["y"], then_branch=branch, else_branch=branch)],
        np.float32,
        arrays,
        initializers=[choice],
    )
    want = evaluated(model_of([node_of()], np.float32, arrays), arrays)
    np.testing.assert_array_equal(evaluated(model, arrays), want)


def test_attributes_of_a_function_written_out_by_the_inliner():
    from onnx import inliner

    node = helper.make_node("DeformConv", ["x", "weight", "offset"], ["y"])
    pads = node.attribute.add()
    pads.name, pads.ref_attr_name, pads.type = "pads", "around", onnx.AttributeProto.INTS
    function = helper.make_function(
        "ours", "layer", ["x", "weight", "offset"], ["y"], [node], [helper.make_opsetid("", 22)], ["around"]
    )
    arrays = arrays_of()
    call = helper.make_node("layer", list(arrays), ["y"], domain="ours", around=[1, 1, 1, 1])
    model = model_of([call], np.float32, arrays, functions=[function])
    want = evaluated(model_of([node_of()], np.float32, arrays), arrays)
    np.testing.assert_array_equal(evaluated(inliner.inline_local_functions(model), arrays), want)


# --- that it runs here, and fast ----------------------------------------------------------------------------


def test_the_engine_computes(monkeypatch):
    arrays = arrays_of()
    model = model_of([node_of()], np.float32, arrays)
    calls, sentinel = [], np.full((1, 4, 6, 6), 7, np.float32)
    monkeypatch.setattr(dcn_np, "modulated_deform_conv", lambda *given: calls.append(given) or sentinel)
    np.testing.assert_array_equal(evaluated(model, arrays), sentinel)
    assert len(calls) == 1
    assert calls[0][0] is arrays["x"]
    # Without it the evaluator does not come here.
    small = arrays_of(size=2, channels=1)
    ReferenceEvaluator(model).run(None, small)
    assert len(calls) == 1


def test_a_large_image_takes_no_time():
    """onnx's own implementation needs a minute for 16x16 pixels of 16 channels."""
    arrays = arrays_of(size=64, channels=32)
    evaluator = ReferenceEvaluator(
        model_of([node_of()], np.float32, arrays), new_ops=[dcn_np.onnx.DeformConv]
    )
    before = time.perf_counter()
    evaluator.run(None, arrays)
    assert time.perf_counter() - before < 1


# --- out of PyTorch ----------------------------------------------------------------------------------------


def layers_of(torch, half):
    """A network of two layers with everything set, of which the second has no bias and no masks."""
    ours = pytest.importorskip("dcn_np.torch")

    class HalfImages(torch.nn.Module):
        """Images, weights and results are halves, offsets are not: as under autocast."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch.autocast("cpu", torch.float16):
                return self.layer(x)

    layers = torch.nn.Sequential(
        ours.ModulatedDeformConv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2, offset_groups=2),
        torch.nn.ReLU(),
        ours.DeformConv2d(6, 3, 3, padding=1, bias=False),
    )
    torch.manual_seed(13)
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return (HalfImages(layers) if half else layers).eval()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("opset", [19, 22])
def test_export_from_torch(opset, half):
    torch, onnxruntime = pytest.importorskip("torch"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layers, x = layers_of(torch, half), torch.randn(2, 4, 11, 13)
    model = torch.onnx.export(
        layers,
        (x,),
        dynamo=True,
        opset_version=opset,
        custom_translation_table=dcn_np.onnx.translation_table(),
        dynamic_shapes=[{0: "batch"}],
        verbose=False,
    ).model_proto
    assert {node.domain for node in model.graph.node} == {""}
    assert [node.op_type for node in model.graph.node].count("DeformConv") == 2
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 4, 11, 13)
    want = layers(images).detach().numpy()
    tolerance = {"rtol": 0.02, "atol": 0.02} if half else {"rtol": 1e-4, "atol": 1e-5}
    fed = {model.graph.input[0].name: images.numpy()}
    for y in (session.run(None, fed)[0], evaluated(model, fed)):
        assert y.dtype == want.dtype
        np.testing.assert_allclose(y, want, **tolerance)


# --- errors -------------------------------------------------------------------------------------------------


def refused(kind, node, arrays) -> str:
    model = model_of([node], np.float32, arrays)
    with pytest.raises(kind) as caught:
        evaluated(model, arrays)
    return str(caught.value)


def test_errors_name_the_node_and_its_inputs():
    arrays = arrays_of()
    arrays["moved"] = arrays.pop("offset")[:, :16]
    message = refused(ValueError, node_of(["x", "weight", "moved"], name="conv3"), arrays)
    assert message.startswith("DeformConv 'conv3' (x is 'x', weight is 'weight', offset is 'moved'): offset")
    assert "16 channels" in message
    assert "18" in message


def test_different_dtypes():
    arrays = arrays_of()
    arrays["offset"] = arrays["offset"].astype("d")
    message = refused(RuntimeTypeError, node_of(), arrays)
    assert message.startswith("DeformConv '' (x is 'x'")
    assert "float64" in message


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"kernel_shape": [3, 2]}, "kernel_shape is [3, 2]; weight has shape (4, 4, 3, 3)"),
        ({"pads": [1, 1]}, "pads is [1, 1]; x has 2 spatial axes: wanted 4 entries"),
        ({"pads": [1, 1, -1, 1]}, "-1"),
        ({"strides": [1]}, "stride has 1 entry"),
        ({"dilations": [0, 1]}, "dilation[0] is 0"),
        ({"group": 3}, "groups"),
        ({"offset_group": 3}, "offset_groups"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_attributes_that_do_not_fit(attributes, words):
    assert words in refused(ValueError, node_of(**attributes), arrays_of())


def test_ranks_that_are_not_computed():
    arrays = {name: np.zeros(shape, "f") for name, shape in {"x": (1, 1), "weight": (1, 1)}.items()}
    arrays["offset"] = np.zeros((1, 0), "f")
    node = helper.make_node("DeformConv", list(arrays), ["y"])
    assert "x has 2 axes" in refused(ValueError, node, arrays)


def test_offset_is_needed():
    arrays = arrays_of()
    with pytest.raises(ValueError, match="offset is not given"):
        dcn_np.onnx.DeformConv.eval(arrays["x"], arrays["weight"], None, pads=[1, 1, 1, 1])


def test_the_example_in_the_documentation():
    failed, attempted = doctest.testmod(dcn_np.onnx)
    assert attempted
    assert not failed
