"""Where taps read: one layer's positions, and traces through several, against plain loops."""

import itertools
import math

import numpy as np
import pytest

from dcn_np.analysis import SampledLayer, sampling_positions, trace_sampling

# Per rank: extents, kernel, stride, padding, dilation.
WINDOWS = {
    1: ((11,), (3,), 2, ((1, 0),), 2),
    2: ((9, 10), (3, 2), (2, 1), ((1, 0), (0, 2)), (1, 2)),
    3: ((5, 6, 4), (2, 1, 3), 1, 1, (1, 2, 1)),
}


def per_axis(value, ndim):
    return value if isinstance(value, tuple) else (value,) * ndim


def output_of(extents, kernel, stride, padding, dilation):
    ndim = len(extents)
    pads = [p if isinstance(p, tuple) else (p, p) for p in per_axis(padding, ndim)]
    axes = zip(extents, kernel, per_axis(stride, ndim), pads, per_axis(dilation, ndim), strict=True)
    return tuple((e + sum(p) - (k - 1) * d - 1) // s + 1 for e, k, s, p, d in axes)


def made_layer(rng, ndim, *, deformed=True, groups=1, batch=1, size=1.0, extents=None):
    """A layer of random offsets and masks, and the extents of its output."""
    default, kernel, *window = WINDOWS[ndim]
    extents = extents or default
    output = output_of(extents, kernel, *window)
    taps = groups * math.prod(kernel)
    arrays = {}
    if deformed:
        arrays["offset"] = rng.normal(0, size, (batch, taps * ndim, *output))
        arrays["mask"] = rng.random((batch, taps, *output))
    return SampledLayer(extents, kernel, *window, **arrays, offset_groups=groups), output


# ---- one layer


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_each_tap_reads_where_its_offset_says(ndim):
    layer, output = made_layer(np.random.default_rng(ndim), ndim, groups=2, batch=2)
    _, kernel, stride, padding, dilation = WINDOWS[ndim]
    stride, dilation = per_axis(stride, ndim), per_axis(dilation, ndim)
    begins = [p[0] if isinstance(p, tuple) else p for p in per_axis(padding, ndim)]
    found = sampling_positions(layer.offset, *WINDOWS[ndim][1:], offset_groups=2)
    assert found.shape == (2, 2, math.prod(kernel), ndim, *output)
    for image, group, place in itertools.product(range(2), range(2), np.ndindex(*output)):
        for number, tap in enumerate(np.ndindex(*kernel)):
            for axis in range(ndim):
                channel = ((group * math.prod(kernel)) + number) * ndim + axis
                wanted = place[axis] * stride[axis] - begins[axis] + tap[axis] * dilation[axis]
                wanted += layer.offset[(image, channel, *place)]
                assert found[(image, group, number, axis, *place)] == wanted


def test_zero_offsets_give_the_exact_grid():
    found = sampling_positions(np.zeros((1, 18, 4, 5), "float32"), 3, stride=2, padding=1)
    grid = np.indices((4, 5)) * 2 - 1
    taps = np.indices((3, 3)).reshape(2, 9).T
    np.testing.assert_array_equal(found[0, 0], grid + taps[:, :, None, None])
    assert found.dtype == np.float64


def test_positions_are_neither_rounded_nor_held_inside():
    offset = np.zeros((1, 2, 1, 1), "float32")
    offset[0, :, 0, 0] = 1e-3, -1e30
    y, x = sampling_positions(offset, 1)[0, 0, 0, :, 0, 0]
    assert (y, x) == (np.float64(np.float32(1e-3)), np.float64(np.float32(-1e30)))


def test_an_affine_field_of_offsets_gives_the_affine_image_of_the_grid():
    matrix, shift = np.array([[0.9, -0.3], [0.2, 1.1]]), np.array([1.5, -0.25])
    rigid = sampling_positions(np.zeros((1, 18, 6, 7)), 3, padding=1)[0, 0]
    wanted = np.einsum("ab,kbyx->kayx", matrix, rigid) + shift[:, None, None]
    offset = (wanted - rigid).reshape(1, 18, 6, 7)
    np.testing.assert_allclose(sampling_positions(offset, 3, padding=1)[0, 0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((1, 18)), 3), "offset has 2 axes"),
        ((np.zeros((1, 17, 4, 4)), 3), r"offset has 17 channels; a 3x3 kernel .* needs 2\*9\*1 = 18"),
        ((np.zeros((1, 18, 4, 4)), 3, 1, 0, 1, 2), r"needs 2\*9\*2 = 36"),
        ((np.zeros((1, 18, 4, 4)), 0), "kernel_size is 0; wanted at least 1"),
        ((np.zeros((1, 18, 4, 4)), (3, 3, 3)), "kernel_size has 3 entries"),
        ((np.zeros((1, 18, 4, 4)), 3, 0), "stride is 0"),
        ((np.zeros((1, 18, 0, 4)), 3), "the output would be empty on axis 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampling_positions(*arguments)


def test_what_is_no_array_is_refused():
    with pytest.raises(TypeError, match="offset is "):
        sampling_positions([[1.0]], 3)


# ---- several layers


def interpolated(values, place):
    """Interpolate a dictionary of corners by hand: values(index) at a place held inside, any rank."""
    total = 0.0
    for corner in itertools.product((0, 1), repeat=len(place)):
        index, weight = [], 1.0
        for step, q in zip(corner, place, strict=True):
            index.append(math.floor(q) + step)
            weight *= (q - math.floor(q)) if step else 1 - (q - math.floor(q))
        if weight:
            total += weight * values(tuple(index))
    return total


def brute_force(layers, groups, image, place, factor=1.0):
    """Yield (point, modulation) by recursion, one number at a time."""
    if not layers:
        yield place, factor
        return
    *below, layer = layers
    geometry, group = layer.geometry, groups[-1]
    held = [min(max(q, 0), extent - 1) for q, extent in zip(place, geometry.output, strict=True)]
    for number, tap in enumerate(np.ndindex(*geometry.kernel)):
        point, mask = [], 1.0
        for axis in range(geometry.ndim):
            move = 0.0
            if layer.offset is not None:
                channel = ((group * geometry.taps) + number) * geometry.ndim + axis
                move = interpolated(lambda i, c=channel: layer.offset[(image, c, *i)], held)
            begin = geometry.padding[axis][0]
            point.append(
                place[axis] * geometry.stride[axis] - begin + tap[axis] * geometry.dilation[axis] + move
            )
        if layer.mask is not None:
            channel = group * geometry.taps + number
            mask = interpolated(lambda i, c=channel: layer.mask[(image, c, *i)], held)
        inside = math.prod(
            max(0.0, min(1.0, q + 1, extent - q)) for q, extent in zip(point, geometry.input, strict=True)
        )
        yield from brute_force(below, groups[:-1], image, point, factor * mask * inside)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("deformed", [(True, True), (False, True), (True, False)], ids=str)
def test_a_trace_is_the_recursion_over_taps(ndim, deformed):
    rng = np.random.default_rng(ndim)
    first, output = made_layer(rng, ndim, deformed=deformed[0], groups=2, batch=2)
    second, output = made_layer(rng, ndim, deformed=deformed[1], groups=2, batch=2, extents=output)
    nodes = [[0.0] * ndim, [extent - 1.0 for extent in output], [(extent - 1) / 3 for extent in output]]
    groups = [1, 0]
    found = trace_sampling([first, second], nodes, image=1, groups=groups)
    for node, positions, modulation in zip(nodes, *found, strict=True):
        wanted = list(brute_force([first, second], groups, 1, node))
        np.testing.assert_allclose(positions, [point for point, _ in wanted], rtol=0, atol=1e-12)
        np.testing.assert_allclose(modulation, [factor for _, factor in wanted], rtol=0, atol=1e-13)
    assert (found.modulation == 0).any()
    assert (found.modulation > 0).any()


def test_three_deformable_levels_are_traced():
    rng = np.random.default_rng(5)
    levels = [
        SampledLayer((12, 12), 3, padding=1, offset=rng.normal(0, 1, (1, 18, 12, 12)),
                     mask=rng.random((1, 9, 12, 12)))
        for _ in range(3)
    ]  # fmt: skip
    found = trace_sampling(levels, [[5, 6]])
    assert found.positions.shape == (1, 729, 2)
    wanted = list(brute_force(levels, [0, 0, 0], 0, [5, 6]))
    np.testing.assert_allclose(found.positions[0], [point for point, _ in wanted], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.modulation[0], [factor for _, factor in wanted], rtol=0, atol=1e-13)


def test_zero_offsets_give_the_classical_receptive_field():
    # Reach and jump of the textbook: r += (k - 1) * d * j, j *= s, from the image upwards.
    windows = [(3, 2, 1, 1), (3, 1, 2, 2), (5, 1, 2, 1), (1, 1, 0, 1)]
    size, layers, reach, jump = (40, 40), [], 1, 1
    for kernel, stride, padding, dilation in windows:
        output = output_of(size, (kernel, kernel), stride, padding, dilation)
        offset = np.zeros((1, 2 * kernel**2, *output))
        layers.append(SampledLayer(size, kernel, stride, padding, dilation, offset=offset))
        size, reach, jump = output, reach + (kernel - 1) * dilation * jump, jump * stride
    found = trace_sampling(layers, [[10, 9]])
    points = found.positions[0]
    np.testing.assert_array_equal(points, np.round(points))
    np.testing.assert_array_equal(points.max(axis=0) - points.min(axis=0) + 1, [reach, reach])
    np.testing.assert_array_equal((points.max(axis=0) + points.min(axis=0)) / 2, [10 * jump, 9 * jump])
    np.testing.assert_array_equal(found.modulation, 1)


def test_real_valued_positions_are_not_rounded_on_the_way():
    # Both layers shift by less than half a pixel: rounding at either level would lose the shift.
    shift = SampledLayer((9, 9), 1, offset=np.full((1, 2, 9, 9), 0.3))
    found = trace_sampling([shift, shift], [[4, 4]])
    np.testing.assert_allclose(found.positions, [[[4.6, 4.6]]])


def test_an_affine_field_is_followed_between_positions():
    # offset(p) = 0.25 p + 0.1 is linear, so it is exact at real-valued positions too.
    field = 0.25 * np.indices((9, 9)) + 0.1
    layer = SampledLayer((9, 9), 1, offset=field[None])
    found = trace_sampling([layer, layer], [[2.5, 3.0]])
    once = 1.25 * np.array([2.5, 3.0]) + 0.1
    np.testing.assert_allclose(found.positions[0, 0], 1.25 * once + 0.1, rtol=1e-14)


def test_beyond_the_border_nothing_is_left_and_infinities_do_not_spread():
    offset = np.zeros((1, 2, 5, 5))
    offset[0, :, 2, 2], offset[0, :, 1, 1], offset[0, :, 0, 0] = (-np.inf, 0), (0, -1.75), (np.nan, 0)
    upper = SampledLayer((5, 5), 1, offset=offset)
    lower = SampledLayer((5, 5), 1, offset=np.zeros((1, 2, 5, 5)))
    found = trace_sampling([lower, upper], [[2, 2], [1, 1], [0, 0], [2, 3], [3, 2.5]])
    np.testing.assert_array_equal(found.positions[0], [[-np.inf, 2]])
    # At x = -0.75 interpolation with zeros outside leaves a quarter, in the map between and in the image.
    np.testing.assert_array_equal(found.modulation[:, 0], [0, 1 / 16, np.nan, 1, 1])
    assert np.isnan(found.positions[2, 0, 0])


def test_a_chain_that_does_not_fit_is_refused():
    layer, output = made_layer(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match=r"layers\[1\].input_size is \(9, 10\); the output of layers\[0\]"):
        trace_sampling([layer, layer], [[0, 0]])
    for nodes, message in (
        ([[0, output[1]]], r"nodes\[0\] is \[0.0, 10.0\], outside"),
        ([[0, 0], [-0.1, 0]], r"nodes\[1\] is \[-0.1, 0.0\], outside"),
        ([[np.nan, 0]], r"nodes\[0\] is \[nan, 0.0\], outside"),
        ([0, 0], r"nodes has shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            trace_sampling([layer], nodes)
    for given, message in (
        ({"image": 1}, "image is 1; the layers have a batch of 1"),
        ({"groups": [1]}, r"groups\[0\] is 1; the layer has 1 offset group"),
        ({"groups": [0, 0]}, "groups has 2 entries; wanted one per layer, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            trace_sampling([layer], [[0, 0]], **given)
    with pytest.raises(ValueError, match="layers is empty"):
        trace_sampling([], [[0, 0]])
    with pytest.raises(TypeError, match=r"layers\[0\] is a str"):
        trace_sampling(["conv"], [[0, 0]])


def test_a_trace_too_large_is_refused_before_it_is_computed():
    layer = SampledLayer((9, 9), 3, padding=1)
    with pytest.raises(ValueError, match=r"1 nodes reach 3486784401 points; wanted at most 16777216"):
        trace_sampling([layer] * 10, [[4, 4]])


def test_offsets_of_another_layer_are_refused():
    with pytest.raises(ValueError, match="offset is 5x5 in space; the output is 3x3"):
        SampledLayer((5, 5), 3, offset=np.zeros((1, 18, 5, 5)))
    with pytest.raises(ValueError, match="input_size is 5; wanted one extent per spatial axis"):
        SampledLayer(5, 3)
