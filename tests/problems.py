"""How the tests make problems, what the right results are, and how closely a kernel must meet them.

A `Problem` holds the arrays and parameters of one call. `random_problem` draws one from a seed, `problems`
is the same as a hypothesis strategy, which shrinks the sizes. Wanted results come from the reference in the
next wider dtype (`Problem.expected_forward`, `Problem.expected_backward`); `assert_close` holds the
tolerance of each dtype.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import emulated_gpu as on_emulated_gpu
import ml_dtypes
import numpy as np
from emulated_gpu import emulated_gpu
from hypothesis import strategies as st

import dcn_np
from dcn_np import reference

# What tests of the operator run on: the specification, the kernels on each instruction set that is here, and
# the GPU's kernels in the emulation.
EMULATED_GPU = "emulated GPU"
IMPLEMENTATIONS = ("reference", *dcn_np.available_isas(), EMULATED_GPU)

RANKS = (1, 2, 3)
DTYPES = (np.dtype(np.float32), np.dtype(np.float64))

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

# What the wanted result is computed in: at least twice the digits that the comparison looks at.
WIDER = {np.dtype(np.float64): np.longdouble, **dict.fromkeys((np.dtype(np.float32), *HALVES), np.float64)}

# The tolerance: |got - want| <= UNITS * u * scale, u the unit roundoff, scale from reference.error_scales.
# Halves are computed in float32 and rounded once; a slope can be twice its scale.
UNITS = {np.dtype(np.float32): 16.0, np.dtype(np.float64): 16.0, **dict.fromkeys(HALVES, 2.01)}

# Channel counts of one group: below, at and above the widths of vectors (2 to 16 lanes) and multiples.
VECTOR_CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 31, 32, 33, 48, 63, 64, 65)

# A tap count or an output larger than this makes a slow case and tests nothing more.
MOST_TAPS, MOST_POSITIONS = 50, 150
MOST_TAPS_OF_VECTORS, MOST_POSITIONS_OF_VECTORS = 12, 60


@contextlib.contextmanager
def implementation(name: str) -> Iterator:
    """The module that one of `IMPLEMENTATIONS` names, in use."""
    if name == "reference":
        yield reference
        return
    if name == EMULATED_GPU:
        with emulated_gpu():
            yield on_emulated_gpu
        return
    with dcn_np.use_isa(name):
        yield dcn_np


def unit_roundoff(dtype) -> float:
    """Half the distance from 1 to the next number: 2^-24 in float32, 2^-53 in float64, 2^-8 in bfloat16."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """One call of the forward and of the backward. `offset`, `mask` and `bias` may be None."""

    x: np.ndarray
    offset: np.ndarray | None
    mask: np.ndarray | None
    weight: np.ndarray
    bias: np.ndarray | None
    grad_output: np.ndarray
    stride: int | Sequence = 1
    padding: int | Sequence = 0
    dilation: int | Sequence = 1
    groups: int = 1
    offset_groups: int = 1
    note: str = ""

    ARRAYS: ClassVar = ("x", "offset", "mask", "weight", "bias", "grad_output")

    @property
    def rank(self) -> int:
        return self.x.ndim - 2

    @property
    def dtype(self) -> np.dtype:
        return self.x.dtype

    @property
    def parameters(self) -> tuple:
        """stride, padding, dilation, groups, offset_groups: the order of every public function."""
        return self.stride, self.padding, self.dilation, self.groups, self.offset_groups

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the gradients that exist. The bias has one whether it is given or not."""
        without = {"offset"} if self.offset is None else set()
        without |= {"mask"} if self.mask is None else set()
        return tuple(name for name in ("x", "offset", "mask", "weight", "bias") if name not in without)

    def replace(self, **changes) -> Problem:
        return dataclasses.replace(self, **changes)

    def map_arrays(self, function: Callable[[np.ndarray], np.ndarray]) -> Problem:
        """The same problem with `function` applied to every array that is there."""
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        return self.replace(**{name: function(array) for name, array in arrays.items() if array is not None})

    def astype(self, dtype) -> Problem:
        return self.map_arrays(lambda array: array.astype(dtype))

    def forward(self, module, *, modulated: bool | None = None, **keywords):
        """y from `module` (dcn_np or dcn_np.reference): by v1 without a mask, unless `modulated` is set."""
        if self.mask is None and not modulated:
            return module.deform_conv(
                self.x, self.offset, self.weight, self.bias, *self.parameters, **keywords
            )
        return module.modulated_deform_conv(
            self.x, self.offset, self.mask, self.weight, self.bias, *self.parameters, **keywords
        )

    def backward(
        self, module, needs: Sequence[str] | None = None, *, modulated: bool | None = None, **keywords
    ):
        """Gradients from the functions of `module`; needs=None leaves it to the function's default."""
        if needs is not None:
            keywords["needs"] = needs
        if self.mask is None and not modulated:
            return module.deform_conv_backward(
                self.grad_output, self.x, self.offset, self.weight, *self.parameters, **keywords
            )
        return module.modulated_deform_conv_backward(
            self.grad_output, self.x, self.offset, self.mask, self.weight, *self.parameters, **keywords
        )

    def expected_forward(self):
        """y as the reference computes it in the wider dtype."""
        return self.forward(reference, dtype=WIDER[self.dtype])

    def expected_backward(self):
        """Gradients as the reference computes them in the wider dtype."""
        return self.backward(reference, dtype=WIDER[self.dtype])

    def scales(self) -> dict:
        """What errors are measured in, of "y" and of each gradient: see `reference.error_scales`."""
        return reference.error_scales(
            self.grad_output, self.x, self.offset, self.mask, self.weight, *self.parameters, bias=self.bias
        )

    def __repr__(self) -> str:
        shapes = [
            f"{name}={getattr(self, name).shape}" for name in self.ARRAYS if getattr(self, name) is not None
        ]
        numbers = [
            f"{name}={getattr(self, name)!r}"
            for name in ("stride", "padding", "dilation", "groups", "offset_groups")
        ]
        return f"Problem({self.dtype}, {', '.join(shapes + numbers)}{', ' + self.note if self.note else ''})"


# --- drawing sizes ---

Integer = Callable[[int, int], int]  # an integer of low..high, both included


@dataclass(frozen=True)
class Sizes:
    """What a problem is before it has values. Tuples have one entry per axis."""

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    offset_groups: int
    extent: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    with_offset: bool = True
    with_mask: bool = True
    with_bias: bool = True

    @property
    def rank(self) -> int:
        return len(self.extent)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def output(self) -> tuple[int, ...]:
        axes = zip(self.extent, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple(
            (extent + begin + end - dilation * (kernel - 1) - 1) // stride + 1
            for extent, kernel, stride, (begin, end), dilation in axes
        )


def _draw_channels(integer: Integer, vector_channels: bool) -> tuple[int, int, int, int]:
    """in_channels, out_channels, groups, offset_groups; groups may be all channels, which is depthwise.

    With `vector_channels` the blocks between borders of groups and offset groups have a count around a
    vector's.
    """
    if vector_channels:
        groups, offset_groups = integer(1, 3), integer(1, 3)
        step = math.lcm(groups, offset_groups)
        count = VECTOR_CHANNELS[integer(0, len(VECTOR_CHANNELS) - 1)]
        out_channels = VECTOR_CHANNELS[integer(0, len(VECTOR_CHANNELS) - 1)]
        return step * count, groups * out_channels, groups, offset_groups
    in_channels = integer(0, 8)
    divisors = [d for d in range(1, max(in_channels, 3) + 1) if in_channels % d == 0]
    groups = divisors[integer(0, len(divisors) - 1)]
    offset_groups = divisors[integer(0, len(divisors) - 1)]
    return in_channels, groups * integer(0 if integer(0, 15) == 15 else 1, 3), groups, offset_groups


def _draw_axis(integer: Integer, taps: int, positions: int) -> tuple:
    """kernel, stride, padding, dilation, extent of one axis, with one to about `positions` outputs."""
    kernel = integer(1, min(5, taps))
    stride, dilation = max(1, integer(-3, 4)), max(1, integer(-1, 4))
    padding = (integer(0, 4), integer(0, 4))
    while dilation * (kernel - 1) + 1 > 12 + sum(padding):
        dilation -= 1
    least = max(0, dilation * (kernel - 1) + 1 - sum(padding))
    most = least + stride * positions - 1
    return kernel, stride, padding, dilation, integer(least, max(least, min(12, most)))


def draw_sizes(integer: Integer, rank: int | None = None, *, vector_channels: bool = False) -> Sizes:
    """Sizes from a source of integers, a generator's or hypothesis's."""
    rank = integer(1, 3) if rank is None else rank
    taps, positions = (
        (MOST_TAPS_OF_VECTORS, MOST_POSITIONS_OF_VECTORS) if vector_channels else (MOST_TAPS, MOST_POSITIONS)
    )
    axes = []
    for _ in range(rank):
        axes.append(_draw_axis(integer, taps, positions))
        kernel, stride, padding, dilation, extent = axes[-1]
        taps //= kernel
        positions //= (extent + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
        positions = max(1, positions)
    turn = integer(0, rank - 1)  # so that no axis has the budget to itself
    kernel, stride, padding, dilation, extent = zip(*axes[turn:] + axes[:turn], strict=True)
    return Sizes(
        integer(0, 3),
        *_draw_channels(integer, vector_channels),
        extent,
        kernel,
        stride,
        padding,
        dilation,
        with_offset=integer(0, 5) < 5,
        with_mask=integer(0, 2) < 2,
        with_bias=integer(0, 1) == 0,
    )


# --- filling in values ---

HUGE = (
    2.0**31 - 200,
    2.0**31,
    -(2.0**31),
    -(2.0**31) - 300,
    3e9,
    -3e9,
    1e19,
    -1e19,
    1e30,
    -1e30,
    3e38,
    -3e38,
)
NON_FINITE = (np.nan, np.inf, -np.inf)


def sampling_base(sizes: Sizes) -> np.ndarray:
    """Where each tap samples without an offset: (taps, ndim, *output)."""
    ndim = sizes.rank
    tap = np.indices(sizes.kernel).reshape(ndim, sizes.taps, *[1] * ndim)
    position = np.indices(sizes.output)[:, None]
    axes = [
        position[axis] * sizes.stride[axis] - sizes.padding[axis][0] + tap[axis] * sizes.dilation[axis]
        for axis in range(ndim)
    ]
    return np.stack(axes, axis=1)


def random_offset(rng, sizes: Sizes, dtype, *, special: bool = True, non_finite: bool = False) -> np.ndarray:
    """Offsets: N(0, 3), lattice points, borders, outside and huge ones, and a few that are not finite."""
    shape = (sizes.batch, sizes.offset_groups, sizes.taps, sizes.rank, *sizes.output)
    offset = rng.normal(0, 3, shape).astype(dtype)
    if special:
        _put_special(rng, offset, sizes)
    if special and offset.size and rng.random() < 0.3:
        _put_some(rng, offset, HUGE)
    if non_finite and offset.size:
        _put_some(rng, offset, NON_FINITE)
    return (
        offset.reshape(sizes.batch, -1, *sizes.output)
        if offset.size
        else np.zeros((sizes.batch, sizes.offset_groups * sizes.taps * sizes.rank, *sizes.output), dtype)
    )


def _put_special(rng, offset: np.ndarray, sizes: Sizes) -> None:
    """A third of the offsets: on the lattice, on borders of the image, just below an integer, outside."""
    base = np.broadcast_to(sampling_base(sizes), offset.shape)
    extent = np.reshape(sizes.extent, (sizes.rank, *[1] * sizes.rank))
    lattice = np.round(offset)
    below = np.nextafter(lattice, np.array(-np.inf, offset.dtype))  # below 0 the fraction rounds to 1
    choices = (lattice, -1 - base, extent - base, extent - 1 - base, -base, below, lattice + 0.5, offset + 30)
    kind = rng.integers(0, 3 * len(choices), offset.shape)
    for number, values in enumerate(choices):
        offset[...] = np.where(kind == number, np.asarray(values).astype(offset.dtype), offset)


def _put_some(rng, array: np.ndarray, values: Sequence[float]) -> None:
    """One to four elements replaced."""
    places = rng.integers(0, array.size, rng.integers(1, 5))
    array.reshape(-1)[places] = rng.choice(values, places.size).astype(array.dtype)


def fill(
    sizes: Sizes,
    rng,
    dtype=np.float64,
    *,
    special: bool = True,
    non_finite: bool = False,
    non_finite_values: bool = False,
    note: str = "",
) -> Problem:
    """Values for sizes.

    `special` is for offsets on kinks, borders and far outside; `non_finite` for NaN and Inf among the
    offsets; `non_finite_values` for NaN and Inf among the pixels, weights and grad_output too. Masks have
    any sign, some are 0.
    """

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    batch, taps = sizes.batch, sizes.taps
    mask = normal(batch, sizes.offset_groups * taps, *sizes.output) if sizes.with_mask else None
    if mask is not None:
        mask[rng.random(mask.shape) < 0.1] = 0
    problem = Problem(
        x=normal(batch, sizes.in_channels, *sizes.extent),
        offset=random_offset(rng, sizes, dtype, special=special, non_finite=non_finite)
        if sizes.with_offset
        else None,
        mask=mask,
        weight=normal(sizes.out_channels, sizes.in_channels // sizes.groups, *sizes.kernel),
        bias=normal(sizes.out_channels) if sizes.with_bias else None,
        grad_output=normal(batch, sizes.out_channels, *sizes.output),
        stride=sizes.stride,
        padding=sizes.padding,
        dilation=sizes.dilation,
        groups=sizes.groups,
        offset_groups=sizes.offset_groups,
        note=note,
    )
    if non_finite_values:
        for array in (problem.x, problem.weight, problem.grad_output):
            if array.size and rng.random() < 0.5:
                _put_some(rng, array, NON_FINITE)
    return problem


def random_problem(
    rng,
    rank: int | None = None,
    dtype=None,
    *,
    vector_channels: bool = False,
    special: bool = True,
    non_finite: bool = False,
    non_finite_values: bool = False,
    **sizes,
) -> Problem:
    """A problem from a seed or a generator; keywords as batch=1 or with_mask=False fix fields of `Sizes`.

    A fixed size that others depend on (in_channels with groups, extent with kernel) must fit what is drawn.
    """
    note = f"seed={rng}" if isinstance(rng, int) else ""
    rng = np.random.default_rng(rng)
    dtype = DTYPES[rng.integers(0, 2)] if dtype is None else dtype
    drawn = draw_sizes(
        lambda low, high: int(rng.integers(low, high + 1)), rank, vector_channels=vector_channels
    )
    return fill(
        dataclasses.replace(drawn, **sizes),
        rng,
        dtype,
        special=special,
        non_finite=non_finite,
        non_finite_values=non_finite_values,
        note=note,
    )


@st.composite
def problems(
    draw,
    rank: int | None = None,
    dtype=None,
    *,
    vector_channels: bool = False,
    special: bool = True,
    non_finite: bool | None = None,
    non_finite_values: bool = False,
) -> Problem:
    """Problems for hypothesis: sizes are drawn and shrink, values come from a drawn seed.

    non_finite=None draws whether offsets may be NaN or Inf.
    """
    sizes = draw_sizes(lambda low, high: draw(st.integers(low, high)), rank, vector_channels=vector_channels)
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    non_finite = draw(st.booleans()) if non_finite is None else non_finite
    seed = draw(st.integers(0, 2**32 - 1))
    return fill(
        sizes,
        np.random.default_rng(seed),
        dtype,
        special=special,
        non_finite=non_finite,
        non_finite_values=non_finite_values,
        note=f"values of seed {seed}",
    )


# --- memory layouts ---


def _channels_last(array):
    if array.ndim < 3:
        return array.copy()
    return np.moveaxis(np.moveaxis(array, 1, -1).copy(), -1, 1)


def _mapped(array):
    """Channels-last in pages of its own, too far from small allocations for 32-bit distances."""
    data = np.frombuffer(mmap.mmap(-1, max(array.nbytes, 1)), np.uint8)[: array.nbytes]
    wanted = _channels_last(array)
    view = np.ndarray(array.shape, array.dtype, data, strides=wanted.strides)
    view[...] = wanted
    return view


def _reversed(array):
    return np.flip(np.flip(array).copy())


def _every_second(array):
    wide = np.zeros([2 * extent for extent in array.shape], array.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def _misaligned(array):
    data = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    data[...] = array
    return data


def _read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


# The same values in another memory layout: Problem.map_arrays(LAYOUTS["channels_last"]).
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": np.ascontiguousarray,
    "channels_last": _channels_last,
    "mapped": _mapped,
    "fortran": np.asfortranarray,
    "reversed": _reversed,
    "every_second": _every_second,
    "misaligned": _misaligned,
    "read_only": _read_only,
}


# --- comparing ---


def error_in_units(got, want, dtype, scale) -> float:
    """The largest |got - want| / (u * scale) among finite numbers; less than a normal number counts as 0."""
    wide = WIDER[np.dtype(dtype)]
    got, want = np.asarray(got, wide), np.asarray(want, wide)
    finite = np.isfinite(want) & np.isfinite(got)
    difference = np.abs(np.where(finite, got, 0) - np.where(finite, want, 0))
    difference = np.where(difference <= ml_dtypes.finfo(dtype).smallest_normal, 0, difference)
    unit = unit_roundoff(dtype) * np.asarray(scale, wide)
    units = np.divide(difference, unit, out=np.where(difference > 0, wide(np.inf), 0), where=unit > 0)
    return float(np.max(units, initial=0))


def places(chosen: np.ndarray) -> str:
    return f"{np.count_nonzero(chosen)} in all, among them {np.argwhere(chosen)[:5].tolist()}"


def assert_close(got, want, dtype, scale, *, units: float | None = None, what: str = "") -> None:
    """`got` is `want` to rounding: NaN and Inf in exactly the same places, the rest within tolerance.

    `scale` is from `Problem.scales`; `units` replaces the tolerance of the dtype, in u * scale.
    """
    got = np.asarray(got)
    assert got.shape == np.shape(want), f"{what}: shape {got.shape}, want {np.shape(want)}"
    for name, test in (("NaN", np.isnan), ("+Inf", np.isposinf), ("-Inf", np.isneginf)):
        wrong = test(got) != test(want)
        assert not wrong.any(), f"{what}: {name} in wrong places, {places(wrong)}"
    error = error_in_units(got, want, dtype, scale)
    allowed = UNITS[np.dtype(dtype)] if units is None else units
    assert error <= allowed, f"{what}: error {error:.3g} units of rounding, allowed {allowed:g}"


def assert_forward(problem: Problem, module, **keywords) -> None:
    """The module's forward of a problem is the reference's."""
    got = problem.forward(module, **keywords)
    assert got.dtype == problem.dtype
    assert_close(
        got, problem.expected_forward(), problem.dtype, problem.scales()["y"], what=f"y of {problem}"
    )


def assert_backward(problem: Problem, module, **keywords) -> None:
    """All gradients of a problem that the module computes are the reference's."""
    got, want, scales = problem.backward(module, **keywords), problem.expected_backward(), problem.scales()
    for name in ("x", "offset", "mask", "weight", "bias"):
        mine, wanted = getattr(got, name), getattr(want, name)
        assert (mine is None) == (wanted is None), f"gradient {name} of {problem}"
        if wanted is not None:
            assert mine.dtype == problem.dtype
            assert_close(mine, wanted, problem.dtype, scales[name], what=f"gradient {name} of {problem}")
