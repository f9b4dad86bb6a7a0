"""Do results change exactly as they must when the problem changes in a known way?

No reference is needed for these: the engine is compared with itself, most of the time bit for bit. Every test
runs on each instruction set of the machine.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from problems import DTYPES, LAYOUTS, Problem, assert_close, random_problem

import dcn_np
from dcn_np.threads import exactly

NAMES = ("x", "offset", "mask", "weight", "bias")
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=dcn_np.available_isas(), autouse=True)
def _isa(request):
    with dcn_np.use_isa(request.param):
        yield


def results(problem: Problem, **keywords) -> dict[str, np.ndarray]:
    """y and all gradients that there are, by name."""
    gradients = problem.backward(dcn_np, **keywords)
    return {
        "y": problem.forward(dcn_np, **keywords),
        **{name: getattr(gradients, name) for name in problem.differentiable},
    }


def assert_same_bits(got: dict, want: dict, names=None) -> None:
    for name in want if names is None else names:
        assert got[name].shape == want[name].shape, name
        different = np.sum(got[name] != want[name])
        assert got[name].tobytes() == want[name].tobytes(), f"{name}: {different} elements differ"


def make(seed, dtype, **sizes) -> Problem:
    """A problem of rank 2 with an offset, a mask and a bias, unless `sizes` says otherwise."""
    rank = len(sizes.get("extent", (0, 0)))
    usual = {
        "rank": rank,
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
    return random_problem(seed, dtype=dtype, **{**usual, **sizes})


# Large enough that each is cut into many tiles: dense, depthwise, with a channel multiplier, few channels per
# group, channels past a vector, one long axis, three axes, images that the tiles copy (two axes and three),
# images of one pixel.
SPLIT = {
    "dense": {"extent": (41, 37), "in_channels": 24, "out_channels": 20},
    "depthwise": {"extent": (45, 41), "in_channels": 19, "out_channels": 19, "groups": 19},
    "multiplier": {
        "extent": (29, 31),
        "in_channels": 10,
        "out_channels": 20,
        "groups": 10,
        "offset_groups": 2,
    },
    "few": {"extent": (31, 33), "in_channels": 12, "out_channels": 18, "groups": 6, "offset_groups": 3},
    "wide": {"extent": (19, 23), "in_channels": 67, "out_channels": 35, "batch": 3},
    "long": {"extent": (9001,), "in_channels": 5, "out_channels": 7, "batch": 1, "stride": (2,)},
    "volume": {"extent": (9, 11, 10), "in_channels": 6, "out_channels": 9, "batch": 1, "offset_groups": 2},
    "large": {"extent": (73, 61), "in_channels": 6, "out_channels": 4, "offset_groups": 2},
    "deep": {"extent": (19, 21, 12), "in_channels": 5, "out_channels": 3},
    "one_pixel": {"extent": (1, 1), "in_channels": 33, "out_channels": 65, "batch": 9},
    "rigid": {
        "extent": (35, 43),
        "in_channels": 8,
        "out_channels": 33,
        "with_offset": False,
        "with_mask": False,
    },
}


# --- the same bits ------------------------------------------------------------------------------------------


@BY_DTYPE
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "contiguous") for name in SPLIT),
        *((name, "channels_last") for name in ("dense", "depthwise", "wide", "volume")),
    ],
)
def test_thread_count_and_runs(name, layout, dtype):
    problem = make(1, dtype, **SPLIT[name]).map_arrays(LAYOUTS[layout])
    with exactly(1):
        want = results(problem)
    for threads in (2, 3, 7, 7, 1):
        with exactly(threads):
            assert_same_bits(results(problem), want)


def shifted_memory(array: np.ndarray, shift: int) -> np.ndarray:
    """A copy whose first byte is `shift` bytes past a 64-byte border."""
    data = np.empty(array.nbytes + 128, np.uint8)
    start = -data.ctypes.data % 64 + shift
    copy = data[start : start + array.nbytes].view(array.dtype)
    copy = np.lib.stride_tricks.as_strided(copy, array.shape, array.strides) if array.size else array.copy()
    copy[...] = array
    return copy


ALIGNED = {
    "dense": {"extent": (6, 5), "in_channels": 18, "out_channels": 17},
    "depthwise": {"extent": (6, 5), "in_channels": 18, "out_channels": 18, "groups": 18},
    "few": {"extent": (7, 5), "in_channels": 6, "out_channels": 9, "groups": 3, "offset_groups": 2},
    "long": {"extent": (40,), "in_channels": 3, "out_channels": 4, "batch": 1},
}


@BY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ALIGNED)
def test_alignment(name, layout, dtype):
    """Every byte of a cache line, the same for all arrays and another for each; out= too."""
    problem = make(3, dtype, **ALIGNED[name]).map_arrays(LAYOUTS[layout])
    want = results(problem)
    for shift in range(64):
        assert_same_bits(results(problem.map_arrays(lambda array, by=shift: shifted_memory(array, by))), want)
        steps = itertools.count(shift, 13)
        moved = problem.map_arrays(lambda array, steps=steps: shifted_memory(array, next(steps) % 64))
        assert_same_bits(results(moved), want)
        out = shifted_memory(np.full_like(want["y"], np.nan), (shift * 5) % 64)
        assert moved.forward(dcn_np, out=out) is out
        assert_same_bits({"y": out}, want, ["y"])


PER_IMAGE = ("x", "offset", "mask", "grad_output")


def images(problem: Problem, part) -> Problem:
    """The problem of some images of the batch."""
    return problem.replace(
        **{name: getattr(problem, name)[part] for name in PER_IMAGE if getattr(problem, name) is not None}
    )


@BY_DTYPE
@pytest.mark.parametrize("name", [*SPLIT, *(f"aligned_{name}" for name in ALIGNED)])
def test_batch_slices(name, dtype):
    """What an image gives does not depend on the images beside it, nor on their number."""
    sizes = SPLIT[name] if name in SPLIT else ALIGNED[name.removeprefix("aligned_")]
    problem = make(4, dtype, **{**sizes, "batch": 3})
    whole = results(problem)
    own = [key for key in whole if key in ("y", "x", "offset", "mask")]
    for part in (slice(1, 2), [2, 2, 0, 1]):
        assert_same_bits(results(images(problem, part)), {key: whole[key][part] for key in own})


@BY_DTYPE
@pytest.mark.parametrize("name", SPLIT)
def test_weight_gradient_adds_images_in_order(name, dtype):
    """Images whose grad_output is 0 add 0: the image that is left gives the bits that it gives alone."""
    problem = make(5, dtype, **{**SPLIT[name], "batch": 3})
    for image in (0, 2):
        grad_output = np.zeros_like(problem.grad_output)
        grad_output[image] = problem.grad_output[image]
        together = problem.replace(grad_output=grad_output).backward(dcn_np, needs=("weight", "bias"))
        alone = images(problem, slice(image, image + 1)).backward(dcn_np, needs=("weight", "bias"))
        for key in ("weight", "bias"):
            np.testing.assert_array_equal(getattr(together, key), getattr(alone, key))


# --- shifts -------------------------------------------------------------------------------------------------


def rounded_offsets(problem: Problem, step: float = 2.0**-6) -> Problem:
    """Offsets at multiples of `step` below 2^6, so that adding an integer to them is exact."""
    offset = np.clip(np.round(problem.offset / step) * step, -60, 60)
    return problem.replace(offset=offset.astype(problem.dtype))


@BY_DTYPE
@pytest.mark.parametrize(("shift", "stride"), [(1, 1), (5, 1), (70, 1), (16, 4096)])
@pytest.mark.parametrize("axis", [0, 1])
def test_shift_of_image_and_outputs(axis, shift, stride, dtype):
    """The same picture further along a larger image gives the same outputs, further along; at 65536 too."""
    strides = [1, 1]
    strides[axis] = stride
    problem = make(
        6,
        dtype,
        extent=(7, 6),
        in_channels=5,
        out_channels=4,
        kernel=(3, 2),
        batch=1,
        padding=((0, 0), (0, 0)),
        stride=tuple(strides),
    )
    problem = problem.replace(offset=np.clip(problem.offset, -9, 9))

    def later(array, by):
        widths = [(0, 0)] * 4
        widths[axis + 2] = (by, 0)
        return np.pad(array, widths)

    moved = problem.replace(
        x=later(problem.x, shift * stride),
        **{name: later(getattr(problem, name), shift) for name in ("offset", "mask", "grad_output")},
    )
    want, got, scales = results(problem), results(moved), problem.scales()

    def shown(array, by=shift):
        return array[(slice(None),) * (axis + 2) + (slice(by, None),)]

    for name in ("y", "offset", "mask"):
        np.testing.assert_array_equal(shown(got[name]), want[name], err_msg=name)
    # Sums over positions are cut at fixed positions, so their rounding may differ.
    assert_close(shown(got["x"], shift * stride), want["x"], dtype, scales["x"])


@BY_DTYPE
@pytest.mark.parametrize("shift", [(0, 1), (3, 0), (2, -3), (-1, 4)])
def test_shift_of_image_against_offset(shift, dtype):
    """A picture rolled in a frame of zeros is found again by offsets that are larger by as much."""
    problem = rounded_offsets(make(7, dtype, extent=(30, 30), in_channels=4, out_channels=5, special=False))
    frame = np.zeros_like(problem.x)
    frame[:, :, 8:22, 8:22] = problem.x[:, :, 8:22, 8:22]
    problem = problem.replace(x=frame)
    by = np.tile(np.array(shift, dtype), problem.offset.shape[1] // 2)[:, None, None]
    moved = problem.replace(x=np.roll(frame, shift, (2, 3)), offset=problem.offset + by)
    want, got = results(problem), results(moved)
    for name in ("y", "mask", "weight", "bias"):
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    inner = (slice(None), slice(None), slice(6, 24), slice(6, 24))  # elsewhere the frame cuts grad_x off
    back = np.roll(got["x"], [-step for step in shift], (2, 3))
    np.testing.assert_array_equal(back[inner], want["x"][inner])


@BY_DTYPE
def test_padding_is_a_border_of_zeros(dtype):
    problem = make(
        8, dtype, extent=(9, 8), in_channels=6, out_channels=7, padding=((2, 1), (3, 2)), stride=(2, 1)
    )
    bordered = problem.replace(x=np.pad(problem.x, ((0, 0), (0, 0), (2, 1), (3, 2))), padding=0)
    want, got = results(problem), results(bordered)
    for name in ("y", "weight", "bias", "mask"):
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    np.testing.assert_array_equal(got["x"][:, :, 2:-1, 3:-2], want["x"])


# --- special cases of one another ---------------------------------------------------------------------------


@BY_DTYPE
@pytest.mark.parametrize("name", SPLIT)
def test_mask_of_ones_is_no_mask(name, dtype):
    problem = make(9, dtype, **{**SPLIT[name], "batch": 1, "with_mask": False})
    taps = int(np.prod(problem.weight.shape[2:]))
    ones = np.ones((len(problem.x), problem.offset_groups * taps, *problem.grad_output.shape[2:]), dtype)
    want = results(problem)
    assert_same_bits(results(problem.replace(mask=ones)), want)
    assert_same_bits(results(problem, modulated=True), want)


@BY_DTYPE
@pytest.mark.parametrize("name", SPLIT)
def test_zero_offset_is_no_offset(name, dtype):
    problem = make(10, dtype, **{**SPLIT[name], "with_offset": False})
    shape = problem.grad_output.shape
    per_tap = problem.offset_groups * (problem.x.ndim - 2) * int(np.prod(problem.weight.shape[2:]))
    zeros = np.zeros((shape[0], per_tap, *shape[2:]), dtype)
    want, got = results(problem), results(problem.replace(offset=zeros))
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)


def assert_near(got: dict, want: dict, problem: Problem) -> None:
    """Two results of the engine that are each right to rounding."""
    scales = problem.scales()
    for key in want:
        assert_close(got[key], want[key], problem.dtype, scales[key], what=f"{key} of {problem}")


def one_group(problem: Problem, group: int) -> Problem:
    """Weight group `group` as a problem of its own; the offset groups must lie within weight groups."""

    def part(array, axis):
        return None if array is None else np.split(array, problem.groups, axis)[group]

    return problem.replace(
        x=part(problem.x, 1),
        offset=part(problem.offset, 1),
        mask=part(problem.mask, 1),
        weight=part(problem.weight, 0),
        bias=part(problem.bias, 0),
        grad_output=part(problem.grad_output, 1),
        groups=1,
        offset_groups=problem.offset_groups // problem.groups,
    )


@BY_DTYPE
@pytest.mark.parametrize(
    ("groups", "inputs", "outputs"),
    [(2, 3, 4), (3, 1, 1), (3, 1, 2), (16, 1, 1), (17, 1, 2), (5, 2, 2), (4, 8, 3), (2, 17, 33)],
)
def test_groups_are_separate_calls(groups, inputs, outputs, dtype):
    problem = make(
        11,
        dtype,
        extent=(9, 10),
        in_channels=groups * inputs,
        out_channels=groups * outputs,
        groups=groups,
        offset_groups=groups,
    )
    parts = [results(one_group(problem, group)) for group in range(groups)]
    axes = {"y": 1, "x": 1, "offset": 1, "mask": 1, "weight": 0, "bias": 0}
    want = {key: np.concatenate([part[key] for part in parts], axis) for key, axis in axes.items()}
    assert_near(results(problem), want, problem)


@BY_DTYPE
def test_equal_offset_groups_are_one(dtype):
    problem = make(12, dtype, extent=(8, 9), in_channels=12, out_channels=8, groups=2)
    thrice = (1, 3, 1, 1)
    copies = problem.replace(
        offset=np.tile(problem.offset, thrice), mask=np.tile(problem.mask, thrice), offset_groups=3
    )
    want, got = results(problem), results(copies)
    for key in ("offset", "mask"):
        got[key] = got[key].reshape(len(problem.x), 3, *want[key].shape[1:]).sum(axis=1)
    assert_near(got, want, problem)


@BY_DTYPE
def test_channel_permutation(dtype):
    """The order of channels matters to rounding only, and that of outputs to nothing."""
    problem = make(13, dtype, extent=(9, 8), in_channels=21, out_channels=19)
    rng = np.random.default_rng(13)
    inputs, outputs = rng.permutation(21), rng.permutation(19)
    permuted = problem.replace(
        x=problem.x[:, inputs],
        weight=problem.weight[outputs][:, inputs],
        bias=problem.bias[outputs],
        grad_output=problem.grad_output[:, outputs],
    )
    want, got = results(problem), results(permuted)
    want = {
        **want,
        "y": want["y"][:, outputs],
        "x": want["x"][:, inputs],
        "bias": want["bias"][outputs],
        "weight": want["weight"][outputs][:, inputs],
    }
    scales = permuted.scales()
    for key in want:
        assert_close(got[key], want[key], dtype, scales[key], what=key)


# --- linearity ----------------------------------------------------------------------------------------------

LINEAR = {  # results that are linear in an input, and those that do not depend on it
    "x": (("y", "offset", "mask", "weight"), ("x", "bias")),
    "weight": (("y", "x", "offset", "mask"), ("weight", "bias")),
    "mask": (("y", "x", "offset", "weight"), ("mask", "bias")),
    "grad_output": (("x", "offset", "mask", "weight", "bias"), ("y",)),
}


@BY_DTYPE
@pytest.mark.parametrize("name", ["dense", "depthwise", "few"])
@pytest.mark.parametrize("variable", LINEAR)
def test_scaling_by_a_power_of_two_is_exact(variable, name, dtype):
    problem = make(14, dtype, **{**SPLIT[name], "batch": 1, "with_bias": False})
    scaled = problem.replace(**{variable: getattr(problem, variable) * dtype.type(-8)})
    want, got = results(problem), results(scaled)
    linear, constant = LINEAR[variable]
    for key in linear:
        np.testing.assert_array_equal(got[key], -8 * want[key], err_msg=key)
    assert_same_bits(got, want, constant)


@BY_DTYPE
@pytest.mark.parametrize("variable", LINEAR)
def test_sum_of_inputs_gives_sum_of_results(variable, dtype):
    problem = make(15, dtype, extent=(8, 9), in_channels=18, out_channels=10, groups=2, with_bias=False)
    first = getattr(problem, variable)
    second = np.random.default_rng(15).standard_normal(first.shape).astype(dtype)
    # A sum that is exact leaves only the engine's own rounding.
    first, second = (np.round(part * 256) / 256 for part in (first, second))
    parts = [problem.replace(**{variable: part.astype(dtype)}) for part in (first, second)]
    together = results(problem.replace(**{variable: (first + second).astype(dtype)}))
    separate, scales = [results(part) for part in parts], [part.scales() for part in parts]
    for key in LINEAR[variable][0]:
        total = separate[0][key].astype(np.longdouble) + separate[1][key]
        assert_close(together[key], total, dtype, scales[0][key] + scales[1][key], what=key)


# --- what may not be finite ---------------------------------------------------------------------------------

REACH = {
    "extent": (4, 5),
    "in_channels": 4,
    "out_channels": 6,
    "groups": 2,
    "offset_groups": 2,
    "batch": 1,
    "kernel": (2, 2),
    "padding": ((1, 0), (0, 1)),
}


def reach_problem(seed, dtype, **changes) -> Problem:
    """Few positions, half of the coordinates on the lattice, fractions that are exact, nothing that is 0."""
    problem = make(seed, dtype, **{**REACH, **changes}, special=False)
    rng = np.random.default_rng(seed)
    fraction = rng.choice([0, 0, 0, 0.25, 0.5, 0.75], problem.offset.shape).astype(dtype)
    mask = np.where(problem.mask == 0, dtype.type(1), problem.mask)
    return problem.replace(offset=np.round(problem.offset) + fraction, mask=mask)


def coordinates(problem: Problem) -> np.ndarray:
    """(batch, offset_groups, taps, ndim, *output), exact for offsets with few binary digits."""
    kernel, output = problem.weight.shape[2:], problem.grad_output.shape[2:]
    ndim, taps = len(kernel), int(np.prod(kernel))
    rigid = np.zeros((taps, ndim, *output))
    for axis in range(ndim):
        position = np.indices(output)[axis] * problem.stride[axis] - problem.padding[axis][0]
        tap = np.indices(kernel)[axis].reshape(taps, *[1] * ndim) * problem.dilation[axis]
        rigid[:, axis] = position + tap
    shape = (len(problem.x), problem.offset_groups, taps, ndim, *output)
    return rigid + problem.offset.astype(np.float64).reshape(shape)


def hat(distance):
    """The interpolation weight of a pixel at a distance from the coordinate."""
    return np.maximum(0, 1 - np.abs(distance))


def samples_of_pixel(problem: Problem, pixel) -> tuple[np.ndarray, np.ndarray]:
    """Which samples weigh a pixel, and which derivatives see it.

    Shapes (batch, offset_groups, taps, *output) and (batch, offset_groups, taps, ndim, *output). A derivative
    along an axis sees both pixels of the cell [floor, floor + 1), whatever their weight on that axis.
    """
    place = np.reshape(pixel, (len(pixel), *[1] * len(pixel)))
    coordinate = coordinates(problem)
    weighed = hat(coordinate - place) > 0
    high = place - np.floor(coordinate)
    in_cell = (high == 0) | (high == 1)
    ndim = len(pixel)
    seen = [
        np.all([(in_cell if a == axis else weighed)[:, :, :, a] for a in range(ndim)], axis=0)
        for axis in range(ndim)
    ]
    return np.all(weighed, axis=3), np.stack(seen, axis=3)


def outputs_of_channel(problem: Problem, channel: int) -> slice:
    """The output channels of the weight group that a channel is in."""
    group = channel // (problem.x.shape[1] // problem.groups)
    each = problem.weight.shape[0] // problem.groups
    return slice(group * each, (group + 1) * each)


def predicted_reach(problem: Problem, channel: int, pixel) -> dict[str, np.ndarray]:
    """True where a result may not be finite when x[0, channel, pixel] is not."""
    group = channel // (problem.x.shape[1] // problem.offset_groups)
    weighed, seen = samples_of_pixel(problem, pixel)
    only_group = np.zeros(problem.offset_groups, bool)
    only_group[group] = True
    weighed &= only_group.reshape(1, -1, *[1] * (weighed.ndim - 2))
    seen &= only_group.reshape(1, -1, *[1] * (seen.ndim - 2))
    outputs = outputs_of_channel(problem, channel)
    reach = {
        "y": np.zeros(problem.grad_output.shape, bool),
        "weight": np.zeros(problem.weight.shape, bool),
        "x": np.zeros(problem.x.shape, bool),
        "bias": np.zeros(problem.weight.shape[0], bool),
        "mask": weighed.reshape(problem.mask.shape),
        "offset": seen.reshape(problem.offset.shape),
    }
    reach["y"][:, outputs] = np.any(weighed[:, group], axis=1)[:, None]
    taps = np.any(weighed[0, group], axis=tuple(range(1, 1 + len(pixel))))
    reach["weight"][outputs, channel % problem.weight.shape[1]] = taps.reshape(problem.weight.shape[2:])
    return reach


@BY_DTYPE
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"groups": 4, "out_channels": 4},
        {"groups": 1, "offset_groups": 1},
        {"groups": 4, "out_channels": 8},
        {"extent": (7,), "kernel": (3,), "padding": ((1, 1),)},
        {"extent": (2, 3, 3), "kernel": (1, 2, 2), "padding": ((0, 1), (1, 0), (0, 0))},
    ],
    ids=str,
)
def test_pixel_that_is_not_finite_reaches_only_what_weighs_it(changes, value, dtype):
    reached = 0
    problem = reach_problem(16, dtype, **changes)
    for channel in (0, 3):
        for pixel in np.ndindex(*problem.x.shape[2:]):
            x = problem.x.copy()
            x[(0, channel, *pixel)] = value
            got, want = results(problem.replace(x=x)), predicted_reach(problem, channel, pixel)
            for key, mask in want.items():
                np.testing.assert_array_equal(~np.isfinite(got[key]), mask, err_msg=f"{key}, pixel {pixel}")
                reached += np.count_nonzero(mask)
    assert reached


def with_offset_of(problem: Problem, value, sample) -> Problem:
    """The problem with one number of its offset replaced."""
    offset = problem.offset.copy()
    offset[sample] = value
    return problem.replace(offset=offset)


def samples(problem: Problem):
    """An index of the offset for every tap and axis, at changing positions."""
    for channel in range(problem.offset.shape[1]):
        yield (0, channel, channel % problem.offset.shape[2], (channel * 2) % problem.offset.shape[3])


@BY_DTYPE
@pytest.mark.parametrize("value", [np.inf, -np.inf, 2.0**31, -(2.0**31) - 512, 3e9, 1e30])
def test_infinite_and_huge_offsets_are_outside(value, dtype):
    problem = reach_problem(17, dtype)
    for sample in samples(problem):
        want = results(with_offset_of(problem, 100.0, sample))
        assert_same_bits(results(with_offset_of(problem, value, sample)), want)


@BY_DTYPE
def test_offset_that_is_nan_reaches_only_its_sample(dtype):
    """y of its position, its tap of grad_weight, its own gradients; nothing is scattered."""
    problem = reach_problem(18, dtype)
    taps, per_group = problem.mask.shape[1] // 2, problem.offset.shape[1] // 2
    for sample in samples(problem):
        _, number, *position = sample
        group, tap, position = number // per_group, number % per_group // 2, tuple(position)
        got, outside = (results(with_offset_of(problem, value, sample)) for value in (np.nan, 100.0))
        nan = {key: np.zeros(value.shape, bool) for key, value in got.items()}
        # REACH has as many weight groups as offset groups: the same channels.
        outputs = slice(group * 3, group * 3 + 3)
        nan["y"][(0, outputs, *position)] = True
        nan["weight"].reshape(6, 2, taps)[outputs, :, tap] = True
        nan["mask"][(0, group * taps + tap, *position)] = True
        first = group * per_group + 2 * tap
        nan["offset"][(0, slice(first, first + 2), *position)] = True
        for key, where in nan.items():
            np.testing.assert_array_equal(np.isnan(got[key]), where, err_msg=key)
            np.testing.assert_array_equal(got[key][~where], outside[key][~where], err_msg=key)


@BY_DTYPE
def test_mask_of_zero_hides_what_is_finite_only(dtype):
    problem = reach_problem(19, dtype, offset_groups=1, groups=1)
    hidden = problem.replace(mask=np.zeros_like(problem.mask))
    got = results(hidden)
    np.testing.assert_array_equal(got["y"], np.broadcast_to(problem.bias.reshape(-1, 1, 1), got["y"].shape))
    assert not any(np.any(got[key]) for key in ("x", "offset", "weight"))
    assert np.any(got["mask"])
    x = np.full_like(problem.x, np.nan)
    weighed = sum(samples_of_pixel(problem, pixel)[0].astype(int) for pixel in np.ndindex(*x.shape[2:])) > 0
    nan = np.isnan(hidden.replace(x=x).forward(dcn_np))
    np.testing.assert_array_equal(nan, np.broadcast_to(np.any(weighed, axis=(1, 2))[:, None], nan.shape))


@BY_DTYPE
def test_weight_that_is_not_finite_reaches_only_its_output(dtype):
    problem = make(20, dtype, extent=(7, 7), in_channels=17, out_channels=19, padding=((0, 0), (0, 0)))
    want = problem.forward(dcn_np)
    for channel in (0, 5, 11, 18):
        weight = problem.weight.copy()
        weight[channel, 3, 1, 1] = np.nan
        y = problem.replace(weight=weight).forward(dcn_np)
        assert np.all(np.isnan(y[:, channel]))
        np.testing.assert_array_equal(np.delete(y, channel, 1), np.delete(want, channel, 1))
