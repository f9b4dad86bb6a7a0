"""Pictures of what nodes see: do they show the arrays that they are drawn from?"""

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb  # noqa: E402

from dcn_np.analysis import Node, ReLU, of_layers, plot, view_node  # noqa: E402
from dcn_np.layers import Conv2d, ModulatedDeformConv2d  # noqa: E402

RNG = np.random.default_rng(0)
IMAGE = RNG.random((3, 12, 16))


@pytest.fixture
def axes():
    return plot.new_figure(4, 3).subplots()


def drawn(axes):
    """The pixels of a figure, as it is written: (height, width, 3)."""
    canvas = axes.figure.canvas
    if not hasattr(canvas, "buffer_rgba"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def view_of(position=(2, 3), bias=0.0, image=None):
    deformable = ModulatedDeformConv2d(4, 6, 3, padding=1, rng=1, dtype=np.float64)
    deformable.conv_offset_bias[:18] = bias
    network = [Conv2d(3, 4, 3, stride=2, padding=1, rng=0, dtype=np.float64), ReLU(), deformable]
    of_node = of_layers(network, Node(position=position))
    return view_node(of_node, IMAGE if image is None else image, relaxed_steps=3)


# ---- one picture


def test_every_function_returns_the_axes_that_it_was_given(axes):
    assert plot.show_image(axes, IMAGE) is axes
    assert plot.sampling_points(axes, [[1.0, 2.0]]) is axes
    assert plot.receptive_field(axes, np.ones((12, 16))) is axes
    assert plot.salient_region(axes, np.ones((12, 16), bool)) is axes
    assert plot.label_pixels(axes) is axes
    assert plot.outlined_box(axes, [0, 1, 2, 3]) is axes


@pytest.mark.parametrize("around", [0, 2.5])
def test_an_image_lies_at_its_pixels(axes, around):
    plot.show_image(axes, IMAGE, around=around)
    (picture,) = axes.images
    np.testing.assert_allclose(picture.get_array(), IMAGE.transpose(1, 2, 0))
    assert picture.get_extent() == [-0.5, 15.5, 11.5, -0.5]
    assert axes.get_xlim() == (-0.5 - around, 15.5 + around)
    assert axes.get_ylim() == (11.5 + around, -0.5 - around)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x (pixels)", "y (pixels)")


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_an_image_of_other_channels_is_grey(axes, channels):
    image = np.random.default_rng(1).random((channels, 4, 5))
    plot.show_image(axes, image)
    np.testing.assert_allclose(
        axes.images[0].get_array(), np.repeat(image.mean(axis=0)[..., None], 3, axis=2)
    )


def test_an_image_beyond_black_and_white_is_scaled(axes):
    plot.show_image(axes, 7 * IMAGE - 2)
    low, high = IMAGE.min(), IMAGE.max()
    np.testing.assert_allclose(
        axes.images[0].get_array(), (IMAGE.transpose(1, 2, 0) - low) / (high - low), atol=1e-12
    )


def test_a_pale_image_is_in_light_greys(axes):
    plot.show_image(axes, IMAGE, pale=True)
    grey = np.repeat(IMAGE.mean(axis=0)[..., None], 3, axis=2)
    np.testing.assert_allclose(axes.images[0].get_array(), 0.5 + grey / 2)


def test_an_even_image_is_drawn(axes):
    plot.show_image(axes, np.full((1, 3, 3), -4.0))
    assert not axes.images[0].get_array().any()


def test_points_are_where_and_as_large_as_the_arrays_say(axes):
    plot.show_image(axes, IMAGE)
    limits = axes.get_xlim(), axes.get_ylim()
    positions, modulation = RNG.uniform(-3, 15, (20, 2)), RNG.uniform(-1, 2, 20)
    plot.sampling_points(axes, positions, modulation, area=40)
    (points,) = axes.collections
    np.testing.assert_array_equal(points.get_offsets(), positions[:, ::-1])
    np.testing.assert_allclose(points.get_sizes(), 40 * np.abs(modulation))
    np.testing.assert_allclose(points.get_facecolor()[:, :3], [to_rgb(plot.ORANGE)])
    drawn(axes)
    assert (axes.get_xlim(), axes.get_ylim()) == limits


def test_points_without_modulation_are_all_as_large(axes):
    plot.sampling_points(axes, np.zeros((4, 2)))
    np.testing.assert_array_equal(axes.collections[0].get_sizes(), [plot.AREA] * 4)


def test_strengths_are_colours_from_nought_to_the_largest(axes):
    strength = np.array([0.0, 3.0, 6.0])
    plot.sampling_points(axes, np.eye(3)[:, :2], strength=strength)
    (points,) = axes.collections
    drawn(axes)
    map_of = matplotlib.colormaps[plot.STRENGTHS]
    np.testing.assert_allclose(points.get_facecolor(), map_of([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("function", ["receptive_field", "salient_region"])
def test_an_overlay_has_the_extent_of_the_image(axes, function):
    plot.show_image(axes, IMAGE, around=3)
    limits = axes.get_xlim(), axes.get_ylim()
    getattr(plot, function)(axes, RNG.random((12, 16)) > 0.5)
    image, overlay = axes.images
    assert overlay.get_extent() == image.get_extent()
    drawn(axes)
    assert (axes.get_xlim(), axes.get_ylim()) == limits


def test_a_field_is_the_darker_and_the_less_clear_the_larger(axes):
    plot.receptive_field(axes, [[0.0, 1.0, 4.0]])
    colours = axes.images[0].get_array()
    np.testing.assert_allclose(colours[0, :, 3], [0, 0.5, 1])
    np.testing.assert_allclose(colours[0, :, :3], matplotlib.colormaps[plot.FIELDS]([0, 0.5, 1.0])[:, :3])
    assert (np.diff(colours[0, :, :3].sum(axis=1)) < 0).all()


def test_a_field_of_zeros_is_clear(axes):
    plot.receptive_field(axes, np.zeros((3, 4)))
    assert not axes.images[0].get_array()[..., 3].any()


def test_a_region_has_a_veil_over_all_that_is_removed(axes):
    mask = RNG.random((12, 16)) > 0.5
    plot.salient_region(axes, mask)
    veil = axes.images[0].get_array()
    np.testing.assert_array_equal(veil[..., 3], np.where(mask, 0, plot.VEIL))
    assert (veil[..., :3] == 1).all()


def test_a_region_is_outlined_along_the_sides_of_pixels(axes):
    mask = np.zeros((4, 6), bool)
    mask[1, 2:4] = True
    plot.salient_region(axes, mask)
    sides = {tuple(map(tuple, side)) for side in axes.collections[0].get_segments()}
    assert sides == {
        ((1.5, 0.5), (2.5, 0.5)),
        ((2.5, 0.5), (3.5, 0.5)),
        ((1.5, 1.5), (2.5, 1.5)),
        ((2.5, 1.5), (3.5, 1.5)),
        ((1.5, 0.5), (1.5, 1.5)),
        ((3.5, 0.5), (3.5, 1.5)),
    }


@pytest.mark.parametrize("kept", [False, True])
def test_a_region_of_nothing_or_all_is_drawn(axes, kept):
    plot.salient_region(plot.show_image(axes, IMAGE), np.full((12, 16), kept))
    assert len(axes.collections[0].get_segments()) == (2 * (12 + 16) if kept else 0)
    drawn(axes)


def test_a_box_is_outlined_at_its_borders(axes):
    plot.show_image(axes, IMAGE)
    limits = axes.get_xlim(), axes.get_ylim()
    plot.outlined_box(axes, [1.5, -0.5, 20.5, 8.5])
    for frame in axes.patches:
        np.testing.assert_array_equal(frame.get_bbox().extents, [-0.5, 1.5, 8.5, 20.5])
        assert not frame.get_fill()
    drawn(axes)
    assert (axes.get_xlim(), axes.get_ylim()) == limits


def test_a_point_is_drawn_at_its_pixel(axes):
    plot.sampling_points(plot.show_image(axes, np.zeros((1, 8, 8))), [[2.0, 5.0]], area=200)
    picture = drawn(axes)
    x, y = axes.transData.transform((5, 2))
    found = picture[picture.shape[0] - 1 - round(y), round(x)] / 255
    np.testing.assert_allclose(found, to_rgb(plot.ORANGE), atol=0.02)


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("show_image", (np.zeros((4, 4)),), r"image has shape \(4, 4\)"),
        ("show_image", (np.zeros((3, 0, 4)),), r"image has shape \(3, 0, 4\)"),
        ("sampling_points", (np.zeros((4, 3)),), r"positions has shape \(4, 3\)"),
        ("sampling_points", (np.zeros((4, 2)), np.ones(3)), r"modulation has shape \(3,\).* of 4 points"),
        ("sampling_points", (np.zeros((4, 2)), None, np.ones(5)), r"strength has shape \(5,\)"),
        ("receptive_field", (np.zeros(4),), r"field has shape \(4,\)"),
        ("salient_region", (np.zeros((4, 4)),), "mask is .* float64; wanted .* bool"),
        ("salient_region", (np.zeros(4, bool),), "mask is"),
        ("outlined_box", ([1, 2, 3],), r"box has shape \(3,\); wanted \(4,\): y1, x1, y2, x2"),
    ],
)
def test_what_is_not_in_a_plane_is_refused(axes, function, arguments, said):
    with pytest.raises(ValueError, match=said):
        getattr(plot, function)(axes, *arguments)
    assert not axes.images
    assert not axes.collections
    assert not axes.patches


# ---- sheets


def test_a_sheet_has_three_rows_and_a_column_for_each_node():
    views = [view_of((2, 3)), view_of((1, 1), bias=0.7)]
    axes = plot.new_sheet(2, "Two nodes")
    assert axes.shape == (3, 2)
    found = plot.sheet(axes, views, ["one", "another"])
    assert (found == axes).all()
    assert [place.get_title() for place in axes[0]] == ["one", "another"]
    for column, view in zip(axes.T, views, strict=True):
        samples, field, region = column
        np.testing.assert_array_equal(samples.collections[0].get_offsets(), view.positions[:, ::-1])
        sizes = plot.IN_SHEET * plot.AREA * view.modulation
        np.testing.assert_allclose(samples.collections[0].get_sizes(), sizes)
        np.testing.assert_array_equal(samples.collections[0].get_array(), view.strength)
        opacity = np.sqrt(view.field.field / view.field.field.max())
        np.testing.assert_allclose(field.images[1].get_array()[..., 3], opacity)
        np.testing.assert_array_equal(region.images[1].get_array()[..., 3] == 0, view.region.mask)
        for place in column:
            marks = [line.get_xydata().tolist() for line in place.lines]
            assert marks == 2 * [[view.place[::-1].tolist()]]
        assert f"size {view.field.size():.1f} px" in field.get_title()
        assert f"error {view.region.error:.3f}" in region.get_title()


def test_a_sheet_says_units_at_its_borders():
    axes = plot.sheet(plot.new_sheet(2), [view_of(), view_of()])
    drawn(axes[0, 0])
    assert all("y (pixels)" in place.get_ylabel() for place in axes[:, 0])
    assert all(place.get_xlabel() == "x (pixels)" for place in axes[-1])
    assert not any(place.get_ylabel() for place in axes[:, 1])
    bars = [place for place in axes[0, 0].figure.axes if place not in axes.ravel().tolist()]
    assert ["strength" in bar.get_ylabel() for bar in bars] == [True, False]


def test_a_sheet_shows_all_points_that_count():
    view = view_of((0, 0), bias=-0.9)
    assert view.positions.min() < -2
    axes = plot.sheet(plot.new_sheet(1), [view])
    counted = view.positions[view.modulation != 0]
    for place in axes.ravel():
        assert place.get_xlim()[0] < counted[:, 1].min()
        assert place.get_ylim()[1] < counted[:, 0].min()
        assert place.images[0].get_extent() == [-0.5, 15.5, 11.5, -0.5]


def test_a_sheet_of_regions_shows_their_frames():
    view = view_of()._replace(box=np.array([-3.5, 1.5, 8.5, 9.5]))
    axes = plot.sheet(plot.new_sheet(1), [view])
    for place in axes.ravel():
        assert not place.lines
        assert [frame.get_bbox().extents.tolist() for frame in place.patches] == 2 * [[1.5, -3.5, 9.5, 8.5]]
        assert place.get_ylim()[1] < -3.5
    assert axes[0, 0].get_ylabel().startswith("bins of the region")
    mixed = plot.sheet(plot.new_sheet(2), [view, view_of()])
    assert mixed[0, 0].get_ylabel().startswith("sampling points")


def test_points_at_infinity_do_not_count():
    image = IMAGE.copy()
    views = [view_of(bias=bias, image=image) for bias in (0.0, 0.0)]
    far = views[1]._replace(positions=np.full((9, 2), np.inf), modulation=np.zeros(9))
    limits = [plot.sheet(plot.new_sheet(1), [view])[0, 0].get_xlim() for view in (views[0], far)]
    assert limits[0] == limits[1] == (-0.5, 15.5)


def test_a_sheet_fits_on_its_figure():
    axes = plot.sheet(plot.new_sheet(3, "title"), [view_of()] * 3, ["plain", "DCNv1", "DCNv2"])
    figure = axes[0, 0].figure
    drawn(axes[0, 0])
    assert figure.get_tightbbox().width <= figure.get_figwidth()
    assert figure.get_tightbbox().height <= figure.get_figheight()


@pytest.mark.parametrize(("columns", "count", "titles"), [(2, 1, None), (1, 1, ["a", "b"]), (1, 0, None)])
def test_a_sheet_refuses_what_does_not_fit(columns, count, titles):
    with pytest.raises(ValueError, match=r"axes has shape \(3, "):
        plot.sheet(plot.new_sheet(columns), [view_of()] * count, titles)


def test_one_axes_is_no_sheet(axes):
    with pytest.raises(ValueError, match=r"axes has shape \(\)"):
        plot.sheet(axes, [view_of()])
