"""The shapes that are timed, their data, and what the reference says about a sample of each result.

Used by ``python -m dcn_np bench`` and by the benchmarks folder of the repository.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy

from dcn_np import reference

SAMPLED_POSITIONS = 8  # per axis, roughly: seconds, not minutes, in the reference
OFFSET_SIGMA = 2.0  # pixels
OFFSET_STEP = 2.0**-12
TOLERANCE_EPS = 500  # of max|result|: sums have up to 60,000 terms, and some libraries add them one by one


class WrongResultError(Exception):
    """A result that differs from the reference: it has no time."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer: shapes, parameters, and where they come from."""

    name: str
    source: str
    batch: int
    in_channels: int
    out_channels: int
    input: tuple[int, ...]
    kernel: tuple[int, ...] = (3, 3)
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    offset_groups: int = 1

    @property
    def ndim(self) -> int:
        return len(self.input)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def spans(self) -> tuple[int, ...]:
        """How far the first tap can move along each axis, in input pixels."""
        return tuple(
            extent + 2 * self.padding - self.dilation * (taps - 1) - 1
            for extent, taps in zip(self.input, self.kernel, strict=True)
        )

    @property
    def output(self) -> tuple[int, ...]:
        return tuple(span // self.stride + 1 for span in self.spans)

    @property
    def parameters(self) -> dict[str, Any]:
        """The keyword arguments of the public functions."""
        names = ("stride", "padding", "dilation", "groups", "offset_groups")
        return {name: getattr(self, name) for name in names}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array, by the name of the argument; ``y`` is the result."""
        coordinates = self.offset_groups * self.taps
        return {
            "x": (self.batch, self.in_channels, *self.input),
            "offset": (self.batch, coordinates * self.ndim, *self.output),
            "mask": (self.batch, coordinates, *self.output),
            "weight": (self.out_channels, self.in_channels // self.groups, *self.kernel),
            "bias": (self.out_channels,),
            "y": (self.batch, self.out_channels, *self.output),
        }

    @property
    def multiplications(self) -> int:
        """Multiply-adds of the matrix product, forward; forward and backward is three times as many."""
        return math.prod(self.shapes["weight"]) * self.batch * math.prod(self.output)

    def __str__(self) -> str:
        extents = "x".join(map(str, self.input))
        text = f"{self.name}: {self.batch} x {self.in_channels} -> {self.out_channels}, {extents}, kernel "
        text += "x".join(map(str, self.kernel))
        for name, normal in (("stride", 1), ("groups", 1), ("offset_groups", 1)):
            value = getattr(self, name)
            text += f", {name.replace('_', ' ')} {value}" if value != normal else ""
        return f"{text} ({self.source})"


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("S1", "conv2 of a ResNet at 224", 1, 64, 64, (56, 56)),
        Problem("S2", "conv3 of Mask R-CNN at 800x1333", 1, 128, 128, (100, 167)),
        Problem("S3", "conv4 of Mask R-CNN at 800x1333", 1, 256, 256, (50, 84)),
        Problem("S4", "conv5 of Mask R-CNN at 800x1333", 1, 512, 512, (25, 42)),
        Problem("S5", "a training batch", 8, 256, 256, (28, 28)),
        Problem("S6", "depthwise", 1, 64, 64, (56, 56), groups=64),
        Problem("S7", "ResNeXt", 1, 256, 256, (50, 84), groups=32),
        Problem("S8", "a strided layer", 1, 128, 128, (112, 112), stride=2, offset_groups=4),
        Problem("S9", "call overhead", 1, 16, 16, (16, 16)),
        Problem("S10", "video restoration", 1, 64, 64, (180, 320), offset_groups=16),
        Problem("S11", "volumes", 1, 32, 32, (16, 56, 56), (3, 3, 3)),
        Problem("S12", "the last map of a classifier", 1, 512, 512, (7, 7)),
    )
}


@dataclasses.dataclass(frozen=True)
class Data:
    """The arrays of one problem in one dtype."""

    x: numpy.ndarray
    offset: numpy.ndarray
    mask: numpy.ndarray
    weight: numpy.ndarray
    bias: numpy.ndarray
    grad_output: numpy.ndarray

    @classmethod
    def of(cls, problem: Problem, dtype: Any = numpy.float32) -> Data:
        """The same numbers in every run and every dtype."""
        generator = numpy.random.default_rng(zlib.crc32(problem.name.encode()))
        shapes = problem.shapes

        def normal(shape: tuple[int, ...]) -> numpy.ndarray:
            return generator.standard_normal(shape, dtype=numpy.float32).astype(dtype)

        terms = math.prod(shapes["weight"][1:])
        return cls(
            x=normal(shapes["x"]),
            offset=_off_the_lattice(normal(shapes["offset"]) * OFFSET_SIGMA),
            mask=generator.random(shapes["mask"], dtype=numpy.float32).astype(dtype),
            weight=normal(shapes["weight"]) / numpy.asarray(math.sqrt(terms), dtype),
            bias=normal(shapes["bias"]),
            grad_output=normal(shapes["y"]),
        )

    @property
    def arguments(self) -> tuple[numpy.ndarray, ...]:
        """In the order of ``modulated_deform_conv``."""
        return self.x, self.offset, self.mask, self.weight, self.bias

    def rigid(self) -> Data:
        """The same layer as an ordinary convolution."""
        offset, mask = numpy.zeros_like(self.offset), numpy.ones_like(self.mask)
        return dataclasses.replace(self, offset=offset, mask=mask)

    def astype(self, dtype: Any) -> Data:
        """The same numbers in another dtype, as far as it can hold them."""
        fields = dataclasses.fields(self)
        return Data(**{field.name: getattr(self, field.name).astype(dtype) for field in fields})


def _off_the_lattice(offset: numpy.ndarray) -> numpy.ndarray:
    """Round to odd multiples of a power of two.

    No sample then lies on a kink, where libraries choose different derivatives, and the coordinates of a
    library that adds position and offset in float32 are exact: a residual shows arithmetic, not conventions.
    """
    kind = offset.dtype.type
    rounded: numpy.ndarray = (numpy.floor(offset / kind(OFFSET_STEP)) + kind(0.5)) * kind(OFFSET_STEP)
    return rounded


@dataclasses.dataclass(frozen=True)
class Check:
    """What a part of one result has to be."""

    name: str
    part: tuple[Any, ...]
    values: numpy.ndarray


class Expected:
    """What the reference says in float64 about a sample of the results of one problem.

    ``y`` and the gradients of offset and mask are local to an output position: some positions are checked,
    the ends of every axis among them. The gradients of x and weight sum over positions but not over input
    channels: some channels are checked, whole. The gradient of bias is checked whole.
    """

    def __init__(self, problem: Problem, data: Data) -> None:
        self.problem = problem
        self.data = data.astype(numpy.float64)
        self.dtype = data.x.dtype
        self._checks: dict[str, list[Check]] = {}

    def residuals(self, results: Mapping[str, numpy.ndarray], passes: str) -> dict[str, float]:
        """The largest error of each result over the largest expected value.

        Raises
        ------
        WrongResultError
            A result has another shape or dtype, or an error above the tolerance of its dtype.
        """
        residuals: dict[str, float] = {}
        for check in self.checks(passes):
            if check.name in results:
                residual = self._residual(check, results[check.name])
                # A NaN must win, and max() would drop it.
                residuals[check.name] = float(numpy.maximum(residual, residuals.get(check.name, 0.0)))
        if "y" not in residuals:
            raise WrongResultError("no result y")
        tolerance = TOLERANCE_EPS * numpy.finfo(self.dtype).eps
        for name, residual in residuals.items():
            if not residual <= tolerance:
                raise WrongResultError(f"{name}: residual {residual:.1e} above {tolerance:.1e}")
        return residuals

    def checks(self, passes: str) -> list[Check]:
        """The checks of ``passes``, computed once."""
        if passes not in self._checks:
            backward = passes == "both"
            self._checks[passes] = [*self._at_positions(backward), *(self._of_channels() if backward else ())]
        return self._checks[passes]

    def _residual(self, check: Check, result: numpy.ndarray) -> float:
        shape = self.problem.shapes[check.name]
        if result.shape != shape or result.dtype != self.dtype:
            wanted = f"{self.dtype} {shape}"
            raise WrongResultError(f"{check.name}: got {result.dtype} {result.shape}, wanted {wanted}")
        error = numpy.abs(result[check.part].astype(numpy.float64) - check.values).max(initial=0.0)
        return float(error / max(numpy.abs(check.values).max(initial=0.0), numpy.finfo(numpy.float64).tiny))

    def _at_positions(self, backward: bool) -> Iterator[Check]:
        positions, stride, moved = self._sample()
        part: tuple[Any, ...] = (slice(None), slice(None), *numpy.ix_(*positions))
        data = self.data
        offset = data.offset[part] + moved
        parameters: dict[str, Any] = self.problem.parameters | {"stride": stride}
        arguments = (data.x, offset, data.mask[part], data.weight)
        y = reference.modulated_deform_conv(*arguments, data.bias, **parameters)
        yield Check("y", part, y)
        if backward:
            gradients = reference.modulated_deform_conv_backward(
                data.grad_output[part], *arguments, **parameters, needs=("offset", "mask")
            )
            yield Check("offset", part, gradients.offset)
            yield Check("mask", part, gradients.mask)

    def _sample(self) -> tuple[list[numpy.ndarray], tuple[int, ...], numpy.ndarray]:
        """Positions to ask for, the stride that gives as many outputs, and how far to move each output.

        The reference knows whole grids only: a larger stride makes a small grid, and the way from its
        positions to those that are wanted is added to the offset, exactly in float64.
        """
        problem, generator = self.problem, numpy.random.default_rng(0)
        positions, strides, ways = [], [], []
        for span, extent in zip(problem.spans, problem.output, strict=True):
            stride = max(problem.stride, span // (SAMPLED_POSITIONS - 1))
            count = span // stride + 1
            inner = generator.choice(numpy.arange(1, max(extent - 1, 1)), max(count - 2, 0), replace=False)
            chosen = numpy.sort([0, *inner, *([extent - 1] if count > 1 else [])])
            positions.append(chosen)
            strides.append(stride)
            ways.append(chosen * problem.stride - numpy.arange(count) * stride)
        moved = numpy.stack(numpy.meshgrid(*ways, indexing="ij"))  # (ndim, *sampled)
        return positions, tuple(strides), numpy.concatenate([moved] * (problem.offset_groups * problem.taps))

    def _of_channels(self) -> Iterator[Check]:
        channels = self.problem.in_channels
        for channel in sorted({channels // 3, channels - 1}):
            yield from self._of_channel(channel)
        axes = (0, *range(2, 2 + self.problem.ndim))
        yield Check("bias", (), self.data.grad_output.sum(axis=axes))

    def _of_channel(self, channel: int) -> Iterator[Check]:
        problem, data = self.problem, self.data
        inputs, outputs = problem.in_channels // problem.groups, problem.out_channels // problem.groups
        group, own = divmod(channel, inputs)
        offset_group = channel // (problem.in_channels // problem.offset_groups)
        out = slice(group * outputs, (group + 1) * outputs)
        whole: dict[str, Any] = problem.parameters | {"groups": 1, "offset_groups": 1}
        gradients = reference.modulated_deform_conv_backward(
            data.grad_output[:, out],
            data.x[:, channel : channel + 1],
            data.offset[:, _block(offset_group, problem.taps * problem.ndim)],
            data.mask[:, _block(offset_group, problem.taps)],
            data.weight[out, own : own + 1],
            **whole,
            needs=("x", "weight"),
        )
        yield Check("x", (slice(None), slice(channel, channel + 1)), gradients.x)
        yield Check("weight", (out, slice(own, own + 1)), gradients.weight)


def _block(index: int, size: int) -> slice:
    return slice(index * size, (index + 1) * size)
