"""
Which part of the image is enough for a node?
=============================================

The error-bounded saliency region is the smallest part of the image that keeps the features of a node, all
else removed: 1 - cosine of the features stays within a bound. The search says how it went, and ends with a
region whose error is within the bound.
"""

import matplotlib.pyplot as plt
import numpy

from dcn_np import analysis
from dcn_np.analysis import plot
from dcn_np.commands.demo_digits import TrainedDigits

trained = TrainedDigits()
image = trained.digits.images[8][None] / numpy.float32(255)
network = trained.network("DCNv2")
of_node = analysis.of_layers(network.stages(), analysis.Node("conv4.relu", position=(3, 3)))
error_of = of_node.cosine_error(image)
bounds = 0.1, 0.03, 0.01
regions = [analysis.error_bounded_saliency(error_of, image, bound) for bound in bounds]

figure, axes = plt.subplots(1, 4, figsize=(10.5, 3.4), layout="compressed", sharey=True)
plot.show_image(axes[0], image).set_title(f"the image; without it\nthe error is {error_of(0 * image)[0]:.3f}")
for place, bound, region in zip(axes[1:], bounds, regions, strict=True):
    plot.salient_region(plot.show_image(place, image), region.mask)
    place.set(title=f"bound {bound}: {100 * region.area:.1f} % kept,\nerror {region.error:.4f}", ylabel="")

# %%
# Is it this region, or would any of its area do? Random ones of as many pixels; where some of them keep the
# bound too, it is too loose to say much about this image:

rng = numpy.random.default_rng(0)
for bound, region in zip(bounds, regions, strict=True):
    masks = [rng.permuted(region.mask.ravel()).reshape(region.mask.shape) for _ in range(100)]
    errors = [error_of(image * mask)[0] for mask in masks]
    within = sum(error <= bound for error in errors)
    print(
        f"bound {bound}: error {region.error:.4f}; {within} of {len(errors)} random regions keep the bound, "
        f"median error {numpy.median(errors):.3f}"
    )

# %%
# The path of the search for the smallest bound: relaxed masks first, whose area is their mean; then cells
# are taken in the order of what these say; then removed while the bound holds.

plt.style.use("tableau-colorblind10")
_, axes = plt.subplots(figsize=(6, 3.6), layout="compressed")
for phase, marker in (("relaxed", "."), ("thresholded", "s"), ("removed", "^")):
    steps = [step for step in regions[-1].steps if step.phase == phase]
    areas, errors = [100 * step.area for step in steps], [step.error for step in steps]
    axes.plot(areas, errors, marker, label=f"{phase}: {len(steps)}")
axes.axhline(bounds[-1], color="black", linestyle="--", label="bound")
axes.set(
    xlabel="area kept (% of the image)",
    ylabel="error, 1 - cosine",
    yscale="log",
    title=f"{regions[-1].evaluations} evaluations of the network",
)
axes.legend()
