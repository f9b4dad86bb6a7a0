"""python -m dcn_np see: what nodes of a network see in an image, drawn and in numbers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy

import dcn_np
from dcn_np.analysis import Node, NodeView, view_node
from dcn_np.analysis.views import step_of_nodes
from dcn_np.commands import see_networks
from dcn_np.commands.see_networks import Seen

Array = Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `see`."""
    parser.add_argument(
        "image",
        nargs="?",
        type=Path,
        help="a picture, whose colours become 0 to 1, or a .npy (channels, height, width); default: a digit "
        "that the repository's networks were not trained on",
    )
    see_networks.add_arguments(parser)
    parser.add_argument(
        *("--pixel", "-p"),
        action="append",
        nargs=2,
        type=int,
        metavar=("Y", "X"),
        help="look at the node nearest to this pixel; may be given several times (default: the middle)",
    )
    parser.add_argument(
        "--box",
        action="append",
        nargs=4,
        type=int,
        metavar=("Y0", "X0", "Y1", "X1"),
        help="look at all nodes from one pixel to another together; where --layer is of a head over regions, "
        "at that region. May be given several times",
    )
    for name, kind, default, text in (
        ("levels", int, 1, "layers that samples are traced through"),
        ("epsilon", float, 0.1, "bound of the error of saliency regions"),
        ("steps", int, 100, "steps of the relaxed optimisation of saliency regions"),
        ("seed", int, 0, "of its noise"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument(
        "--fill", default="zero", help="what takes the place of removed pixels: zero, mean or blur"
    )
    parser.add_argument(
        *("--output", "-o"),
        type=Path,
        default=Path("see_output"),
        metavar="FOLDER",
        help="where see.png and see.json go (default: ./see_output)",
    )


def main(args: argparse.Namespace) -> int:
    """Look, draw and write; 1 where something does not fit."""
    if importlib.util.find_spec("matplotlib") is None:
        print("see needs matplotlib: pip install 'dcn_np[plot]'", file=sys.stderr)
        return 1
    try:
        look(args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"see: {error}", file=sys.stderr)
        return 1
    return 0


def look(args: argparse.Namespace) -> None:
    """Look at every node of every network, then draw and write."""
    from dcn_np.analysis import plot

    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; wanted at least 0")
    networks, default_image = see_networks.from_arguments(args)
    image = default_image if args.image is None else read_image(args.image)
    if image is None:
        raise ValueError("no image; wanted one, for a network of your own")
    found = []
    for name, seen, of_node in nodes(args, networks, image):
        view = view_of(args, seen, of_node, fitted(image, seen.channels))
        print(
            f"{name}: receptive field {view.field.size():.1f} px, saliency region "
            f"{100 * view.region.area:.2f} % of the image with an error of {view.region.error:.3f}",
            flush=True,
        )
        found.append((name, of_node.node, view))
    title = f"What nodes see: {args.image.name if args.image else 'a digit'}"
    axes = plot.new_sheet(len(found), title, image.shape[1] / image.shape[2])
    plot.sheet(axes, [view for *_, view in found], [name.replace(" at ", "\n") for name, *_ in found])
    args.output.mkdir(parents=True, exist_ok=True)
    axes[0, 0].figure.savefig(args.output / "see.png")
    numbers = {
        "dcn_np": dcn_np.__version__,
        "image": None if args.image is None else str(args.image),
        "image_size": list(image.shape[1:]),
        "nodes": [described(args, *one) for one in found],
    }
    (args.output / "see.json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    print(f"{args.output / 'see.png'}\n{args.output / 'see.json'}")


# ---- images


def read_image(path: Path) -> Array:
    """Read a picture or an array as (channels, height, width), float32."""
    if path.suffix == ".npy":
        image = _read(path, lambda path: numpy.load(path, allow_pickle=False))
        if image.ndim not in (2, 3) or image.dtype.kind not in "fiu":
            raise ValueError(
                f"{path} has shape {image.shape}, {image.dtype}; wanted numbers (channels, height, width)"
            )
        image = image[None] if image.ndim == 2 else image
    else:
        from matplotlib.image import imread

        pixels = _read(path, imread)
        image = pixels / 255 if pixels.dtype == numpy.uint8 else pixels
        image = image[None] if image.ndim == 2 else image[..., :3].transpose(2, 0, 1)
    return numpy.ascontiguousarray(image, numpy.float32)


def _read(path: Path, reader: Callable[[Path], Array]) -> Array:
    try:
        return reader(path)
    except (EOFError, OSError, SyntaxError, ValueError) as error:  # SyntaxError is Pillow's of a broken PNG
        if isinstance(error, OSError) and error.filename is not None:  # the system's, which names the file
            raise
        raise ValueError(f"{path} cannot be read: {error}") from None


def fitted(image: Array, channels: int) -> Array:
    """Make grey of colours or colours of grey, where a network takes the other."""
    if channels == 1 and len(image) == 3:
        return image.mean(axis=0, keepdims=True)
    return image.repeat(3, axis=0) if channels == 3 and len(image) == 1 else image


# ---- nodes


def nodes(args: argparse.Namespace, networks: list[Seen], image: Array) -> Iterator[tuple[str, Seen, Any]]:
    """Yield the title, network and node of each column: all networks for the first node, then the next."""
    size = image.shape[1:]
    middle = [[extent // 2 for extent in size]] if not args.pixel and not args.box else []
    chosen = [(pixel, pixel, "--pixel") for pixel in (args.pixel or middle)]
    chosen += [(box[:2], box[2:], "--box") for box in args.box or []]
    for low, high, option in chosen:
        check_within(low, high, option, size)
        for seen in networks:
            title = f"{seen.name} at " + " to ".join(f"({y}, {x})" for y, x in ([low, high][low == high :]))
            yield title, seen, node_at(seen, fitted(image, seen.channels), low, high, option)


def check_within(low: list[int], high: list[int], option: str, size: tuple[int, ...]) -> None:
    """Refuse what does not lie in the image."""
    if not all(0 <= start <= stop < extent for start, stop, extent in zip(low, high, size, strict=True)):
        given = " ".join(map(str, low if option == "--pixel" else low + high))
        raise ValueError(
            f"{option} {given} is empty or outside the image of {size[0]} rows and {size[1]} columns: "
            f"wanted 0 to {size[0] - 1} for Y and 0 to {size[1] - 1} for X"
        )


def node_at(seen: Seen, image: Array, low: list[int], high: list[int], option: str) -> Any:
    """Return the node nearest to a pixel, those of a box, or that of a region, as a function of images."""
    layer = seen.layer
    rois = numpy.array([[0, low[1], low[0], high[1] + 1, high[0] + 1]], image.dtype)
    whole = seen.of_node(Node(layer), rois)
    if whole.sampled_regions(image):
        if option == "--pixel":
            raise ValueError(f"{layer or 'the network'} has a node for each region: wanted --box Y0 X0 Y1 X1")
        return whole
    return seen.of_node(Node(layer, position=position_at(seen, whole, image, low, high, option)), rois)


def position_at(
    seen: Seen, whole: Any, image: Array, low: list[int], high: list[int], option: str
) -> list[int] | list[slice]:
    """Return the position in a layer's map that is nearest to a pixel, or all of a box."""
    layer, features = seen.layer, whole.forward(image)
    if features.ndim != 3:
        raise ValueError(
            f"the features of {layer or 'the network'} have shape {features.shape}; wanted "
            "(channels, height, width): name another layer with --layer"
        )
    step, extents = step_of_nodes(whole, image, seen.sampling), features.shape[1:]
    if option == "--pixel":
        place = numpy.minimum(numpy.rint(low / step), numpy.array(extents) - 1).astype(int)
        if (numpy.abs(low - place * step) > step).any():
            raise ValueError(
                f"--pixel {low[0]} {low[1]} lies outside the map of {layer}, whose last node is at "
                f"{(step * (numpy.array(extents) - 1)).tolist()}"
            )
        return [int(index) for index in place]
    start = numpy.ceil(low / step).astype(int)
    stop = numpy.minimum(numpy.floor(high / step).astype(int) + 1, extents)
    if (start >= stop).any():
        raise ValueError(
            f"--box {' '.join(map(str, low + high))} holds no node: those of {layer} are {step.tolist()} "
            "pixels apart, from 0 0 on"
        )
    return [slice(int(a), int(b)) for a, b in zip(start, stop, strict=True)]


# ---- views


def view_of(args: argparse.Namespace, seen: Seen, of_node: Any, image: Array) -> NodeView:
    """Look at a node, under a progress bar where somebody watches."""
    return view_node(
        of_node,
        image,
        seen.sampling,
        levels=args.levels,
        epsilon=args.epsilon,
        fill=args.fill,
        relaxed_steps=args.steps,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )


def described(args: argparse.Namespace, name: str, node: Node, view: NodeView) -> dict[str, Any]:
    """Return the numbers of a view; lengths are in pixels of the image, positions (y, x)."""
    position: Any = node.position
    field, region = view.field, view.region
    return {
        "title": name,
        "layer": node.layer,
        "position": position and [[p.start, p.stop] if isinstance(p, slice) else p for p in position],
        "place": plain(view.place),
        "region": None if view.box is None else plain(view.box),
        "response": float(field.responses[0]),
        "sampling": {
            "layer": view.layer,
            "levels": args.levels,
            "positions": plain(view.positions),
            "modulation": plain(view.modulation),
            "strength": None if view.strength is None else plain(view.strength),
        },
        "receptive_field": {
            "size": field.size(),
            "spread": plain(field.spread()),
            "centre": plain(field.centre()),
        },
        "saliency": {
            "epsilon": args.epsilon,
            "error": region.error,
            "area": region.area,
            "pixels": numpy.argwhere(region.mask).tolist(),
            "evaluations": region.evaluations,
            "steps": [step._asdict() for step in region.steps],
        },
    }


def plain(numbers: Any) -> Any:
    """Return numbers as JSON has them: null for what is not finite."""
    array = numpy.asarray(numbers, numpy.float64)
    objects = array.astype(object)
    objects[~numpy.isfinite(array)] = None
    return objects.tolist()
