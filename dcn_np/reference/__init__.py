"""The specification in plain NumPy: slow, obvious, written from the definitions; kernels are checked by it.

    deform_conv     deformable convolution, of any rank
    roi_pool        pooling of regions: regular, deformable, modulated, position-sensitive
    feature_mimic   the loss between two sets of features

It shares no code with the kernels, imports numpy only and checks no arguments. The signatures are the public
ones, with `dtype` for what to compute in.
"""

from .deform_conv import (
    Gradients,
    deform_conv,
    deform_conv_backward,
    error_scales,
    modulated_deform_conv,
    modulated_deform_conv_backward,
)
from .feature_mimic import feature_mimic_loss, feature_mimic_loss_backward
from .roi_pool import (
    RoIGradients,
    deform_psroi_pool,
    deform_psroi_pool_backward,
    deform_roi_pool,
    deform_roi_pool_backward,
    modulated_deform_roi_pool,
    modulated_deform_roi_pool_backward,
    roi_align,
    roi_align_backward,
    roi_error_scales,
)

__all__ = [
    "Gradients",
    "RoIGradients",
    "deform_conv",
    "deform_conv_backward",
    "deform_psroi_pool",
    "deform_psroi_pool_backward",
    "deform_roi_pool",
    "deform_roi_pool_backward",
    "error_scales",
    "feature_mimic_loss",
    "feature_mimic_loss_backward",
    "modulated_deform_conv",
    "modulated_deform_conv_backward",
    "modulated_deform_roi_pool",
    "modulated_deform_roi_pool_backward",
    "roi_align",
    "roi_align_backward",
    "roi_error_scales",
]
