"""
How far do the offsets of a network reach?
==========================================

Before anything else, look at the lengths of offsets: zeros mean that the branch did not learn, and offsets
far beyond the feature map mean that samples read nothing. The same for masks: near 0 a sample is switched
off.
"""

import matplotlib.pyplot as plt
import numpy

from dcn_np import analysis
from dcn_np.commands.demo_digits import TrainedDigits

trained = TrainedDigits()
images = trained.digits.images[:200, None] / numpy.float32(255)


def sampled_layers(variant):
    """Run 200 digits through a network, and keep how its deformable layers sample."""
    network = trained.network(variant)
    x, scale, found = images, 1, {}
    for name, stage in network.stages().items():
        if hasattr(stage, "branch"):
            window = stage.kernel_size, stage.stride, stage.padding, stage.dilation
            offset, mask = stage.branch(x)
            if offset is not None:
                found[f"{variant}.{name}"] = analysis.SampledLayer(
                    x.shape[2:], *window, offset, mask, scale=scale
                )
            scale *= stage.stride[0]
        x = stage.forward(x)
    return found


layers = sampled_layers("DCNv1") | sampled_layers("DCNv2")
print(analysis.offset_table(analysis.offset_statistics(layers)))

# %%
# Lengths are in pixels of the layer's input ("in the image": times its scale). "Dilation" is the mean
# distance of neighbouring taps, 1 on the rigid grid. All of it, as distributions:

plt.style.use("tableau-colorblind10")
figure, (lengths, masks) = plt.subplots(1, 2, figsize=(9, 3.6), layout="compressed")
for line, (name, layer) in zip(("-", "--", "-.", ":"), layers.items(), strict=True):
    pairs = layer.offset.reshape(len(images), 9, 2, -1)
    sizes = numpy.sort(numpy.linalg.norm(pairs, axis=2).ravel())
    part = numpy.linspace(0, 100, sizes.size)
    lengths.plot(sizes[::50], part[::50], line, label=f"{name}, median {numpy.median(sizes):.2f} px")
    if layer.mask is not None:
        masks.hist(
            layer.mask.ravel(), 50, range=(0, 2), histtype="step", linestyle=line, density=True, label=name
        )
lengths.set(xlabel="length of an offset (pixels of the layer's input)", ylabel="offsets not longer (%)")
masks.set(xlabel="mask", ylabel="density")
lengths.legend(fontsize=8)
masks.legend(fontsize=8)
