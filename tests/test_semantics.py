"""What exactly is computed? One test per rule of the semantics, of the reference and of every kernel.

Most tests probe: a kernel of one tap over an image, one sampling point per batch entry, nothing else.
"""

import itertools

import numpy as np
import pytest
from problems import (
    DTYPES,
    IMPLEMENTATIONS,
    LAYOUTS,
    RANKS,
    VECTOR_CHANNELS,
    Problem,
    Sizes,
    assert_backward,
    assert_close,
    assert_forward,
    fill,
    implementation,
    random_problem,
    sampling_base,
)

import dcn_np

EXTENT = (4, 3, 5)


@pytest.fixture(params=IMPLEMENTATIONS)
def module(request):
    with implementation(request.param) as module:
        yield module


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def probe(image, coordinates, dtype, mask=None):
    """A problem whose y[n, 0] is the image (channels, *extent), summed over channels, at coordinates[n].

    The stride is the extent: there is one output position, at base 0, so an offset is a coordinate.
    """
    image = np.asarray(image, dtype)
    coordinates = np.asarray(coordinates, dtype)
    count, rank = len(coordinates), image.ndim - 1
    one = (1,) * rank
    return Problem(
        x=np.repeat(image[None], count, axis=0),
        offset=coordinates.reshape(count, rank, *one),
        mask=np.broadcast_to(np.asarray(1 if mask is None else mask, dtype), count)
        .reshape(count, 1, *one)
        .copy(),
        weight=np.ones((1, image.shape[0], *one), dtype),
        bias=None,
        grad_output=np.ones((count, 1, *one), dtype),
        stride=image.shape[1:],
    )


def sampled(module, image, coordinates, dtype, mask=None):
    return probe(image, coordinates, dtype, mask).forward(module).reshape(-1)


def slopes(module, image, coordinates, dtype, mask=None):
    """d sample / d coordinate: (coordinates, axes)."""
    problem = probe(image, coordinates, dtype, mask)
    return problem.backward(module, needs=("offset",)).offset.reshape(len(coordinates), -1)


# --- rule 1: linear interpolation with zeros outside; support is the open box (-1, extent) ---


def test_samples_of_a_line(module, dtype):
    want = {-2: 0, -1: 0, -0.75: 2.5, -0.5: 5, 0: 10, 0.25: 12.5, 1: 20, 1.5: 30, 2: 40, 2.5: 20, 3: 0, 9: 0}
    assert sampled(module, [[10, 20, 40]], [[at] for at in want], dtype).tolist() == list(want.values())


@pytest.mark.parametrize("rank", RANKS)
def test_samples_are_products_over_the_axes(module, dtype, rank):
    """An image of ones: the sample is the product of what each axis keeps, in and around it."""
    extent = EXTENT[:rank]
    axes = [[-1.25, -1, -0.75, -0.25, 0, 0.5, e - 1, e - 0.75, e - 0.25, e, e + 0.5] for e in extent]
    points = np.array(list(itertools.product(*axes)))
    kept = np.clip(np.minimum(points + 1, np.array(extent) - points), 0, 1)
    assert np.array_equal(sampled(module, np.ones((1, *extent)), points, dtype), kept.prod(axis=1))


def test_offsets_are_pairs_of_y_and_x_taps_row_major(module, dtype):
    """Channel (group * taps + tap) * ndim + axis moves one tap of one group along one axis."""
    x = np.arange(24, dtype=dtype).reshape(1, 2, 3, 4)
    weight = np.array([1, 10, 100, 1000], dtype).reshape(1, 1, 2, 2).repeat(2, axis=1)
    weight[:, 1] *= 1e-4 if dtype == np.float64 else 0
    rest = np.zeros((1, 2 * 4 * 2, 2, 3), dtype)
    still = module.deform_conv(x, rest, weight, offset_groups=2)
    for group, tap, axis in itertools.product(range(2), range(4), range(2)):
        moved = rest.copy()
        moved[0, (group * 4 + tap) * 2 + axis, 0, 0] = 1
        change = module.deform_conv(x, moved, weight, offset_groups=2) - still
        by = (4, 1)[axis] * float(weight[0, group].flat[tap])
        np.testing.assert_allclose(change[0, 0], [[by, 0, 0], [0, 0, 0]], rtol=1e-9, atol=1e-9)


def test_masks_scale_one_tap_of_one_group(module, dtype):
    x, weight = np.ones((1, 2, 2, 3), dtype), np.ones((1, 2, 1, 2), dtype)
    for group, tap, value in itertools.product(range(2), range(2), (-3.0, 0.0, 2.0)):
        mask = np.ones((1, 4, 2, 2), dtype)
        mask[0, group * 2 + tap, 1, 0] = value
        y = module.modulated_deform_conv(x, None, mask, weight, offset_groups=2)
        assert y[0, 0].tolist() == [[4, 4], [3 + value, 4]]


def test_only_begin_padding_moves_the_sampling_points(module, dtype):
    x, weight = np.array([[[1, 2, 3]]], dtype), np.ones((1, 1, 1), dtype)
    rigid = {pair: module.deform_conv(x, None, weight, padding=(pair,)) for pair in ((0, 0), (2, 0), (0, 2))}
    assert {pair: y[0, 0].tolist() for pair, y in rigid.items()} == {
        (0, 0): [1, 2, 3],
        (2, 0): [0, 0, 1, 2, 3],
        (0, 2): [1, 2, 3, 0, 0],
    }


# --- rule 2: coordinates are split, so nothing depends on where in the image a sample lies ---


@pytest.mark.parametrize("width", [64, 8192, 65536])
def test_error_does_not_grow_with_the_image(module, dtype, width):
    given = {"with_mask": False, "with_bias": False}
    sizes = Sizes(1, 1, 1, 1, 1, (2, width), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), **given)
    problem = fill(sizes, np.random.default_rng(width), dtype, special=False)
    # Half a unit each for 1 - fraction on two axes, for products and for sums.
    assert_close(problem.forward(module), problem.expected_forward(), dtype, problem.scales()["y"], units=5)
    gradient = problem.backward(module, needs=("offset",)).offset
    assert_close(gradient, problem.expected_backward().offset, dtype, problem.scales()["offset"], units=8)


def test_the_same_fraction_samples_the_same_anywhere(module, dtype):
    """A pattern of period 4: an offset of 0.3 gives bitwise the same at column 1 and at column 65533."""
    x = np.tile(np.random.default_rng(0).normal(size=4).astype(dtype), 2**14).reshape(1, 1, -1)
    y = module.deform_conv(x, np.full_like(x, 0.3), np.ones((1, 1, 1), dtype))[0, 0]
    assert np.array_equal(y[:-4].reshape(-1, 4), np.tile(y[:4], (2**14 - 1, 1)))


def test_a_fraction_that_rounds_to_one_is_carried(module, dtype):
    """Just below an integer position the fraction 1 - 1e-30 is 1: that is the integer position itself."""
    image = [[np.inf, 20, 50]]
    coordinates = np.array([[-np.finfo(dtype).smallest_subnormal], [-1e-30]])
    assert sampled(module, [[20, 50, np.inf]], coordinates, dtype).tolist() == [20, 20]
    assert slopes(module, [[20, 50, np.inf]], coordinates, dtype)[:, 0].tolist() == [30, 30]
    # The same one pixel further, through the padding: the Inf to the left has no weight.
    x, offset = np.array([image], dtype), np.zeros((1, 1, 3), dtype)
    offset[0, 0, 1] = -1e-30
    y = module.deform_conv(x, offset, np.ones((1, 1, 1), dtype))
    assert y[0, 0].tolist() == [np.inf, 20, 50]


def test_just_below_an_integer_both_neighbours_count(module, dtype):
    below = np.nextafter(np.array(1, dtype), np.array(0, dtype))
    assert sampled(module, [[2**20, 0, 0]], [[below]], dtype)[0] == 2**20 * (1 - below)


@pytest.mark.parametrize("rank", RANKS)
def test_a_grid_of_steps_past_32_bits(module, dtype, rank):
    """The first position of each axis lies 2^30 pixels before the image, the second on its first pixel."""
    far = (2**30,) * rank
    sizes = Sizes(
        batch=2,
        in_channels=5,
        out_channels=3,
        groups=1,
        offset_groups=1,
        extent=(5, 6, 4)[:rank],
        kernel=(2,) * rank,
        stride=far,
        padding=tuple((step, 0) for step in far),
        dilation=(1,) * rank,
    )
    problem = fill(sizes, np.random.default_rng(5), dtype)
    assert problem.grad_output.shape[2:] == (2,) * rank
    assert_forward(problem, module)
    assert_backward(problem, module)


def test_a_plane_of_more_than_2_to_the_31_pixels(isa):
    """Its pages are never touched but where it is sampled: 4 corners of the plane, half a pixel inside."""
    extent = 2**31 // 46000 + 100  # 46000 x extent > 2^31
    try:
        x = np.zeros((1, 1, 46000, extent), np.float32)
    except MemoryError:
        pytest.skip("the system does not promise 8 GiB")
    assert x.size > 2**31
    ys, xs = np.array([0, 45998]), np.array([0, extent - 2])
    for (i, y), (j, column) in itertools.product(enumerate(ys), enumerate(xs)):
        x[0, 0, y : y + 2, column : column + 2] = 1 + 2 * i + j
    offset = np.full((1, 2, 2, 2), 0.5, np.float32)
    weight = np.ones((1, 1, 1, 1), np.float32)
    stride = (45998, extent - 2)
    y = dcn_np.deform_conv(x, offset, weight, stride=stride)
    assert np.array_equal(y[0, 0], [[1, 2], [3, 4]])
    gradients = dcn_np.deform_conv_backward(y, x, offset, weight, stride=stride, needs=("offset", "weight"))
    assert not gradients.offset.any()
    assert gradients.weight.item() == 1 + 4 + 9 + 16


# --- rule 3: infinite and huge coordinates are outside, a NaN coordinate makes the sample NaN ---

OUTSIDE = (
    np.inf,
    -np.inf,
    2.0**31 - 129,
    2.0**31,
    -(2.0**31),
    -(2.0**31) - 1,
    2.0**32,
    -(2.0**32),
    2.0**53,
    2.0**63,
    -(2.0**63),
    2.0**64,
    1e30,
    -1e30,
    3e38,
    -3e38,
)


@pytest.mark.parametrize("rank", RANKS)
def test_infinite_and_huge_coordinates_are_outside(module, dtype, rank):
    """On any axis. Value 0 and gradients exactly 0, whatever the pixels and the mask are."""
    points = [np.where(np.arange(rank) == far, value, 0.5) for value in OUTSIDE for far in range(rank)]
    for pixel, mask in itertools.product((1.0, np.nan, np.inf), (1.0, np.nan, np.inf)):
        problem = probe(np.full((3, *EXTENT[:rank]), pixel), points, dtype, mask)
        gradients = problem.backward(module)
        for result in (problem.forward(module), *gradients[:4]):
            assert not np.any(result)  # a NaN is true


def test_huge_float64_coordinates_do_not_wrap(module):
    """Near multiples of 2^32, where a cast to fewer bits would find the pixels."""
    near = np.array([-1, 0, 0.5, 1, 1.5])
    points = np.concatenate([sign * 2.0**power + near for sign in (1, -1) for power in (31, 32, 33, 40)])
    assert not np.any(sampled(module, np.full((1, 4), 7.0), points[:, None], np.float64))


def test_far_bases_and_offsets_cancel(module, dtype):
    """An offset of many thousand pixels back to the first one, exact in both dtypes."""
    x = np.zeros((1, 1, 40000), dtype)
    x[0, 0, :2] = 10, 30
    offset = (0.25 - np.arange(40000.0)).astype(dtype).reshape(x.shape)
    y = module.deform_conv(x, offset, np.ones((1, 1, 1), dtype))
    assert np.all(y == 15)


@pytest.mark.parametrize("rank", RANKS)
def test_a_nan_coordinate_makes_the_sample_nan(module, dtype, rank):
    """On any axis, whatever the others are: y, grad_weight, grad_mask, all of grad_offset; not grad_x."""
    others = (0.0, 0.5, -1.0, 100.0, np.inf, 1e30, np.nan)
    points = [np.where(np.arange(rank) == bad, np.nan, other) for other in others for bad in range(rank)]
    for mask in (1.0, 0.0):
        problem = probe(np.ones((2, *EXTENT[:rank])), points, dtype, mask)
        gradients = problem.backward(module)
        for result in (problem.forward(module), gradients.offset, gradients.mask, gradients.weight):
            assert np.all(np.isnan(result))
        assert not np.any(gradients.x)
        assert np.all(gradients.bias == len(points))


GROUPED = Sizes(2, 6, 4, 2, 3, (5, 4), (3, 2), (1, 2), ((1, 1), (0, 1)), (1, 1), with_bias=True)


def channels_of(offset_group):
    """Channels of GROUPED that sample with the coordinates of an offset group."""
    per_group = GROUPED.in_channels // GROUPED.offset_groups
    return range(offset_group * per_group, (offset_group + 1) * per_group)


def grouped_outputs(channel):
    """Outputs of GROUPED that a channel contributes to, and the channel's row in their weights."""
    inputs, outputs = GROUPED.in_channels // GROUPED.groups, GROUPED.out_channels // GROUPED.groups
    group = channel // inputs
    return slice(group * outputs, (group + 1) * outputs), channel % inputs


def test_the_exact_reach_of_a_nan_coordinate(module, dtype):
    """The outputs at its position in the weight groups of its channels, and that sample's own gradients."""
    clean = fill(GROUPED, np.random.default_rng(3), dtype, special=False)
    for group, tap, axis in itertools.product(range(3), range(6), range(2)):
        offset = clean.offset.copy()
        row = group * 6 + tap
        offset[1, row * 2 + axis, 2, 1] = np.nan
        y, mask, coordinates, weight = (
            np.zeros(a.shape, bool) for a in (clean.grad_output, clean.mask, clean.offset, clean.weight)
        )
        mask[1, row, 2, 1] = coordinates[1, row * 2 : row * 2 + 2, 2, 1] = True
        for channel in channels_of(group):
            outputs, inputs = grouped_outputs(channel)
            y[1, outputs, 2, 1] = True
            weight[outputs, inputs].reshape(weight[outputs].shape[0], -1)[:, tap] = True
        broken = clean.replace(offset=offset)
        gradients = broken.backward(module, deterministic=True)
        assert np.array_equal(np.isnan(broken.forward(module)), y)
        assert np.array_equal(np.isnan(gradients.mask), mask)
        assert np.array_equal(np.isnan(gradients.offset), coordinates)
        assert np.array_equal(np.isnan(gradients.weight), weight)
        offset[np.isnan(offset)] = np.inf
        expected = clean.replace(offset=offset).backward(module, needs=("x",), deterministic=True).x
        assert np.array_equal(gradients.x, expected)


# --- rule 4: a pixel reaches an output only through a corner with a non-zero weight ---


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_neighbours_of_an_integer_position_do_not_leak(module, dtype, rank, bad):
    """All pixels but one are NaN or Inf: on that one, y, grad_weight and grad_mask are finite."""
    extent = EXTENT[:rank]
    for place in np.ndindex(extent):
        image = np.full((3, *extent), bad)
        image[:, *place] = 2
        problem = probe(image, [place], dtype, mask=3)
        gradients = problem.backward(module)
        assert problem.forward(module).item() == 18
        assert gradients.weight.reshape(-1).tolist() == [6, 6, 6]
        assert gradients.mask.item() == 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_border_does_not_leak(module, dtype, bad):
    """At -1 and at the extent a border pixel has no weight; beyond it nothing is read."""
    image = [[bad, 1, 2, bad]]
    points = [[-1], [4], [-1.5], [4.5], [1], [2], [1.5]]
    assert sampled(module, image, points, dtype).tolist() == [0, 0, 0, 0, 1, 2, 1.5]


def test_offset_gradients_see_the_corners_across_the_axis(module, dtype):
    """On the lattice, d / d axis reads this pixel and the next one on that axis, and no diagonal one."""
    image = np.array([[[1.0, 5, 0], [3, np.nan, 0], [0, 0, 0]]])
    assert slopes(module, image, [[0, 0]], dtype).tolist() == [[2, 4]]
    image[0, 1, 1], image[0, 1, 0] = 7, np.inf
    assert slopes(module, image, [[0, 0]], dtype).tolist() == [[np.inf, 4]]
    # Between two columns the derivative along y has corners in both; along x only row 1 has a weight.
    assert slopes(module, image, [[1, 0.5]], dtype).tolist() == [[-np.inf, -np.inf]]
    image[0, 2] = np.nan
    assert np.isnan(slopes(module, image, [[1, 0.5]], dtype)).tolist() == [[True, False]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_exact_reach_of_a_bad_pixel(module, dtype, bad):
    """What is not finite: exactly what weighs the pixel, and the slopes that its value enters."""
    clean = fill(GROUPED, np.random.default_rng(5), dtype, special=False)
    clean = clean.replace(offset=np.round(clean.offset * 2) / 2)  # half of all coordinates on the lattice
    coordinates = sampling_base(GROUPED) + clean.offset.reshape(2, 3, 6, 2, *GROUPED.output)
    for channel, place in itertools.product((0, 3), np.ndindex(5, 4)):
        x = clean.x.copy()
        x[1, channel, *place] = bad
        group = channel // 2
        y, mask, offset, weight = (
            np.zeros(a.shape, bool) for a in (clean.grad_output, clean.mask, clean.offset, clean.weight)
        )
        outputs, inputs = grouped_outputs(channel)
        for tap in range(6):
            weighed, slope = reach(coordinates[1, group, tap], place)
            y[1, outputs] |= weighed
            weight[outputs, inputs].reshape(2, -1)[:, tap] = weighed.any()
            mask[1, group * 6 + tap] = weighed
            offset[1, (group * 6 + tap) * 2 : (group * 6 + tap) * 2 + 2] = slope
        broken = clean.replace(x=x)
        gradients = broken.backward(module, deterministic=True)
        assert np.array_equal(~np.isfinite(broken.forward(module)), y)
        assert np.array_equal(~np.isfinite(gradients.weight), weight)
        assert np.array_equal(~np.isfinite(gradients.mask), mask)
        assert np.array_equal(~np.isfinite(gradients.offset), offset)
        assert np.array_equal(gradients.x, clean.backward(module, needs=("x",), deterministic=True).x)


def reach(coordinate, place):
    """Where a pixel weighs in samples (2, ...), and where in their derivative along each axis.

    By distance: a corner weighs on an axis if it is less than 1 away; the derivative is that of [cell, cell
    + 1).
    """
    away = np.stack([at - pixel for at, pixel in zip(coordinate, place, strict=True)])
    weighs, is_corner = np.abs(away) < 1, (away >= -1) & (away < 1)
    return weighs.all(axis=0), np.stack([is_corner[0] & weighs[1], weighs[0] & is_corner[1]])


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_grad_output_reaches_the_weighed_pixels_only(module, dtype, rank, bad):
    """On the lattice that is one pixel; its neighbours' gradient stays exactly 0."""
    extent = EXTENT[:rank]
    for place in np.ndindex(extent):
        problem = probe(np.ones((3, *extent)), [place], dtype, mask=2)
        problem = problem.replace(grad_output=np.full_like(problem.grad_output, bad))
        gradient = problem.backward(module, needs=("x",)).x[0]
        assert not np.any(np.isfinite(gradient[:, *place]))
        gradient[:, *place] = 0
        assert not np.any(gradient)


@pytest.mark.parametrize("mask", [np.nan, np.inf, -np.inf, 0.0, 5.0])
def test_outside_is_zero_whatever_the_mask(module, dtype, mask):
    """At -1 and at the extent too, where the sample is 0 by its weights."""
    assert not np.any(sampled(module, np.ones((1, 4)), [[-1], [4], [-3], [1e9], [np.inf]], dtype, mask))
    assert not np.any(sampled(module, np.ones((1, 4, 3)), [[-1, 1], [1, 3], [-1, -1], [0, 50]], dtype, mask))


def test_inside_mask_zero_times_nan_is_nan(module, dtype):
    """The mask is a factor like any other: it hides finite pixels only."""
    image = [[np.nan, np.inf, 3, 4]]
    y = sampled(module, image, [[0], [1], [0.5], [2], [2.5]], dtype, mask=0)
    assert np.isnan(y).tolist() == [True, True, True, False, False]
    assert not np.any(y[3:])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_lanes_past_the_last_channel_stay_empty(module, dtype, layout):
    """Pixels around the sampled one are NaN: no channel count lets a vector read into them."""
    for channels in VECTOR_CHANNELS:
        image = np.full((channels, 3, 3), np.nan)
        image[:, 1, 1] = 1
        problem = probe(image, [[1, 1]], dtype, mask=1).map_arrays(LAYOUTS[layout])
        gradients = problem.backward(module)
        assert problem.forward(module).item() == channels
        assert gradients.mask.item() == channels
        assert np.all(gradients.weight == 1)
        assert gradients.x[0, :, 1, 1].tolist() == [1] * channels
        assert np.sum(gradients.x) == channels


# --- rule 5: at a kink the gradient is the right derivative, at -1 too ---


def test_slopes_of_a_line(module, dtype):
    want = {-3: 0, -1.25: 0, -1: 10, -0.5: 10, 0: 10, 0.5: 10, 1: 20, 1.5: 20, 2: -40, 2.5: -40, 3: 0, 3.5: 0}
    assert slopes(module, [[10, 20, 40]], [[at] for at in want], dtype)[:, 0].tolist() == list(want.values())


@pytest.mark.parametrize("rank", RANKS)
def test_gradients_on_the_lattice_are_right_derivatives(module, rank):
    """Forward differences, exact within the cell, on every lattice point from -2 to the extent + 1."""
    extent, step = EXTENT[:rank], 2.0**-8
    image = np.random.default_rng(rank).normal(size=(2, *extent))
    points = np.array(list(itertools.product(*(range(-2, e + 2) for e in extent))), float)
    got = slopes(module, image, points, np.float64)
    here = sampled(module, image, points, np.float64)
    for axis in range(rank):
        ahead = sampled(module, image, points + step * np.eye(rank)[axis], np.float64)
        np.testing.assert_allclose(got[:, axis], (ahead - here) / step, rtol=0, atol=1e-10)


def test_zero_offsets_with_padding_have_gradients_at_the_border(module, dtype):
    """Where training starts: the border taps sit at exactly -1, with value 0 and a slope."""
    x, weight = np.ones((1, 1, 3, 3), dtype), np.ones((1, 1, 3, 3), dtype)
    offset = np.zeros((1, 18, 3, 3), dtype)
    y = module.deform_conv(x, offset, weight, padding=1)
    grad = module.deform_conv_backward(np.ones_like(y), x, offset, weight, padding=1).offset
    along_y, along_x = grad[0, 0::2], grad[0, 1::2]
    assert y[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]
    # Tap (0, 0) at output (0, 0) is at (-1, -1): each axis has no weight there, so the other's slope is 0.
    # Tap (0, 1) sits at (-1, position), above the image: the slope along y is the pixel below it.
    assert along_y[1].tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert along_y[0].tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert along_x[3].tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]
    # Tap (2, 1) leaves at the bottom: outside at row 3, and on the last row the slope goes down to the zeros.
    assert along_y[7].tolist() == [[0, 0, 0], [-1, -1, -1], [0, 0, 0]]


# --- rule 8: sums in pieces, so the error does not grow with the number of terms ---

KERNELS = [name for name in IMPLEMENTATIONS if name != "reference"]  # NumPy's products sum as they like

LONG_SUMS = {
    "channels and taps": Sizes(1, 512, 8, 1, 1, (7, 7), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "output channels": Sizes(1, 8, 512, 1, 1, (6, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "positions": Sizes(2, 4, 4, 1, 1, (90, 80), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "positions, depthwise": Sizes(2, 3, 3, 3, 1, (90, 80), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
}


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("case", LONG_SUMS)
def test_long_sums_of_positive_terms_stay_accurate(isa, dtype, case):
    problem = fill(LONG_SUMS[case], np.random.default_rng(8), dtype, special=False).map_arrays(np.abs)
    small_offsets = (problem.offset % 2).astype(dtype)
    problem = problem.replace(offset=small_offsets)
    with implementation(isa) as module:
        scale = problem.scales()["y"]
        assert_close(problem.forward(module), problem.expected_forward(), dtype, scale, units=8, what="y")
        assert_backward(problem, module)


# --- empty arrays ---


@pytest.mark.parametrize("rank", RANKS)
def test_an_empty_batch_gives_empty_results(module, dtype, rank):
    problem = random_problem(rank, rank, dtype, batch=0, with_offset=True, with_mask=True)
    assert problem.forward(module).shape == problem.grad_output.shape
    gradients = problem.backward(module)
    assert gradients.x.shape == problem.x.shape
    assert gradients.offset.shape == problem.offset.shape
    assert gradients.mask.shape == problem.mask.shape
    assert not np.any(gradients.weight)
    assert gradients.weight.shape == problem.weight.shape
    assert not np.any(gradients.bias)


def test_no_channels_give_the_bias(module, dtype):
    bias = np.array([1, -2, 3], dtype)
    offset = np.full((2, 18, 4, 3), 0.5, dtype)
    problem = Problem(
        x=np.zeros((2, 0, 4, 3), dtype),
        offset=offset,
        mask=offset[:, 9:],
        weight=np.zeros((3, 0, 3, 3), dtype),
        bias=bias,
        grad_output=np.ones((2, 3, 4, 3), dtype),
        padding=1,
    )
    assert np.array_equal(problem.forward(module), np.broadcast_to(bias[:, None, None], (2, 3, 4, 3)))
    assert not np.any(problem.replace(bias=None).forward(module))
    gradients = problem.backward(module)
    assert not np.any(gradients.offset)
    assert not np.any(gradients.mask)
    offset[0, 0, 0, 0] = np.nan  # not a place, though nothing is sampled there
    assert np.sum(np.isnan(problem.backward(module, needs=("offset",)).offset)) == 2
    assert gradients.x.shape == (2, 0, 4, 3)
    assert gradients.weight.shape == (3, 0, 3, 3)
    assert gradients.bias.tolist() == [24, 24, 24]


@pytest.mark.parametrize("extent", [(0, 3), (3, 0), (0, 0)])
def test_an_image_without_pixels_is_all_outside(module, dtype, extent):
    sizes = Sizes(2, 3, 3, 1, 1, extent, (2, 2), (1, 1), ((1, 1), (1, 1)), (1, 1))
    problem = fill(sizes, np.random.default_rng(0), dtype)
    assert np.all(problem.forward(module) == problem.bias[:, None, None])
    gradients = problem.backward(module)
    assert gradients.x.shape == problem.x.shape
    assert not np.any(gradients.offset)
    assert not np.any(gradients.mask)
    assert not np.any(gradients.weight)


# --- what may be left out ---


@pytest.mark.parametrize("rank", RANKS)
def test_left_out_means_zero_offsets_and_masks_of_one(module, dtype, rank):
    for seed in range(4):
        problem = random_problem(seed, rank, dtype, with_offset=False, with_mask=False, with_bias=False)
        full = fill_in(problem)
        want, scale = full.expected_forward(), full.scales()["y"]
        for given in (problem, problem.replace(offset=full.offset), problem.replace(mask=full.mask)):
            for modulated in (True, False) if given.mask is None else (True,):
                assert_close(given.forward(module, modulated=modulated), want, dtype, scale, what=repr(given))
            assert_backward(given, module)
        assert_forward(full, module)


def fill_in(problem):
    """The same problem with its offset, mask and bias written out."""
    batch, out_channels, *output = problem.grad_output.shape
    rows = problem.offset_groups * int(np.prod(problem.weight.shape[2:]))
    return problem.replace(
        offset=np.zeros((batch, rows * problem.rank, *output), problem.dtype),
        mask=np.ones((batch, rows, *output), problem.dtype),
        bias=np.zeros(out_channels, problem.dtype),
    )
