"""float16 and bfloat16 on the CPU: exactly what float32 gives, rounded once."""

import ml_dtypes
import numpy as np
import pytest
from calls import python
from problems import HALVES, LAYOUTS, RANKS, assert_backward, assert_forward, random_problem

import dcn_np

BY_DTYPE = pytest.mark.parametrize("dtype", HALVES, ids=str)


def half_problem(seed, dtype, rank=None, *, wide_positions=False, **kind):
    problem = random_problem(seed, rank, np.float32, **kind)
    with np.errstate(over="ignore"):  # huge offsets become infinite
        half = problem.astype(dtype)
    if wide_positions:
        positions = {"offset": half.offset, "mask": half.mask}
        half = half.replace(**{name: a.astype(np.float32) for name, a in positions.items() if a is not None})
    return half


def assert_rounded(halves, floats, like):
    """Each is the other rounded to its dtype, NaN where it is NaN."""
    for half, wide, given in zip(halves, floats, like, strict=True):
        assert (half is None) == (wide is None)
        if half is None:
            continue
        assert half.dtype == given.dtype
        with np.errstate(over="ignore", invalid="ignore"):
            assert np.array_equal(half.astype(np.float32), wide.astype(half.dtype).astype(np.float32), True)


def same_bits(one, other):
    return (one is None and other is None) or one.tobytes() == other.tobytes()


def check_rounded(problem, **keywords):
    wide = problem.astype(np.float32)
    assert_rounded([problem.forward(dcn_np)], [wide.forward(dcn_np)], [problem.x])
    like = (problem.x, problem.offset, problem.mask, problem.weight, problem.x)
    assert_rounded(problem.backward(dcn_np, **keywords), wide.backward(dcn_np, **keywords), like)


@BY_DTYPE
@pytest.mark.parametrize("wide_positions", [False, True], ids=["half positions", "float32 positions"])
@pytest.mark.parametrize("rank", RANKS)
def test_exactly_what_float32_gives(isa, rank, wide_positions, dtype):
    for seed in range(40):
        kind = {
            "vector_channels": seed % 4 == 1,
            "non_finite": seed % 4 == 2,
            "non_finite_values": seed % 4 == 3,
        }
        check_rounded(half_problem(90_000 + seed, dtype, rank, wide_positions=wide_positions, **kind))


@BY_DTYPE
def test_against_the_reference(isa, dtype):
    for seed in range(40):
        problem = half_problem(91_000 + seed, dtype, vector_channels=seed % 2 == 0)
        assert_forward(problem, dcn_np)
        assert_backward(problem, dcn_np)


@BY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_order(layout, dtype):
    for seed in range(10):
        problem = half_problem(92_000 + seed, dtype)
        other = problem.map_arrays(LAYOUTS[layout])
        assert np.array_equal(problem.forward(dcn_np), other.forward(dcn_np), True)
        for one, two in zip(problem.backward(dcn_np), other.backward(dcn_np), strict=True):
            assert (one is None and two is None) or np.array_equal(
                one.astype(np.float32), two.astype(np.float32), True
            )


@BY_DTYPE
def test_results_follow_the_memory_order_and_out(dtype):
    problem = half_problem(3, dtype, 2, batch=2, in_channels=8, groups=1, offset_groups=1)
    last = problem.map_arrays(LAYOUTS["channels_last"])
    y = last.forward(dcn_np)
    assert np.moveaxis(y, 1, -1).flags.c_contiguous
    out = np.zeros_like(problem.grad_output)
    assert problem.forward(dcn_np, out=out) is out
    assert np.array_equal(out, y)


@BY_DTYPE
def test_the_number_of_threads_changes_no_bit(dtype):
    problem = half_problem(4, dtype, 2, batch=3, in_channels=48, groups=1, offset_groups=2, extent=(20, 30))
    results = []
    for threads in (1, 2, 3):
        with dcn_np.num_threads(threads):
            results.append([problem.forward(dcn_np), *problem.backward(dcn_np)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@BY_DTYPE
def test_every_number_survives(isa, dtype):
    """A 1 x 1 convolution with weight 1: each of the 65536 bit patterns goes in and comes out."""
    x = np.arange(65536, dtype=np.uint16).view(dtype).reshape(1, 1, 256, 256)
    one = np.ones((1, 1, 1, 1), dtype)
    for layout in ("contiguous", "every_second"):
        y = dcn_np.deform_conv(LAYOUTS[layout](x), None, one)
        with np.errstate(invalid="ignore"):
            assert np.array_equal(y.astype(np.float32), x.astype(np.float32), True)


@BY_DTYPE
def test_rounding_is_to_nearest_even(isa, dtype):
    """bias = 0 and weight = 1 beside a second channel: every sum of two halves, rounded once."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 65536, (1, 2, 64, 512), dtype=np.uint16).view(dtype)
    y = dcn_np.deform_conv(x, None, np.ones((1, 2, 1, 1), dtype))
    with np.errstate(invalid="ignore"):  # at a signalling NaN some processors say so
        wide = x.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        want = (wide[:, :1] + wide[:, 1:]).astype(dtype)
    assert np.array_equal(y.astype(np.float32), want.astype(np.float32), True)


def test_bfloat16_is_unknown_until_ml_dtypes_is_imported():
    code = "import dcn_np.cpu as c, sys; a = len(c.dtypes()); import ml_dtypes; print(a, len(c.dtypes()))"
    assert python(code) == "3 4"


def test_half_offsets_need_half_images():
    x = np.zeros((1, 1, 4, 4), np.float32)
    offset = np.zeros((1, 2, 4, 4), np.float16)
    with pytest.raises(TypeError, match="offset has dtype float16 but x has float32"):
        dcn_np.deform_conv(x, offset, np.zeros((1, 1, 1, 1), np.float32))
    half = x.astype(np.float16)
    with pytest.raises(TypeError, match="weight has dtype float32"):
        dcn_np.deform_conv(half, offset, np.zeros((1, 1, 1, 1), np.float32))
    with pytest.raises(TypeError, match="offset has dtype bfloat16"):
        dcn_np.deform_conv(half, offset.astype(ml_dtypes.bfloat16), np.zeros((1, 1, 1, 1), np.float16))
