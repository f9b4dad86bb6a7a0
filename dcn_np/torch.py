"""Deformable convolution for PyTorch: operators for autograd, torch.compile and torch.export, and modules.

The computation is `dcn_np.modulated_deform_conv` over the tensors' own memory, on the CPU or a CUDA device.
Poolings over regions and the mimicking loss are operators of the same kind, the loss on the CPU alone.
`replace_convs` makes the network of the DCNv2 paper from an ordinary one, and `parameter_groups` gives the
branches that make offsets and masks the learning rate of their own that the paper trains them with.
`FeatureMimicking` is the branch that the paper trains beside a detector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dcn_np
from dcn_np import checkpoints
from dcn_np.checkpoints import MASK_FACTORS, checked_activation
from dcn_np.messages import shown

from ._torch_mimicking import FeatureMimicking, MimickingLosses, crop_regions, sample_regions
from ._torch_operators import (
    as_tensors,
    autocasts,
    cast,
    detached,
    empty_gradients,
    folded,
    memory_format,
    one_by_one,
    operator,
    per_axis,
    register_autograd,
)
from ._torch_regions import (
    deform_psroi_pool,
    deform_roi_pool,
    feature_mimic_loss,
    modulated_deform_roi_pool,
    roi_align,
)
from ._torch_roi_layers import DeformRoIPool, ModulatedDeformRoIPool

__all__ = [
    "DeformConv1d",
    "DeformConv2d",
    "DeformConv3d",
    "DeformRoIPool",
    "FeatureMimicking",
    "MimickingLosses",
    "ModulatedDeformConv1d",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv3d",
    "ModulatedDeformRoIPool",
    "crop_regions",
    "deform_conv",
    "deform_conv2d",
    "deform_psroi_pool",
    "deform_roi_pool",
    "feature_mimic_loss",
    "load_state_dict_from",
    "modulated_deform_conv",
    "modulated_deform_roi_pool",
    "parameter_groups",
    "replace_convs",
    "roi_align",
    "sample_regions",
]

_INPUTS = dcn_np.Gradients._fields

# ---- operators; `padding` is begin and end of each axis after the other, others have one entry per axis


@operator("modulated_deform_conv")
def _convolve(
    x: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_groups: int,
    float32_matmul: str,
) -> Tensor:
    y = dcn_np.modulated_deform_conv(
        detached(x),
        detached(offset),
        detached(mask),
        detached(weight),
        detached(bias),
        stride,
        _pairs(padding),
        dilation,
        groups,
        offset_groups,
        float32_matmul=float32_matmul,
    )
    return y.contiguous(memory_format=memory_format(x))


@torch.library.register_fake(_convolve)
def _(x, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups, float32_matmul):  # type: ignore[no-untyped-def]
    output = [
        (extent + begin + end - step * (kernel - 1) - 1) // jump + 1
        for extent, kernel, jump, (begin, end), step in zip(
            x.shape[2:], weight.shape[2:], stride, _pairs(padding), dilation, strict=True
        )
    ]
    shape = (x.shape[0], weight.shape[0], *output)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


@operator("modulated_deform_conv_backward")
def _convolve_backward(
    grad_output: Tensor,
    x: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_groups: int,
    float32_matmul: str,
    needs: Sequence[bool],
    deterministic: bool,
) -> list[Tensor]:
    gradients = dcn_np.modulated_deform_conv_backward(
        detached(grad_output),
        detached(x),
        detached(offset),
        detached(mask),
        detached(weight),
        stride,
        _pairs(padding),
        dilation,
        groups,
        offset_groups,
        needs=[name for name, needed in zip(_INPUTS, needs, strict=True) if needed],
        deterministic=deterministic,
        float32_matmul=float32_matmul,
    )
    return as_tensors(gradients, x)


@torch.library.register_fake(_convolve_backward)
def _(grad_output, x, offset, mask, weight, *parameters):  # type: ignore[no-untyped-def]
    needs = parameters[-2]
    bias = x.new_empty(weight.shape[0])
    return empty_gradients((x, offset, mask, weight, bias), needs, x)


def _pairs(padding: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(padding[::2], padding[1::2], strict=True))


def _settings() -> tuple[bool]:
    return (torch.are_deterministic_algorithms_enabled(),)


register_autograd(_convolve, _convolve_backward, tensors=5, saved=4, settings=_settings)


@torch.library.register_vmap(_convolve)
def _(info, in_dims, x, offset, mask, weight, bias, *parameters):  # type: ignore[no-untyped-def]
    if in_dims[3] is not None or in_dims[4] is not None:
        return one_by_one(_convolve)(info, in_dims, x, offset, mask, weight, bias, *parameters)
    pairs = zip((x, offset, mask), in_dims[:3], strict=True)
    per_image = [folded(array, dim, info.batch_size) for array, dim in pairs]
    return _convolve(*per_image, weight, bias, *parameters).unflatten(0, (info.batch_size, -1)), 0


# The gradients of weight and bias are sums over the batch, so each entry is a call of its own.
torch.library.register_vmap(_convolve_backward, one_by_one(_convolve_backward))


# ---- functions


def deform_conv(
    x: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    float32_matmul: str | None = None,
) -> Tensor:
    """Convolve where the offsets say (DCNv1), differentiably.

    Parameters, result and errors are those of `dcn_np.deform_conv`, for tensors. Under autocast `x`, `weight`
    and `bias` are cast to the dtype of autocast, and `offset` to float32.

    Parameters
    ----------
    x, offset, weight, bias : Tensor or None
        As there.
    stride, padding, dilation, groups, offset_groups
        As there.
    float32_matmul : {"strict", "tf32"} or None
        As there.

    Returns
    -------
    Tensor
        Shape (batch, out_channels, *output), contiguous or channels-last as `x` is.

    See Also
    --------
    modulated_deform_conv : The same with masks.
    """
    return modulated_deform_conv(
        x,
        offset,
        None,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        offset_groups,
        float32_matmul=float32_matmul,
    )


def modulated_deform_conv(
    x: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_groups: int = 1,
    *,
    float32_matmul: str | None = None,
) -> Tensor:
    """Convolve where the offsets say, each tap scaled by a mask (DCNv2), differentiably.

    Parameters, result and errors are those of `dcn_np.modulated_deform_conv`, for tensors. Under autocast
    `x`, `weight` and `bias` are cast to the dtype of autocast, `offset` and `mask` to float32. On a GPU the
    gradient of `x` has the same bits in every run with ``torch.use_deterministic_algorithms(True)``. The
    gradients themselves cannot be differentiated.

    Parameters
    ----------
    x, offset, mask, weight, bias : Tensor or None
        As there.
    stride, padding, dilation, groups, offset_groups
        As there.
    float32_matmul : {"strict", "tf32"} or None
        As there.

    Returns
    -------
    Tensor
        Shape (batch, out_channels, *output), contiguous or channels-last as `x` is.

    See Also
    --------
    deform_conv2d : The same with torchvision's signature.
    """
    _check_tensors(x=x)
    ndim = x.ndim - 2
    if autocasts(x):
        x, weight, bias, offset, mask = cast(x, (x, weight, bias), (offset, mask))
    arguments = (x, offset, mask, weight, bias, per_axis(stride, ndim), _flat(padding, ndim))
    matmul = dcn_np.get_float32_matmul() if float32_matmul is None else float32_matmul
    y: Tensor = _convolve(*arguments, per_axis(dilation, ndim), groups, offset_groups, matmul)
    return y


def _check_tensors(**arrays: Any) -> None:
    """Check what is looked at before torch's dispatcher, which names the others, does."""
    for name, array in arrays.items():
        if not isinstance(array, Tensor):
            raise TypeError(f"{name} is {shown(array)}; wanted a torch.Tensor")


def _flat(padding: int | Sequence[int | tuple[int, int]], ndim: int) -> list[int]:
    axes = [padding] * ndim if isinstance(padding, int) else padding
    pairs = [(axis, axis) if isinstance(axis, int) else tuple(axis) for axis in axes]
    return [int(number) for pair in pairs for number in pair]


def deform_conv2d(
    input: Tensor,  # noqa: A002 - torchvision's name
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Take the place of ``torchvision.ops.deform_conv2d``: the same arguments, the same numbers.

    The groups follow from the shapes, as there. For a NaN offset, and beside infinite pixels, the results
    differ: docs/semantics.md says how.

    Parameters
    ----------
    input : Tensor
        Shape (batch, in_channels, height, width).
    offset : Tensor
        Shape (batch, 2 * offset_groups * kernel_height * kernel_width, out_height, out_width): (y, x) of each
        tap.
    weight : Tensor
        Shape (out_channels, in_channels / groups, kernel_height, kernel_width).
    bias : Tensor or None
        Shape (out_channels,).
    stride, padding, dilation : int or (int, int)
        Of height and width.
    mask : Tensor or None
        Shape (batch, offset_groups * kernel_height * kernel_width, out_height, out_width).

    Returns
    -------
    Tensor
        Shape (batch, out_channels, out_height, out_width).

    Raises
    ------
    ValueError
        Shapes that do not fit.
    """
    _check_tensors(input=input, offset=offset, weight=weight)
    if weight.ndim != 4:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; wanted (out, in / groups, height, width)")
    per_group = 2 * weight.shape[-2] * weight.shape[-1]
    if offset.ndim != 4 or offset.shape[1] % per_group or not offset.shape[1]:
        raise ValueError(
            f"offset has shape {tuple(offset.shape)}; wanted (batch, a multiple of 2*{weight.shape[-2]}*"
            f"{weight.shape[-1]} = {per_group}, height, width)"
        )
    if input.ndim != 4 or not weight.shape[1] or input.shape[1] % weight.shape[1]:
        raise ValueError(
            f"input has shape {tuple(input.shape)} and weight {tuple(weight.shape)}; wanted axis 1 of input "
            "to be a multiple of that of weight"
        )
    groups, offset_groups = input.shape[1] // weight.shape[1], offset.shape[1] // per_group
    return modulated_deform_conv(
        input, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups
    )


# ---- modules

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _DeformConv(nn.Module):
    """A deformable convolution with the branch that makes its offsets and masks.

    The branch is one ordinary convolution of the same kernel, stride, padding and dilation, zero-initialised:
    at first every tap is on the rigid grid.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels.
    kernel_size, stride, padding, dilation : int or sequence of int
        Per spatial axis.
    groups, offset_groups : int
        Of the convolution; of offsets and masks.
    bias : bool
        Whether the result has a bias; the branch always has one.
    mask_activation : {"sigmoid", "2*sigmoid"}
        What the masks go through: 0.5 at first, as in the paper, or 1, as in the authors' code. Modulated
        modules only.
    """

    ndim: int
    modulated: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        mask_activation: str = "sigmoid",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(padding, str):  # a string would pass for one entry per axis
            raise TypeError(f"padding is {padding!r}; wanted an integer, or one per axis")
        kernel, self.stride, self.padding, self.dilation = (
            tuple(per_axis(value, self.ndim)) for value in (kernel_size, stride, padding, dilation)
        )
        self.groups, self.offset_groups = groups, offset_groups
        self.mask_activation = checked_activation(mask_activation)
        made = {"device": device, "dtype": dtype}
        window = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        like = _CONVS[self.ndim](
            in_channels, out_channels, kernel, groups=groups, bias=bias, **window, **made
        )
        self.weight, self.bias = like.weight, like.bias
        self.taps = math.prod(kernel)
        channels = offset_groups * self.taps * (self.ndim + self.modulated)
        self.conv_offset = _CONVS[self.ndim](in_channels, channels, kernel, **window, **made)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the offsets and masks that the module makes of `x` to sample it by; masks if modulated."""
        made: Tensor = self.conv_offset(x)
        if not self.modulated:
            return made, None
        offsets = self.offset_groups * self.taps * self.ndim
        mask = torch.sigmoid(made[:, offsets:])
        if self.mask_activation != "sigmoid":
            mask = mask * MASK_FACTORS[self.mask_activation]
        return made[:, :offsets], mask

    def forward(self, x: Tensor) -> Tensor:
        """Make offsets and masks from `x` and convolve it with them."""
        offset, mask = self.branch(x)
        return modulated_deform_conv(
            x,
            offset,
            mask,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.offset_groups,
        )

    def extra_repr(self) -> str:
        """Return what ``print`` shows beside the branch."""
        return (
            f"{self.weight.shape[1] * self.groups}, {self.weight.shape[0]}, "
            f"kernel_size={tuple(self.weight.shape[2:])}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, offset_groups={self.offset_groups}, "
            f"bias={self.bias is not None}"
        )


class DeformConv1d(_DeformConv):
    __doc__, ndim, modulated = _DeformConv.__doc__, 1, False


class DeformConv2d(_DeformConv):
    __doc__, ndim, modulated = _DeformConv.__doc__, 2, False


class DeformConv3d(_DeformConv):
    __doc__, ndim, modulated = _DeformConv.__doc__, 3, False


class ModulatedDeformConv1d(_DeformConv):
    __doc__, ndim, modulated = _DeformConv.__doc__, 1, True


class ModulatedDeformConv2d(_DeformConv):
    __doc__, ndim, modulated = _DeformConv.__doc__, 2, True


class ModulatedDeformConv3d(_DeformConv):
    __doc__, ndim, modulated = _DeformConv.__doc__, 3, True


def parameter_groups(model: nn.Module, lr: float, offset_factor: float = 0.1) -> list[dict[str, Any]]:
    """Split the parameters for an optimiser: those of the branches that make offsets and masks learn slower.

    This is of convolutions. The fully connected branches of `DeformRoIPool` and `ModulatedDeformRoIPool`
    learn as fast as the rest, as in the DCNv2 paper.

    Parameters
    ----------
    model : Module
        Any module.
    lr : float
        The learning rate of all other parameters.
    offset_factor : float
        What it is multiplied by for the branches; 0.1 in the papers.

    Returns
    -------
    list of dict
        Two groups, as in ``torch.optim.SGD(parameter_groups(model, lr=0.01), momentum=0.9)``.
    """
    branches = [
        parameter
        for module in model.modules()
        if isinstance(module, _DeformConv)
        for parameter in module.conv_offset.parameters()
    ]
    ids = set(map(id, branches))
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    return [{"params": others, "lr": lr}, {"params": branches, "lr": lr * offset_factor}]


def load_state_dict_from(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "", *, library: str
) -> None:
    """Load one layer that another library saved into a module of this one.

    Parameters
    ----------
    module : DeformConv2d, ModulatedDeformConv2d, DeformRoIPool or ModulatedDeformRoIPool
        Made with the layer's sizes. Of torchvision's layers, which have no branch, the convolution alone is
        loaded.
    state_dict : mapping of str to Tensor or numpy.ndarray
        A network's, from ``torch.load`` or `dcn_np.pth.read_pth`.
    prefix : str
        The name of the layer in it, such as "backbone.layer2.0.conv2".
    library : {"torchvision", "mmcv", "detectron2", "CharlesShang", "chengdazhi"}
        Which library saved it. Poolings over regions are those of mmcv, or of CharlesShang and chengdazhi for
        modules with ``position_sensitive=True``.

    Raises
    ------
    TypeError
        `module` is another kind of module, or an entry is no array.
    ValueError
        Keys or shapes that do not fit, or a branch that the module cannot have.

    See Also
    --------
    dcn_np.checkpoints.layer_from : The same for NumPy alone.
    dcn_np.checkpoints.roi_pool_from : ... for poolings over regions.
    """
    if not isinstance(module, _DeformConv | DeformRoIPool | ModulatedDeformRoIPool):
        raise TypeError(
            f"module is a {type(module).__name__}; wanted a deformable convolution, or pooling over regions, "
            "of dcn_np.torch"
        )
    arrays = {
        key: value.detach().float().numpy() if isinstance(value, Tensor) and key.startswith(prefix) else value
        for key, value in state_dict.items()
    }
    parameters = dict(module.named_parameters())
    if isinstance(module, _DeformConv):
        given, activation = _of_convolution(module, arrays, prefix, library)
        if library == "torchvision":
            parameters = {name: parameters[name] for name in parameters if not name.startswith("conv_offset")}
    else:
        given, activation = _of_pooling(module, arrays, prefix, library)
    _check_fits(given, parameters, prefix)
    if activation is not None and activation != module.mask_activation:
        raise ValueError(
            f"{library}'s masks go through {activation}; wanted a module with that mask_activation, not "
            f"{module.mask_activation!r}"
        )
    with torch.no_grad():
        for name, array in given.items():
            parameters[name].copy_(torch.tensor(array))


def _of_convolution(
    module: _DeformConv, arrays: Mapping[str, Any], prefix: str, library: str
) -> tuple[dict[str, Any], str | None]:
    """Return the arrays of a layer by the names of the parameters, and what makes its masks."""
    branch = None if library == "torchvision" else module.modulated
    found = checkpoints.layer_from(arrays, prefix, library=library, modulated=branch)
    if found.offset_dilated is False and any(step != 1 for step in module.dilation):
        raise ValueError(
            f"{library} makes offsets by a convolution without dilation; wanted a module of dilation 1, not "
            f"{module.dilation}"
        )
    named = {
        "weight": found.weight,
        "bias": found.bias,
        "conv_offset.weight": found.offset_weight,
        "conv_offset.bias": found.offset_bias,
    }
    return {name: array for name, array in named.items() if array is not None}, found.mask_activation


def _of_pooling(
    module: DeformRoIPool | ModulatedDeformRoIPool, arrays: Mapping[str, Any], prefix: str, library: str
) -> tuple[dict[str, Any], str | None]:
    """Return the arrays of a layer by the names of the parameters, and what makes its masks."""
    found = checkpoints.roi_pool_from(arrays, prefix, library=library)
    if found.position_sensitive != module.position_sensitive:
        raise ValueError(
            f"{library} pools with position_sensitive={found.position_sensitive}; wanted a module with that, "
            f"not {module.position_sensitive}"
        )
    return found.arrays, found.mask_activation


def _check_fits(given: Mapping[str, Any], parameters: Mapping[str, Tensor], prefix: str) -> None:
    if set(given) != set(parameters):
        raise ValueError(f"the layer {prefix!r} has {sorted(given)}; the module wants {sorted(parameters)}")
    for name, array in given.items():
        if tuple(array.shape) != tuple(parameters[name].shape):
            raise ValueError(
                f"{name} of the layer {prefix!r} has shape {tuple(array.shape)}; the module wants "
                f"{tuple(parameters[name].shape)}"
            )


def replace_convs(
    model: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    *,
    offset_groups: int = 1,
    mask_activation: str = "sigmoid",
) -> list[str]:
    """Turn the 3 x 3 convolutions of a network's stages into DCNv2, in place; their weights stay.

    Parameters
    ----------
    model : Module
        A network whose stages are children of these names, such as torchvision's ResNet or ResNeXt, where the
        default is conv3 to conv5 of the paper.
    stages : sequence of str
        Names of submodules to look in.
    offset_groups : int
        Of the new layers.
    mask_activation : {"sigmoid", "2*sigmoid"}
        With "2*sigmoid" the network computes at first exactly what it did.

    Returns
    -------
    list of str
        The names of the layers replaced.

    Raises
    ------
    ValueError
        There is no such stage, or no 3 x 3 convolution in them.
    """
    replaced = []
    for stage in stages:
        try:
            found = model.get_submodule(stage)
        except AttributeError:
            names = [name for name, _ in model.named_children()]
            raise ValueError(f"stages has {stage!r}; the model's children are {names}") from None
        for name, module in list(found.named_modules(prefix=stage)):
            if not isinstance(module, nn.Conv2d) or module.kernel_size != (3, 3):
                continue
            if isinstance(module.padding, str) or module.padding_mode != "zeros":
                raise ValueError(f"{name} has padding {module.padding!r}, mode {module.padding_mode!r}")
            new = ModulatedDeformConv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                module.groups,
                offset_groups,
                module.bias is not None,
                mask_activation,
                module.weight.device,
                module.weight.dtype,
            )
            new.weight, new.bias = module.weight, module.bias
            new.train(module.training)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
            replaced.append(name)
    if not replaced:
        raise ValueError(f"there is no 3 x 3 convolution in {list(stages)}")
    return replaced
