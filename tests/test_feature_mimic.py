"""The feature mimicking loss: against a direct evaluation and differences, and with what is no number."""

import math

import ml_dtypes
import numpy as np
import pytest

import dcn_np
from dcn_np import reference


def features(seed, regions=7, count=33, dtype=np.float64):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, regions, count)).astype(dtype)
    return a, b, rng.random(regions).astype(dtype)


def test_the_value_is_the_definition():
    a, b, w = features(0)
    want = sum(
        w[r] * (1 - np.dot(a[r], b[r]) / math.sqrt(np.dot(a[r], a[r]) * np.dot(b[r], b[r])))
        for r in range(len(a))
    )
    assert dcn_np.feature_mimic_loss(a, b, w) == pytest.approx(want, rel=1e-14)
    assert reference.feature_mimic_loss(a, b, w) == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("module", [dcn_np, reference], ids=["dcn_np", "reference"])
def test_by_hand(module):
    a = np.array([[1.0, 0], [1, 0], [1, 0], [3, 4]])
    b = np.array([[5.0, 0], [-2, 0], [0, 7], [4, 3]])
    assert module.feature_mimic_loss(a, b) == pytest.approx(0 + 2 + 1 + (1 - 24 / 25), rel=1e-15)


@pytest.mark.parametrize("with_weights", [False, True])
def test_gradients_are_central_differences(with_weights):
    a, b, w = features(1, 4, 6)
    w = w if with_weights else None
    gradients = dcn_np.feature_mimic_loss_backward(0.7, a, b, w)
    step = 1e-5
    for which, array in enumerate((a, b)):
        want = np.zeros_like(array)
        for element in range(array.size):
            ends = []
            for sign in (1, -1):
                moved = [a.copy(), b.copy()]
                moved[which].flat[element] += sign * step
                ends.append(dcn_np.feature_mimic_loss(*moved, w))
            want.flat[element] = 0.7 * (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(gradients[which], want, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_against_the_reference(dtype):
    for seed in range(20):
        a, b, w = features(seed, seed % 5, 1 + seed * 7, dtype)
        if len(a) > 2:
            a[1], w[2] = 0, 0
        assert dcn_np.feature_mimic_loss(a, b, w) == pytest.approx(
            reference.feature_mimic_loss(a, b, w), rel=1e-12
        )
        ours = dcn_np.feature_mimic_loss_backward(0.1, a, b, w)
        for mine, want in zip(ours, reference.feature_mimic_loss_backward(0.1, a, b, w), strict=True):
            assert mine.dtype == dtype
            tolerance = float(ml_dtypes.finfo(dtype).eps)
            np.testing.assert_allclose(
                mine.astype(np.float64), want, rtol=tolerance, atol=1e-12 + tolerance**2
            )


def test_the_gradient_is_orthogonal_to_its_feature():
    a, b, _ = features(3)
    for gradient, feature in zip(dcn_np.feature_mimic_loss_backward(1.0, a, b), (a, b), strict=True):
        np.testing.assert_allclose(np.sum(gradient * feature, axis=1), 0, atol=1e-14)


@pytest.mark.parametrize("module", [dcn_np, reference], ids=["dcn_np", "reference"])
def test_zero_vectors_have_cosine_0_and_no_gradient(module):
    a, b = np.array([[0.0, 0], [1, 2], [0, 0]]), np.array([[1.0, 2], [0, 0], [0, 0]])
    assert module.feature_mimic_loss(a, b) == 3
    assert not any(np.any(gradient) for gradient in module.feature_mimic_loss_backward(1.0, a, b))


def test_a_foreground_mask_leaves_regions_out():
    a, b, _ = features(4)
    chosen = np.arange(len(a)) % 2 == 0
    a[~chosen] = np.nan
    assert dcn_np.feature_mimic_loss(a, b, chosen) == dcn_np.feature_mimic_loss(a[chosen], b[chosen])
    assert dcn_np.feature_mimic_loss(a, b, chosen) == dcn_np.feature_mimic_loss(a, b, chosen.astype(float))
    gradients = dcn_np.feature_mimic_loss_backward(1.0, a, b, chosen)
    alone = dcn_np.feature_mimic_loss_backward(1.0, a[chosen], b[chosen])
    for gradient, want in zip(gradients, alone, strict=True):
        assert not gradient[~chosen].any()
        assert np.array_equal(gradient[chosen], want)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_no_size_overflows(size):
    a, b, w = features(5)
    want = dcn_np.feature_mimic_loss(a, b, w)
    assert dcn_np.feature_mimic_loss(a * size, b, w) == pytest.approx(want, rel=1e-13)
    gradient = dcn_np.feature_mimic_loss_backward(1.0, a, b * size, w)[0]
    np.testing.assert_allclose(gradient, dcn_np.feature_mimic_loss_backward(1.0, a, b, w)[0], rtol=1e-10)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(value):
    a, b, _ = features(6)
    a[2, 3] = value
    assert math.isnan(dcn_np.feature_mimic_loss(a, b))
    gradients = dcn_np.feature_mimic_loss_backward(1.0, a, b)
    for gradient in gradients:
        assert np.isnan(gradient[2]).any()
        assert np.isfinite(np.delete(gradient, 2, axis=0)).all()


def test_any_layout_and_no_regions():
    a, b, w = features(7)
    wide = np.zeros((2 * len(a), 2 * a.shape[1]))[::2, ::2]
    wide[...] = a
    assert dcn_np.feature_mimic_loss(wide, np.asfortranarray(b), w) == dcn_np.feature_mimic_loss(a, b, w)
    for shape in ((0, 5), (3, 0), (0, 0)):
        none = np.zeros(shape)
        assert dcn_np.feature_mimic_loss(none, none) == shape[0]
        assert [g.shape for g in dcn_np.feature_mimic_loss_backward(1.0, none, none)] == [shape, shape]


def refused(error, match, *arguments):
    with pytest.raises(error, match=match):
        dcn_np.feature_mimic_loss(*arguments)
    with pytest.raises(error, match=match):
        dcn_np.feature_mimic_loss_backward(1.0, *arguments)


def test_bad_input():
    a, b, w = features(8)
    refused(ValueError, r"^rcnn_features has 1 axis, shape \(33,\); wanted 2", a[0], b[0])
    refused(ValueError, r"array.reshape\(R, 33\)", a[..., None], b)
    refused(ValueError, r"^features has shape \(6, 33\); rcnn_features has \(7, 33\)", a, b[1:])
    refused(ValueError, r"^weights has shape \(6,\); wanted one for each region, \(7,\)", a, b, w[1:])
    refused(TypeError, "^features has dtype float32 but rcnn_features has float64", a, b.astype(np.float32))
    refused(TypeError, "^weights has dtype int64 .* float64 or bool", a, b, w.astype(np.int64))
    refused(TypeError, "^rcnn_features has dtype int64", a.astype(int), b.astype(int))
    refused(TypeError, r"^features is .*; wanted a numpy\.ndarray", a, b.tolist())
    with pytest.raises(ValueError, match=r"^grad_output is .*; wanted a number, .* in float64"):
        dcn_np.feature_mimic_loss_backward(10**5000, a, b)
    for wrong in (True, "1", None, np.ones(1), 1j, np.complex128(1j)):
        with pytest.raises(TypeError, match=r"^grad_output is .*; wanted a number"):
            dcn_np.feature_mimic_loss_backward(wrong, a, b)
