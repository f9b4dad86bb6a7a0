"""
What does a node read, through all layers?
==========================================

A node of the fourth convolution of a network of 3 x 3 kernels reads 9 points of its input, those read 9
points each of the layer below, and so on: 6561 points of the image. In an ordinary network they form a grid
that is the same everywhere. In a deformable one each image makes its own.
"""

import matplotlib.pyplot as plt
import numpy

from dcn_np import analysis
from dcn_np.analysis import plot
from dcn_np.commands.demo_digits import TrainedDigits

trained = TrainedDigits()
image = trained.digits.images[8][None] / numpy.float32(255)  # (1, 28, 28), a digit nobody trained on
position = (3, 3)  # of the 7 x 7 of the last convolution


def chain(variant):
    """Return the convolutions of a network from the image up, with what they made of it."""
    network = trained.network(variant)
    of_node = analysis.of_layers(network.stages(), analysis.Node("conv4.relu", position=position))
    return list(of_node.sampled_layers(image).values())


# %%
# :func:`~dcn_np.analysis.trace_sampling` follows a chain of layers down to the input of the first.
# Positions stay real numbers on the way, and every point carries the product of the masks that lead to it,
# 0 outside the image.

figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), layout="compressed", sharex=True, sharey=True)
for row, variant in zip(axes, ("plain", "DCNv2"), strict=True):
    layers = chain(variant)
    for column, (place, levels) in enumerate(zip(row, (1, 2, 4), strict=True)):
        traced = layers[-levels:]
        trace = analysis.trace_sampling(traced, [position])
        points = numpy.array(traced[0].scale) * trace.positions[0]
        plot.show_image(place, image, pale=True, around=5)
        plot.sampling_points(place, points, trace.modulation[0], area=(30, 12, 1)[column])
        counts = trace.modulation[0] > 0
        spread = numpy.linalg.norm(points[counts].std(axis=0))
        place.set_title(f"{variant}, {len(points)} points\nspread {spread:.1f} px", fontsize=10)
for place in axes[0]:
    place.set_xlabel("")
for place in axes[:, 1:].ravel():
    place.set_ylabel("")
