"""The ResNet and ResNeXt of the deformable networks' papers, in torch, without the classifier.

Stages are named as in torchvision: layer1 to layer4 are the papers' conv2 to conv5.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

RESNET50 = (3, 4, 6, 3)  # blocks in each stage
RESNET101 = (3, 4, 23, 3)


class Bottleneck(nn.Module):
    """Three convolutions beside an identity, or beside a fourth where the shape changes."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride > 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Halve the extents where the stride is 2."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def resnet(blocks: Sequence[int], groups: int = 1, group_width: int = 64) -> nn.Sequential:
    """An untrained network in evaluation mode: (batch, 3, height, width) to 2048 channels at a 32nd."""
    stages, inputs = [], 64
    for number, count in enumerate(blocks):
        outputs, width = 256 * 2**number, int(64 * 2**number * group_width / 64) * groups
        stage = []
        for block in range(count):
            stage.append(Bottleneck(inputs, width, outputs, 2 if block == 0 and number else 1, groups))
            inputs = outputs
        stages.append(stage)
    network = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    network.append(nn.MaxPool2d(3, 2, 1))
    for number, stage in enumerate(stages, 1):
        network.add_module(f"layer{number}", nn.Sequential(*stage))
    return network.eval()
