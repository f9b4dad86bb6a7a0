"""What a node of a network sees: where it samples, its receptive field, the region that it rests on.

NumPy alone is needed. Each function takes arrays, or a callable that gives a response and its gradient by the
image; `dcn_np.analysis.torch` makes such a callable of a module of PyTorch.
"""

from .sampling import SampledLayer, SamplingTrace, sampling_positions, trace_sampling
from .strength import bin_positions, effective_bins, effective_sampling

__all__ = [
    "SampledLayer",
    "SamplingTrace",
    "bin_positions",
    "effective_bins",
    "effective_sampling",
    "sampling_positions",
    "trace_sampling",
]
