"""Pooling over regions with the branch that moves the bins, without a framework: of `dcn_np.layers`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy

from ._layer import Layer, Zeros, checked_dtype, generator_of, logistic, namespace
from .arrays import Array, kind_of
from .backends import RoIGradients
from .checkpoints import MASK_FACTORS, checked_activation
from .geometry import check_dtype, checked_flag, checked_whole
from .roi_geometry import RoIGeometry, check_roi_grad_output
from .roi_pool import (
    Size,
    deform_psroi_pool,
    deform_psroi_pool_backward,
    modulated_deform_roi_pool,
    modulated_deform_roi_pool_backward,
)

if TYPE_CHECKING:
    from typing import Self

    from numpy.typing import DTypeLike

    from ._layer import Seed
    from .checkpoints import RoIPoolWeights


class _DeformRoIPool(Layer):
    """A pooling whose bins move by what its branches make of the regular pooling.

    The outputs of the branches, side by side, are the offsets and then, if there is a `mask_activation`, what
    it makes masks of.
    """

    mask_activation: str | None = None
    modulated: ClassVar[bool]
    # Of each branch, the names of weight and bias of its layers.
    _branches: dict[str, list[tuple[str, str]]]

    @classmethod
    def from_weights(
        cls,
        weights: RoIPoolWeights,
        output_size: Size,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> Self:
        """Build the layer that a checkpoint of another library describes.

        Parameters
        ----------
        weights : dcn_np.checkpoints.RoIPoolWeights
            Its arrays, which are copied. Channels, branches and the rule of pooling follow from them.
        output_size : int or (int, int)
            As the layer had it: the checkpoint tells only how many bins there are.
        spatial_scale, gamma : float
            As the layer had them: no checkpoint tells. `gamma` is its trans_std, if it has one.
        sampling_ratio : int
            As the layer had it, or its sample_per_part.

        Returns
        -------
        layer
            One of this class, with the dtype of the weights.

        Raises
        ------
        TypeError
            A dtype that is not computed, or numbers of the wrong kind.
        ValueError
            The weights are those of another class, or of another number of bins; numbers that do not fit.

        See Also
        --------
        dcn_np.checkpoints.roi_pool_from : Reads the weights.
        """
        if weights.modulated != cls.modulated:
            other = f"{'' if cls.modulated else 'Modulated'}DeformRoIPool"
            raise ValueError(f"weights.modulated is {weights.modulated}; wanted {cls.modulated}, or {other}")
        options: dict[str, Any] = {"hidden_channels": weights.hidden_channels}
        options |= {"position_sensitive": weights.position_sensitive, "rng": Zeros()}
        if cls.modulated:
            options |= {"shared_branch": weights.shared_branch, "mask_activation": weights.mask_activation}
        options["dtype"] = next(iter(weights.arrays.values())).dtype
        numbers = output_size, spatial_scale, sampling_ratio, gamma
        # The constructors of the classes differ in their options.
        make: Any = cls
        layer: Self = make(weights.in_channels, *numbers, **options)
        if layer._bins != weights.bins:
            raise ValueError(
                f"output_size is {layer.output_size}: {layer._bins} bins; the weights are of {weights.bins}"
            )
        layer.load_state_dict(weights.arrays)
        return layer

    def _set_sizes(
        self,
        in_channels: int,
        output_size: Size,
        spatial_scale: float,
        sampling_ratio: int,
        gamma: float,
        hidden_channels: int,
        position_sensitive: bool,
        dtype: DTypeLike,
    ) -> None:
        """Check all numbers now, where they are written, and not at the first map."""
        self.in_channels = checked_whole("in_channels", in_channels)
        self.hidden_channels = checked_whole("hidden_channels", hidden_channels)
        self.position_sensitive = checked_flag("position_sensitive", position_sensitive)
        self.dtype = checked_dtype(dtype)
        self._numbers = output_size, spatial_scale, sampling_ratio, gamma
        # Without a region or a pixel: what depends on them is checked when there are some.
        checked = self._geometry((0, self.in_channels, 1, 1), (0, 5))
        self.output_size, self.spatial_scale = checked.output, checked.spatial_scale
        self.sampling_ratio, self.gamma = checked.samples, checked.offset_scale
        self._bins = math.prod(self.output_size)

    def _draw(self, branches: Mapping[str, Sequence[int]], rng: Seed) -> None:
        """Draw the branches, each given the outputs of its layers; the last one begins at zero."""
        generator = generator_of(rng)
        keys: dict[str, str] = {}
        self._branches = {branch: [] for branch in branches}
        for branch, outputs in branches.items():
            for index, (taken, made) in enumerate(pairwise((self.in_channels * self._bins, *outputs))):
                # The keys count the ReLU between two layers too.
                weight, bias = f"{branch}_{2 * index}_weight", f"{branch}_{2 * index}_bias"
                keys |= {weight: f"{branch}.{2 * index}.weight", bias: f"{branch}.{2 * index}.bias"}
                deviation = 0.01 if index + 1 < len(outputs) else 0
                setattr(self, weight, generator.normal(0, deviation, (made, taken)).astype(self.dtype))
                setattr(self, bias, numpy.zeros(made, self.dtype))
                self._branches[branch].append((weight, bias))
        self._keys, self.gradients, self._kept = keys, {}, None

    def __repr__(self) -> str:
        numbers = "in_channels", "output_size", "spatial_scale", "sampling_ratio", "gamma", "hidden_channels"
        values = ", ".join(f"{name}={getattr(self, name)}" for name in numbers)
        flag = ", position_sensitive=True" if self.position_sensitive else ""
        return f"{type(self).__name__}({values}{flag})"

    def forward(self, x: Array, rois: Array) -> Array:
        """Pool regions of maps, and remember what `backward` needs.

        Parameters
        ----------
        x : array, shape (batch, in_channels, height, width)
            The maps, of the dtype of the parameters. They are kept, not copied.
        rois : array, shape (R, 5)
            The regions: index of the image in `x`, x1, y1, x2, y2. Kept, not copied.

        Returns
        -------
        array, shape (R, in_channels, P_h, P_w)
            A new array.

        Raises
        ------
        TypeError
            An array of another kind or dtype.
        ValueError
            Shapes that do not fit, a region that is not finite or whose image does not exist.

        See Also
        --------
        backward : The gradients.
        """
        x, rois = self._checked(x, rois)
        features = self._pool(x, rois, None, None).reshape(len(rois), self.in_channels * self._bins)
        passed = {branch: self._through(branch, features) for branch in self._branches}
        made = namespace(x).concatenate([rows[-1] for rows in passed.values()], axis=1)
        offset, mask = made[:, : 2 * self._bins].reshape(-1, 2, *self.output_size), None
        if self.mask_activation is not None:
            logits = made[:, 2 * self._bins :].reshape(-1, 1, *self.output_size)
            mask = logistic(logits, MASK_FACTORS[self.mask_activation])
        y = self._pool(x, rois, offset, mask)
        self._kept = x, offset, mask, rois, passed
        return y

    def backward(self, grad_output: Array) -> Array:
        """Compute the gradients of the last `forward`, those of the parameters into `gradients`.

        Call it before the parameters change: it reads them again.

        Parameters
        ----------
        grad_output : array, shape (R, in_channels, P_h, P_w)
            The gradient of a scalar with respect to what `forward` returned.

        Returns
        -------
        array, shape (batch, in_channels, height, width)
            The gradient with respect to `x`. Regions have none.

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
        x, offset, mask, rois, passed = self._remembered()
        found = self._pool_backward(grad_output, x, rois, offset, mask)
        grad_made = found.offset.reshape(len(rois), 2 * self._bins)
        if self.mask_activation is not None:
            # With s the logistic function, mask = factor * s, and s' = s * (1 - s).
            grad_logits = found.mask * mask * (1 - mask / MASK_FACTORS[self.mask_activation])
            grad_made = namespace(x).concatenate(
                [grad_made, grad_logits.reshape(len(rois), self._bins)], axis=1
            )
        grad_features = self._branches_backward(grad_made, passed)
        grad_pooled = grad_features.reshape(-1, self.in_channels, *self.output_size).astype(self.dtype)
        return found.x + self._pool_backward(grad_pooled, x, rois, None, None).x

    # ---- branches

    def _wide(self, array: Array) -> Array:
        """Return numbers as branches compute with them: halves in float32."""
        return array.astype(numpy.result_type(self.dtype, numpy.float32), copy=False)

    def _through(self, branch: str, features: Array) -> list[Array]:
        """Return what each layer of a branch takes, and last what the branch makes."""
        passed, rows = [], self._wide(features)
        for index, (weight, bias) in enumerate(self._branches[branch]):
            passed.append(namespace(rows).maximum(rows, 0) if index else rows)
            rows = passed[-1] @ self._wide(getattr(self, weight)).T + self._wide(getattr(self, bias))
        return [*passed, rows]

    def _branches_backward(self, grad_made: Array, passed: Mapping[str, Sequence[Array]]) -> Array:
        """Set the gradients of all parameters, and return that of the features."""
        gradients: dict[str, Array] = {}
        features = next(iter(passed.values()))[0]
        grad_features, begin = namespace(features).zeros_like(features), 0
        for branch, rows in passed.items():
            end = begin + rows[-1].shape[1]
            grad_features += self._back_through(branch, rows, grad_made[:, begin:end], gradients)
            begin = end
        self.gradients = {name: gradients[name].astype(self.dtype, copy=False) for name in self._keys}
        return grad_features

    def _back_through(
        self, branch: str, passed: Sequence[Array], grad_rows: Array, gradients: dict[str, Array]
    ) -> Array:
        """Add the gradients of a branch's parameters to `gradients`, and return that of the features."""
        for index, (weight, bias) in reversed(list(enumerate(self._branches[branch]))):
            gradients[weight], gradients[bias] = grad_rows.T @ passed[index], grad_rows.sum(axis=0)
            grad_rows = grad_rows @ self._wide(getattr(self, weight))
            if index:
                grad_rows = namespace(grad_rows).where(passed[index] > 0, grad_rows, 0)
        return grad_rows

    # ---- poolings

    def _geometry(self, x: tuple[int, ...], rois: tuple[int, ...]) -> RoIGeometry:
        """Return the sizes of a pooling of arrays of these shapes."""
        dtype, maps = self.dtype, SimpleNamespace(shape=x, dtype=self.dtype)
        regions = SimpleNamespace(shape=rois, dtype=dtype)
        if self.position_sensitive:
            return RoIGeometry.of_position_sensitive((dtype,), maps, regions, None, *self._by_position())
        return RoIGeometry.of((dtype,), maps, regions, None, None, *self._numbers)

    def _by_position(self) -> tuple[Any, ...]:
        """Return the numbers of `deform_psroi_pool`."""
        output_size, spatial_scale, sampling_ratio, gamma = self._numbers
        return self.in_channels, 1, output_size, spatial_scale, None, sampling_ratio, gamma

    def _checked(self, x: Array, rois: Array) -> tuple[Array, Array]:
        name, parameter = next(iter(self.parameters().items()))
        kind = kind_of(x=x, rois=rois, **{name: parameter})
        x, rois = kind.take("x", x), kind.take("rois", rois)
        check_dtype(name, self.dtype, x.dtype, "rois")
        if x.ndim == 4 and x.shape[1] != self.in_channels:
            wanted = f"(batch, {self.in_channels}, height, width)"
            raise ValueError(f"x has the shape {x.shape}; wanted {wanted}")
        return x, rois

    def _pool(self, x: Array, rois: Array, offset: Array | None, mask: Array | None) -> Array:
        if not self.position_sensitive:
            return modulated_deform_roi_pool(x, rois, offset, mask, *self._numbers)
        y = deform_psroi_pool(x, rois, offset, *self._by_position())
        return y if mask is None else (self._wide(y) * mask).astype(self.dtype, copy=False)

    def _pool_backward(
        self, grad_output: Array, x: Array, rois: Array, offset: Array | None, mask: Array | None
    ) -> RoIGradients:
        if not self.position_sensitive:
            return modulated_deform_roi_pool_backward(grad_output, x, rois, offset, mask, *self._numbers)
        numbers, grad_mask = self._by_position(), None
        if mask is not None:
            grad_output = kind_of(x=x, grad_output=grad_output).take("grad_output", grad_output)
            check_roi_grad_output(self._geometry(x.shape, rois.shape), grad_output)
            y = deform_psroi_pool(x, rois, offset, *numbers)
            grad_mask = (self._wide(grad_output) * y).sum(axis=1, keepdims=True)
            grad_output = (self._wide(grad_output) * mask).astype(self.dtype, copy=False)
        found = deform_psroi_pool_backward(grad_output, x, rois, offset, *numbers)
        return RoIGradients(found.x, found.offset, grad_mask)


_PARAMETERS = """
    Parameters
    ----------
    in_channels : int
        The channels of the maps.
    output_size : int or (int, int)
        Bins (P_h, P_w) of each region.
    spatial_scale : float
        From the coordinates of the regions to pixels: 1/16 for a map of stride 16.
    sampling_ratio : int
        Samples of each bin along each axis; 0 takes as many as the bin is long.
    gamma : float
        A bin moves by gamma * (region's size) * offset.
    hidden_channels : int
        The width of the hidden layers of a branch; 1024 in the DCNv2 paper."""
_OTHERS = """\
    position_sensitive : bool
        Pool by the rule of `dcn_np.deform_psroi_pool`, with one group, as the operators of the authors do and
        those of CharlesShang and chengdazhi: `sampling_ratio` is then its sample_per_part, at least 1, and
        `gamma` its trans_std.
    rng : numpy.random.Generator, int or None
        What weights are drawn from, or its seed. None is another seed each time.
    dtype : dtype
        That of all parameters, and of the maps.

    Attributes
    ----------
    {weights} : array, (outputs, inputs)
        The weights of the fully connected layers{also}.
    {biases} : array, (outputs,)
        Their biases.
    gradients : dict of str to array
        What the last `backward` found, by the names of `parameters()`; empty before.

    Raises
    ------
    TypeError
        An argument of the wrong kind, or a dtype that is not computed.
    ValueError
        Numbers that do not fit.
"""
_SEPARATE = """; of branches of their own, offset_fc_0_weight
        to offset_fc_4_weight, mask_fc_0_weight and mask_fc_2_weight"""


def _others(branch: str, also: str = "") -> str:
    weights, biases = (
        ", ".join(f"{branch}_{index}_{what}" for index in (0, 2, 4)) for what in ("weight", "bias")
    )
    return _OTHERS.format(weights=weights, biases=biases, also=also)


class DeformRoIPool(_DeformRoIPool):
    __doc__ = f"""A deformable pooling over regions, with the branch that moves its bins (DCNv1).

    A regular pooling goes through three fully connected layers with ReLU between, which make 2 * P_h * P_w
    offsets: x of all bins, then y. Weights begin with a standard deviation of 0.01, those of the last layer
    and all biases at zero, so that at first every bin is in its place. So it is in mmcv; the DCNv1 paper has
    the last of these layers only.
{_PARAMETERS}
{_others("offset_fc")}"""

    modulated = False

    def __init__(
        self,
        in_channels: int,
        output_size: Size,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        hidden_channels: int = 1024,
        position_sensitive: bool = False,
        rng: Seed = None,
        dtype: DTypeLike = numpy.float32,
    ) -> None:
        numbers = output_size, spatial_scale, sampling_ratio, gamma
        self._set_sizes(in_channels, *numbers, hidden_channels, position_sensitive, dtype)
        self._draw({"offset_fc": (self.hidden_channels, self.hidden_channels, 2 * self._bins)}, rng)


class ModulatedDeformRoIPool(_DeformRoIPool):
    __doc__ = f"""A modulated deformable pooling over regions, with what makes its offsets and masks (DCNv2).

    As the paper has it, a regular pooling goes through three fully connected layers with ReLU between, which
    make 3 * P_h * P_w numbers: offsets by x of all bins, those by y, and what a sigmoid makes the masks of.
    Weights begin with a standard deviation of 0.01, those of the last layer and all biases at zero.
{_PARAMETERS}
    shared_branch : bool
        False has the masks made by a branch of their own, as in mmcv and chengdazhi's DCNv2: three layers
        make the offsets, and two the masks.
    mask_activation : {{"sigmoid", "2*sigmoid"}}
        What the masks go through: 0.5 at first, as in the paper, or 1.
{_others("offset_mask_fc", _SEPARATE)}"""

    modulated = True

    def __init__(
        self,
        in_channels: int,
        output_size: Size,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        hidden_channels: int = 1024,
        shared_branch: bool = True,
        mask_activation: str = "sigmoid",
        position_sensitive: bool = False,
        rng: Seed = None,
        dtype: DTypeLike = numpy.float32,
    ) -> None:
        numbers = output_size, spatial_scale, sampling_ratio, gamma
        self._set_sizes(in_channels, *numbers, hidden_channels, position_sensitive, dtype)
        self.shared_branch = checked_flag("shared_branch", shared_branch)
        self.mask_activation = checked_activation(mask_activation)
        hidden, bins = self.hidden_channels, self._bins
        shared = {"offset_mask_fc": (hidden, hidden, 3 * bins)}
        separate = {"offset_fc": (hidden, hidden, 2 * bins), "mask_fc": (hidden, bins)}
        self._draw(shared if self.shared_branch else separate, rng)
