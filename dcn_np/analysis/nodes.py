"""A node of a network as a function of the image: its features, their gradients, and how far they depart."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy
from numpy.typing import NDArray

from ..arrays import on_host
from ..feature_mimic import feature_mimic_loss, feature_mimic_loss_backward
from ..geometry import checked_integers
from ..messages import shown
from .arguments import ValueAndGrad
from .regions import SampledRegions, effective_bins
from .sampling import SampledLayer
from .strength import effective_sampling

Array: TypeAlias = NDArray[Any]

# ---- which node


class Node(NamedTuple):
    """Which numbers of a network are looked at.

    Parameters
    ----------
    layer : str, int or None
        The layer whose output they are in, by name or number; None is the last.
    channel : int or None
        One channel; None is all of them, the feature vector.
    position : sequence of int or slice, or None
        One position, an index per spatial axis; a box of positions, where entries are slices with both ends;
        None is all of them.
    item : int
        Which entry of the first axis: 0 for the one image, or the number of a region where the output is of
        regions.
    """

    layer: str | int | None = None
    channel: int | None = None
    position: Sequence[int | slice] | None = None
    item: int = 0

    def within(self, shape: Sequence[int]) -> tuple[int | slice, ...]:
        """Return the index of the node in an output (items, channels, *spatial).

        Parameters
        ----------
        shape : sequence of int
            That of the output.

        Returns
        -------
        tuple of int and slice
            One entry per axis.

        Raises
        ------
        TypeError
            A number of the node is no integer.
        ValueError
            The node lies outside the output, or its box is empty.
        """
        if len(shape) < 2:
            raise ValueError(
                f"the layer's output has shape {tuple(shape)}; wanted (items, channels, *spatial)"
            )
        whole: list[Any] = [slice(None)] * (len(shape) - 2)
        where = whole if self.position is None else _checked_position(self.position)
        if len(where) != len(whole):
            raise ValueError(
                f"position is {tuple(where)}; the layer's output has shape {tuple(shape)}: wanted "
                f"{len(whole)} indices"
            )
        channel = slice(None) if self.channel is None else checked_integers("channel", self.channel, 0)
        index = (checked_integers("item", self.item, 0), channel, *where)
        names = ("item", "channel", *(f"position[{axis}]" for axis in range(len(where))))
        for name, entry, extent in zip(names, index, shape, strict=True):
            if entry == slice(None):
                continue
            if isinstance(entry, slice):
                right, wanted = 0 <= entry.start < entry.stop <= extent, f"0 <= start < stop <= {extent}"
            else:
                right, wanted = 0 <= entry < extent, f"0 to {extent - 1}"
            if not right:
                raise ValueError(
                    f"{name} is {entry}; the layer's output has shape {tuple(shape)}: wanted {wanted}"
                )
        return index


def _checked_position(position: Sequence[int | slice]) -> tuple[int | slice, ...]:
    found: list[int | slice] = []
    for axis, entry in enumerate(position):
        name = f"position[{axis}]"
        if isinstance(entry, slice):
            ends = (checked_integers(f"{name}.{end}", getattr(entry, end), 0) for end in ("start", "stop"))
            if entry.step not in (None, 1):
                raise ValueError(f"{name}.step is {shown(entry.step)}; wanted None")
            found.append(slice(*ends))
        else:
            found.append(checked_integers(name, entry, 0))
    return tuple(found)


# ---- as a function of the image


class NodeFunction(ABC):
    """A node as a function of an image (channels, *spatial): what the analyses call.

    Calling it gives the response and its gradient by the image. Where the node is one number, the response is
    that number; of a feature vector f it is the length ||f||, whose gradient is that of f weighted by
    f / ||f||. A subclass says how features and gradients are computed.
    """

    @abstractmethod
    def forward(self, image: Array) -> Array:
        """Return the node's features for an image (channels, *spatial), and keep what `backward` needs.

        Parameters
        ----------
        image : numpy.ndarray, shape (channels, *spatial)
            The image, without a batch axis.

        Returns
        -------
        numpy.ndarray
            Of any shape.
        """

    @abstractmethod
    def backward(self, grad_features: Array) -> Array:
        """Return the gradient by the image of the last `forward`.

        Parameters
        ----------
        grad_features : numpy.ndarray
            The gradient of a number by the features, in their shape.

        Returns
        -------
        numpy.ndarray, shape (channels, *spatial)
            The gradient of that number by the image.
        """

    def __call__(self, image: Array) -> tuple[float, Array]:
        response, direction = self._response(self.forward(image))
        return response, self.backward(direction)

    @staticmethod
    def _response(features: Array) -> tuple[float, Array]:
        """Return the response of features, and its gradient by them."""
        if features.size == 1:
            return float(features.reshape(())), numpy.ones_like(features)
        length = float(numpy.linalg.norm(features.astype(numpy.float64)))
        return length, features / (length or 1)

    def cosine_error(self, image: Any) -> ValueAndGrad:
        """Make a function that tells how far the features depart from those of an image.

        Parameters
        ----------
        image : array, shape (channels, *spatial)
            The image that others are compared with.

        Returns
        -------
        callable
            Takes an image and returns 1 - cos(its features, those of `image`), by
            `dcn_np.feature_mimic_loss`, and the gradient of that by the image: what `error_bounded_saliency`
            takes.

        Raises
        ------
        ValueError
            The node has one feature, of which the cosine sees the sign alone; or all features are 0.
        """
        reference = self.forward(on_host("image", image)).reshape(1, -1).copy()
        if reference.size < 2:
            raise ValueError(
                f"the node has {reference.size} feature; the cosine sees only the sign of one: wanted a "
                "feature vector, channel=None"
            )
        if not reference.any():
            raise ValueError("the node's features are all 0 for this image; wanted a node that responds")

        def error_and_grad(other: Array) -> tuple[float, Array]:
            features = self.forward(other)
            flat = features.reshape(1, -1)
            _, direction = feature_mimic_loss_backward(1.0, reference, flat)
            return feature_mimic_loss(reference, flat), self.backward(direction.reshape(features.shape))

        return error_and_grad


# ---- networks of dcn_np.layers


class Stage(Protocol):
    """A step of a network: a layer of `dcn_np.layers`, `ReLU`, or whatever has the same two methods."""

    @property
    def forward(self) -> Callable[..., Any]:
        """Takes (items, channels, *spatial), returns the output, and keeps what `backward` needs.

        A pooling over regions, which has a `spatial_scale`, takes the regions too, shape (R, 5).
        """

    def backward(self, grad_output: Any) -> Any:
        """Return the gradient by the input of the last `forward`."""


class ReLU:
    """The rectifier max(0, x), as a step of a network."""

    def forward(self, x: Array) -> Array:
        """Return max(0, x).

        Parameters
        ----------
        x : numpy.ndarray
            Of any shape.

        Returns
        -------
        numpy.ndarray
            Of the same shape.
        """
        self._positive = x > 0
        return numpy.maximum(x, 0)

    def backward(self, grad_output: Array) -> Array:
        """Return the gradient by `x`; 0 where x is 0.

        Parameters
        ----------
        grad_output : numpy.ndarray
            The gradient by the output.

        Returns
        -------
        numpy.ndarray
            Of the same shape.
        """
        found: Array = grad_output * self._positive
        return found


class GlobalAveragePool:
    """The mean over all positions, as a step of a network; each spatial axis keeps one entry."""

    def forward(self, x: Array) -> Array:
        """Return the mean of each channel.

        Parameters
        ----------
        x : numpy.ndarray, shape (items, channels, *spatial)
            The features.

        Returns
        -------
        numpy.ndarray, shape (items, channels, 1, ...)
            Their means.
        """
        self._shape: tuple[int, ...] = x.shape
        found: Array = x.mean(axis=tuple(range(2, x.ndim)), keepdims=True)
        return found

    def backward(self, grad_output: Array) -> Array:
        """Return the gradient by `x`: the same everywhere.

        Parameters
        ----------
        grad_output : numpy.ndarray, shape (items, channels, 1, ...)
            The gradient by the output.

        Returns
        -------
        numpy.ndarray, shape (items, channels, *spatial)
            The gradient by the features.
        """
        return numpy.broadcast_to(grad_output / math.prod(self._shape[2:]), self._shape)


class LayersNode(NodeFunction):
    """A node of a network of `dcn_np.layers`; `of_layers` makes it.

    Parameters
    ----------
    stages : mapping of str or int to stage
        What is applied one after the other, up to the layer of the node.
    node : Node
        Which numbers of its output.
    rois : numpy.ndarray, shape (R, 5), or None
        What poolings over regions are given.
    """

    def __init__(self, stages: Mapping[str | int, Any], node: Node, rois: Array | None = None) -> None:
        self.node = node
        self._stages: Mapping[str | int, Any] = stages
        self._rois: Any = rois

    def forward(self, image: Array) -> Array:
        x = image[None]
        self._inputs: dict[str | int, Array] = {}
        for name, stage in self._stages.items():
            self._inputs[name] = x
            x = stage.forward(x, self._rois.astype(x.dtype)) if _pools(stage) else stage.forward(x)
        self._output = x
        features: Array = x[self.node.within(x.shape)]
        return features

    def backward(self, grad_features: Array) -> Array:
        by_image: Array = self._gradients(grad_features)[0]
        return by_image

    forward.__doc__, backward.__doc__ = NodeFunction.forward.__doc__, NodeFunction.backward.__doc__

    def _gradients(self, grad_features: Array) -> tuple[Array, dict[str | int, Array]]:
        """Return the gradients by the image, and by the output of each stage."""
        grad = numpy.zeros_like(self._output)
        grad[self.node.within(grad.shape)] = grad_features
        by_output: dict[str | int, Array] = {}
        for name, stage in reversed(list(self._stages.items())):
            by_output[name] = grad
            grad = stage.backward(grad)
        return grad[0], by_output

    def _sampling(self) -> Iterator[tuple[str | int, Any]]:
        """Yield the stages that sample the image's maps, by name: up to the first pooling over regions."""
        for name, stage in self._stages.items():
            if hasattr(stage, "last_branch"):
                yield name, stage
            if _pools(stage):
                return

    def sampled_layers(self, image: Any) -> dict[str | int, SampledLayer]:
        """Tell how each convolution reads its input for an image.

        Parameters
        ----------
        image : array, shape (channels, *spatial)
            The image.

        Returns
        -------
        dict
            By the name or number of the layer, from the image to the node: what `trace_sampling` and
            `offset_statistics` take. What lies above a pooling over regions reads no map of the image, and is
            left out.
        """
        self.forward(on_host("image", image))
        found: dict[str | int, SampledLayer] = {}
        scale = numpy.ones(self._inputs[next(iter(self._stages))].ndim - 2)
        for name, stage in self._sampling():
            if not _pools(stage):
                x, (offset, mask) = self._inputs[name], stage.last_branch()
                window = stage.kernel_size, stage.stride, stage.padding, stage.dilation
                found[name] = SampledLayer(
                    x.shape[2:], *window, offset, mask, stage.offset_groups, scale=tuple(scale.tolist())
                )
                scale = scale * stage.stride
        return found

    def sampled_regions(self, image: Any) -> dict[str | int, SampledRegions]:
        """Tell how the pooling over regions below the node reads its map for an image.

        Parameters
        ----------
        image : array, shape (channels, *spatial)
            The image.

        Returns
        -------
        dict
            By the name or number of the layer; empty where there is no pooling over regions.
        """
        self.forward(on_host("image", image))
        found: dict[str | int, SampledRegions] = {}
        for name, stage in self._sampling():
            if _pools(stage):
                sizes, (offset, mask) = (stage.output_size, stage.spatial_scale), stage.last_branch()
                moved = offset, mask, stage.gamma, stage.position_sensitive
                found[name] = SampledRegions(self._rois, *sizes, *moved)
        return found

    def strengths(self, image: Any, *, norm: float = 2) -> dict[str | int, Array]:
        """Tell how much each location that a convolution or pooling samples counts for the node's response.

        Parameters
        ----------
        image : array, shape (channels, *spatial)
            The image.
        norm : {1, 2, numpy.inf}
            As for `effective_sampling`.

        Returns
        -------
        dict
            By the name or number of the layer what `effective_sampling` returns, of a pooling over regions
            what `effective_bins` does; up to that pooling.
        """
        _, direction = self._response(self.forward(on_host("image", image)))
        _, gradients = self._gradients(direction)
        return {name: self._strength(name, gradients[name], norm) for name, _ in self._sampling()}

    def _strength(self, name: str | int, grad: Array, norm: float) -> Array:
        stage, x = self._stages[name], self._inputs[name]
        offset, mask = stage.last_branch()
        if not _pools(stage):
            window = stage.stride, stage.padding, stage.dilation, stage.groups, stage.offset_groups
            return effective_sampling(grad, x, offset, mask, stage.weight, *window, norm=norm)
        sizes = stage.output_size, stage.spatial_scale, stage.sampling_ratio, stage.gamma
        by_rule_p = stage.position_sensitive
        rois = self._rois.astype(x.dtype)
        return effective_bins(grad, x, rois, offset, mask, *sizes, position_sensitive=by_rule_p, norm=norm)


def _pools(stage: Any) -> bool:
    """Tell whether a stage pools over regions, which its `forward` is then given."""
    return hasattr(stage, "spatial_scale")


def of_layers(network: Mapping[str, Stage] | Sequence[Stage], node: Node, rois: Any = None) -> LayersNode:
    """Make a function of the image of a node of a network of `dcn_np.layers`.

    Parameters
    ----------
    network : mapping of str to stage, or sequence of stages
        What is applied one after the other, from the image upwards: layers of `dcn_np.layers`, `ReLU`,
        `GlobalAveragePool`, or other objects with their `forward` and `backward`.
    node : Node
        Which of its numbers. `node.layer` is a key of the mapping or an index into the sequence; what comes
        after that layer is not computed. Above a pooling over regions `node.item` is the region.
    rois : array, shape (R, 5), or None
        What poolings over regions are given, `dcn_np.layers.DeformRoIPool` for one: 0, x1, y1, x2, y2 of each
        region, in pixels of the image times 1 / spatial_scale of the map.

    Returns
    -------
    LayersNode
        A `NodeFunction`. It computes in the network's own layers, which remember the last image.

    Raises
    ------
    TypeError
        A stage without `forward` and `backward`.
    ValueError
        There is no such layer, or there are no `rois` for a pooling over regions below it.

    See Also
    --------
    dcn_np.analysis.torch.of_module : The same for modules of PyTorch.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import Node, ReLU, of_layers
    >>> from dcn_np.layers import Conv2d, DeformConv2d
    >>> network = [Conv2d(1, 4, 3, padding=1, rng=0), ReLU(), DeformConv2d(4, 8, 3, padding=1, rng=1)]
    >>> of_node = of_layers(network, Node(channel=3, position=(5, 6)))
    >>> response, gradient = of_node(numpy.ones((1, 12, 12), "float32"))
    >>> gradient.shape
    (1, 12, 12)
    """
    stages: dict[str | int, Any] = {}
    stages.update(network if isinstance(network, Mapping) else enumerate(network))
    for name, stage in stages.items():
        if not hasattr(stage, "forward") or not hasattr(stage, "backward"):
            raise TypeError(
                f"network[{name!r}] is {shown(stage)}; wanted an object with forward and backward"
            )
    names = list(stages)
    last = (names[-1] if names else None) if node.layer is None else node.layer
    if last not in stages:
        raise ValueError(f"node.layer is {shown(node.layer)}; the network has {names}")
    kept = {name: stages[name] for name in names[: names.index(last) + 1]}
    pooling = next((name for name, stage in kept.items() if _pools(stage)), None)
    if pooling is not None and rois is None:
        raise ValueError(
            f"rois is None; network[{pooling!r}] pools over regions: wanted theirs, shape (R, 5)"
        )
    return LayersNode(kept, node, None if rois is None else on_host("rois", rois))
