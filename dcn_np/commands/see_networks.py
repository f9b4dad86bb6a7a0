"""The networks that `see` looks into: the repository's trained ones, or one of the user's own."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from dcn_np import analysis, layers, pth
from dcn_np.commands import demo_digits
from dcn_np.messages import shown

Array = Any

DIGITS_LAYER = "conv4.relu"


class Seen(NamedTuple):
    """A network, and how a node of it becomes a function of the image."""

    name: str
    of_node: Callable[
        [analysis.Node, Array], Any
    ]  # with the regions of a head, (R, 5): LayersNode, ModuleNode
    channels: int  # of the image that it takes
    layer: Any  # whose nodes
    sampling: Any  # the layer whose samples are drawn, or None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a network."""
    parser.add_argument(
        "--factory",
        metavar="MODULE:FUNCTION",
        help="what makes a network of your own: a function without arguments that returns what "
        "dcn_np.analysis.of_layers takes, or a torch.nn.Module, which is given an image, and regions (R, 5) "
        "where it pools over regions (default: the repository's digits networks)",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="its parameters: .npz, .safetensors, .pth or .pt"
    )
    parser.add_argument("--layer", help=f"whose nodes (default: {DIGITS_LAYER} of the digits networks)")
    parser.add_argument(
        "--sampling",
        metavar="LAYER",
        help="whose samples are drawn (default: --layer, or what samples last below it)",
    )


def from_arguments(args: argparse.Namespace) -> tuple[list[Seen], Array | None]:
    """Return the networks, and the image that is looked at where none is given."""
    if args.factory is None:
        if args.weights is not None:
            raise ValueError("--weights is given without --factory; wanted both, for a network of your own")
        return digits_networks(args.layer or DIGITS_LAYER, args.sampling)
    network = made(args.factory)
    name = (args.weights or Path(args.factory.rpartition(":")[2])).stem
    if isinstance(network, Mapping | Sequence):
        return [of_stages(name, network, args)], None
    return [of_torch(name, network, args)], None


def digits_networks(layer: str, sampling: str | None) -> tuple[list[Seen], Array]:
    """Return the three networks of examples/digits, and a digit of their test set."""
    if not demo_digits.is_here():
        raise ValueError(
            "the repository's networks are not here: they lie in its folder examples/digits, not in what pip "
            "installs; wanted a network of your own, by --factory"
        )
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("the digits need scipy: pip install 'dcn_np[demo]'")
    trained = demo_digits.TrainedDigits()

    def seen(variant: str) -> Seen:
        stages = trained.network(variant).stages()
        return Seen(variant, partial(analysis.of_layers, stages), 1, layer, sampling)

    image = trained.example["data"].as_input(trained.digits.images[:1])[0]
    return [seen(variant) for variant in trained.states], image


def made(factory: str) -> Any:
    """Call MODULE:FUNCTION, which is looked for in the working directory too."""
    module, _, name = factory.partition(":")
    if not module or not name:
        raise ValueError(f"--factory is {factory!r}; wanted MODULE:FUNCTION, such as my_networks:small")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name, None)
    finally:
        sys.path.remove("")
    if not callable(function):
        raise ValueError(f"{module} has no function {name!r}; --factory wants MODULE:FUNCTION")
    return function()


def read_state(path: Path) -> dict[str, Array]:
    """Read parameters by name."""
    if path.suffix == ".npz":
        return layers.load_npz(path)
    if path.suffix == ".safetensors":
        return layers.load_safetensors(path)
    return pth.state_dict_of(pth.read_pth(path))


def of_stages(name: str, network: Any, args: argparse.Namespace) -> Seen:
    """Look into a network of `dcn_np.layers`, whose parameters are named <stage>.<parameter>."""
    stages = dict(network if isinstance(network, Mapping) else enumerate(network))
    convolutions = [stage for stage in stages.values() if hasattr(stage, "in_channels")]
    if not convolutions:
        raise ValueError(f"the network of --factory has the stages {list(stages)}; wanted a convolution")
    if args.weights is not None:
        load(stages, read_state(args.weights), args.weights)
    keys = {str(key): key for key in stages}
    layer, sampling = (keys.get(given, given) for given in (args.layer, args.sampling))
    return Seen(name, partial(analysis.of_layers, stages), convolutions[0].in_channels, layer, sampling)


def load(stages: Mapping[Any, Any], state: Mapping[str, Array], path: Path) -> None:
    """Give each layer its parameters."""
    for key, stage in stages.items():
        if not hasattr(stage, "load_state_dict"):
            continue
        wanted = {name: f"{key}.{name}" for name in stage.state_dict()}
        if missing := [full for full in wanted.values() if full not in state]:
            raise ValueError(f"{path} has no {', '.join(missing)}; it has {', '.join(sorted(state))}")
        stage.load_state_dict({name: state[full] for name, full in wanted.items()})


def of_torch(name: str, module: Any, args: argparse.Namespace) -> Seen:
    """Look into a module of PyTorch."""
    import torch

    from dcn_np.analysis.torch import layers_that_pool, of_module

    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"--factory {args.factory} returned {shown(module)}; wanted a mapping or sequence of "
            "stages, or a torch.nn.Module"
        )
    if args.weights is not None:
        state = {key: torch.as_tensor(numpy.asarray(a)) for key, a in read_state(args.weights).items()}
        try:
            module.load_state_dict(state)
        except RuntimeError as error:  # what torch raises for names and shapes that do not fit
            raise ValueError(f"{args.weights}: {error}") from error
    weights = [weight for weight in module.parameters() if weight.ndim > 2]
    module.eval()
    channels = weights[0].shape[1] if weights else 3

    def of_node(node: analysis.Node, rois: Array) -> Any:
        return of_module(module, node, (torch.from_numpy(rois),) if layers_that_pool(module) else ())

    return Seen(name, of_node, channels, args.layer, args.sampling)
