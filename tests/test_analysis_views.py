"""What a node sees, together: the numbers that the pictures are drawn from."""

import numpy as np
import pytest

from dcn_np import analysis
from dcn_np.analysis import Node, ReLU, of_layers, view_node
from dcn_np.layers import Conv2d, ModulatedDeformConv2d


def network(dtype=np.float64):
    """An ordinary and two modulated layers with offsets of their own, four pixels a step at the top."""
    rng = np.random.default_rng(0)
    stages = {
        "conv1": Conv2d(1, 4, 3, stride=2, padding=1, rng=rng, dtype=dtype),
        "relu1": ReLU(),
        "conv2": ModulatedDeformConv2d(4, 5, 3, stride=2, padding=1, rng=rng, dtype=dtype),
        "conv3": ModulatedDeformConv2d(5, 6, 3, padding=1, rng=rng, dtype=dtype),
        "relu3": ReLU(),
    }
    for name in ("conv2", "conv3"):
        for parameter in (stages[name].conv_offset_weight, stages[name].conv_offset_bias):
            parameter[:] = rng.normal(0, 0.3, parameter.shape)
    return stages


IMAGE = np.random.default_rng(1).random((1, 20, 24))


def test_a_view_is_what_the_analyses_tell():
    of_node = of_layers(network(), Node("relu3", position=(2, 3)))
    view = view_node(of_node, IMAGE, epsilon=0.2, relaxed_steps=5, seed=3)
    layer = of_node.sampled_layers(IMAGE)["conv3"]
    trace = analysis.trace_sampling([layer], [(2, 3)])
    assert view.layer == "conv3"
    np.testing.assert_array_equal(view.image, IMAGE)
    np.testing.assert_array_equal(view.place, [8, 12])
    np.testing.assert_array_equal(view.positions, 4 * trace.positions[0])
    np.testing.assert_array_equal(view.modulation, trace.modulation[0])
    np.testing.assert_array_equal(view.strength, of_node.strengths(IMAGE)["conv3"][0, 0, :, 2, 3])
    np.testing.assert_array_equal(
        view.field.field, analysis.effective_receptive_field(of_node, [IMAGE]).field
    )
    wanted = analysis.error_bounded_saliency(
        of_node.cosine_error(IMAGE), IMAGE, epsilon=0.2, relaxed_steps=5, seed=3
    )
    np.testing.assert_array_equal(view.region.mask, wanted.mask)
    assert view.region.error == wanted.error <= 0.2


@pytest.mark.parametrize(("levels", "scale"), [(2, 2), (3, 1)])
def test_samples_are_traced_through_as_many_levels(levels, scale):
    of_node = of_layers(network(), Node("conv3", position=(2, 3)))
    view = view_node(of_node, IMAGE, levels=levels, relaxed_steps=1)
    chain = list(of_node.sampled_layers(IMAGE).values())[-levels:]
    trace = analysis.trace_sampling(chain, [(2, 3)])
    np.testing.assert_array_equal(view.positions, scale * trace.positions[0])
    np.testing.assert_array_equal(view.modulation, trace.modulation[0])
    np.testing.assert_array_equal(view.place, [8, 12])
    assert view.strength is None


def test_the_samples_of_a_lower_layer_are_told_on_request():
    of_node = of_layers(network(), Node("conv2", position=(2, 3)))
    view = view_node(of_node, IMAGE, "conv1", relaxed_steps=1)
    assert view.layer == "conv1"
    np.testing.assert_array_equal(view.place, [4, 6])
    np.testing.assert_array_equal(view.positions[[0, 4, 8]], [[3, 5], [4, 6], [5, 7]])


def test_the_field_is_averaged_over_the_images_that_are_given():
    of_node = of_layers(network(), Node("relu3", position=(2, 3)))
    images = np.random.default_rng(2).random((3, 1, 20, 24))
    view = view_node(of_node, IMAGE, images=images, relaxed_steps=1)
    wanted = analysis.effective_receptive_field(of_node, images)
    np.testing.assert_array_equal(view.field.field, wanted.field)
    np.testing.assert_array_equal(view.field.responses, wanted.responses)
    np.testing.assert_array_equal(view.positions, view_node(of_node, IMAGE, relaxed_steps=1).positions)


def test_a_box_has_the_samples_of_all_its_positions():
    box = Node("relu3", position=(slice(1, 3), 2))
    of_node = of_layers(network(), box)
    view = view_node(of_node, IMAGE, relaxed_steps=1)
    ones = [
        view_node(of_layers(network(), Node("relu3", position=(y, 2))), IMAGE, relaxed_steps=1)
        for y in (1, 2)
    ]
    for name in ("positions", "modulation"):
        np.testing.assert_array_equal(
            getattr(view, name), np.concatenate([getattr(one, name) for one in ones])
        )
    np.testing.assert_array_equal(view.place, [6, 8])
    both = of_node.forward(IMAGE)
    assert both.shape == (6, 2)
    strengths = of_node.strengths(IMAGE)["conv3"][0, 0, :, 1:3, 2]
    np.testing.assert_array_equal(view.strength, np.concatenate([strengths[:, 0], strengths[:, 1]]))
    assert view.region.error <= 0.1


def test_the_features_of_a_box_are_those_of_its_positions():
    whole = of_layers(network(), Node("relu3")).forward(IMAGE)
    of_box = of_layers(network(), Node("relu3", position=(slice(1, 4), slice(0, 2))))
    np.testing.assert_array_equal(of_box.forward(IMAGE), whole[:, 1:4, 0:2])
    response, gradient = of_box(IMAGE)
    assert response == pytest.approx(np.linalg.norm(whole[:, 1:4, 0:2]))
    moved = IMAGE.copy()
    moved[0, 9, 5] += 1e-6
    assert (of_box(moved)[0] - response) / 1e-6 == pytest.approx(gradient[0, 9, 5], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("position", "said"),
    [
        ((slice(3, 3), 0), r"position\[0\] is slice\(3, 3, None\); .*: wanted 0 <= start < stop <= 5"),
        ((0, slice(4, 7)), r"position\[1\] is slice\(4, 7, None\); .*: wanted 0 <= start < stop <= 6"),
        ((slice(-1, 2), 0), r"position\[0\] is slice\(-1, 2, None\)"),
        ((slice(0, 4, 2), 0), r"position\[0\]\.step is 2"),
        ((9, 0), r"position\[0\] is 9; .*: wanted 0 to 4"),
        (None, "the node has no position"),
    ],
)
def test_a_node_outside_is_refused(position, said):
    with pytest.raises(ValueError, match=said):
        view_node(of_layers(network(), Node("relu3", position=position)), IMAGE)


@pytest.mark.parametrize("position", [(slice(None), 0), (slice(1.5, 3), 0), (0.5, 0)])
def test_a_position_is_of_integers(position):
    with pytest.raises(TypeError, match=r"position\[0\]"):
        of_layers(network(), Node("relu3", position=position)).forward(IMAGE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"levels": 0}, "levels is 0"),
        ({"levels": 4}, "levels is 4; 'conv3' is layer 3 from the image: wanted 1 to 3"),
        ({"layer": "relu3"}, "layer is 'relu3'; the layers that sample are"),
        ({"epsilon": 0}, "epsilon is 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        view_node(of_layers(network(), Node("relu3", position=(2, 3))), IMAGE, **options)


def test_a_network_without_convolutions_is_refused():
    with pytest.raises(ValueError, match=r"layer is 0 \(int\); the layers that sample are"):
        view_node(of_layers([ReLU()], Node(0, position=(1, 1))), IMAGE.repeat(2, axis=0))
