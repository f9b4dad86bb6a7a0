"""
How large is the receptive field, regular, DCNv1 and DCNv2?
===========================================================

The effective receptive field is how much a node answers to each pixel: the size of its gradient by the
image, averaged over images. Three networks of the same number of parameters tell warped digits; the node is
in the middle of the last convolution.
"""

import itertools

import matplotlib.pyplot as plt
import numpy

from dcn_np import analysis
from dcn_np.analysis import plot
from dcn_np.commands.demo_digits import TrainedDigits

trained = TrainedDigits()
images = trained.digits.images[:200, None] / numpy.float32(255)
node = analysis.Node("conv4.relu", position=(3, 3))  # of 7 x 7: the feature vector over the middle

fields = {}
for variant in trained.states:
    network = trained.network(variant)
    fields[variant] = analysis.effective_receptive_field(analysis.of_layers(network.stages(), node), images)

figure, axes = plt.subplots(1, 3, figsize=(9, 3.5), layout="compressed", sharey=True)
for place, (variant, found) in zip(axes, fields.items(), strict=True):
    plot.show_image(place, 0 * images[0] + 1)
    plot.receptive_field(place, found.field)
    place.set(title=f"{variant}\nsize {found.size():.1f} px, spread {found.spread():.1f} px", ylabel="")
axes[0].set_ylabel("y (pixels)")

# %%
# Size counts the pixels that matter (more than 4.55 % of the largest), as the side of a square. Spread is
# the root mean squared distance from the centre. How the fields fall off with the distance from the node:

distance = numpy.hypot(*(numpy.indices(images.shape[2:]) - 12))  # the node lies at pixel (12, 12)
edges = numpy.arange(0, 18, 2)
plt.style.use("tableau-colorblind10")
_, axes = plt.subplots(figsize=(6, 3.5), layout="compressed")
for marker, (variant, found) in zip("os^", fields.items(), strict=True):
    rings = [
        found.field[(low <= distance) & (distance < high)].mean() for low, high in itertools.pairwise(edges)
    ]
    axes.semilogy(edges[:-1] + 1, rings / found.field.max(), marker + "-", label=variant)
axes.set(xlabel="distance from the node (pixels)", ylabel="field / largest", title="mean over rings")
axes.legend()
