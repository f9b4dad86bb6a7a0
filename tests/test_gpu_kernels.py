"""The plain GPU kernels and what launches them, emulated: against the reference, in any order of threads."""

import re
import subprocess
import sys
import types

import emulated
import emulated_gpu
import ml_dtypes
import numpy as np
import pytest
from calls import environment
from problems import (
    DTYPES,
    HALVES,
    RANKS,
    assert_close,
    random_problem,
)

from dcn_np.cuda import engine, launching, modules

ORDERS = (0, 1, 7)  # forward, backward, random


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU that has no fused kernels: test_gpu_fused.py tests those."""
    monkeypatch.setattr(emulated_gpu.Device, "compute_capability", "75")
    with emulated_gpu.emulated_gpu():
        yield
    monkeypatch.undo()


def in_order(monkeypatch, order):
    monkeypatch.setattr(emulated_gpu, "order", order)


def check(problem, **keywords):
    y = problem.forward(emulated_gpu)
    assert y.dtype == problem.dtype
    assert_close(y, problem.expected_forward(), problem.dtype, problem.scales()["y"], what=f"y of {problem}")
    got, want, scales = (
        problem.backward(emulated_gpu, **keywords),
        problem.expected_backward(),
        problem.scales(),
    )
    for name in ("x", "offset", "mask", "weight", "bias"):
        mine, wanted = getattr(got, name), getattr(want, name)
        assert (mine is None) == (wanted is None)
        if wanted is not None:
            given = getattr(problem, name)
            assert mine.dtype == (problem.dtype if given is None else given.dtype)
            assert_close(mine, wanted, mine.dtype, scales[name], what=f"gradient {name} of {problem}")


class Foreign:
    """An array of another library on the GPU, over memory that CuPy takes."""

    __module__ = "other_library"

    def __init__(self, memory):
        self.memory = memory

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self):
        return self.memory


def test_arrays_of_another_library(monkeypatch):
    """CuPy reads them, and the library takes CuPy's results."""
    library = types.ModuleType("other_library")
    library.from_dlpack = Foreign
    monkeypatch.setitem(sys.modules, "other_library", library)
    problem = random_problem(
        0, 2, np.float32, batch=2, with_offset=True, with_mask=True, with_bias=True, special=False
    )
    foreign = emulated_gpu.through(
        lambda array: Foreign(emulated_gpu.on_gpu(array)), lambda result: result.memory.get()
    )
    assert np.array_equal(problem.forward(foreign), problem.forward(emulated_gpu))
    for one, other in zip(problem.backward(foreign), problem.backward(emulated_gpu), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("block", range(40))
def test_against_the_reference(monkeypatch, block):
    in_order(monkeypatch, ORDERS[block % 3])
    for seed in range(20 * block, 20 * block + 20):
        kind = {
            "vector_channels": seed % 4 == 1,
            "non_finite": seed % 4 == 2,
            "non_finite_values": seed % 4 == 3,
        }
        check(random_problem(50_000 + seed, **kind), deterministic=seed % 3 == 0)


@pytest.mark.parametrize("positions", ["same", "float32"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_halves_are_rounded_once(rank, dtype, positions):
    for seed in range(12):
        problem = random_problem(60_000 + seed, rank, vector_channels=seed % 2 == 0, special=False).astype(
            dtype
        )
        if positions == "float32":
            wide = {"offset": problem.offset, "mask": problem.mask}
            problem = problem.replace(
                **{name: array.astype(np.float32) for name, array in wide.items() if array is not None}
            )
        check(problem)


SIZES = {
    "batch": 2,
    "extent": (7, 9),
    "kernel": (3, 3),
    "stride": (1, 1),
    "padding": ((1, 1), (1, 1)),
    "dilation": (1, 1),
}
CHANNELS = [(32, 48, 1, 1), (36, 20, 2, 3), (12, 12, 12, 1), (8, 4, 1, 4), (64, 64, 2, 1)]


def problem_of(channels, seed=0, dtype=np.float32):
    in_channels, out_channels, groups, offset_groups = channels
    return random_problem(
        seed,
        2,
        dtype,
        in_channels=in_channels,
        out_channels=out_channels,
        groups=groups,
        offset_groups=offset_groups,
        with_offset=True,
        with_mask=True,
        with_bias=True,
        special=False,
        **SIZES,
    )


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_the_order_of_threads_changes_no_bit(monkeypatch, channels):
    problem, results = problem_of(channels), []
    for order in ORDERS:
        in_order(monkeypatch, order)
        gradients = problem.backward(emulated_gpu, deterministic=True)
        results.append([problem.forward(emulated_gpu), *gradients])
    for other in results[1:]:
        assert all(np.array_equal(one, another) for one, another in zip(results[0], other, strict=True))


def test_only_grad_x_depends_on_the_order_of_threads(monkeypatch):
    """As a check of the emulation: without deterministic=True the additions to grad_x have no order."""
    problem, results = problem_of(CHANNELS[0]), []
    for order in ORDERS:
        in_order(monkeypatch, order)
        results.append(problem.backward(emulated_gpu))
    assert not all(np.array_equal(results[0].x, other.x) for other in results[1:])
    for name in ("offset", "mask", "weight", "bias"):
        assert all(np.array_equal(getattr(results[0], name), getattr(other, name)) for other in results[1:])


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_a_grid_without_room_is_launched_in_pieces(monkeypatch, channels):
    problem = problem_of(channels)
    y, gradients = problem.forward(emulated_gpu), problem.backward(emulated_gpu, deterministic=True)
    monkeypatch.setattr(engine, "MOST_BLOCKS", 1)
    monkeypatch.setattr(engine, "_COLUMNS_BYTES", 9 * problem.x.shape[1] * 4 * 17)
    assert np.array_equal(problem.forward(emulated_gpu), y)
    again = problem.backward(emulated_gpu, deterministic=True)
    assert all(np.array_equal(one, another) for one, another in zip(gradients, again, strict=True))


def test_sums_over_many_positions_are_cut_into_parts(monkeypatch):
    problem = problem_of(CHANNELS[1])
    monkeypatch.setattr(engine, "_POSITIONS_PER_PART", 30)
    check(problem)


LAYOUTS = {
    "channels last": lambda a: np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1),
    "reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "batch inside": lambda a: np.moveaxis(np.moveaxis(a, 0, -1).copy(), -1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_order(layout):
    problem = problem_of(CHANNELS[1])

    def other(array):
        return LAYOUTS[layout](array) if array.ndim > 1 else array[::-1].copy()[::-1]

    laid_out = problem.map_arrays(other)
    y = laid_out.forward(emulated_gpu)
    assert np.array_equal(y, problem.forward(emulated_gpu))
    if layout == "channels last":
        assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    some = laid_out.backward(emulated_gpu, deterministic=True)
    others = problem.backward(emulated_gpu, deterministic=True)
    assert all(np.array_equal(one, another) for one, another in zip(some, others, strict=True))


def test_channels_last_images_are_read_in_place(monkeypatch):
    launched = []
    launch = emulated_gpu.Function.__call__

    def counted(function, *arguments, **keywords):
        launched.append(function.name)
        launch(function, *arguments, **keywords)

    monkeypatch.setattr(emulated_gpu.Function, "__call__", counted)
    problem = problem_of(CHANNELS[0])
    problem.map_arrays(lambda a: LAYOUTS["channels last"](a) if a.ndim > 1 else a).forward(emulated_gpu)
    assert launched == ["copy", "tiled_forward"]  # the copy packs the weights
    launched.clear()
    problem.forward(emulated_gpu)
    assert launched == ["copy", "copy", "tiled_forward"]


def test_out_is_written_to():
    problem = problem_of(CHANNELS[0])
    out = np.full(problem.grad_output.shape, 7, np.float32)
    y = problem.forward(emulated_gpu, out=out)
    assert y is out
    assert np.array_equal(y, problem.forward(emulated_gpu))


def test_what_is_not_needed_is_none():
    problem = problem_of(CHANNELS[1])
    whole = problem.backward(emulated_gpu, deterministic=True)
    for name in whole._fields:
        alone = problem.backward(emulated_gpu, needs=(name,), deterministic=True)
        assert [field for field in alone._fields if getattr(alone, field) is not None] == [name]
        assert np.array_equal(getattr(alone, name), getattr(whole, name))


RECORDS = {
    "arguments.hpp": ("Arguments", launching.ARGUMENTS_DTYPE),
    "roi_arguments.hpp": ("RoIArguments", launching.ROI_ARGUMENTS_DTYPE),
}


@pytest.mark.parametrize("header", RECORDS)
def test_arguments_have_one_layout_in_python_and_cpp(header):
    name, dtype = RECORDS[header]
    module = emulated.compiled(emulated.KERNELS / "copies.cu", {"DCN_T": "float"})
    assert module.arguments_sizes[name] == dtype.itemsize
    text = (emulated.KERNELS / header).read_text()
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.DOTALL).group(1)
    types = r"RoIGeometry|Geometry|Array|const void\*|void\*|int64_t"
    names = [
        field.strip(" *")
        for several in re.findall(rf"^  (?:{types}) ([^;]+);", body, re.MULTILINE)
        for field in several.split(",")
    ]
    assert names == list(dtype.names)


def test_types_have_the_names_of_dtypes():
    known = {str(dtype) for dtype in (*DTYPES, np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))}
    assert set(modules.TYPES) == known


def test_the_tests_for_a_gpu_run():
    """A rehearsal of `make test-gpu`, of a few cases of each kind; what needs a GPU is skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    some = "groups[0] or regions[0 or halves or hundred or 3x3 or region[roi_align or test_device"
    done = subprocess.run(
        [*command, "-k", some],
        env=environment(DCN_NP_TEST_GPU="emulated"),
        cwd=emulated.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 10
