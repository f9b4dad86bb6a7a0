"""Does the engine compute what the reference computes, whatever the sizes, parameters, values and layouts?

A seeded sweep, cut into chunks, and hypothesis, which shrinks what it finds. Each case goes through every
instruction set of the machine, with thread count, memory layouts and subset of gradients drawn from its seed.
DCN_NP_FUZZ_CASES=1000000 makes the sweep longer; a failing seed is repeated with `check_case(seed)`.
"""

from __future__ import annotations

import itertools
import os
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import DTYPES, LAYOUTS, NON_FINITE, Problem, assert_close, problems, random_problem

import dcn_np
from dcn_np.threads import exactly

CASES = int(os.environ.get("DCN_NP_FUZZ_CASES", 5000))
CHUNK = 250
THREADS = (1, 1, 1, 2, 2, 3, 7)
NAMES = ("x", "offset", "mask", "weight", "bias")
GAP = -12345.0  # lies between the elements of an array with gaps: never to be read into a result, nor written


# --- cases --------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    y: np.ndarray
    gradients: tuple
    scales: dict


def expected(problem: Problem) -> Expected:
    return Expected(problem.expected_forward(), problem.expected_backward(), problem.scales())


def draw_problem(seed: int) -> Problem:
    """Case `seed` of the sweep: ranks, dtypes, wide channels and non-finite values in fixed proportions."""
    problem = random_problem(
        seed,
        rank=1 + seed % 3,
        dtype=DTYPES[int(seed // 3 % 3 == 2)],
        vector_channels=seed % 8 == 0,
        non_finite=seed % 2 == 1,
        non_finite_values=seed % 10 == 3,
    )
    # Without pixels the results are zeros, and what an infinite mask times none of them is, is not defined.
    if seed % 10 == 3 and problem.mask is not None and problem.mask.size and problem.x.size:
        rng = np.random.default_rng([seed, 1])
        problem.mask.reshape(-1)[rng.integers(problem.mask.size)] = rng.choice(NON_FINITE)
    return problem


def broadcast_somewhere(rng, array: np.ndarray) -> np.ndarray:
    """The first slice of one axis repeated along it, with a stride of zero."""
    axis = int(rng.integers(array.ndim))
    first = array[(slice(None),) * axis + (slice(0, 1),)]
    return np.broadcast_to(first, array.shape) if array.size else array


def relaid(rng, array: np.ndarray, *, gap: float = GAP) -> np.ndarray:
    """The same values in a view of random strides: axes in any order, reversed, spaced out, at any byte."""
    order = rng.permutation(array.ndim)
    steps = rng.choice([1, 1, 1, 2, 3, -1, -2], array.ndim)
    starts, ends = rng.integers(0, 3, (2, array.ndim))
    wide = [
        start + extent * abs(step) + end
        for start, extent, step, end in zip(starts, array.shape, steps, ends, strict=True)
    ]
    data = np.empty(int(np.prod(wide)) * array.itemsize + 64, np.uint8)
    shift = int(rng.integers(64))
    memory = data[shift : len(data) - 64 + shift].view(array.dtype).reshape([wide[axis] for axis in order])
    memory[...] = gap
    inner = memory.transpose(np.argsort(order))[
        tuple(
            slice(start, start + extent * abs(step), abs(step))
            for start, extent, step in zip(starts, array.shape, steps, strict=True)
        )
    ]
    view = inner[tuple(slice(None, None, -1 if step < 0 else 1) for step in steps)]
    view[...] = array
    return view


def any_layout(rng, array: np.ndarray) -> np.ndarray:
    """The array in one of the named layouts, or in one that has no name."""
    name = rng.choice([*LAYOUTS, "random", "random", "random"])
    return relaid(rng, array) if name == "random" else LAYOUTS[name](array)


# --- checks -------------------------------------------------------------------------------------------------


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def check_forward(problem: Problem, want: Expected, units=None, **keywords) -> np.ndarray:
    y = problem.forward(dcn_np, **keywords)
    assert y.dtype == problem.dtype
    assert_close(y, want.y, problem.dtype, want.scales["y"], units=units, what=f"y of {problem}")
    return y


def check_backward(problem: Problem, want: Expected, units=None, **keywords) -> tuple:
    """All gradients that exist are right and have the shape and dtype of their input; the others are None."""
    got = problem.backward(dcn_np, **keywords)
    for name in NAMES:
        if name not in problem.differentiable:
            assert getattr(got, name) is None, f"gradient {name} of {problem}"
            continue
        gradient = getattr(got, name)
        assert gradient.dtype == problem.dtype
        assert_close(
            gradient,
            getattr(want.gradients, name),
            problem.dtype,
            want.scales[name],
            units=units,
            what=f"gradient {name} of {problem}",
        )
    return got


def check_out(rng, problem: Problem, y: np.ndarray, **keywords) -> None:
    """out= is overwritten whole, nothing beside it is, and it gets the bits of the call without it."""
    out = relaid(rng, np.full(y.shape, np.nan, y.dtype))
    base = out.base if out.base is not None else out
    untouched = base.copy()
    assert problem.forward(dcn_np, out=out, **keywords) is out
    assert same_bits(out, y), f"out= of {problem}"
    out[...] = np.nan
    assert same_bits(base, untouched), f"written beside out= of {problem}"


def check_needs(rng, problem: Problem, gradients, **keywords) -> None:
    """A subset of gradients: only those, with the bits that they have among all."""
    needs = [name for name in problem.differentiable if rng.random() < 0.5]
    some = problem.backward(dcn_np, needs=needs, **keywords)
    for name in NAMES:
        gradient = getattr(some, name)
        assert (gradient is not None) == (name in needs), f"needs={needs} gave {name} of {problem}"
        if name in needs:
            assert same_bits(gradient, getattr(gradients, name)), f"{name} with needs={needs} of {problem}"


def check_problem(rng, problem: Problem, want: Expected | None = None) -> Expected:
    """Right on every instruction set; out= and needs= on one of them; the inputs are as before."""
    want = expected(problem) if want is None else want
    problem = problem if rng.random() < 0.4 else problem.map_arrays(lambda array: any_layout(rng, array))
    before = {
        name: getattr(problem, name).tobytes()
        for name in Problem.ARRAYS
        if getattr(problem, name) is not None
    }
    chosen = rng.choice(dcn_np.available_isas())
    for isa in dcn_np.available_isas():
        keywords = {"modulated": bool(rng.random() < 0.5)}
        with dcn_np.use_isa(isa), exactly(int(rng.choice(THREADS))):
            y = check_forward(problem, want, **keywords)
            gradients = check_backward(problem, want, **keywords)
            if isa == chosen:
                check_out(rng, problem, y, **keywords)
                check_needs(rng, problem, gradients, **keywords)
    for name, data in before.items():
        assert getattr(problem, name).tobytes() == data, f"{name} was modified in {problem}"
    return want


def check_case(seed: int) -> Expected:
    rng = np.random.default_rng([seed, 2])
    problem = draw_problem(seed)
    if seed % 11 == 5:
        return check_strided_zero(rng, problem.map_arrays(lambda array: broadcast_somewhere(rng, array)))
    return check_problem(rng, problem)


def check_strided_zero(rng, problem: Problem) -> Expected:
    """Arrays with strides of zero, passed as they are: another layout would have memory of its own."""
    want = expected(problem)
    units = 64  # terms that are all the same are all rounded to the same side
    for isa in dcn_np.available_isas():
        with dcn_np.use_isa(isa), exactly(int(rng.choice(THREADS))):
            check_forward(problem, want, units)
            check_backward(problem, want, units)
    return want


# --- tests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_sweep(first):
    meaningful = 0
    for seed in range(first, min(first + CHUNK, CASES)):
        y = check_case(seed).y
        meaningful += bool(np.count_nonzero(np.isfinite(y) & (y != 0)) > y.size / 2)
    # A sweep of empty results, of zeros and of NaN would compare nothing.
    assert meaningful > 0.4 * CHUNK or first + CHUNK > CASES


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems(), seed=st.integers(0, 2**32 - 1))
def test_small_channels(problem, seed):
    check_problem(np.random.default_rng(seed), problem)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems(vector_channels=True), seed=st.integers(0, 2**32 - 1))
def test_channels_around_vector_widths(problem, seed):
    check_problem(np.random.default_rng(seed), problem)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems(non_finite_values=True), seed=st.integers(0, 2**32 - 1))
def test_values_not_finite(problem, seed):
    check_problem(np.random.default_rng(seed), problem)


@pytest.mark.parametrize("extent", [(2500,), (59, 43), (13, 14, 15)], ids=str)
def test_images_of_many_pixels(extent):
    """Their pixels are copied where tiles first sample them: all over the image, where offsets are long."""
    rank = len(extent)
    for number, dtype in enumerate(DTYPES):
        rng = np.random.default_rng([rank, number])
        problem = random_problem(
            rng,
            rank=rank,
            dtype=dtype,
            batch=2,
            in_channels=4,
            out_channels=3,
            groups=1,
            offset_groups=2,
            extent=extent,
            kernel=(2,) * rank,
            padding=((1, 0),) * rank,
            stride=(1 + number,) * rank,
            dilation=(1,) * rank,
            with_offset=True,
        )
        chosen = rng.random(problem.offset.shape) < 0.1
        problem.offset[chosen] = rng.uniform(-max(extent), max(extent), np.count_nonzero(chosen))
        check_problem(rng, problem)


@pytest.mark.parametrize("multiplier", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64])
def test_depthwise_with_channel_multiplier(channels, multiplier):
    for number, dtype in enumerate(DTYPES):
        problem = random_problem(
            [channels, multiplier, number],
            rank=1 + (channels + multiplier) % 3,
            dtype=dtype,
            batch=2,
            in_channels=channels,
            out_channels=channels * multiplier,
            groups=channels,
            offset_groups=1,
        )
        check_problem(np.random.default_rng(channels), problem)


@pytest.mark.parametrize("channels", [2, 3, 4, 5, 8, 16, 17])
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
@pytest.mark.parametrize("offset_groups", [1, 2, 4])
def test_groups_times_offset_groups(channels, groups, offset_groups):
    """Offset groups within weight groups, weight groups within offset groups, neither; few channels each."""
    step = int(np.lcm(groups, offset_groups))
    problem = random_problem(
        [channels, groups, offset_groups],
        rank=2,
        dtype=DTYPES[channels % 2],
        batch=1,
        in_channels=channels * step if step < 5 else step,
        out_channels=groups * (channels % 4 + 1),
        groups=groups,
        offset_groups=offset_groups,
    )
    check_problem(np.random.default_rng(channels), problem)


@pytest.mark.parametrize("channels", [64, 128, 256])
@pytest.mark.parametrize("offset_groups", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 2])
def test_offset_groups_of_many_channels(rank, offset_groups, channels):
    """Rows of memory of a kilobyte and more, several of them to a pixel."""
    for number, dtype in enumerate(DTYPES):
        problem = random_problem(
            [channels, offset_groups, number],
            rank=rank,
            dtype=dtype,
            batch=2,
            groups=1,
            out_channels=2,
            in_channels=channels * offset_groups,
            offset_groups=offset_groups,
            extent=(4,) * rank,
            kernel=(2,) * rank,
            stride=(1,) * rank,
            dilation=(1,) * rank,
            padding=((1, 0),) * rank,
        )
        check_problem(np.random.default_rng(channels), problem)


def dense_order(array: np.ndarray) -> tuple[int, ...]:
    """The axes from the slowest to the fastest in memory; the array must have no gaps."""
    order = tuple(np.argsort([-abs(stride) for stride in array.strides], kind="stable"))
    assert array.transpose(order).flags.c_contiguous, f"strides {array.strides}, shape {array.shape}: gaps"
    return order


def in_order(array: np.ndarray, order) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_results_follow_the_memory_order_of_inputs(order):
    problem = random_problem(
        5,
        rank=2,
        dtype=np.float32,
        batch=2,
        in_channels=4,
        out_channels=6,
        groups=2,
        offset_groups=2,
        kernel=(2, 3),
        extent=(5, 6),
        stride=(1, 1),
        padding=((1, 1), (1, 1)),
        dilation=(1, 1),
        with_offset=True,
        with_mask=True,
    )
    problem = problem.map_arrays(lambda array: in_order(array, order) if array.ndim == 4 else array)
    assert dense_order(problem.forward(dcn_np)) == order
    gradients = problem.backward(dcn_np)
    for name in ("x", "offset", "mask", "weight"):
        assert dense_order(getattr(gradients, name)) == order, f"gradient {name}"


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_channels_last_in_channels_last_out(rank):
    problem = random_problem(
        6,
        rank=rank,
        dtype=np.float64,
        batch=2,
        in_channels=5,
        out_channels=3,
        groups=1,
        offset_groups=1,
        extent=(6,) * rank,
        kernel=(2,) * rank,
        stride=(1,) * rank,
        padding=((0, 0),) * rank,
        dilation=(1,) * rank,
    )
    problem = problem.replace(x=LAYOUTS["channels_last"](problem.x))
    wanted = (0, *range(2, rank + 2), 1)
    assert dense_order(problem.forward(dcn_np)) == wanted
    assert dense_order(problem.backward(dcn_np).x) == wanted


def test_an_image_may_lie_anywhere(isa):
    problem = random_problem(7, rank=2, dtype=np.float32, offset_groups=2, groups=1, extent=(9, 9))
    near, far = (problem.replace(x=LAYOUTS[layout](problem.x)) for layout in ("channels_last", "mapped"))
    # Further apart than twice what 32 bits hold: one of the two is far from the engine's memory.
    if abs(near.x.ctypes.data - far.x.ctypes.data) < 2**33:
        pytest.skip("the system maps pages near to small allocations")
    assert same_bits(far.forward(dcn_np), near.forward(dcn_np))
    gradients = near.backward(dcn_np)
    for name, gradient in zip(NAMES, far.backward(dcn_np), strict=True):
        assert gradient is None or same_bits(gradient, getattr(gradients, name)), f"gradient {name}"
