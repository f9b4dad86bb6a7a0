"""What tests/pictures holds: one picture for each public function of dcn_np.analysis.plot.

    python tests/drawings.py    # draws them anew; look at each before it is committed

They are drawn of numbers that are written here, so that nothing but the drawing can change them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dcn_np.analysis import NodeView, ReceptiveField, SalientRegion, plot

STORED = Path(__file__).parent / "pictures"
DPI = 80
HEIGHT, WIDTH = 18, 24
CELL = 8  # pixels along a side of what is averaged before it is compared
FRAME = 2.5  # pixels at the borders of axes that are not compared: the line around them


def image():
    """A scene without symmetry: a gradient, a bright disc at the upper right, a dark bar below it."""
    y, x = np.indices((HEIGHT, WIDTH)) / (HEIGHT, WIDTH)[0]
    ground = np.stack([0.3 + 0.3 * y, 0.5 + 0 * y, 0.75 - 0.4 * x / x.max()])
    ground[:, (y - 0.3) ** 2 + (x - 0.95) ** 2 < 0.05] = [[0.95], [0.85], [0.3]]
    ground[:, 13:15, 4:16] = 0.1
    return ground


def points(around=(6.5, 14.0), apart=2.6):
    """Nine taps, pulled apart to the right and turned: positions, modulation and strength."""
    taps = np.indices((3, 3)).reshape(2, 9).T - 1.0
    turned = taps @ np.array([[0.95, 0.3], [-0.3, 0.95]]) * (apart, 1.5 * apart)
    return around + turned, np.linspace(1, 0.15, 9), np.linspace(3, 0.5, 9) ** 2


def field():
    """A receptive field that is wider than high and lies at the right."""
    y, x = np.indices((HEIGHT, WIDTH))
    return np.exp(-((y - 7) ** 2) / 12 - (x - 15) ** 2 / 40)


def region():
    """A saliency region of two pieces."""
    kept = np.zeros((HEIGHT, WIDTH), bool)
    kept[4:9, 12:19], kept[4, 12], kept[12:14, 6:9] = True, False, True
    return kept


def view(*, box=None, around=(6.5, 14.0), apart=2.6):
    """What a node sees, made up."""
    kept = region()
    salient = SalientRegion(kept, 0.0873, float(kept.mean()), image(), kept * 1.0, [], 1)
    seen = ReceptiveField(field(), np.ones(1))
    return NodeView(
        image(), np.array(around), "conv4", *points(around, apart), seen, salient, box and np.array(box)
    )


# ---- the pictures: each returns axes of its figure


def one_axes():
    return plot.new_figure(4, 3).subplots()


def show_image():
    return plot.show_image(one_axes(), image(), around=2)


def show_image_pale():
    return plot.show_image(one_axes(), image(), pale=True)


def label_pixels():
    axes = one_axes()
    axes.plot([2, 9, 4], [1, 5, 8], color=plot.VERMILION)
    return plot.label_pixels(axes)


def sampling_points():
    return plot.sampling_points(plot.show_image(one_axes(), image(), pale=True), *points())


def sampling_points_without_strength():
    return plot.sampling_points(plot.show_image(one_axes(), image()), *points()[:2])


def receptive_field():
    return plot.receptive_field(plot.show_image(one_axes(), image(), pale=True), field())


def salient_region():
    return plot.salient_region(plot.show_image(one_axes(), image()), region())


def outlined_box():
    return plot.outlined_box(plot.show_image(one_axes(), image()), [2.5, 9.5, 10.5, 20.5])


def sheet():
    views = [view(apart=1.4), view(), view(around=(3.0, 17.0), apart=4.0)]
    axes = plot.new_sheet(3, "What three nodes see", HEIGHT / WIDTH)
    return plot.sheet(axes, views, ["regular", "DCNv1", "DCNv2"])[0, 0]


def sheet_of_regions():
    views = [view(apart=apart, box=[2.5, 8.5, 10.5, 19.5]) for apart in (2.6, 3.2)]
    return plot.sheet(plot.new_sheet(2, shape=HEIGHT / WIDTH), views, ["RoIAlign", "DCNv2"])[0, 0]


PICTURES = {
    drawing.__name__: drawing
    for drawing in (
        *(show_image, show_image_pale, label_pixels, sampling_points, sampling_points_without_strength),
        *(receptive_field, salient_region, outlined_box, sheet, sheet_of_regions),
    )
}


class Picture(NamedTuple):
    """Pixels (height, width, 3), 0 to 255, and in them the borders (top, left, bottom, right) of axes."""

    pixels: np.ndarray
    axes: list[list[float]]


def drawn(drawing):
    """Draw a picture, whatever the user's style of matplotlib is."""
    with matplotlib.rc_context(matplotlib.rcParamsDefault | {"font.sans-serif": ["DejaVu Sans"]}):
        figure = drawing().figure
        figure.set_dpi(DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    borders = [axes.get_window_extent() for axes in figure.axes]
    return Picture(pixels, [[len(pixels) - b.y1, b.x0, len(pixels) - b.y0, b.x1] for b in borders])


def path_of(name):
    return STORED / f"{name}.png"


def store(name, picture):
    """Write a picture, with the borders of its axes as a text in the file."""
    about = PngInfo()
    about.add_text("axes", json.dumps(np.round(picture.axes, 2).tolist()))
    Image.fromarray(picture.pixels).save(path_of(name), optimize=True, pnginfo=about)


def stored(name):
    with Image.open(path_of(name)) as file:
        return Picture(np.asarray(file.convert("RGB")), json.loads(file.text["axes"]))


# ---- how far two pictures are apart


def moved(picture, other):
    """Return by how many pixels the borders of axes are apart at most; infinity if there are not as many."""
    if picture.pixels.shape != other.pixels.shape or len(picture.axes) != len(other.axes):
        return np.inf
    return np.abs(np.subtract(picture.axes, other.axes)).max()


def differences(picture, other):
    """Return for each axes the root of the mean squared difference of what lies inside, in grey levels.

    Both are averaged over as many cells, so that letters, and by how little they move the axes, do not count.
    """
    found = []
    for mine, yours in zip(picture.axes, other.axes, strict=True):
        cells = [max(1, round((mine[axis + 2] - mine[axis]) / CELL)) for axis in (0, 1)]
        inside = averaged(picture.pixels, mine, cells) - averaged(other.pixels, yours, cells)
        found.append(np.sqrt((inside**2).mean()))
    return found


def averaged(pixels, borders, cells):
    """Average the inside of axes over cells (rows, columns), pixels in part where a cell has them in part."""
    for axis in (0, 1):
        edges = np.linspace(borders[axis] + FRAME, borders[axis + 2] - FRAME, cells[axis] + 1)
        places = np.arange(pixels.shape[axis])
        low, high = np.maximum.outer(edges[:-1], places), np.minimum.outer(edges[1:], places + 1)
        weights = np.maximum(high - low, 0)
        weights /= weights.sum(axis=1, keepdims=True)
        pixels = np.moveaxis(np.tensordot(weights, pixels.astype(float), (1, axis)), 0, axis)
    return pixels


if __name__ == "__main__":
    STORED.mkdir(exist_ok=True)
    for name, drawing in PICTURES.items():
        store(name, drawn(drawing))
        print(path_of(name))
