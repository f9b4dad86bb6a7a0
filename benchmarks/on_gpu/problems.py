"""The shapes, offsets and modes that are timed on a GPU, and what becomes of each.

All layers have 3 × 3 taps, padding 1, stride 1 and as many outputs as channels.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

TAPS = 9
PADDING = 1
OFFSETS = ("local", "scattered")  # normal with a sigma of 1.5 pixels; to anywhere in the image
PASSES = ("forward", "both")  # both: and all five gradients
LAYOUTS = ("channels-last", "NCHW")
# What is computed -> the dtype of the arrays. Modes of one dtype are timed in the same rounds.
MODES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32", "tf32": "float32"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer."""

    channels: int
    height: int
    width: int
    batch: int

    @property
    def name(self) -> str:
        return f"C{self.channels}-{self.height}x{self.width}-N{self.batch}"

    @property
    def multiplications(self) -> int:
        """Multiply-adds of the matrix product, forward; forward and backward is three times as many."""
        return self.batch * self.height * self.width * TAPS * self.channels**2

    def with_batch(self, batch: int) -> Shape:
        """Return the same layer on another number of images."""
        return dataclasses.replace(self, batch=batch)


def _by_name(*shapes: Shape) -> dict[str, Shape]:
    return {shape.name: shape for shape in shapes}


SHAPES = _by_name(
    Shape(256, 56, 56, 16),
    Shape(256, 56, 56, 32),
    Shape(128, 100, 167, 8),
    Shape(256, 50, 84, 8),
    Shape(512, 25, 42, 8),
    Shape(128, 100, 167, 2),
    Shape(512, 25, 42, 2),
)
QUICK = ("C256-56x56-N16", "C128-100x167-N2", "C512-25x42-N2")
ACCURACY = (Shape(256, 56, 56, 1), Shape(256, 200, 334, 1))

# On a CPU: small, but with borders, more than one image and the same channels for the gates.
REHEARSAL = _by_name(Shape(32, 9, 11, 3), Shape(128, 10, 7, 2), Shape(512, 4, 5, 2))
REHEARSAL_QUICK = tuple(REHEARSAL)[:1]
REHEARSAL_ACCURACY = (Shape(32, 9, 11, 1), Shape(32, 40, 67, 1))


@dataclasses.dataclass
class Result:
    """One implementation on one shape: times, errors and memory, or why there are none."""

    shape: Shape
    offsets: str
    passes: str
    mode: str
    implementation: str
    layout: str
    calls: int = 1  # in each round
    seconds: list[float] = dataclasses.field(default_factory=list)  # on the device, per call; one each round
    host_seconds: list[float] = dataclasses.field(default_factory=list)  # to queue a call
    errors: dict[str, float] = dataclasses.field(default_factory=dict)  # relative, L2, by result
    extra_bytes: int | None = None  # at the peak of a call, beyond inputs and results
    x_bytes: int = 0
    weight_bytes: int = 0
    refused: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def error(self) -> float:
        return max(self.errors.values(), default=math.nan)

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.mode} {self.layout}"

    def record(self) -> dict[str, Any]:
        """The result as JSON."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return record | {"shape": self.shape.name, "median": self.median}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The relative error of one float16 result against float64, of the same inputs."""

    image: str
    offsets: str
    implementation: str
    layout: str
    error: float

    def record(self) -> dict[str, Any]:
        """The row as JSON."""
        return dataclasses.asdict(self)


def line(result: Result) -> str:
    """One row of the table of times."""
    start = f"  {result.implementation:13}{result.mode:10}{result.layout:14}"
    if result.refused:
        return f"{start}REFUSED: {result.refused}"
    passes = {"forward": 1, "both": 3}[result.passes]
    rate = 2e-12 * result.shape.multiplications * passes / result.median
    spread = max(result.seconds) / min(result.seconds)
    host = statistics.median(result.host_seconds)
    memory = "-" if result.extra_bytes is None else f"{result.extra_bytes / 2**20:.1f}"
    times = f"{result.median * 1e3:10.4f}{host * 1e3:10.4f}{spread:8.2f}{rate:9.1f}"
    return f"{start}{times}{memory:>11}{result.error:10.1e}"


HEADER = (
    f"  {'':13}{'mode':10}{'layout':14}{'median ms':>10}{'host ms':>10}{'spread':>8}{'TFLOP/s':>9}"
    f"{'extra MiB':>11}{'error':>10}"
)
