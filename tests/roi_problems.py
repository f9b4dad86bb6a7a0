"""Problems of pooling over regions, as problems.py has them for convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from problems import DTYPES, NON_FINITE, VECTOR_CHANNELS, WIDER, _put_some, assert_close

import dcn_np
from dcn_np import reference

OPERATORS = ("roi_align", "deform_roi_pool", "modulated_deform_roi_pool", "deform_psroi_pool")
POSITIONS = {"roi_align": (), "deform_psroi_pool": ("offset",), "deform_roi_pool": ("offset",)}
NAMES = ("x", "offset", "mask")


@dataclass(frozen=True, eq=False, repr=False)
class RoIProblem:
    """One call of a forward and of its backward. `offset` and `mask` may be None."""

    operator: str
    x: np.ndarray
    rois: np.ndarray
    offset: np.ndarray | None
    mask: np.ndarray | None
    grad_output: np.ndarray
    sizes: dict[str, Any]
    note: str = ""

    ARRAYS: ClassVar = ("x", "rois", "offset", "mask", "grad_output")

    @property
    def dtype(self) -> np.dtype:
        return self.x.dtype

    @property
    def arguments(self) -> tuple:
        """The arrays of the forward."""
        positions = POSITIONS.get(self.operator, ("offset", "mask"))
        return self.x, self.rois, *(getattr(self, name) for name in positions)

    @property
    def differentiable(self) -> tuple[str, ...]:
        positions = POSITIONS.get(self.operator, ("offset", "mask"))
        return ("x", *(name for name in positions if getattr(self, name) is not None))

    def replace(self, **changes) -> RoIProblem:
        return dataclasses.replace(self, **changes)

    def map_arrays(self, function: Callable[[np.ndarray], np.ndarray]) -> RoIProblem:
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        return self.replace(**{name: function(array) for name, array in arrays.items() if array is not None})

    def forward(self, module, **keywords):
        return getattr(module, self.operator)(*self.arguments, **self.sizes, **keywords)

    def backward(self, module, **keywords):
        function = getattr(module, f"{self.operator}_backward")
        return function(self.grad_output, *self.arguments, **self.sizes, **keywords)

    def expected_forward(self):
        return self.forward(reference, dtype=WIDER[self.dtype])

    def expected_backward(self):
        return self.backward(reference, dtype=WIDER[self.dtype])

    def scales(self) -> dict:
        return reference.roi_error_scales(self.operator, self.grad_output, *self.arguments, **self.sizes)

    def __repr__(self) -> str:
        shapes = {n: getattr(self, n).shape for n in self.ARRAYS if getattr(self, n) is not None}
        return (
            f"{self.operator}({self.dtype}, {shapes}, {self.sizes}, rois={self.rois.tolist()}, {self.note})"
        )


def random_rois(rng, count: int, batch: int, extent: tuple[int, int], scale: float, dtype) -> np.ndarray:
    """Regions in and around the maps: on the lattice, outside, inverted, of no size, many times as large."""
    height, width = extent
    size = np.array([width, height, width, height]) / scale
    corners = rng.uniform(-0.3, 1.3, (count, 4)) * size
    kind = rng.integers(0, 12, count)
    ordered = np.concatenate(
        [np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], axis=1
    )
    corners[kind < 9] = ordered[kind < 9]
    lattice = (np.round(corners * scale * 2) / 2 + rng.choice([0, 0.5])) / scale
    corners[kind == 1] = lattice[kind == 1]
    corners[kind == 2] += 3 * size  # outside
    corners[kind == 3, 2:] = corners[kind == 3, :2]  # of no size
    corners[kind == 4] *= 12
    image = rng.integers(0, max(batch, 1), (count, 1))
    return np.concatenate([image, corners], axis=1).astype(dtype)


def random_offset(rng, shape, dtype, *, non_finite: bool) -> np.ndarray:
    offset = rng.normal(0, 2, shape).astype(dtype)
    offset[rng.random(shape) < 0.2] = 0
    if offset.size and rng.random() < 0.2:
        _put_some(rng, offset, (1e19, -1e30, 3e38))
    if offset.size and non_finite:
        _put_some(rng, offset, NON_FINITE)
    return offset


def random_roi_problem(
    seed,
    operator: str | None = None,
    dtype=None,
    *,
    vector_channels: bool = False,
    non_finite: bool = False,
    non_finite_values: bool = False,
    channels: int | None = None,
) -> RoIProblem:
    """A problem from a seed; see `problems.random_problem`."""
    rng = np.random.default_rng(seed)

    def integer(low, high):
        return int(rng.integers(low, high + 1))

    operator = OPERATORS[integer(0, 3)] if operator is None else operator
    dtype = np.dtype(DTYPES[integer(0, 1)] if dtype is None else dtype)
    ps = operator == "deform_psroi_pool"
    batch, height, width = integer(1, 3), integer(0 if integer(0, 9) == 9 else 1, 9), integer(1, 12)
    count = integer(0 if integer(0, 9) == 9 else 1, 4)
    classes, group = (integer(1, 3), integer(1, 3)) if ps else (1, 1)
    outputs = VECTOR_CHANNELS[integer(0, len(VECTOR_CHANNELS) - 1)] if vector_channels else integer(1, 5)
    outputs = classes * (outputs if channels is None else channels)
    output = integer(1, 4), integer(1, 4)
    scale = float(rng.choice([1.0, 0.5, 0.25, 1 / 16, 0.3]))
    sizes = {"output_size": output, "spatial_scale": scale}
    part = output
    if ps:
        part = (integer(1, 4), integer(1, 4)) if integer(0, 1) else output
        sizes |= {"output_dim": outputs, "group_size": group, "part_size": part}
        sizes |= {"sample_per_part": integer(1, 4), "trans_std": float(rng.choice([0.1, 0.3, -0.2, 0.0]))}
    else:
        sizes |= {"sampling_ratio": integer(0, 4) if integer(0, 9) else 20}
    if operator in ("deform_roi_pool", "modulated_deform_roi_pool"):
        sizes |= {"gamma": float(rng.choice([0.1, 0.3, -0.2, 0.0]))}
    with_offset = operator != "roi_align" and integer(0, 5) < 5
    mask = rng.standard_normal((count, 1, *output)).astype(dtype)
    mask[rng.random(mask.shape) < 0.15] = 0
    problem = RoIProblem(
        operator=operator,
        x=rng.standard_normal((batch, outputs * group**2, height, width)).astype(dtype),
        rois=random_rois(rng, count, batch, (height, width), scale, dtype),
        offset=random_offset(rng, (count, 2 * classes, *part), dtype, non_finite=non_finite)
        if with_offset
        else None,
        mask=mask if operator == "modulated_deform_roi_pool" and integer(0, 5) < 5 else None,
        grad_output=rng.standard_normal((count, outputs, *output)).astype(dtype),
        sizes=sizes,
        note=f"seed={seed}",
    )
    if ps and not with_offset:
        problem.sizes["part_size"] = None
    if non_finite_values:
        for array in (problem.x, problem.grad_output, problem.mask):
            if array is not None and array.size and rng.random() < 0.5:
                _put_some(rng, array, NON_FINITE)
    return problem


def assert_right(problem: RoIProblem, module=dcn_np, want=None) -> tuple:
    """Forward and backward of a module are the reference's; returns (y, gradients)."""
    want = expected(problem) if want is None else want
    wanted_y, wanted_gradients, scales = want
    y, gradients = problem.forward(module), problem.backward(module)
    assert y.dtype == problem.dtype
    assert_close(y, wanted_y, problem.dtype, scales["y"], what=f"y of {problem}")
    for name in NAMES:
        gradient, wanted = getattr(gradients, name), getattr(wanted_gradients, name)
        assert (gradient is not None) == (name in problem.differentiable), f"{name} of {problem}"
        if gradient is None:
            continue
        assert gradient.dtype == problem.dtype
        assert_close(gradient, wanted, problem.dtype, scales[name], what=f"gradient {name} of {problem}")
    return y, gradients


def expected(problem: RoIProblem) -> tuple:
    return problem.expected_forward(), problem.expected_backward(), problem.scales()
