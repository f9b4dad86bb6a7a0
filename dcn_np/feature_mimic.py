"""The feature mimicking loss: a detector's features of a region are drawn to those of R-CNN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy

from . import messages
from .arrays import Array, Kind, kind_of
from .backends import backend_of
from .docstrings import documented
from .messages import count, shown

_SHARED = {
    "features": """
rcnn_features : array, shape (R, features)
    What R-CNN makes of each region, by looking at the region alone; float32, float64 or a half type.
features : array, shape (R, features)
    What the detector makes of the same regions.
weights : array, shape (R,), or None
    A factor for each region, in the dtype of the features, or a mask of bool: which regions count. Where it
    is 0 the features are not looked at. None is all ones.""",
    "errors": """
TypeError
    An argument of the wrong kind, a dtype that is not computed, arrays of different dtypes, or on a GPU.
ValueError
    Shapes that do not fit.""",
    "zhu": """
.. [1] Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", 2018, arXiv:1811.11168,
   section 3.3.""",
}


@documented(_SHARED)
def feature_mimic_loss(rcnn_features: Array, features: Array, weights: Array | None = None) -> float:
    """Sum up, over the regions, one minus the cosine of the angle between two features.

    Parameters
    ----------
    {features}

    Returns
    -------
    float
        The sum over regions of weight * (1 - cos(rcnn_features, features)), computed in float64.

    Raises
    ------
    {errors}

    See Also
    --------
    feature_mimic_loss_backward : The gradients.

    Notes
    -----
    The paper adds it with a factor of 0.1 to the losses of the detector, over 32 positive regions of each
    image. If a feature is all zero the cosine is taken as 0: the region adds its weight. Features that are
    not finite make the loss NaN, if their weight is not 0. No feature overflows, however large.

    References
    ----------
    {zhu}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> rcnn = numpy.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    >>> features = numpy.array([[2.0, 0.0], [1.0, 0.0], [-3.0, -4.0]])
    >>> dcn_np.feature_mimic_loss(rcnn, features)
    3.0
    >>> dcn_np.feature_mimic_loss(rcnn, features, numpy.array([True, True, False]))
    1.0
    """
    _, arrays = _taken(rcnn_features, features, weights)
    regions = _Regions(*arrays)
    return float(numpy.sum(regions.weights * (1 - regions.cosine)))


@documented(_SHARED)
def feature_mimic_loss_backward(
    grad_output: float, rcnn_features: Array, features: Array, weights: Array | None = None
) -> tuple[Array, Array]:
    """Compute the gradients of `feature_mimic_loss`.

    Parameters
    ----------
    grad_output : float
        The gradient with respect to the loss: the loss's own factor, such as 0.1.
    {features}

    Returns
    -------
    tuple of two arrays
        By `rcnn_features` and by `features`, each with dtype and shape of that input; of a region where one
        of the two is all zero, and of one whose weight is 0, both are 0. `weights` have no gradient.

    Raises
    ------
    {errors}

    See Also
    --------
    feature_mimic_loss : The loss.

    Notes
    -----
    With a and b the two features, ``grad_a = -weight * (b / |b| - cos(a, b) * a / |a|) / |a|``. It is
    orthogonal to a: the loss does not see lengths.

    References
    ----------
    {zhu}

    Examples
    --------
    >>> import numpy
    >>> import dcn_np
    >>> rcnn, features = numpy.array([[3.0, 4.0]]), numpy.array([[0.0, 1.0]])
    >>> grad_rcnn, grad_features = dcn_np.feature_mimic_loss_backward(1.0, rcnn, features)
    >>> grad_rcnn.round(3)
    array([[ 0.096, -0.072]])
    """
    factor = _checked_factor(grad_output)
    kind, arrays = _taken(rcnn_features, features, weights)
    regions = _Regions(*arrays)
    grads = regions.gradients(factor)
    with numpy.errstate(over="ignore"):
        a, b = (grad.astype(arrays[0].dtype) for grad in grads)
    return kind.give(a), kind.give(b)


class _Regions:
    """The features of the regions that count, as unit vectors and lengths, in float64."""

    def __init__(self, rcnn_features: Any, features: Any, weights: Any) -> None:
        count_of = len(rcnn_features)
        weights = numpy.ones(count_of) if weights is None else weights.astype(numpy.float64)
        self.shape, self.chosen = rcnn_features.shape, weights != 0
        self.weights = weights[self.chosen]
        self.units, self.lengths = zip(*map(self._unit, (rcnn_features, features)), strict=True)
        with numpy.errstate(invalid="ignore"):
            self.cosine = numpy.sum(self.units[0] * self.units[1], axis=1)

    def _unit(self, features: Any) -> tuple[Any, Any]:
        """Return vectors of length 1, or 0 for zero vectors, and the lengths as (largest element, rest)."""
        wide = features[self.chosen].astype(numpy.float64)
        largest = numpy.max(numpy.abs(wide), axis=1, initial=0)
        largest[largest == 0] = 1
        with numpy.errstate(invalid="ignore"):
            wide /= largest[:, None]
            rest = numpy.sqrt(numpy.sum(wide * wide, axis=1))
            return wide / numpy.where(rest == 0, 1, rest)[:, None], (largest, rest)

    def gradients(self, grad_output: float) -> tuple[Any, Any]:
        """Return the gradients by both features, over all regions."""
        alive = (self.lengths[0][1] != 0) & (self.lengths[1][1] != 0)
        return self._gradient(0, 1, grad_output, alive), self._gradient(1, 0, grad_output, alive)

    def _gradient(self, this: int, other: int, grad_output: float, alive: Any) -> Any:
        largest, rest = (length[alive, None] for length in self.lengths[this])
        unit, towards = self.units[this][alive], self.units[other][alive]
        factor = (grad_output * self.weights)[alive, None]
        some = numpy.zeros((len(alive), self.shape[1]))
        with numpy.errstate(invalid="ignore", over="ignore"):
            some[alive] = -factor * (towards - self.cosine[alive, None] * unit) / rest / largest
        grad = numpy.zeros(self.shape)
        grad[self.chosen] = some
        return grad


def _checked_factor(grad_output: Any) -> float:
    """Return `grad_output` if it is a number; infinities and NaN are passed on."""
    wanted = "wanted a number, the gradient by the loss"
    kinds = int | float | numpy.integer | numpy.floating
    if isinstance(grad_output, bool) or not isinstance(grad_output, kinds):
        raise TypeError(f"grad_output is {shown(grad_output)}; {wanted}")
    try:
        return float(grad_output)
    except OverflowError:
        raise ValueError(f"grad_output is {shown(grad_output)}; {wanted} in float64") from None


def _taken(rcnn_features: Any, features: Any, weights: Any) -> tuple[Kind, tuple[Any, Any, Any]]:
    """Return the kind of the arrays, and the arrays, checked."""
    kind = kind_of(rcnn_features=rcnn_features, features=features, weights=weights)
    a, b = kind.take("rcnn_features", rcnn_features), kind.take("features", features)
    w = kind.take_optional("weights", weights)
    if not isinstance(a, numpy.ndarray):
        raise TypeError(
            "rcnn_features is an array on a GPU; the feature mimicking loss is computed on a CPU only (the "
            "convolutions and poolings run on a GPU): wanted arrays of NumPy, such as cupy.asnumpy gives"
        )
    _check_dtypes(backend_of(a).dtypes(), a, b, w)
    _check_shapes(a.shape, b.shape, None if w is None else w.shape)
    return kind, (a, b, w)


def _check_dtypes(computed: Sequence[Any], a: Any, b: Any, w: Any) -> None:
    if a.dtype not in computed:
        wanted = messages.dtype_wanted(a.dtype, computed)
        raise TypeError(f"rcnn_features has dtype {a.dtype}; wanted {wanted}")
    for name, array in (("features", b), ("weights", w)):
        if array is None or array.dtype == a.dtype or (name == "weights" and array.dtype == bool):
            continue
        or_bool = " or bool" if name == "weights" else ""
        raise TypeError(
            f"{name} has dtype {array.dtype} but rcnn_features has {a.dtype}; wanted {a.dtype}{or_bool}"
        )


def _check_shapes(a: tuple[int, ...], b: tuple[int, ...], w: tuple[int, ...] | None) -> None:
    if len(a) != 2:
        raise ValueError(
            f"rcnn_features has {count(len(a), 'axis')}, shape {a}; wanted 2: (R, features), the features of "
            f"one region being array[None] and those of a map array.reshape(R, {math.prod(a[1:])})"
        )
    if b != a:
        raise ValueError(f"features has shape {b}; rcnn_features has {a}: wanted the same")
    if w is not None and w != a[:1]:
        raise ValueError(f"weights has shape {w}; wanted one for each region, {a[:1]}")
