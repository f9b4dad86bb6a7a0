"""torchvision.ops.deform_conv2d, forward and backward: what users of PyTorch have."""

from __future__ import annotations

import importlib
from typing import Any

from dcn_np.commands.bench_problems import Data, Problem
from dcn_np.commands.bench_timing import Work
from peers.torch_arrays import work


class Torchvision:
    """Two dimensions; the groups follow from the shapes."""

    name = "torchvision"
    deforms = True

    def __init__(self) -> None:
        torchvision: Any = importlib.import_module("torchvision")
        self.version = torchvision.__version__
        self.convolve = torchvision.ops.deform_conv2d

    def prepare(self, problem: Problem, data: Data, passes: str, threads: int) -> Work | None:
        """None for other ranks than two."""
        if problem.ndim != 2:
            return None
        names = ("stride", "padding", "dilation")
        parameters = {name: getattr(problem, name) for name in names}

        def call(x: Any, offset: Any, mask: Any, weight: Any, bias: Any) -> Any:
            return self.convolve(x, offset, weight, bias, mask=mask, **parameters)

        arrays = {name: getattr(data, name) for name in ("x", "offset", "mask", "weight", "bias")}
        return work(call, arrays, data.grad_output, passes, threads)


def load() -> Torchvision:
    """Return the peer; without its compiled operators the import raises."""
    return Torchvision()
