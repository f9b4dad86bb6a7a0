"""The losses of a step: proposals, boxes and masks of the regions sampled, and mimicking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss

import dcn_np.torch

from ..digits.architecture import CLASSES
from .boxes import encoded, matched, sampled
from .data import Scene
from .network import BOX_SCALE, MASK_SIDE, PROPOSAL_SCALE, Detector, each, proposals, with_index

ANCHORS_PER_IMAGE, MOST_POSITIVE_ANCHORS = 64, 32
POSITIVE_ANCHOR, NEGATIVE_ANCHOR = 0.6, 0.3  # overlap with a true box: at least, below
REGIONS_PER_IMAGE, MOST_POSITIVE_REGIONS = 32, 12
POSITIVE_REGION = 0.5


class Truth(NamedTuple):
    """The objects of an image."""

    boxes: Tensor  # (objects, 4)
    labels: Tensor  # (objects,)
    masks: Tensor  # (objects, side, side), float


class Regions(NamedTuple):
    """Regions of a batch that the heads are trained on, and what they should say; positives first in each image."""

    rois: Tensor  # (count, 5)
    labels: Tensor  # (count,); CLASSES for background
    boxes: Tensor  # (count, 4): the true boxes; of no meaning for background
    objects: Tensor  # (count,): which of the batch's objects; likewise


def truths(scenes: Sequence[Scene]) -> list[Truth]:
    """Make tensors of what scenes hold."""
    return [
        Truth(torch.from_numpy(s.boxes), torch.from_numpy(s.labels), torch.from_numpy(s.masks).float())
        for s in scenes
    ]


def losses(detector: Detector, images: Tensor, truth: list[Truth]) -> dict[str, Tensor]:
    """Return the losses of a batch by name."""
    x = detector.backbone(images)
    proposed = each(*detector.propose(x))
    found = {
        "proposals": torch.stack(
            [proposal_loss(*one, t) for one, t in zip(proposed, truth, strict=True)]
        ).mean()
    }
    with torch.no_grad():
        regions = sampled_regions([proposals(*one, images.shape[-1]) for one in proposed], truth)
    _, logits, regressions = detector.judge(x, regions.rois)
    positive = regions.labels < CLASSES
    wanted = encoded(regions.boxes[positive], regions.rois[positive, 1:], BOX_SCALE)
    found["classes"] = cross_entropy(logits, regions.labels)
    found["boxes"] = smooth_l1_loss(regressions[positive], wanted, reduction="sum") / len(logits)
    found["masks"] = mask_loss(detector, x, Regions(*(t[positive] for t in regions)), truth)
    return found


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
        index, labels = index[chosen], objects.labels[index[chosen]].where(positive[chosen], CLASSES)
        found.append((every[chosen], labels, objects.boxes[index], before + index))
        before += len(objects.boxes)
    boxes, *others = zip(*found, strict=True)
    return Regions(with_index(list(boxes)), *map(torch.cat, others))


def mask_loss(detector: Detector, x: Tensor, regions: Regions, truth: list[Truth]) -> Tensor:
    """Return the loss of the masks in positive regions, each that of the region's class."""
    logits = detector.masks(x, regions.rois)[torch.arange(len(regions.labels)), regions.labels]
    masks = torch.cat([t.masks for t in truth])[:, None]
    rois = torch.cat([regions.objects[:, None].float(), regions.rois[:, 1:]], dim=1)
    wanted = dcn_np.torch.roi_align(masks, rois, MASK_SIDE, sampling_ratio=2)[:, 0]
    return binary_cross_entropy_with_logits(logits, (wanted >= 0.5).float())
