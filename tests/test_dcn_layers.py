"""The layers: gradients against differences, the convention of the branch, state dicts, files, training."""

import sys
import zipfile
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from calls import python

import dcn_np
from dcn_np import cpu, layers, reference
from dcn_np.checkpoints import DeformConvWeights, layer_from
from dcn_np.layers import Conv1d, Conv2d, Conv3d, DeformConv2d, ModulatedDeformConv1d, ModulatedDeformConv2d

CONVS = [Conv1d, Conv2d, Conv3d]
DEFORMABLE = [getattr(layers, name) for name in layers.__all__ if "DeformConv" in name]
MODULATED = [layer for layer in DEFORMABLE if layer.modulated]
EXTENTS = {1: (7,), 2: (4, 5), 3: (3, 4, 3)}
KEYS = ["weight", "bias", "conv_offset.weight", "conv_offset.bias"]


def named(layer):
    return layer.__name__


def filled(layer, rng):
    """The layer with a branch of random numbers, so that offsets are no whole numbers."""
    if "conv_offset_weight" in layer.parameters():
        layer.conv_offset_weight[:] = rng.normal(0, 0.4, layer.conv_offset_weight.shape)
        layer.conv_offset_bias[:] = rng.normal(0, 0.4, layer.conv_offset_bias.shape)
    return layer


def built(kind, rng, in_channels=2, out_channels=2, kernel_size=2, **given):
    given = {"padding": 1, "dtype": np.float64, "rng": rng} | given
    return filled(kind(in_channels, out_channels, kernel_size, **given), rng)


def image(layer, rng, batch=1):
    return rng.normal(size=(batch, layer.in_channels, *EXTENTS[layer.ndim])).astype(layer.dtype)


# ---- what is computed


@pytest.mark.parametrize("kind", DEFORMABLE, ids=named)
@pytest.mark.parametrize("activation", ["sigmoid", "2*sigmoid"])
def test_forward_is_the_specification_of_branch_and_convolution(kind, activation):
    rng = np.random.default_rng(1)
    given = {"mask_activation": activation} if kind.modulated else {}
    window = {"stride": 2, "padding": [(1, 2)] * kind.ndim, "dilation": 2}
    layer = built(kind, rng, 4, 6, groups=2, offset_groups=2, **window, **given)
    x = image(layer, rng, batch=2)
    made = reference.deform_conv(x, None, layer.conv_offset_weight, layer.conv_offset_bias, **window)
    offsets = kind.ndim * 2 * 2**kind.ndim
    offset, logits = made[:, :offsets], made[:, offsets:]
    mask = (2 if activation == "2*sigmoid" else 1) / (1 + np.exp(-logits)) if kind.modulated else None
    assert logits.shape[1] == (2 * 2**kind.ndim if kind.modulated else 0)
    y = reference.modulated_deform_conv(
        x, offset, mask, layer.weight, layer.bias, **window, groups=2, offset_groups=2
    )
    np.testing.assert_allclose(layer.forward(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", CONVS, ids=named)
def test_an_ordinary_layer_is_the_operator_without_offsets(kind):
    rng = np.random.default_rng(2)
    layer = built(kind, rng, 4, 6, groups=2, stride=2)
    x = image(layer, rng)
    y = dcn_np.deform_conv(x, None, layer.weight, layer.bias, 2, 1, groups=2)
    np.testing.assert_array_equal(layer.forward(x), y)


@pytest.mark.parametrize(
    ("kind", "given", "factor"),
    [
        (DeformConv2d, {}, 1),
        (ModulatedDeformConv2d, {}, 0.5),
        (ModulatedDeformConv2d, {"mask_activation": "2*sigmoid"}, 1),
    ],
)
def test_a_new_layer_is_an_ordinary_one(kind, given, factor):
    layer = kind(2, 3, 3, padding=1, bias=False, rng=0, dtype=np.float64, **given)
    x = image(layer, np.random.default_rng(3))
    rigid = dcn_np.deform_conv(x, None, layer.weight, padding=1)
    np.testing.assert_allclose(layer.forward(x), factor * rigid, rtol=1e-14)


def test_offsets_are_y_then_x_of_each_tap_and_masks_follow():
    layer = ModulatedDeformConv2d(1, 1, (1, 2), bias=False, rng=0, dtype=np.float64)
    layer.weight[:] = [[[[1.0, 10.0]]]]
    layer.conv_offset_bias[:] = [0, 1, 1, 0, 1000, -1000]  # (0, +1) and (+1, 0); masks 1 and 0
    x = np.arange(12.0).reshape(1, 1, 3, 4)
    np.testing.assert_array_equal(layer.forward(x)[0, 0, 0], x[0, 0, 0, 1:])
    layer.conv_offset_bias[4:] = [-1000, 1000]
    np.testing.assert_array_equal(layer.forward(x)[0, 0, 0], 10 * x[0, 0, 1, 1:])


def test_a_mask_of_huge_logits_neither_warns_nor_overflows():
    layer = ModulatedDeformConv1d(1, 1, 1, rng=0)
    layer.conv_offset_bias[1] = -3e38
    assert np.isfinite(layer.forward(np.ones((1, 1, 4), np.float32))).all()
    layer.backward(np.ones((1, 1, 4), np.float32))
    assert layer.gradients["conv_offset_bias"][1] == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", [Conv2d, DeformConv2d, ModulatedDeformConv2d], ids=named)
def test_all_is_of_the_dtype_of_the_layer(kind, dtype):
    layer = kind(2, 2, 3, padding=1, rng=0, dtype=dtype)
    x = image(layer, np.random.default_rng(4))
    y = layer.forward(x)
    results = [y, layer.backward(y), *layer.gradients.values(), *layer.parameters().values()]
    assert {array.dtype for array in results} == {np.dtype(dtype)}
    assert list(layer.gradients) == list(layer.parameters())


def true_logistic(values):
    """The logistic function in more digits than any result has."""
    power = np.exp(-np.abs(values.astype(np.longdouble)))
    return np.where(values >= 0, 1 / (1 + power), power / (1 + power))


SPREAD = np.concatenate([np.random.default_rng(11).normal(0, scale, 4001) for scale in (0.1, 1, 10, 40, 300)])


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masks_are_the_logistic_function_within_three_units_of_the_last_place(isa, dtype, factor):
    values = SPREAD.astype(dtype).reshape(1, 5, -1)
    want = factor * true_logistic(values)
    error = np.abs(cpu.logistic(values.copy(), factor) - want) / np.spacing(want.astype(dtype))
    assert error.max() < 3


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_masks_in_half_precision_are_rounded_once(isa, dtype):
    values = SPREAD.astype(dtype).reshape(1, 5, -1)
    found = cpu.logistic(values.copy(), 2)
    assert found.dtype == dtype
    in_float32 = cpu.logistic(values.astype(np.float32), 2)
    np.testing.assert_array_equal(found.view(np.uint16), in_float32.astype(dtype).view(np.uint16))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masks_at_the_ends_of_the_numbers(isa, dtype):
    largest = np.finfo(dtype).max
    ends = np.array([0, -0.0, np.inf, -np.inf, largest, -largest, np.nan, -np.nan], dtype)
    want = [0.5, 0.5, 1, 0, 1, 0, np.nan, np.nan]
    for size in range(1, 40):  # in whole registers and what is left over
        found = cpu.logistic(np.resize(ends, (1, 1, size)), 1)
        np.testing.assert_array_equal(found[0, 0], np.resize(want, size))


@pytest.mark.parametrize("order", ["planes", "channels last", "of a wider array", "every second pixel"])
def test_masks_do_not_depend_on_how_they_lie(isa, order):
    values = np.random.default_rng(12).normal(0, 3, (2, 3, 5, 7)).astype(np.float32)
    wide = np.zeros((2, 8, 5, 7), np.float32)
    wide[:, 5:] = values
    laid = {
        "planes": values.copy(),
        "channels last": values.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2),
        "of a wider array": wide[:, 5:],
        "every second pixel": values.repeat(2, axis=3)[..., ::2],
    }
    np.testing.assert_array_equal(
        cpu.logistic(laid[order], 1), cpu.logistic(values.reshape(1, 1, -1), 1).reshape(values.shape)
    )
    assert not wide[:, :5].any()


# ---- gradients


def differences(function, array, step=1e-6):
    """The derivative of a function without arguments by each element of an array that it reads."""
    found = np.empty_like(array)
    for place in np.ndindex(*array.shape):
        before = array[place]
        array[place] = before + step
        above = function()
        array[place] = before - step
        found[place] = (above - function()) / (2 * step)
        array[place] = before
    return found


def smooth_problem(kind, rng, **given):
    """A layer and an image, none of whose offsets is near a whole number, where the derivative jumps."""
    while True:
        layer = built(kind, rng, **given)
        x = image(layer, rng)
        layer.forward(x)
        offset = layer._kept[1]
        if np.abs(offset - np.round(offset)).min() > 1e-4:
            return layer, x


def check_gradients(layer, x, rng):
    grad_output = rng.normal(size=layer.forward(x).shape)
    grad_x = layer.backward(grad_output)
    gradients = layer.gradients
    assert list(gradients) == list(layer.parameters())
    for name, array in {**layer.parameters(), "x": x}.items():
        found = grad_x if name == "x" else gradients[name]
        want = differences(lambda: np.vdot(grad_output, layer.forward(x)), array)
        assert np.abs(want).max() > 0, name
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-7 * np.abs(want).max(), err_msg=name)


WINDOWS = {
    "plain": {},
    "groups": {"in_channels": 4, "groups": 2},
    "offset groups": {"offset_groups": 2},
    "both": {"in_channels": 4, "groups": 2, "offset_groups": 4},
    "strided, dilated, no bias": {"stride": 2, "dilation": 2, "padding": 2, "bias": False},
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", DEFORMABLE, ids=named)
def test_gradients_are_central_differences(kind, window):
    rng = np.random.default_rng(5)
    kernel_size = (2, 1, 2)[: kind.ndim]
    check_gradients(*smooth_problem(kind, rng, **{"kernel_size": kernel_size} | WINDOWS[window]), rng)


@pytest.mark.parametrize("kind", MODULATED, ids=named)
def test_gradients_go_through_twice_the_sigmoid(kind):
    rng = np.random.default_rng(6)
    given = {"kernel_size": (2, 2, 1)[: kind.ndim], "mask_activation": "2*sigmoid", "offset_groups": 2}
    check_gradients(*smooth_problem(kind, rng, **given), rng)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CONVS, ids=named)
def test_gradients_of_an_ordinary_layer_are_central_differences(kind, bias):
    rng = np.random.default_rng(7)
    layer = built(kind, rng, 4, groups=2, bias=bias)
    check_gradients(layer, image(layer, rng, batch=2), rng)


def test_gradients_are_of_the_last_forward_and_do_not_add_up():
    rng = np.random.default_rng(8)
    layer = built(ModulatedDeformConv2d, rng)
    first, second = image(layer, rng), image(layer, rng)
    grad_output = rng.normal(size=layer.forward(first).shape)
    layer.backward(grad_output)
    layer.forward(second)
    grad_x, gradients = layer.backward(grad_output), layer.gradients
    np.testing.assert_array_equal(layer.backward(grad_output), grad_x)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(layer.gradients[name], gradient)


def test_backward_needs_a_forward():
    with pytest.raises(
        RuntimeError, match=r"backward without a forward before it; wanted forward\(x\) first"
    ):
        Conv1d(1, 1, 1).backward(np.ones((1, 1, 1), np.float32))


@pytest.mark.parametrize("layer", [Conv2d, DeformConv2d, ModulatedDeformConv2d])
def test_a_layer_tells_what_it_sampled_by(layer):
    made = layer(2, 3, 3, rng=0)
    with pytest.raises(RuntimeError, match="last_branch without a forward before it"):
        made.last_branch()
    x = np.random.default_rng(0).random((2, 2, 6, 5), dtype=np.float32)
    made.forward(x)
    for found, wanted in zip(made.last_branch(), made.branch(x), strict=True):
        np.testing.assert_array_equal(found, wanted)


def steps_until_a_tenth(network, x, target, rate, most):
    """Train by plain gradient descent; return how many steps the loss took to fall to a tenth."""
    first, second = network
    start = None
    for step in range(most):
        hidden = np.tanh(first.forward(x))
        error = second.forward(hidden) - target
        loss = np.mean(error**2)
        start = loss if start is None else start
        if loss < start / 10:
            return step
        first.backward(second.backward(2 * error / error.size) * (1 - hidden**2))
        for layer in network:
            for name, parameter in layer.parameters().items():
                parameter -= rate * layer.gradients[name]
    return most


@pytest.mark.parametrize("kind", [DeformConv2d, ModulatedDeformConv2d], ids=named)
def test_a_network_learns(kind):
    rng = np.random.default_rng(9)
    x = rng.normal(size=(4, 1, 8, 8))
    target = np.roll(x, 1, axis=3) - 0.5 * x
    given = {"padding": 1, "rng": rng, "dtype": np.float64}
    network = kind(1, 8, 3, **given), Conv2d(8, 1, 3, **given)
    assert 0 < steps_until_a_tenth(network, x, target, rate=0.1, most=300) < 300
    assert np.abs(network[0].conv_offset_weight).max() > 0


# ---- how layers begin


def test_the_same_seed_gives_the_same_layer():
    first, second = (Conv2d(3, 4, 3, rng=seed) for seed in (5, np.random.default_rng(5)))
    for name, value in first.parameters().items():
        np.testing.assert_array_equal(value, second.parameters()[name])
    assert not np.array_equal(first.weight, Conv2d(3, 4, 3, rng=6).weight)
    assert not np.array_equal(Conv2d(3, 4, 3).weight, Conv2d(3, 4, 3).weight)


def test_filters_and_bias_fill_the_range_of_their_fan_in():
    layer = DeformConv2d(8, 2000, 3, groups=4, rng=0, dtype=np.float64)
    for array in (layer.weight, layer.bias):
        bound = 1 / np.sqrt(2 * 9)
        assert 0.99 * bound < np.abs(array).max() <= bound
        assert abs(array.mean()) < 0.05 * bound
    assert not layer.conv_offset_weight.any()
    assert not layer.conv_offset_bias.any()


def test_a_layer_writes_itself():
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1, groups=2, offset_groups=4, bias=False)
    assert repr(layer) == (
        "ModulatedDeformConv2d(in_channels=4, out_channels=6, kernel_size=(3, 3), stride=(1, 1), "
        "padding=((1, 1), (1, 1)), dilation=(1, 1), groups=2, offset_groups=4, bias=False)"
    )


@pytest.mark.parametrize("kind", [*CONVS, *DEFORMABLE], ids=named)
def test_every_layer_says_what_it_is(kind):
    assert kind.__doc__.startswith(("An ordinary", "A modulated deformable", "A deformable"))
    assert "{" not in kind.__doc__.replace('{"sigmoid", "2*sigmoid"}', "")
    assert max(map(len, kind.__doc__.splitlines())) <= 110


# ---- arguments


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels is 0; wanted at least 1"),
        ({"out_channels": 2.0}, TypeError, r"out_channels is 2.0 \(float\); wanted an integer"),
        ({"kernel_size": True}, TypeError, "kernel_size is True, a bool; wanted an integer"),
        ({"kernel_size": "33"}, TypeError, "kernel_size is '33'; wanted an integer"),
        ({"kernel_size": (3,)}, ValueError, "kernel_size has 1 entry; wanted an integer or 2 entries"),
        ({"kernel_size": (3, -1)}, ValueError, r"kernel_size\[1\] is -1; wanted at least 1"),
        ({"stride": 0}, ValueError, "stride is 0; wanted at least 1"),
        ({"stride": (1, 2, 3)}, ValueError, "stride has 3 entries; x has 2 spatial axes: wanted"),
        ({"padding": -1}, ValueError, "padding is -1; wanted at least 0"),
        ({"padding": "same"}, TypeError, "padding is 'same'; wanted an integer, one per axis, or"),
        ({"dilation": 1.5}, TypeError, r"dilation is 1.5 \(float\); wanted an integer, or one per axis"),
        ({"groups": 3}, ValueError, "groups is 3; x has 4 channels, and 4/3 leaves a rest of 1: wanted a"),
        ({"groups": 4}, ValueError, "groups is 4; weight has 6 output channels"),
        ({"offset_groups": 3}, ValueError, "offset_groups is 3; x has 4 channels"),
        ({"offset_groups": 0}, ValueError, "offset_groups is 0; wanted at least 1"),
        ({"in_channels": np.ones(2)}, TypeError, "in_channels is an array .*; wanted an integer"),
        ({"in_channels": int}, TypeError, r"in_channels is <class 'int'> \(type\); wanted an integer"),
        ({"kernel_size": b"33"}, TypeError, "kernel_size is b'33'.*; wanted an integer"),
        ({"kernel_size": 10**5000}, ValueError, "kernel_size is an integer of 16610 bits; wanted at most"),
        ({"bias": np.ones(6)}, TypeError, r"bias is an array .*; wanted True or False"),
        ({"rng": np.ones(1)}, TypeError, r"rng is an array .*; wanted an integer"),
        ({"rng": -1}, ValueError, "rng is -1; wanted a numpy.random.Generator, or a seed of at least 0"),
        ({"dtype": int}, TypeError, "dtype is int64; wanted one of float32, float64, float16"),
        ({"dtype": "real"}, TypeError, "dtype is 'real'; wanted one of NumPy's, such as float32"),
        ({"mask_activation": ["sigmoid"]}, TypeError, r"mask_activation is \['sigmoid'\] \(list\); wanted"),
        (
            {"mask_activation": "relu"},
            ValueError,
            r"mask_activation is 'relu'; wanted one of 'sigmoid', '2\*sigmoid'",
        ),
    ],
)
def test_a_wrong_argument_is_named(given, error, message):
    right = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    with pytest.raises(error, match=message):
        ModulatedDeformConv2d(**right | given)


def test_a_wide_dilation_is_a_matter_of_the_image():
    layer = Conv2d(1, 1, 3, dilation=10**6)
    with pytest.raises(ValueError, match="the output would be empty on axis 0"):
        layer.forward(np.ones((1, 1, 4, 4), np.float32))


def test_only_masks_have_an_activation():
    message = "mask_activation is 'sigmoid'; DeformConv2d makes no masks: wanted None"
    with pytest.raises(ValueError, match=message):
        DeformConv2d(1, 1, 1, mask_activation="sigmoid")


@pytest.mark.parametrize("kind", [Conv2d, DeformConv2d, ModulatedDeformConv2d], ids=named)
@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 4, 4), (1, 2, 4, 4, 4)])
def test_an_image_of_the_wrong_shape_is_named(kind, shape):
    with pytest.raises(ValueError, match=r"x has the shape .*; wanted \(batch, 2, \*input\) with 2 spatial"):
        kind(2, 1, 1).forward(np.ones(shape, np.float32))


@pytest.mark.parametrize("kind", [Conv2d, DeformConv2d], ids=named)
def test_an_image_of_another_dtype_or_kind_is_an_error(kind):
    layer = kind(2, 1, 1)
    with pytest.raises(TypeError, match="weight has dtype float32 but x has float64"):
        layer.forward(np.ones((1, 2, 4, 4)))
    with pytest.raises(TypeError, match=r"x is .*; wanted a numpy\.ndarray"):
        layer.forward([[[[1.0]]]])


def test_a_gradient_of_the_wrong_shape_is_named():
    layer = ModulatedDeformConv2d(1, 1, 3)
    layer.forward(np.ones((1, 1, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"grad_output has shape \(1, 1, 4, 4\); wanted"):
        layer.backward(np.ones((1, 1, 4, 4), np.float32))


# ---- state dicts


@pytest.mark.parametrize("kind", [*CONVS, *DEFORMABLE], ids=named)
@pytest.mark.parametrize("bias", [True, False])
def test_a_state_dict_makes_an_equal_layer(kind, bias):
    rng = np.random.default_rng(10)
    first, second = (built(kind, rng, bias=bias) for _ in range(2))
    state = first.state_dict()
    keys = KEYS if kind in DEFORMABLE else KEYS[:2]
    assert list(state) == [key for key in keys if bias or key != "bias"]
    second.load_state_dict(state)
    x = image(first, rng)
    np.testing.assert_array_equal(first.forward(x), second.forward(x))
    third = kind.from_state_dict(state, 2, 2, 2, padding=1, bias=bias, dtype=np.float64)
    np.testing.assert_array_equal(first.forward(x), third.forward(x))
    second.weight += 1  # a copy
    np.testing.assert_array_equal(first.weight, state["weight"])


def test_a_state_that_does_not_fit_makes_no_layer():
    state = Conv2d(2, 4, 3).state_dict()
    with pytest.raises(ValueError, match=r"weight has the shape \(4, 2, 3, 3\); .* wants \(4, 2, 2, 2\)"):
        Conv2d.from_state_dict(state, 2, 4, 2)
    with pytest.raises(ValueError, match=r"state holds 'bias'; .*bias=False\) has 'weight' only"):
        Conv2d.from_state_dict(state, 2, 4, 3, bias=False)


NOTHING_DRAWN = """
import sys, numpy
before = set(sys.modules)
import dcn_np.layers as layers
state = layers.load_npz(sys.argv[1])
layer = layers.ModulatedDeformConv2d.from_state_dict(state, 2, 4, 3, padding=1)
layer.forward(numpy.ones((1, 2, 5, 5), numpy.float32))
print(*(name for name in set(sys.modules) - before if name.startswith("numpy")))
"""


def test_loading_and_running_a_layer_imports_no_more_of_numpy(tmp_path):
    # numpy.random alone takes 6 MB. NumPy 1 imports it by itself.
    layers.save_npz(tmp_path / "layer.npz", ModulatedDeformConv2d(2, 4, 3).state_dict())
    assert python(NOTHING_DRAWN, tmp_path / "layer.npz") == ""


def test_a_layer_keeps_its_dtype():
    layer = Conv1d(1, 1, 1, dtype=np.float32)
    layer.load_state_dict({"weight": np.full((1, 1, 1), 0.5), "bias": np.full(1, 2.0)})
    assert (layer.weight.dtype, layer.weight.item(), layer.bias.item()) == (np.float32, 0.5, 2.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bias": None}, ValueError, "state has no 'bias'; .* has 'weight', 'bias', 'conv_offset.weight'"),
        ({"weight": None, "bias": None}, ValueError, "state has no 'weight', 'bias';"),
        ({"offset": np.ones(1)}, ValueError, "state holds 'offset'; .* 'conv_offset.bias' only"),
        ({7: np.ones(1)}, ValueError, r"state holds 7 \(int\);"),
        (
            {"conv_offset.bias": np.ones(9)},
            ValueError,
            r"conv_offset.bias has the shape \(9,\); .* wants \(27,\)",
        ),
        ({"weight": [1.0]}, TypeError, r"weight is \[1.0\] \(list\); wanted a numpy.ndarray"),
        ({"bias": np.ones(4, int)}, TypeError, "bias has dtype int64; wanted floating-point numbers"),
        ({"bias": np.ones(4, complex)}, TypeError, "bias has dtype complex128; wanted floating-point"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, error, message):
    layer = ModulatedDeformConv2d(2, 4, 3, rng=0)
    before = {key: value.copy() for key, value in layer.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()} | change
    with pytest.raises(error, match=message):
        layer.load_state_dict({key: value for key, value in state.items() if value is not None})
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_a_state_that_is_no_mapping_is_named():
    with pytest.raises(TypeError, match=r"^state is None; wanted a mapping of str to array"):
        Conv1d(1, 1, 1).load_state_dict(None)


def test_a_layer_without_bias_takes_none():
    with pytest.raises(ValueError, match=r"state holds 'bias'; Conv1d\(.*bias=False\) has 'weight' only"):
        Conv1d(1, 1, 1, bias=False).load_state_dict({"weight": np.ones((1, 1, 1)), "bias": np.ones(1)})


# ---- checkpoints


def mmcv_state(rng, per_tap, bias=True):
    state = {
        "conv.weight": rng.normal(size=(6, 2, 3, 3)),
        "conv.conv_offset.weight": rng.normal(0, 0.3, (per_tap * 9 * 2, 4, 3, 3)),
        "conv.conv_offset.bias": rng.normal(0, 0.3, per_tap * 9 * 2),
    }
    return state | ({"conv.bias": rng.normal(size=6)} if bias else {})


@pytest.mark.parametrize(
    ("kind", "per_tap", "bias"), [(DeformConv2d, 2, False), (ModulatedDeformConv2d, 3, True)]
)
def test_a_layer_of_a_checkpoint(kind, per_tap, bias):
    rng = np.random.default_rng(11)
    state = mmcv_state(rng, per_tap, bias)
    weights = layer_from(state, "conv", library="mmcv", modulated=kind.modulated)
    layer = kind.from_weights(weights, stride=2, padding=2, dilation=2)
    assert (layer.in_channels, layer.groups, layer.offset_groups) == (4, 2, 2)
    assert layer.dtype == np.float64
    assert {f"conv.{key}" for key in layer.state_dict()} == set(state)
    window = {"stride": 2, "padding": 2, "dilation": 2}
    x = rng.normal(size=(2, 4, 6, 5))
    made = reference.deform_conv(
        x, None, state["conv.conv_offset.weight"], state["conv.conv_offset.bias"], **window
    )
    mask = 1 / (1 + np.exp(-made[:, 36:])) if kind.modulated else None
    window |= {"groups": 2, "offset_groups": 2}
    arrays = made[:, :36], mask, state["conv.weight"], state.get("conv.bias")
    y = reference.modulated_deform_conv(x, *arrays, **window)
    np.testing.assert_allclose(layer.forward(x), y, rtol=1e-11, atol=1e-11)
    layer.weight += 1  # a copy
    assert not np.array_equal(layer.weight, state["conv.weight"])


def test_a_layer_of_weights_made_by_hand():
    rng = np.random.default_rng(12)
    weights = DeformConvWeights(
        rng.normal(size=(2, 3, 2)), None, rng.normal(size=(4, 3, 2)), None, None, None, "2*sigmoid", None
    )
    layer = ModulatedDeformConv1d.from_weights(weights)
    assert (layer.mask_activation, layer.bias, layer.offset_groups) == ("2*sigmoid", None, 1)
    assert not layer.conv_offset_bias.any()


def test_weights_of_another_layer_are_named():
    rng = np.random.default_rng(13)
    weights = layer_from(mmcv_state(rng, 3), "conv", library="mmcv")
    message = "weights.modulated is True; wanted False, or ModulatedDeformConv2d"
    with pytest.raises(ValueError, match=message):
        DeformConv2d.from_weights(weights)
    with pytest.raises(
        ValueError, match=r"weights.weight has the shape .*; ModulatedDeformConv1d wants 3 axes"
    ):
        ModulatedDeformConv1d.from_weights(weights)
    with pytest.raises(ValueError, match=r"weights\.offset_weight is None; .* wants the branch"):
        ModulatedDeformConv2d.from_weights(replace(weights, offset_weight=None))
    with pytest.raises(ValueError, match=r"conv_offset.bias has the shape \(5,\)"):
        ModulatedDeformConv2d.from_weights(replace(weights, offset_bias=np.zeros(5)))
    with pytest.raises(TypeError, match="dtype is int64; wanted"):
        ModulatedDeformConv2d.from_weights(replace(weights, weight=weights.weight.astype(int)))


def test_a_branch_that_is_not_dilated_needs_a_layer_that_is_not():
    weights = replace(
        layer_from(mmcv_state(np.random.default_rng(14), 3), "conv", library="mmcv"), offset_dilated=False
    )
    with pytest.raises(ValueError, match=r"dilation is \(2, 2\); the branch of these weights is not dilated"):
        ModulatedDeformConv2d.from_weights(weights, dilation=2)
    assert ModulatedDeformConv2d.from_weights(weights).dilation == (1, 1)


# ---- files


def state_of_odd_arrays():
    state = ModulatedDeformConv2d(2, 3, 3, rng=0).state_dict()
    state = {f"layer.0.{key}": value for key, value in state.items()}
    return state | {
        "file": np.arange(6.0).reshape(2, 3).T,  # the name of an argument of numpy.savez
        "halves": np.array([1, 2], np.float16),
        "nothing": np.zeros((0, 3)),
        "scalar": np.array(3.0),
    }


def check_equal(loaded, state):
    assert set(loaded) == set(state)
    for key, value in state.items():
        assert (loaded[key].dtype, loaded[key].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(loaded[key], value)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_npz_keeps_a_state(tmp_path, kind):
    path = tmp_path / "layer.weights"
    layers.save_npz(kind(path), state_of_odd_arrays())
    assert [file.name for file in tmp_path.iterdir()] == ["layer.weights"]
    check_equal(layers.load_npz(kind(path)), state_of_odd_arrays())


def test_npz_is_numpys(tmp_path):
    state = Conv2d(2, 3, 3, rng=0).state_dict()
    layers.save_npz(tmp_path / "ours.npz", state)
    np.savez(tmp_path / "theirs.npz", **state)
    with np.load(tmp_path / "ours.npz") as loaded:
        check_equal(dict(loaded), state)
    check_equal(layers.load_npz(tmp_path / "theirs.npz"), state)


def test_npz_runs_nothing(tmp_path):
    np.savez(tmp_path / "objects.npz", weight=np.array([{}]))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        layers.load_npz(tmp_path / "objects.npz")
    with pytest.raises(TypeError, match="weight has dtype object; wanted one that NumPy's files have"):
        layers.save_npz(tmp_path / "new.npz", {"weight": np.array([{}])})
    assert not (tmp_path / "new.npz").exists()


def test_a_file_that_is_no_npz_is_named(tmp_path):
    path = tmp_path / "other"
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ValueError, match=r"path is .*other.*, no .npz file; wanted"):
        layers.load_npz(path)
    layers.save_npz(path, {"weight": np.ones(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"path is .*other.*, a broken .npz file"):
        layers.load_npz(path)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"path is .*other.*, a broken .npz file"):
        layers.load_npz(path)
    with zipfile.ZipFile(path, "w"):
        pass
    assert layers.load_npz(path) == {}


@pytest.mark.parametrize("save", [layers.save_npz, layers.save_safetensors], ids=["npz", "safetensors"])
def test_only_arrays_are_saved(tmp_path, save):
    with pytest.raises(TypeError, match=r"weight is \[1.0\] \(list\); wanted a numpy.ndarray"):
        save(tmp_path / "file", {"weight": [1.0]})
    with pytest.raises(TypeError, match=r"state has the key 1 \(int\); wanted strings"):
        save(tmp_path / "file", {1: np.ones(1)})
    assert not (tmp_path / "file").exists()


def test_safetensors_keep_a_state(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "layer.safetensors"
    layers.save_safetensors(path, state_of_odd_arrays())
    check_equal(layers.load_safetensors(str(path)), state_of_odd_arrays())
    check_equal(safetensors.load_file(path), state_of_odd_arrays())


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    pytest.importorskip("safetensors.numpy")
    path = tmp_path / "other"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"path is .*other.*, no .safetensors file or a broken one"):
        layers.load_safetensors(path)
    with pytest.raises(FileNotFoundError):
        layers.load_safetensors(tmp_path / "none")


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (lambda path: layers.save_safetensors(path, {}), layers.load_safetensors):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call(tmp_path / "file")
