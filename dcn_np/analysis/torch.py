"""Nodes of modules of PyTorch, as functions of an image in NumPy: what the analyses call.

Nothing of `dcn_np.analysis` imports this module: whoever has a module of PyTorch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..arrays import on_host
from ..messages import shown
from ..roi_pool import modulated_deform_roi_pool
from .nodes import Node, NodeFunction
from .regions import SampledRegions, effective_bins
from .sampling import SampledLayer
from .strength import effective_sampling

Array: TypeAlias = NDArray[Any]

__all__ = ["ModuleNode", "of_module"]

_POOLINGS = nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d
_RIGID = nn.Conv1d, nn.Conv2d, nn.Conv3d, *_POOLINGS


class ModuleNode(NodeFunction):
    """A node of a module of PyTorch; `of_module` makes it.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode.
    node : Node
        Which numbers of its output, or of that of a submodule.
    arguments : tuple
        What the module takes after the image.
    """

    def __init__(self, module: nn.Module, node: Node, arguments: tuple[Any, ...]) -> None:
        self.module, self.node, self.arguments = module, node, arguments

    def forward(self, image: Array) -> Array:
        outputs: list[Any] = []
        if self.node.layer is None:
            outputs.append(self._run(image))
        else:
            submodule = self.module.get_submodule(str(self.node.layer))
            with _hooked({"": submodule}, lambda _, __, inputs, output: outputs.append(output)):
                self._run(image)
        if not outputs:
            raise ValueError(f"the module does not call {self.node.layer!r}; wanted a layer that is called")
        if not isinstance(outputs[-1], Tensor):
            raise TypeError(
                f"the output of {self.node.layer or 'the module'!r} is {shown(outputs[-1])}; wanted a Tensor"
            )
        with torch.enable_grad():
            self._features = outputs[-1][self.node.within(outputs[-1].shape)]
        if not self._features.requires_grad:
            raise ValueError("the node does not depend on the image; wanted one that does")
        features: Array = _array(self._features)
        return features

    def backward(self, grad_features: Array) -> Array:
        by_image: Array = _array(self._gradients(grad_features, [self._image])[0][0])
        return by_image

    forward.__doc__, backward.__doc__ = NodeFunction.forward.__doc__, NodeFunction.backward.__doc__

    def _run(self, image: Array) -> Any:
        """Call the module with an image that a gradient can be asked for."""
        device = next((parameter.device for parameter in self.module.parameters()), None)
        self._image = torch.tensor(image[None], device=device).requires_grad_()
        with torch.enable_grad():
            return self.module(self._image, *self.arguments)

    def _gradients(self, grad_features: Array, tensors: list[Tensor]) -> list[Tensor]:
        if not tensors:  # which autograd refuses
            return []
        direction = torch.as_tensor(grad_features).to(self._features)
        found = torch.autograd.grad(
            self._features, tensors, direction, allow_unused=True, materialize_grads=True
        )
        return list(found)

    def sampled_layers(self, image: Any) -> dict[str, SampledLayer]:
        """Tell how each convolution and max pooling reads its input for an image.

        Parameters
        ----------
        image : array, shape (channels, *spatial)
            The image.

        Returns
        -------
        dict
            By the name of the submodule, in the order of their calls: what `offset_statistics` takes, and of
            which a chain is what `trace_sampling` takes. Deformable convolutions are those of
            `dcn_np.torch`, and modules with DeformConv in the name of their class that are called with
            (x, offset, mask) or have mmcv's conv_offset and deform_groups. The scale is the size of the image
            over that of the layer's input. Padding given by name, and poolings that round up, are left out;
            so is what is called after a pooling over regions, which reads no map of the image.
        """
        found: dict[str, SampledLayer] = {}
        image, pooled = on_host("image", image), []

        def read(name: str, layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pooled.extend([name] if _pools(layer) else [])
            if pooled:
                return
            x = inputs[0]
            with torch.no_grad():
                offset, mask = _branch(layer, inputs)
            size = tuple(x.shape[2:])
            found[name] = SampledLayer(
                size,
                layer.kernel_size if isinstance(layer, _POOLINGS) else tuple(layer.weight.shape[2:]),
                layer.stride,
                layer.padding,
                layer.dilation,
                _array(offset),
                _array(mask),
                1 if offset is None else _offset_groups(layer, offset),
                tuple((numpy.array(image.shape[1:]) / size).tolist()),
            )

        with _hooked(_layers_that_sample(self.module, rigid=True) | layers_that_pool(self.module), read):
            self._run(image)
        return found

    def sampled_regions(self, image: Any) -> dict[str, SampledRegions]:
        """Tell how each pooling over regions below the node reads its map for an image.

        Parameters
        ----------
        image : array, shape (channels, *spatial)
            The image.

        Returns
        -------
        dict
            By the name of the submodule, in the order of their calls, up to the last call of the node's
            layer. Poolings are those of `dcn_np.torch`; modules with DeformRoIPool in the name of their class
            that are called with (x, rois, offset, mask) or have mmcv's offset_fc; and those with RoIAlign in
            it that are aligned. Each has `output_size` and `spatial_scale`.
        """
        calls: list[tuple[str, Any, tuple[Any, ...]]] = []
        layers = layers_that_pool(self.module)
        if self.node.layer is not None:
            layers[str(self.node.layer)] = self.module.get_submodule(str(self.node.layer))
        with _hooked(layers, lambda name, layer, inputs, _: calls.append((name, layer, inputs))):
            self._run(on_host("image", image))
        while calls and self.node.layer not in (None, calls[-1][0]):
            calls.pop()
        found: dict[str, SampledRegions] = {}
        for name, layer, inputs in calls:
            if _pools(layer):
                rois, offset, mask = map(_array, (inputs[1], *_region_branch(layer, inputs)))
                sizes, rule = (layer.output_size, layer.spatial_scale), _rule(layer)
                found[name] = SampledRegions(rois, *sizes, offset, mask, *rule)
        return found

    def strengths(self, image: Any, *, norm: float = 2) -> dict[str, Array]:
        """Tell how much each location that a deformable layer or a pooling samples counts for the response.

        Parameters
        ----------
        image : array, shape (channels, *spatial)
            The image.
        norm : {1, 2, numpy.inf}
            As for `effective_sampling`.

        Returns
        -------
        dict
            By the name of the submodule what `effective_sampling` returns, of a pooling over regions what
            `effective_bins` does; zeros for a layer that the node does not depend on.
        """
        called: dict[str, tuple[Any, ...]] = {}

        def keep(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            called[name] = layer, inputs, output

        layers = _layers_that_sample(self.module, rigid=False) | layers_that_pool(self.module)
        with _hooked(layers, keep):
            _, direction = self._response(self.forward(on_host("image", image)))
        gradients = self._gradients(direction, [output for _, _, output in called.values()])
        return {
            name: (_strength_of_bins if _pools(layer) else _strength)(grad, layer, inputs, norm)
            for (name, (layer, inputs, _)), grad in zip(called.items(), gradients, strict=True)
        }


def of_module(module: nn.Module, node: Node, arguments: tuple[Any, ...] = ()) -> ModuleNode:
    """Make a function of the image of a node of a module of PyTorch.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode; it is called with a batch of one image. Its parameters get no gradients.
    node : Node
        Which of its numbers. `node.layer` is the name of a submodule, such as "layer4.2.conv2", whose output,
        in the last of its calls, has the node; None is the module's own output. Of the head of a detector
        `node.item` is the region, whose features are the whole feature vector.
    arguments : tuple
        What the module takes after the image, such as boxes; `view_node` shows those that a pooling over
        regions is given.

    Returns
    -------
    ModuleNode
        A `NodeFunction`: it takes images of NumPy, and computes where the module is. A call costs a forward
        and a backward of the module.

    Raises
    ------
    TypeError
        `module` is no module.
    ValueError
        The module is in training mode, or has no such layer.

    See Also
    --------
    dcn_np.analysis.of_layers : The same without PyTorch.

    Examples
    --------
    >>> import numpy
    >>> from torch import nn
    >>> from dcn_np.analysis import Node, effective_receptive_field
    >>> from dcn_np.analysis.torch import of_module
    >>> module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    >>> of_node = of_module(module, Node("2", position=(5, 5)))
    >>> images = numpy.random.default_rng(0).random((4, 3, 16, 16), "float32")
    >>> found = effective_receptive_field(of_node, images)
    >>> numpy.argwhere(found.field).min(axis=0), numpy.argwhere(found.field).max(axis=0)
    (array([5, 5]), array([9, 9]))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {shown(module)}; wanted a torch.nn.Module")
    if module.training:
        raise ValueError("module is in training mode, where it changes with each call; wanted module.eval()")
    names = [name for name, _ in module.named_modules() if name]
    if node.layer is not None and node.layer not in names:
        raise ValueError(f"node.layer is {shown(node.layer)}; the module has {names}")
    return ModuleNode(module, node, tuple(arguments))


# ---- layers that sample


def _layers_that_sample(module: nn.Module, *, rigid: bool) -> dict[str, nn.Module]:
    """Return the deformable convolutions by name, with `rigid` others too; nothing that is inside of one."""
    found: dict[str, nn.Module] = {}
    inside: set[str] = set()
    for name, layer in module.named_modules():
        if name.rpartition(".")[0] in inside:
            inside.add(name)
        elif "DeformConv" in type(layer).__name__:
            found[name] = layer
            inside.add(name)
        elif rigid and isinstance(layer, _RIGID) and _is_simple(layer):
            found[name] = layer
    return found


def layers_that_pool(module: nn.Module) -> dict[str, nn.Module]:
    """Return the poolings over regions by name."""
    return {name: layer for name, layer in module.named_modules() if _pools(layer)}


def _pools(layer: Any) -> bool:
    """Tell whether a module pools over regions: one that is aligned, as all of `dcn_np` are."""
    kind = type(layer).__name__
    aligned = "DeformRoIPool" in kind or ("RoIAlign" in kind and getattr(layer, "aligned", True))
    return bool(aligned and hasattr(layer, "output_size") and hasattr(layer, "spatial_scale"))


def _is_simple(layer: Any) -> bool:
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros" and not isinstance(layer.padding, str)
    return zeros and not getattr(layer, "ceil_mode", False)


def _branch(layer: Any, inputs: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Return the offsets and masks of a call."""
    x, *given = inputs
    if isinstance(layer, _RIGID):
        return None, None
    if hasattr(layer, "branch"):
        offset, mask = layer.branch(x)
        return offset, mask
    if given:
        offset, mask = (*given, None)[:2]
        return offset, mask
    if not hasattr(layer, "conv_offset") or not hasattr(layer, "deform_groups"):
        raise TypeError(
            f"a {type(layer).__name__} is called without offsets; wanted one that is given them, or that "
            "makes them as mmcv's do, by conv_offset with deform_groups"
        )
    made = layer.conv_offset(x)
    offsets = layer.deform_groups * math.prod(layer.weight.shape[2:]) * (x.ndim - 2)
    return made[:, :offsets], torch.sigmoid(made[:, offsets:]) if made.shape[1] > offsets else None


def _region_branch(layer: Any, inputs: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Return the offsets and masks of a call of a pooling over regions."""
    x, rois, *given = inputs
    if not isinstance(rois, Tensor):
        raise TypeError(
            f"a {type(layer).__name__} is called with the regions {shown(rois)}; wanted a Tensor (R, 5)"
        )
    if hasattr(layer, "branch"):
        with torch.no_grad():
            offset, mask = layer.branch(x, rois)
        return offset, mask
    if given or not hasattr(layer, "offset_fc"):
        offset, mask = (*given, None, None)[:2]
        return offset, mask
    sizes = layer.output_size, layer.spatial_scale, layer.sampling_ratio
    with torch.no_grad():
        regular = modulated_deform_roi_pool(x.detach(), rois.detach(), None, None, *sizes)
        per_bin, features = (len(rois), -1, *regular.shape[2:]), regular.flatten(1)
        mask = layer.mask_fc(features).view(per_bin) if hasattr(layer, "mask_fc") else None
        return layer.offset_fc(features).view(per_bin), mask


def _rule(layer: Any) -> tuple[float, bool]:
    """Return the factor of a pooling's offsets, if it has one, and whether it pools by rule P."""
    return getattr(layer, "gamma", 1.0), getattr(layer, "position_sensitive", False)


def _strength(grad: Tensor, layer: Any, inputs: tuple[Any, ...], norm: float) -> Array:
    """Return what `effective_sampling` tells of a call of a convolution."""
    x, weight = inputs[0], layer.weight
    with torch.no_grad():
        offset, mask = _branch(layer, inputs)
    return effective_sampling(
        _array(grad),
        _array(x),
        _array(offset),
        _array(mask),
        _array(weight),
        layer.stride,
        layer.padding,
        layer.dilation,
        x.shape[1] // weight.shape[1],
        _offset_groups(layer, offset),
        norm=norm,
    )


def _strength_of_bins(grad: Tensor, layer: Any, inputs: tuple[Any, ...], norm: float) -> Array:
    """Return what `effective_bins` tells of a call of a pooling over regions."""
    x, rois, *_ = inputs
    offset, mask = _region_branch(layer, inputs)
    gamma, by_rule_p = _rule(layer)
    return effective_bins(
        _array(grad),
        _array(x),
        _array(rois),
        _array(offset),
        _array(mask),
        layer.output_size,
        layer.spatial_scale,
        max(layer.sampling_ratio, 0),  # torchvision has -1 for as many as a bin is long
        gamma,
        position_sensitive=by_rule_p,
        norm=norm,
    )


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().cpu().numpy()


def _offset_groups(layer: Any, offset: Tensor) -> int:
    kernel = layer.weight.shape[2:]
    return int(offset.shape[1] // (len(kernel) * math.prod(kernel)))


@contextmanager
def _hooked(
    layers: dict[str, nn.Module], read: Callable[[str, nn.Module, tuple[Any, ...], Any], None]
) -> Iterator[None]:
    """Call a function with the name, module, inputs and output of each call of the modules."""

    def hook(name: str) -> Any:
        def called(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            named = (kwargs[key] for key in ("rois", "offset", "mask") if key in kwargs)
            read(name, module, (*inputs, *named), output)

        return called

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
