"""What a head over regions sees: bins against differences of the node, and views of regions."""

import numpy as np
import pytest
from test_analysis_nodes import differences

import dcn_np
from dcn_np import analysis
from dcn_np.analysis import Node, ReLU, SampledRegions, bin_positions, effective_bins, of_layers, view_node
from dcn_np.layers import Conv2d, DeformRoIPool, ModulatedDeformRoIPool

SIZES = {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2, "gamma": 0.2}
# Boxes in pixels of the image, none of whose samples lie at the border or at whole coordinates of the map.
ROIS = np.array([[0, 3.3, 2.2, 17.1, 14.6], [0, 8.4, 5.7, 21.3, 18.2]])
IMAGE = np.random.default_rng(1).random((1, 22, 26))
POOLINGS = {
    "DCNv1": (DeformRoIPool, {}),
    "DCNv2": (ModulatedDeformRoIPool, {}),
    "DCNv1, position-sensitive": (DeformRoIPool, {"position_sensitive": True}),
    "DCNv2, position-sensitive": (ModulatedDeformRoIPool, {"position_sensitive": True}),
}
EACH = pytest.mark.parametrize("kind", POOLINGS)


def network(kind="DCNv2"):
    """A convolution of stride 2, a pooling whose bins move, and a head of one fully connected layer."""
    rng = np.random.default_rng(0)
    pooling, options = POOLINGS[kind]
    pool = pooling(4, hidden_channels=5, rng=rng, dtype=np.float64, **SIZES, **options)
    for parameter in pool.parameters().values():
        parameter[:] = rng.normal(0, 0.3, parameter.shape)
    return {
        "conv": Conv2d(1, 4, 3, stride=2, padding=1, rng=rng, dtype=np.float64),
        "relu": ReLU(),
        "pool": pool,
        "fc": Conv2d(4, 6, (2, 3), rng=rng, dtype=np.float64),
        "relu2": ReLU(),
    }


class Fixed:
    """A pooling with given offsets and masks in place of its branches."""

    spatial_scale = SIZES["spatial_scale"]

    def __init__(self, pool, offset, mask):
        self.offset, self.mask = offset, mask
        self.pool = pool

    def forward(self, x, rois):
        return self.pool._pool(x, rois, self.offset, self.mask)

    def backward(self, grad_output):
        raise NotImplementedError


def sampled_by(stages):
    """The offsets and masks of both regions."""
    of_layers(stages, Node(item=1), ROIS).forward(IMAGE)
    return stages["pool"].last_branch()


@EACH
@pytest.mark.parametrize("channel", [None, 2])
def test_the_gradient_of_a_region_is_that_of_differences(kind, channel):
    of_node = of_layers(network(kind), Node("fc", channel, item=1), ROIS)
    response, gradient = of_node(IMAGE)
    wanted = differences(lambda moved: of_node(moved)[0], IMAGE)
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    assert response != 0
    field = analysis.effective_receptive_field(of_node, [IMAGE]).field
    np.testing.assert_array_equal(field, np.abs(gradient[0]))


@EACH
def test_the_strength_of_a_bin_is_the_response_by_its_place(kind):
    stages = network(kind)
    of_node = of_layers(stages, Node("relu2", item=1), ROIS)
    strengths = of_node.strengths(IMAGE)
    assert list(strengths) == ["conv", "pool"]
    offset, mask = sampled_by(stages)

    def response(moved):
        features = of_layers(stages | {"pool": Fixed(stages["pool"], moved, mask)}, Node(item=1), ROIS)
        return np.linalg.norm(features.forward(IMAGE))

    by_offset = differences(response, offset)
    boxes = ROIS[:, 1:]
    if stages["pool"].position_sensitive:
        boxes = np.round(boxes)
        boxes[:, 2:] += 1
    pixels = SIZES["gamma"] * SIZES["spatial_scale"] * (boxes[:, 2:] - boxes[:, :2])
    wanted = np.linalg.norm(by_offset / pixels[:, :, None, None], axis=1)
    np.testing.assert_allclose(strengths["pool"], wanted, rtol=0, atol=1e-6 * wanted.max())
    assert strengths["pool"][1].all()
    assert not strengths["pool"][0].any()


# ---- where bins are


def test_a_position_sensitive_pooling_of_a_ramp_reads_the_positions_of_the_bins():
    ramp, offset = (
        np.indices((30, 40)).astype(float)[None],
        np.random.default_rng(5).normal(0, 0.3, (2, 2, 2, 3)),
    )
    pooled = dcn_np.deform_psroi_pool(ramp, ROIS, offset, 2, 1, (2, 3), 0.5, None, 100, 0.2)
    # The first of 100 samples lies at the border of its bin: their mean is a 200th of it before the centre.
    first, last = np.round(ROIS[:, 2:0:-1]), np.round(ROIS[:, :2:-1])
    before = 0.5 * (last + 1 - first) / (2, 3) / 200
    found = bin_positions(ROIS, offset, (2, 3), 0.5, 0.2, position_sensitive=True)
    np.testing.assert_allclose(found, pooled + before[:, :, None, None], rtol=0, atol=1e-9)


@EACH
def test_the_regions_of_a_network_say_where_their_bins_are_in_the_image(kind):
    stages = network(kind)
    found = of_layers(stages, Node(item=1), ROIS).sampled_regions(IMAGE)["pool"]
    offset, mask = sampled_by(stages)
    numbers = SIZES["output_size"], SIZES["spatial_scale"], SIZES["gamma"]
    on_map = bin_positions(ROIS, offset, *numbers, position_sensitive="sensitive" in kind)
    # Pixel q of a map of half the size lies over pixels 2 q and 2 q + 1.
    np.testing.assert_allclose(found.positions, 2 * on_map + 0.5, rtol=1e-14)
    assert (found.mask is None) == ("DCNv1" in kind)
    if mask is not None:
        np.testing.assert_array_equal(found.mask, mask)


def test_bins_without_offsets_tile_their_box():
    found = SampledRegions(np.array([[0, 4.0, 8.0, 10.0, 16.0]]), (4, 3), 0.25)
    y, x = found.positions[0]
    np.testing.assert_allclose(y, np.repeat([[8.5], [10.5], [12.5], [14.5]], 3, axis=1))
    np.testing.assert_allclose(x, np.repeat([[4.5, 6.5, 8.5]], 4, axis=0))
    np.testing.assert_array_equal(found.boxes, [[7.5, 3.5, 15.5, 9.5]])
    by_pixels = SampledRegions(np.array([[0, 4.0, 8.0, 9.0, 15.0]]), (4, 3), 0.25, position_sensitive=True)
    np.testing.assert_allclose(by_pixels.positions, found.positions)
    np.testing.assert_array_equal(by_pixels.boxes, found.boxes)


def test_what_lies_above_a_pooling_samples_no_map_of_the_image():
    of_node = of_layers(network(), Node("fc"), ROIS)
    assert list(of_node.sampled_layers(IMAGE)) == ["conv"]
    assert list(of_node.sampled_regions(IMAGE)) == ["pool"]
    below = of_layers(network(), Node("relu", position=(4, 4)))
    assert below.sampled_regions(IMAGE) == {}
    assert list(below.strengths(IMAGE)) == ["conv"]


# ---- views


@EACH
@pytest.mark.parametrize("layer", [None, "pool"])
def test_a_view_of_a_region_is_what_the_analyses_tell(kind, layer):
    of_node = of_layers(network(kind), Node("relu2", item=1), ROIS)
    view = view_node(of_node, IMAGE, layer, relaxed_steps=5, epsilon=0.01, cell=2)
    regions = of_node.sampled_regions(IMAGE)["pool"]
    assert view.layer == "pool"
    np.testing.assert_array_equal(view.positions, regions.positions[1].reshape(2, 6).T)
    np.testing.assert_array_equal(view.strength, of_node.strengths(IMAGE)["pool"][1].reshape(6))
    modulation = np.ones(6) if regions.mask is None else regions.mask[1].reshape(6)
    np.testing.assert_array_equal(view.modulation, modulation)
    np.testing.assert_array_equal(view.box, regions.boxes[1])
    np.testing.assert_array_equal(
        view.place, [(view.box[0] + view.box[2]) / 2, (view.box[1] + view.box[3]) / 2]
    )
    field = analysis.effective_receptive_field(of_node, [IMAGE]).field
    np.testing.assert_array_equal(view.field.field, field)
    assert view.region.error <= 0.01
    assert 0 < view.region.area < 1


def test_the_convolution_below_a_pooling_is_viewed_by_its_own_positions():
    of_node = of_layers(network(), Node("relu", position=(4, 5)), ROIS)
    view = view_node(of_node, IMAGE, relaxed_steps=1)
    assert (view.layer, view.box, len(view.positions)) == ("conv", None, 9)
    with pytest.raises(ValueError, match="the node has no position"):
        view_node(of_layers(network(), Node("fc"), ROIS), IMAGE, "conv")


def test_a_bin_of_a_pooling_is_a_node_too():
    of_node = of_layers(network(), Node("pool", position=(1, 2), item=1), ROIS)
    view = view_node(of_node, IMAGE, relaxed_steps=1)
    assert view.positions.shape == (6, 2)
    assert (view.strength > 0).tolist() == 5 * [False] + [True]


# ---- hostile input


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([0, 5.0, 5, 5, 9], r"rois\[1\] is .*, an empty box; wanted x1 < x2"),
        ([0, 5.0, 9, 9, 5], r"rois\[1\] is .*, an empty box"),
        ([0, np.nan, 1, 4, 4], r"rois\[1\] is \(0, nan, 1, 4, 4\); wanted finite numbers"),
        ([1, 1.0, 1, 4, 4], r"rois\[1\] is \(1, 1, 1, 4, 4\); x has a batch of 1"),
    ],
)
@EACH
def test_wrong_regions_are_refused(kind, box, said):
    if box[1:] == [5.0, 5, 5, 9] and "sensitive" in kind:
        box = [0, 5.0, 5, 3, 9]  # by that rule a box from 5 to 5 is one pixel wide
    with pytest.raises(ValueError, match=said):
        view_node(of_layers(network(kind), Node(), np.array([[0, 1.0, 1, 8, 8], box])), IMAGE)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rois is None; network\['pool'\] pools over regions"):
        of_layers(network(), Node())
    with pytest.raises(TypeError, match="rois is "):
        of_layers(network(), Node(), [[0, 1, 1, 8, 8]])
    for node, options, said in (
        (Node(item=2), {}, "item is 2; .*wanted 0 to 1"),
        (Node(), {"levels": 2}, "levels is 2 .*; the bins of a pooling are not traced: wanted 1"),
        (Node(), {"layer": "fc"}, r"layer is 'fc'; the layers that sample are \['conv', 'pool'\]"),
        (Node(), {"epsilon": 0}, "epsilon is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            view_node(of_layers(network(), node, ROIS), IMAGE, **options)
    with pytest.raises(ValueError, match=r"mask has shape \(1, 1, 2, 2\); wanted .* \(2, 1, 2, 3\)"):
        SampledRegions(ROIS, (2, 3), mask=np.ones((1, 1, 2, 2)))
    with pytest.raises(TypeError, match="position_sensitive is 1"):
        bin_positions(ROIS, None, (2, 3), position_sensitive=1)
    with pytest.raises(TypeError, match="position_sensitive is 0"):
        effective_bins(np.ones((2, 1, 2, 3)), IMAGE[None], ROIS, None, None, (2, 3), position_sensitive=0)
