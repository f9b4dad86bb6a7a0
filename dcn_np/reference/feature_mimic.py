"""The specification of the feature mimicking loss ([1]_, section 3.3).

With a and b the features of one region from the two branches, and w its weight::

    loss = sum over regions of w * (1 - cos(a, b)),    cos(a, b) = <a, b> / (|a| |b|)
    grad_a = -w * (b / |b| - cos(a, b) * a / |a|) / |a|,    and with a and b exchanged for grad_b

If a or b is zero, cos(a, b) is 0 and so are both gradients. A region of weight exactly 0 is not looked at.

References
----------
.. [1] Zhu, Hu, Lin, Dai: Deformable ConvNets v2, arXiv:1811.11168.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .deform_conv import Array


def feature_mimic_loss(
    rcnn_features: Array, features: Array, weights: Array = None, *, dtype: Any = np.float64
) -> float:
    """Sum over the regions of weight * (1 - cosine of the angle between the two features)."""
    a, b, w = _wide(rcnn_features, features, weights, dtype)
    return float(sum(w[i] * (1 - _cosine(a[i], b[i])) for i in range(len(w)) if w[i] != 0))


def feature_mimic_loss_backward(
    grad_output: float,
    rcnn_features: Array,
    features: Array,
    weights: Array = None,
    *,
    dtype: Any = np.float64,
) -> tuple[Array, Array]:
    """Gradients of grad_output * `feature_mimic_loss` by both features."""
    a, b, w = _wide(rcnn_features, features, weights, dtype)
    grad_a, grad_b = np.zeros_like(a), np.zeros_like(b)
    for i in range(len(w)):
        if w[i] != 0 and np.any(a[i]) and np.any(b[i]):
            grad_a[i] = grad_output * w[i] * _slope(a[i], b[i])
            grad_b[i] = grad_output * w[i] * _slope(b[i], a[i])
    return grad_a, grad_b


def _wide(rcnn_features: Array, features: Array, weights: Array, dtype: Any) -> tuple[Array, Array, Array]:
    a, b = np.asarray(rcnn_features, dtype), np.asarray(features, dtype)
    return a, b, np.ones(len(a), dtype) if weights is None else np.asarray(weights, dtype)


def _cosine(a: Array, b: Array) -> Any:
    if not np.any(a) or not np.any(b):
        return 0
    return np.dot(a / np.linalg.norm(a), b / np.linalg.norm(b))


def _slope(a: Array, b: Array) -> Array:
    """d(1 - cosine) / da."""
    norm = np.linalg.norm(a)
    return -(b / np.linalg.norm(b) - _cosine(a, b) * a / norm) / norm
