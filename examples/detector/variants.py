"""The six variants: what is deformable, and what the features of R-CNN teach."""

from __future__ import annotations

from typing import NamedTuple


class Variant(NamedTuple):
    """A way to build and train the detector."""

    conv: str  # of the last stage: a class of torch.nn or of dcn_np.torch
    pooling: str  # over regions, for boxes and for masks: a class of dcn_np.torch, or of network.py
    width: int  # of the two fully connected layers of the box head
    mimicking: str = ""  # the regions that mimic the features of R-CNN: "foreground", "background", "both"


# What the offset branches cost the others in parameters, the regular detector has in fc width.
REGULAR = Variant("Conv2d", "RoIAlign", 322)
DCNV1 = Variant("DeformConv2d", "DeformRoIPool", 198)
DCNV2 = Variant("ModulatedDeformConv2d", "ModulatedDeformRoIPool", 192)
VARIANTS = {
    "regular": REGULAR,
    "DCNv1": DCNV1,
    "DCNv2": DCNV2,
    "DCNv2+mimic-fg": DCNV2._replace(mimicking="foreground"),
    "DCNv2+mimic-bg": DCNV2._replace(mimicking="background"),
    "DCNv2+mimic-both": DCNV2._replace(mimicking="both"),
}
