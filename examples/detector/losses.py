"""The losses of a step: proposals, boxes and masks of the regions sampled, and mimicking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss

import dcn_np.torch

from ..digits.architecture import CLASSES
from .boxes import encoded, matched, sampled
from .data import Scene
from .network import BOX_SCALE, MASK_SIDE, PROPOSAL_SCALE, Detector, each, proposals, with_index

ANCHORS_PER_IMAGE, MOST_POSITIVE_ANCHORS = 64, 32
POSITIVE_ANCHOR, NEGATIVE_ANCHOR = 0.6, 0.3  # overlap with a true box: at least, below
REGIONS_PER_IMAGE, MOST_POSITIVE_REGIONS = 24, 6
POSITIVE_REGION = 0.5  # overlap with a true box, at least
CROP = 48  # pixels along a side of the crops that mimicking looks at; 224 in the paper
MIMICKED_PER_IMAGE = 2  # of REGIONS_PER_IMAGE: in the paper 32 of 512


class Truth(NamedTuple):
    """The objects of an image."""

    boxes: Tensor  # (objects, 4)
    labels: Tensor  # (objects,)
    masks: Tensor  # (objects, side, side), float


class Regions(NamedTuple):
    """Regions of a batch that the heads are trained on, and what they should say."""

    rois: Tensor  # (count, 5)
    classes: Tensor  # (count,): 0 for background, else one more than the digit
    boxes: Tensor  # (count, 4): the true boxes; of no meaning for background
    objects: Tensor  # (count,): which of the batch's objects; likewise


def truths(scenes: Sequence[Scene]) -> list[Truth]:
    """Make tensors of what scenes hold."""
    return [
        Truth(torch.from_numpy(s.boxes), torch.from_numpy(s.labels), torch.from_numpy(s.masks).float())
        for s in scenes
    ]


def losses(
    detector: Detector, images: Tensor, truth: list[Truth], mimicking: Mimicking | None = None
) -> dict[str, Tensor]:
    """Return the losses of a batch by name; their sum is what a step makes smaller."""
    x = detector.backbone(images)
    proposed = each(*detector.propose(x))
    found = [proposal_loss(*one, objects) for one, objects in zip(proposed, truth, strict=True)]
    with torch.no_grad():
        regions = sampled_regions([proposals(*one, images.shape[-1]) for one in proposed], truth)
    features, logits, regressions = detector.judge(x, regions.rois)
    positive = regions.classes > 0
    objects = Regions(*(part[positive] for part in regions))
    wanted = encoded(objects.boxes, objects.rois[:, 1:], BOX_SCALE)
    named = {
        "proposals": torch.stack(found).mean(),
        "classes": cross_entropy(logits, regions.classes),
        "boxes": smooth_l1_loss(regressions[positive], wanted, reduction="sum") / len(logits),
        "masks": mask_loss(detector, x, objects, truth),
    }
    if mimicking is not None:
        named |= mimicking(detector, images, regions, features)
    return named


def proposal_loss(logits: Tensor, regressions: Tensor, references: Tensor, truth: Truth) -> Tensor:
    """Return the loss of the anchors sampled in an image."""
    best, index = matched(references, truth.boxes)
    _, nearest = matched(truth.boxes, references)
    positive, negative = best >= POSITIVE_ANCHOR, best < NEGATIVE_ANCHOR
    positive[nearest], negative[nearest] = True, False
    index[nearest] = torch.arange(len(nearest))
    chosen, others = sampled(positive, negative, ANCHORS_PER_IMAGE, MOST_POSITIVE_ANCHORS)
    both = torch.cat([chosen, others])
    wanted = encoded(truth.boxes[index[chosen]], references[chosen], PROPOSAL_SCALE)
    boxes = smooth_l1_loss(regressions[chosen], wanted, reduction="sum", beta=1 / 9) / len(both)
    return binary_cross_entropy_with_logits(logits[both], positive[both].float()) + boxes


def sampled_regions(proposed: list[Tensor], truth: list[Truth]) -> Regions:
    """Choose among the proposals of each image, and the true boxes, what to train the heads on."""
    found, before = [], 0
    for boxes, objects in zip(proposed, truth, strict=True):
        every = torch.cat([boxes, objects.boxes])
        best, index = matched(every, objects.boxes)
        positive = best >= POSITIVE_REGION
        chosen = torch.cat(sampled(positive, ~positive, REGIONS_PER_IMAGE, MOST_POSITIVE_REGIONS))
        index = index[chosen]
        classes = (objects.labels[index] + 1) * positive[chosen]
        found.append((every[chosen], classes, objects.boxes[index], before + index))
        before += len(objects.boxes)
    boxes, *others = zip(*found, strict=True)
    return Regions(with_index(list(boxes)), *map(torch.cat, others))


def mask_loss(detector: Detector, x: Tensor, objects: Regions, truth: list[Truth]) -> Tensor:
    """Return the loss of the masks of positive regions, each that of the region's class."""
    logits = detector.masks(x, objects.rois)[torch.arange(len(objects.rois)), objects.classes - 1]
    masks = torch.cat([one.masks for one in truth])[:, None]
    rois = torch.cat([objects.objects[:, None].float(), objects.rois[:, 1:]], dim=1)
    wanted = dcn_np.torch.roi_align(masks, rois, MASK_SIDE, sampling_ratio=2)[:, 0]
    return binary_cross_entropy_with_logits(logits, (wanted >= 0.5).float())


class Mimicking(nn.Module):
    """The branch that sees crops of sampled regions, and its two losses; the detector keeps nothing of it."""

    def __init__(self, features: int, regions: str) -> None:
        super().__init__()
        self.branch = dcn_np.torch.FeatureMimicking(features, CLASSES, size=CROP)
        self.regions = regions

    def forward(
        self, detector: Detector, images: Tensor, regions: Regions, features: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses by name; `features` are the detector's of the regions."""
        chosen = dcn_np.torch.sample_regions(regions.rois, regions.classes, MIMICKED_PER_IMAGE, self.regions)
        parts = (part[chosen] for part in (regions.rois, regions.classes, features))
        found = self.branch(images, *parts, detector.region_features)
        return {"mimicking": found.mimic, "crops' classes": found.classification}
