"""What a layer keeps between calls on images of one shape, so that a call allocates nothing."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

import numpy

from .arrays import Array, kind_of
from .backends import PreparedConv, backend_of
from .geometry import Geometry, check_out
from .messages import count


class Call(Protocol):
    """What one call at a time computes with."""

    def run(self, x: Array, out: Array | None) -> Array:
        """Return the layer's output, in `out` if it is not None."""

    def beside(self) -> Call:
        """Return another for a call at the same time; what calls only read is shared."""


class Preparation:
    """The calls of a layer that are idle, and the parameters that they were made of.

    Those are read-only as long: what is packed would not follow a change.
    """

    def __init__(
        self, geometry: Geometry, call: Call, concurrency: int, parameters: Mapping[str, Array]
    ) -> None:
        self._geometry, self._concurrency, self._weight = geometry, concurrency, parameters["weight"]
        self.shape = (geometry.batch, geometry.in_channels, *geometry.input)
        self._call = call
        # Taking from a deque and giving back is atomic, needs no lock and no memory.
        self._idle = deque([call])
        self._fill()
        self._process = os.getpid()
        self._frozen = [array for array in parameters.values() if array.flags.writeable]
        for array in self._frozen:
            array.setflags(write=False)

    def release(self) -> None:
        """Let the parameters be written to again."""
        for array in self._frozen:
            array.setflags(write=True)

    def forward(self, x: Any, out: Any) -> Array:
        """Return the layer's output for x, in `out` if it is not None."""
        kind = kind_of(x=x, out=out, weight=self._weight)
        image, place = kind.take("x", x), kind.take_optional("out", out)
        self._check(image, place)
        call = self._taken()
        try:
            y = call.run(image, place)
        finally:
            self._idle.append(call)
        return y if out is None else out

    def _check(self, x: Array, out: Array | None) -> None:
        if x.shape != self.shape:
            raise ValueError(
                f"x has the shape {x.shape}; the layer is prepared for {self.shape}: prepare({x.shape}) "
                "prepares it anew, and after unprepare() it takes any"
            )
        if x.dtype != self._geometry.dtype:
            raise TypeError(f"x has dtype {x.dtype}; the layer is prepared for {self._geometry.dtype}")
        if out is not None:
            # Of the parameters there are copies: out cannot change what is read, wherever it lies.
            check_out(self._geometry, numpy.may_share_memory, out, x, None, None, None, None)

    def _taken(self) -> Call:
        try:
            return self._idle.pop()
        except IndexError:
            if os.getpid() == self._process:
                raise RuntimeError(
                    f"the layer is prepared for {count(self._concurrency, 'call')} at a time, and as many "
                    "run; for n wanted prepare(..., concurrency=n)"
                ) from None
        # The threads that had them did not come along into this fork.
        self._process = os.getpid()
        self._fill()
        return self._idle.pop()

    def _fill(self) -> None:
        while len(self._idle) < self._concurrency:
            self._idle.append(self._call.beside())


class RigidCall:
    """An ordinary convolution."""

    def __init__(self, conv: PreparedConv) -> None:
        self._conv = conv

    def run(self, x: Array, out: Array | None) -> Array:
        return self._conv.run(x, None, None, out)

    def beside(self) -> RigidCall:
        return RigidCall(self._conv.beside())


class DeformableCall:
    """A deformable convolution, and what its branch fills: so many channels of offsets, then masks."""

    def __init__(self, branch: PreparedConv, conv: PreparedConv, made: Array, offsets: int) -> None:
        self._branch, self._conv, self._made, self._offsets = branch, conv, made, offsets
        self._offset = made[:, :offsets]
        self._mask = made[:, offsets:] if offsets < made.shape[1] else None

    def run(self, x: Array, out: Array | None) -> Array:
        self._branch.run(x, None, None, self._made)
        return self._conv.run(x, self._offset, self._mask, out)

    def beside(self) -> DeformableCall:
        made = numpy.empty_like(self._made)
        return DeformableCall(self._branch.beside(), self._conv.beside(), made, self._offsets)


def prepared_conv(
    geometry: Geometry, weight: Array, bias: Array | None, logistic_from: int | None = None, factor: int = 1
) -> PreparedConv:
    """Prepare a convolution on the device of its parameters."""
    first = geometry.out_channels if logistic_from is None else logistic_from
    conv = backend_of(weight).prepare_deform_conv(geometry, weight, bias, first, factor)
    if conv is None:
        raise TypeError(
            "the parameters are CuPy's; prepare wants NumPy's: on a GPU kernels pack no weights, and CuPy's "
            "pool keeps the memory of calls by itself"
        )
    return conv
