"""Where the last convolution of a trained network looks."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy

import dcn_np

from .architecture import convolutions
from .data import Array, as_input
from .numpy_network import Network


class Sampling(NamedTuple):
    """The taps of one output position of conv4; points are (taps, 2), (y, x) in pixels of the image."""

    rigid: Array  # where an ordinary convolution looks
    points: Array
    modulation: Array  # (taps,), 0 to 2


def most_active(network: Network, variant: str, image: Array) -> Sampling:
    """Find where DCNv2 looks for that output of conv4 which answers most to an image (height, width)."""
    network.forward(as_input(image[None]))
    layer, x, y = network.layers["conv4"], network.rectified[2], network.rectified[3]
    place = numpy.unravel_index(y[0].sum(axis=0).argmax(), y.shape[2:])
    branch = layer.conv_offset_weight, layer.conv_offset_bias
    made = dcn_np.deform_conv(x, None, *branch, layer.stride, layer.padding)[(0, slice(None), *place)]
    taps = math.prod(layer.kernel_size)
    # Kernels of three taps, padded by one: an output lies where stride times its place is.
    pixels = math.prod(conv.stride for conv in convolutions(variant).values())
    # Twice the logistic function of l is 1 + tanh(l / 2).
    rigid = numpy.array(place) + numpy.indices(layer.kernel_size).reshape(2, -1).T - 1
    moved = rigid + made[: 2 * taps].reshape(taps, 2)
    return Sampling(pixels * rigid, pixels * moved, 1 + numpy.tanh(made[2 * taps :] / 2))
