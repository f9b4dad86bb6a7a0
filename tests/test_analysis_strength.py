"""How much locations count: against differences of the node, and where the bins of regions are."""

import math

import numpy as np
import pytest
from problems import random_problem

import dcn_np
from dcn_np.analysis import bin_positions, effective_bins, effective_sampling

STEP = 2.0**-10
NORMS = {1: lambda g, axis: np.abs(g).sum(axis), 2: lambda g, axis: np.sqrt((g**2).sum(axis)),
         np.inf: lambda g, axis: np.abs(g).max(axis)}  # fmt: skip


def differences(value_of, array):
    """The central differences of a function by each number of an array."""
    found = np.zeros(array.shape)
    for index in np.ndindex(*array.shape):
        moved = array.copy()
        moved[index] += STEP
        high = value_of(moved)
        moved[index] -= 2 * STEP
        found[index] = (high - value_of(moved)) / (2 * STEP)
    return found


def inside_cells(offset):
    """Offsets away from whole numbers, where the derivative jumps."""
    return np.floor(offset) + 0.1 + 0.8 * (offset - np.floor(offset))


def conv_problem(ndim, **sizes):
    sizes = {"batch": 2, "in_channels": 4, "out_channels": 2, "groups": 2, "offset_groups": 2,
             "extent": (4, 3, 3)[:ndim], "kernel": (2, 2, 1)[:ndim]} | sizes  # fmt: skip
    return random_problem(
        ndim, ndim, np.float64, with_offset=True, with_mask=True, with_bias=False, special=False, **sizes
    )


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_the_strength_is_the_norm_of_differences_of_the_node(ndim, norm):
    problem = conv_problem(ndim)
    x, mask, weight = problem.x, problem.mask, problem.weight
    offset, parameters = inside_cells(problem.offset), problem.parameters
    y = dcn_np.modulated_deform_conv(x, offset, mask, weight, None, *parameters)
    node = (1, 1, *(extent // 2 for extent in y.shape[2:]))
    grad_output = np.zeros_like(y)
    grad_output[node] = 1

    def node_of(moved):
        return dcn_np.modulated_deform_conv(x, moved, mask, weight, None, *parameters)[node]

    taps = math.prod(weight.shape[2:])
    by_position = differences(node_of, offset).reshape(2, 2, taps, ndim, *y.shape[2:])
    found = effective_sampling(grad_output, x, offset, mask, weight, *parameters, norm=norm)
    np.testing.assert_allclose(found, NORMS[norm](by_position, 3), rtol=0, atol=1e-9)
    assert found[1].max() > 1e-3
    assert not found[0].any()


def test_an_ordinary_convolution_has_strengths_too():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(1, 2, 6, 6)), rng.normal(size=(1, 2, 3, 3))
    node = np.zeros((1, 1, 6, 6))
    node[0, 0, 2, 3] = 1
    zeros = np.zeros((1, 18, 6, 6))
    wanted = effective_sampling(node, x, zeros, None, weight, padding=1)
    np.testing.assert_array_equal(effective_sampling(node, x, None, None, weight, padding=1), wanted)
    assert wanted[0, 0, :, 2, 3].all()
    wanted[0, 0, :, 2, 3] = 0
    assert not wanted.any()


def test_a_mask_is_a_factor_of_the_strength():
    problem = conv_problem(2, kernel=(2, 2), extent=(5, 5))
    x, offset, weight = problem.x, inside_cells(problem.offset), problem.weight
    grad_output = np.ones_like(dcn_np.deform_conv(x, offset, weight, None, *problem.parameters))
    window = problem.parameters
    whole = effective_sampling(grad_output, x, offset, None, weight, *window)
    masked = effective_sampling(grad_output, x, offset, problem.mask, weight, *window)
    factors = np.abs(problem.mask.reshape(whole.shape))
    np.testing.assert_allclose(masked, factors * whole, rtol=1e-12, atol=1e-12)


# ---- bins


def roi_problem(rng):
    x = rng.normal(size=(2, 3, 9, 11))
    rois = np.array([[0, 4.0, 3.0, 17.0, 12.5], [1, 2.2, 5.0, 9.0, 16.0]])
    offset, mask = rng.normal(0, 0.5, (2, 2, 2, 3)), rng.uniform(0.2, 1, (2, 1, 2, 3))
    return x, rois, offset, mask


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_the_strength_of_a_bin_is_the_norm_of_differences_by_its_place(norm):
    rng = np.random.default_rng(3)
    x, rois, offset, mask = roi_problem(rng)
    sizes = {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2, "gamma": 0.2}
    grad_output = rng.normal(size=(2, 3, 2, 3))

    def node_of(moved):
        return (grad_output * dcn_np.modulated_deform_roi_pool(x, rois, moved, mask, **sizes)).sum()

    by_offset = differences(node_of, offset)
    pixels = 0.2 * 0.5 * (rois[:, 3:] - rois[:, 1:3])[:, :, None, None]
    found = effective_bins(grad_output, x, rois, offset, mask, **sizes, norm=norm)
    np.testing.assert_allclose(found, NORMS[norm](by_offset / pixels, 1), rtol=1e-3, atol=1e-4)


def test_bins_on_the_rigid_grid_have_strengths_that_do_not_depend_on_gamma():
    rng = np.random.default_rng(4)
    x, rois, _, _ = roi_problem(rng)
    grad_output = rng.normal(size=(2, 3, 2, 3))
    found = [effective_bins(grad_output, x, rois, None, None, (2, 3), gamma=gamma) for gamma in (0.1, 1)]
    np.testing.assert_allclose(*found, rtol=1e-12)
    assert found[0].any()


def test_pooling_a_ramp_reads_the_positions_of_the_bins():
    ramp = np.indices((30, 40)).astype(float)[None]  # (y, x) as two channels
    rois = np.array([[0, 8.0, 6.0, 50.0, 44.0], [0, 20.0, 10.0, 41.0, 31.0]])
    offset = np.random.default_rng(5).normal(0, 0.3, (2, 2, 3, 4))
    sizes = {"spatial_scale": 0.5, "gamma": 0.15}
    pooled = dcn_np.deform_roi_pool(ramp, rois, offset, (3, 4), **sizes, sampling_ratio=2)
    np.testing.assert_allclose(bin_positions(rois, offset, (3, 4), **sizes), pooled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("box", [[0, 5.0, 5, 5, 9], [0, 5.0, 9, 9, 5]], ids=str)
def test_an_empty_box_is_refused(box):
    rois = np.array([[0, 1.0, 1, 8, 8], box])
    x, grad_output = np.ones((1, 1, 9, 9)), np.ones((2, 1, 2, 2))
    with pytest.raises(ValueError, match=r"rois\[1\] is .*, an empty box; wanted x1 < x2 and y1 < y2"):
        effective_bins(grad_output, x, rois, None, None, 2)
    with pytest.raises(ValueError, match=r"rois\[1\] is .*, an empty box"):
        bin_positions(rois, None, 2)


def test_hostile_arguments_are_refused():
    x, weight, node = np.ones((1, 1, 5, 5)), np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3))
    for norm in (3, 0, True, "2", None):
        with pytest.raises(ValueError, match=r"norm is .*; wanted 1, 2 or numpy\.inf"):
            effective_sampling(node, x, None, None, weight, norm=norm)
    with pytest.raises(ValueError, match="grad_output has shape"):
        effective_sampling(np.ones((1, 1, 4, 4)), x, np.zeros((1, 18, 3, 3)), None, weight)
    with pytest.raises(TypeError, match="x is "):
        effective_sampling(node, [[1.0]], None, None, weight)
    rois = np.array([[0, 1.0, 1, 4, 4]])
    with pytest.raises(ValueError, match="gamma is 0"):
        effective_bins(np.ones((1, 1, 2, 2)), x, rois, None, None, 2, gamma=0)
    with pytest.raises(ValueError, match="wanted finite numbers"):
        bin_positions(np.array([[0, np.nan, 1, 4, 4]]), None, 2)
    with pytest.raises(ValueError, match=r"offset has shape \(1, 2, 3, 3\)"):
        bin_positions(rois, np.zeros((1, 2, 3, 3)), 2)
