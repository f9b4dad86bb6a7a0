"""The fused kernels, emulated: against the reference, with every tile, in any order of threads."""

import dataclasses

import emulated_gpu
import ml_dtypes
import numpy as np
import pytest
from problems import HALVES, LAYOUTS, assert_close, random_problem

from dcn_np import cuda
from dcn_np.cuda import engine, fused
from dcn_np.geometry import Geometry

ORDERS = (0, 1, 7)  # forward, backward, random

FLOAT16, BFLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)

# Rounding a factor to 11 bits, twice, in units of float32's rounding.
TF32_UNITS = 2.0**14

SIZES = {
    "batch": 2,
    "in_channels": 64,
    "out_channels": 40,
    "groups": 1,
    "offset_groups": 1,
    "extent": (9, 11),
    "kernel": (3, 3),
    "stride": (1, 1),
    "padding": ((1, 1), (1, 1)),
    "dilation": (1, 1),
    "with_offset": True,
    "with_mask": True,
    "with_bias": True,
}

SMALL = {"in_channels": 256, "extent": (4, 5)}

# What differs from SIZES: every loop's borders, and every layout of groups that the fused kernels take.
CASES = {
    "3x3": {},
    "1x1": {"kernel": (1, 1), "padding": ((0, 0), (0, 0))},
    "1x3, one image fills tiles": {"kernel": (1, 3), "batch": 1, "extent": (16, 18)},
    "many images in a tile": {"kernel": (5, 5), "batch": 9, "extent": (4, 3), "padding": ((2, 2), (2, 2))},
    "strides and dilations": {"stride": (2, 3), "dilation": (3, 2), "padding": ((3, 1), (2, 4))},
    "groups": {"in_channels": 128, "out_channels": 96, "groups": 2, "extent": (5, 7)},
    "offset groups": {"in_channels": 192, "offset_groups": 3, "extent": (5, 7)},
    "groups inside offset groups": {**SMALL, "out_channels": 128, "groups": 4, "offset_groups": 2},
    "offset groups inside groups": {**SMALL, "out_channels": 64, "groups": 2, "offset_groups": 4},
    "short rows": {"in_channels": 96, "offset_groups": 3, "extent": (5, 7)},
    "many outputs": {"out_channels": 272, "extent": (4, 5)},
    "many channels": {"in_channels": 320, "out_channels": 32, "extent": (4, 5)},
    "no mask": {"with_mask": False},
    "neither mask nor offset": {"with_mask": False, "with_offset": False, "with_bias": False},
}  # fmt: skip


def problem_of(name="3x3", seed=0, dtype=FLOAT16, **values):
    sizes = {**SIZES, **CASES[name]}
    problem = random_problem(seed, 2, np.float32, **sizes, **values)
    with np.errstate(over="ignore"):  # huge offsets become infinite
        return dataclasses.replace(problem.astype(dtype), note=f"{name}, seed={seed}")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The names of all kernels launched, in their order."""
    names = []
    launch = emulated_gpu.Function.__call__

    def counted(function, *arguments, **keywords):
        names.append(function.name)
        launch(function, *arguments, **keywords)

    monkeypatch.setattr(emulated_gpu.Function, "__call__", counted)
    with emulated_gpu.emulated_gpu():
        yield names
    monkeypatch.undo()


def check(problem, launched, *, units=None, **keywords):
    launched.clear()
    y = problem.forward(emulated_gpu, **keywords)
    assert "fused_forward" in launched
    assert y.dtype == problem.dtype
    scales = problem.scales()
    assert_close(
        y, problem.expected_forward(), problem.dtype, scales["y"], units=units, what=f"y of {problem}"
    )


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(monkeypatch, launched, name, dtype):
    number = list(CASES).index(name)
    monkeypatch.setattr(emulated_gpu, "order", ORDERS[number % 3])
    check(problem_of(name, number, dtype), launched)


@pytest.mark.parametrize("name", ["3x3", "offset groups"])
def test_tf32_rounds_the_factors(launched, name):
    problem = problem_of(name, 1, FLOAT32)
    check(problem, launched, units=TF32_UNITS, float32_matmul="tf32")
    # As a check of the check: it is not what is computed without being asked for.
    strict, rounded = problem.forward(emulated_gpu), problem.forward(emulated_gpu, float32_matmul="tf32")
    assert not np.array_equal(strict, rounded)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_positions_may_be_wider_than_images(launched, dtype):
    problem = problem_of("3x3", 2, dtype)
    check(
        problem.replace(offset=problem.offset.astype(np.float32), mask=problem.mask.astype(np.float32)),
        launched,
    )


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("values", ["non_finite", "non_finite_values"])
def test_what_is_not_finite(launched, values, dtype):
    for seed in range(4):
        check(problem_of("offset groups", 10 + seed, dtype, **{values: True}), launched)


def test_a_pixel_without_weight_is_not_read(launched):
    """An infinite pixel beside integer positions leaves no trace."""
    problem = problem_of("3x3", 3, special=False)
    problem.offset[...] = np.round(problem.offset)
    problem.x[:, :, 4, 5] = np.inf
    check(problem, launched)


# ---- the choice of tiles changes no bit


def choices(monkeypatch, function):
    """Run a function with every choice of tiles there is; return the results."""
    results, number = [], 0
    while True:
        counts = []

        def choose(geometry, launches, multiprocessors, number=number, counts=counts):
            counts.append(len(launches))
            return launches[min(number, len(launches) - 1)]

        monkeypatch.setattr(fused, "chosen", choose)
        results.append(function())
        number += 1
        if number >= max(counts):
            assert number > 1
            return results


@pytest.mark.parametrize("name", ["3x3", "groups", "many outputs", "many channels"])
@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=str)
def test_no_tile_changes_a_bit(monkeypatch, name, dtype):
    problem = problem_of(name, 4, dtype)
    first, *others = choices(monkeypatch, lambda: problem.forward(emulated_gpu))
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=str)
def test_the_order_of_threads_changes_no_bit(monkeypatch, dtype):
    problem, results = problem_of("offset groups", 5, dtype), []
    for order in ORDERS:
        monkeypatch.setattr(emulated_gpu, "order", order)
        results.append(problem.forward(emulated_gpu))
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_a_grid_without_room_is_launched_in_pieces(monkeypatch, launched):
    problem = problem_of("many images in a tile", 6)
    y = problem.forward(emulated_gpu)
    monkeypatch.setattr(engine, "MOST_BLOCKS", 1)
    launched.clear()
    assert np.array_equal(problem.forward(emulated_gpu), y)
    assert launched.count("fused_forward") > 1


def test_images_of_a_batch_do_not_meet(monkeypatch):
    problem = problem_of("many images in a tile", 7)
    whole = problem.forward(emulated_gpu)
    for image in range(problem.x.shape[0]):
        alone = problem.map_arrays(
            lambda a, image=image: a[image : image + 1].copy() if a.shape[0] == problem.x.shape[0] else a
        )
        assert np.array_equal(alone.forward(emulated_gpu)[0], whole[image])


# ---- memory orders


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_order(layout):
    problem = problem_of("3x3", 8)
    if layout == "misaligned":
        layout = "every_second"
    y = problem.map_arrays(LAYOUTS[layout]).forward(emulated_gpu)
    assert np.array_equal(y, problem.forward(emulated_gpu))


def test_channels_last_images_are_read_in_place(launched):
    problem = problem_of("3x3", 9)
    problem.map_arrays(LAYOUTS["channels_last"]).forward(emulated_gpu)
    assert launched == ["copy", "fused_forward"]  # the copy packs the weights
    launched.clear()
    problem.forward(emulated_gpu)
    assert launched == ["copy", "copy", "fused_forward"]


# ---- where the fused kernels apply


def launches_of(channels=(64, 64), dtype=FLOAT16, rank=2, kernel=3, extent=8, batch=1, architecture=90):
    """What is there to choose from for a problem of which only the shapes exist."""
    inputs, outputs = channels
    output = (extent - kernel + 1,) * rank
    shapes = {
        "x": (batch, inputs, *(extent,) * rank),
        "offset": (batch, rank * kernel**rank, *output),
        "mask": (batch, kernel**rank, *output),
        "weight": (outputs, inputs, *(kernel,) * rank),
    }
    arrays = [np.broadcast_to(np.zeros((), dtype), shape) for shape in shapes.values()]
    geometry = Geometry.of(cuda.DTYPES, *arrays, None, 1, 0, 1, 1, 1)
    return fused.forward_launches(geometry, "strict", architecture)


OTHERS = {
    "channels that leave a step incomplete": {"channels": (48, 64)},
    "few outputs": {"channels": (64, 16)},
    "no channels": {"channels": (0, 64)},
    "float64": {"dtype": np.dtype(np.float64)},
    "one axis": {"rank": 1},
    "three axes": {"rank": 3},
    "an old GPU": {"architecture": 75},
    "more taps than shared memory holds": {"kernel": 13, "extent": 20},
    "an image out of reach": {"extent": 70_000, "channels": (256, 64)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_fused_kernels_leave_to_the_plain_ones(name):
    assert launches_of(**OTHERS[name]) == []


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
def test_every_gpu_since_ampere_has_a_fused_kernel(dtype, architecture):
    launches = launches_of(dtype=dtype, architecture=architecture)
    limit = {80: 163, 90: 227, 100: 227}.get(architecture, 99) * 1024
    assert launches
    assert all(launch.shared <= limit for launch in launches)
    assert launches_of(dtype=dtype, architecture=architecture, kernel=5)


def test_few_positions_get_small_tiles():
    def chosen(extent, batch):
        arrays = [np.broadcast_to(FLOAT16.type(0), (batch, 256, extent, extent)), None, None]
        weight = np.broadcast_to(FLOAT16.type(0), (256, 256, 3, 3))
        geometry = Geometry.of(cuda.DTYPES, *arrays, weight, None, 1, 1, 1, 1, 1)
        launches = fused.forward_launches(geometry, "strict", 90)
        tile = fused.chosen(geometry, launches, 132).tile
        return tile.positions * tile.outputs

    assert chosen(16, 2) < chosen(56, 32)
