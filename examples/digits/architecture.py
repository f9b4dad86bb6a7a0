"""The three networks, said once for torch and for NumPy.

Each is four 3 x 3 convolutions, each followed by max(0, y), then the mean over all positions and a 1 x 1
convolution that gives the logits of the ten classes. The last two of the four are rigid (plain), deformable
(DCNv1) or modulated deformable (DCNv2). What the offset branches cost the others in parameters, the plain
network has in channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

CLASSES = 10

KINDS = {"plain": "Conv2d", "DCNv1": "DeformConv2d", "DCNv2": "ModulatedDeformConv2d"}
# Output channels of the four convolutions.
CHANNELS = {"plain": (12, 18, 29, 33), "DCNv1": (12, 18, 19, 25), "DCNv2": (12, 18, 16, 18)}


class Conv(NamedTuple):
    """A convolution; `kind` names its class in `dcn_np.layers`, and in `dcn_np.torch` or `torch.nn`."""

    kind: str
    in_channels: int
    out_channels: int
    kernel_size: int = 3
    stride: int = 1

    @property
    def arguments(self) -> dict[str, Any]:
        """What its class is called with; masks begin at 1, so that all three networks begin alike."""
        sizes = {name: value for name, value in self._asdict().items() if name != "kind"}
        masks = {"mask_activation": "2*sigmoid"} if self.kind == KINDS["DCNv2"] else {}
        return {**sizes, "padding": self.kernel_size // 2, **masks}


def convolutions(variant: str) -> dict[str, Conv]:
    """Return the convolutions of "plain", "DCNv1" or "DCNv2" by name, in their order."""
    kind, (first, second, third, fourth) = KINDS[variant], CHANNELS[variant]
    return {
        "conv1": Conv("Conv2d", 1, first, stride=2),
        "conv2": Conv("Conv2d", first, second),
        "conv3": Conv(kind, second, third, stride=2),
        "conv4": Conv(kind, third, fourth),
        "classifier": Conv("Conv2d", fourth, CLASSES, kernel_size=1),
    }
