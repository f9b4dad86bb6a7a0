"""All that the analyses tell of one node for one image, together: what a picture of it is drawn from."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, TypeAlias

import numpy
from numpy.typing import NDArray

from ..geometry import checked_integers, checked_number
from ..messages import shown
from .arguments import checked_image
from .nodes import LayersNode
from .receptive_field import ReceptiveField, effective_receptive_field
from .regions import SampledRegions
from .saliency import SalientRegion, error_bounded_saliency
from .sampling import SampledLayer, trace_sampling

Array: TypeAlias = NDArray[Any]


class NodeView(NamedTuple):
    """What a node sees in an image; coordinates are in pixels of the image, axes in its order.

    Parameters
    ----------
    image : numpy.ndarray, shape (channels, *spatial)
        The image.
    place : numpy.ndarray, shape (ndim,), float64
        Where the node lies; of a box of positions, or a region, the middle.
    layer : str or int
        The layer whose sampling is shown.
    positions : numpy.ndarray, shape (points, ndim), float64
        Where the node samples: the taps, or the centres of the bins of a pooling over regions.
    modulation : numpy.ndarray, shape (points,), float64
        The factor of each point.
    strength : numpy.ndarray, shape (points,), float64, or None
        How much each point counts, as `effective_sampling` and `effective_bins` define it; None where that is
        not known.
    field : ReceptiveField
        The effective receptive field, for this image or on average over several.
    region : SalientRegion
        The error-bounded saliency region.
    box : numpy.ndarray, shape (4,), float64, or None
        The borders y1, x1, y2, x2 of the node's region, as `SampledRegions` has them; None where the node is
        of no region.
    """

    image: Array
    place: Array
    layer: str | int
    positions: Array
    modulation: Array
    strength: Array | None
    field: ReceptiveField
    region: SalientRegion
    box: Array | None = None


def view_node(
    of_node: Any,
    image: Any,
    layer: str | int | None = None,
    *,
    levels: int = 1,
    images: Any = None,
    norm: float = 2,
    **saliency: Any,
) -> NodeView:
    """Tell what a node sees in an image: its samples, its receptive field, the region that it rests on.

    Parameters
    ----------
    of_node : LayersNode or dcn_np.analysis.torch.ModuleNode
        A feature vector at a position, at a box of positions, or of a region: `node.position` or the region
        `node.item` is given.
    image : array, shape (channels, *spatial)
        The image.
    layer : str, int or None
        The convolution or pooling over regions whose samples are told; the output of a convolution must have
        the position of the node. None is the node's own layer; where that is neither, the last pooling over
        regions below it, or in a network of `dcn_np.layers` the last convolution.
    levels : int
        How many layers the samples are traced through, this one and those below it.
    images : array, shape (images, channels, *spatial), or iterable of arrays, or None
        What the receptive field is averaged over, of the size of `image`; None is that image alone.
    norm : {1, 2, numpy.inf}
        As for `effective_receptive_field` and `effective_sampling`.
    **saliency
        What `error_bounded_saliency` takes by name, such as `epsilon`.

    Returns
    -------
    NodeView
        What `dcn_np.analysis.plot` draws.

    Raises
    ------
    TypeError
        An argument of the wrong kind.
    ValueError
        A node without a position or outside the layer's output, layers that are no chain, or whatever the
        analyses refuse.

    See Also
    --------
    trace_sampling : The points, for many nodes.
    SampledRegions : Where bins are taken to lie.

    Notes
    -----
    A position p of a layer's input is taken to lie at ``scale * p`` of the image, with the layer's scale:
    exact where every window below is padded by half of its reach. The points are those of the first offset
    group. Strengths are told where one level is traced; through several they are not defined.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import Node, of_layers, view_node
    >>> from dcn_np.layers import DeformConv2d
    >>> of_node = of_layers([DeformConv2d(1, 8, 3, padding=1, rng=0)], Node(position=(4, 4)))
    >>> image = numpy.random.default_rng(0).random((1, 9, 9), "float32")
    >>> view = view_node(of_node, image, epsilon=0.01)
    >>> view.positions.shape, view.region.error <= 0.01
    ((9, 2), True)
    """
    image = checked_image("image", image)
    layers, regions = of_node.sampled_layers(image), of_node.sampled_regions(image)
    name = _layer_to_tell(of_node, layer, list(layers), list(regions))
    if name in regions:
        if levels != 1:
            raise ValueError(f"levels is {shown(levels)}; the bins of a pooling are not traced: wanted 1")
        samples = _bins(of_node, image, name, regions[name], norm)
    else:
        samples = _taps(of_node, image, name, _chain(layers, name, levels), norm)
    return NodeView(
        image,
        samples.place,
        name,
        samples.positions,
        samples.modulation,
        samples.strength,
        effective_receptive_field(of_node, [image] if images is None else images, norm=norm),
        error_bounded_saliency(of_node.cosine_error(image), image, **saliency),
        samples.box,
    )


class _Samples(NamedTuple):
    """What a layer samples for a node, as `NodeView` has it."""

    place: Array
    positions: Array
    modulation: Array
    strength: Array | None
    box: Array | None


def _taps(of_node: Any, image: Array, name: Any, chain: list[SampledLayer], norm: float) -> _Samples:
    """Tell the samples of a convolution, the last of a chain that is traced, for the node's positions."""
    if of_node.node.position is None:
        raise ValueError("the node has no position; wanted one, such as Node(layer, position=(4, 4))")
    nodes = _positions(of_node.node, chain[-1])
    trace = trace_sampling(chain, nodes)
    strengths = of_node.strengths(image, norm=norm) if len(chain) == 1 else {}
    strength = None
    if name in strengths:
        strength = numpy.concatenate([strengths[name][(0, 0, slice(None), *node)] for node in nodes])
    return _Samples(
        _step(chain[-1]) * numpy.mean(nodes, axis=0),
        numpy.array(chain[0].scale) * trace.positions.reshape(-1, image.ndim - 1),
        trace.modulation.reshape(-1),
        strength,
        None,
    )


def _bins(of_node: Any, image: Array, name: Any, regions: SampledRegions, norm: float) -> _Samples:
    """Tell the bins of a pooling over regions, for the node's region."""
    item = of_node.node.item
    if item >= len(regions.rois):
        raise ValueError(f"item is {item}; {name!r} pools {len(regions.rois)} regions: wanted one of them")
    positions, box = regions.positions[item].reshape(2, -1).T, regions.boxes[item]
    modulation = numpy.ones(len(positions)) if regions.mask is None else regions.mask[item].reshape(-1)
    return _Samples(
        box.reshape(2, 2).mean(axis=0),
        positions,
        modulation.astype(numpy.float64),
        of_node.strengths(image, norm=norm)[name][item].reshape(-1),
        box,
    )


def step_of_nodes(of_node: Any, image: Array, layer: str | int | None = None) -> Array:
    """Return the pixels of the image from one node to the next, axis by axis, as `view_node` takes them."""
    layers = of_node.sampled_layers(image)
    return _step(layers[_layer_to_tell(of_node, layer, list(layers), [])])


def _step(layer: SampledLayer) -> Array:
    return numpy.array(layer.scale) * layer.geometry.stride


def _layer_to_tell(of_node: Any, name: str | int | None, layers: list[Any], regions: list[Any]) -> str | int:
    """Return the name of the layer whose samples are told, a convolution or a pooling over regions."""
    if name is None:
        name = of_node.node.layer
        if regions and name not in layers:
            name = name if name in regions else regions[-1]
        elif isinstance(of_node, LayersNode) and layers and name not in layers:
            name = layers[-1]
    if name not in layers + regions:
        raise ValueError(f"layer is {shown(name)}; the layers that sample are {layers + regions}")
    return name


def _chain(layers: dict[Any, SampledLayer], name: Any, levels: Any) -> list[SampledLayer]:
    """Return the layers that are traced, up to a name."""
    names = list(layers)
    last = names.index(name) + 1
    levels = checked_number("levels", checked_integers("levels", levels, 0), 1)
    if levels > last:
        raise ValueError(f"levels is {levels}; {name!r} is layer {last} from the image: wanted 1 to {last}")
    return [layers[one] for one in names[last - levels : last]]


def _positions(node: Any, layer: SampledLayer) -> list[tuple[int, ...]]:
    """Return all positions of a node, one or those of a box."""
    index = node.within((node.item + 1, (node.channel or 0) + 1, *layer.geometry.output))[2:]
    extents = layer.geometry.output
    axes = (
        range(extent)[entry] if isinstance(entry, slice) else [entry]
        for entry, extent in zip(index, extents, strict=True)
    )
    return list(itertools.product(*axes))
