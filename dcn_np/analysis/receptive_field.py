"""The effective receptive field: how much a node answers to each pixel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy
from numpy.typing import NDArray

from ..messages import shown
from .arguments import ValueAndGrad, checked_image, evaluated, norm_over

Array: TypeAlias = NDArray[Any]

# What a Gaussian has left of its height at the border of two standard deviations, by [1] of
# `effective_receptive_field`: one minus the part of its mass inside.
THRESHOLD = 1 - 0.9545


class ReceptiveField(NamedTuple):
    """An effective receptive field.

    Parameters
    ----------
    field : numpy.ndarray, shape (*spatial), float64
        What `effective_receptive_field` defines, for each pixel.
    responses : numpy.ndarray, shape (images,), float64
        The node's response to each image.
    """

    field: Array
    responses: Array

    def size(self, threshold: float = THRESHOLD) -> float:
        """Return the side of a square as large as the field.

        Parameters
        ----------
        threshold : float
            The part of the largest value that a pixel must exceed to count; 1 - 0.9545 in [1]_.

        Returns
        -------
        float
            In pixels: the number of pixels that count, and of it the square root, or in another number of
            dimensions the root of that degree. 0 for a field that is 0 everywhere.

        References
        ----------
        .. [1] Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural
           Networks", 2016, arXiv:1701.04128.
        """
        counted = numpy.count_nonzero(self.field > threshold * self.field.max())
        return float(counted ** (1 / self.field.ndim))

    def centre(self) -> Array:
        """Return the mean position, each pixel weighed by its value.

        Returns
        -------
        numpy.ndarray, shape (ndim,)
            In pixels, axes in the order of the image; NaN for a field that is 0 everywhere.
        """
        return self._mean(numpy.indices(self.field.shape, numpy.float64))

    def spread(self) -> float:
        """Return the root of the mean squared distance from the centre, each pixel weighed by its value.

        Returns
        -------
        float
            In pixels: how far the field reaches, whatever its shape, where `size` counts pixels. NaN for a
            field that is 0 everywhere.
        """
        axes = self.centre().reshape(-1, *[1] * self.field.ndim)
        squares = ((numpy.indices(self.field.shape) - axes) ** 2).sum(axis=0)
        return float(numpy.sqrt(self._mean(squares)))

    def _mean(self, values: Array) -> Array:
        axes = tuple(range(-self.field.ndim, 0))
        total = self.field.sum()
        found: Array = (values * self.field).sum(axis=axes) / (total if total > 0 else numpy.nan)
        return found


def effective_receptive_field(
    value_and_grad: ValueAndGrad, images: Iterable[Any], *, norm: float = 2
) -> ReceptiveField:
    """Measure how much a node answers to each pixel.

    Parameters
    ----------
    value_and_grad : callable
        Takes an image (channels, *spatial) and returns the node's response, a number, and its gradient by the
        image: what `of_layers` and `dcn_np.analysis.torch.of_module` make.
    images : array, shape (images, channels, *spatial), or iterable of arrays (channels, *spatial)
        All of one size, at least one. One forward and one backward are computed for each.
    norm : {1, 2, numpy.inf}
        What makes one number of the gradients by the channels of a pixel: the sum of their sizes, the
        Euclidean length, or the largest size.

    Returns
    -------
    ReceptiveField
        The field and its size.

    Raises
    ------
    TypeError
        Images that are no arrays of floating-point numbers.
    ValueError
        There are no images, one is of another size or not finite, or a gradient is not finite.

    See Also
    --------
    trace_sampling : Where the node samples, without weights.

    Notes
    -----
    The field is the mean over images of the size of the response's gradient, as in [1]_::

        field[p] = mean over images of || d node / d image[:, p] ||

    with the norm over channels. Sizes are averaged, not gradients, so that images do not cancel. The papers
    do not say how channels become one number; for one channel all norms are ``|d node / d image[p]|``.

    References
    ----------
    .. [1] Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks",
       2016, arXiv:1701.04128.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import Node, effective_receptive_field, of_layers
    >>> from dcn_np.layers import Conv2d
    >>> of_node = of_layers([Conv2d(1, 1, 3, dilation=2, rng=0)], Node(channel=0, position=(1, 1)))
    >>> found = effective_receptive_field(of_node, numpy.ones((2, 1, 8, 8), "float32"))
    >>> numpy.argwhere(found.field).min(axis=0), numpy.argwhere(found.field).max(axis=0)
    (array([1, 1]), array([5, 5]))
    >>> found.size()
    3.0
    """
    total, responses = None, []
    for number, given in enumerate(images):
        image = checked_image(f"images[{number}]", given)
        if total is not None and image.shape[1:] != total.shape:
            raise ValueError(
                f"images[{number}] has shape {image.shape}; wanted (channels, *{total.shape}) as images[0]"
            )
        response, gradient = evaluated(value_and_grad, image)
        size = norm_over(gradient, norm, axis=0)
        total = size if total is None else total + size
        responses.append(response)
    if total is None:
        raise ValueError(f"images is {shown(images)}; wanted at least one")
    return ReceptiveField(total / len(responses), numpy.array(responses))
