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
from .nodes import Node, NodeFunction
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
        features: Array = self._array(self._features)
        return features

    def backward(self, grad_features: Array) -> Array:
        by_image: Array = self._array(self._gradients(grad_features, [self._image])[0][0])
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

    @staticmethod
    def _array(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().cpu().numpy()

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
            over that of the layer's input. Padding given by name, and poolings that round up, are left out.
        """
        found: dict[str, SampledLayer] = {}
        image = on_host("image", image)

        def read(name: str, layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
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
                self._array(offset),
                self._array(mask),
                1 if offset is None else _offset_groups(layer, offset),
                tuple((numpy.array(image.shape[1:]) / size).tolist()),
            )

        with _hooked(_layers_that_sample(self.module, rigid=True), read):
            self._run(image)
        return found

    def strengths(self, image: Any, *, norm: float = 2) -> dict[str, Array]:
        """Tell how much each sampling location of each deformable convolution counts for the response.

        Parameters
        ----------
        image : array, shape (channels, *spatial)
            The image.
        norm : {1, 2, numpy.inf}
            As for `effective_sampling`.

        Returns
        -------
        dict
            By the name of the submodule what `effective_sampling` returns; zeros for a layer that the node
            does not depend on.
        """
        called: dict[str, tuple[Any, ...]] = {}

        def keep(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            called[name] = layer, inputs, output

        with _hooked(_layers_that_sample(self.module, rigid=False), keep):
            _, direction = self._response(self.forward(on_host("image", image)))
        gradients = self._gradients(direction, [output for _, _, output in called.values()])
        found: dict[str, Array] = {}
        for (name, (layer, inputs, _)), grad in zip(called.items(), gradients, strict=True):
            x, weight = inputs[0], layer.weight
            with torch.no_grad():
                offset, mask = _branch(layer, inputs)
            found[name] = effective_sampling(
                self._array(grad),
                self._array(x),
                self._array(offset),
                self._array(mask),
                self._array(weight),
                layer.stride,
                layer.padding,
                layer.dilation,
                x.shape[1] // weight.shape[1],
                _offset_groups(layer, offset),
                norm=norm,
            )
        return found


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
        What the module takes after the image, such as boxes.

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
            named = (kwargs[key] for key in ("offset", "mask") if key in kwargs)
            read(name, module, (*inputs, *named), output)

        return called

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
