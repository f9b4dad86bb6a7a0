"""On a GPU: the results of thousands of cases, against the reference on the CPU, in float64 at least."""

import ml_dtypes
import numpy as np
import pytest
from hardware import EMULATED, seeds
from problems import DTYPES, HALVES, assert_close, random_problem
from roi_problems import OPERATORS, assert_right, random_roi_problem
from test_gpu_fused import CASES, TF32_UNITS
from test_gpu_fused import problem_of as fused_problem
from test_gpu_regions import NO_REGIONS, check_that_it_is_none, large_problem

import dcn_np

BLOCKS = 40
FLOAT32 = np.dtype(np.float32)


def check(gpu, problem, *, units=None, deterministic=False, **keywords):
    """Results against the reference in the wider dtype."""
    results = {"y": problem.forward(gpu, **keywords)}
    results |= problem.backward(gpu, deterministic=deterministic, **keywords)._asdict()
    wanted = {"y": problem.expected_forward(), **problem.expected_backward()._asdict()}
    scales = problem.scales()
    for name, want in wanted.items():
        got = results[name]
        assert (got is None) == (want is None), name
        if want is not None:
            assert_close(got, want, got.dtype, scales[name], units=units, what=f"{name} of {problem}")


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_rank_and_layout_of_groups(gpu, block):
    for number in seeds(60):
        seed = 1000 * block + number
        kind = {
            "vector_channels": seed % 4 == 1,
            "non_finite": seed % 4 == 2,
            "non_finite_values": seed % 4 == 3,
        }
        check(gpu, random_problem(seed, dtype=DTYPES[seed % 2], **kind), deterministic=seed % 3 == 0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_halves(gpu, rank, dtype):
    for seed in seeds(200):
        problem = random_problem(
            70_000 + seed, rank, np.float32, vector_channels=seed % 2 == 0, special=False
        )
        check(gpu, problem.astype(dtype), deterministic=seed % 3 == 0)


@pytest.mark.parametrize("dtype", [*HALVES, FLOAT32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fused(gpu, name, dtype):
    for seed in seeds(30):
        check(gpu, fused_problem(name, seed, dtype), deterministic=seed % 2 == 0)


@pytest.mark.parametrize("name", CASES)
def test_tf32(gpu, name):
    for seed in seeds(10):
        check(gpu, fused_problem(name, seed, FLOAT32), units=TF32_UNITS, float32_matmul="tf32")


LAYERS = {
    "56x56": {"in_channels": 256, "out_channels": 256, "extent": (56, 56), "batch": 2},
    "100x167": {"in_channels": 128, "out_channels": 128, "extent": (100, 167), "batch": 1},
    "25x42": {"in_channels": 512, "out_channels": 512, "extent": (25, 42), "batch": 2},
    "200x334": {"in_channels": 64, "out_channels": 64, "extent": (200, 334), "batch": 1},
}


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), FLOAT32], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_real_networks(gpu, record, layer, dtype):
    """The relative error of y does not grow with the image."""
    if EMULATED:
        pytest.skip("too large to emulate")
    problem = fused_problem("3x3", 1, dtype, special=False, **LAYERS[layer])
    want = problem.astype(np.float64).forward(dcn_np)
    error = np.linalg.norm(problem.forward(gpu).astype(np.float64) - want) / np.linalg.norm(want)
    record[f"relative error of y, {layer}, {dtype}"] = float(error)
    assert error <= {2: 3e-4 if dtype == np.float16 else 2.4e-3, 4: 1e-6}[dtype.itemsize]


def many_hits(dtype, batch=2, extent=40):
    """Every sample of an image falls on a few pixels: the additions to grad_x meet."""
    problem = fused_problem("3x3", 2, dtype, special=False, batch=batch, extent=(extent, extent))
    rows = np.arange(extent)[:, None] + np.zeros((extent, extent))
    offset = problem.offset.reshape(batch, 9, 2, extent, extent)
    offset[:, :, 0] = extent // 2 - rows + offset[:, :, 0] / 8
    offset[:, :, 1] = extent // 2 - rows.T + offset[:, :, 1] / 8
    return problem


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), FLOAT32, np.dtype(np.float64)], ids=str)
def test_a_hundred_runs_give_the_same_bits(gpu, dtype):
    problem = many_hits(dtype, 1, 16) if EMULATED else many_hits(dtype)
    y, gradients = problem.forward(gpu), problem.backward(gpu, deterministic=True)
    for _ in seeds(100):
        assert np.array_equal(problem.forward(gpu), y)
        again = problem.backward(gpu, deterministic=True)
        assert all(np.array_equal(one, other) for one, other in zip(gradients, again, strict=True))
        loose = problem.backward(gpu)
        for name in ("offset", "mask", "weight", "bias"):
            assert np.array_equal(getattr(loose, name), getattr(gradients, name))


# ---- pooling over regions


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("block", range(10))
def test_regions(gpu, block, operator):
    for number in seeds(100):
        seed = 1000 * block + number
        kind = {
            "vector_channels": seed % 4 == 1,
            "non_finite": seed % 4 == 2,
            "non_finite_values": seed % 4 == 3,
        }
        assert_right(random_roi_problem([seed, 20], operator, DTYPES[seed % 2], **kind), gpu)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_regions_in_halves(gpu, operator, dtype):
    for seed in seeds(100):
        problem = random_roi_problem([seed, 21], operator, np.float32, vector_channels=seed % 2 == 0)
        with np.errstate(over="ignore"):
            assert_right(problem.map_arrays(lambda array: array.astype(dtype)), gpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_large_regions_and_a_hundred_runs(gpu, operator, dtype):
    problem = large_problem(operator, dtype)
    y, gradients = assert_right(problem, gpu)
    for _ in seeds(100):
        assert np.array_equal(problem.forward(gpu), y)
        again = problem.backward(gpu)
        for name in problem.differentiable:
            assert np.array_equal(getattr(again, name), getattr(gradients, name))


@pytest.mark.parametrize("wrong", NO_REGIONS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_no_region_is_nan(gpu, operator, wrong):
    check_that_it_is_none(gpu, operator, NO_REGIONS[wrong])
