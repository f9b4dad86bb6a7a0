"""The self-test: a few small problems on each instruction set, against the reference, in about a second."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy

import dcn_np
from dcn_np.commands.comparison import compare_with_reference


class Case(NamedTuple):
    """A problem of the self-test. Extents lie around the vector lengths; some samples fall outside."""

    name: str
    x: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, ...]
    output: tuple[int, ...]
    parameters: dict[str, Any]
    dtype: str = "float32"
    with_offset: bool = True
    with_mask: bool = True


CASES = (
    Case("1-D", (2, 17, 40), 5, (3,), (21,), {"padding": ((2, 1),), "stride": 2}),
    Case("2-D", (2, 16, 13, 11), 24, (3, 3), (13, 11), {"padding": 1}),
    Case(
        "2-D float64", (1, 9, 12, 17), 7, (3, 2), (10, 20), {"padding": (1, 2), "dilation": (2, 1)}, "float64"
    ),
    Case("2-D groups", (2, 12, 9, 10), 8, (3, 3), (9, 10), {"padding": 1, "groups": 4, "offset_groups": 2}),
    Case("2-D depthwise", (1, 20, 14, 15), 20, (3, 3), (14, 15), {"padding": 1, "groups": 20}),
    Case(
        "2-D no mask",
        (1, 8, 10, 12),
        16,
        (3, 3),
        (10, 12),
        {"padding": 1, "offset_groups": 4},
        with_mask=False,
    ),
    Case(
        "2-D rigid", (1, 8, 10, 12), 16, (3, 3), (10, 12), {"padding": 1}, with_offset=False, with_mask=False
    ),
    Case("3-D", (1, 10, 5, 6, 7), 6, (3, 2, 3), (5, 7, 7), {"padding": 1}),
)


class Finding(NamedTuple):
    """The outcome of one case on one instruction set."""

    instruction_set: str
    case: str
    roundings: dict[str, float]  # by result; empty if the case raised
    problem: str | None


def self_test() -> list[Finding]:
    """Run all cases on all available instruction sets."""
    return [examine(isa, case) for isa in dcn_np.available_isas() for case in CASES]


def examine(isa: str, case: Case) -> Finding:
    """Run one case on one instruction set; an exception is a finding, not the end of the test."""
    try:
        with dcn_np.use_isa(isa):
            comparisons = run(case)
    except Exception as error:  # whatever the kernel does wrong belongs in the report
        return Finding(isa, case.name, {}, f"{type(error).__name__}: {error}")
    wrong = [comparison.name for comparison in comparisons if not comparison.passed]
    roundings = {comparison.name: comparison.roundings for comparison in comparisons}
    return Finding(isa, case.name, roundings, f"wrong: {', '.join(wrong)}" if wrong else None)


def run(case: Case) -> list[Any]:
    """Compute a case forward and backward, and compare with the reference."""
    x, offset, mask, weight, bias, grad_output = arrays_of(case)
    y = dcn_np.modulated_deform_conv(x, offset, mask, weight, bias, **case.parameters)
    gradients = dcn_np.modulated_deform_conv_backward(grad_output, x, offset, mask, weight, **case.parameters)
    return compare_with_reference(y, gradients, grad_output, x, offset, mask, weight, bias, **case.parameters)


def arrays_of(case: Case) -> list[Any]:
    """x, offset, mask, weight, bias and grad_output of a case, random but always the same."""
    random = numpy.random.default_rng(7)
    rank, taps = len(case.kernel), int(numpy.prod(case.kernel))
    samples = case.parameters.get("offset_groups", 1) * taps
    shapes: list[tuple[int, ...] | None] = [
        case.x,
        (case.x[0], samples * rank, *case.output) if case.with_offset else None,
        (case.x[0], samples, *case.output) if case.with_mask else None,
        (case.out_channels, case.x[1] // case.parameters.get("groups", 1), *case.kernel),
        (case.out_channels,),
        (case.x[0], case.out_channels, *case.output),
    ]
    return [
        None if shape is None else (2 * random.standard_normal(shape)).astype(case.dtype) for shape in shapes
    ]
