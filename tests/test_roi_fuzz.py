"""Does pooling over regions compute what the reference does, whatever the regions, sizes, values and layouts?

A seeded sweep, each case on every instruction set, with threads and memory layouts drawn from its seed.
DCN_NP_FUZZ_CASES makes it longer; a failing seed is repeated with `check_case(seed)`.
"""

import os

import numpy as np
import pytest
from problems import DTYPES, LAYOUTS
from roi_problems import NAMES, OPERATORS, assert_right, expected, random_roi_problem
from test_fuzz import any_layout, in_order, same_bits

import dcn_np
from dcn_np.threads import exactly

CASES = int(os.environ.get("DCN_NP_FUZZ_CASES", 3000))
CHUNK = 200
THREADS = (1, 1, 2, 3, 7)


def draw_problem(seed):
    return random_roi_problem(
        seed,
        OPERATORS[seed % 4],
        DTYPES[seed // 4 % 2],
        vector_channels=seed % 3 == 0,
        non_finite=seed % 5 == 1,
        non_finite_values=seed % 5 == 2,
    )


def check_case(seed):
    rng = np.random.default_rng([seed, 2])
    problem = draw_problem(seed)
    want = expected(problem)
    problem = problem if rng.random() < 0.4 else problem.map_arrays(lambda array: any_layout(rng, array))
    arrays = [getattr(problem, name) for name in problem.ARRAYS]
    before = [None if array is None else array.tobytes() for array in arrays]
    for isa in dcn_np.available_isas():
        with dcn_np.use_isa(isa), exactly(int(rng.choice(THREADS))):
            _, gradients = assert_right(problem, want=want)
            needs = [name for name in problem.differentiable if rng.random() < 0.5]
            some = problem.backward(dcn_np, needs=needs)
            for name in NAMES:
                assert (getattr(some, name) is not None) == (name in needs), f"{needs} of {problem}"
                if name in needs:
                    assert same_bits(getattr(some, name), getattr(gradients, name)), f"{needs} of {problem}"
    assert before == [None if array is None else array.tobytes() for array in arrays]
    return want[0]


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_sweep(first):
    meaningful = 0
    for seed in range(first, min(first + CHUNK, CASES)):
        y = check_case(seed)
        meaningful += bool(np.count_nonzero(np.isfinite(y) & (y != 0)) > y.size / 2)
    # A sweep of empty results, of zeros and of NaN would compare nothing.
    assert meaningful > 0.4 * CHUNK or first + CHUNK > CASES


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("channels", [1, 16, 63, 64, 65, 129, 260])
def test_channels(isa, operator, channels):
    for seed in range(4):
        assert_right(random_roi_problem([seed, channels], operator, channels=channels))


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_number_of_threads_changes_no_bit(isa, operator):
    for seed in range(6):
        problem = random_roi_problem([seed, 5], operator, np.float32, channels=70)
        results = []
        for threads in (1, 2, 3, 7):
            with exactly(threads):
                y, gradients = problem.forward(dcn_np), problem.backward(dcn_np)
            results.append([y, *(g for g in gradients if g is not None)])
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def large_problem(rng, operator):
    """Enough work for threads, dots enough for several strips of regions, and images for several rounds."""
    ps = operator == "deform_psroi_pool"
    sizes = {"output_dim": 36, "group_size": 2} if ps else {"sampling_ratio": 2}
    problem = random_roi_problem(0, operator, np.float32)
    regions = 700
    x = rng.standard_normal((3, 144, 40, 50), dtype=np.float32)
    corners = rng.uniform(0, 40, (regions, 4)).astype(np.float32)
    corners[:, 2:] = corners[:, :2] + rng.uniform(1, 20, (regions, 2))
    rois = np.concatenate([rng.integers(0, 3, (regions, 1)), corners], axis=1).astype(np.float32)
    offset = rng.standard_normal((regions, 2, 7, 7), dtype=np.float32)
    return problem.replace(
        x=x,
        rois=rois,
        offset=None if operator == "roi_align" else offset,
        mask=rng.random((regions, 1, 7, 7), dtype=np.float32)
        if operator == "modulated_deform_roi_pool"
        else None,
        grad_output=rng.standard_normal((regions, 36 if ps else 144, 7, 7), dtype=np.float32),
        sizes={"output_size": 7, **sizes},
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_region_does_not_depend_on_the_others_nor_on_threads(operator):
    """Of a large call: the same bits with any number of threads, and for one image called alone."""
    problem = large_problem(np.random.default_rng(3), operator)
    with exactly(1):
        y, gradients = problem.forward(dcn_np), problem.backward(dcn_np)
    for threads in (2, 5):
        with exactly(threads):
            assert same_bits(problem.forward(dcn_np), y)
            for one, other in zip(problem.backward(dcn_np), gradients, strict=True):
                assert (one is None and other is None) or same_bits(one, other)
    mine = problem.rois[:, 0] == 1
    alone = {
        name: None if getattr(problem, name) is None else getattr(problem, name)[mine]
        for name in ("rois", "offset", "mask", "grad_output")
    }
    alone["rois"] = alone["rois"] * np.array([0, 1, 1, 1, 1], np.float32)
    single = problem.replace(x=problem.x[1:2], **alone)
    assert same_bits(single.forward(dcn_np), np.ascontiguousarray(y[mine]))
    gradient = single.backward(dcn_np)
    assert same_bits(gradient.x, np.ascontiguousarray(gradients.x[1:2]))
    if problem.offset is not None:
        assert same_bits(gradient.offset, np.ascontiguousarray(gradients.offset[mine]))


@pytest.mark.parametrize("operator", OPERATORS)
def test_many_regions_are_right_too(operator):
    """A sample of the regions of a large call, against the reference."""
    problem = large_problem(np.random.default_rng(4), operator)
    y = problem.forward(dcn_np)
    few = slice(None, None, 97)
    names = ("rois", "offset", "mask", "grad_output")
    sample = problem.replace(
        **{name: None if getattr(problem, name) is None else getattr(problem, name)[few] for name in names}
    )
    np.testing.assert_allclose(y[few], sample.expected_forward(), atol=1e-5)
    gradients, want = problem.backward(dcn_np), sample.expected_backward()
    for name in ("offset", "mask"):
        if name in problem.differentiable:
            np.testing.assert_allclose(getattr(gradients, name)[few], getattr(want, name), atol=1e-3)
    np.testing.assert_allclose(sample.backward(dcn_np).x, want.x, atol=1e-4)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 2, 3)])
def test_results_follow_the_memory_order_of_inputs(order):
    def is_in_order(array):
        return array.transpose(order).flags.c_contiguous

    problem = large_problem(np.random.default_rng(5), "modulated_deform_roi_pool")
    problem = problem.replace(rois=problem.rois[:3], **{
        name: in_order(getattr(problem, name)[:3], order) for name in ("offset", "mask", "grad_output")
    })  # fmt: skip
    problem = problem.replace(x=in_order(problem.x, order))
    assert is_in_order(problem.forward(dcn_np))
    for name, gradient in problem.backward(dcn_np)._asdict().items():
        assert is_in_order(gradient), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout_gives_the_same_bits(layout):
    for operator in OPERATORS:
        problem = random_roi_problem(11, operator, np.float32, channels=20)
        other = problem.map_arrays(LAYOUTS[layout])
        results = [problem.forward(dcn_np), *problem.backward(dcn_np)]
        for one, two in zip(results, [other.forward(dcn_np), *other.backward(dcn_np)], strict=True):
            assert (one is None and two is None) or np.array_equal(one, two)
