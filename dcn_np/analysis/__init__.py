"""What a node of a network sees: where it samples, its receptive field, the region that it rests on.

NumPy alone is needed. Each function takes arrays, or a callable that gives a response and its gradient by the
image; `dcn_np.analysis.torch` makes such a callable of a module of PyTorch. `dcn_np.analysis.plot` draws what
they find, with matplotlib.
"""

from .nodes import GlobalAveragePool, LayersNode, Node, NodeFunction, ReLU, of_layers
from .offset_statistics import OffsetRecord, offset_statistics, offset_table
from .receptive_field import ReceptiveField, effective_receptive_field
from .regions import SampledRegions, bin_positions, effective_bins
from .saliency import SaliencyStep, SalientRegion, error_bounded_saliency
from .sampling import SampledLayer, SamplingTrace, sampling_positions, trace_sampling
from .strength import effective_sampling
from .views import NodeView, view_node

__all__ = [
    "GlobalAveragePool",
    "LayersNode",
    "Node",
    "NodeFunction",
    "NodeView",
    "OffsetRecord",
    "ReLU",
    "ReceptiveField",
    "SaliencyStep",
    "SalientRegion",
    "SampledLayer",
    "SampledRegions",
    "SamplingTrace",
    "bin_positions",
    "effective_bins",
    "effective_receptive_field",
    "effective_sampling",
    "error_bounded_saliency",
    "of_layers",
    "offset_statistics",
    "offset_table",
    "sampling_positions",
    "trace_sampling",
    "view_node",
]
