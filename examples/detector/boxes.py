"""Boxes, tensors (..., 4) of left, top, right and bottom: anchors, overlap, regression, suppression."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_CHANGE = math.log(4)  # of a box's width or height by a regression, as a logarithm


def anchors(height: int, width: int, stride: int, sides: tuple[float, ...]) -> Tensor:
    """Return squares around each cell of a map, (height * width * sides, 4), in pixels of the image."""
    y, x = ((torch.arange(count) + 0.5) * stride for count in (height, width))
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flip(-1).reshape(-1, 1, 2)
    half = torch.tensor(sides).reshape(1, -1, 1) / 2
    return torch.cat([centres - half, centres + half], dim=-1).reshape(-1, 4)


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union of each with each, (len(first), len(second))."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    both = (high - low).clamp(min=0).prod(dim=-1)
    return both / (area(first)[:, None] + area(second)[None] - both)


def area(boxes: Tensor) -> Tensor:
    """Return the areas in pixels."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def encoded(boxes: Tensor, references: Tensor, scale: Tensor) -> Tensor:
    """Return what a regression must give to make `boxes` of `references`: shifts and logarithms of sizes."""
    size, wanted = references[:, 2:] - references[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - references[:, :2] - references[:, 2:]) / (2 * size)
    return torch.cat([shift, torch.log(wanted / size)], dim=1) / scale


def decoded(regression: Tensor, references: Tensor, scale: Tensor, side: int) -> Tensor:
    """Return the boxes that a regression makes of `references`, clipped to an image of `side` pixels."""
    change, size = regression * scale, references[:, 2:] - references[:, :2]
    centre = (references[:, :2] + references[:, 2:]) / 2 + change[:, :2] * size
    half = size * change[:, 2:].clamp(-LARGEST_CHANGE, LARGEST_CHANGE).exp() / 2
    return torch.cat([centre - half, centre + half], dim=1).clamp(0, side)


def kept(boxes: Tensor, scores: Tensor, most_overlap: float) -> Tensor:
    """Suppress what overlaps a better box (NMS); return the indices of the others, the best first."""
    order = scores.argsort(descending=True)
    covers = (overlaps(boxes[order], boxes[order]) > most_overlap).numpy()
    alive = torch.ones(len(order), dtype=torch.bool).numpy()
    for place in range(len(order)):
        if alive[place]:
            alive[place + 1 :] &= ~covers[place, place + 1 :]
    return order[torch.from_numpy(alive)]


def matched(references: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return each reference's largest overlap with a true box, and the index of that box."""
    best, index = overlaps(references, truth).max(dim=1)
    return best, index


def sampled(positive: Tensor, negative: Tensor, count: int, most_positive: int) -> tuple[Tensor, Tensor]:
    """Draw at most `count` indices from two masks: (positive ones, negative ones)."""
    found = positive.nonzero()[:, 0]
    found = found[torch.randperm(len(found))[:most_positive]]
    others = negative.nonzero()[:, 0]
    return found, others[torch.randperm(len(others))[: count - len(found)]]
