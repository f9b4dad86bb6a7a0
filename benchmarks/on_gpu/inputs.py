"""The arrays of one layer, as tensors on the device that is timed."""

from __future__ import annotations

import dataclasses
import importlib
import math
import zlib
from typing import Any

from .problems import PADDING, TAPS, Shape

torch: Any = importlib.import_module("torch")
Tensor = Any

SIGMA = 1.5  # pixels
MOST_LOCAL = 7.9
# Local offsets are odd multiples of half of this: no sample lies on a kink, where a rounded coordinate has
# another derivative; each dtype holds them exactly below 8 pixels, and float32 their sums with a position.
STEPS = {"float16": 2.0**-7, "bfloat16": 2.0**-4, "float32": 2.0**-12}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One set; images are (batch, channels, height, width) in any memory order."""

    x: Tensor
    offset: Tensor
    mask: Tensor
    weight: Tensor
    bias: Tensor
    grad_output: Tensor

    @classmethod
    def of(cls, shape: Shape, offsets: str, dtype: str, index: int, device: Any) -> Inputs:
        """Draw set number ``index``: the same numbers in every run on one kind of device."""
        generator = torch.Generator(device=device)
        generator.manual_seed(zlib.crc32(f"{shape.name} {offsets} {index}".encode()))
        image = (shape.batch, shape.channels, shape.height, shape.width)
        kind = getattr(torch, dtype)

        def normal(*extents: int) -> Tensor:
            return torch.randn(extents, generator=generator, device=device)

        mask = torch.rand((shape.batch, TAPS, shape.height, shape.width), generator=generator, device=device)
        weight = normal(shape.channels, shape.channels, 3, 3) / math.sqrt(TAPS * shape.channels)
        step = STEPS[dtype]
        offset = (torch.floor(_offset(shape, offsets, generator, device) / step) + 0.5) * step
        return cls(
            x=normal(*image).to(kind),
            offset=offset.to(kind),
            mask=mask.to(kind),
            weight=weight.to(kind),
            bias=normal(shape.channels).to(kind),
            grad_output=normal(*image).to(kind),
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def channels_last(self) -> Inputs:
        """Return the same with channels side by side in both images; offsets and masks stay as they are."""
        last = torch.channels_last
        x, grad_output = (image.contiguous(memory_format=last) for image in (self.x, self.grad_output))
        return dataclasses.replace(self, x=x, grad_output=grad_output)

    def first_image(self) -> Inputs:
        """Return the layer on the first image alone."""
        names = ("x", "offset", "mask", "grad_output")
        return dataclasses.replace(self, **{name: getattr(self, name)[:1] for name in names})

    def double(self) -> Inputs:
        """Return the very same numbers in float64."""
        return Inputs(**{name: tensor.double() for name, tensor in self._tensors().items()})


def _offset(shape: Shape, offsets: str, generator: Any, device: Any) -> Tensor:
    """Draw in float32, as (batch, taps * 2, height, width): y before x."""
    height, width = shape.height, shape.width
    extents = (shape.batch, TAPS, 2, height, width)
    if offsets == "local":
        drawn = torch.randn(extents, generator=generator, device=device) * SIGMA
        return drawn.clamp(-MOST_LOCAL, MOST_LOCAL).flatten(1, 2)
    last = torch.tensor([height - 1.0, width - 1.0], device=device).reshape(2, 1, 1)
    target = torch.rand(extents, generator=generator, device=device) * last
    return (target - _grid(height, width, device)).flatten(1, 2)


def _grid(height: int, width: int, device: Any) -> Tensor:
    """Return where each tap is without an offset: (taps, 2, height, width)."""
    rows, columns = (torch.arange(extent, device=device) - PADDING for extent in (height, width))
    taps = torch.arange(3, device=device)
    y = (taps[:, None, None, None] + rows[:, None]).expand(3, 3, height, width)
    x = (taps[:, None, None] + columns).expand(3, 3, height, width)
    return torch.stack([y, x], dim=2).flatten(0, 1).float()
