"""Where frames come from: a folder, a camera, or drawn here. A frame is grey, uint8, (height, width)."""

from __future__ import annotations

import functools
import importlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy

import dcn_np

from ..digits.data import CANVAS, LARGEST, PIXELS_PER_PIXEL, SIDE, Array, Digits

# P5, width, height and the largest value, with comments between them, then one byte and the pixels.
PGM = re.compile(rb"P5" + 3 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"\s")
TURN = 30.0  # degrees to either side
SCALES = 0.7, 1.3  # of a drawn digit
PERIOD = 50  # frames from one side to the other and back


class FrameError(ValueError):
    """A source without frames, or a frame that cannot be used."""


class Frame(NamedTuple):
    """A picture and what it is called."""

    name: str
    pixels: Array


# ---- files


def read_npy(path: Path) -> Array:
    """Read an array; nothing in the file is run."""
    with path.open("rb") as file:
        return numpy.lib.format.read_array(file, allow_pickle=False)


def read_pgm(path: Path) -> Array:
    """Read a binary PGM of up to 8 bits; its largest value becomes 255."""
    stored = path.read_bytes()
    header = PGM.match(stored)
    if header is None:
        raise ValueError(f"begins with {stored[:2]!r}; wanted P5, width, height and largest value of a PGM")
    width, height, largest = map(int, header.groups())
    pixels = numpy.frombuffer(stored, numpy.uint8, offset=header.end())
    if not 0 < largest < 256 or pixels.size != width * height:
        raise ValueError(
            f"{pixels.size} bytes for {height} x {width} pixels of at most {largest}; wanted a byte for each "
            "and at most 255"
        )
    brightened = numpy.minimum(pixels, largest).reshape(height, width) * (255 / largest)
    return brightened.round().astype(numpy.uint8)


def read_picture(path: Path) -> Array:
    """Read any other picture through Pillow or OpenCV, whichever is there."""
    image, cv2 = _module("PIL.Image"), _module("cv2")
    if image is not None:
        with image.open(path) as opened:
            return numpy.asarray(opened.convert("L"))
    if cv2 is None:
        raise ValueError("it needs Pillow or OpenCV (pip install pillow); .pgm and .npy need neither")
    pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if pixels is None:
        raise ValueError("OpenCV knows no such picture")
    return pixels


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


READERS: dict[str, Callable[[Path], Array]] = {
    ".npy": read_npy,
    ".pgm": read_pgm,
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp"), read_picture),
}


def read(path: Path) -> Frame:
    """Read a file by the end of its name."""
    try:
        return Frame(path.name, READERS[path.suffix.lower()](path))
    except (OSError, ValueError) as error:
        raise FrameError(f"{path} cannot be read: {error}") from error


def from_folder(folder: Path) -> Iterator[Frame]:
    """Return the pictures of a folder by name, each read when its turn comes."""
    if not folder.is_dir():
        raise FrameError(f"{folder} is no folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS)
    if not paths:
        raise FrameError(f"{folder} holds no frames; wanted files that end in {', '.join(READERS)}")
    return map(read, paths)


# ---- a camera


def from_camera(number: int) -> Iterator[Frame]:
    """Return the pictures of a camera, without end."""
    cv2 = _module("cv2")
    if cv2 is None:
        raise FrameError("a camera needs OpenCV (pip install opencv-python-headless)")
    camera = cv2.VideoCapture(number)
    if not camera.isOpened():
        raise FrameError(f"camera {number} cannot be opened")
    return _shots(cv2, camera)


def _shots(cv2: Any, camera: Any) -> Iterator[Frame]:
    try:
        taken = 0
        while True:
            there, picture = camera.read()
            if not there:
                return
            yield Frame(f"shot {taken}", cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY))
            taken += 1
    finally:
        camera.release()


# ---- frames of our own


def drawn(originals: Digits) -> Iterator[Frame]:
    """Draw digit after digit without end, each turned and scaled a little further; names say the digits."""
    for index in itertools.count():
        place = index % len(originals.labels)
        phase = 2 * numpy.pi * index / PERIOD
        scale = numpy.interp(numpy.sin(3 * phase), (-1, 1), SCALES)
        pixels = turned(originals.images[place], numpy.deg2rad(TURN) * numpy.sin(phase), scale)
        yield Frame(f"a drawn {originals.labels[place]}", pixels)


def turned(image: Array, angle: float, scale: float) -> Array:
    """Draw an original on the canvas: a kernel of one tap, moved to where each pixel has its source."""
    sine, cosine = numpy.sin(angle), numpy.cos(angle)
    y, x = _places() - (CANVAS - 1) / 2
    turned_back = numpy.array([cosine * y - sine * x, sine * y + cosine * x])
    source = turned_back / (PIXELS_PER_PIXEL * scale) + (SIDE - 1) / 2
    padding = (CANVAS - SIDE) // 2
    offset = (source - (_places() - padding))[None].astype(numpy.float32)
    grey = image[None, None].astype(numpy.float32) * (255 / LARGEST)
    drawn = dcn_np.deform_conv(grey, offset, numpy.ones((1, 1, 1, 1), numpy.float32), padding=padding)
    return drawn[0, 0].round().astype(numpy.uint8)


@functools.cache
def _places() -> Array:
    return numpy.indices((CANVAS, CANVAS))


# ---- what the network takes


def on_canvas(frame: Frame) -> Array:
    """Return the middle square of a frame, averaged down to CANVAS x CANVAS pixels, uint8."""
    pixels = frame.pixels
    if pixels.dtype != numpy.uint8 or pixels.ndim != 2:
        raise FrameError(f"{frame.name} is {pixels.dtype} {pixels.shape}; wanted uint8 (height, width)")
    height, width = pixels.shape
    step = min(height, width) // CANVAS
    if step == 0:
        raise FrameError(f"{frame.name} is {height} x {width} pixels; wanted {CANVAS} x {CANVAS} or more")
    top, left = (height - step * CANVAS) // 2, (width - step * CANVAS) // 2
    square = pixels[top : top + step * CANVAS, left : left + step * CANVAS]
    means = square.reshape(CANVAS, step, CANVAS, step).mean(axis=(1, 3))
    return means.round().astype(numpy.uint8)
