"""
Is my own kernel right?
=======================

`dcn_np.reference` is the definition in plain NumPy, in float64 if asked, and `error_scales` says how large
an error rounding may cause. Here two kernels are checked against it. One is right. The other splits
positions into cells by rounding them toward zero, a mistake that only shows left of and above the image; a
test with positions inside passes it.
"""

import matplotlib.pyplot as plt
import numpy

from dcn_np import reference


def my_deform_conv(x, offset, weight, floor=numpy.floor):
    """Convolve one image with 3 x 3 taps, padding 1, in float32: the kernel in question."""
    channels, height, width = x.shape
    tap, base = numpy.indices((3, 3)).reshape(2, 9) - 1, numpy.indices((height, width))
    position = (base + tap[:, :, None, None].swapaxes(0, 1)).astype("float32") + offset.reshape(
        9, 2, height, width
    )
    cell = floor(position).astype(int)
    fraction = position - cell
    sample = numpy.zeros((channels, 9, height, width), "float32")
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = cell + numpy.reshape(corner, (2, 1, 1))
        near = numpy.where(numpy.reshape(corner, (2, 1, 1)), fraction, 1 - fraction).prod(axis=1)
        inside = ((at >= 0) & (at < numpy.reshape((height, width), (2, 1, 1)))).all(axis=1)
        y, x_ = (at.clip(0)[:, axis].clip(max=(height, width)[axis] - 1) for axis in (0, 1))
        sample += numpy.where(inside, near * x[:, y, x_], 0)
    return numpy.einsum("ock,ckyx->oyx", weight.reshape(len(weight), channels, 9), sample)


rng = numpy.random.default_rng(0)
x = rng.standard_normal((1, 4, 24, 32), "float32")
weight = rng.standard_normal((5, 4, 3, 3), "float32")
offset = rng.normal(0, 2, (1, 18, 24, 32)).astype("float32")

# %%
# An error of one unit is half the distance to the next float32, times the size of the terms that an element
# sums up. A right kernel is within a few units, a wrong one millions away.

exact = reference.deform_conv(x, offset, weight, padding=1, dtype=numpy.float64)
unit = numpy.finfo("float32").eps / 2 * reference.error_scales(None, x, offset, None, weight, padding=1)["y"]
units = {
    name: numpy.abs(my_deform_conv(x[0], offset[0], weight, floor)[None] - exact) / unit
    for name, floor in (("floor", numpy.floor), ("toward zero", numpy.trunc))
}
for name, found in units.items():
    print(f"{name:<12} {found.max():.3g} units of rounding, {(found > 64).mean():.1%} of the elements wrong")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="compressed", sharey=True)
for place, (name, found) in zip(axes, units.items(), strict=True):
    shown = place.imshow(numpy.log10(found.max(axis=(0, 1)) + 0.1), cmap="cividis", vmin=-1, vmax=8)
    place.set(title=f"{name}: {found.max():.2g} units at most", xlabel="x (pixels)")
axes[0].set_ylabel("y (pixels)")
figure.colorbar(shown, ax=list(axes), label="log10 of the error in units")

# %%
# For a gradient, central differences of the reference in float64 are the judge, away from whole
# coordinates, where interpolation has a kink. This is how the tests of this library judge its own.

grad_output = rng.standard_normal(exact.shape)
direction, step = rng.standard_normal(offset.shape), 1e-6
position = offset.astype(numpy.float64)  # rows and columns are whole numbers
near_kink = numpy.abs(position - numpy.rint(position)) < 1e-3
direction[near_kink] = 0
ahead, behind = (
    (
        reference.deform_conv(x, position + sign * step * direction, weight, padding=1, dtype=numpy.float64)
        * grad_output
    ).sum()
    for sign in (1, -1)
)
gradient = reference.deform_conv_backward(
    grad_output, x, offset, weight, padding=1, dtype=numpy.float64
).offset
difference, derivative = (ahead - behind) / (2 * step), (gradient * direction).sum()
print(f"along a random direction: {difference:.8f} by differences, {derivative:.8f} by the gradient")
