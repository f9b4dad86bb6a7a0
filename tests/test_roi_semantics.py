"""What pooling over regions does with zero offsets, kinks, NaN, infinities, huge regions and halves."""

import time

import ml_dtypes
import numpy as np
import pytest
from problems import HALVES, IMPLEMENTATIONS, implementation
from roi_problems import OPERATORS, assert_right, random_roi_problem
from test_fuzz import same_bits
from test_halves import assert_rounded

import dcn_np
from dcn_np import reference

DEFORMABLE = ("deform_roi_pool", "modulated_deform_roi_pool")


@pytest.fixture(params=IMPLEMENTATIONS)
def module(request):
    with implementation(request.param) as module:
        yield module


def gradients_of(problem, module):
    return [gradient for gradient in problem.backward(module) if gradient is not None]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zero_offsets_are_roi_align_bit_for_bit(isa, dtype):
    for seed in range(40):
        problem = random_roi_problem([seed, 2], "deform_roi_pool", dtype, channels=seed + 1)
        rigid = problem.replace(offset=np.zeros((len(problem.rois), 2, *problem.sizes["output_size"]), dtype))
        sizes = {name: value for name, value in problem.sizes.items() if name != "gamma"}
        align = problem.replace(operator="roi_align", offset=None, sizes=sizes)
        for other in (rigid, problem.replace(offset=None)):
            assert same_bits(other.forward(dcn_np), align.forward(dcn_np))
            assert same_bits(other.backward(dcn_np).x, align.backward(dcn_np).x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_mask_of_ones_is_the_unmodulated_form_bit_for_bit(isa, dtype):
    for seed in range(40):
        problem = random_roi_problem([seed, 3], "deform_roi_pool", dtype, channels=seed + 1)
        ones = np.ones((len(problem.rois), 1, *problem.sizes["output_size"]), dtype)
        modulated = problem.replace(operator="modulated_deform_roi_pool", mask=ones)
        assert same_bits(modulated.forward(dcn_np), problem.forward(dcn_np))
        for name in problem.differentiable:
            one, other = (getattr(p.backward(dcn_np), name) for p in (modulated, problem))
            assert same_bits(one, other)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_order_of_regions_changes_no_bit(isa, operator):
    generator = np.random.default_rng(31)
    for seed in range(20):
        problem = random_roi_problem([seed, 31], operator, np.float32, channels=3)
        height = problem.rois[:, 2] + problem.rois[:, 4]
        assert len(np.unique(height)) == len(height)
        order = generator.permutation(len(height))
        moved = {name: getattr(problem, name) for name in ("rois", "offset", "mask", "grad_output")}
        moved = {name: array if array is None else array[order] for name, array in moved.items()}
        shuffled = problem.replace(**moved)
        assert same_bits(shuffled.forward(dcn_np), problem.forward(dcn_np)[order])
        one, other = problem.backward(dcn_np), shuffled.backward(dcn_np)
        assert same_bits(other.x, one.x)
        for name in ("offset", "mask"):
            if getattr(one, name) is not None:
                assert same_bits(getattr(other, name), getattr(one, name)[order])


def one_bin(roi=(1, 1, 3, 3), *, offset=(0, 0), mask=None, x=None, grad=1.0):
    """x, rois, offset, mask and grad_output of one region with one bin."""
    x = np.arange(1.0, 26).reshape(1, 1, 5, 5) if x is None else x
    rois = np.array([[0.0, *roi]])
    mask = None if mask is None else np.full((1, 1, 1, 1), float(mask))
    return x, rois, np.reshape(np.array(offset, float), (1, 2, 1, 1)), mask, np.full((1, 1, 1, 1), grad)


def both(module, x, rois, offset, mask, grad_output, **sizes):
    arguments = x, rois, offset, mask, 1
    y = module.modulated_deform_roi_pool(*arguments, **sizes)
    return y.ravel(), module.modulated_deform_roi_pool_backward(grad_output, *arguments, **sizes)


@pytest.mark.parametrize("offset", [(np.nan, 0), (0, np.nan), (np.nan, np.inf), (np.nan, 1e300)])
def test_a_nan_offset_makes_its_bin_nan_and_nothing_else(module, offset):
    y, gradients = both(module, *one_bin(offset=offset, mask=0.5), sampling_ratio=2)
    assert np.isnan(y).all()
    assert np.isnan(gradients.offset).all()
    assert np.isnan(gradients.mask).all()
    assert not gradients.x.any()


@pytest.mark.parametrize("roi", [(1, 1, 3, 3), (1, 1, 1, 1)], ids=["region", "region of no size"])
@pytest.mark.parametrize("offset", [(np.inf, 0), (0, -np.inf), (np.inf, np.inf), (1e300, 0)])
def test_an_infinite_offset_is_outside(module, roi, offset):
    if roi == (1, 1, 1, 1) and not np.isinf(offset).any():
        return  # 1e300 times nothing stays in place
    y, gradients = both(module, *one_bin(roi, offset=offset, mask=np.inf), sampling_ratio=2)
    assert y == 0
    assert not any(np.any(gradient) for gradient in gradients)


def test_a_region_without_samples_is_zero_even_with_nan(module):
    y, gradients = both(module, *one_bin((3, 3, 3, 3), offset=(np.nan, 0), mask=np.nan))
    assert y == 0
    assert not any(np.any(gradient) for gradient in gradients)


def test_a_pixel_beside_a_whole_coordinate_does_not_leak(module):
    """The sample lies at pixel (1, 1) exactly: the pixels around it have weight 0 and may hold anything."""
    x = np.full((1, 1, 5, 5), np.nan)
    x[0, 0, 1, 1] = 7
    y, gradients = both(module, *one_bin((1, 1, 2, 2), x=x), sampling_ratio=1)
    assert y == 7
    assert gradients.x[0, 0, 1, 1] == 1
    assert np.count_nonzero(gradients.x) == 1
    assert np.isnan(gradients.offset).all()  # the derivative to the right sees them


@pytest.mark.parametrize("axis", [0, 1], ids=["below", "right"])
def test_each_derivative_sees_the_pixels_of_its_axis(module, axis):
    """The sample lies at pixel (1, 1) exactly, and the next one along an axis is infinite."""
    x = np.zeros((1, 1, 5, 5))
    x[0, 0, 1, 1], x[0, 0, 2, 2] = 7, np.nan
    x[0, 0, 1 + (axis == 0), 1 + (axis == 1)] = np.inf
    y, gradients = both(module, *one_bin((1, 1, 2, 2), x=x, mask=1), sampling_ratio=1, gamma=1)
    assert y == gradients.mask == 7
    by_x, by_y = gradients.offset.ravel()
    assert (by_y, by_x) == ((np.inf, -7) if axis == 0 else (-7, np.inf))


def test_clamped_samples_do_not_see_the_next_pixel(module):
    """In the band above the map: along y the derivative is 0, whatever row 1 holds."""
    x = np.zeros((1, 1, 5, 5))
    x[0, 0, 0], x[0, 0, 1] = np.arange(5), np.inf
    y, gradients = both(module, *one_bin((1.25, -0.25, 2.25, 0.75), x=x), sampling_ratio=1, gamma=1)
    np.testing.assert_allclose([*y, *gradients.offset.ravel()], [1.25, 1, 0])


def test_infinite_pixels_spread_only_where_they_are_weighed(isa):
    """Of all pixels infinite but one column, those bins that lie on the column are finite."""
    x = np.full((1, 40, 9, 9), np.inf, np.float32)
    x[..., 4] = 2
    rois = np.array([[0, 4, 0, 5, 9]], np.float32)
    y = dcn_np.roi_align(x, rois, (3, 1), sampling_ratio=1)
    assert (y == 2).all()


def test_mask_zero_times_nan_is_nan(module):
    x = np.full((1, 1, 5, 5), np.nan)
    assert np.isnan(both(module, *one_bin(x=x, mask=0), sampling_ratio=1)[0])


def test_lanes_past_the_last_channel_never_show(isa):
    """Channels around a vector's: a NaN in the next pixel's first channel stays there."""
    for channels in (1, 3, 15, 17, 31, 33, 65):
        x = np.ones((1, 5, 5, channels))
        x[0, 1, 2, 0] = np.nan
        x = np.moveaxis(x, 3, 1)  # channels last: the next pixel follows at once
        y = dcn_np.roi_align(x, np.array([[0.0, 1, 1, 2, 2]]), 1, sampling_ratio=1)
        assert (y == 1).all()


# ---- huge regions and grids


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e5, 1e9, 1e18, 1e30])
def test_a_huge_region_visits_only_the_samples_inside(isa, size, dtype):
    """All samples count, so its bins are nearly 0; it takes no time, and x[0, 0] = 1 everywhere bounds it."""
    x = np.ones((1, 3, 8, 9), dtype)
    for corners in (
        (0, 0, size, size),
        (-size, -size, size, size),
        (-size, 0, 8, 8),
        (size, size, 2 * size, 2 * size),
        (size, 0, -size, 8),
    ):
        rois = np.array([[0, *corners]], dtype)
        for ratio in (0, 2, 1000):
            start = time.perf_counter()
            y = dcn_np.roi_align(x, rois, 7, sampling_ratio=ratio)
            gradient = dcn_np.roi_align_backward(np.ones_like(y), x, rois, 7, sampling_ratio=ratio).x
            assert time.perf_counter() - start < 2
            assert np.isfinite(y).all()
            assert np.isfinite(gradient).all()
            assert y.max() <= 1


def test_a_huge_region_counts_all_its_samples(module):
    """Of 100,000 pixels the only bin has 100,000 x 100,000 samples; 10 x 12 of them lie inside."""
    size = 1000.0 if module is reference else 100000.0
    x = np.ones((1, 1, 10, 12))
    y = module.roi_align(x, np.array([[0.0, 0.5, 0.5, size + 0.5, size + 0.5]]), 1)
    # Samples at 0.5 + i: those up to E - 1 + 0.5 and E, clamped, are inside.
    np.testing.assert_allclose(y.ravel(), 10 * 12 / size**2, rtol=1e-12)


def test_large_grids_are_right(isa):
    """More samples than are looked at one by one, ascending and descending, against the reference."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        problem = random_roi_problem([seed, 9], OPERATORS[seed % 3], np.float64)
        rois = problem.rois.copy()
        rois[:, 1:] = rng.uniform(-200, 200, rois[:, 1:].shape)
        sizes = problem.sizes | {"sampling_ratio": int(rng.choice([0, 17, 40, 100])), "spatial_scale": 1.0}
        assert_right(problem.replace(rois=rois, sizes=sizes))


def test_large_sampling_ratios_do_not_cost_their_square(isa):
    x, rois = np.ones((1, 1, 5, 5)), np.array([[0.0, 1, 1, 2, 2]])
    start = time.perf_counter()
    assert dcn_np.roi_align(x, rois, 1, sampling_ratio=2**16) == pytest.approx(1)
    assert time.perf_counter() - start < 1


def test_long_sums_are_taken_in_pieces(isa):
    """A bin of 3000 x 40 pixels of positive numbers: far less error than one running sum has."""
    rng = np.random.default_rng(0)
    x = rng.random((1, 2, 40, 3000), dtype=np.float32) + 0.5
    rois = np.array([[0, 0, 0, 3000, 40]], np.float32)
    y, want = dcn_np.roi_align(x, rois, 1), reference.roi_align(x, rois, 1, dtype=np.float64)
    assert np.max(np.abs(y / want - 1)) < 12 * 2.0**-24


# ---- empty arrays, halves


@pytest.mark.parametrize("operator", OPERATORS)
def test_empty_arrays(module, operator):
    problem = random_roi_problem(1, operator, np.float64)
    none = problem.replace(**{
        name: getattr(problem, name)[:0]
        for name in ("rois", "offset", "mask", "grad_output")
        if getattr(problem, name) is not None
    })  # fmt: skip
    assert none.forward(module).shape == none.grad_output.shape
    assert not none.backward(module).x.any()
    flat = problem.replace(x=problem.x[:, :, :0])
    assert not np.any(flat.forward(module)[~np.isnan(flat.forward(module))])
    assert flat.backward(module).x.shape == flat.x.shape
    batchless = none.replace(x=problem.x[:0])
    assert batchless.backward(module).x.shape == batchless.x.shape


def test_parts_of_no_regions_take_no_memory(module):
    parts = 1 << 20
    x, rois, offset = np.ones((1, 8, 5, 5)), np.zeros((0, 5)), np.zeros((0, 2, parts, parts))
    grad_output = np.zeros((0, 2, 3, 3))
    gradients = module.deform_psroi_pool_backward(grad_output, x, rois, offset, 2, 2, 3, 1.0, parts)
    assert gradients.offset.shape == offset.shape
    assert not gradients.x.any()


def test_no_channels(module):
    x, rois = np.zeros((1, 0, 4, 4)), np.array([[0.0, 0, 0, 4, 4]])
    offset = np.zeros((1, 2, 2, 2))
    assert module.deform_roi_pool(x, rois, offset, 2).shape == (1, 0, 2, 2)
    gradients = module.deform_roi_pool_backward(np.zeros((1, 0, 2, 2)), x, rois, offset, 2)
    assert gradients.x.shape == x.shape
    assert not gradients.offset.any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["half positions", "float32 positions"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_halves_are_what_float32_gives_rounded(isa, operator, wide, dtype):
    for seed in range(12):
        kind = {
            "non_finite": seed % 3 == 1,
            "non_finite_values": seed % 3 == 2,
            "vector_channels": seed % 4 == 0,
        }
        problem = random_roi_problem([seed, 4], operator, np.float32, **kind)
        with np.errstate(over="ignore"):
            half = problem.map_arrays(lambda array: array.astype(dtype))
        if wide:
            names = [name for name in ("rois", "offset", "mask") if getattr(half, name) is not None]
            half = half.replace(**{name: getattr(half, name).astype(np.float32) for name in names})
        full = half.map_arrays(lambda array: array.astype(np.float32))
        # Infinite regions come of rounding to float16.
        finite = np.isfinite(full.rois).all()
        if not finite:
            continue
        assert_rounded([half.forward(dcn_np)], [full.forward(dcn_np)], [half.x])
        like = (half.x, half.offset, half.mask)
        assert_rounded(half.backward(dcn_np), full.backward(dcn_np), like)


def test_half_regions_may_be_float32_beside_half_maps():
    x = np.ones((1, 4, 300, 300), ml_dtypes.bfloat16)
    rois = np.array([[0, 100.25, 100.25, 101.25, 101.25]], np.float32)  # bfloat16 has no 100.25
    assert (dcn_np.roi_align(x, rois, 1).astype(np.float32) == 1).all()
