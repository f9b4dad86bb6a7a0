"""Deformable convolution for every array.

    deform_conv ─► geometry, arrays        what comes in is checked once (roi_pool ─► roi_geometry)
                └► backends ─► cpu ─► _native ─► C++ for one instruction set
                            └► cuda ─► kernels compiled by NVRTC

Each module imports only what stands to its right or below. ARCHITECTURE.md says which file answers which
question.
"""

from . import _requirements as _requirements  # first: the others want what it checks
from .backends import Gradients, RoIGradients
from .cpu import available_isas, isa, use_isa
from .deform_conv import (
    deform_conv,
    deform_conv_backward,
    get_float32_matmul,
    modulated_deform_conv,
    modulated_deform_conv_backward,
    set_float32_matmul,
)
from .feature_mimic import feature_mimic_loss, feature_mimic_loss_backward
from .roi_pool import (
    deform_psroi_pool,
    deform_psroi_pool_backward,
    deform_roi_pool,
    deform_roi_pool_backward,
    modulated_deform_roi_pool,
    modulated_deform_roi_pool_backward,
    roi_align,
    roi_align_backward,
)
from .threads import get_num_threads, num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "Gradients",
    "RoIGradients",
    "available_isas",
    "deform_conv",
    "deform_conv_backward",
    "deform_psroi_pool",
    "deform_psroi_pool_backward",
    "deform_roi_pool",
    "deform_roi_pool_backward",
    "feature_mimic_loss",
    "feature_mimic_loss_backward",
    "get_float32_matmul",
    "get_num_threads",
    "isa",
    "modulated_deform_conv",
    "modulated_deform_conv_backward",
    "modulated_deform_roi_pool",
    "modulated_deform_roi_pool_backward",
    "num_threads",
    "roi_align",
    "roi_align_backward",
    "set_float32_matmul",
    "set_num_threads",
    "use_isa",
]
