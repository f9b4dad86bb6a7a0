"""The detector: a backbone, a region proposal network, and heads for boxes and masks over pooled regions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dcn_np.torch

from ..digits.architecture import CLASSES
from .boxes import anchors, decoded, kept
from .variants import Variant

STRIDE = 8  # pixels of the image per cell of the feature map
CHANNELS = (16, 32, 64)  # of the map, halved in size before each
GROUPS = 8  # of channels that are normalised together
STAGE = 3  # convolutions of the last stage, which differ between the variants
ANCHORS = (18.0, 31.0, 54.0)  # pixels along a side
BINS = 7  # of a pooled region along each axis
SAMPLES = 2  # per bin along each axis
POOL_HIDDEN = 64  # width of the branch that makes the offsets of a pooling
MASK_CHANNELS = (32, 16)  # before and after the last doubling of its size
MASK_SIDE = 4 * BINS  # cells of a predicted mask along each axis

PROPOSALS = 40  # per image
PROPOSAL_OVERLAP = 0.7  # largest between two of them
BEFORE_SUPPRESSION = 150
PROPOSAL_SCALE = torch.tensor([1.0, 1.0, 1.0, 1.0])  # of what a regression gives, in units of its reference
BOX_SCALE = torch.tensor([0.1, 0.1, 0.2, 0.2])
DETECTIONS = 20  # per image
DETECTION_OVERLAP = 0.5
LEAST_SCORE = 0.05


class Detections(NamedTuple):
    """What is found in an image, the best first."""

    boxes: Tensor  # (count, 4)
    scores: Tensor  # (count,), 0 to 1
    labels: Tensor  # (count,)
    masks: Tensor  # (count, MASK_SIDE, MASK_SIDE): probabilities within the box


class RoIAlign(nn.Module):
    """The pooling that does not move: called as `dcn_np.torch.DeformRoIPool` is."""

    def __init__(self, in_channels: int, output_size: int, **options: Any) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale, self.sampling_ratio = options["spatial_scale"], options["sampling_ratio"]

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        """Return (regions, channels, output_size, output_size)."""
        return dcn_np.torch.roi_align(x, rois, self.output_size, self.spatial_scale, self.sampling_ratio)


class Detector(nn.Module):
    """A variant's parameters; `losses.py` trains them, `detect` uses them."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        channels, pooled = CHANNELS[-1], CHANNELS[-1] * BINS**2
        self.backbone = backbone(variant.conv)
        self.rpn_conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())
        self.rpn_logit = nn.Conv2d(channels, len(ANCHORS), 1)
        self.rpn_box = nn.Conv2d(channels, 4 * len(ANCHORS), 1)
        self.box_pool, self.mask_pool = pooling(variant.pooling), pooling(variant.pooling)
        self.features = nn.Sequential(
            nn.Flatten(),
            nn.Linear(pooled, variant.width),
            nn.ReLU(),
            nn.Linear(variant.width, variant.width),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(variant.width, CLASSES + 1)
        self.box = nn.Linear(variant.width, 4)
        self.mask = mask_head()

    def propose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (batch, anchors) and regressions (batch, anchors, 4) of a map, and its anchors."""
        hidden = self.rpn_conv(x)
        logits = self.rpn_logit(hidden).permute(0, 2, 3, 1).flatten(1)
        regressions = self.rpn_box(hidden).permute(0, 2, 3, 1).reshape(len(x), -1, 4)
        return logits, regressions, anchors(x.shape[2], x.shape[3], STRIDE, ANCHORS)

    def judge(self, x: Tensor, rois: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features, class logits (background, then each label) and regressions of regions."""
        features = self.features(self.box_pool(x, rois))
        return features, self.classifier(features), self.box(features)

    def region_features(self, images: Tensor, rois: Tensor) -> Tensor:
        """Return the features by which regions of images are judged, (regions, width)."""
        found: Tensor = self.features(self.box_pool(self.backbone(images), rois))
        return found

    def masks(self, x: Tensor, rois: Tensor) -> Tensor:
        """Return the logits of the masks of each class, (regions, CLASSES, MASK_SIDE, MASK_SIDE)."""
        found: Tensor = self.mask(self.mask_pool(x, rois))
        return found

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[Detections]:
        """Find the digits of images (batch, 3, side, side)."""
        x, side = self.backbone(images), images.shape[-1]
        found = [proposals(*parts, side) for parts in each(*self.propose(x))]
        rois = with_index(found)
        _, logits, regressions = self.judge(x, rois)
        boxes = decoded(regressions, rois[:, 1:], BOX_SCALE, side)
        by_image = [part.split(list(map(len, found))) for part in (boxes, logits.softmax(dim=1)[:, 1:])]
        chosen = [detections(*both) for both in zip(*by_image, strict=True)]
        labels = torch.cat([one[2] for one in chosen])
        masks = self.masks(x, with_index([one[0] for one in chosen]))[torch.arange(len(labels)), labels]
        masks = masks.sigmoid().split([len(one[0]) for one in chosen])
        return [Detections(*one, mask) for one, mask in zip(chosen, masks, strict=True)]


def backbone(conv: str) -> nn.Sequential:
    """Build the layers from an image to a map of CHANNELS[-1], a STRIDE-th as large."""
    first, second, third = CHANNELS
    library = nn if conv == "Conv2d" else dcn_np.torch
    last = (getattr(library, conv)(third, third, 3, padding=1, **masks_of(conv)) for _ in range(STAGE))
    return nn.Sequential(
        *normalised(nn.Conv2d(3, first, 3, stride=2, padding=1), first),
        *normalised(nn.Conv2d(first, second, 3, stride=2, padding=1), second),
        *normalised(nn.Conv2d(second, second, 3, padding=1), second),
        *normalised(nn.Conv2d(second, third, 3, stride=2, padding=1), third),
        *(layer for conv in last for layer in normalised(conv, third)),
    )


def normalised(conv: nn.Module, channels: int) -> tuple[nn.Module, ...]:
    """Follow a convolution by what follows each: no BatchNorm, whose statistics would be of crops too."""
    return conv, nn.GroupNorm(GROUPS, channels), nn.ReLU()


def pooling(name: str) -> nn.Module:
    """Build a pooling of regions to BINS by BINS."""
    build = RoIAlign if name == "RoIAlign" else getattr(dcn_np.torch, name)
    options = {"spatial_scale": 1 / STRIDE, "sampling_ratio": SAMPLES, "hidden_channels": POOL_HIDDEN}
    options |= masks_of(name)
    module: nn.Module = build(CHANNELS[-1], BINS, **options)
    return module


def masks_of(name: str) -> dict[str, Any]:
    """Return what modulated layers are built with: masks that begin at 1, so that all begin alike."""
    return {"mask_activation": "2*sigmoid"} if name.startswith("Modulated") else {}


def mask_head() -> nn.Sequential:
    """Build the layers from a pooled region to the logits of its masks."""
    wide, narrow = MASK_CHANNELS
    return nn.Sequential(
        nn.Conv2d(CHANNELS[-1], wide, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(wide, wide, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(wide, wide, 2, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(wide, narrow, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(narrow, CLASSES, 1),
    )


def each(logits: Tensor, regressions: Tensor, references: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Part the proposals' logits and regressions by image."""
    return [(*both, references) for both in zip(logits, regressions, strict=True)]


def proposals(logits: Tensor, regressions: Tensor, references: Tensor, side: int) -> Tensor:
    """Return the PROPOSALS best boxes of an image, (count, 4)."""
    scores, order = logits.topk(min(BEFORE_SUPPRESSION, len(logits)))
    boxes = decoded(regressions[order], references[order], PROPOSAL_SCALE, side)
    return boxes[kept(boxes, scores, PROPOSAL_OVERLAP)[:PROPOSALS]]


def detections(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose among (regions, CLASSES) scores what to report: boxes, scores and labels, the best first."""
    region, label = (scores > LEAST_SCORE).nonzero(as_tuple=True)
    boxes, scores = boxes[region], scores[region, label]
    # Moved apart by class, so that only boxes of one class suppress each other.
    order = kept(boxes + 1e4 * label[:, None], scores, DETECTION_OVERLAP)[:DETECTIONS]
    return boxes[order], scores[order], label[order]


def with_index(boxes: list[Tensor]) -> Tensor:
    """Join the boxes of all images to regions (count, 5), the image's index in front."""
    return torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b], dim=1) for i, b in enumerate(boxes)])
