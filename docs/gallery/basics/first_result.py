"""
What does a deformable convolution do?
======================================

An ordinary convolution reads nine neighbours of each pixel. A deformable one reads them wherever its
offsets say. Here the same filter for upright edges runs over a photograph twice: without offsets, and with
offsets that we choose so that the picture is swirled. In a network, a small convolution would choose them.
"""

import matplotlib.pyplot as plt
import numpy
import skimage.data

import dcn_np

photo = skimage.data.astronaut()[::2, ::2].mean(axis=2, dtype="float32")[None, None] / 255
edges = numpy.array([[[[1, 0, -1], [2, 0, -2], [1, 0, -1]]]], "float32")  # 1 filter, 1 channel, 3 x 3 taps

size = photo.shape[2:]
place = numpy.indices(size) - numpy.reshape(size, (2, 1, 1)) / 2  # (y, x) from the middle
angle = 2 * numpy.exp(-((numpy.linalg.norm(place, axis=0) / 60) ** 2))  # radians: large in the middle
swirled = numpy.array(
    [
        numpy.cos(angle) * place[0] - numpy.sin(angle) * place[1],
        numpy.sin(angle) * place[0] + numpy.cos(angle) * place[1],
    ]
)
offset = numpy.tile(swirled - place, (9, 1, 1))[None].astype("float32")  # y0 x0 y1 x1 ..., all taps alike

ordinary = dcn_np.deform_conv(photo, None, edges, padding=1)
deformed = dcn_np.deform_conv(photo, offset, edges, padding=1)

figure, axes = plt.subplots(1, 3, figsize=(9, 3.5), layout="compressed", sharey=True)
for place, picture, title in zip(
    axes,
    (photo, numpy.abs(ordinary), numpy.abs(deformed)),
    ("the photograph (0 to 1)", "edges, ordinary", f"edges, offsets up to {numpy.abs(offset).max():.0f} px"),
    strict=True,
):
    place.imshow(picture[0, 0], cmap="gray", vmax=1)
    place.set(title=title, xlabel="x (pixels)")
axes[0].set_ylabel("y (pixels)")

# %%
# Everything has a gradient, the offsets too: a network can learn where to look.

gradients = dcn_np.deform_conv_backward(deformed, photo, offset, edges, padding=1)
for name, gradient in gradients._asdict().items():
    print(f"by {name:<6}", None if gradient is None else gradient.shape)
