"""Pooling over regions of interest and the mimicking loss for PyTorch: the operators of `dcn_np.torch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import dcn_np

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

# ---- operators; `needs` and what a backward returns have an entry for `rois` and `weights` too, never filled


@operator("modulated_deform_roi_pool")
def _pool(
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    y = dcn_np.modulated_deform_roi_pool(
        detached(x),
        detached(rois),
        detached(offset),
        detached(mask),
        output_size,
        spatial_scale,
        sampling_ratio,
        gamma,
    )
    return y.contiguous(memory_format=memory_format(x))


@torch.library.register_fake(_pool)
def _(x, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma):  # type: ignore[no-untyped-def]
    return _empty(x, rois, x.shape[1], output_size)


@operator("modulated_deform_roi_pool_backward")
def _pool_backward(
    grad_output: Tensor,
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    gradients = dcn_np.modulated_deform_roi_pool_backward(
        detached(grad_output),
        detached(x),
        detached(rois),
        detached(offset),
        detached(mask),
        output_size,
        spatial_scale,
        sampling_ratio,
        gamma,
        needs=_names(needs, ("x", "rois", "offset", "mask")),
    )
    return as_tensors((gradients.x, None, gradients.offset, gradients.mask), x)


@torch.library.register_fake(_pool_backward)
def _(grad_output, x, rois, offset, mask, *parameters):  # type: ignore[no-untyped-def]
    return empty_gradients((x, None, offset, mask), parameters[-1], x)


register_autograd(_pool, _pool_backward, tensors=4, saved=4, constant=(1,))


@operator("deform_psroi_pool")
def _pool_by_position(
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_dim: int,
    group_size: int,
    output_size: Sequence[int],
    spatial_scale: float,
    part_size: Sequence[int],
    sample_per_part: int,
    trans_std: float,
) -> Tensor:
    y = dcn_np.deform_psroi_pool(
        detached(x),
        detached(rois),
        detached(offset),
        output_dim,
        group_size,
        output_size,
        spatial_scale,
        part_size,
        sample_per_part,
        trans_std,
    )
    return y.contiguous(memory_format=memory_format(x))


@torch.library.register_fake(_pool_by_position)
def _(x, rois, offset, output_dim, group_size, output_size, *parameters):  # type: ignore[no-untyped-def]
    return _empty(x, rois, output_dim, output_size)


@operator("deform_psroi_pool_backward")
def _pool_by_position_backward(
    grad_output: Tensor,
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_dim: int,
    group_size: int,
    output_size: Sequence[int],
    spatial_scale: float,
    part_size: Sequence[int],
    sample_per_part: int,
    trans_std: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    gradients = dcn_np.deform_psroi_pool_backward(
        detached(grad_output),
        detached(x),
        detached(rois),
        detached(offset),
        output_dim,
        group_size,
        output_size,
        spatial_scale,
        part_size,
        sample_per_part,
        trans_std,
        needs=_names(needs, ("x", "rois", "offset")),
    )
    return as_tensors((gradients.x, None, gradients.offset), x)


@torch.library.register_fake(_pool_by_position_backward)
def _(grad_output, x, rois, offset, *parameters):  # type: ignore[no-untyped-def]
    return empty_gradients((x, None, offset), parameters[-1], x)


register_autograd(_pool_by_position, _pool_by_position_backward, tensors=3, saved=3, constant=(1,))


@operator("feature_mimic_loss")
def _mimic(rcnn_features: Tensor, features: Tensor, weights: Tensor | None) -> Tensor:
    loss = dcn_np.feature_mimic_loss(*map(detached, (rcnn_features, features, weights)))
    return torch.tensor(loss, dtype=_loss_dtype(features), device=features.device)


@torch.library.register_fake(_mimic)
def _(rcnn_features, features, weights):  # type: ignore[no-untyped-def]
    return features.new_empty((), dtype=_loss_dtype(features))


@operator("feature_mimic_loss_backward")
def _mimic_backward(
    grad_output: Tensor,
    rcnn_features: Tensor,
    features: Tensor,
    weights: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    arrays = map(detached, (rcnn_features, features, weights))
    gradients = dcn_np.feature_mimic_loss_backward(grad_output.item(), *arrays)
    found = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=False)]
    return as_tensors((*found, None), features)


@torch.library.register_fake(_mimic_backward)
def _(grad_output, rcnn_features, features, weights, needs):  # type: ignore[no-untyped-def]
    return as_tensors([features.new_empty(features.shape) if needed else None for needed in needs], features)


register_autograd(_mimic, _mimic_backward, tensors=3, saved=3, constant=(2,))


# ---- vmap: one call, whose images and regions are those of all entries


def _register_vmap(forward: Any, backward: Any, arrays: int) -> None:
    """Give two operators their rules; `arrays` of their arguments are `x`, `rois` and others by region."""

    def forward_rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        count = info.batch_size
        together = _together(arguments[:arrays], in_dims[:arrays], count)
        if together is None:
            return one_by_one(forward)(info, in_dims, *arguments)
        return forward(*together, *arguments[arrays:]).unflatten(0, (count, -1)), 0

    def backward_rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[list[Tensor], list[int]]:
        count = info.batch_size
        (grad_output, x, *others), dims = arguments[: 1 + arrays], list(in_dims[1 : 1 + arrays])
        if dims[0] is None:  # each entry has a gradient of its own
            x, dims[0] = x.expand(count, *x.shape), 0
        together = _together((x, *others), dims, count)
        if together is None:
            return one_by_one(backward)(info, in_dims, *arguments)
        found = backward(folded(grad_output, in_dims[0], count), *together, *arguments[1 + arrays :])
        apart = [a.unflatten(0, (count, a.shape[0] // count)) for a in found]
        return apart, [0] * len(apart)

    torch.library.register_vmap(forward, forward_rule)
    torch.library.register_vmap(backward, backward_rule)


def _together(arrays: Sequence[Any], dims: Sequence[int | None], count: int) -> list[Any] | None:
    """Return `x`, `rois` and others of all entries in one, where regions name the images of their entry.

    None where numbers of their dtype are too coarse to name so many images.
    """
    rois: Any
    rois, *others = [folded(array, dim, count) for array, dim in zip(arrays[1:], dims[1:], strict=True)]
    if dims[0] is None:
        return [arrays[0], rois, *others]
    x: Any = folded(arrays[0], dims[0], count)
    if x.shape[0] > 2 / torch.finfo(rois.dtype).eps:
        return None
    batch, image = x.shape[0] // count, rois[:, 0]
    first = torch.arange(0, x.shape[0], batch, dtype=rois.dtype, device=rois.device)
    # What names no image of its entry must name none of another's.
    valid = (image >= 0) & (image < batch) & (image == image.floor())
    image = torch.where(valid, image + first.repeat_interleave(rois.shape[0] // count), -1)
    return [x, torch.cat([image[:, None], rois[:, 1:]], 1), *others]


_register_vmap(_pool, _pool_backward, 4)
_register_vmap(_pool_by_position, _pool_by_position_backward, 3)
for _operator in (_mimic, _mimic_backward):
    torch.library.register_vmap(_operator, one_by_one(_operator))


def _empty(x: Tensor, rois: Tensor, channels: int, output_size: Sequence[int]) -> Tensor:
    shape = (rois.shape[0], channels, *output_size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _names(needs: Sequence[bool], inputs: Sequence[str]) -> list[str]:
    return [name for name, needed in zip(inputs, needs, strict=True) if needed]


def _loss_dtype(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


# ---- functions


def roi_align(
    x: Tensor,
    rois: Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
) -> Tensor:
    """Average the samples of a regular grid of bins in each region (RoIAlign), differentiably.

    Parameters, result and errors are those of `dcn_np.roi_align`, for tensors. Under autocast `x` is cast to
    the dtype of autocast, and `rois` to float32.

    Parameters
    ----------
    x, rois : Tensor
        As there. `rois` get no gradient.
    output_size, spatial_scale, sampling_ratio
        As there.

    Returns
    -------
    Tensor
        Shape (R, channels, P_h, P_w), contiguous or channels-last as `x` is.

    See Also
    --------
    deform_roi_pool : The same with bins that move.
    """
    return modulated_deform_roi_pool(x, rois, None, None, output_size, spatial_scale, sampling_ratio)


def deform_roi_pool(
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """Average the samples of each bin where the offsets say, differentiably.

    Parameters, result and errors are those of `dcn_np.deform_roi_pool`, for tensors. Under autocast `x` is
    cast to the dtype of autocast, `rois` and `offset` to float32.

    Parameters
    ----------
    x, rois, offset : Tensor or None
        As there. `rois` get no gradient.
    output_size, spatial_scale, sampling_ratio, gamma
        As there.

    Returns
    -------
    Tensor
        Shape (R, channels, P_h, P_w), contiguous or channels-last as `x` is.

    See Also
    --------
    modulated_deform_roi_pool : The same with a factor for each bin.
    """
    return modulated_deform_roi_pool(x, rois, offset, None, output_size, spatial_scale, sampling_ratio, gamma)


def modulated_deform_roi_pool(
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """Average the samples of each bin where the offsets say, scaled by the bin's mask, differentiably.

    Parameters, result and errors are those of `dcn_np.modulated_deform_roi_pool`, for tensors. Under autocast
    `x` is cast to the dtype of autocast, `rois`, `offset` and `mask` to float32. The gradients themselves
    cannot be differentiated.

    Parameters
    ----------
    x, rois, offset, mask : Tensor or None
        As there. `rois` get no gradient.
    output_size, spatial_scale, sampling_ratio, gamma
        As there.

    Returns
    -------
    Tensor
        Shape (R, channels, P_h, P_w), contiguous or channels-last as `x` is.

    See Also
    --------
    deform_roi_pool : The same without masks.
    """
    if autocasts(x):
        x, rois, offset, mask = cast(x, (x,), (rois, offset, mask))
    y: Tensor = _pool(x, rois, offset, mask, per_axis(output_size, 2), spatial_scale, sampling_ratio, gamma)
    return y


def deform_psroi_pool(
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_dim: int,
    group_size: int,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    part_size: int | Sequence[int] | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
) -> Tensor:
    """Average the samples of each bin where the offsets say, each bin from maps of its own, differentiably.

    Parameters, result and errors are those of `dcn_np.deform_psroi_pool`, for tensors. Under autocast `x` is
    cast to the dtype of autocast, `rois` and `offset` to float32. The gradients themselves cannot be
    differentiated.

    Parameters
    ----------
    x, rois, offset : Tensor or None
        As there. `rois` get no gradient.
    output_dim, group_size, output_size, spatial_scale, part_size, sample_per_part, trans_std
        As there.

    Returns
    -------
    Tensor
        Shape (R, output_dim, P_h, P_w), contiguous or channels-last as `x` is.

    See Also
    --------
    deform_roi_pool : The form without position-sensitive maps.
    """
    if autocasts(x):
        x, rois, offset = cast(x, (x,), (rois, offset))
    output = per_axis(output_size, 2)
    part = output if part_size is None else per_axis(part_size, 2)
    sizes = (output_dim, group_size, output, spatial_scale, part, sample_per_part, trans_std)
    y: Tensor = _pool_by_position(x, rois, offset, *sizes)
    return y


def feature_mimic_loss(rcnn_features: Tensor, features: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum up, over the regions, one minus the cosine of the angle between two features, differentiably.

    Parameters and errors are those of `dcn_np.feature_mimic_loss`, for tensors. Under autocast all are cast
    to float32. The gradients themselves cannot be differentiated.

    Parameters
    ----------
    rcnn_features, features, weights : Tensor or None
        As there. `weights` get no gradient.

    Returns
    -------
    Tensor
        Shape (): the loss, in float64 for features in float64, else in float32.
    """
    if autocasts(features):
        rcnn_features, features, weights = cast(features, (), (rcnn_features, features, weights))
    loss: Tensor = _mimic(rcnn_features, features, weights)
    return loss
