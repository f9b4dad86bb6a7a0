"""
Where does each tap read, and how much does it count?
=====================================================

At output position p, tap k of a convolution reads at ``p * stride - padding + k * dilation + offset[k,
p]``. Offsets of channels 2k and 2k + 1 are y and x of tap k, in pixels. Here they turn the grid of taps by
30 degrees about its middle and stretch it by 1.6, at every position alike.
"""

import matplotlib.pyplot as plt
import numpy
import skimage.data

import dcn_np.analysis
from dcn_np.analysis import plot

photo = skimage.data.chelsea()[20:276, 60:316].transpose(2, 0, 1).astype("float32") / 255
window = {"padding": 8, "dilation": 8}  # 3 x 3 taps, 8 pixels apart

turn, stretch = numpy.deg2rad(30), 1.6
rule = stretch * numpy.array([[numpy.cos(turn), numpy.sin(turn)], [-numpy.sin(turn), numpy.cos(turn)]])
taps = 8.0 * (numpy.indices((3, 3)).reshape(2, 9).T - 1)  # (9, 2): (y, x) of each tap from the middle
offset = numpy.empty((1, 18, *photo.shape[1:]), "float32")
offset[:] = (taps @ rule.T - taps).reshape(1, 18, 1, 1)

# %%
# :func:`~dcn_np.analysis.sampling_positions` tells where that leads. It is the affine image of the grid:

rigid, moved = (
    dcn_np.analysis.sampling_positions(offsets, 3, **window)[0, 0] for offsets in (0 * offset, offset)
)
nodes = [(64, 64), (64, 192), (192, 64), (192, 192)]
expected = [numpy.array(node) + taps @ rule.T for node in nodes]
error = max(
    numpy.abs(moved[..., y, x] - points).max() for (y, x), points in zip(nodes, expected, strict=True)
)
print(f"positions {moved.shape} (taps, (y, x), height, width); off the affine grid by at most {error:.1e} px")

# %%
# How much a location counts for an output is the length of the output's gradient by that location: where
# the photograph is flat, or the filter small, moving a tap changes nothing.

smooth = numpy.outer([1, 2, 1], [1, 2, 1]) / 48
weight = numpy.broadcast_to(smooth, (1, 3, 3, 3)).astype("float32")
node = numpy.zeros((1, 1, *photo.shape[1:]), "float32")
for y, x in nodes:
    node[0, 0, y, x] = 1
strength = dcn_np.analysis.effective_sampling(node, photo[None], offset, None, weight, **window)[0, 0]

points = numpy.concatenate([moved[..., y, x] for y, x in nodes])
strengths = numpy.concatenate([strength[:, y, x] for y, x in nodes])

figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="compressed", sharey=True)
for place in axes:
    plot.show_image(place, photo)
for y, x in nodes:
    plot.sampling_points(axes[0], rigid[..., y, x])
plot.sampling_points(axes[1], points, strength=strengths)
figure.colorbar(axes[1].collections[0], label="strength (change of the output per pixel)")
axes[0].set_title("rigid grid")
axes[1].set(title=f"turned by {numpy.rad2deg(turn):.0f}°, stretched by {stretch}", ylabel="")
print(f"strengths: median {numpy.median(strengths):.4f}, largest {strengths.max():.4f}")
