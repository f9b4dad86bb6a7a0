"""
How do bins of a region find what matters?
==========================================

A detector pools the features of a box into a grid of bins. Deformable pooling moves each bin by an offset
of its own, in parts of the box's size. Offsets have gradients: here they climb. The feature map is how
steep a photograph is, and the bins of one box move to where it is steeper, a step at a time.
"""

import matplotlib.pyplot as plt
import numpy
import skimage.data
import skimage.filters

import dcn_np
from dcn_np.analysis import bin_positions, plot

photo = skimage.data.astronaut().transpose(2, 0, 1).astype("float32")[:, :260, 80:340] / 255
steepness = skimage.filters.gaussian(skimage.filters.sobel(photo.mean(axis=0)), 3)
features = steepness[None, None].astype("float32")

rois = numpy.array([[0, 75, 30, 205, 200]], "float32")  # image, x1, y1, x2, y2
pooling = {"output_size": 7, "sampling_ratio": 2}
start = numpy.zeros((1, 2, 7, 7), "float32")  # channel 0 is x, channel 1 is y

# %%
# Each step raises the sum of all bins: by its gradient, every bin as far as the steepest of them all.

offset, means = start.copy(), []
for _ in range(60):
    pooled = dcn_np.deform_roi_pool(features, rois, offset, **pooling)
    means.append(float(pooled.mean()))
    found = dcn_np.deform_roi_pool_backward(
        numpy.ones_like(pooled), features, rois, offset, **pooling, needs=("offset",)
    ).offset
    offset += 0.02 * found / numpy.abs(found).max()

before, after = (bin_positions(rois, offsets, 7)[0].reshape(2, 49) for offsets in (start, offset))
way = numpy.linalg.norm(after - before, axis=0)
print(f"mean feature of the bins: {means[0]:.4f} at first, {means[-1]:.4f} after {len(means)} steps")
print(f"bins moved by {way.mean():.1f} px in the mean, {way.max():.1f} px at most")

figure, axes = plt.subplots(1, 2, figsize=(9, 5), layout="compressed", sharey=True)
for place, image, title in (
    (axes[0], photo, f"bins at first: mean feature {means[0]:.3f}"),
    (axes[1], features[0] / features.max(), f"and where they went: {means[-1]:.3f}, on the features"),
):
    plot.show_image(place, image)
    left, top, right, bottom = rois[0, 1:]
    place.plot([left, right, right, left, left], [top, top, bottom, bottom, top], "w--")
    place.set(title=title, ylabel="" if place is axes[1] else "y (pixels)")
plot.sampling_points(axes[0], before.T)
axes[1].plot(*numpy.stack([before, after])[:, ::-1].transpose(1, 0, 2), color="#F0E442", linewidth=1)
plot.sampling_points(axes[1], after.T)
