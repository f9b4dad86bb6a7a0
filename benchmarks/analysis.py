"""Time the analyses of dcn_np.analysis: traces, saliency of the digits networks, receptive fields with torch.

    python benchmarks/analysis.py --nodes 50

The receptive field is that of a node of a ResNet-50 with DCNv2, beside one forward and one backward of it
without the analysis; without torch it is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy

from dcn_np import analysis
from dcn_np.commands import demo_digits

ROUNDS = 7
LEVEL = (56, 56)  # pixels of the maps of the trace
EPSILON = 0.1


def median_seconds(function: Callable[[], Any]) -> float:
    """Return the median time of ROUNDS calls, after one that is not counted."""
    function()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def trace(levels: int = 3, nodes: int = 100) -> str:
    """Trace nodes through modulated 3 x 3 layers."""
    rng = numpy.random.default_rng(0)
    layers = [
        analysis.SampledLayer(
            LEVEL, 3, padding=1, offset=rng.normal(0, 1, (1, 18, *LEVEL)), mask=rng.random((1, 9, *LEVEL))
        )
        for _ in range(levels)
    ]
    places = rng.integers(0, LEVEL, (nodes, 2))
    seconds = median_seconds(lambda: analysis.trace_sampling(layers, places))
    return f"trace of {nodes} nodes through {levels} levels: {seconds:.3f} s"


def saliency(variant: str, nodes: int) -> str:
    """Find the region of the most active feature vector of conv4, for so many digits."""
    told = demo_digits.TrainedDigits()
    stages = told.network(variant).stages()
    images = told.example["data"].as_input(told.digits.images[:nodes])
    seconds, errors, areas = [], [], []
    for image in images:
        features = analysis.of_layers(stages, analysis.Node("conv4.relu")).forward(image)
        place = numpy.unravel_index(features.sum(axis=0).argmax(), features.shape[1:])
        of_node = analysis.of_layers(stages, analysis.Node("conv4.relu", position=tuple(map(int, place))))
        started = time.perf_counter()
        found = analysis.error_bounded_saliency(of_node.cosine_error(image), image, EPSILON)
        seconds.append(time.perf_counter() - started)
        errors.append(found.error)
        areas.append(found.area)
    each, most = statistics.mean(seconds), max(seconds)
    return (
        f"saliency, {variant}, {nodes} nodes: {each:.2f} s each, at most {most:.2f} s; errors at most "
        f"{max(errors):.4f}, mean area {100 * statistics.mean(areas):.2f} %"
    )


def receptive_field(size: int = 224) -> str:
    """Compare the receptive field of a node with one forward and one backward."""
    import torch
    from resnet import RESNET50, resnet

    import dcn_np.torch
    from dcn_np.analysis.torch import of_module

    module = resnet(RESNET50)
    dcn_np.torch.replace_convs(module)
    image = numpy.random.default_rng(0).random((1, 3, size, size), "float32")
    of_node = of_module(module.eval(), analysis.Node("layer4", position=(3, 3)))

    def alone() -> None:
        x = torch.from_numpy(image).requires_grad_()
        features = module(x)[0, :, 3, 3]
        torch.autograd.grad(features, x, features.detach() / features.detach().norm())

    plain = median_seconds(alone)
    field = median_seconds(lambda: analysis.effective_receptive_field(of_node, image))
    return (
        f"receptive field, ResNet-50, {size} x {size}: {field:.3f} s; a forward and a backward: {plain:.3f} s"
    )


def main() -> None:
    """Print a line for each analysis."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--nodes", type=int, default=50, help="of the saliency, for each network (default: 50)"
    )
    nodes = parser.parse_args().nodes
    print(trace(), flush=True)
    for variant in ("plain", "DCNv1", "DCNv2"):
        print(saliency(variant, nodes), flush=True)
    if importlib.util.find_spec("torch"):
        print(receptive_field())


if __name__ == "__main__":
    main()
