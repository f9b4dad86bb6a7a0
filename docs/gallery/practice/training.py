"""
How do I train a layer without a framework?
===========================================

``forward``, ``backward``, and a rule that changes the parameters: layers of `dcn_np.layers` are arrays. The
task is one that an ordinary 3 x 3 convolution cannot do. It shall repeat a photograph as it is 5 pixels
further down and 4 further left; a deformable one can learn to look there.
"""

import matplotlib.pyplot as plt
import numpy
import skimage.data
import skimage.filters

from dcn_np import analysis, layers
from dcn_np.analysis import plot

photo = skimage.filters.gaussian(skimage.data.camera()[::4, ::4].astype("float32") / 255, 2)
x = photo[None, None]
target = numpy.roll(x, (-5, 4), axis=(2, 3))  # what lies 5 pixels further down and 4 further left
inside = numpy.zeros_like(x)
inside[..., 8:-8, 8:-8] = 1  # near the borders there is nothing to look at


def train(layer, steps=300, rate=0.05):
    """Let Adam lower the mean squared error; return the losses."""
    first, second, losses = {}, {}, []
    for step in range(1, steps + 1):
        difference = inside * (layer.forward(x) - target)
        losses.append(float((difference**2).sum() / inside.sum()))
        layer.backward(2 * difference / inside.sum())
        for name, parameter in layer.parameters().items():
            gradient = layer.gradients[name]
            first[name] = 0.9 * first.get(name, 0) + 0.1 * gradient
            second[name] = 0.99 * second.get(name, 0) + 0.01 * gradient**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.99**step)
            parameter -= rate * mean / (numpy.sqrt(square) + 1e-8)
    return losses


trained = {
    "ordinary": layers.Conv2d(1, 1, 3, padding=1, rng=0),
    "deformable": layers.DeformConv2d(1, 1, 3, padding=1, rng=0),
}
losses = {name: train(layer) for name, layer in trained.items()}

plt.style.use("tableau-colorblind10")
_, axes = plt.subplots(figsize=(6, 3.5), layout="compressed")
for line, (name, found) in zip(("--", "-"), losses.items(), strict=True):
    axes.semilogy(found, line, label=f"{name}: {found[0]:.3f} to {found[-1]:.1e}")
axes.set(xlabel="step", ylabel="mean squared error", title="training: error at first and at last")
axes.legend()

# %%
# Where does it look now? The taps of one pixel (cross), their areas by the trained filter:

layer, node = trained["deformable"], (64, 84)
offset, _ = layer.branch(x)
points = analysis.sampling_positions(offset, 3, padding=1)[0, 0][:, :, *node]
weights = layer.weight.ravel()
y, x_ = weights @ points / weights.sum() - node
_, axes = plt.subplots(figsize=(4.6, 4.6), layout="compressed")
plot.sampling_points(plot.show_image(axes, x[0]), points, weights / numpy.abs(weights).max())
axes.set(xlim=(node[1] - 16, node[1] + 16), ylim=(node[0] + 16, node[0] - 16))
axes.plot(*node[::-1], "x", color="#F0E442", markersize=10, markeredgewidth=3)
axes.set_title(f"weighted mean: y {y:+.1f}, x {x_:+.1f} px (wanted +5, -4)", fontsize=10)
