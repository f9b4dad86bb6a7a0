"""Average precision of boxes and masks, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from ..digits.architecture import CLASSES
from .data import Array, Scene, as_input
from .network import Detections, Detector

METRICS = ("AP", "AP50", "AP75")
KINDS = {"box": "bbox", "mask": "segm"}  # and the names that pycocotools has for them
COLUMNS = [f"{kind} {metric}" for kind in KINDS for metric in METRICS]


def detect_all(detector: Detector, scenes: Sequence[Scene], batch: int = 20) -> list[Detections]:
    """Return what a detector finds in each scene."""
    starts = range(0, len(scenes), batch)
    images = (torch.from_numpy(as_input(scenes[start : start + batch])) for start in starts)
    return [found for several in images for found in detector.detect(several)]


def whole_masks(found: Detections, side: int) -> Array:
    """Return the masks of detections as (count, side, side) bool, each filled in its box."""
    boxes = found.boxes[:, :, None, None]
    middle = torch.arange(side) + 0.5
    x = (middle - boxes[:, 0]) / (boxes[:, 2] - boxes[:, 0])
    y = (middle[:, None] - boxes[:, 1]) / (boxes[:, 3] - boxes[:, 1])
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1) * 2 - 1
    masks = grid_sample(found.masks[:, None], grid, padding_mode="border", align_corners=False)[:, 0] >= 0.5
    return (masks & (grid.abs() <= 1).all(dim=-1)).numpy()


def average_precision(scenes: Sequence[Scene], found: Sequence[Detections]) -> dict[str, float]:
    """Return AP, AP50 and AP75 of boxes and masks in percent, such as "box AP50"."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = as_results(found, scenes[0].image.shape[0])
    if not results:  # which pycocotools cannot read
        return dict.fromkeys(COLUMNS, 0.0)
    precision: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = as_coco(scenes)
        truth.createIndex()
        answers = truth.loadRes(results)
        for kind, name in KINDS.items():
            evaluation = COCOeval(truth, answers, name)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            precision |= {
                f"{kind} {metric}": 100 * float(evaluation.stats[i]) for i, metric in enumerate(METRICS)
            }
    return precision


def as_coco(scenes: Sequence[Scene]) -> dict[str, Any]:
    """Make of scenes what pycocotools reads from an annotation file."""
    annotations = [
        annotation(image, box, label)
        | {"segmentation": encoded(mask), "area": float(mask.sum()), "iscrowd": 0}
        for image, scene in enumerate(scenes)
        for box, label, mask in zip(scene.boxes, scene.labels, scene.masks, strict=True)
    ]
    return {
        "images": [
            {"id": image, "height": len(scene.image), "width": len(scene.image)}
            for image, scene in enumerate(scenes)
        ],
        "categories": [{"id": label, "name": str(label)} for label in range(CLASSES)],
        "annotations": [one | {"id": place} for place, one in enumerate(annotations, 1)],
    }


def as_results(found: Sequence[Detections], side: int) -> list[dict[str, Any]]:
    """Make of detections what pycocotools reads from a file of results."""
    return [
        annotation(image, box, label) | {"score": float(score), "segmentation": encoded(mask)}
        for image, one in enumerate(found)
        for box, score, label, mask in zip(*map(as_array, one[:3]), whole_masks(one, side), strict=True)
    ]


def annotation(image: int, box: Array, label: int) -> dict[str, Any]:
    """Return what truth and results have in common; a box is left, top, width and height there."""
    left, top, right, bottom = map(float, box)
    return {"image_id": image, "category_id": int(label), "bbox": [left, top, right - left, bottom - top]}


def as_array(tensor: Tensor) -> Array:
    """Return a tensor as NumPy's array."""
    return tensor.numpy()


def encoded(mask: Array) -> dict[str, Any]:
    """Encode a mask by run lengths."""
    from pycocotools import mask as rle

    found: dict[str, Any] = rle.encode(numpy.asfortranarray(mask.astype(numpy.uint8)))
    return found
