"""How large are the errors of rounding, in units of u * D, and do they stay within what the project allows?

u is the unit roundoff of the dtype; D, from `reference.error_scales`, is the sum of the sizes of a result's
terms. A figure in these units does not depend on the size of the image, nor on that of the values. The truth
is the reference in the next wider dtype. benchmarks/accuracy.py prints the figures as a table.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from problems import DTYPES, Problem, error_in_units, random_problem

import dcn_np

MOST_UNITS = {"y": 8, "x": 16, "offset": 16, "mask": 16, "weight": 16, "bias": 16}

# Few positions and output channels, so that the reference has time for many terms: what sums over channels,
# what sums over positions, what lies far from the origin. Kernel 3 and stride 1 unless said otherwise.
CASES: dict[str, dict] = {
    "9 x 512": {"extent": (9, 8), "in_channels": 512, "out_channels": 6, "stride": (2, 2)},
    "1 x 512": {"extent": (9, 8), "in_channels": 512, "out_channels": 5, "kernel": (1, 1)},
    "512 outputs": {"extent": (7, 6), "in_channels": 5, "out_channels": 512},
    "groups": {"extent": (9, 9), "in_channels": 256, "out_channels": 8, "groups": 4, "offset_groups": 2},
    "positions": {"extent": (60, 65), "in_channels": 3, "out_channels": 4},
    "depthwise": {"extent": (30, 35), "in_channels": 18, "out_channels": 18, "groups": 18},
    "volume": {"extent": (6, 7, 5), "in_channels": 32, "out_channels": 6, "stride": (2, 2, 2)},
    "line": {"extent": (4000,), "in_channels": 8, "out_channels": 5, "stride": (3,)},
    "width 64": {"extent": (2, 64), "in_channels": 12, "out_channels": 6, "stride": (1, 4), "batch": 1},
    "width 8192": {"extent": (2, 8192), "in_channels": 12, "out_channels": 6, "stride": (1, 512), "batch": 1},
    "width 65536": {
        "extent": (2, 65536),
        "in_channels": 12,
        "out_channels": 6,
        "stride": (1, 4096),
        "batch": 1,
    },
    "length 64": {"extent": (64,), "in_channels": 64, "out_channels": 6, "kernel": (9,), "batch": 1},
    # Terms of y in one, two and many pieces, or just more than that, and many results of each.
    "9 x 5": {"extent": (400,), "in_channels": 5, "out_channels": 8, "kernel": (9,)},
    "9 x 14": {"extent": (400,), "in_channels": 14, "out_channels": 8, "kernel": (9,)},
    "9 x 28": {"extent": (400,), "in_channels": 28, "out_channels": 8, "kernel": (9,)},
    "9 x 64": {"extent": (400,), "in_channels": 64, "out_channels": 8, "kernel": (9,)},
    "9 x 136": {"extent": (400,), "in_channels": 136, "out_channels": 8, "kernel": (9,)},
    "length 65536": {
        "extent": (65536,),
        "in_channels": 24,
        "out_channels": 6,
        "kernel": (9,),
        "stride": (1024,),
        "batch": 1,
    },
    "depthwise, 500 taps": {
        "extent": (520,),
        "in_channels": 18,
        "out_channels": 18,
        "groups": 18,
        "kernel": (500,),
    },
}
SIGNS = ("random", "positive")


def make(name: str, signs: str, dtype) -> Problem:
    sizes = CASES[name]
    rank = len(sizes["extent"])
    same = {
        "batch": 2,
        "groups": 1,
        "offset_groups": 1,
        "kernel": (3,) * rank,
        "stride": (1,) * rank,
        "padding": ((1, 1),) * rank,
        "dilation": (1,) * rank,
        "with_offset": True,
        "with_mask": True,
        "with_bias": True,
    }
    problem = random_problem([*CASES].index(name), rank=rank, dtype=dtype, special=False, **{**same, **sizes})
    return problem if signs == "random" else positive(problem)


def positive(problem: Problem) -> Problem:
    """Every term of a sum of the same sign: nothing cancels, and rounding in one direction adds up."""
    return problem.map_arrays(np.abs).replace(offset=problem.offset)


@functools.lru_cache(maxsize=2)
def truth(name: str, signs: str, dtype) -> tuple:
    problem = make(name, signs, dtype)
    return problem, problem.expected_forward(), problem.expected_backward(), problem.scales()


def measure(name: str, signs: str, dtype) -> dict[str, float]:
    """The largest error of y and of each gradient, in units of u * D, on the instruction set in use."""
    problem, y, gradients, scales = truth(name, signs, dtype)
    got = problem.backward(dcn_np)
    errors = {"y": error_in_units(problem.forward(dcn_np), y, dtype, scales["y"])}
    for key in problem.differentiable:
        errors[key] = error_in_units(getattr(got, key), getattr(gradients, key), dtype, scales[key])
    return errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("name", CASES)
def test_error(name, signs, dtype):
    for isa in dcn_np.available_isas():
        with dcn_np.use_isa(isa):
            errors = measure(name, signs, dtype)
        too_large = {key: error for key, error in errors.items() if not error <= MOST_UNITS[key]}
        assert not too_large, f"{isa}: {too_large} units"
        assert any(errors.values()), "an engine without any error computes in another precision"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_error_does_not_depend_on_the_position(axis, dtype):
    """The same two pixels at places 2^16 apart: a coordinate held in one number would lose 16 bits."""
    for fraction in (0.1, 0.7, 1 - 2.0**-20, 2.0**-23):
        values = [one_sample(axis, place, fraction, dtype) for place in (0, 1000, 65536)]
        assert values[0] == values[1] == values[2]
        assert values[0] == pytest.approx(0.3 - 2 * fraction, rel=1e-5, abs=1e-6)


def one_sample(axis: int, place: int, fraction: float, dtype) -> float:
    """Between the pixels at `place` and `place` + 1 of an axis, seen by an output at `place` + 2."""
    extent, stride = [1, 1], [1, 1]
    extent[axis], stride[axis] = place + 3, place + 2
    x = np.zeros((1, 1, *extent), dtype)
    x.reshape(-1)[place : place + 2] = 0.3, -1.7
    outputs = [1, 1]
    outputs[axis] = 2
    offset = np.zeros((1, 2, *outputs), dtype)
    offset[0, axis].reshape(-1)[1] = dtype.type(fraction) - 2
    y = dcn_np.deform_conv(x, offset, np.ones((1, 1, 1, 1), dtype), None, tuple(stride))
    return float(y.reshape(-1)[1])
