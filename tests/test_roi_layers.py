"""Layers that pool over regions: the specification, gradients against differences, state dicts, training."""

import numpy as np
import pytest
from test_dcn_layers import check_equal, differences

import dcn_np
from dcn_np import layers, reference
from dcn_np.layers import DeformRoIPool, ModulatedDeformRoIPool

SIZES = {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2, "gamma": 0.2}
ROIS = [[1, 2.25, 1.75, 11.5, 8.5], [0, 0.75, 3.25, 7.5, 12.25], [1, -3.25, 9.5, 6.75, 17.25]]
BINS = 6
KINDS = {
    "offsets": (DeformRoIPool, {}),
    "shared": (ModulatedDeformRoIPool, {}),
    "twice": (ModulatedDeformRoIPool, {"mask_activation": "2*sigmoid"}),
    "separate": (ModulatedDeformRoIPool, {"shared_branch": False}),
    "position-sensitive": (DeformRoIPool, {"position_sensitive": True}),
    "shared, position-sensitive": (ModulatedDeformRoIPool, {"position_sensitive": True}),
}
EACH = pytest.mark.parametrize("kind", KINDS)
BRANCHES = {
    "offsets": {"offset_fc": [0, 2, 4]},
    "shared": {"offset_mask_fc": [0, 2, 4]},
    "separate": {"offset_fc": [0, 2, 4], "mask_fc": [0, 2]},
}


def keys_of(kind, separator="."):
    return [
        f"{branch}{separator}{index}{separator}{what}"
        for branch, indices in BRANCHES[kind].items()
        for index in indices
        for what in ("weight", "bias")
    ]


def options_of(kind):
    return {"hidden_channels": 5, "dtype": np.float64} | SIZES | KINDS[kind][1]


def built(kind, rng, **given):
    """A layer whose last weights are no zeros, so that bins move and masks differ."""
    made = KINDS[kind][0](4, **options_of(kind) | given)
    for parameter in made.parameters().values():
        parameter[:] = rng.normal(0, 0.4, parameter.shape)
    return made


def problem(rng, dtype=np.float64):
    return rng.normal(size=(2, 4, 7, 9)).astype(dtype), np.array(ROIS, dtype)


# ---- what is computed


def specified(layer, x, rois, **numbers):
    """The layer by the definitions, from its state dict."""
    state = layer.state_dict()
    modulated = isinstance(layer, ModulatedDeformRoIPool)

    def pooled(offset, mask):
        if not layer.position_sensitive:
            return reference.modulated_deform_roi_pool(x, rois, offset, mask, (2, 3), 0.5, 2, 0.2)
        y = reference.deform_psroi_pool(x, rois, offset, 4, 1, (2, 3), 0.5, None, 2, 0.2)
        return y if mask is None else y * mask

    def branch(name, indices):
        rows = pooled(None, None).reshape(len(rois), -1)
        for index in indices:
            rows = rows if index == 0 else np.where(rows > 0, rows, 0)
            rows = np.einsum("ri,oi->ro", rows, state[f"{name}.{index}.weight"])
            rows = rows + state[f"{name}.{index}.bias"]
        return rows.reshape(len(rois), -1, 2, 3)

    if not modulated:
        return pooled(branch("offset_fc", [0, 2, 4]), None)
    if layer.shared_branch:
        offset, logits = np.split(branch("offset_mask_fc", [0, 2, 4]), [2], axis=1)
    else:
        offset, logits = branch("offset_fc", [0, 2, 4]), branch("mask_fc", [0, 2])
    factor = 2 if layer.mask_activation == "2*sigmoid" else 1
    return pooled(offset, factor / (1 + np.exp(-logits)))


@EACH
def test_forward_is_the_specification_of_branch_and_pooling(kind):
    rng = np.random.default_rng(1)
    layer, (x, rois) = built(kind, rng), problem(rng)
    np.testing.assert_allclose(layer.forward(x, rois), specified(layer, x, rois), rtol=1e-12, atol=1e-12)


@EACH
def test_a_new_layer_is_the_regular_pooling(kind):
    layer, options = KINDS[kind]
    made = layer(4, hidden_channels=5, dtype=np.float64, **SIZES | options)
    x, rois = problem(np.random.default_rng(2))
    if made.position_sensitive:
        regular = dcn_np.deform_psroi_pool(x, rois, None, 4, 1, (2, 3), 0.5, None, 2, 0.2)
    else:
        regular = dcn_np.roi_align(x, rois, (2, 3), 0.5, 2)
    masks = 0.5 if layer is ModulatedDeformRoIPool and "mask_activation" not in options else 1
    np.testing.assert_array_equal(made.forward(x, rois), masks * regular)


def test_offsets_are_x_of_all_bins_then_y_and_masks_follow():
    layer = ModulatedDeformRoIPool(1, (1, 2), gamma=0.5, hidden_channels=1, dtype=np.float64)
    # Regions of 2 x 2 pixels: the first bin moves to the right by 1, the second down by 2; masks 1 and 0.5.
    layer.offset_mask_fc_4_bias[:] = [1, 0, 0, 2, 1000, 0]
    x, rois = np.arange(36.0).reshape(1, 1, 6, 6), np.array([[0, 1, 1, 3, 3.0]])
    first, second = 6 * 1.5 + 1.0, 6 * 1.5 + 2.0
    np.testing.assert_array_equal(layer.forward(x, rois)[0, 0, 0], [first + 1, (second + 2 * 6) / 2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@EACH
def test_all_is_of_the_dtype_of_the_layer(kind, dtype):
    rng = np.random.default_rng(3)
    layer, (x, rois) = built(kind, rng, dtype=dtype), problem(rng, dtype)
    y = layer.forward(x, rois)
    results = [y, layer.backward(y), *layer.gradients.values(), *layer.parameters().values()]
    assert {array.dtype for array in results} == {np.dtype(dtype)}
    wide = built(kind, rng)
    wide.load_state_dict(layer.state_dict())
    tolerance = {2: 2e-2, 4: 1e-5, 8: 0}[np.dtype(dtype).itemsize]
    np.testing.assert_allclose(y, wide.forward(x.astype(float), rois.astype(float)), 0, tolerance)


@EACH
def test_regions_in_float32_beside_half_maps(kind):
    rng = np.random.default_rng(4)
    layer, (x, rois) = built(kind, rng, dtype=np.float16), problem(rng, np.float16)
    y = layer.forward(x, rois)
    np.testing.assert_array_equal(layer.forward(x, rois.astype(np.float32)), y)
    assert layer.backward(y).dtype == np.float16


@EACH
def test_without_regions(kind):
    rng = np.random.default_rng(5)
    layer, (x, rois) = built(kind, rng), problem(rng)
    y = layer.forward(x, rois[:0])
    assert y.shape == (0, 4, 2, 3)
    assert not layer.backward(y).any()
    assert not any(gradient.any() for gradient in layer.gradients.values())


@EACH
def test_channels_last(kind):
    rng = np.random.default_rng(6)
    layer, (x, rois) = built(kind, rng), problem(rng)
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    y, grad_x = layer.forward(x, rois), layer.backward(x[:, :, :2, :3].repeat(2, axis=0)[:3])
    np.testing.assert_allclose(layer.forward(last, rois), y, rtol=1e-13, atol=1e-13)
    again = layer.backward(x[:, :, :2, :3].repeat(2, axis=0)[:3])
    np.testing.assert_allclose(again, grad_x, rtol=1e-12, atol=1e-12)


def test_a_mask_of_huge_logits_neither_warns_nor_overflows():
    layer = ModulatedDeformRoIPool(1, 1, hidden_channels=1)
    layer.offset_mask_fc_4_bias[2] = -3e38
    x, rois = np.ones((1, 1, 4, 4), np.float32), np.array([[0, 0, 0, 4, 4]], np.float32)
    assert layer.forward(x, rois).item() == 0
    layer.backward(np.ones((1, 1, 1, 1), np.float32))
    assert layer.gradients["offset_mask_fc_4_bias"][2] == 0


# ---- gradients


@EACH
def test_gradients_are_central_differences(kind):
    rng = np.random.default_rng(7)
    layer, (x, rois) = built(kind, rng), problem(rng)
    grad_output = rng.normal(size=layer.forward(x, rois).shape)
    grad_x, gradients = layer.backward(grad_output), layer.gradients
    assert list(gradients) == list(layer.parameters())
    for name, array in {**layer.parameters(), "x": x}.items():
        found = grad_x if name == "x" else gradients[name]
        want = differences(lambda: np.vdot(grad_output, layer.forward(x, rois)), array)
        assert np.abs(want).max() > 0, name
        tolerance = 1e-7 * np.abs(want).max() + 1e-9  # differences of rounded numbers
        np.testing.assert_allclose(found, want, rtol=0, atol=tolerance, err_msg=name)


def test_gradients_are_of_the_last_forward_and_do_not_add_up():
    rng = np.random.default_rng(8)
    layer, (x, rois) = built("separate", rng), problem(rng)
    grad_output = rng.normal(size=layer.forward(x, rois).shape)
    layer.backward(grad_output)
    layer.forward(x[::-1].copy(), rois)
    grad_x, gradients = layer.backward(grad_output), layer.gradients
    np.testing.assert_array_equal(layer.backward(grad_output), grad_x)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(layer.gradients[name], gradient)


def test_backward_needs_a_forward():
    with pytest.raises(RuntimeError, match="backward without a forward before it"):
        DeformRoIPool(1, 1, hidden_channels=1).backward(np.ones((1, 1, 1, 1), np.float32))


@EACH
def test_a_layer_tells_what_it_pooled_by(kind):
    rng = np.random.default_rng(8)
    layer, (x, rois) = built(kind, rng), problem(rng)
    y = layer.forward(x, rois)
    np.testing.assert_array_equal(layer._pool(x, rois, *layer.last_branch()), y)
    assert not np.array_equal(layer._pool(x, rois, None, None), y)


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_layer_learns_where_to_look(kind):
    """The target is what lies beside the regions: bins that move can find it, regular ones cannot."""
    rng = np.random.default_rng(9)
    noise = rng.normal(size=(2, 3, 28, 28))
    x = np.lib.stride_tricks.sliding_window_view(noise, (5, 5), axis=(2, 3)).mean(axis=(4, 5)).copy()
    low = 4 + 8 * rng.random((12, 2))
    rois = np.concatenate([np.arange(12.0)[:, None] % 2, low, low + 8], axis=1)
    factor = 1 if kind == "offsets" else 0.5
    target = factor * dcn_np.roi_align(x, rois + np.array([0, 2, 0, 2, 0]), 2)
    layer = KINDS[kind][0](3, 2, gamma=0.5, hidden_channels=16, rng=0, dtype=np.float64, **KINDS[kind][1])
    for parameter in layer.parameters().values():
        parameter *= 10  # for plain gradient descent, in few steps
    losses = []
    for _ in range(200):
        error = layer.forward(x, rois) - target
        losses.append(np.square(error).mean())
        layer.backward(2 * error / error.size)
        for name, parameter in layer.parameters().items():
            parameter -= 3 * layer.gradients[name]
    assert losses[-1] < losses[0] / 4


# ---- how layers begin


@pytest.mark.parametrize("kind", BRANCHES)
def test_branches_begin_as_in_the_papers(kind):
    layer, options = KINDS[kind]
    state = layer(64, (2, 3), rng=0, **options).state_dict()
    assert list(state) == keys_of(kind)
    for branch, (*first, last) in BRANCHES[kind].items():
        outputs = BINS * {"offset_fc": 2, "mask_fc": 1, "offset_mask_fc": 3}[branch]
        assert state[f"{branch}.0.weight"].shape == (1024, 64 * BINS)
        assert state[f"{branch}.{last}.weight"].shape == (outputs, 1024)
        assert not state[f"{branch}.{last}.weight"].any()
        for index in first:
            weight = state[f"{branch}.{index}.weight"]
            assert abs(weight.std() / 0.01 - 1) < 0.01
            assert abs(weight.mean()) < 1e-4
            assert 0.03 < np.abs(weight).max() < 0.07  # normal, not uniform
        assert not any(state[f"{branch}.{index}.bias"].any() for index in (*first, last))


def test_the_same_seed_gives_the_same_layer():
    first, second = (
        DeformRoIPool(2, 2, hidden_channels=3, rng=seed) for seed in (5, np.random.default_rng(5))
    )
    check_equal(first.state_dict(), second.state_dict())
    others = (DeformRoIPool(2, 2, hidden_channels=3, rng=seed) for seed in (6, None, None))
    weights = [layer.offset_fc_0_weight.tobytes() for layer in (first, *others)]
    assert len(set(weights)) == 4


def test_a_layer_writes_itself():
    layer = DeformRoIPool(4, 7, 1 / 16, hidden_channels=8)
    assert repr(layer) == (
        "DeformRoIPool(in_channels=4, output_size=(7, 7), spatial_scale=0.0625, sampling_ratio=0, gamma=0.1, "
        "hidden_channels=8)"
    )
    assert repr(built("shared, position-sensitive", np.random.default_rng(0))) == (
        "ModulatedDeformRoIPool(in_channels=4, output_size=(2, 3), spatial_scale=0.5, sampling_ratio=2, "
        "gamma=0.2, hidden_channels=5, position_sensitive=True)"
    )


@pytest.mark.parametrize("kind", [DeformRoIPool, ModulatedDeformRoIPool])
def test_every_layer_says_what_it_is(kind):
    assert kind.__doc__.startswith(("A deformable pooling", "A modulated deformable pooling"))
    assert "{" not in kind.__doc__.replace('{"sigmoid", "2*sigmoid"}', "")
    assert max(map(len, kind.__doc__.splitlines())) <= 110


# ---- arguments


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels is 0; wanted at least 1"),
        ({"hidden_channels": 2.0}, TypeError, r"hidden_channels is 2.0 \(float\); wanted an integer"),
        ({"output_size": 0}, ValueError, "output_size is 0; wanted at least 1"),
        ({"output_size": (1, 2, 3)}, ValueError, r"output_size has 3 entries; wanted an integer or \(height"),
        ({"spatial_scale": 0}, ValueError, "spatial_scale is 0; wanted more than 0"),
        ({"sampling_ratio": -1}, ValueError, "sampling_ratio is -1; wanted at least 0"),
        ({"position_sensitive": True}, ValueError, "sample_per_part is 0; wanted at least 1"),
        ({"position_sensitive": 1}, TypeError, r"position_sensitive is 1 \(int\); wanted True or False"),
        ({"shared_branch": None}, TypeError, "shared_branch is None.*; wanted True or False"),
        ({"gamma": "0.1"}, TypeError, "gamma is '0.1'; wanted a number"),
        ({"mask_activation": "relu"}, ValueError, r"mask_activation is 'relu'; wanted one of 'sigmoid', '2"),
        ({"dtype": int}, TypeError, "dtype is int64; wanted .*float32"),
    ],
)
def test_a_wrong_argument_is_named(given, error, message):
    right = {"in_channels": 4, "output_size": 2, "hidden_channels": 3}
    with pytest.raises(error, match=message):
        ModulatedDeformRoIPool(**right | given)


@pytest.mark.parametrize("kind", ["offsets", "shared, position-sensitive"])
def test_arrays_that_do_not_fit_are_named(kind):
    rng = np.random.default_rng(10)
    layer, (x, rois) = built(kind, rng), problem(rng)
    with pytest.raises(ValueError, match=r"x has the shape \(2, 3, 7, 9\); wanted \(batch, 4, height, width"):
        layer.forward(x[:, :3], rois)
    with pytest.raises(ValueError, match="x has 3 axes"):
        layer.forward(x[0], rois)
    with pytest.raises(ValueError, match=r"rois has shape \(3, 4\)"):
        layer.forward(x, rois[:, 1:])
    with pytest.raises(TypeError, match="_fc_0_weight has dtype float64 but x has float32"):
        layer.forward(x.astype(np.float32), rois.astype(np.float32))
    with pytest.raises(TypeError, match=r"x is .*; wanted a numpy\.ndarray"):
        layer.forward(x.tolist(), rois)
    y = layer.forward(x, rois)
    with pytest.raises(ValueError, match=r"grad_output has shape \(1, 4, 2, 3\); wanted"):
        layer.backward(y[:1])
    with pytest.raises(TypeError, match="grad_output has dtype float32 but x has float64"):
        layer.backward(y.astype(np.float32))
    with pytest.raises(TypeError, match=r"grad_output is .*; wanted a numpy\.ndarray"):
        layer.backward(y.tolist())
    assert layer.gradients == {}


# ---- state dicts and files


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_state_dict_makes_an_equal_layer(kind, tmp_path):
    rng = np.random.default_rng(11)
    first, second, (x, rois) = built(kind, rng), built(kind, rng), problem(rng)
    assert list(first.parameters()) == keys_of(kind, "_")
    layers.save_npz(tmp_path / "layer.npz", first.state_dict())
    state = layers.load_npz(tmp_path / "layer.npz")
    check_equal(state, first.state_dict())
    second.load_state_dict(state)
    np.testing.assert_array_equal(first.forward(x, rois), second.forward(x, rois))
    third = type(first).from_state_dict(state, 4, **options_of(kind))
    np.testing.assert_array_equal(first.forward(x, rois), third.forward(x, rois))


def test_a_state_of_another_form_is_named():
    rng = np.random.default_rng(12)
    shared, separate = built("shared", rng), built("separate", rng)
    with pytest.raises(
        ValueError, match=r"state holds 'offset_fc.0.weight', .* has 'offset_mask_fc.0.weight'"
    ):
        shared.load_state_dict(separate.state_dict())
    with pytest.raises(ValueError, match=r"state has no 'mask_fc.0.weight', 'mask_fc.0.bias', 'mask_fc.2"):
        separate.load_state_dict(built("offsets", rng).state_dict())
    with pytest.raises(ValueError, match=r"offset_mask_fc.4.bias has the shape \(3,\); .* wants \(18,\)"):
        shared.load_state_dict(shared.state_dict() | {"offset_mask_fc.4.bias": np.ones(3)})
