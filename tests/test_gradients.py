"""Are the gradients those of the forward? Differences and adjoint identities, of reference and kernels.

Inside a cell the operator is linear in every single number, so a central difference has no truncation error:
only rounding is left, and the bound is 1e-10 of the largest gradient. test_semantics.py pins the kinks.
"""

import numpy as np
import pytest
from problems import IMPLEMENTATIONS, Sizes, fill, implementation, random_problem

STEP = 2.0**-8


@pytest.fixture(params=IMPLEMENTATIONS)
def module(request):
    with implementation(request.param) as module:
        yield module


def sizes(
    extent, kernel, stride=1, padding=(1, 1), dilation=1, *, batch=1, channels=(2, 2), groups=(1, 1), **given
):
    """Sizes with one number for all axes, or one per axis."""
    rank = len(extent)
    stride, dilation = (v if isinstance(v, tuple) else (v,) * rank for v in (stride, dilation))
    padding = padding if isinstance(padding[0], tuple) else (padding,) * rank
    return Sizes(batch, *channels, *groups, extent, kernel, stride, padding, dilation, **given)


CASES = {
    "1d": sizes((6,), (3,), batch=2, channels=(3, 2)),
    "1d strided, dilated, groups": sizes((9,), (2,), 2, (3, 0), 3, channels=(4, 4), groups=(2, 4)),
    "2d": sizes((4, 3), (3, 3)),
    "2d without mask": sizes((4, 3), (3, 2), with_mask=False, with_bias=False),
    "2d rectangular, all parameters": sizes(
        (6, 5), (3, 2), (2, 1), ((2, 0), (0, 1)), (1, 2), batch=2, channels=(4, 2), groups=(2, 2)
    ),
    "2d depthwise": sizes((4, 4), (2, 3), channels=(3, 3), groups=(3, 1)),
    "2d depthwise, an offset group per channel": sizes((3, 4), (2, 2), channels=(3, 6), groups=(3, 3)),
    "2d groups across offset groups": sizes((3, 3), (2, 2), channels=(6, 4), groups=(2, 3)),
    "2d rigid": sizes((4, 4), (3, 3), with_offset=False),
    "2d rigid without mask": sizes(
        (4, 5), (3, 3), channels=(4, 4), groups=(2, 2), with_offset=False, with_mask=False
    ),
    "2d more channels than a vector": sizes((2, 3), (1, 2), channels=(19, 3)),
    "3d": sizes((2, 1, 3), (2, 1, 2)),
    "3d all parameters": sizes(
        (4, 3, 3), (1, 2, 2), (2, 1, 2), ((1, 0), (0, 1), (1, 1)), (1, 2, 1), channels=(4, 2), groups=(2, 2)
    ),
}


def inside_cells(problem):
    """The same problem with every offset's fraction moved into [0.05, 0.95]."""
    if problem.offset is None:
        return problem
    floor = np.floor(problem.offset)
    return problem.replace(offset=floor + 0.05 + 0.9 * (problem.offset - floor))


def difference(problem, module, name, element):
    """d <grad_output, y> / d element, by a central difference."""

    def y(step):
        values = getattr(problem, name).copy()
        values.flat[element] += step
        return problem.replace(**{name: values}).forward(module)

    return np.vdot(problem.grad_output, y(STEP) - y(-STEP)) / (2 * STEP)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_central_differences(case, module):
    problem = inside_cells(fill(CASES[case], np.random.default_rng(len(case)), np.float64, special=False))
    gradients = problem.backward(module)
    for name in problem.differentiable:
        if getattr(problem, name) is None:  # a bias that was not given has a gradient, but nothing to vary
            continue
        gradient = getattr(gradients, name)
        want = [difference(problem, module, name, element) for element in range(gradient.size)]
        want = np.reshape(want, gradient.shape)
        assert np.max(np.abs(want)) > 0
        np.testing.assert_allclose(gradient, want, rtol=0, atol=1e-10 * np.max(np.abs(want)), err_msg=name)


# <grad_output, y> is linear in each of these, whatever the offsets are.
LINEAR = ("x", "mask", "weight", "bias")
ADJOINT = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 1e-5}


def inner(a, b):
    return np.sum(np.multiply(a, b, dtype=np.float64))


def norm(a):
    return np.sqrt(inner(a, a))


def assert_adjoint(problem, name, direction, pushed, pulled):
    """<grad_output, J direction> = <J' grad_output, direction>, to rounding of the products of norms."""
    left, right = inner(problem.grad_output, pushed), inner(pulled, direction)
    scale = norm(problem.grad_output) * norm(pushed) + norm(pulled) * norm(direction)
    assert abs(left - right) <= ADJOINT[problem.dtype] * scale, (name, left, right, problem)


@pytest.mark.parametrize("dtype", ADJOINT, ids=str)
def test_backward_is_the_adjoint_of_what_is_linear(module, dtype):
    """Also on kinks, borders and with offsets outside the image: 100 problems, four identities each."""
    for seed in range(100):
        problem = random_problem(seed, dtype=dtype, vector_channels=seed % 5 == 0)
        rng, gradients = np.random.default_rng(seed), problem.backward(module)
        for name in LINEAR:
            if getattr(problem, name) is None:
                continue
            direction = rng.standard_normal(getattr(problem, name).shape).astype(dtype)
            moved = problem.replace(**{"bias": None, name: direction})
            if name == "bias":
                moved = moved.replace(weight=np.zeros_like(problem.weight))
            assert_adjoint(problem, name, direction, moved.forward(module), getattr(gradients, name))


def test_backward_is_the_adjoint_along_each_axis_of_the_offsets(module):
    """Moving all offsets along one axis, y is linear within the cells: its difference is the derivative."""
    for seed in range(40):
        problem = inside_cells(random_problem(seed, dtype=np.float64, special=False, with_offset=True))
        gradient = problem.backward(module, needs=("offset",)).offset
        axis = np.arange(problem.offset.shape[1]) % problem.rank
        for number in range(problem.rank):
            direction = np.random.default_rng(seed).uniform(-1, 1, problem.offset.shape)
            direction[:, axis != number] = 0
            ahead = problem.replace(offset=problem.offset + STEP * direction).forward(module)
            behind = problem.replace(offset=problem.offset - STEP * direction).forward(module)
            left = inner(problem.grad_output, ahead - behind) / (2 * STEP)
            right = inner(gradient, direction)
            scale = norm(problem.grad_output) * norm(ahead) / STEP + norm(gradient) * norm(direction)
            assert abs(left - right) <= 1e-12 * scale, (left, right, problem)
