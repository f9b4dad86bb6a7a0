"""Validate every layer on one shape, then time those that are right, in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy

from .devices import Device, Run
from .gates import TORCHVISION
from .inputs import Inputs
from .layers import Convolution, DcnNp, Layer, Torchvision
from .problems import LAYOUTS, Accuracy, Result, Shape

TURN_SECONDS = 0.004  # calls are repeated in a turn until they take about as long
MOST_CALLS = 20
WARM_UP_CALLS = 3
HEAD_START = 1.5  # of the time it takes to queue the calls of a turn
# All sets together are so many times larger than the last cache: a call finds none of its inputs there.
CACHES = 3
LEAST_SETS, MOST_SETS = 2, 16

# Relative errors, L2, that rounding explains in the outputs and all gradients; a mistake makes more.
LIMITS = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 5e-5, "tf32": 2e-3}
# torchvision computes coordinates in float16: errors of 1e-2 and more belong to it and are only recorded.
ONLY_RECORDED = {(TORCHVISION, "float16")}
PER_IMAGE = ("y", "x", "offset", "mask")

Numbers = numpy.ndarray[Any, Any]
Truth = Mapping[str, Numbers]


@dataclasses.dataclass(frozen=True)
class Sets:
    """The inputs of one shape, in both memory orders, and what is right for the first image of the first."""

    shape: Shape
    offsets: str
    by_layout: Mapping[str, Sequence[Inputs]]
    truths: Mapping[bool, Truth]  # by whether the layer deforms

    @classmethod
    def of(cls, device: Device, shape: Shape, offsets: str, dtype: str, passes: str) -> Sets:
        """Draw as many sets as the cache asks for; torchvision in float64 says what is right."""
        first = Inputs.of(shape, offsets, dtype, 0, device.kind)
        wanted = math.ceil(CACHES * device.cache_bytes / first.nbytes)
        count = min(max(LEAST_SETS, wanted), MOST_SETS)
        more = (Inputs.of(shape, offsets, dtype, index, device.kind) for index in range(1, count))
        plain = [first, *more]
        last = [inputs.channels_last() for inputs in plain]
        exact = first.first_image().double()
        judges: tuple[Layer, ...] = (Torchvision("float32"), Convolution("float32"))
        truths = {judge.deforms: _results(device, judge, exact, passes) for judge in judges}
        return cls(shape, offsets, dict(zip(LAYOUTS, (last, plain), strict=True)), truths)


def _results(device: Device, layer: Layer, inputs: Inputs, passes: str) -> dict[str, Numbers]:
    with layer.settings():
        results = layer.prepare(inputs, passes)()
        return {name: device.numbers(array) for name, array in results.items()}


def relative_error(found: Numbers, right: Numbers) -> float:
    """The L2 norm of the difference over that of what is right; infinite where a number is not finite."""
    if found.shape != right.shape:
        raise ValueError(f"a result of shape {found.shape}, wanted {right.shape}")
    error = float(numpy.linalg.norm(found - right) / numpy.linalg.norm(right))
    return error if math.isfinite(error) else math.inf


def validate(device: Device, layer: Layer, sets: Sets, passes: str) -> dict[str, float]:
    """Errors of one image alone, and of the same image as the first of the batch that is timed."""
    truth, inputs = sets.truths[layer.deforms], sets.by_layout[layer.layout][0]
    alone = _results(device, layer, inputs.first_image(), passes)
    errors = {name: relative_error(found, truth[name]) for name, found in alone.items()}
    with layer.settings():
        batch = layer.prepare(inputs, passes)()
        for name in PER_IMAGE:
            if name in batch:
                errors[f"{name} in a batch"] = relative_error(device.numbers(batch[name][:1]), truth[name])
    return errors


def _judged(layer: Layer, errors: Mapping[str, float]) -> str | None:
    """Why a layer is not timed."""
    if (layer.implementation, layer.mode) in ONLY_RECORDED:
        return None
    limit = LIMITS[layer.mode]
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if error > limit]
    return f"relative error above {limit:.1e}: {', '.join(wrong)}" if wrong else None


@dataclasses.dataclass
class Case:
    """A layer with a call for every set."""

    result: Result
    layer: Layer
    runs: Sequence[Run]
    head_start: float = 0.0

    def run(self, order: Iterator[int]) -> Run:
        """Return a call that takes the next set each time."""
        return lambda: self.runs[next(order)]()


@contextlib.contextmanager
def _refusing(result: Result) -> Iterator[None]:
    """An error of a library is the result of its case: the others go on."""
    try:
        yield
    except Exception as error:
        result.refused = f"{type(error).__name__}: {error}".splitlines()[0]


def time_sets(device: Device, sets: Sets, passes: str, layers: Sequence[Layer], rounds: int) -> list[Result]:
    """Validate, measure memory, time; every layer has a result, of those refused the reason."""
    order = itertools.cycle(range(len(sets.by_layout[LAYOUTS[0]])))
    results, cases = [], []
    for layer in layers:
        inputs = sets.by_layout[layer.layout]
        result = Result(sets.shape, sets.offsets, passes, layer.mode, layer.implementation, layer.layout)
        result.x_bytes, result.weight_bytes = inputs[0].x.nbytes, inputs[0].weight.nbytes
        results.append(result)
        with _refusing(result):
            result.errors = validate(device, layer, sets, passes)
            result.refused = _judged(layer, result.errors)
            if result.refused is None:
                case = Case(result, layer, [layer.prepare(one, passes) for one in inputs])
                _warm_up(device, case, order)
                cases.append(case)
    _interleave(device, cases, order, rounds)
    return results


def _warm_up(device: Device, case: Case, order: Iterator[int]) -> None:
    """Compile, fill the pools, measure memory; choose how many calls a turn has."""
    run = case.run(order)
    with case.layer.settings():
        device.seconds(run, WARM_UP_CALLS, 0.0)
        case.result.extra_bytes = device.extra_bytes(case.runs[0])
        seconds, host = min(device.seconds(run, WARM_UP_CALLS, 0.0) for _ in range(3))
    case.result.calls = min(max(1, math.ceil(TURN_SECONDS / seconds)), MOST_CALLS)
    case.head_start = HEAD_START * host * case.result.calls


def _interleave(device: Device, cases: Sequence[Case], order: Iterator[int], rounds: int) -> None:
    """Time all cases in every round, in a new random order each round; nothing is discarded.

    The sets go round whoever is called, so that no call finds its inputs in the cache from the one before.
    """
    generator = numpy.random.default_rng()
    for _ in range(rounds):
        for index in generator.permutation(len(cases)):
            case = cases[index]
            if case.result.refused:
                continue
            with _refusing(case.result), case.layer.settings():
                measured = device.seconds(case.run(order), case.result.calls, case.head_start)
                case.result.seconds.append(measured[0])
                case.result.host_seconds.append(measured[1])
    for case in cases:
        if case.result.refused:  # in a round: its times would not match those of the others
            case.result.seconds, case.result.host_seconds = [], []


def accuracy(device: Device, shapes: Sequence[Shape], offsets: Sequence[str]) -> Iterator[Accuracy]:
    """Errors of the float16 forward pass by size of the image."""
    layers: list[Layer] = [*(DcnNp(device, "float16", layout) for layout in LAYOUTS), Torchvision("float16")]
    for shape, kind in itertools.product(shapes, offsets):
        inputs = Inputs.of(shape, kind, "float16", 0, device.kind)
        ordered = dict(zip(LAYOUTS, (inputs.channels_last(), inputs), strict=True))
        right = _results(device, Torchvision("float32"), inputs.double(), "forward")["y"]
        for layer in layers:
            found = _results(device, layer, ordered[layer.layout], "forward")["y"]
            error = relative_error(found, right)
            image = f"{shape.height}x{shape.width}"
            yield Accuracy(image, kind, layer.implementation, layer.layout, error)
        device.free()
