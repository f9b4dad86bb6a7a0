"""What the two peers that run on torch share: tensors over our arrays, threads, gradients."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from dcn_np.commands.bench_timing import Work

torch: Any = importlib.import_module("torch")


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Limit torch for a while; afterwards it has one thread and so none that spins."""
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def forward_work(call: Callable[..., Any], tensors: dict[str, Any], threads: int) -> Work:
    """The forward pass without a record for autograd."""

    def run() -> Any:
        with torch.inference_mode():
            return call(**tensors)

    return Work(run, lambda y: {"y": y.numpy()}, lambda: torch_threads(threads))


def both_work(
    call: Callable[..., Any], tensors: dict[str, Any], grad_output: numpy.ndarray, threads: int
) -> Work:
    """The forward pass and the gradient of every tensor."""
    inputs = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    grad = torch.from_numpy(grad_output)

    def run() -> tuple[Any, ...]:
        y = call(**inputs)
        return (y, *torch.autograd.grad(y, list(inputs.values()), grad))

    def results(tensors: tuple[Any, ...]) -> dict[str, numpy.ndarray]:
        names = ("y", *inputs)
        return {name: tensor.detach().numpy() for name, tensor in zip(names, tensors, strict=True)}

    return Work(run, results, lambda: torch_threads(threads))


def work(
    call: Callable[..., Any],
    arrays: dict[str, numpy.ndarray],
    grad_output: numpy.ndarray,
    passes: str,
    threads: int,
) -> Work:
    """Make ``call`` ready over ``arrays``, which are its arguments by name."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if passes == "forward":
        return forward_work(call, tensors, threads)
    return both_work(call, tensors, grad_output, threads)
