"""Scenes to detect digits in: handwritten digits, scaled and turned, pasted on crops of photographs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy
from scipy.ndimage import map_coordinates, zoom

from ..digits.data import LARGEST, SIDE, Digits, originals

Array = Any

# scikit-image's, of its wheel; no photograph is in both sets.
TRAINING_PHOTOGRAPHS = (
    "chelsea",
    "coffee",
    "rocket",
    "immunohistochemistry",
    "coins",
    "brick",
    "gravel",
    "moon",
)
TEST_PHOTOGRAPHS = ("astronaut", "retina", "hubble_deep_field", "camera", "grass")

CANVAS = 112  # pixels of a scene along each axis
COUNTS = 2, 4  # digits of a scene, least and most
HEIGHTS = 18.0, 54.0  # pixels of an upright digit, log-uniformly between
DEGREES = 45.0  # turned by at most so much to either side, so that a 6 is no 9
FINER = 4  # pixels of the smoothed original per pixel
EDGE = 0.4, 0.7  # grey values, of the largest, between which a digit goes from clear to opaque
COLOURS = (
    150.0,
    255.0,
)  # of digits, each of red, green and blue uniformly between: brighter than most photographs
BRIGHTNESS = 0.3, 0.7  # of photographs, by their own
CONTRAST = 90.0  # least distance of a digit's colour from the mean of what it covers, in RGB of 0 to 255
NOISE = 8.0  # standard deviation of a digit's colour from pixel to pixel
TRIES = 50  # to find a place for a digit


class Scene(NamedTuple):
    """An image and its objects."""

    image: Array  # (CANVAS, CANVAS, 3), uint8
    boxes: Array  # (objects, 4): left, top, right, bottom in pixels; the edges of the outermost pixels
    labels: Array  # (objects,), 0 to 9
    masks: Array  # (objects, CANVAS, CANVAS), bool


class Material(NamedTuple):
    """What scenes are made of."""

    photographs: Sequence[Array]  # (height, width, 3), uint8
    digits: Array  # (count, side, side), 0 to 1: smoothed originals
    labels: Array  # (count,)


@cache
def material() -> tuple[Material, Material]:
    """Read the photographs and digits to train on and those to test on; they share none."""
    training, test = originals()
    return made_of(TRAINING_PHOTOGRAPHS, training), made_of(TEST_PHOTOGRAPHS, test)


def made_of(names: Sequence[str], digits: Digits) -> Material:
    """Read photographs, each in its sizes, and smooth digits."""
    sizes = [size for name in names for size in sizes_of(photograph(name))]
    return Material(sizes, smoothed(digits.images), digits.labels)


def photograph(name: str) -> Array:
    """Read a photograph of scikit-image: (height, width) or (height, width, 3), uint8."""
    import skimage.data

    return getattr(skimage.data, name)()


def smoothed(images: Array) -> Array:
    """Enlarge digits (count, SIDE, SIDE) by FINER: 0 to 1."""
    grey = images.astype(numpy.float64) / LARGEST
    finer = [zoom(image, FINER, order=3, grid_mode=True, mode="grid-constant") for image in grey]
    return numpy.array(finer).clip(0, 1)


def sizes_of(photograph: Array) -> list[Array]:
    """Return a photograph in colour, and its halves down to twice the size of a scene."""
    image = numpy.broadcast_to(photograph.reshape(*photograph.shape[:2], -1), (*photograph.shape[:2], 3))
    found = [image]
    while min(image.shape[:2]) // 2 >= CANVAS:
        height, width = (side // 2 for side in image.shape[:2])
        quarters = image[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3)
        image = numpy.rint(quarters.mean(axis=(1, 3))).astype(numpy.uint8)
        found.append(image)
    return found


def compose(material: Material, rng: numpy.random.Generator) -> Scene:
    """Paste digits on a crop of a photograph, where their boxes do not overlap."""
    image = background(material.photographs, rng)
    boxes: list[list[int]] = []
    labels, masks = [], []
    for _ in range(rng.integers(COUNTS[0], COUNTS[1], endpoint=True)):
        chosen = rng.integers(len(material.labels))
        alpha = drawn(material.digits[chosen], rng)
        place = free_place(alpha.shape, boxes, rng)
        if place is not None:
            mask = paste(image, alpha, place, rng)
            boxes.append([place[1], place[0], place[1] + alpha.shape[1], place[0] + alpha.shape[0]])
            labels.append(material.labels[chosen])
            masks.append(mask)
    whole = numpy.rint(image.clip(0, 255)).astype(numpy.uint8)
    return Scene(
        whole, numpy.array(boxes, numpy.float32), numpy.array(labels, numpy.int64), numpy.array(masks)
    )


def background(photographs: Sequence[Array], rng: numpy.random.Generator) -> Array:
    """Crop a photograph anywhere, mirrored or not, and make it darker: float64."""
    photograph = photographs[int(rng.integers(len(photographs)))]
    top, left = (rng.integers(side - CANVAS, endpoint=True) for side in photograph.shape[:2])
    crop = photograph[top : top + CANVAS, left : left + CANVAS]
    return crop[:, :: rng.choice([1, -1])] * rng.uniform(*BRIGHTNESS)


def drawn(digit: Array, rng: numpy.random.Generator) -> Array:
    """Scale and turn a digit: its opacity, cropped to the pixels of its mask, those of at least a half."""
    angle = numpy.deg2rad(rng.uniform(-DEGREES, DEGREES))
    scale = numpy.exp(rng.uniform(*numpy.log(HEIGHTS))) / (FINER * SIDE)
    side = int(numpy.ceil(len(digit) * scale * numpy.sqrt(2)))
    turn = numpy.array([[numpy.cos(angle), -numpy.sin(angle)], [numpy.sin(angle), numpy.cos(angle)]])
    place = numpy.indices((side, side)) - (side - 1) / 2
    source = numpy.tensordot(turn, place, 1) / scale + (len(digit) - 1) / 2
    grey = map_coordinates(digit, source, order=1, mode="grid-constant")
    alpha = ((grey - EDGE[0]) / (EDGE[1] - EDGE[0])).clip(0, 1)
    rows, columns = (numpy.flatnonzero((alpha >= 0.5).any(axis=axis)) for axis in (1, 0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def free_place(
    shape: tuple[int, int], boxes: list[list[int]], rng: numpy.random.Generator
) -> tuple[int, int] | None:
    """Draw the top left corner of a box that meets no other; None where none was found."""
    height, width = shape
    for _ in range(TRIES):
        top, left = (int(rng.integers(CANVAS - side, endpoint=True)) for side in shape)
        apart = (left + width <= b[0] or b[2] <= left or top + height <= b[1] or b[3] <= top for b in boxes)
        if all(apart):
            return top, left
    return None


def paste(image: Array, alpha: Array, place: tuple[int, int], rng: numpy.random.Generator) -> Array:
    """Paint a digit in a colour of its own into an image; return its mask."""
    rows, columns = (slice(start, start + side) for start, side in zip(place, alpha.shape, strict=True))
    behind, opacity = image[rows, columns], alpha[..., None]
    colour = rng.uniform(*COLOURS, 3)
    while numpy.linalg.norm(colour - behind.mean(axis=(0, 1))) < CONTRAST:
        colour = rng.uniform(*COLOURS, 3)
    image[rows, columns] += opacity * (colour + rng.normal(0, NOISE, behind.shape) - behind)
    mask = numpy.zeros(image.shape[:2], bool)
    mask[rows, columns] = alpha >= 0.5
    return mask


def as_input(scenes: Sequence[Scene]) -> Array:
    """Make of scenes what the detector takes: (count, 3, height, width), float32, -1 to 1."""
    images = numpy.array([scene.image for scene in scenes], numpy.float32)
    return numpy.ascontiguousarray(images.transpose(0, 3, 1, 2)) / 127.5 - 1


def scenes(material: Material, seed: Sequence[int], count: int) -> list[Scene]:
    """Compose scenes, always the same from the same seed."""
    rng = numpy.random.default_rng(seed)
    return [compose(material, rng) for _ in range(count)]
