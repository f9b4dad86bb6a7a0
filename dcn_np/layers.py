"""Layers without a framework: filters, and the branch that makes offsets and masks, forward and backward.

`dcn_np.deform_conv` and its kin are functions of arrays that the caller keeps. A layer keeps them: `forward`
remembers what `backward` needs, `backward` returns the gradient of the input and puts those of the parameters
in `gradients`. What updates the parameters is the caller's. For many images of one shape, `prepare` has the
weights packed and the memory taken once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy

from ._layer import (
    Layer,
    Zeros,
    checked_dtype,
    generator_of,
    logistic,
    namespace,
    present,
)
from ._prepared import Call, DeformableCall, Preparation, RigidCall, prepared_conv
from ._roi_layers import DeformRoIPool, ModulatedDeformRoIPool
from ._state_files import load_npz, load_safetensors, save_npz, save_safetensors
from .arrays import Array
from .checkpoints import MASK_FACTORS, checked_activation
from .deform_conv import (
    Extents,
    Padding,
    deform_conv,
    deform_conv_backward,
    modulated_deform_conv,
    modulated_deform_conv_backward,
)
from .geometry import Geometry, checked_flag, checked_integers, checked_number, checked_whole
from .messages import count, number, shown

if TYPE_CHECKING:
    from typing import Self

    from numpy.typing import DTypeLike

    from ._layer import Seed
    from .checkpoints import DeformConvWeights

# Of a prepared layer: each call takes memory, and unbounded a wrong number would take all there is.
LARGEST_CONCURRENCY = 1024

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "DeformConv1d",
    "DeformConv2d",
    "DeformConv3d",
    "DeformRoIPool",
    "ModulatedDeformConv1d",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv3d",
    "ModulatedDeformRoIPool",
    "load_npz",
    "load_safetensors",
    "save_npz",
    "save_safetensors",
]

# ---- convolutions


class _Conv(Layer):
    """An ordinary convolution of `ndim` spatial axes; the deformable ones add the branch."""

    ndim: ClassVar[int]
    _keys: Mapping[str, str] = {"weight": "weight", "bias": "bias"}

    weight: Array
    bias: Array | None
    _prepared: Preparation | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Extents,
        stride: Extents = 1,
        padding: Padding = 0,
        dilation: Extents = 1,
        *,
        groups: int = 1,
        bias: bool = True,
        rng: Seed = None,
        dtype: DTypeLike = numpy.float32,
    ) -> None:
        self._set_window(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, 1, dtype)
        self._draw(bias, rng)

    def _set_window(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Extents,
        stride: Extents,
        padding: Padding,
        dilation: Extents,
        groups: int,
        offset_groups: int,
        dtype: DTypeLike,
    ) -> None:
        """Check all numbers now, where they are written, and not at the first image."""
        self.in_channels = checked_whole("in_channels", in_channels)
        self.out_channels = checked_whole("out_channels", out_channels)
        self.kernel_size = _kernel(kernel_size, self.ndim)
        self.groups = checked_whole("groups", groups)
        self.offset_groups = checked_whole("offset_groups", offset_groups)
        self.dtype = checked_dtype(dtype)
        # One pixel and one tap: what depends on the size of an image is checked when there is one.
        ones = (1,) * self.ndim
        each = self.in_channels // self.groups
        weight = SimpleNamespace(shape=(self.out_channels, each, *ones), dtype=self.dtype)
        numbers = stride, padding, dilation, self.groups, self.offset_groups
        window = self._geometry((0, self.in_channels, *ones), weight, None, numbers)
        self.stride, self.padding, self.dilation = window.stride, window.padding, window.dilation

    def _geometry(self, shape: tuple[int, ...], weight: Any, bias: Any, numbers: tuple[Any, ...]) -> Geometry:
        """Return the sizes of a convolution of images of a shape."""
        x = SimpleNamespace(shape=shape, dtype=self.dtype)
        return Geometry.of((self.dtype,), x, None, None, weight, bias, *numbers)

    def _draw(self, bias: bool, rng: Seed) -> None:
        """Draw filters and bias as torch does: uniformly, within one over the root of the inputs of a sum."""
        bias, generator = checked_flag("bias", bias), generator_of(rng)
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        self.weight = generator.uniform(-bound, bound, shape).astype(self.dtype)
        self.bias = generator.uniform(-bound, bound, shape[0]).astype(self.dtype) if bias else None
        self.gradients = {}
        self._kept = None

    def __repr__(self) -> str:
        shown_if_not = {"groups": 1, "offset_groups": 1}
        numbers = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
        numbers += [name for name, default in shown_if_not.items() if getattr(self, name) != default]
        values = ", ".join(f"{name}={getattr(self, name)}" for name in numbers)
        return f"{type(self).__name__}({values}{'' if self.bias is not None else ', bias=False'})"

    def __setattr__(self, name: str, value: Any) -> None:
        # What is prepared was made of the parameters and numbers that the layer had.
        if self._prepared is not None and name not in ("_prepared", "_kept", "gradients"):
            self.unprepare()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_prepared"}

    def prepare(self, input_shape: Sequence[int], *, concurrency: int = 1) -> None:
        """Pack the weights and take all memory beforehand for images of one shape: for video and cameras.

        Calls of `forward` then take this shape only, and give the bits that they gave before. With `out` they
        allocate nothing and take no lock. They remember nothing for `backward`.

        Parameters
        ----------
        input_shape : tuple of int
            (batch, in_channels, *input), as of the images to come. These may lie in any memory order; one
            that is not aligned, and an `out` whose spatial axes do not lie as one, cost a copy.
        concurrency : int
            How many threads may be in `forward` at the same time, at most 1024; one more raises RuntimeError
            there. Each has working space of its own, and the packed weights are shared.

        Raises
        ------
        TypeError
            An argument of the wrong kind, or the parameters are CuPy's: on a GPU there is nothing to prepare.
        ValueError
            The shape does not fit the layer.
        MemoryError
            No memory; the layer is then not prepared.

        See Also
        --------
        unprepare : The way back.
        forward : What is prepared.

        Notes
        -----
        While a layer is prepared its parameters are read-only, so that no change in place goes unnoticed:
        call `unprepare` before it, and `prepare` after it. Setting a parameter or a number of the layer, and
        `load_state_dict`, end the preparation. Views of a parameter that were made before can still write to
        it, which a prepared layer does not see.

        Calls run on the instruction set of the preparation, and on at most as many threads as were allowed
        then. In a forked process they go on, as other calls do, on one thread. Copies of a layer are not
        prepared. What a call allocates once more is threads: OpenMP starts them for the first call of each
        thread of the program that takes several.

        Examples
        --------
        >>> import numpy
        >>> from dcn_np.layers import ModulatedDeformConv2d
        >>> layer = ModulatedDeformConv2d(3, 8, 3, padding=1)
        >>> layer.prepare((1, 3, 20, 24))
        >>> y = numpy.empty((1, 8, 20, 24), numpy.float32)
        >>> for frame in numpy.ones((5, 1, 3, 20, 24), numpy.float32):
        ...     y = layer.forward(frame, out=y)
        """
        geometries = self._geometries(self._input_shape(input_shape))
        concurrency = checked_whole("concurrency", concurrency)
        if concurrency > LARGEST_CONCURRENCY:
            raise ValueError(f"concurrency is {number(concurrency)}; wanted at most {LARGEST_CONCURRENCY}")
        self.unprepare()
        self._kept = None
        call = self._prepared_call(geometries)
        self._prepared = Preparation(geometries[0], call, concurrency, self.parameters())

    def unprepare(self) -> None:
        """Give up what `prepare` made: parameters may be written to again, and images have any shape.

        See Also
        --------
        prepare : The way there.
        """
        if self._prepared is not None:
            self._prepared.release()
            self._prepared = None

    @property
    def prepared_shape(self) -> tuple[int, ...] | None:
        """What shape of images the layer is prepared for; None if it is not."""
        return None if self._prepared is None else self._prepared.shape

    def forward(self, x: Array, out: Array | None = None) -> Array:
        """Return the layer's output for images, and remember what `backward` needs.

        Parameters
        ----------
        x : array, shape (batch, in_channels, *input)
            The images, of the dtype, library and device of the parameters. They are kept, not copied. A
            prepared layer takes images of one shape only, and keeps none.
        out : array, shape (batch, out_channels, *output), or None
            Where to write the output: dtype of `x`, in memory that neither images nor parameters overlap.

        Returns
        -------
        array, shape (batch, out_channels, *output)
            `out` if given; else a new array.

        Raises
        ------
        TypeError
            `x` or `out` is no array, or of another dtype.
        ValueError
            The shape of `x` or `out` does not fit, that of `x` is not the one that the layer is prepared for,
            or `out` cannot be written to.
        RuntimeError
            As many calls run already as the layer is prepared for.

        See Also
        --------
        backward : The gradients.
        prepare : For many images of one shape.
        """
        if self._prepared is not None:
            return self._prepared.forward(x, out)
        self._check_x(x)
        y = deform_conv(x, None, self.weight, self.bias, *self._window(), out=out)
        self._kept = x, None, None
        return y

    def backward(self, grad_output: Array) -> Array:
        """Compute the gradients of the last `forward`, those of the parameters into `gradients`.

        Call it before the parameters change: it reads them again.

        Parameters
        ----------
        grad_output : array, shape (batch, out_channels, *output)
            The gradient of a scalar with respect to what `forward` returned.

        Returns
        -------
        array, shape (batch, in_channels, *input)
            The gradient with respect to `x`.

        Raises
        ------
        RuntimeError
            There was no `forward`.
        TypeError
            `grad_output` is no array, or of another dtype.
        ValueError
            The shape of `grad_output` is not that of the output.

        See Also
        --------
        forward : The output.
        """
        x, *_ = self._remembered()
        needs = self._needs("x", "weight")
        found = deform_conv_backward(grad_output, x, None, self.weight, *self._window(), needs=needs)
        self.gradients = present(weight=found.weight, bias=found.bias)
        return found.x

    def branch(self, x: Array) -> tuple[Array | None, Array | None]:
        """Return what the layer makes of images to sample them by.

        Parameters
        ----------
        x : array, shape (batch, in_channels, *input)
            The images, as for `forward`.

        Returns
        -------
        tuple of two arrays or None
            Offsets and masks, as `dcn_np.modulated_deform_conv` takes them; None where the layer has none.

        See Also
        --------
        forward : Samples by them.
        """
        self._check_x(x)
        return None, None

    def _remembered(self, wanting: str = "backward") -> tuple[Any, ...]:
        if self._prepared is not None:
            problem = f"the layer is prepared and keeps nothing for {wanting}"
            raise RuntimeError(f"{problem}; wanted unprepare() first")
        return super()._remembered(wanting)

    def _window(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups, self.offset_groups

    def _geometries(self, shape: tuple[int, ...]) -> tuple[Geometry, ...]:
        """Return the sizes of the convolution that makes the output, and of the branch if there is one."""
        return (self._geometry(shape, self.weight, self.bias, self._window()),)

    def _prepared_call(self, geometries: tuple[Geometry, ...]) -> Call:
        return RigidCall(prepared_conv(geometries[0], self.weight, self.bias))

    def _input_shape(self, value: Sequence[int]) -> tuple[int, ...]:
        shape = checked_integers("input_shape", value, 1)
        if isinstance(shape, int):
            raise TypeError(f"input_shape is {shown(value)}; {self._wanted()}")
        self._check_shape("input_shape is", shape)
        return tuple(checked_number(f"input_shape[{axis}]", extent, 0) for axis, extent in enumerate(shape))

    def _needs(self, *names: str) -> tuple[str, ...]:
        return names if self.bias is None else (*names, "bias")

    def _check_x(self, x: Any) -> None:
        shape = getattr(x, "shape", None)
        if isinstance(shape, tuple):
            self._check_shape("x has the shape", shape)

    def _check_shape(self, what: str, shape: tuple[int, ...]) -> None:
        if len(shape) != self.ndim + 2 or shape[1] != self.in_channels:
            raise ValueError(f"{what} {tuple(shape)}; {self._wanted()}")

    def _wanted(self) -> str:
        return f"wanted (batch, {self.in_channels}, *input) with {count(self.ndim, 'spatial axis')}"


def _kernel(value: Any, ndim: int) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return (checked_whole("kernel_size", value),) * ndim
    if len(value) != ndim:
        raise ValueError(
            f"kernel_size has {count(len(value), 'entry')}; wanted an integer or {count(ndim, 'entry')}"
        )
    return tuple(checked_whole(f"kernel_size[{axis}]", entry) for axis, entry in enumerate(value))


class _Deformable(_Conv):
    """A deformable convolution with the branch that makes its offsets, and masks if `modulated`."""

    modulated: ClassVar[bool]
    _keys: Mapping[str, str] = {
        "weight": "weight",
        "bias": "bias",
        "conv_offset_weight": "conv_offset.weight",
        "conv_offset_bias": "conv_offset.bias",
    }

    conv_offset_weight: Array
    conv_offset_bias: Array

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Extents,
        stride: Extents = 1,
        padding: Padding = 0,
        dilation: Extents = 1,
        *,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        mask_activation: str | None = None,
        rng: Seed = None,
        dtype: DTypeLike = numpy.float32,
    ) -> None:
        sizes = in_channels, out_channels, kernel_size, stride, padding, dilation, groups, offset_groups
        self._set_window(*sizes, dtype)
        self.mask_activation = self._checked_activation(mask_activation)
        self._draw(bias, rng)
        self._offsets = self.ndim * self.offset_groups * math.prod(self.kernel_size)
        channels = self._offsets // self.ndim * (self.ndim + self.modulated)
        shape = (channels, self.in_channels, *self.kernel_size)
        self.conv_offset_weight = numpy.zeros(shape, self.dtype)
        self.conv_offset_bias = numpy.zeros(channels, self.dtype)

    @classmethod
    def from_weights(
        cls, weights: DeformConvWeights, stride: Extents = 1, padding: Padding = 0, dilation: Extents = 1
    ) -> Self:
        """Build the layer that a checkpoint of another library describes.

        Parameters
        ----------
        weights : dcn_np.checkpoints.DeformConvWeights
            Its arrays, which are copied. Channels, groups and activation follow from them.
        stride : int or sequence of int
            As the layer had it: no checkpoint tells.
        padding : int, or sequence of int or of (begin, end) pairs
            As the layer had it.
        dilation : int or sequence of int
            As the layer had it.

        Returns
        -------
        layer
            One of this class, with the dtype of the filters.

        Raises
        ------
        TypeError
            A dtype that is not computed.
        ValueError
            The weights have no branch, or are those of another class; shapes that do not fit; or a dilation
            that the branch does not share.

        See Also
        --------
        dcn_np.checkpoints.layer_from : Reads the weights.
        """
        name = cls.__name__
        filters, branch = weights.weight, weights.offset_weight
        if branch is None:
            raise ValueError(
                f"weights.offset_weight is None; {name} wants the branch that makes the offsets. Without one "
                "the offsets come from elsewhere, and dcn_np.deform_conv takes them"
            )
        for what, array in (("weight", filters), ("offset_weight", branch)):
            if array.ndim != cls.ndim + 2 or 0 in array.shape:
                wanted = f"{count(cls.ndim + 2, 'axis')}, none of them empty"
                raise ValueError(f"weights.{what} has the shape {array.shape}; {name} wants {wanted}")
        if weights.modulated is not None and weights.modulated != cls.modulated:
            other = f"{'' if cls.modulated else 'Modulated'}DeformConv{cls.ndim}d"
            raise ValueError(f"weights.modulated is {weights.modulated}; wanted {cls.modulated}, or {other}")
        layer = cls(
            branch.shape[1],
            filters.shape[0],
            filters.shape[2:],
            stride,
            padding,
            dilation,
            groups=max(branch.shape[1] // filters.shape[1], 1),
            offset_groups=1 if weights.offset_groups is None else weights.offset_groups,
            bias=weights.bias is not None,
            mask_activation=weights.mask_activation,
            rng=Zeros(),
            dtype=filters.dtype,
        )
        if weights.offset_dilated is False and set(layer.dilation) != {1}:
            raise ValueError(
                f"dilation is {layer.dilation}; the branch of these weights is not dilated "
                "(weights.offset_dilated is False), and that of a layer is as the layer: wanted 1"
            )
        bias = layer.conv_offset_bias if weights.offset_bias is None else weights.offset_bias
        arrays = {"weight": filters, "bias": weights.bias}
        arrays |= {"conv_offset.weight": branch, "conv_offset.bias": bias}
        layer.load_state_dict(present(**arrays))
        return layer

    def branch(self, x: Array) -> tuple[Array | None, Array | None]:
        self._check_x(x)
        made = deform_conv(x, None, self.conv_offset_weight, self.conv_offset_bias, *self._branch_window())
        mask = logistic(made[:, self._offsets :], self._factor()) if self.modulated else None
        return made[:, : self._offsets], mask

    def forward(self, x: Array, out: Array | None = None) -> Array:
        if self._prepared is not None:
            return self._prepared.forward(x, out)
        offset, mask = self.branch(x)
        y = modulated_deform_conv(x, offset, mask, self.weight, self.bias, *self._window(), out=out)
        self._kept = x, offset, mask
        return y

    def backward(self, grad_output: Array) -> Array:
        x, offset, mask = self._remembered()
        found = modulated_deform_conv_backward(
            grad_output,
            x,
            offset,
            mask,
            self.weight,
            *self._window(),
            needs=self._needs("x", "offset", "mask", "weight"),
        )
        grad_made = found.offset
        if mask is not None:
            # With s the logistic function, mask = factor * s, and s' = s * (1 - s).
            grad_logits = found.mask * mask * (1 - mask / self._factor())
            grad_made = namespace(mask).concatenate([found.offset, grad_logits], axis=1)
        branch = deform_conv_backward(grad_made, x, None, self.conv_offset_weight, *self._branch_window())
        self.gradients = present(
            weight=found.weight,
            bias=found.bias,
            conv_offset_weight=branch.weight,
            conv_offset_bias=branch.bias,
        )
        return found.x + branch.x

    forward.__doc__, backward.__doc__ = _Conv.forward.__doc__, _Conv.backward.__doc__
    branch.__doc__ = _Conv.branch.__doc__

    def _geometries(self, shape: tuple[int, ...]) -> tuple[Geometry, ...]:
        branch = self.conv_offset_weight, self.conv_offset_bias, self._branch_window()
        return (*super()._geometries(shape), self._geometry(shape, *branch))

    def _prepared_call(self, geometries: tuple[Geometry, ...]) -> Call:
        geometry, branch_geometry = geometries
        parameters = self.conv_offset_weight, self.conv_offset_bias
        branch = prepared_conv(branch_geometry, *parameters, self._offsets, self._factor())
        conv = prepared_conv(geometry, self.weight, self.bias)
        made = numpy.empty(branch_geometry.output_shape, self.dtype)
        return DeformableCall(branch, conv, made, self._offsets)

    def _branch_window(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, 1, 1

    def _checked_activation(self, value: str | None) -> str | None:
        if not self.modulated and value is not None:
            raise ValueError(
                f"mask_activation is {shown(value)}; {type(self).__name__} makes no masks: wanted None"
            )
        return value if not self.modulated else checked_activation("sigmoid" if value is None else value)

    def _factor(self) -> int:
        return MASK_FACTORS[self.mask_activation or "sigmoid"]


# ---- the layers

_SIZES = """
    Parameters
    ----------
    in_channels : int
        The channels of the input.
    out_channels : int
        The channels of the output.
    kernel_size : int or sequence of int
        The taps per spatial axis.
    stride : int or sequence of int
        Pixels of the input from one output position to the next, per spatial axis.
    padding : int, or sequence of int or of (begin, end) pairs
        Zeros thought around the input, in pixels, per spatial axis.
    dilation : int or sequence of int
        Pixels of the input from one tap to the next, per spatial axis.
    groups : int
        Divides the channels of input and output into independent convolutions."""
_OFFSET_GROUPS = """
    offset_groups : int
        Divides the channels of the input into blocks, each with {made} of its own."""
_BIAS = """
    bias : bool
        Whether there is a bias."""
_ACTIVATION = """
    mask_activation : {"sigmoid", "2*sigmoid"} or None
        What makes masks of the branch's output. "sigmoid", which None is, begins at 0.5; "2*sigmoid" at 1, so
        that the layer begins as an ordinary convolution."""
_NO_ACTIVATION = """
    mask_activation : None
        There are no masks here."""
_DRAWN = """
    rng : numpy.random.Generator, int or None
        What filters and bias are drawn from, or its seed: uniformly within 1 / sqrt(in_channels / groups *
        taps). None is another seed each time.
    dtype : dtype
        That of all parameters, and of the images.

    Attributes
    ----------
    weight : array, shape (out_channels, in_channels / groups, *kernel_size)
        The filters.
    bias : array, shape (out_channels,), or None
        Added to every output position."""
_BRANCH_ATTRIBUTES = """
    conv_offset_weight : array, shape (branch_channels, in_channels, *kernel_size)
        The filters of the branch; zeros at first. branch_channels is {per_tap} * offset_groups * taps.
    conv_offset_bias : array, shape (branch_channels,)
        The bias of the branch; zeros at first."""
_ERRORS = """
    gradients : dict of str to array
        What the last `backward` found, by the names of `parameters()`; empty before.

    Raises
    ------
    TypeError
        An argument of the wrong kind, or a dtype that is not computed.
    ValueError
        Numbers that do not fit.
"""
_BRANCH = """

    The branch is an ordinary convolution of the same input, with the kernel size, stride, padding and
    dilation of the layer. Of its output channels, the first {ndim} * offset_groups * taps are the offsets, in
    the order of `dcn_np.deform_conv`"""
_MASKS = """; `mask_activation` makes masks of the others"""


def _document(layer: type[_Conv]) -> None:
    """Write the docstring of a class from what its attributes say."""
    axes = count(layer.ndim, "spatial axis")
    if not issubclass(layer, _Deformable):
        layer.__doc__ = f"An ordinary convolution over {axes}.\n{_SIZES}{_BIAS}{_DRAWN}{_ERRORS}"
        return
    kind, made, also, activation = "", "offsets", "", _NO_ACTIVATION
    if layer.modulated:
        kind, made, also, activation = "modulated ", "offsets and masks", _MASKS, _ACTIVATION
    layer.__doc__ = (
        f"A {kind}deformable convolution over {axes}, with the branch that makes its {made}."
        f"{_BRANCH.format(ndim=layer.ndim)}{also}.\n{_SIZES}{_OFFSET_GROUPS.format(made=made)}{_BIAS}"
        f"{activation}{_DRAWN}{_BRANCH_ATTRIBUTES.format(per_tap=layer.ndim + layer.modulated)}{_ERRORS}"
    )


class Conv1d(_Conv):
    ndim = 1


class Conv2d(_Conv):
    ndim = 2


class Conv3d(_Conv):
    ndim = 3


class DeformConv1d(_Deformable):
    ndim, modulated = 1, False


class DeformConv2d(_Deformable):
    ndim, modulated = 2, False


class DeformConv3d(_Deformable):
    ndim, modulated = 3, False


class ModulatedDeformConv1d(_Deformable):
    ndim, modulated = 1, True


class ModulatedDeformConv2d(_Deformable):
    ndim, modulated = 2, True


class ModulatedDeformConv3d(_Deformable):
    ndim, modulated = 3, True


_LAYERS: tuple[type[_Conv], ...] = (
    *(Conv1d, Conv2d, Conv3d),
    *(DeformConv1d, DeformConv2d, DeformConv3d),
    *(ModulatedDeformConv1d, ModulatedDeformConv2d, ModulatedDeformConv3d),
)
for _layer in _LAYERS:
    _document(_layer)
