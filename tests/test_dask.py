"""Tiles over dask arrays give the bits of one call; a halo that is too small is an error."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import problems, random_problem

import dcn_np
from dcn_np import tiling
from dcn_np.tiling import required_halo

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
tiled = pytest.importorskip("dcn_np.dask")

# Fractions of an axis where chunks end.
CUTS = st.lists(st.lists(st.floats(0.1, 0.9), max_size=3).map(tuple), min_size=5, max_size=5)
# One image and group, for tests that look at every sample.
SMALL = {"batch": 1, "in_channels": 2, "groups": 1, "offset_groups": 1}
SOME_CUTS = [(0.4,), (0.5,), (0.3, 0.45), (0.2, 0.8), (0.5,)]


@pytest.fixture(autouse=True)
def one_after_another():
    with dask.config.set(scheduler="synchronous"):
        yield


def halo_of(problem):
    if problem.offset is None:
        return 0
    return required_halo(problem.offset, problem.weight.shape[2:], *problem.parameters[:3])


def chunks_of(shape, cuts):
    borders = [
        sorted({0, extent, *(round(cut * extent) for cut in along)})
        for extent, along in zip(shape, cuts, strict=False)
    ]
    return tuple(tuple(np.diff(along).tolist()) or (0,) for along in borders)


def chunked(array, cuts):
    return None if array is None else da.from_array(array, chunks=chunks_of(array.shape, cuts))


def single(array):
    """Chunks of one output position of one image."""
    return da.from_array(array, chunks=(1, -1, *[1] * (array.ndim - 2)))


def in_tiles(problem, halo, x_cuts=SOME_CUTS, tile_cuts=SOME_CUTS):
    arrays = chunked(problem.x, x_cuts), chunked(problem.offset, tile_cuts), chunked(problem.mask, tile_cuts)
    return tiled.modulated_deform_conv(*arrays, problem.weight, problem.bias, *problem.parameters, halo=halo)


def assert_same_bits(lazy, wanted):
    assert (lazy.shape, lazy.dtype) == (wanted.shape, wanted.dtype)
    y = lazy.compute()
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(np.signbit(y), np.signbit(wanted))


# ---- tiles and the whole


@given(problem=problems(), x_cuts=CUTS, tile_cuts=CUTS)
def test_tiles_give_the_bits_of_the_whole(problem, x_cuts, tile_cuts):
    y = in_tiles(problem, halo_of(problem), x_cuts, tile_cuts)
    assert_same_bits(y, problem.forward(dcn_np, modulated=True))


@given(problem=problems(vector_channels=True, non_finite_values=True), tile_cuts=CUTS)
def test_tiles_give_the_bits_of_the_whole_with_wide_channels(problem, tile_cuts):
    with np.errstate(all="ignore"):
        wanted = problem.forward(dcn_np, modulated=True)
        y = in_tiles(problem, halo_of(problem), tile_cuts=tile_cuts).compute()
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("seed", range(20))
def test_on_each_instruction_set(isa, seed):
    problem = random_problem(seed, vector_channels=True, with_offset=True)
    assert_same_bits(in_tiles(problem, halo_of(problem)), problem.forward(dcn_np, modulated=True))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves(dtype):
    problem = random_problem(3, 2, np.dtype(np.float32), with_offset=True, special=False).astype(dtype)
    y = in_tiles(problem, halo_of(problem)).compute()
    wanted = problem.forward(dcn_np, modulated=True)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.astype(np.float32), wanted.astype(np.float32))


def larger_problem():
    """Offsets of some pixels and tiles of many positions: what is meant to be computed so."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, 90, 70), np.float32)
    offset = 3 * rng.standard_normal((2, 36, 45, 35), np.float32)
    mask = rng.random((2, 18, 45, 35), np.float32)
    weight = rng.standard_normal((24, 8, 3, 3), np.float32)
    return x, offset, mask, weight, None, 2, 1, 1, 2, 2


@pytest.mark.parametrize("tile", [7, 16, 45])
@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_a_larger_image(tile, scheduler):
    x, offset, mask, *rest = larger_problem()
    halo = required_halo(offset, 3, 2, 1)
    lazy = da.from_array(x, chunks=(1, 16, 32, 32))
    y = tiled.modulated_deform_conv(
        lazy,
        da.from_array(offset, chunks=(1, 36, tile, tile)),
        da.from_array(mask, chunks=(2, 5, 10, 10)),
        *rest,
        halo=halo,
    )
    with dask.config.set(scheduler=scheduler):
        assert_same_bits(y, dcn_np.modulated_deform_conv(x, offset, mask, *rest))


def test_without_mask():
    x, offset, _, *rest = larger_problem()
    y = tiled.deform_conv(chunked(x, SOME_CUTS), chunked(offset, SOME_CUTS), *rest, halo=40)
    assert_same_bits(y, dcn_np.deform_conv(x, offset, *rest))


def test_weight_and_bias_may_be_dask_arrays():
    x, offset, mask, weight, _, *parameters = larger_problem()
    bias = np.arange(24, dtype=np.float32)
    lazy = [da.from_array(array, chunks=20) for array in (x, offset, mask, weight, bias)]
    y = tiled.modulated_deform_conv(*lazy, *parameters, halo=40)
    assert_same_bits(y, dcn_np.modulated_deform_conv(x, offset, mask, weight, bias, *parameters))


@pytest.mark.parametrize("empty", ["batch", "in_channels", "out_channels", "extent"])
def test_empty_arrays(empty):
    batch, channels, outputs, extent = (
        0 if name == empty else size
        for name, size in [("batch", 2), ("in_channels", 4), ("out_channels", 3), ("extent", 6)]
    )
    x, weight = np.ones((batch, channels, 6, extent)), np.ones((outputs, channels, 3, 3))
    offset = np.full((batch, 18, 8, extent + 2), 0.5)
    bias = np.arange(outputs, dtype=float)
    y = tiled.deform_conv(chunked(x, SOME_CUTS), chunked(offset, SOME_CUTS), weight, bias, padding=2, halo=9)
    assert_same_bits(y, dcn_np.deform_conv(x, offset, weight, bias, padding=2))


def test_chunks_are_those_of_offset_then_mask():
    x, offset, mask, weight, *rest = larger_problem()
    lazy = da.from_array(x, chunks=(1, 16, 30, 70))
    offset, mask = da.from_array(offset, chunks=(2, 4, 20, 30)), da.from_array(mask, chunks=(1, 18, 9, 35))
    y = tiled.modulated_deform_conv(lazy, offset, mask, weight, *rest, halo=20)
    assert y.chunks == ((2,), (24,), (20, 20, 5), (30, 5))
    y = tiled.modulated_deform_conv(lazy, None, mask, weight, *rest, halo=0)
    assert y.chunks == ((1, 1), (24,), (9,) * 5, (35,))
    y = tiled.modulated_deform_conv(lazy, None, None, weight, *rest, halo=0)
    assert y.chunks == ((1, 1), (24,), (15, 15, 15), (35,))


def test_empty_chunks_are_left_out():
    x, offset, mask, *rest = larger_problem()
    lazy = da.from_array(offset, chunks=((0, 2), 36, (20, 0, 25), (0, 35, 0)))
    y = tiled.modulated_deform_conv(da.from_array(x), lazy, da.from_array(mask), *rest, halo=20)
    assert y.chunks == ((2,), (24,), (20, 25), (35,))
    assert_same_bits(y, dcn_np.modulated_deform_conv(x, offset, mask, *rest))


def test_a_tile_reads_no_more_than_its_window_and_halo():
    x = da.map_blocks(
        lambda block_info: np.full((1, 1, 10, 10), math.prod(block_info[None]["chunk-location"])),
        chunks=((1,), (1,), (10,) * 5, (10,) * 5),
        meta=np.empty((0,) * 4),
    )
    read = []

    def seen(block, block_id=None):
        read.append(block_id[2:])
        return block.astype(float)

    x = x.map_blocks(seen, dtype=float)
    offset = da.full((1, 18, 50, 50), 0.5, chunks=(1, 18, 10, 10))
    y = tiled.deform_conv(x, offset, np.ones((1, 1, 3, 3)), padding=1, halo=4)
    assert not read
    y[:, :, :10, 22:25].compute()
    assert set(read) == set(itertools.product((0, 1), (1, 2, 3)))


# ---- the halo


def pixels_read(offset, kernel, stride, begin, dilation, extent):
    """Yield (rigid window's first pixel, pixels read), both per axis, one sample at a time."""
    batch, channels, *output = offset.shape
    ndim, taps = len(output), math.prod(kernel)
    split = offset.reshape(batch, channels // taps // ndim, taps, ndim, *output)
    for image, group, position in itertools.product(*map(range, split.shape[:2]), np.ndindex(*output)):
        for number, tap in enumerate(np.ndindex(*kernel)):
            window, pixels = [], []
            for axis in range(ndim):
                away = split[(image, group, number, axis, *position)]
                window.append(position[axis] * stride[axis] - begin[axis])
                rigid = window[-1] + tap[axis] * dilation[axis]
                finite = np.isfinite(away) and abs(away) < 2**31
                near = {math.floor(away), math.ceil(away)} if finite else ()
                pixels.append([rigid + step for step in near if 0 <= rigid + step < extent[axis]])
            if all(pixels):
                yield window, pixels


def naive_halo(problem, extent):
    kernel, ndim = problem.weight.shape[2:], problem.rank
    begins = [begin for begin, _ in problem.padding]
    halo = [[0, 0] for _ in range(ndim)]
    window = kernel, problem.stride, begins, problem.dilation
    for first, pixels in pixels_read(problem.offset, *window, extent):
        for axis in range(ndim):
            last = first[axis] + (kernel[axis] - 1) * problem.dilation[axis]
            halo[axis][0] = max(halo[axis][0], first[axis] - min(pixels[axis]))
            halo[axis][1] = max(halo[axis][1], max(pixels[axis]) - last)
    return tuple(map(tuple, halo))


def largest_extent(problem):
    """How large an image gives this output."""
    kernel, output = problem.weight.shape[2:], problem.offset.shape[2:]
    per_axis = zip(problem.padding, kernel, problem.stride, problem.dilation, output, strict=True)
    return [
        max(0, (positions - 1) * stride + dilation * (taps - 1) + stride - begin - end)
        for (begin, end), taps, stride, dilation, positions in per_axis
    ]


@pytest.mark.parametrize("seed", range(60))
def test_required_halo_is_what_is_read(seed):
    problem = random_problem(seed, with_offset=True, non_finite=seed % 2 == 0, **SMALL)
    assert halo_of(problem) == naive_halo(problem, largest_extent(problem))


@pytest.mark.parametrize("seed", range(30))
def test_one_pixel_less_is_detected(seed):
    problem = random_problem(seed, 2, with_offset=True, with_mask=False, stride=(1, 1), **SMALL)
    halo = np.array(halo_of(problem))
    x, offset = da.from_array(problem.x, chunks=3), single(problem.offset)
    rest = (problem.weight, problem.bias, *problem.parameters)
    assert_same_bits(tiled.deform_conv(x, offset, *rest, halo=halo.tolist()), problem.forward(dcn_np))
    for axis, side in np.argwhere(halo > 0):
        less = halo.copy()
        less[axis, side] -= 1
        with pytest.raises(ValueError, match=rf"halo is .* need .*{halo[axis, side]}"):
            tiled.deform_conv(x, offset, *rest, halo=less.tolist()).compute()


def test_the_error_names_tile_and_halo():
    offset = np.zeros((1, 2, 8, 8))
    offset[0, 0, 5, 6] = -3.5
    lazy = da.from_array(offset, chunks=(1, 2, 4, 4))
    y = tiled.deform_conv(da.ones((1, 1, 8, 8)), lazy, np.ones((1, 1, 1, 1)), halo=((2, 0), 0))
    with pytest.raises(ValueError, match=r"4x4 output positions from \(4, 4\) need \(\(4, 0\), \(0, 0\)\)"):
        y.compute()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, 100.0, -100.0])
def test_an_offset_that_reads_nothing_needs_no_halo(value):
    offset = np.zeros((1, 18, 8, 8))
    offset[0, 5, 3, 3] = value
    assert required_halo(offset, 3, padding=1) == ((0, 0), (0, 0))
    x, weight = np.random.default_rng(0).random((1, 1, 8, 8)), np.ones((1, 1, 3, 3))
    lazy = da.from_array(offset, chunks=(1, 18, 3, 3))
    y = tiled.deform_conv(da.from_array(x), lazy, weight, padding=1, halo=0)
    assert_same_bits(y, dcn_np.deform_conv(x, offset, weight, padding=1))


def test_taps_that_move_inwards_need_no_halo():
    offset = np.zeros((1, 3, 20))
    offset[:, 0], offset[:, 2] = 2, -2
    assert required_halo(offset, 3) == ((0, 0),)
    assert required_halo(-offset, 3) == ((2, 2),)
    assert required_halo(-offset, 3, dilation=4) == ((2, 2),)


@given(
    st.builds(tiling.Axis, *(st.integers(low, 9) for low in (0, 1, 1, 0, 1))),
    st.integers(0, 9),
    st.integers(1, 9),
    st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_a_placement_has_its_positions_where_they_belong(axis, first, positions, halo):
    at = tiling.place(axis, first, positions, halo)
    (begin, end), (before, after) = at.padding, at.surplus
    assert min(begin, end, before, after) >= 0
    extent = at.stop - at.start
    computed = (extent + begin + end - axis.reach - 1) // axis.stride + 1
    assert computed == before + positions + after
    if extent:
        assert at.start + before * axis.stride - begin == axis.first_pixel(first)
        assert before < halo[0] // axis.stride + 2
        assert after < halo[1] // axis.stride + 2


# ---- arguments


def call(x=None, offset=None, weight=None, **keywords):
    x = da.ones((1, 1, 8, 8)) if x is None else x
    weight = np.ones((1, 1, 1, 1)) if weight is None else weight
    return tiled.deform_conv(x, offset, weight, **{"halo": 1} | keywords)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": np.ones((1, 1, 8, 8))}, TypeError, r"x is a ndarray; wanted a dask\.array\.Array"),
        ({"weight": [[[[1.0]]]]}, TypeError, r"weight is a list"),
        ({"halo": 1.5}, TypeError, r"halo is 1\.5"),
        ({"halo": -1}, ValueError, r"halo is -1; wanted at least 0"),
        ({"halo": (1, 2, 3)}, ValueError, r"halo has 3 entries; x has 2 spatial axes"),
        ({"halo": ((1, 2, 3), 1)}, ValueError, r"halo\[0\] has 3 entries"),
        ({"weight": np.ones((1, 2, 1, 1))}, ValueError, r"weight has 2 channels"),
        ({"stride": 0}, ValueError, r"stride is 0"),
    ],
)
def test_arguments_are_checked_before_anything_is_computed(arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


def test_unknown_chunks_are_refused():
    x = da.ones((4, 1, 8, 8), chunks=1)
    with pytest.raises(ValueError, match=r"x\.compute_chunk_sizes\(\)"):
        call(x[x[:, 0, 0, 0] > 0])


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((2, 2), {}, "offset has 2 axes"),
        ((1, 8, 4, 4), {}, "offset has 8 channels; 9 taps on 2 spatial axes need a multiple of 18"),
        ((1, 18, 4, 4), {"padding": -1}, "padding is -1"),
    ],
)
def test_arguments_of_required_halo(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        required_halo(np.zeros(shape), 3, **arguments)
    with pytest.raises(TypeError, match="offset is None; wanted an array"):
        required_halo(None, 3)


# ---- a cluster


@pytest.mark.filterwarnings("ignore")  # of dask.distributed and of closing its connections
def test_two_processes():
    distributed = pytest.importorskip("distributed")
    x, offset, mask, *rest = larger_problem()
    wanted = dcn_np.modulated_deform_conv(x, offset, mask, *rest)
    settings = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**settings) as cluster, distributed.Client(cluster) as client:
        arrays = [da.from_array(array, chunks=(1, -1, 20, 20)) for array in (x, offset, mask)]
        with dask.config.set(scheduler=client):
            y = tiled.modulated_deform_conv(*arrays, *rest, halo=required_halo(offset, 3, 2, 1)).persist()
            distributed.wait(y)
            computed_on = set(itertools.chain(*client.who_has(y).values()))
            assert_same_bits(y, wanted)
    assert len(computed_on) == 2
