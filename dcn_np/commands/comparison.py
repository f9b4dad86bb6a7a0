"""How far a result is from the reference, in roundings: the measure that `doctor` and `demo` share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy

from dcn_np import Gradients, reference

Array = Any

INPUTS = ("x", "offset", "mask", "weight", "bias")

# A right result is within about 10 roundings, a wrong one (a tap, a corner or a sign astray) millions away:
# the limit only has to lie clearly between.
ALLOWED_ROUNDINGS = 64.0


class Comparison(NamedTuple):
    """One result beside what it should be."""

    name: str
    roundings: float
    """Largest |result - expected| in units of unit roundoff x summed size of the terms of that element."""

    @property
    def passed(self) -> bool:
        """Whether the result is right; a NaN where a number belongs is not."""
        return bool(self.roundings <= ALLOWED_ROUNDINGS)


def compare(name: str, result: Array, expected: Array, scale: Array | float) -> Comparison:
    """Measure one array, `scale` as of `reference.error_scales`; where that is 0 only the exact value does.

    The smallest normal number comes on top of each unit: below it floating point is coarser than a rounding.
    """
    if result.shape != expected.shape:
        return Comparison(name, numpy.inf)
    with numpy.errstate(all="ignore"):  # a wrong result may hold anything
        difference = numpy.abs(result.astype(numpy.float64) - expected)
        kind, scale = numpy.finfo(result.dtype), numpy.broadcast_to(scale, difference.shape)
        unit = kind.eps / 2 * scale + float(kind.smallest_normal)
        roundings = numpy.divide(
            difference, unit, out=numpy.full_like(difference, numpy.inf), where=scale > 0
        )
    roundings[difference == 0] = 0
    return Comparison(name, float(roundings.max(initial=0.0)))


def compare_with_reference(
    y: Array,
    gradients: Gradients,
    grad_output: Array,
    x: Array,
    offset: Array | None,
    mask: Array | None,
    weight: Array,
    bias: Array,
    **parameters: Any,
) -> list[Comparison]:
    """Measure a result of `modulated_deform_conv` and its gradients against the reference in float64.

    An `offset` of None stands for the rigid grid and a `mask` of None for ones; they have no gradient then.
    """
    arrays = (x, offset, mask, weight)
    expected_y = reference.modulated_deform_conv(*arrays, bias, **parameters, dtype=numpy.float64)
    expected = reference.modulated_deform_conv_backward(
        grad_output, *arrays, **parameters, dtype=numpy.float64
    )
    scales = reference.error_scales(grad_output, *arrays, **parameters, bias=bias)
    comparisons = [compare("y", y, expected_y, scales["y"])]
    for name in INPUTS:
        if getattr(expected, name) is not None:
            found = getattr(gradients, name)
            comparisons.append(compare(f"grad_{name}", found, getattr(expected, name), scales[name]))
    return comparisons
