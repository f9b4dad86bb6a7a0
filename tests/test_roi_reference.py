"""Is the specification of pooling over regions right? Against truths that share nothing with it.

The definition sample by sample, in loops over scalars; central differences; cases computed by hand; and the
answers of other libraries where they are installed.
"""

import math

import numpy as np
import pytest
from problems import IMPLEMENTATIONS, implementation
from roi_problems import OPERATORS, random_roi_problem

from dcn_np import reference


@pytest.fixture(params=IMPLEMENTATIONS)
def module(request):
    with implementation(request.param) as module:
        yield module


# ---- the definition, one sample at a time


def sample_r(image, y, x):
    """RoIAlign's sample: 0 outside, clamped in the bands at the border."""
    height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width) or not height:
        return 0.0
    return interpolated(image, min(max(y, 0), height - 1), min(max(x, 0), width - 1))


def interpolated(image, y, x):
    rows = np.maximum(0, 1 - np.abs(np.arange(image.shape[0]) - y))
    columns = np.maximum(0, 1 - np.abs(np.arange(image.shape[1]) - x))
    return rows @ image @ columns


def scalar_align(problem):
    sizes = problem.sizes
    scale, ratio = sizes["spatial_scale"], sizes["sampling_ratio"]
    gamma = sizes.get("gamma", 0.1)
    bins_h, bins_w = sizes["output_size"]
    y = np.zeros(problem.grad_output.shape)
    for r, c, i, j in np.ndindex(*y.shape):
        n, x1, y1, x2, y2 = problem.rois[r]
        x1, y1, x2, y2 = (v * scale - 0.5 for v in (x1, y1, x2, y2))
        w, h = x2 - x1, y2 - y1
        grid_h = ratio or math.ceil(h / bins_h)
        grid_w = ratio or math.ceil(w / bins_w)
        if grid_h <= 0 or grid_w <= 0:
            continue
        dx, dy = (0, 0) if problem.offset is None else gamma * problem.offset[r, :, i, j] * (w, h)
        total = sum(
            sample_r(
                problem.x[int(n), c],
                y1 + (i + (a + 0.5) / grid_h) * h / bins_h + dy,
                x1 + (j + (b + 0.5) / grid_w) * w / bins_w + dx,
            )
            for a in range(grid_h)
            for b in range(grid_w)
        )
        mask = 1 if problem.mask is None else problem.mask[r, 0, i, j]
        y[r, c, i, j] = total / (grid_h * grid_w) * mask
    return y


def half_away(v):
    return math.copysign(math.floor(abs(v) + 0.5), v)


def scalar_psroi(problem):
    """As DeformablePSROIPooling of the authors, with an integer part index."""
    s = problem.sizes
    scale, per_part, std, g = s["spatial_scale"], s["sample_per_part"], s["trans_std"], s["group_size"]
    bins_h, bins_w = s["output_size"]
    part_h, part_w = s["part_size"] or s["output_size"]
    classes = 1 if problem.offset is None else problem.offset.shape[1] // 2
    y = np.zeros(problem.grad_output.shape)
    for r, c, i, j in np.ndindex(*y.shape):
        n, x1, y1, x2, y2 = problem.rois[r]
        x1, y1 = half_away(x1) * scale - 0.5, half_away(y1) * scale - 0.5
        w = max((half_away(x2) + 1) * scale - 0.5 - x1, 0.1)
        h = max((half_away(y2) + 1) * scale - 0.5 - y1, 0.1)
        k = c // (s["output_dim"] // classes)
        at = i * part_h // bins_h, j * part_w // bins_w
        dx, dy = (
            (0, 0)
            if problem.offset is None
            else problem.offset[(r, slice(2 * k, 2 * k + 2), *at)] * std * (w, h)
        )
        gh, gw = (min(max(p * g // bins, 0), g - 1) for p, bins in ((i, bins_h), (j, bins_w)))
        image = problem.x[int(n), (c * g + gh) * g + gw]
        height, width = image.shape
        values = []
        for a, b in np.ndindex(per_part, per_part):
            sy = i * h / bins_h + y1 + dy + a * h / bins_h / per_part
            sx = j * w / bins_w + x1 + dx + b * w / bins_w / per_part
            if height and -0.5 <= sy <= height - 0.5 and -0.5 <= sx <= width - 0.5:
                values.append(interpolated(image, min(max(sy, 0), height - 1), min(max(sx, 0), width - 1)))
        y[r, c, i, j] = sum(values) / len(values) if values else 0
    return y


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_is_the_definition(operator):
    scalar = scalar_psroi if operator == "deform_psroi_pool" else scalar_align
    compared = 0
    for seed in range(60):
        problem = random_roi_problem([seed, 1], operator, np.float64)
        # A sample within rounding of where the rules jump may fall on either side.
        shaken = problem.replace(rois=problem.rois + np.array([0, 1e-9, 1e-9, 1e-9, 1e-9]))
        if not np.allclose(problem.forward(reference), shaken.forward(reference), atol=1e-6):
            continue
        if problem.sizes.get("sampling_ratio", 1) > 4 or problem.grad_output.size > 300:
            continue
        np.testing.assert_allclose(
            problem.forward(reference), scalar(problem), rtol=0, atol=1e-11, err_msg=repr(problem)
        )
        compared += bool(problem.grad_output.size)
    assert compared >= 15


# ---- by hand


def one_region(x, roi, function, *arguments, **keywords):
    x = np.asarray(x, float)[None, None]
    return function(x, np.array([[0.0, *roi]]), *arguments, **keywords)[0, 0]


IMAGE = np.arange(16.0).reshape(4, 4)  # value = 4 row + column: bins average to the value at their centre


def test_whole_map_in_four_bins(module):
    y = one_region(IMAGE, (0, 0, 4, 4), module.roi_align, 2, sampling_ratio=2)
    assert y.tolist() == [[2.5, 4.5], [10.5, 12.5]]


def test_the_aligned_form_moves_by_half_a_pixel(module):
    """A region of one pixel has its sample in the middle of that pixel, at 2, not 2.5."""
    assert one_region(IMAGE, (2, 1, 3, 2), module.roi_align, 1, sampling_ratio=1) == 4 * 1 + 2


def test_outside_samples_count(module):
    """One of the two samples along x is at -2: it adds 0 and counts, so the average is halved."""
    y = one_region(np.full((4, 4), 8.0), (-3, 1, 3, 2), module.roi_align, 1, sampling_ratio=2)
    assert y == 4  # samples at x = -2 and 1


def test_the_ends_of_the_band_are_inside(module):
    """x = -1 and x = E are inside and clamped; a step further is outside."""
    x = np.arange(1.0, 5).reshape(1, 4)
    for low, value in ((-1.0, 1.0), (-1.0 - 2.0**-40, 0.0), (4.0, 4.0), (4.0 + 2.0**-40, 0.0)):
        y = one_region(x, (low + 0.5, 0.5, low + 0.5, 0.5), module.roi_align, 1, sampling_ratio=1)
        assert y == value, low


def test_adaptive_sampling(module):
    """Of 3 x 1.5 pixels the only bin has 3 x 2 samples, along y at 0.25 and 1: row 0 weighs 0.75."""
    x = np.zeros((4, 4))
    x[0] = 8
    y = one_region(x, (0, 0.375, 3, 1.875), module.roi_align, 1)
    assert y == 8 * 0.75 / 2


def test_offsets_move_by_the_size_and_channel_0_is_x(module):
    offset = np.zeros((1, 2, 1, 1))
    offset[0, 0], offset[0, 1] = 5, -2.5
    y = one_region(IMAGE, (1, 1, 3, 3), module.deform_roi_pool, offset, 1, gamma=0.1)
    assert y == pytest.approx(4 * (1.5 - 0.5) + (1.5 + 1.0))


def test_a_mask_scales_the_average(module):
    y = one_region(
        IMAGE, (0, 0, 4, 4), module.modulated_deform_roi_pool, None, np.full((1, 1, 1, 1), -3.0), 1
    )
    assert y == -3 * 7.5


def test_inverted_and_empty_regions(module):
    for roi in ((3, 1, 1, 3), (1, 1, 1, 3), (2, 2, 2, 2), (3, 3, 1, 1)):
        assert one_region(IMAGE, roi, module.roi_align, 1) == 0
    # With a fixed number of samples an inverted region is sampled from right to left.
    flipped = one_region(IMAGE, (4, 0, 0, 4), module.roi_align, 2, sampling_ratio=2)
    assert flipped.tolist() == [[4.5, 2.5], [12.5, 10.5]]


def test_rounding_half_away_from_zero(module):
    """0.5 becomes 1, 1.5 and 2.5 become 2 and 3: NumPy's rint would give 0, 2 and 2."""
    x = np.arange(8.0).reshape(1, 8)
    for low, start in ((0.5, 0.5), (1.5, 1.5), (2.5, 2.5)):
        y = one_region(x, (low, 0, low, 0), module.deform_psroi_pool, None, 1, 1, 1, sample_per_part=1)
        assert y == start


def test_position_sensitive_channels(module):
    """group_size 2 and three bins: bins 0 and 1 read the first map, bin 2 the second."""
    x = np.arange(8.0).reshape(1, 8, 1, 1) * np.ones((6, 6))
    rois = np.array([[0.0, 0, 0, 5, 5]])
    y = module.deform_psroi_pool(x, rois, None, 2, 2, 3)
    assert y[0, 0].tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3]]
    assert y[0, 1].tolist() == [[4, 4, 5], [4, 4, 5], [6, 6, 7]]


def test_samples_outside_do_not_count_by_rule_p(module):
    y = one_region(np.full((4, 4), 8.0), (-3, 0, 3, 3), module.deform_psroi_pool, None, 1, 1, 1)
    assert y == 8
    y = one_region(np.full((4, 4), 8.0), (30, 0, 33, 3), module.deform_psroi_pool, None, 1, 1, 1)
    assert y == 0


def test_classes_have_offsets_of_their_own(module):
    x = np.tile(np.arange(8.0), (1, 4, 3, 1))
    offset = np.zeros((1, 4, 1, 1))
    offset[0, 2] = 10 / 3  # class 1, along x; the region is 3 wide
    y = module.deform_psroi_pool(x, np.array([[0.0, 1, 0, 3, 2]]), offset, 4, 1, 1, sample_per_part=1)
    np.testing.assert_allclose(y[0, :, 0, 0], [0.5, 0.5, 1.5, 1.5], rtol=1e-15)


# ---- gradients

STEP = 2.0**-9


def smooth_problem(seed, operator):
    """A problem whose samples are all further from kinks and jumps than a difference reaches, or None."""
    problem = random_roi_problem([seed, 7], operator, np.float64)
    if problem.grad_output.size == 0 or problem.x.size == 0 or problem.grad_output.size > 400:
        return None
    if problem.offset is not None:
        problem = problem.replace(offset=np.where(np.abs(problem.offset) > 1e3, 0.3, problem.offset))
    return problem


def differences(problem, name, module):
    """Differences of <grad_output, y> ahead and behind, by every element."""
    values = getattr(problem, name)

    def y(element, step):
        moved = values.copy()
        moved.flat[element] += step
        return problem.replace(**{name: moved}).forward(module)

    here = problem.forward(module)
    ahead = [np.vdot(problem.grad_output, y(i, STEP) - here) / STEP for i in range(values.size)]
    behind = [np.vdot(problem.grad_output, here - y(i, -STEP)) / STEP for i in range(values.size)]
    return np.reshape(ahead, values.shape), np.reshape(behind, values.shape)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_are_central_differences(operator, module):
    """To 1e-10, in the border bands too.

    The result is linear between kinks: where both sides have the same difference there is none, and the
    difference has no truncation error.
    """
    compared = dict.fromkeys(("x", "offset", "mask"), 0)
    for seed in range(14):
        problem = smooth_problem(seed, operator)
        if problem is None:
            continue
        gradients = problem.backward(module)
        for name in problem.differentiable:
            if getattr(problem, name).size > 300:
                continue
            ahead, behind = differences(problem, name, module)
            want = (ahead + behind) / 2
            scale = np.max(np.abs(want), initial=1e-3)
            smooth = np.abs(ahead - behind) < 1e-10 * scale
            got = getattr(gradients, name)[smooth]
            np.testing.assert_allclose(got, want[smooth], rtol=0, atol=1e-10 * scale, err_msg=repr(problem))
            compared[name] += np.count_nonzero(smooth & (want != 0))
    for name in smooth_problem(1, operator).differentiable:
        assert compared[name] > 20, compared


@pytest.mark.parametrize(
    ("y", "by_y", "by_x"),
    [(-0.4, 0.0, 1.0), (-1.0, 0.0, 1.0), (3.2, 0.0, 1.0), (3.0, 0.0, 1.0), (0.0, 4.0, 1.0), (1.0, 4.0, 1.0)],
)
def test_derivatives_in_the_bands_and_at_kinks(module, y, by_y, by_x):
    """In (-1, 0) and (H - 1, H] the sample is clamped along y, and still moves along x.

    mmcv takes the unclamped y there: at -0.4 its derivative along y is not 0, at 3.2 that along x is.
    """
    x = IMAGE[None, None]
    rois = np.array([[0.0, 1.2, y + 0.0, 2.2, y + 1.0]])
    gradients = module.deform_roi_pool_backward(
        np.ones((1, 1, 1, 1)), x, rois, np.zeros((1, 2, 1, 1)), 1, sampling_ratio=1, gamma=1
    )
    np.testing.assert_allclose(gradients.offset.ravel(), [by_x, by_y], rtol=1e-12)


def test_at_a_kink_the_derivative_is_that_to_the_right(module):
    x = np.array([0.0, 1, 5, 6]).reshape(1, 1, 1, 4)
    rois = np.array([[0.0, 1, 0, 2, 1]])  # its sample is at x = 1
    arrays = np.ones((1, 1, 1, 1)), x, rois, np.zeros((1, 2, 1, 1))
    aligned = module.deform_roi_pool_backward(*arrays, 1, sampling_ratio=1, gamma=1)
    assert aligned.offset.ravel().tolist() == [4, 0]
    # Rule P: of width 3, one sample at (1 + 1) / 2 + ... = 1; the authors' kernel has 0 here.
    rois = np.array([[0.0, 2, 0, 4, 1]])
    sensitive = module.deform_psroi_pool_backward(
        np.ones((1, 1, 1, 1)), x, rois, arrays[3], 1, 1, 1, spatial_scale=0.75, sample_per_part=1, trans_std=1
    )
    start = 2 * 0.75 - 0.5
    assert start == 1
    size = 5 * 0.75 - 0.5 - start
    np.testing.assert_allclose(sensitive.offset.ravel(), [4 * size, 0])


# ---- other libraries


def agree(ours, theirs, problem):
    """To float32 coordinates; a sample on the border of a band may fall on the other side."""
    wrong = np.abs(ours - theirs) > 1e-4
    assert np.count_nonzero(wrong) <= 0.002 * wrong.size, problem


def regular_regions(rng, count, height, width, scale):
    corners = rng.uniform(-0.2, 1.2, (count, 2, 2)) * [width / scale, height / scale]
    corners = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return np.concatenate([rng.integers(0, 2, (count, 1)), corners], axis=1).astype(np.float32)


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_onnxruntime_has_the_same_roi_align(ratio):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(ratio)
    x = rng.standard_normal((2, 3, 14, 17), dtype=np.float32)
    rois = regular_regions(rng, 60, 14, 17, 0.25)
    node = onnx.helper.make_node(
        "RoiAlign",
        ["x", "rois", "images"],
        ["y"],
        output_height=3,
        output_width=4,
        sampling_ratio=ratio,
        spatial_scale=0.25,
        coordinate_transformation_mode="half_pixel",
    )
    tensor = onnx.helper.make_tensor_value_info
    inputs = [tensor("x", 1, x.shape), tensor("rois", 1, (60, 4)), tensor("images", 7, (60,))]
    graph = onnx.helper.make_graph([node], "align", inputs, [tensor("y", 1, (60, 3, 3, 4))])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 16)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": x, "rois": rois[:, 1:], "images": rois[:, 0].astype(np.int64)})
    agree(reference.roi_align(x, rois, (3, 4), 0.25, ratio), theirs, rois)


@pytest.mark.parametrize("ratio", [0, 2])
def test_torchvision_has_the_same_roi_align_and_gradient(ratio):
    torch = pytest.importorskip("torch")
    try:
        from torchvision import ops
    except (ImportError, RuntimeError) as error:  # a wheel for CUDA beside a torch without
        pytest.skip(f"torchvision: {error}")
    rng = np.random.default_rng(ratio)
    x = rng.standard_normal((2, 3, 14, 17))
    rois = regular_regions(rng, 40, 14, 17, 0.25).astype(np.float64)
    tensor = torch.tensor(x, requires_grad=True)
    y = ops.roi_align(tensor, torch.tensor(rois), (3, 4), 0.25, ratio or -1, aligned=True)
    grad = rng.standard_normal(y.shape)
    y.backward(torch.tensor(grad))
    np.testing.assert_allclose(reference.roi_align(x, rois, (3, 4), 0.25, ratio), y.detach(), atol=1e-12)
    ours = reference.roi_align_backward(grad, x, rois, (3, 4), 0.25, ratio).x
    np.testing.assert_allclose(ours, tensor.grad, atol=1e-12)


@pytest.mark.parametrize(("part", "classes"), [(3, 1), (1, 1), (3, 2)])
def test_openvino_has_the_same_psroi_pooling(part, classes):
    """It knows group_size equal to the output size only."""
    openvino = pytest.importorskip("openvino")
    opset = pytest.importorskip("openvino.opset1")
    rng = np.random.default_rng(part)
    size, outputs, count = 3, 4, 50
    x = rng.standard_normal((2, outputs * size**2, 14, 17), dtype=np.float32)
    rois = regular_regions(rng, count, 14, 17, 0.25)
    offset = rng.standard_normal((count, 2 * classes, part, part), dtype=np.float32)
    arrays = x, rois, offset
    inputs = [opset.parameter(array.shape, np.float32) for array in arrays]
    node = opset.deformable_psroi_pooling(
        inputs[0],
        inputs[1],
        outputs,
        0.25,
        size,
        "bilinear_deformable",
        4,
        4,
        0.2,
        part,
        offsets=inputs[2],
    )
    model = openvino.compile_model(openvino.Model([node], inputs), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    theirs = model(arrays)[0]
    ours = reference.deform_psroi_pool(
        x, rois, offset, outputs, size, size, 0.25, part_size=part, sample_per_part=4, trans_std=0.2
    )
    agree(ours, theirs, rois)
