"""The demo's pictures: where the convolution samples, what it answers, its gradient; and the digits."""

from __future__ import annotations

import math
from typing import Any

import numpy
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon, Rectangle

import dcn_np
from dcn_np.analysis.plot import (
    AREA,
    BLACK,
    ORANGE,
    VERMILION,
    YELLOW,
    label_pixels,
    new_figure,
    show_image,
)
from dcn_np.analysis.plot import sampling_points as draw_points
from dcn_np.commands.demo_problem import (
    DILATION,
    KERNEL,
    MAGNIFICATION,
    TURN_DEGREES,
    Problem,
    deformed_points,
    modulation,
    rigid_points,
)

Array = Any

SIGNED = "PuOr"  # diverging, safe for colour-blind eyes: purple and orange about white

LATTICE = 11  # output positions drawn per axis in the overviews
CLOSE_UPS = (
    (0.545, 0.46),
    (0.19, 0.434),
    (0.29, 0.89),
)  # output positions drawn close, (y, x) as parts of the size
LONGEST_ARROW = 3.0  # pixels
EDGE_FILTER = 1
AROUND_DIGIT = 9.0  # pixels shown around a digit's image, for the points that leave it


def sampling_points(problem: Problem) -> Figure:
    """Draw the sampling points of a few output positions: the rigid grid beside the deformed one."""
    size = problem.size
    rigid = rigid_points(size)
    sides: tuple[tuple[str, Array, Array], ...] = (
        (
            "Ordinary convolution: the rigid grid.\nEach point is the middle of what one output reads.",
            rigid,
            numpy.ones(rigid.shape[:-1]),
        ),
        (
            f"Deformable: turned {TURN_DEGREES:g}° and {MAGNIFICATION:g} times closer to the centre.\n"
            "The size of a point is its modulation: 1 at the centre, 0 at the borders.",
            deformed_points(rigid, size),
            modulation(rigid, size),
        ),
    )
    figure = new_figure(15, 11, "Where the convolution looks: sampling points on the photo")
    halves: Any = figure.subfigures(1, 2, wspace=0.04)
    for half, (title, points, weights) in zip(halves, sides, strict=True):
        axes = half.subplot_mosaic([["all", "all", "all"], ["1", "2", "3"]], height_ratios=(2.5, 1))
        draw_overview(axes["all"], problem, points, weights)
        axes["all"].set_title(title, fontsize=12)
        for number, (row, column) in enumerate(close_up_positions(size), start=1):
            draw_close_up(axes[str(number)], problem, points[row, column], weights[row, column])
            axes[str(number)].set_title(
                f"Box {number}: the {KERNEL * KERNEL} points\nthat one output reads", fontsize=10
            )
    add_legend(axes["all"])  # on the right only: it explains both
    return figure


def close_up_positions(size: int) -> list[tuple[int, int]]:
    """The output positions drawn close, as (row, column)."""
    return [(round(row * size), round(column * size)) for row, column in CLOSE_UPS]


def draw_overview(axes: Any, problem: Problem, points: Array, weights: Array) -> None:
    """Draw the middle points of a lattice of outputs on the whole photo, and the boxes of the close-ups."""
    size, middle = problem.size, KERNEL * KERNEL // 2
    show_image(axes, problem.x[0])
    lattice = numpy.linspace(0, size - 1, LATTICE + 2).round().astype(int)[1:-1]
    rows, columns = (index.ravel() for index in numpy.meshgrid(lattice, lattice, indexing="ij"))
    draw_points(axes, points[rows, columns, middle], weights[rows, columns, middle])
    draw_frame(axes, points)
    for number, (row, column) in enumerate(close_up_positions(size), start=1):
        corners = box_around(points[row, column])
        axes.add_patch(Polygon(corners[:, ::-1], closed=True, fill=False, edgecolor=YELLOW, linewidth=2.5))
        axes.annotate(
            str(number),
            corners[:, ::-1].max(axis=0),
            color=BLACK,
            fontsize=11,
            weight="bold",
            xytext=(4, -4),
            textcoords="offset points",
            ha="left",
            va="top",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": YELLOW, "edgecolor": "none"},
        )


def draw_frame(axes: Any, points: Array) -> None:
    """Outline what the outputs look at together: the border of the photo, moved as the points are."""
    middle = KERNEL * KERNEL // 2
    corners = points[[0, 0, -1, -1], [0, -1, -1, 0], middle]
    axes.add_patch(
        Polygon(corners[:, ::-1], closed=True, fill=False, edgecolor=YELLOW, linewidth=2, linestyle="--")
    )


def add_legend(axes: Any) -> None:
    """Explain marker sizes and outlines."""
    markers = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=math.sqrt(AREA * weight),
            color=ORANGE,
            markeredgecolor=BLACK,
            label=f"modulation {weight:g}",
        )
        for weight in (1, 0.5, 0.1)
    ]
    outlines = [
        Line2D([], [], color=YELLOW, linewidth=2, linestyle="--", label="what all outputs read together"),
        Line2D([], [], color=YELLOW, linewidth=2.5, label="what one output reads, drawn below"),
    ]
    axes.legend(
        handles=[*markers, *outlines], loc="lower left", fontsize=9, facecolor="#555555", labelcolor="white"
    )


def box_around(points: Array) -> Array:
    """The outline of one output's points, (4, 2) as (y, x), a little outside its outermost points."""
    grid = points.reshape(KERNEL, KERNEL, 2)
    corners = numpy.array([grid[0, 0], grid[0, -1], grid[-1, -1], grid[-1, 0]])
    return corners.mean(axis=0) + 1.6 * (corners - corners.mean(axis=0))


def draw_close_up(axes: Any, problem: Problem, points: Array, weights: Array) -> None:
    """Draw all points of one output on the pixels around them."""
    show_image(axes, problem.x[0])
    draw_points(axes, points, weights)
    frame(axes, points)


def frame(axes: Any, points: Array) -> None:
    """Show a square of pixels around points, the same size for any turn."""
    centre, reach = points.mean(axis=0), close_up_reach()
    axes.set_xlim(centre[1] - reach, centre[1] + reach)
    axes.set_ylim(centre[0] + reach, centre[0] - reach)


def close_up_reach() -> float:
    """Pixels from the middle of a close-up to its border: the rigid points with some room."""
    return 1.5 * DILATION * (KERNEL // 2) + 1


def responses(problem: Problem, y: Array) -> Figure:
    """Draw the photo, and each filter with its response."""
    figure = new_figure(
        16,
        14,
        "What the convolution answers: one map per filter (the filter is in the corner)\n"
        f"The photo appears turned by {TURN_DEGREES:g}° and {MAGNIFICATION:g} times larger because the "
        "offsets say so, and fades to the borders because the modulation does.",
    )
    axes = figure.subplots(3, 3).ravel()
    show_image(axes[0], problem.x[0])
    draw_frame(axes[0], deformed_points(rigid_points(problem.size), problem.size))
    axes[0].set_title("the photo; dashed: what the maps show", fontsize=12)
    for place, name, weight, response in zip(axes[1:], problem.names, problem.weight, y[0], strict=True):
        draw_response(figure, place, response)
        draw_filter(place, weight)
        place.set_title(name, fontsize=12)
    return figure


def draw_response(figure: Figure, axes: Any, response: Array) -> None:
    """Draw one response map about zero, or from zero where it never falls below."""
    largest = numpy.percentile(numpy.abs(response), 99.5) or 1.0
    signed = response.min() < -0.01 * largest
    image = axes.imshow(
        response, cmap=SIGNED if signed else "gray", vmin=-largest if signed else 0, vmax=largest
    )
    bar = figure.colorbar(
        image, ax=axes, fraction=0.046, pad=0.02, label="response (photo: black 0, white 1)"
    )
    bar.ax.tick_params(labelsize=8)
    label_pixels(axes)


def draw_filter(axes: Any, weight: Array) -> None:
    """Draw a filter into the corner of its map."""
    taps = weight[numpy.abs(weight).sum(axis=(1, 2)).argmax()]
    inset = axes.inset_axes((0.015, 0.015, 0.21, 0.21))
    inset.imshow(taps, cmap=SIGNED, vmin=-numpy.abs(taps).max(), vmax=numpy.abs(taps).max())
    inset.set(xticks=[], yticks=[])


def strongest_edge(y: Array) -> tuple[int, int, int]:
    """Return (filter, row, column) of the strongest response of an edge filter well away from the centre.

    At the centre the offsets are small, and the output and what it looks at would lie upon each other.
    """
    size = y.shape[-1]
    distance = numpy.linalg.norm(numpy.indices((size, size)) - (size - 1) / 2, axis=0)
    strength = numpy.where(distance > size / 4, numpy.abs(y[0, EDGE_FILTER]), 0)
    row, column = numpy.unravel_index(strength.argmax(), strength.shape)
    return EDGE_FILTER, int(row), int(column)


def gradient(
    problem: Problem, gradients: dcn_np.Gradients, filter_index: int, row: int, column: int
) -> Figure:
    """Draw what one output depends on: its gradient by the photo and by where its points lie."""
    points = deformed_points(rigid_points(problem.size)[row, column], problem.size)
    figure = new_figure(
        19, 7, f"What one output depends on: {problem.names[filter_index]} at x = {column}, y = {row}"
    )
    whole, by_pixel, by_place = figure.subplots(1, 3)
    draw_reach(whole, problem, points, row, column)
    draw_grad_x(figure, by_pixel, problem, gradients.x, points)
    draw_grad_offset(by_place, problem, gradients.offset[0, :, row, column].reshape(-1, 2), points)
    return figure


def draw_reach(axes: Any, problem: Problem, points: Array, row: int, column: int) -> None:
    """Draw the whole photo with the output's own position and the patch that it reads."""
    show_image(axes, problem.x[0])
    reach = close_up_reach()
    top, left = points.mean(axis=0) - reach
    axes.annotate(
        "",
        (left + reach, top + reach),
        (column, row),
        arrowprops={"arrowstyle": "->", "color": YELLOW, "lw": 2},
    )
    axes.plot(column, row, "X", color=ORANGE, markeredgecolor=BLACK, markersize=12)
    axes.add_patch(Rectangle((left, top), 2 * reach, 2 * reach, fill=False, edgecolor=YELLOW, linewidth=2.5))
    side = 1 if column > left else -1
    add_label(axes, "this output ...", (column, row), side)
    add_label(axes, "... reads here", (left + reach, top + reach), -side)
    axes.set_title("Whole photo: the offsets move the reading place\nfrom the cross to the box", fontsize=12)


def add_label(axes: Any, text: str, place: tuple[float, float], side: int) -> None:
    """Write a label to the right (side 1) or the left (side -1) of a place."""
    axes.annotate(
        text,
        place,
        fontsize=11,
        textcoords="offset points",
        xytext=(20 * side, 0),
        va="center",
        ha="left" if side > 0 else "right",
        bbox={"boxstyle": "round,pad=0.2", "facecolor": YELLOW, "edgecolor": "none"},
    )


def draw_grad_x(figure: Figure, axes: Any, problem: Problem, grad_x: Array, points: Array) -> None:
    """Draw the gradient by the photo, its three colours summed, over the photo in pale grey."""
    total = grad_x[0].sum(axis=0)
    largest = float(numpy.abs(total).max()) or 1.0
    scale = ScalarMappable(Normalize(-largest, largest), SIGNED)
    show_image(axes, problem.x[0], pale=True)
    colours = scale.to_rgba(total)
    colours[..., 3] = numpy.sqrt(numpy.abs(total) / largest)  # clear where the photo does not matter
    axes.imshow(colours, interpolation="nearest")
    axes.scatter(points[:, 1], points[:, 0], s=16, facecolor="white", edgecolor=BLACK, linewidth=0.8)
    frame(axes, points)
    label_pixels(axes)
    figure.colorbar(
        scale,
        ax=axes,
        fraction=0.046,
        pad=0.02,
        label="change of the output per change of the pixel (red + green + blue)",
    )
    axes.set_title(
        "In the box, gradient by the photo: light on purple\npixels raises the output, on orange lowers it",
        fontsize=12,
    )


def draw_grad_offset(axes: Any, problem: Problem, grad_offset: Array, points: Array) -> None:
    """Draw the way in which each sampling point has to move for the output to rise."""
    show_image(axes, problem.x[0], pale=True)
    longest = float(numpy.linalg.norm(grad_offset, axis=-1).max()) or 1.0
    axes.quiver(
        points[:, 1],
        points[:, 0],
        grad_offset[:, 1],
        grad_offset[:, 0],
        angles="xy",
        scale_units="xy",
        scale=longest / LONGEST_ARROW,
        color=VERMILION,
        width=0.009,
        zorder=3,
    )
    axes.scatter(
        points[:, 1], points[:, 0], s=16, facecolor="white", edgecolor=BLACK, linewidth=0.8, zorder=4
    )
    frame(axes, points)
    label_pixels(axes)
    axes.set_title(
        "In the box, gradient by the offsets: where the\nsampling points have to move to raise the output",
        fontsize=12,
    )


def digits(samplings: list[tuple[Array, int, int, Any]]) -> Figure:
    """Draw (image, label, answer, sampling) of ten digits: what the network answers, and where it looks."""
    figure = new_figure(
        15,
        7.5,
        "Trained DCNv2: where one output of the last convolution looks\n"
        "White crosses: the rigid grid. Points: where the offsets move it; the larger, the more it counts. "
        "Outside the image (blue) lie zeros.",
    )
    for axes, (image, label, answer, sampling) in zip(figure.subplots(2, 5).ravel(), samplings, strict=True):
        show_image(axes, image[None] / 255, around=AROUND_DIGIT)
        ways = numpy.stack([sampling.rigid, sampling.points])
        axes.plot(ways[..., 1], ways[..., 0], color=ORANGE, linewidth=0.8)
        axes.plot(sampling.rigid[:, 1], sampling.rigid[:, 0], "+", color="white", markersize=6)
        draw_points(axes, sampling.points, sampling.modulation)
        axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
        axes.set_title(f"{answer}" if answer == label else f"{answer}, but it is a {label}", fontsize=13)
    return figure
