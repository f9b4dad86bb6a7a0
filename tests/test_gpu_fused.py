"""The fused kernels, emulated: against the reference, with every tile, in any order of threads."""

import dataclasses
import json
import types

import emulated_gpu
import ml_dtypes
import numpy as np
import pytest
from problems import HALVES, LAYOUTS, assert_close, random_problem

from dcn_np import cuda
from dcn_np.cuda import engine, fused, modules, tuning
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
    "one image": {"kernel": (1, 3), "batch": 1, "extent": (16, 18)},
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
    problem = random_problem(seed, 2, np.float32, **{**SIZES, **CASES[name], **values})
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


KERNELS = {"fused_forward", "fused_positions", "fused_weights"}


def check(problem, launched, *, units=None, deterministic=False, **keywords):
    launched.clear()
    results = {"y": problem.forward(emulated_gpu, **keywords)}
    gradients = problem.backward(emulated_gpu, deterministic=deterministic, **keywords)
    assert set(launched) >= KERNELS
    assert ("add_in_order" in launched) == deterministic
    results |= {name: array for name, array in gradients._asdict().items() if array is not None}
    wanted = {"y": problem.expected_forward(), **problem.expected_backward()._asdict()}
    scales = problem.scales()
    assert set(results) == {name for name, array in wanted.items() if array is not None}
    for name, got in results.items():
        like = {"offset": problem.offset, "mask": problem.mask}.get(name, problem.x)
        assert got.dtype == like.dtype
        what = f"{name} of {problem}"
        assert_close(got, wanted[name], got.dtype, scales[name], units=units, what=what)


def all_results(problem, **keywords):
    """y and every gradient that always has the same bits."""
    return problem.forward(emulated_gpu), *problem.backward(emulated_gpu, deterministic=True, **keywords)


def assert_same_bits(some, others):
    for one, other in zip(some, others, strict=True):
        assert (one is None) == (other is None)
        assert one is None or np.array_equal(one, other)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(monkeypatch, launched, name, dtype):
    number = list(CASES).index(name)
    monkeypatch.setattr(emulated_gpu, "order", ORDERS[number % 3])
    check(problem_of(name, number, dtype), launched, deterministic=number % 2 == 0)


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

        def choose(device, geometry, launches, seconds, number=number, counts=counts):
            counts.append(len(launches))
            return launches[min(number, len(launches) - 1)]

        monkeypatch.setattr(tuning, "chosen", choose)
        results.append(function())
        number += 1
        if number >= max(counts):
            assert number > 1
            return results


@pytest.mark.parametrize("name", ["3x3", "groups", "many outputs", "many channels"])
@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=str)
def test_no_tile_changes_a_bit(monkeypatch, name, dtype):
    problem = problem_of(name, 4, dtype)
    first, *others = choices(monkeypatch, lambda: all_results(problem))
    for other in others:
        assert_same_bits(first, other)


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=str)
def test_the_order_of_threads_changes_no_bit(monkeypatch, dtype):
    problem, results = problem_of("offset groups", 5, dtype), []
    for order in ORDERS:
        monkeypatch.setattr(emulated_gpu, "order", order)
        results.append(all_results(problem))
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_a_grid_without_room_is_launched_in_pieces(monkeypatch, launched):
    problem = problem_of("3x3", 6)
    results = all_results(problem)
    monkeypatch.setattr(engine, "MOST_BLOCKS", 1)
    launched.clear()
    assert_same_bits(all_results(problem), results)
    assert launched.count("fused_forward") > 1
    assert launched.count("fused_positions") > 1


def test_sums_over_many_positions_are_cut_into_parts(monkeypatch, launched):
    monkeypatch.setattr(engine, "_POSITIONS_PER_PART", 60)
    for dtype in (FLOAT16, FLOAT32):
        check(problem_of("one image", 6, dtype, extent=(25, 28)), launched)


def test_images_of_a_batch_do_not_meet():
    problem = problem_of("many images in a tile", 7)
    whole, gradients = problem.forward(emulated_gpu), problem.backward(emulated_gpu, deterministic=True)
    for image in range(problem.x.shape[0]):
        alone = problem.map_arrays(
            lambda a, image=image: a[image : image + 1].copy() if a.shape[0] == problem.x.shape[0] else a
        )
        assert np.array_equal(alone.forward(emulated_gpu)[0], whole[image])
        mine = alone.backward(emulated_gpu, deterministic=True)
        for name in ("x", "offset", "mask"):
            assert np.array_equal(getattr(mine, name)[0], getattr(gradients, name)[image])


def test_what_is_not_needed_is_none(launched):
    problem = problem_of("offset groups", 8)
    whole = problem.backward(emulated_gpu, deterministic=True)
    for name in whole._fields:
        launched.clear()
        alone = problem.backward(emulated_gpu, needs=(name,), deterministic=True)
        assert [field for field in alone._fields if getattr(alone, field) is not None] == [name]
        assert np.array_equal(getattr(alone, name), getattr(whole, name))
        wanted = {"weight": {"fused_weights"}, "bias": set()}.get(name, {"fused_positions"})
        assert KERNELS & set(launched) == wanted


# ---- memory orders


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"misaligned"}))
def test_any_memory_order(layout):
    problem = problem_of("3x3", 8)
    assert_same_bits(all_results(problem.map_arrays(LAYOUTS[layout])), all_results(problem))


def test_images_off_a_border_of_16_bytes_are_copied(launched):
    problem = problem_of("3x3", 8)

    def shifted(array):
        flat = np.zeros(array.size + 1, array.dtype)
        last = flat[1:].reshape(array.shape[0], *array.shape[2:], array.shape[1])
        last[...] = np.moveaxis(array, 1, -1)
        return np.moveaxis(last, -1, 1)

    on_gpu = emulated_gpu.on_gpu
    try:
        emulated_gpu.on_gpu = lambda a: None if a is None else emulated_gpu.ndarray(a)
        moved = problem.replace(x=shifted(problem.x), grad_output=shifted(problem.grad_output))
        assert moved.x.ctypes.data % 16
        results = all_results(moved)
    finally:
        emulated_gpu.on_gpu = on_gpu
    assert_same_bits(results, all_results(problem))


def test_channels_last_images_are_read_in_place(launched):
    problem = problem_of("3x3", 9, FLOAT32)
    last = problem.map_arrays(LAYOUTS["channels_last"])
    # Of the copies one packs the weights.
    for given, copies in ((last, 1), (problem, 2)):
        launched.clear()
        given.forward(emulated_gpu)
        assert launched == ["copy"] * copies + ["fused_forward"]
    for given, copies in ((last, 1), (problem, 3)):
        launched.clear()
        given.backward(emulated_gpu, needs=("x", "offset", "mask"))
        assert launched[: copies + 1] == ["copy"] * copies + ["fused_positions"]
        assert launched[copies + 1 :] == ([] if given is last else ["copy_sums"])


# ---- where the fused kernels apply


A100 = types.SimpleNamespace(architecture=80, most_shared=163 * 1024, multiprocessors=108)
H100 = types.SimpleNamespace(architecture=90, most_shared=227 * 1024, multiprocessors=132)
SMALL_GPU = types.SimpleNamespace(architecture=86, most_shared=99 * 1024, multiprocessors=28)
OLD_GPU = types.SimpleNamespace(architecture=75, most_shared=64 * 1024, multiprocessors=40)


def geometry_of(channels=(64, 64), dtype=FLOAT16, rank=2, kernel=3, extent=8, batch=1):
    """A problem of which only the shapes exist."""
    inputs, outputs = channels
    output = (extent - kernel + 1,) * rank
    shapes = {
        "x": (batch, inputs, *(extent,) * rank),
        "offset": (batch, rank * kernel**rank, *output),
        "mask": (batch, kernel**rank, *output),
        "weight": (outputs, inputs, *(kernel,) * rank),
    }
    arrays = [np.broadcast_to(np.zeros((), dtype), shape) for shape in shapes.values()]
    return Geometry.of(cuda.dtypes(), *arrays, None, 1, 0, 1, 1, 1)


def launches_of(geometry, device=H100):
    """What there is to choose from: of y, of the gradients of positions, of that of the weights."""
    return (
        fused.forward_launches(geometry, "strict", device),
        fused.positions_launches(geometry, "strict", device),
        fused.weights_launches(geometry, "strict", device, 1),
    )


# Which of the three kernels apply: all but where one is named.
OTHERS = {
    "channels that leave a step incomplete": ({"channels": (48, 64)}, (False, False, False)),
    "few outputs": ({"channels": (64, 16)}, (False, True, False)),
    "outputs that leave a chunk incomplete": ({"channels": (64, 33)}, (True, False, False)),
    "no channels": ({"channels": (0, 64)}, (False, False, False)),
    "float64": ({"dtype": np.dtype(np.float64)}, (False, False, False)),
    "one axis": ({"rank": 1}, (False, False, False)),
    "three axes": ({"rank": 3}, (False, False, False)),
    "more taps than shared memory holds": ({"kernel": 13, "extent": 20}, (False, True, True)),
    "an image out of reach": ({"extent": 70_000, "channels": (256, 64)}, (False, False, False)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_fused_kernels_leave_to_the_plain_ones(name):
    sizes, applies = OTHERS[name]
    assert tuple(map(bool, launches_of(geometry_of(**sizes)))) == applies


@pytest.mark.parametrize("device", [A100, H100, SMALL_GPU], ids=lambda device: str(device.architecture))
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
def test_every_gpu_since_ampere_has_fused_kernels(dtype, device):
    for kernel in (1, 3, 5):
        for launches in launches_of(geometry_of(dtype=dtype, kernel=kernel), device):
            assert launches
            assert all(launch.shared <= device.most_shared for launch in launches)


def test_an_older_gpu_has_none():
    assert not any(launches_of(geometry_of(), OLD_GPU))


def test_few_positions_get_small_tiles():
    def work(**sizes):
        geometry = geometry_of(channels=(256, 256), **sizes)
        chosen = [tuning.predicted(H100, geometry, launches) for launches in launches_of(geometry)]
        return [
            int(define["DCN_BM"]) * int(define["DCN_BN"])
            for define in (dict(c.module.defines) for c in chosen)
        ]

    few, many = work(extent=16, batch=2), work(extent=56, batch=32)
    assert few[0] < many[0]
    assert few[1] < many[1]


# ---- timing on request


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """A cache of our own, where the second candidate is always the fastest; the kinds timed."""
    monkeypatch.setenv("DCN_NP_CACHE_DIR", str(tmp_path / "cache"))
    modules.cache_folder.cache_clear()
    timed = []

    def seconds(launch):
        timed.append(launch.kernel)
        return float(timed.count(launch.kernel) != 2)

    yield types.SimpleNamespace(timed=timed, seconds=seconds, file=tmp_path / "cache" / "tuned.json")
    modules.cache_folder.cache_clear()


NAMED = types.SimpleNamespace(**vars(H100), name="Some GPU")


def test_without_the_request_nothing_is_timed(tuned, monkeypatch):
    monkeypatch.delenv("DCN_NP_AUTOTUNE", raising=False)
    geometry = geometry_of()
    for launches in launches_of(geometry):
        chosen = tuning.chosen(NAMED, geometry, launches, tuned.seconds)
        assert chosen is tuning.predicted(NAMED, geometry, launches)
    assert not tuned.timed
    assert not tuned.file.exists()


def test_the_fastest_is_remembered(tuned, monkeypatch):
    monkeypatch.setenv("DCN_NP_AUTOTUNE", "1")
    geometry = geometry_of()
    for launches in launches_of(geometry):
        tuned.timed.clear()
        assert tuning.chosen(NAMED, geometry, launches, tuned.seconds) is launches[1]
        assert len(tuned.timed) == len(launches)
    # From now on by everyone, asked to time or not; a new process reads the file.
    monkeypatch.delenv("DCN_NP_AUTOTUNE")
    tuning._read.clear()
    tuned.timed.clear()
    for launches in launches_of(geometry):
        assert tuning.chosen(NAMED, geometry, launches, tuned.seconds) is launches[1]
    other = types.SimpleNamespace(**vars(H100), name="Another GPU")
    launches = launches_of(geometry)[0]
    assert tuning.chosen(other, geometry, launches, tuned.seconds) is tuning.predicted(
        other, geometry, launches
    )
    assert not tuned.timed


@pytest.mark.parametrize("content", ["", "[]", '{"Some GPU": 3}', "{"])
def test_a_damaged_file_is_forgotten(tuned, monkeypatch, content):
    modules.cache_folder()
    tuned.file.write_text(content)
    monkeypatch.setenv("DCN_NP_AUTOTUNE", "1")
    geometry = geometry_of()
    launches = launches_of(geometry)[0]
    assert tuning.chosen(NAMED, geometry, launches, tuned.seconds) is launches[1]
    assert list(json.loads(tuned.file.read_text())) == ["Some GPU"]


def test_in_the_capture_of_a_graph_nothing_is_timed(tuned, monkeypatch):
    monkeypatch.setenv("DCN_NP_AUTOTUNE", "1")
    geometry = geometry_of()
    launches = launches_of(geometry)[0]
    assert tuning.chosen(NAMED, geometry, launches, lambda launch: None) is tuning.predicted(
        NAMED, geometry, launches
    )
    assert not tuned.file.exists()


def test_timing_leaves_the_results_alone(tuned, monkeypatch):
    problem = problem_of("3x3", 10)
    untimed = all_results(problem)
    monkeypatch.setenv("DCN_NP_AUTOTUNE", "1")
    assert_same_bits(all_results(problem), untimed)
    assert len(json.loads(tuned.file.read_text())["emulated"]) == 3
