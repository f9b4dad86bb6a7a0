"""Is the specification right? The reference against truths that share nothing with it.

The definition itself (a sum over all pixels, in loops over scalars), scipy's correlation and its linear
interpolation, and the numbers that detectron2 and mmcv publish with their operators.
"""

import itertools

import numpy as np
import pytest
from problems import RANKS, random_problem
from scipy import ndimage, signal

from dcn_np import reference


def tent_sample(image, coordinate):
    """Linear interpolation as a sum over all pixels of pixel * product over axes of max(0, 1 - distance)."""
    for wanted in coordinate:
        tent = np.maximum(0, 1 - np.abs(np.arange(len(image)) - wanted))
        image = np.tensordot(tent, image, axes=1)
    return image


def pairs(padding, rank):
    padding = [padding] * rank if isinstance(padding, int) else list(padding)
    return [(p, p) if isinstance(p, int) else p for p in padding]


def scalar_forward(problem):
    """The definition of modulated deformable convolution, one scalar at a time."""
    begin = [pair[0] for pair in pairs(problem.padding, problem.rank)]
    out_channels, group_channels, *kernel = problem.weight.shape
    batch, _, *output = problem.grad_output.shape
    taps = list(itertools.product(*map(range, kernel)))
    y = np.zeros(problem.grad_output.shape)
    for n, o, position in itertools.product(
        range(batch), range(out_channels), itertools.product(*map(range, output))
    ):
        y[n, o, *position] = 0 if problem.bias is None else problem.bias[o]
        first = o // (out_channels // problem.groups) * group_channels
        for channel, (k, tap) in itertools.product(range(group_channels), enumerate(taps)):
            group = (first + channel) // (problem.x.shape[1] // problem.offset_groups)
            row = group * len(taps) + k
            coordinate = [
                position[axis] * problem.stride[axis]
                - begin[axis]
                + tap[axis] * problem.dilation[axis]
                + (0 if problem.offset is None else problem.offset[n, row * problem.rank + axis, *position])
                for axis in range(problem.rank)
            ]
            modulation = 1 if problem.mask is None else problem.mask[n, row, *position]
            sample = tent_sample(problem.x[n, first + channel], coordinate)
            y[n, o, *position] += problem.weight[o, channel, *tap] * modulation * sample
    return y


def small(seed, rank, **keywords):
    """A problem that loops over scalars can do; None if the draw is too large for them."""
    problem = random_problem(seed, rank, np.float64, **keywords)
    return problem if 0 < problem.grad_output.size * problem.weight[:1].size < 2500 else None


@pytest.mark.parametrize("rank", RANKS)
def test_forward_is_the_definition(rank):
    tried = [problem for seed in range(20 * rank * rank) if (problem := small(seed, rank)) is not None]
    assert len(tried) >= 10
    for problem in tried:
        # Absolute, since the scalar loops add the offset to the base and round there.
        np.testing.assert_allclose(
            problem.forward(reference), scalar_forward(problem), rtol=1e-12, atol=1e-12, err_msg=repr(problem)
        )


def test_the_rank_is_free():
    """Rank 4 by the scalar definition: nothing in the reference counts axes."""
    rng = np.random.default_rng(4)
    x, weight = rng.normal(size=(1, 2, 3, 2, 3, 2)), rng.normal(size=(2, 1, 2, 1, 2, 1))
    offset, mask = rng.normal(0, 1, (1, 2 * 4 * 4, 2, 2, 2, 2)), rng.normal(size=(1, 2 * 4, 2, 2, 2, 2))
    template = random_problem(0, 3, np.float64)
    problem = template.replace(
        x=x,
        offset=offset,
        mask=mask,
        weight=weight,
        bias=None,
        grad_output=np.zeros((1, 2, 2, 2, 2, 2)),
        stride=(1,) * 4,
        padding=(0,) * 4,
        dilation=(1,) * 4,
        groups=2,
        offset_groups=2,
    )
    np.testing.assert_allclose(problem.forward(reference), scalar_forward(problem), rtol=1e-12, atol=1e-12)


def dilated(kernel, dilation):
    wide = np.zeros([d * (k - 1) + 1 for k, d in zip(kernel.shape, dilation, strict=True)])
    wide[tuple(slice(None, None, d) for d in dilation)] = kernel
    return wide


def correlate(problem):
    """Ordinary convolution by scipy: correlate with the spread kernel, then keep every stride-th output."""
    padded = np.pad(problem.x, [(0, 0), (0, 0), *pairs(problem.padding, problem.rank)])
    out_channels, group_channels, *_ = problem.weight.shape
    y = np.zeros(problem.grad_output.shape)
    for n, o, channel in itertools.product(range(y.shape[0]), range(out_channels), range(group_channels)):
        image = padded[n, o // (out_channels // problem.groups) * group_channels + channel]
        whole = signal.correlate(
            image, dilated(problem.weight[o, channel], problem.dilation), "valid", "direct"
        )
        y[n, o] += whole[tuple(slice(None, None, s) for s in problem.stride)]
    return y


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("offsets", ["none", "zero"])
def test_without_offsets_it_is_a_convolution(rank, offsets):
    tried = 0
    for seed in range(30):
        problem = random_problem(
            seed, rank, np.float64, with_mask=False, with_bias=False, with_offset=offsets == "zero"
        )
        if not problem.x.size or not problem.grad_output.size:
            continue
        if problem.offset is not None:
            problem = problem.replace(offset=np.zeros_like(problem.offset))
        np.testing.assert_allclose(
            problem.forward(reference), correlate(problem), rtol=1e-12, atol=1e-12, err_msg=repr(problem)
        )
        tried += 1
    assert tried >= 10


@pytest.mark.parametrize("rank", RANKS)
def test_a_1x1_kernel_interpolates_as_scipy_does(rank):
    rng = np.random.default_rng(rank)
    extent = (7, 5, 6)[:rank]
    x = rng.normal(size=(1, 1, *extent))
    offset = rng.normal(0, 4, size=(1, rank, *extent))
    want = ndimage.map_coordinates(
        x[0, 0], np.indices(extent) + offset[0], order=1, mode="grid-constant", cval=0
    )
    got = reference.deform_conv(x, offset, np.ones((1, 1, *[1] * rank)))
    np.testing.assert_allclose(got[0, 0], want, rtol=1e-13, atol=1e-13)


DETECTRON2_TABLE = [
    [30.0, 41.25, 48.75, 45.0, 28.75],
    [62.25, 81.0, 90.0, 80.25, 50.25],
    [99.75, 126.0, 135.0, 117.75, 72.75],
    [105.0, 131.25, 138.75, 120.0, 73.75],
    [71.75, 89.25, 93.75, 80.75, 49.5],
]


def test_detectron2_table():
    """A 3x3 kernel of ones over 0..24, every offset 0.5: pins the border, where other rules are 60 off."""
    x, weight = np.arange(25.0).reshape(1, 1, 5, 5), np.ones((1, 1, 3, 3))
    offset, mask = np.full((1, 18, 5, 5), 0.5), np.full((1, 9, 5, 5), 0.5)
    assert np.array_equal(reference.deform_conv(x, offset, weight, padding=1)[0, 0], DETECTRON2_TABLE)
    halved = reference.modulated_deform_conv(x, offset, mask, weight, padding=1)[0, 0]
    assert np.array_equal(halved, np.array(DETECTRON2_TABLE) / 2)


def test_mmcv_numbers():
    """mmcv's fixed case: offsets come from an ordinary convolution, and gradients pass through both."""
    x = np.array([[[[1.0, 2, 3], [0, 1, 2], [3, 5, 2]]]])
    branch = np.array(
        [
            [0.1, 0.4, 0.6, 0.1],
            [0.3, 0.2, 0.1, 0.3],
            [0.5, 0.5, 0.2, 0.8],
            [0.8, 0.3, 0.9, 0.1],
            [0.3, 0.1, 0.2, 0.5],
            [0.3, 0.7, 0.5, 0.3],
            [0.6, 0.2, 0.5, 0.3],
            [0.4, 0.1, 0.8, 0.4],
        ]
    )
    branch = branch.reshape(8, 1, 2, 2)
    branch_bias = np.array([0.7, 0.1, 0.8, 0.5, 0.6, 0.5, 0.4, 0.7])
    weight = np.array([[[[0.4, 0.2], [0.1, 0.9]]]])

    offset = reference.deform_conv(x, None, branch, branch_bias)
    y = reference.deform_conv(x, offset, weight)
    outer = reference.deform_conv_backward(np.ones_like(y), x, offset, weight)
    inner = reference.deform_conv_backward(outer.offset, x, None, branch)

    np.testing.assert_allclose(y, [[[[1.65, 0], [0, 0]]]], atol=1e-12)
    np.testing.assert_allclose(
        (outer.x + inner.x)[0, 0], [[-0.666, 0.204, 0], [0.03, -0.416, 0.012], [0, 0.252, 0.129]], atol=1e-12
    )
    np.testing.assert_allclose(inner.bias, [1.44, -0.72, 0, 0, -0.10, -0.08, -0.54, -0.54], atol=1e-12)
    np.testing.assert_allclose(inner.weight[0, 0], [[1.44, 2.88], [0, 1.44]], atol=1e-12)
    np.testing.assert_allclose(outer.weight, [[[[3.62, 0], [0.40, 0.18]]]], atol=1e-12)


def test_dtype_changes_the_arithmetic_but_not_the_sampling_points():
    """0.3 in float32 stays that number in float64; what rounds up to the next cell in float32 stays there."""
    x, weight = np.array([[[1.0, 10, 100]]], np.float32), np.ones((1, 1, 1), np.float32)
    offset = np.array([[[0.3, -1e-12, -1e-12]]], np.float32)
    y = reference.deform_conv(x, offset, weight, dtype=np.float64)
    assert y.dtype == np.float64
    assert y[0, 0].tolist() == [1 + 9 * float(np.float32(0.3)), 10, 100]


def test_only_what_is_needed_is_computed():
    problem = random_problem(1, 2, with_offset=True, with_mask=True)
    for name in problem.differentiable:
        gradients = problem.backward(reference, needs=(name,))
        assert [field for field in gradients._fields if getattr(gradients, field) is not None] == [name]
    rigid = problem.replace(offset=None, mask=None)
    assert rigid.backward(reference).offset is None
    assert rigid.backward(reference, modulated=True).mask is None


def test_out_takes_the_result():
    problem = random_problem(2, 2)
    out = np.full_like(problem.grad_output, 7)
    assert problem.forward(reference, out=out) is out
    assert np.array_equal(out, problem.forward(reference))


def test_error_scales_bound_the_results():
    """No scale is smaller than what it measures; that of grad_offset, a difference, not than half of it."""
    for seed in range(40):
        problem = random_problem(seed, dtype=np.float64)
        scales, gradients = problem.scales(), problem.backward(reference)
        results = gradients._asdict() | {"y": problem.forward(reference)}
        for name, result in results.items():
            if result is None:
                assert name == "bias" or scales[name] is None
                continue
            factor = 2 if name == "offset" else 1
            assert scales[name].shape == result.shape
            assert np.all(np.abs(result) <= factor * scales[name] * (1 + 1e-12)), (name, problem)
