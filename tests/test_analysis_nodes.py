"""Nodes of networks as functions of the image, and their receptive fields, against differences."""

import numpy as np
import pytest

from dcn_np import analysis
from dcn_np.analysis import Node, effective_receptive_field, of_layers, sampling_positions, trace_sampling
from dcn_np.layers import Conv1d, Conv2d, Conv3d, DeformConv2d, ModulatedDeformConv2d

STEP = 2.0**-12


def network(rng=None, dtype=np.float64):
    """Ordinary, deformable and modulated layers, rectified, with offsets that are no whole numbers."""
    rng = rng or np.random.default_rng(0)
    convs = {
        "conv1": Conv2d(2, 4, 3, stride=2, padding=1, rng=rng, dtype=dtype),
        "conv2": DeformConv2d(4, 4, 3, padding=1, offset_groups=2, rng=rng, dtype=dtype),
        "conv3": ModulatedDeformConv2d(4, 6, 3, stride=2, padding=1, rng=rng, dtype=dtype),
    }
    for name in ("conv2", "conv3"):
        for parameter in (convs[name].conv_offset_weight, convs[name].conv_offset_bias):
            parameter[:] = rng.normal(0, 0.3, parameter.shape)
    stages = {}
    for name, conv in convs.items():
        stages |= {name: conv, f"{name}.relu": analysis.ReLU()}
    classifier = Conv2d(6, 5, 1, rng=rng, dtype=dtype)
    return stages | {"pool": analysis.GlobalAveragePool(), "classifier": classifier}


def image_of(seed=1, size=(9, 8)):
    return np.random.default_rng(seed).normal(size=(2, *size))


def differences(value_of, array):
    """The central differences of a function by each number of an array."""
    found = np.zeros(array.shape)
    for index in np.ndindex(*array.shape):
        high, low = array.copy(), array.copy()
        high[index] += STEP
        low[index] -= STEP
        found[index] = (value_of(high) - value_of(low)) / (2 * STEP)
    return found


NODES = {
    "one number": Node("conv3", channel=2, position=(1, 1)),
    "a feature vector": Node("conv3.relu", position=(2, 1)),
    "a channel everywhere": Node("conv2", channel=1),
    "a logit": Node(channel=3),
    "all logits": Node("classifier"),
}


@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
def test_the_gradient_is_that_of_the_response(node):
    of_node, image = of_layers(network(), node), image_of()
    response, gradient = of_node(image)
    wanted = differences(lambda moved: of_node(moved)[0], image)
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    features = of_node.forward(image)
    assert response == (features.ravel()[0] if features.size == 1 else np.linalg.norm(features))
    assert response != 0


def test_the_features_are_those_of_the_layer():
    stages, image = network(), image_of()
    x = image[None]
    for name, stage in stages.items():
        x = stage.forward(x)
        found = of_layers(stages, Node(name)).forward(image)
        np.testing.assert_array_equal(found, x[0])
    by_number = of_layers(list(stages.values()), Node(2, 1, (3, 2))).forward(image)
    assert by_number == of_layers(stages, Node("conv2", 1, (3, 2))).forward(image)


def test_a_negative_response_keeps_its_sign():
    layer = Conv2d(1, 1, 1, bias=False, rng=0, dtype=np.float64)
    layer.weight[:] = -2.0
    response, gradient = of_layers([layer], Node(channel=0, position=(0, 0)))(np.ones((1, 1, 1)))
    assert (response, gradient.item()) == (-2.0, -2.0)


def test_features_of_zero_have_no_gradient():
    layer = Conv2d(1, 2, 1, bias=False, rng=0, dtype=np.float64)
    response, gradient = of_layers([layer], Node(position=(0, 0)))(np.zeros((1, 2, 2)))
    assert response == 0
    assert not gradient.any()


def test_the_cosine_error_and_its_gradient():
    of_node, image, other = of_layers(network(), NODES["a feature vector"]), image_of(), image_of(2)
    error_of = of_node.cosine_error(image)
    a, b = of_node.forward(image).copy(), of_node.forward(other).copy()
    error, gradient = error_of(other)
    assert error == pytest.approx(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-14)
    wanted = differences(lambda moved: error_of(moved)[0], other)
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    assert error_of(image)[0] == pytest.approx(0, abs=1e-14)


class Itself(analysis.NodeFunction):
    """A node that is the whole image, in the image's own memory."""

    def forward(self, image):
        return image

    def backward(self, grad_features):
        return grad_features


def test_what_others_are_compared_with_is_kept():
    image = image_of()
    error_of, first = Itself().cosine_error(image), image.copy()
    image[:] = image_of(2)
    assert error_of(first)[0] == pytest.approx(0, abs=1e-14)
    assert error_of(image)[0] > 0.1


# ---- how the layers of a network read


def test_the_layers_of_a_network_say_how_they_sample():
    stages, image = network(), image_of()
    of_node = of_layers(stages, Node("conv3"))
    sampled = of_node.sampled_layers(image)
    assert list(sampled) == ["conv1", "conv2", "conv3"]
    assert [layer.geometry.input for layer in sampled.values()] == [(9, 8), (5, 4), (5, 4)]
    assert [layer.scale for layer in sampled.values()] == [(1, 1), (2, 2), (2, 2)]
    assert sampled["conv1"].offset is None
    assert sampled["conv2"].mask is None
    x = of_layers(stages, Node("conv2.relu")).forward(image)[None]
    offset, mask = stages["conv3"].branch(x)
    np.testing.assert_array_equal(sampled["conv3"].offset, offset)
    np.testing.assert_array_equal(sampled["conv3"].mask, mask)
    trace = trace_sampling(list(sampled.values()), [[1, 1]])
    assert trace.positions.shape == (1, 729, 2)
    first = sampling_positions(offset, 3, 2, 1)[0, 0, :, :, 1, 1]
    np.testing.assert_array_equal(trace_sampling([sampled["conv3"]], [[1, 1]]).positions[0], first)


@pytest.mark.parametrize("name", ["conv2", "conv3"])
def test_strengths_are_differences_of_the_response_by_the_positions(name):
    stages, image = network(), image_of()
    of_node = of_layers(stages, NODES["a feature vector"])
    sampled = of_node.sampled_layers(image)[name]
    offset, mask = sampled.offset, sampled.mask
    found = of_node.strengths(image, norm=1)[name]
    stages[name].branch = lambda x: (moving[0], mask)
    moving = [offset]

    def response(moved):
        moving[0] = moved
        return of_node(image)[0]

    groups = stages[name].offset_groups
    # Above conv2 the branch of conv3 answers to what conv2 gives: part of the node's gradient there.
    by_offset = np.abs(differences(response, offset)).reshape(1, groups, 9, 2, *offset.shape[2:]).sum(axis=3)
    np.testing.assert_allclose(found, by_offset, rtol=0, atol=1e-6 * by_offset.max())
    assert found.max() > 0


def test_no_branch_is_computed_twice(monkeypatch):
    stages, calls = network(), []
    branch = type(stages["conv2"]).branch
    monkeypatch.setattr(type(stages["conv2"]), "branch", lambda layer, x: calls.append(x) or branch(layer, x))
    of_node = of_layers(stages, NODES["a feature vector"])
    for analyse in (of_node.strengths, of_node.sampled_layers):
        calls.clear()
        analyse(image_of())
        assert len(calls) == 1


# ---- receptive fields


@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_the_field_is_the_mean_of_differences_on_the_images(norm):
    of_node = of_layers(network(), NODES["a feature vector"])
    images = np.stack([image_of(seed) for seed in (3, 4, 5)])
    sizes = []
    for image in images:
        gradient = differences(lambda moved: of_node(moved)[0], image)
        sizes.append(np.linalg.norm(gradient, norm, axis=0))
    found = effective_receptive_field(of_node, images, norm=norm)
    np.testing.assert_allclose(found.field, np.mean(sizes, axis=0), rtol=0, atol=1e-6 * np.max(sizes))
    np.testing.assert_array_equal(found.responses, [of_node(image)[0] for image in images])
    again = effective_receptive_field(of_node, iter(images), norm=norm)
    np.testing.assert_array_equal(again.field, found.field)


@pytest.mark.parametrize(("conv", "ndim"), [(Conv1d, 1), (Conv2d, 2), (Conv3d, 3)])
def test_the_field_of_a_convolution_is_its_filter_where_the_node_reads(conv, ndim):
    layer = conv(1, 1, 3, stride=2, padding=1, rng=0, dtype=np.float64)
    size, place = (9, 8, 7)[:ndim], (2, 1, 2)[:ndim]
    found = effective_receptive_field(of_layers([layer], Node(None, 0, place)), [np.ones((1, *size))])
    wanted = np.zeros(size)
    window = tuple(slice(2 * p - 1, 2 * p + 2) for p in place)
    wanted[window] = np.abs(layer.weight[0, 0])[tuple(slice(0, d.stop - d.start) for d in window)]
    np.testing.assert_array_equal(found.field, wanted)


def test_zero_offsets_have_the_classical_receptive_field():
    layers = [DeformConv2d(1, 3, 3, padding=1, rng=0, dtype=np.float64), analysis.ReLU(),
              ModulatedDeformConv2d(3, 3, 3, padding=2, dilation=2, rng=1, dtype=np.float64)]  # fmt: skip
    images = np.random.default_rng(0).normal(size=(4, 1, 15, 15))
    found = effective_receptive_field(of_layers(layers, Node(position=(7, 7))), images)
    reached = np.argwhere(found.field)
    np.testing.assert_array_equal([reached.min(axis=0), reached.max(axis=0)], [[4, 4], [10, 10]])


def test_sizes_of_a_field():
    field = np.zeros((9, 9))
    field[2:5, 3:6] = 1.0
    field[0, 0] = 0.04
    found = analysis.ReceptiveField(field, np.zeros(1))
    assert found.size() == 3
    assert found.size(0.01) == pytest.approx(np.sqrt(10))
    field[0, 0] = 0
    np.testing.assert_array_equal(found.centre(), [3, 4])
    assert found.spread() == pytest.approx(np.sqrt(4 / 3))
    line = analysis.ReceptiveField(np.array([0, 1.0, 1, 0.5, 0]), np.zeros(1))
    assert line.size() == 3
    nothing = analysis.ReceptiveField(np.zeros((4, 4)), np.zeros(1))
    assert nothing.size() == 0
    assert np.isnan(nothing.spread())
    assert np.isnan(nothing.centre()).all()


def test_the_size_of_a_gaussian_is_that_of_the_definition():
    squares = ((np.indices((101, 101)) - 50) ** 2).sum(axis=0)
    found = analysis.ReceptiveField(np.exp(-squares / 2 / 8**2), np.zeros(1))
    # The field exceeds t within sigma * sqrt(-2 log t); the spread of two axes is sigma * sqrt(2).
    assert found.size() == pytest.approx(8 * np.sqrt(-2 * np.log(1 - 0.9545) * np.pi), rel=0.01)
    assert found.spread() == pytest.approx(8 * np.sqrt(2), rel=0.01)


# ---- hostile input


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (Node("conv3", 6), "channel is 6; .*: wanted 0 to 5"),
        (Node("conv3", -1), "channel is -1; .*: wanted 0 to 5"),
        (Node("conv3", 0, (3, 0)), r"position\[0\] is 3; .*: wanted 0 to 2"),
        (Node("conv3", 0, (0, -1)), r"position\[1\] is -1; .*: wanted 0 to 1"),
        (Node("conv3", 0, (1,)), r"position is \(1,\); .*: wanted 2 indices"),
        (Node("conv3", 0, None, 1), "item is 1; .*: wanted 0 to 0"),
    ],
)
def test_a_node_outside_is_refused(node, message):
    with pytest.raises(ValueError, match=message):
        of_layers(network(), node)(image_of())


def test_wrong_networks_are_refused():
    with pytest.raises(ValueError, match=r"node.layer is 'conv9'; the network has \['conv1', 'conv1.relu'"):
        of_layers(network(), Node("conv9"))
    with pytest.raises(ValueError, match=r"node.layer is None; the network has \[\]"):
        of_layers([], Node())
    with pytest.raises(TypeError, match=r"network\[0\] is .*; wanted an object with forward and backward"):
        of_layers([np.tanh], Node())
    with pytest.raises(TypeError, match=r"channel is 1\.5"):
        of_layers(network(), Node("conv3", 1.5))(image_of())


def test_nodes_without_a_direction_have_no_cosine():
    of_node = of_layers(network(), NODES["one number"])
    with pytest.raises(ValueError, match="the node has 1 feature"):
        of_node.cosine_error(image_of())
    layer = Conv2d(1, 2, 1, bias=False, rng=0, dtype=np.float64)
    with pytest.raises(ValueError, match="the node's features are all 0"):
        of_layers([layer], Node()).cosine_error(np.zeros((1, 2, 2)))


def test_hostile_images_are_refused():
    of_node = of_layers(network(), NODES["a logit"])
    bad = image_of()
    bad[0, 3, 4] = np.nan
    for images, kind, message in (
        ([image_of(), bad], ValueError, r"images\[1\] holds 1 number that are NaN or infinite"),
        ([bad * np.inf], ValueError, r"images\[0\] holds .* NaN or infinite"),
        ([], ValueError, "images is .*; wanted at least one"),
        ([image_of(), image_of(size=(8, 8))], ValueError, r"images\[1\] has shape \(2, 8, 8\)"),
        ([np.ones((2, 9, 8), np.uint8)], TypeError, r"images\[0\] has dtype uint8; wanted floating"),
        ([np.ones((2, 0, 8))], ValueError, r"images\[0\] has 3 axes, shape \(2, 0, 8\)"),
        (["picture"], TypeError, r"images\[0\] is 'picture'"),
    ):
        with pytest.raises(kind, match=message):
            effective_receptive_field(of_node, images)


def test_what_a_callable_returns_is_checked():
    image = image_of()
    with pytest.raises(ValueError, match=r"a gradient of shape \(9, 8\); wanted that of the image"):
        effective_receptive_field(lambda image: (1.0, image[0]), [image])
    for result in ((np.nan, image), (1.0, image * np.inf)):
        with (
            np.errstate(invalid="ignore"),
            pytest.raises(ValueError, match="returned what is NaN or infinite"),
        ):
            effective_receptive_field(lambda image, result=result: result, [image])
