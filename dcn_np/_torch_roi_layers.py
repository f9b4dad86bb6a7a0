"""Pooling over regions for PyTorch with the branch that moves the bins: modules of `dcn_np.torch`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ._torch_operators import per_axis
from ._torch_regions import deform_psroi_pool, modulated_deform_roi_pool
from .checkpoints import MASK_FACTORS, checked_activation


class _DeformRoIPool(nn.Module):
    """What both poolings share: the numbers, the regular pooling, and the deformed one."""

    def __init__(
        self,
        in_channels: int,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int,
        gamma: float,
        position_sensitive: bool,
    ) -> None:
        super().__init__()
        self.in_channels, self.output_size = in_channels, tuple(per_axis(output_size, 2))
        self.spatial_scale, self.sampling_ratio, self.gamma = spatial_scale, sampling_ratio, gamma
        self.position_sensitive, self.bins = position_sensitive, math.prod(self.output_size)

    def extra_repr(self) -> str:
        """Return what ``print`` shows beside the branches."""
        return (
            f"{self.in_channels}, output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}, "
            f"position_sensitive={self.position_sensitive}"
        )

    def _new_branch(self, hidden: Sequence[int], channels: int, made: dict[str, Any]) -> nn.Sequential:
        """Return fully connected layers with ReLU between; the last one makes zeros at first."""
        layers: list[nn.Module] = []
        for taken, given in pairwise((self.in_channels * self.bins, *hidden, channels)):
            linear = nn.Linear(taken, given, **made)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        nn.init.zeros_(linear.weight)
        return nn.Sequential(*layers[:-1])

    def _features(self, x: Tensor, rois: Tensor) -> Tensor:
        """Return what the branches take: the regular pooling, of each region in one row."""
        if x.ndim == 4 and x.shape[1] != self.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; wanted (batch, {self.in_channels}, height, width)"
            )
        return self._pool(x, rois, None, None).flatten(1)

    def _made(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the rows of offsets, and of masks or None, that the branches make of the regular pooling."""
        raise NotImplementedError

    def branch(self, x: Tensor, rois: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the offsets and masks that the module pools regions by; masks if modulated."""
        offset, mask = self._made(self._features(x, rois))
        mask = None if mask is None else mask.unflatten(1, (1, *self.output_size))
        return offset.unflatten(1, (2, *self.output_size)), mask

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        """Pool `rois`, shape (R, 5), of `x` into (R, in_channels, P_h, P_w), as `dcn_np.layers` does."""
        return self._pool(x, rois, *self.branch(x, rois))

    def _pool(self, x: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        sizes = self.output_size, self.spatial_scale
        if not self.position_sensitive:
            return modulated_deform_roi_pool(x, rois, offset, mask, *sizes, self.sampling_ratio, self.gamma)
        y = deform_psroi_pool(
            x, rois, offset, self.in_channels, 1, *sizes, None, self.sampling_ratio, self.gamma
        )
        return y if mask is None else y * mask


class DeformRoIPool(_DeformRoIPool):
    """A deformable pooling over regions, with the branch that moves its bins (DCNv1).

    The branch, `offset_fc`, is that of `dcn_np.layers.DeformRoIPool`, which describes the parameters; so are
    the keys of the state dict. Half features may have regions in float32.

    Parameters
    ----------
    in_channels, output_size, spatial_scale, sampling_ratio, gamma, hidden_channels, position_sensitive
        As there.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        hidden_channels: int = 1024,
        position_sensitive: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_channels, output_size, spatial_scale, sampling_ratio, gamma, position_sensitive)
        made = {"device": device, "dtype": dtype}
        self.offset_fc = self._new_branch((hidden_channels, hidden_channels), 2 * self.bins, made)

    def _made(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.offset_fc(features), None


class ModulatedDeformRoIPool(_DeformRoIPool):
    """A modulated deformable pooling over regions, with what makes its offsets and masks (DCNv2).

    The branches, `offset_mask_fc` or `offset_fc` and `mask_fc`, are those of
    `dcn_np.layers.ModulatedDeformRoIPool`, which describes the parameters; so are the keys of the state dict.

    Parameters
    ----------
    in_channels, output_size, spatial_scale, sampling_ratio, gamma, hidden_channels, position_sensitive
        As there.
    shared_branch, mask_activation
        As there.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        hidden_channels: int = 1024,
        shared_branch: bool = True,
        mask_activation: str = "sigmoid",
        position_sensitive: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_channels, output_size, spatial_scale, sampling_ratio, gamma, position_sensitive)
        self.shared_branch, self.mask_activation = shared_branch, checked_activation(mask_activation)
        made = {"device": device, "dtype": dtype}
        hidden = hidden_channels, hidden_channels
        if shared_branch:
            self.offset_mask_fc = self._new_branch(hidden, 3 * self.bins, made)
        else:
            self.offset_fc = self._new_branch(hidden, 2 * self.bins, made)
            self.mask_fc = self._new_branch(hidden[:1], self.bins, made)

    def _made(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.shared_branch:
            offset, logits = self.offset_mask_fc(features).split([2 * self.bins, self.bins], dim=1)
        else:
            offset, logits = self.offset_fc(features), self.mask_fc(features)
        mask = torch.sigmoid(logits)
        if self.mask_activation != "sigmoid":
            mask = mask * MASK_FACTORS[self.mask_activation]
        return offset, mask
