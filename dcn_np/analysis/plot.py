"""Pictures of what a node sees, with matplotlib: samples, receptive field, saliency region, sheets of them.

Of `dcn_np` only the commands import this module: whoever wants pictures does. Coordinates are pixels, a
pixel's centre is a whole number, and positions are (y, x). Functions that are given axes draw upon them and
return them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ..messages import shown
from .views import NodeView

Array: TypeAlias = NDArray[Any]

__all__ = [
    "label_pixels",
    "new_figure",
    "new_sheet",
    "outlined_box",
    "receptive_field",
    "salient_region",
    "sampling_points",
    "sheet",
    "show_image",
]

# Of the palette of Okabe and Ito, told apart with every kind of colour vision; the maps are so too, and get
# lighter or darker all the way, so that they are read in grey prints as well.
ORANGE, VERMILION, YELLOW, BLACK = "#E69F00", "#D55E00", "#F0E442", "#000000"
STRENGTHS, FIELDS = "viridis", "YlOrBr"

AREA = 70.0  # square points, of a marker with modulation 1
IN_SHEET = 0.3  # of a marker's area, where panels are small
VEIL = 0.75  # of white over what is removed
OUTSIDE = "#C8D6E5"  # pale blue: no image that is drawn in greys has it
PANEL, ROW_TITLE = 2.1, 0.2  # inches
LEAST_SHAPE = 0.3  # of a panel, whose labels need some room
ROWS = "sampling points\n(area: modulation)", "effective\nreceptive field", "saliency region"
OF_REGIONS = "bins of the region\n(area: modulation)"  # the first of them, where all nodes are of regions

# ---- figures


def new_figure(width: float, height: float, title: str = "", *, dpi: float = 110, size: float = 15) -> Figure:
    """Make an empty figure that no window system is asked about.

    Parameters
    ----------
    width, height : float
        In inches.
    title : str
        Written above all.
    dpi : float
        Pixels to the inch.
    size : float
        Of the title, in points.

    Returns
    -------
    matplotlib.figure.Figure
        With a layout that keeps labels apart.
    """
    figure = Figure(figsize=(width, height), dpi=dpi, layout="compressed")
    if title:
        figure.suptitle(title, fontsize=size)
    return figure


def new_sheet(columns: int, title: str = "", shape: float = 1.0) -> Array:
    """Make the axes of a sheet, large enough to be read in print.

    Parameters
    ----------
    columns : int
        How many nodes.
    title : str
        Written above all.
    shape : float
        Height over width of what is drawn: with that of the image no paper stays empty.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes, shape (3, columns)
        What `sheet` takes; ``axes[0, 0].figure`` is the figure, of 200 pixels to the inch.
    """
    height = PANEL * min(max(shape, LEAST_SHAPE), 1 / LEAST_SHAPE) + ROW_TITLE
    figure = new_figure(PANEL * columns + 1.2, height * len(ROWS) + 0.6, title, dpi=200, size=10)
    axes: Array = figure.subplots(len(ROWS), columns, squeeze=False, sharex=True, sharey=True)
    return axes


# ---- one picture


def label_pixels(axes: Any) -> Any:
    """Label both axes in pixels.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        What is labelled.

    Returns
    -------
    matplotlib.axes.Axes
        The same.
    """
    axes.set_xlabel("x (pixels)", fontsize=9)
    axes.set_ylabel("y (pixels)", fontsize=9)
    axes.tick_params(labelsize=8)
    return axes


def show_image(axes: Any, image: Any, *, pale: bool = False, around: float = 0) -> Any:
    """Draw an image, with labels in pixels.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Where it is drawn.
    image : array, shape (channels, height, width)
        Three channels are red, green and blue; of any other number the mean is drawn in grey. 0 is black and
        1 white; where numbers lie outside of that, the smallest is black and the largest white.
    pale : bool
        Whether it is drawn in light greys, as a background.
    around : float
        Pixels that are shown around the image, in pale blue.

    Returns
    -------
    matplotlib.axes.Axes
        The same.

    Raises
    ------
    ValueError
        An image of another shape.
    """
    image = numpy.asarray(image, numpy.float64)
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {image.shape}; wanted (channels, height, width)")
    low, high = min(0.0, image.min()), max(1.0, image.max())
    if (low, high) != (0.0, 1.0):
        low, high = image.min(), image.max()
    colours = (image - low) / ((high - low) or 1.0)
    if pale or len(colours) != 3:
        colours = colours.mean(axis=0, keepdims=True).repeat(3, axis=0)
    axes.imshow((1 + colours if pale else 2 * colours).transpose(1, 2, 0) / 2, interpolation="nearest")
    height, width = image.shape[1:]
    axes.set(
        xlim=(-0.5 - around, width - 0.5 + around),
        ylim=(height - 0.5 + around, -0.5 - around),
        facecolor=OUTSIDE,
    )
    return label_pixels(axes)


def sampling_points(
    axes: Any, positions: Any, modulation: Any = None, strength: Any = None, *, area: float = AREA
) -> Any:
    """Draw sampling points: their areas in proportion to their modulation, their colours by their strength.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Where they are drawn, such as upon `show_image`.
    positions : array_like, shape (points, 2)
        In pixels, (y, x).
    modulation : array_like, shape (points,), or None
        The factor of each point, whose size counts; None for ones.
    strength : array_like, shape (points,), or None
        How much each point counts, 0 or above; light is the largest. None for one colour.
    area : float
        Of a point with modulation 1, in square points of print.

    Returns
    -------
    matplotlib.axes.Axes
        The same.

    Raises
    ------
    ValueError
        Arrays that do not fit, such as positions that are not in a plane.
    """
    positions = numpy.asarray(positions, numpy.float64)
    if positions.ndim != 2 or positions.shape[1] != 2:
        raise ValueError(f"positions has shape {positions.shape}; wanted (points, 2)")
    sizes = _per_point("modulation", 1 if modulation is None else modulation, positions)
    colours: dict[str, Any] = {"color": ORANGE}
    if strength is not None:
        values = _per_point("strength", strength, positions)
        colours = {"c": values, "cmap": STRENGTHS, "norm": _up_to_the_largest(values)}
    colours |= {"edgecolor": BLACK, "linewidth": 0.8 * (area / AREA) ** 0.5}
    axes.scatter(*positions.T[::-1], s=area * numpy.abs(sizes), **colours)
    return axes


def receptive_field(axes: Any, field: Any) -> Any:
    """Draw an effective receptive field over an image: dark where a pixel matters, clear where it does not.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Where it is drawn, such as upon ``show_image(axes, image, pale=True)``.
    field : array_like, shape (height, width)
        `ReceptiveField.field`. The root of its part of the largest is drawn, so that small ones are seen.

    Returns
    -------
    matplotlib.axes.Axes
        The same.

    Raises
    ------
    ValueError
        A field that is not in a plane.
    """
    values = numpy.asarray(field, numpy.float64)
    if values.ndim != 2:
        raise ValueError(f"field has shape {values.shape}; wanted (height, width)")
    part = numpy.sqrt(_up_to_the_largest(values)(values))
    shown_at = ScalarMappable(Normalize(0, 1), FIELDS).to_rgba(part)
    shown_at[..., 3] = part
    axes.imshow(shown_at, interpolation="nearest")
    return axes


def salient_region(axes: Any, mask: Any) -> Any:
    """Draw a saliency region over an image: an outline, and a veil over all that is removed.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Where it is drawn, such as upon `show_image`.
    mask : array_like, shape (height, width), bool
        `SalientRegion.mask`, the pixels that are kept.

    Returns
    -------
    matplotlib.axes.Axes
        The same.

    Raises
    ------
    ValueError
        A mask that is not in a plane, or not of truth values.
    """
    mask = numpy.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"mask is {shown(mask)}, {mask.dtype}; wanted (height, width), bool")
    veil = numpy.ones((*mask.shape, 4))
    veil[..., 3] = numpy.where(mask, 0, VEIL)
    axes.imshow(veil, interpolation="nearest")
    axes.add_collection(LineCollection(list(_edges(mask)), colors=VERMILION, linewidths=1.2), autolim=False)
    return axes


def outlined_box(axes: Any, box: Any) -> Any:
    """Outline a region of the image.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Where it is drawn, such as upon `show_image`.
    box : array_like, shape (4,)
        Its borders y1, x1, y2, x2 in pixels: `NodeView.box`.

    Returns
    -------
    matplotlib.axes.Axes
        The same.

    Raises
    ------
    ValueError
        Not four numbers.
    """
    borders = numpy.asarray(box, numpy.float64)
    if borders.shape != (4,):
        raise ValueError(f"box has shape {borders.shape}; wanted (4,): y1, x1, y2, x2")
    y, x, height, width = *borders[:2], *(borders[2:] - borders[:2])
    for colour, line in ((BLACK, 1.8), (YELLOW, 0.8)):
        frame = Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=line)
        frame.set_snap(False)  # both lines would else be moved to whole pixels, each by itself
        axes.add_patch(frame)
    return axes


def _per_point(name: str, values: Any, positions: Array) -> Array:
    values = numpy.asarray(values, numpy.float64)
    if values.ndim and values.shape != positions.shape[:1]:
        raise ValueError(f"{name} has shape {values.shape}; wanted one for each of {len(positions)} points")
    return numpy.broadcast_to(values, positions.shape[:1])


def _up_to_the_largest(values: Array) -> Normalize:
    return Normalize(0, float(values.max(initial=0)) or 1.0)


def _edges(mask: Array) -> Array:
    """Return the sides of pixels that lie between kept and removed ones: (sides, 2 ends, (x, y))."""
    padded, found = numpy.pad(mask, 1), []
    for axis in (0, 1):
        begin = numpy.argwhere(numpy.diff(padded, axis=axis)) - 1.5
        begin[:, axis] += 1
        end = begin.copy()
        end[:, 1 - axis] += 1
        found.append(numpy.stack([begin, end], axis=1))
    return numpy.concatenate(found)[..., ::-1]


# ---- sheets


def sheet(axes: Any, views: Sequence[NodeView], titles: Sequence[str] | None = None) -> Any:
    """Draw several nodes side by side: samples, receptive field and saliency region of each.

    Parameters
    ----------
    axes : array of matplotlib.axes.Axes, shape (3, nodes)
        Where they are drawn; `new_sheet` makes them.
    views : sequence of NodeView
        What `view_node` tells of each, such as of one node in an ordinary network, in DCNv1 and in DCNv2.
    titles : sequence of str or None
        One for each; None for none.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes, shape (3, nodes)
        The same.

    Raises
    ------
    ValueError
        Axes, views and titles that are not as many.

    Notes
    -----
    These are the rows of Figure 1 of [1]_. A cross marks the node, or a frame its region. Strengths and
    fields are drawn as parts of the largest of their picture.

    References
    ----------
    .. [1] Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", 2018, arXiv:1811.11168.
    """
    axes = numpy.asarray(axes, object)
    titles = [""] * len(views) if titles is None else list(titles)
    if axes.shape != (len(ROWS), len(views)) or len(titles) != len(views) or not views:
        raise ValueError(
            f"axes has shape {axes.shape}, for {len(views)} views with {len(titles)} titles; wanted "
            "(3, views) and a title for each"
        )
    around = max(_overshoot(view) for view in views)
    for column, view, title in zip(axes.T, views, titles, strict=True):
        _draw_column(column, view, around)
        column[0].set_title(title, fontsize=10)
    _label_rows(axes, OF_REGIONS if all(view.box is not None for view in views) else ROWS[0])
    strengths = any(view.strength is not None for view in views)
    for row, colours, label in ((0, STRENGTHS, "strength / largest"), (1, FIELDS, "√(gradient / largest)")):
        if row or strengths:
            scale = ScalarMappable(Normalize(0, 1), colours)
            bar = axes[row, 0].figure.colorbar(scale, ax=list(axes[row]), pad=0.01)
            bar.set_label(label, fontsize=9)
            bar.ax.tick_params(labelsize=8)
    return axes


def _draw_column(column: Any, view: NodeView, around: float) -> None:
    samples, field, region = column
    for place, pale in ((samples, True), (field, True), (region, False)):
        show_image(place, view.image, pale=pale, around=around)
    sampling_points(samples, view.positions, view.modulation, view.strength, area=IN_SHEET * AREA)
    receptive_field(field, view.field.field)
    salient_region(region, view.region.mask)
    for place in column:
        if view.box is None:
            _cross(place, view.place)
        else:
            outlined_box(place, view.box)
    field.set_title(f"size {view.field.size():.1f} px, spread {view.field.spread():.1f} px", fontsize=8)
    region.set_title(f"{100 * view.region.area:.2f} % kept, error {view.region.error:.3f}", fontsize=8)


def _cross(axes: Any, place: Array) -> None:
    axes.plot(*place[::-1], "x", color=BLACK, markersize=6, markeredgewidth=2.2)
    axes.plot(*place[::-1], "x", color=YELLOW, markersize=5, markeredgewidth=1)


def _label_rows(axes: Any, first: str) -> None:
    """Name the rows, and leave the labels of pixels at the borders of the sheet."""
    for row, name in zip(axes, (first, *ROWS[1:]), strict=True):
        row[0].set_ylabel(f"{name}\ny (pixels)", fontsize=9)
        for place in row[1:]:
            place.set_ylabel("")
    for place in axes[:-1].ravel():
        place.set_xlabel("")


def _overshoot(view: NodeView) -> float:
    """Return the pixels around the image in which points lie that count, with some room for them; or 0."""
    counted = view.positions[(view.modulation != 0) & numpy.isfinite(view.positions).all(axis=1)]
    if view.box is not None:
        corners = view.box.reshape(2, 2) + numpy.array([[0.5], [-0.5]])  # centres of pixels
        counted = numpy.concatenate([counted, corners])
    size = numpy.array(view.image.shape[1:])
    beyond = numpy.maximum(-counted, counted - (size - 1)).max(initial=0)
    return float(beyond + 0.05 * size.max()) if beyond > 0 else 0.0
