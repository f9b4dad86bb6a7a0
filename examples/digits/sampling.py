"""Where the last convolution of a trained network looks."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy

from dcn_np import analysis

from .data import Array, as_input
from .numpy_network import Network


class Sampling(NamedTuple):
    """The taps of one output position of conv4; points are (taps, 2), (y, x) in pixels of the image."""

    rigid: Array  # where an ordinary convolution looks
    points: Array
    modulation: Array  # (taps,), 0 to 2


def most_active(network: Network, image: Array) -> Sampling:
    """Find where DCNv2 looks for that output of conv4 which answers most to an image (height, width)."""
    of_node = analysis.of_layers(network.stages(), analysis.Node("conv4.relu"))
    x = as_input(image[None])[0]
    y = of_node.forward(x)
    place = numpy.unravel_index(y.sum(axis=0).argmax(), y.shape[1:])
    layer = of_node.sampled_layers(x)["conv4"]
    # Kernels of three taps, padded by one: an output lies where stride times its place is.
    rigid, points = (
        numpy.array(layer.scale) * analysis.trace_sampling([one], [place]).positions[0]
        for one in (replace(layer, offset=None), layer)
    )
    return Sampling(rigid, points, layer.mask[(0, slice(None), *place)])
