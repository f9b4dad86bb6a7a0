"""An ordinary convolution of the same shape: torch with oneDNN. What a deformable one should cost."""

from __future__ import annotations

from typing import Any

from dcn_np.commands.bench import BASELINE
from dcn_np.commands.bench_problems import Data, Problem
from dcn_np.commands.bench_timing import Work
from peers.torch_arrays import torch, work


class Ordinary:
    """torch.nn.functional.conv1d, conv2d or conv3d; backward gives the gradients of x, weight and bias."""

    name = BASELINE
    version = f"torch {torch.__version__}"
    deforms = False

    def prepare(self, problem: Problem, data: Data, passes: str, threads: int) -> Work:
        """Offsets and masks are not looked at."""
        convolve = getattr(torch.nn.functional, f"conv{problem.ndim}d")
        parameters = {name: value for name, value in problem.parameters.items() if name != "offset_groups"}

        def call(x: Any, weight: Any, bias: Any) -> Any:
            return convolve(x, weight, bias, **parameters)

        arrays = {"x": data.x, "weight": data.weight, "bias": data.bias}
        return work(call, arrays, data.grad_output, passes, threads)


def load() -> Ordinary:
    """Return the peer."""
    return Ordinary()
