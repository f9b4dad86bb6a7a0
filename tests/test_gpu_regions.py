"""Pooling over regions on an emulated GPU: against the reference, in any order of threads."""

import re
import sys

import emulated_gpu
import ml_dtypes
import numpy as np
import pytest
from problems import DTYPES, HALVES, LAYOUTS, assert_close
from roi_problems import NAMES, OPERATORS, assert_right, random_roi_problem
from test_fuzz import in_order, relaid, same_bits

import dcn_np
from dcn_np.cuda import regions

ORDERS = (0, 1, 7)  # forward, backward, random
GPU_LAYOUTS = [name for name in LAYOUTS if name not in ("misaligned", "read_only")]


@pytest.fixture(autouse=True)
def gpu():
    with emulated_gpu.emulated_gpu():
        yield


def run_in(monkeypatch, order):
    monkeypatch.setattr(emulated_gpu, "order", order)


def results(problem, **keywords):
    return [problem.forward(emulated_gpu), *problem.backward(emulated_gpu, **keywords)]


def equal(some, others):
    return all(
        (one is None and other is None) or same_bits(one, other)
        for one, other in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("block", range(20))
def test_against_the_reference(monkeypatch, block):
    run_in(monkeypatch, ORDERS[block % 3])
    for seed in range(30 * block, 30 * block + 30):
        problem = random_roi_problem(
            [seed, 7],
            OPERATORS[seed % 4],
            DTYPES[seed // 4 % 2],
            vector_channels=seed % 3 == 0,
            non_finite=seed % 5 == 1,
            non_finite_values=seed % 5 == 2,
        )
        assert_right(problem, emulated_gpu)


# ---- storage


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("wide", [(), ("rois",), ("offset", "mask"), ("rois", "offset", "mask")], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_halves_are_rounded_once(operator, wide, dtype):
    for seed in range(3):
        problem = random_roi_problem([seed, 8], operator, np.float32, vector_channels=seed == 0)
        with np.errstate(over="ignore"):
            half = problem.map_arrays(lambda array: array.astype(dtype))
        kept = {name: getattr(problem, name) for name in wide if getattr(problem, name) is not None}
        half = half.replace(**kept)
        if not np.isfinite(half.rois.astype(np.float32)).all():
            continue
        got, scales = half.backward(emulated_gpu), half.scales()
        assert_close(half.forward(emulated_gpu), half.expected_forward(), dtype, scales["y"])
        for name in half.differentiable:
            gradient = getattr(got, name)
            assert gradient.dtype == getattr(half, name).dtype
            wanted = getattr(half.expected_backward(), name)
            assert_close(gradient, wanted, gradient.dtype, scales[name], what=f"{name} of {half}")


# ---- large


def large_problem(operator, dtype=np.float32):
    """Bins of several blocks of pixels, and classes of several blocks of channels."""
    rng = np.random.default_rng(6)
    psroi = operator == "deform_psroi_pool"
    channels = 280 if psroi else 140
    corners = rng.uniform(-5, 50, (3, 4))
    corners[:, 2:] = np.maximum(corners[:, :2] + 3, corners[:, 2:])
    corners[0] = -3, -2, 47, 41
    given = {
        "x": rng.standard_normal((2, channels, 39, 45)),
        "rois": np.concatenate([[[1], [0], [1]], corners], axis=1),
        "offset": None if operator == "roi_align" else rng.standard_normal((3, 4 if psroi else 2, 2, 1)),
        "mask": rng.random((3, 1, 2, 1)) if operator == "modulated_deform_roi_pool" else None,
        "grad_output": rng.standard_normal((3, 280 if psroi else 140, 2, 1)),
    }
    sizes = {"output_size": (2, 1)}
    if psroi:
        sizes |= {"output_dim": 280, "group_size": 1, "sample_per_part": 40}
    problem = random_roi_problem(0, operator).replace(sizes=sizes, note="large", **given)
    return problem.map_arrays(lambda array: array.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_large_bins_and_many_channels(operator, dtype):
    assert_right(large_problem(operator, dtype), emulated_gpu)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_grid_without_room_is_launched_in_pieces(monkeypatch, operator):
    problem = random_roi_problem([1, 9], operator, np.float64)
    problem = problem.replace(sizes=problem.sizes | {"output_size": (4, 4)}, offset=None, mask=None)
    problem = problem.replace(
        grad_output=np.ones((*problem.grad_output.shape[:2], 4, 4)),
        sizes=problem.sizes | ({"part_size": None} if operator == "deform_psroi_pool" else {}),
    )
    whole = results(problem)
    monkeypatch.setattr(regions, "MOST_BLOCKS", 1)
    assert equal(results(problem), whole)


@pytest.mark.parametrize("size", [1e5, 1e9, 1e18, 1e30])
def test_a_huge_region_visits_only_the_samples_inside(size):
    """All samples count: what the CPU gives, which visits the same."""
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 9))
    for corners in (
        (0, 0, size, size),
        (-size, -size, size, size),
        (-size, 0, 8, 8),
        (size, 0, -size, 8),
    ):
        rois = np.array([[0, *corners]])
        for ratio in (0, 2, 1000):
            y = emulated_gpu.roi_align(x, rois, 3, sampling_ratio=ratio)
            np.testing.assert_allclose(y, dcn_np.roi_align(x, rois, 3, sampling_ratio=ratio), atol=1e-12)
            grads = np.ones_like(y)
            gradient = emulated_gpu.roi_align_backward(grads, x, rois, 3, sampling_ratio=ratio).x
            wanted = dcn_np.roi_align_backward(grads, x, rois, 3, sampling_ratio=ratio).x
            np.testing.assert_allclose(gradient, wanted, atol=1e-12)


# ---- regions that a CPU refuses


GOOD = (1, 0, 1, 3, 2)
NO_REGIONS = {
    "NaN": (0, np.nan, 1, 6, 5),
    "infinite": (0, 1, 1, np.inf, 5),
    "infinite both": (0, -np.inf, 1, np.inf, 5),
    "beyond float64 in pixels": (0, 1, 1, 5, 1.7e308),
    "an image of -1": (-1, 1, 1, 6, 5),
    "an image past the last": (2, 1, 1, 6, 5),
    "an image of 1e30": (1e30, 1, 1, 6, 5),
    "an image of NaN": (np.nan, 1, 1, 6, 5),
    "half an image": (0.5, 1, 1, 6, 5),
}


def problem_with(region, operator):
    """Three regions, of which the second is the given one and the others are as they should be."""
    rng = np.random.default_rng(5)
    sizes = {"output_size": (2, 3), "spatial_scale": 2.0}
    psroi = operator == "deform_psroi_pool"
    return random_roi_problem(0, operator).replace(
        x=rng.standard_normal((2, 3, 6, 7)),
        rois=np.array([GOOD, region, GOOD], np.float64),
        offset=None if operator == "roi_align" else rng.standard_normal((3, 2, 2, 3)),
        mask=rng.random((3, 1, 2, 3)) if operator == "modulated_deform_roi_pool" else None,
        grad_output=rng.standard_normal((3, 3, 2, 3)),
        sizes=sizes | ({"output_dim": 3, "group_size": 1} if psroi else {"sampling_ratio": 2}),
    )


def check_that_it_is_none(module, operator, region):
    """A region that is none gives NaN, adds nothing to grad_x, and leaves the other regions alone."""
    problem = problem_with(region, operator)
    arrays = {name: getattr(problem, name) for name in problem.ARRAYS[1:]}
    good = problem.replace(**{name: None if a is None else a[::2] for name, a in arrays.items()})
    y, gradients = problem.forward(module), problem.backward(module)
    wanted_y, wanted = good.forward(module), good.backward(module)
    assert np.isnan(y[1]).all()
    assert np.isfinite(wanted_y).all()
    assert np.array_equal(y[::2], wanted_y)
    assert gradients.x.any()
    assert np.array_equal(gradients.x, wanted.x)
    for name in problem.differentiable[1:]:
        gradient = getattr(gradients, name)
        assert np.isnan(gradient[1]).all()
        assert np.array_equal(gradient[::2], getattr(wanted, name))


@pytest.mark.parametrize("wrong", NO_REGIONS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_no_region_is_nan_and_touches_nothing(operator, wrong):
    check_that_it_is_none(emulated_gpu, operator, NO_REGIONS[wrong])


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_an_earlier_call_left_in_memory_is_not_read(monkeypatch, operator):
    wrong = problem_with(NO_REGIONS["an image of -1"], operator)
    wanted = wrong.backward(emulated_gpu).x
    memory = {}

    def reused(shape, dtype):
        key = shape, np.dtype(dtype)
        if key not in memory:
            memory[key] = emulated_gpu.empty(shape, dtype)
        return memory[key]

    monkeypatch.setattr(sys.modules["cupy"], "empty", reused)
    problem_with(GOOD, operator).backward(emulated_gpu)
    assert np.array_equal(wrong.backward(emulated_gpu).x, wanted)


@pytest.mark.parametrize("operator", OPERATORS)
def test_without_images_every_region_is_nan(operator):
    problem = random_roi_problem([2, 2], operator, np.float32)
    problem = problem.replace(x=problem.x[:0])
    assert np.isnan(problem.forward(emulated_gpu)).all()
    gradients = problem.backward(emulated_gpu)
    assert gradients.x.shape == problem.x.shape
    for name in problem.differentiable[1:]:
        assert np.isnan(getattr(gradients, name)).any()


# ---- memory


@pytest.mark.parametrize("layout", [*GPU_LAYOUTS, "random"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_any_memory_layout_gives_the_same_bits(operator, layout):
    rng = np.random.default_rng(2)
    problem = random_roi_problem([11, 3], operator, np.float32, channels=20)
    for _ in range(3 if layout == "random" else 1):
        other = problem.map_arrays(
            lambda array: relaid(rng, array) if layout == "random" else LAYOUTS[layout](array)
        )
        assert all(
            (one is None and two is None) or np.array_equal(one, two)
            for one, two in zip(results(other), results(problem), strict=True)
        )


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)])
def test_results_follow_the_memory_order_of_inputs(order):
    problem = large_problem("modulated_deform_roi_pool")
    x = in_order(problem.x, order)
    problem = problem.replace(x=x, offset=in_order(problem.offset, order), mask=in_order(problem.mask, order))
    for array in results(problem):
        assert array.transpose(order).flags.c_contiguous


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    launched = []
    launch = emulated_gpu.Function.__call__

    def counted(function, *arguments, **keywords):
        launched.append(function.name)
        launch(function, *arguments, **keywords)

    monkeypatch.setattr(emulated_gpu.Function, "__call__", counted)
    return launched


def test_channels_last_maps_are_read_in_place(launched):
    problem = large_problem("deform_roi_pool")
    last = problem.map_arrays(lambda array: in_order(array, (0, 2, 3, 1)) if array.ndim == 4 else array)
    results(last)
    assert launched == ["average_bins", "locate_bins", "sum_tiles", "sum_parts"]
    launched.clear()
    results(problem)
    assert launched == [
        *("copy", "average_bins"),
        *("copy", "locate_bins", "sum_tiles", "copy_sums", "copy", "sum_parts"),
    ]


def test_without_regions_the_maps_are_not_read(launched):
    problem = large_problem("modulated_deform_roi_pool")
    arrays = {name: getattr(problem, name)[:0] for name in problem.ARRAYS[1:]}
    y, grad_x, *others = results(problem.replace(**arrays))
    assert launched == ["copy_sums"]
    assert y.shape == arrays["grad_output"].shape
    assert not grad_x.any()
    assert [array.shape for array in others] == [arrays["offset"].shape, arrays["mask"].shape]


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_needed_is_none(operator):
    problem = random_roi_problem([21, 1], operator, np.float32, channels=9)
    whole = problem.backward(emulated_gpu)
    for name in problem.differentiable:
        alone = problem.backward(emulated_gpu, needs=(name,))
        assert [field for field in NAMES if getattr(alone, field) is not None] == [name]
        assert same_bits(getattr(alone, name), getattr(whole, name))
    assert problem.backward(emulated_gpu, needs=()) == (None, None, None)


# ---- the order of threads


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_order_of_threads_changes_no_bit(monkeypatch, operator):
    problem = large_problem(operator)
    problem = problem.replace(rois=problem.rois[[0, 0, 0]])  # three terms, so that their order matters
    some = []
    for order in ORDERS:
        run_in(monkeypatch, order)
        some.append(results(problem))
    assert all(equal(some[0], other) for other in some[1:])


@pytest.mark.parametrize("kept", [None, 1], ids=["one launch", "a launch for each region"])
def test_a_pixel_adds_its_regions_in_order(monkeypatch, kept):
    """In another order than large, -large, small the large ones would swallow the small one."""
    if kept is not None:
        monkeypatch.setattr(regions, "_KEPT_BYTES", kept)
    x, rois = np.zeros((1, 3, 19, 20), np.float32), np.array([[0, 1, 2, 15, 16]] * 3, np.float32)
    small = np.random.default_rng(0).standard_normal((1, 3, 1, 1), dtype=np.float32)
    large = np.full((1, 3, 1, 1), 1e9, np.float32)
    given = emulated_gpu.roi_align_backward(np.concatenate([large, -large, small]), x, rois, 1).x
    wanted = emulated_gpu.roi_align_backward(small, x, rois[:1], 1).x
    assert np.array_equal(given, wanted)
    assert given.any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_as_many_bins_are_kept_as_there_is_room_for(monkeypatch, launched, operator):
    problem = large_problem(operator)
    bins = 2 * (2 if operator == "deform_psroi_pool" else 1)
    whole = problem.backward(emulated_gpu).x
    launched.clear()
    for regions_at_once, launches in ((1, 3), (2, 2), (3, 1)):
        monkeypatch.setattr(regions, "_KEPT_BYTES", regions_at_once * bins * regions._BIN_BYTES)
        assert same_bits(problem.backward(emulated_gpu).x, whole)
        assert launched.count("locate_bins") == launched.count("sum_tiles") == launches
        launched.clear()


def test_sizes_are_those_of_the_kernels():
    files = [emulated_gpu.KERNELS / name for name in ("roi_bins.hpp", "roi_gradients.cu")]
    text = "".join(file.read_text() for file in files)
    found = dict(re.findall(r"(k\w+) = (\d+)[,;]", text))
    assert int(found["kThreads"]) == regions._THREADS
    assert int(found["kLocators"]) == regions._LOCATORS
    assert int(found["kBinBytes"]) == regions._BIN_BYTES
    assert int(found["kBoxBytes"]) == regions._BOX_BYTES
    # A warp has a bin of a block, or a row of pixels, and 16 bytes of sums in each thread.
    warp = int(found["kWarp"])
    assert (regions._THREADS // warp, 16 * warp) == (regions._BINS, regions._BYTES)
    assert regions._SIDE == regions._BINS


def test_bfloat16_is_taken():
    x = np.ones((1, 4, 30, 30), ml_dtypes.bfloat16)
    y = emulated_gpu.roi_align(x, np.array([[0, 2, 2, 9, 9]], np.float32), 2)
    assert y.dtype == x.dtype
    assert (y.astype(np.float32) == 1).all()


def test_the_loss_is_refused():
    arrays = [emulated_gpu.on_gpu(np.ones((2, 3), np.float32)) for _ in range(2)]
    with pytest.raises(TypeError, match="rcnn_features is an array on a GPU; the feature mimicking loss"):
        dcn_np.feature_mimic_loss(*arrays)
    with pytest.raises(TypeError, match="rcnn_features is an array on a GPU; the feature mimicking loss"):
        dcn_np.feature_mimic_loss_backward(1.0, *arrays)
