"""dcn_np.paddle, dynamic, under to_static and beside paddle's operator; tensors in the plain functions."""

from types import SimpleNamespace

import numpy as np
import pytest
from adapters import INPUTS, OverArrays, addresses
from problems import DTYPES, HALVES, assert_backward, assert_forward, random_problem

import dcn_np

paddle = pytest.importorskip("paddle")
dcn_paddle = pytest.importorskip("dcn_np.paddle")


class Dynamic(OverArrays):
    def tensor(self, array):
        return tensor_of(array)

    def array(self, tensor):
        return array_of(tensor)

    def gradients(self, function, tensors, grad_output):
        for tensor in tensors:
            tensor.stop_gradient = False
        return paddle.grad(function(*tensors), tensors, grad_output)


class ToStatic(Dynamic):
    def __init__(self, adapter):
        names = ("deform_conv", "modulated_deform_conv")
        static = {name: paddle.jit.to_static(getattr(adapter, name), full_graph=False) for name in names}
        super().__init__(SimpleNamespace(**static))


def tensor_of(array):
    """A copy: of bfloat16 paddle takes no arrays."""
    if array.dtype.name == "bfloat16":
        return paddle.to_tensor(array.astype(np.float32)).astype("bfloat16")
    return paddle.to_tensor(array)


def array_of(tensor):
    is_bfloat16 = tensor.dtype == paddle.bfloat16
    return tensor.astype("float32").numpy().astype(HALVES[1]) if is_bfloat16 else tensor.numpy()


def problem_of(ndim=2, dtype=np.float32, seed=0, **sizes):
    sizes = {"batch": 2, "in_channels": 4, "out_channels": 6, "groups": 2, "offset_groups": 2} | sizes
    fixed = {"with_offset": True, "with_mask": True, "with_bias": True}
    return random_problem(seed, ndim, dtype, special=False, **fixed | sizes)


def tensors_of(problem, *, stop_gradient=False):
    arrays = (problem.x, problem.offset, problem.mask, problem.weight, problem.bias)
    tensors = [None if array is None else tensor_of(array) for array in arrays]
    for tensor in tensors:
        tensor.stop_gradient = stop_gradient
    return tensors


@pytest.mark.parametrize("way", [Dynamic, ToStatic])
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_results_and_gradients_are_those_of_the_definition(ndim, dtype, way):
    for seed in range(4):
        problem = random_problem(seed, ndim, dtype)
        assert_forward(problem, way(dcn_paddle))
        assert_backward(problem, way(dcn_paddle))


def test_an_input_that_is_not_there():
    problem = problem_of()
    x, offset, mask, weight, bias = tensors_of(problem)
    for inputs in [
        (x, None, None, weight, None),
        (x, offset, None, weight, bias),
        (x, None, mask, weight, None),
    ]:
        given = [tensor for tensor in inputs if tensor is not None]
        y = dcn_paddle.modulated_deform_conv(*inputs, *problem.parameters)
        gradients = iter(paddle.grad(y.sum(), given))
        with paddle.no_grad():
            want = dcn_np.modulated_deform_conv_backward(
                paddle.ones_like(y), *inputs[:4], *problem.parameters
            )
        for tensor, wanted in zip(inputs, want, strict=True):
            assert tensor is None or np.array_equal(next(gradients).numpy(), wanted.numpy())


def test_only_what_is_needed_is_computed(monkeypatch):
    asked = []
    backward = dcn_np.modulated_deform_conv_backward

    def spy(*arguments, needs, **keywords):
        asked.append(set(needs))
        return backward(*arguments, needs=needs, **keywords)

    monkeypatch.setattr(dcn_np, "modulated_deform_conv_backward", spy)
    problem = problem_of()
    tensors = tensors_of(problem, stop_gradient=True)
    assert dcn_paddle.modulated_deform_conv(*tensors, *problem.parameters).stop_gradient
    tensors[1].stop_gradient = tensors[3].stop_gradient = False
    with paddle.no_grad():
        assert dcn_paddle.modulated_deform_conv(*tensors, *problem.parameters).stop_gradient
    y = dcn_paddle.modulated_deform_conv(*tensors, *problem.parameters)
    assert not y.stop_gradient
    y.sum().backward()
    assert asked == [{"offset", "weight"}]
    assert [tensor.grad is None for tensor in tensors] == [True, False, True, False, True]


def test_a_parameter_learns():
    problem = problem_of()
    x, offset, mask, weight, bias = tensors_of(problem, stop_gradient=True)
    parameters = [paddle.create_parameter(tensor.shape, "float32") for tensor in (weight, bias)]
    optimizer = paddle.optimizer.SGD(0.01, parameters)
    losses = []
    for _ in range(5):
        loss = (
            (dcn_paddle.modulated_deform_conv(x, offset, mask, *parameters, *problem.parameters) - 1)
            .square()
            .mean()
        )
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)


# ---- memory


def strided(tensor):
    """The same numbers, channels last."""
    axes = [0, *range(2, tensor.ndim), 1]
    back = [0, tensor.ndim - 1, *range(1, tensor.ndim - 1)]
    return paddle.transpose(paddle.transpose(tensor, axes).contiguous(), back).detach()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
def test_nothing_is_copied(monkeypatch, dtype, channels_last):
    problem = problem_of(dtype=dtype)
    tensors = tensors_of(problem, stop_gradient=True)
    if channels_last:
        tensors[:3] = map(strided, tensors[:3])
        assert not any(tensor.is_contiguous() for tensor in tensors[:3])
    for tensor in tensors:
        tensor.stop_gradient = False
    with addresses(monkeypatch) as calls:
        y = dcn_paddle.modulated_deform_conv(*tensors, *problem.parameters)
        grad_outputs = []  # paddle.grad hands on a copy of what it is given
        y.register_hook(lambda gradient: grad_outputs.append(gradient.data_ptr()))
        gradients = paddle.grad(y, tensors, tensor_of(problem.grad_output))
    (read, written), (read_again, written_again) = calls
    inputs = [tensor.data_ptr() for tensor in tensors]
    assert read == inputs
    assert read_again == [*grad_outputs, *inputs[:4]]
    assert written == [y.data_ptr()]
    assert written_again == [gradient.data_ptr() for gradient in gradients]
    assert y.strides[1] == (1 if channels_last else np.prod(y.shape[2:]))
    for gradient, wanted in zip(gradients, problem.backward(dcn_np), strict=True):
        assert np.array_equal(array_of(gradient), wanted)


def test_strides_go_on_through_a_network():
    problem = problem_of()
    tensors = tensors_of(problem)
    found = []
    for change in (lambda tensor: tensor, strided_in_graph):
        y = dcn_paddle.modulated_deform_conv(change(tensors[0]), *tensors[1:], *problem.parameters)
        found.append(paddle.grad((paddle.nn.functional.relu(change(y)) ** 2).sum(), tensors))
    for one, other in zip(*found, strict=True):
        assert np.allclose(one.numpy(), other.numpy(), rtol=1e-4, atol=1e-3)


def strided_in_graph(tensor):
    return paddle.transpose(paddle.transpose(tensor, [0, 2, 3, 1]).contiguous(), [0, 3, 1, 2])


# ---- to_static


# to_static follows neither *tensors nor the attributes of a Problem.


@pytest.mark.parametrize("inference", [False, True])
def test_to_static_with_breaks(inference):
    problem = problem_of()
    window, tensors = problem.parameters, tensors_of(problem, stop_gradient=inference)

    def network(x, offset, mask, weight, bias):
        y = dcn_paddle.modulated_deform_conv(x * 2, offset, mask, weight, bias, *window)
        return paddle.nn.functional.relu(y).sum()

    static = paddle.jit.to_static(network, full_graph=False)
    for _ in range(2):  # as traced, and as found again
        assert np.allclose(static(*tensors).item(), network(*tensors).item())
    if not inference:
        found = [paddle.grad(function(*tensors), tensors) for function in (static, network)]
        for one, other in zip(*found, strict=True):
            assert np.allclose(one.numpy(), other.numpy(), rtol=1e-5)


def test_to_static_with_the_gradients_inside():
    problem = problem_of()
    window = problem.parameters

    def step(x, offset, mask, weight, bias):
        dcn_paddle.modulated_deform_conv(x, offset, mask, weight, bias, *window).sum().backward()
        return [tensor.grad * 1 for tensor in (x, offset, mask, weight, bias)]

    steps = (step, paddle.jit.to_static(step, full_graph=False))
    for one, other in zip(*[function(*tensors_of(problem)) for function in steps], strict=True):
        assert np.array_equal(one.numpy(), other.numpy())


def test_a_whole_graph_is_refused():
    x, offset, _, weight, _ = tensors_of(problem_of())
    static = paddle.jit.to_static(dcn_paddle.deform_conv, full_graph=True)
    with pytest.raises(TypeError, match=r"x is .*; wanted a paddle\.Tensor, .*full_graph=False"):
        static(x, offset, weight)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": lambda t: t[:, :1]}, ValueError, "weight has 1 channel on axis 1; x has 4"),
        ({"offset": lambda t: t[:1]}, ValueError, "offset has a batch of 1; x has 2"),
        ({"weight": lambda t: t.astype("float64")}, TypeError, "weight has dtype float64 but x has float32"),
        ({"x": lambda t: t.astype("int32")}, TypeError, r"x is an array \(Tensor\) of shape \(2, 4, .*int32"),
        ({"x": lambda t: t[0, 0]}, ValueError, "x has 2 axes"),
        (
            {"mask": lambda t: t.numpy()},
            TypeError,
            r"mask is an array \(ndarray\).*; wanted a paddle\.Tensor",
        ),
        ({"x": lambda t: None}, TypeError, r"x is None; wanted a paddle\.Tensor"),
        ({"weight": lambda t: None}, TypeError, r"weight is None; wanted a paddle\.Tensor"),
        ({"bias": lambda t: 1}, TypeError, r"bias is 1 \(int\); wanted a paddle\.Tensor"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    problem = problem_of()
    tensors = [change.get(name, lambda t: t)(t) for name, t in zip(INPUTS, tensors_of(problem), strict=True)]
    with pytest.raises(error, match=message):
        dcn_paddle.modulated_deform_conv(*tensors, *problem.parameters)


def test_gradients_have_no_gradients():
    problem = problem_of()
    tensors = tensors_of(problem)
    y = dcn_paddle.modulated_deform_conv(*tensors, *problem.parameters).square().sum()
    gradients = paddle.grad(y, tensors, create_graph=True)
    with pytest.raises(OSError, match=r"(?s)NotImplementedError.*dcn_np\.paddle.*second derivatives"):
        gradients[0].square().sum().backward()


def test_some_gradients_are_asked_for_by_stop_gradient():
    """As of every PyLayer, paddle.grad takes all tensors of a call that have a gradient, or none."""
    problem = problem_of()
    x, *others = tensors_of(problem)
    y = dcn_paddle.modulated_deform_conv(x, *others, *problem.parameters)
    with pytest.raises(ValueError, match="should return None at 1 position"):
        paddle.grad(y, [x], retain_graph=True)
    paddle.grad(y, [x, *others])
    y = dcn_paddle.modulated_deform_conv(x, *[t.detach() for t in others], *problem.parameters)
    paddle.grad(y, [x])


# ---- the plain functions


@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
def test_the_plain_functions_take_tensors(dtype):
    for seed in range(20):
        problem = random_problem(seed, dtype=dtype)
        mine = problem.map_arrays(tensor_of)
        y, gradients = mine.forward(dcn_np), mine.backward(dcn_np)
        want = problem.backward(dcn_np)
        assert isinstance(y, paddle.Tensor)
        assert y.stop_gradient
        assert np.array_equal(array_of(y), problem.forward(dcn_np), equal_nan=True)
        for gradient, wanted in zip(gradients, want, strict=True):
            assert (gradient is None) == (wanted is None)
            assert wanted is None or np.array_equal(array_of(gradient), wanted, equal_nan=True)


def test_a_tensor_with_gradient_in_the_plain_functions():
    problem = problem_of()
    x, *others = tensors_of(problem, stop_gradient=True)
    x.stop_gradient = False
    message = (
        r"^x is a paddle\.Tensor that requires a gradient.*dcn_np\.paddle.*paddle\.no_grad\(\).*x\.detach"
    )
    with pytest.raises(TypeError, match=message):
        dcn_np.modulated_deform_conv(x, *others, *problem.parameters)
    want = problem.forward(dcn_np)
    with paddle.no_grad():
        y = dcn_np.modulated_deform_conv(x, *others, *problem.parameters)
    assert np.array_equal(y.numpy(), want)
    y = dcn_np.modulated_deform_conv(x.detach(), *others, *problem.parameters)
    assert np.array_equal(y.numpy(), want)


def test_out_of_the_plain_functions():
    problem = problem_of()
    x, *others = tensors_of(problem, stop_gradient=True)
    want = problem.forward(dcn_np)
    out = paddle.zeros(want.shape)
    assert dcn_np.modulated_deform_conv(x, *others, *problem.parameters, out=out) is out
    assert np.array_equal(out.numpy(), want)
    with pytest.raises(ValueError, match=r"mask is a numpy\.ndarray, but x is a paddle array on the CPU"):
        dcn_np.modulated_deform_conv(x, others[0], problem.mask, *others[2:])


# ---- beside paddle's own operator


@pytest.mark.parametrize("modulated", [False, True])
def test_paddle_s_own_operator(modulated):
    sizes = {
        "stride": (2, 1),
        "padding": ((1, 1), (2, 2)),
        "dilation": (1, 2),
        "kernel": (3, 3),
        "extent": (9, 11),
    }
    problem = problem_of(with_mask=modulated, **sizes)
    arrays = (problem.x, problem.offset, problem.weight, problem.bias)
    tensors = [tensor_of(array) for array in arrays] + ([tensor_of(problem.mask)] if modulated else [])
    for tensor in tensors:
        tensor.stop_gradient = False
    x, offset, weight, bias, *mask = tensors
    grad_output = tensor_of(problem.grad_output)
    mask = mask[0] if modulated else None
    rival = paddle.vision.ops.deform_conv2d(x, offset, weight, bias, (2, 1), (1, 2), (1, 2), 2, 2, mask)
    y = dcn_paddle.modulated_deform_conv(x, offset, mask, weight, bias, *problem.parameters)
    assert np.allclose(y.numpy(), rival.numpy(), rtol=1e-4, atol=1e-4)
    ours, theirs = paddle.grad(y, tensors, grad_output), paddle.grad(rival, tensors, grad_output)
    for mine, other in zip(ours, theirs, strict=True):
        assert np.allclose(mine.numpy(), other.numpy(), rtol=1e-3, atol=1e-3)
