"""Microseconds that a call costs beyond the NumPy call, by the library whose arrays it is given.

    python benchmarks/overhead.py --rounds 25 --json now.json

The layer is so small that there is almost nothing to compute. Every way to call is validated first; then all
take turns in rounds, each round in a new random order, with one thread. "Beyond" is the median of the
differences to the NumPy call inside the rounds. A library that is not installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import goals
import numpy
import peers
import run

import dcn_np
from dcn_np.commands import bench, bench_timing
from dcn_np.commands.bench_problems import Data, Problem
from dcn_np.commands.bench_timing import Case, Work
from dcn_np.threads import exactly

TINY = Problem("tiny", "nothing but overhead", 1, 4, 4, (6, 6))
MICRO = 1e-6
Settings = contextlib.AbstractContextManager[Any]


@dataclasses.dataclass
class Caller:
    """One way to call the operator over arrays of another library."""

    name: str
    version: str
    convolve: Callable[..., Any]  # (x, offset, mask, weight, bias, stride=, padding=, ...)
    convert: Callable[[numpy.ndarray], Any]
    revert: Callable[[Any], numpy.ndarray]
    wait: Callable[[Any], Any] = lambda result: result  # until the result is there
    backward: Callable[[Any, Any, Sequence[Any]], Iterable[Any]] | None = None  # (y, grad_output, inputs)
    mode: Callable[[], Settings] = contextlib.nullcontext  # entered untimed
    deforms: bool = True

    def prepare(self, problem: Problem, data: Data, passes: str, threads: int) -> Work | None:
        """None for the gradients where there are none."""
        inputs = [self.convert(array) for array in data.arguments]
        grad_output = self.convert(data.grad_output)
        backward, parameters = self.backward, problem.parameters

        def forward() -> Any:
            return self.wait(self.convolve(*inputs, **parameters))

        def settings() -> contextlib.ExitStack:
            stack = contextlib.ExitStack()
            stack.enter_context(exactly(threads))
            stack.enter_context(self.mode())
            return stack

        if passes == "forward":
            return Work(forward, lambda y: {"y": self.revert(y)}, settings)
        if backward is None:
            return None

        def both() -> tuple[Any, ...]:
            y = forward()
            return (y, *backward(y, grad_output, inputs))

        names = ("y", "x", "offset", "mask", "weight", "bias")
        return Work(both, lambda arrays: dict(zip(names, map(self.revert, arrays), strict=True)), settings)


# ---- the libraries


def torch_callers() -> list[Caller]:
    """The plain function, then the operator of `dcn_np.torch` without and with gradients."""
    torch: Any = importlib.import_module("torch")
    operator = importlib.import_module("dcn_np.torch").modulated_deform_conv

    def gradients(y: Any, grad_output: Any, inputs: Sequence[Any]) -> Iterable[Any]:
        found: Iterable[Any] = torch.autograd.grad(y, inputs, grad_output)
        return found

    plain = Caller(
        "torch through DLPack",
        f"torch {torch.__version__}",
        dcn_np.modulated_deform_conv,
        torch.from_numpy,
        lambda tensor: tensor.detach().numpy(),
        mode=torch.no_grad,
    )
    return [
        plain,
        dataclasses.replace(plain, name="dcn_np.torch, no grad", convolve=operator),
        dataclasses.replace(
            plain,
            name="dcn_np.torch, grad",
            convolve=operator,
            convert=lambda array: torch.from_numpy(array).requires_grad_(),
            mode=contextlib.nullcontext,
            backward=gradients,
        ),
    ]


def jax_callers() -> list[Caller]:
    """Under jit, as users of JAX call everything."""
    jax: Any = importlib.import_module("jax")
    convolve = importlib.import_module("dcn_np.jax").modulated_deform_conv
    jitted = jax.jit(convolve, static_argnames=tuple(TINY.parameters))
    return [
        Caller(
            "dcn_np.jax, jit",
            f"jax {jax.__version__}",
            jitted,
            jax.numpy.asarray,
            numpy.asarray,
            wait=jax.block_until_ready,
        )
    ]


def tensorflow_callers() -> list[Caller]:
    """Eagerly."""
    tensorflow: Any = importlib.import_module("tensorflow")
    convolve = importlib.import_module("dcn_np.tensorflow").modulated_deform_conv
    version, convert = f"tensorflow {tensorflow.__version__}", tensorflow.convert_to_tensor
    return [Caller("dcn_np.tensorflow", version, convolve, convert, lambda tensor: tensor.numpy())]


def paddle_callers() -> list[Caller]:
    """Without gradients."""
    paddle: Any = importlib.import_module("paddle")
    convolve = importlib.import_module("dcn_np.paddle").modulated_deform_conv
    version, convert = f"paddle {paddle.__version__}", paddle.to_tensor
    return [
        Caller(
            "dcn_np.paddle", version, convolve, convert, lambda tensor: tensor.numpy(), mode=paddle.no_grad
        )
    ]


LIBRARIES: dict[str, Callable[[], list[Caller]]] = {
    "torch": torch_callers,
    "jax": jax_callers,
    "tensorflow": tensorflow_callers,
    "paddle": paddle_callers,
}

# Microseconds beyond the NumPy call, forward.
GOALS = {
    "torch through DLPack": 15.0,
    "dcn_np.torch, no grad": 50.0,
    "dcn_np.torch, grad": 90.0,
    "dcn_np.jax, jit": 12.0,
}


# ---- what comes out


def beyond(case: Case, cases: Sequence[Case]) -> float:
    """Microseconds beyond the NumPy call of the same passes; NaN where one of the two was not timed."""
    numpy_call = next(one for one in cases if one.passes == case.passes)
    pairs = zip(case.seconds, numpy_call.seconds, strict=False)
    differences = [(seconds - own) / MICRO for seconds, own in pairs]
    return statistics.median(differences) if differences else math.nan


def table(cases: Sequence[Case]) -> str:
    """One line per way to call, the NumPy call first."""
    lines = [f"{'arrays':26}{'pass':10}{'us a call':>10}{'beyond':>9}{'spread':>8}{'residual':>10}"]
    for case in cases:
        start = f"{case.implementation.name:26}{case.passes:10}"
        if case.refused:
            lines.append(f"{start}  refused: {case.refused}")
            continue
        median = statistics.median(case.seconds) / MICRO
        times = f"{median:10.1f}{beyond(case, cases):9.1f}{case.spread:8.2f}"
        lines.append(f"{start}{times}{case.residual:10.1e}")
    return "\n".join(lines)


def rows(cases: Sequence[Case]) -> list[goals.Row]:
    """The goals, and what was reached of those that were measured."""
    reached = {case.implementation.name: beyond(case, cases) for case in cases if case.passes == "forward"}
    return [
        goals.Row(
            f"forward: {name}, beyond the NumPy call",
            False,
            goal,
            reached.get(name, math.nan),
            (TINY.name,),
            " us",
        )
        for name, goal in GOALS.items()
    ]


def parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = f"{', '.join(LIBRARIES)} or none; default all that are installed"
    chosen = bench.subset((*LIBRARIES, "none"))
    parser.add_argument("--libraries", type=chosen, default=list(LIBRARIES), help=names)
    bench.add_run_arguments(parser, rounds=25)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 where a result was wrong."""
    arguments = parser().parse_args(words)
    loaders = {name: LIBRARIES[name] for name in arguments.libraries if name != "none"}
    found, missing = peers.installed(loaders)
    callers = list(itertools.chain(*found))
    record = run.begin({caller.name: caller.version for caller in callers}, missing)
    implementations: list[bench_timing.Implementation] = [bench.DcnNp(), *callers]
    cases = []
    for passes in bench.PASSES:
        cases += bench_timing.time_problem(TINY, passes, implementations, rounds=arguments.rounds)
    print(table(cases), end="\n\n")
    reached = rows(cases)
    run.print_goals(reached)
    run.print_busy(cases)
    if arguments.json:
        measured = [case.record() | {"beyond": beyond(case, cases)} for case in cases]
        bench.write(
            arguments.json, record | {"results": measured, "goals": [row.record() for row in reached]}
        )
    return int(any(case.refused for case in cases))


if __name__ == "__main__":
    sys.exit(main())
