"""Layers in the checkpoints of other libraries, in this library's convention.

All libraries here keep filters as (out_channels, in_channels / groups, *kernel). They differ in the names of
the keys, and in how the convolution that makes the offsets orders its channels. Their poolings over regions
differ in the branches that make offsets and masks, and in the rule by which they pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy

from .geometry import checked_choice, checked_integers, checked_whole, numbers_per_axis
from .messages import count, listed, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

__all__ = [
    "DeformConvWeights",
    "RoIPoolWeights",
    "layer_from",
    "layers_from",
    "mask_channels",
    "offset_channels",
    "roi_pool_from",
]

MaskActivation: TypeAlias = Literal["sigmoid", "2*sigmoid"]

# What makes masks of a branch's output is this times the logistic function.
MASK_FACTORS = {"sigmoid": 1, "2*sigmoid": 2}


def checked_activation(value: str) -> str:
    """Check what makes masks of a branch's output."""
    return checked_choice("mask_activation", value, MASK_FACTORS)


@dataclass(frozen=True, eq=False)
class DeformConvWeights:
    """The arrays of one layer, and what its checkpoint tells of how to use them.

    The branch is an ordinary convolution of the layer's input, with the layer's kernel size, stride and
    padding. Of its output channels the first 2 * offset_groups * taps are `offset` as `dcn_np.deform_conv`
    takes it: (y, x) of each tap, taps row by row, offset groups outermost. If the layer is modulated,
    offset_groups * taps more follow, which `mask_activation` turns into `mask`.

    Parameters
    ----------
    weight : numpy.ndarray, shape (out_channels, in_channels / groups, *kernel)
        The filters.
    bias : numpy.ndarray, shape (out_channels,), or None
        Added to every output position.
    offset_weight : numpy.ndarray, shape (branch_channels, in_channels, *kernel), or None
        The filters of the branch; None where offsets come from elsewhere (torchvision).
    offset_bias : numpy.ndarray, shape (branch_channels,), or None
        The bias of the branch.
    modulated : bool or None
        Whether the branch makes masks too; None without a branch.
    offset_groups : int or None
        None without a branch.
    mask_activation : {"sigmoid", "2*sigmoid"} or None
        None where no masks are made. All libraries that `layer_from` reads have "sigmoid"; "2*sigmoid", which
        begins at 1, is the form of the example of MXNet.
    offset_dilated : bool or None
        Whether the branch is dilated as the layer is. False: its dilation is 1, whatever the layer's. None
        without a branch.
    """

    weight: Array
    bias: Array | None
    offset_weight: Array | None
    offset_bias: Array | None
    modulated: bool | None
    offset_groups: int | None
    mask_activation: MaskActivation | None
    offset_dilated: bool | None


@dataclass(frozen=True)
class _Library:
    """How a library names the parts of a layer `p`, and what it allows."""

    branches: tuple[str, ...]  # what follows p in the name of the branch, the newest first
    channels_per_tap: tuple[int, ...]  # 2 are offsets, 3 offsets and a mask
    bias: Literal["optional", "always", "if modulated"]
    offset_dilated: bool | None
    groups: bool = True
    ignored: tuple[str, ...] = ()  # what may also lie in p and is no part of the convolution


_LIBRARIES = {
    "torchvision": _Library((), (), "optional", None),
    # mmcv renames <p>_offset to <p>.conv_offset when it reads a checkpoint of version 1.
    "mmcv": _Library((".conv_offset", "_offset"), (2, 3), "if modulated", True),
    "detectron2": _Library(("_offset",), (2, 3), "if modulated", True, ignored=("norm.",)),
    "CharlesShang": _Library((".conv_offset_mask",), (3,), "always", False, groups=False),
    "chengdazhi": _Library((".conv_offset_mask",), (3,), "always", False),
}


def layer_from(
    state_dict: Mapping[str, Array], prefix: str = "", *, library: str, modulated: bool | None = None
) -> DeformConvWeights:
    """Take one layer of deformable convolution out of a state dict.

    Parameters
    ----------
    state_dict : mapping of str to numpy.ndarray
        What `dcn_np.pth.state_dict_of` returns.
    prefix : str
        The name of the layer, such as "backbone.layer2.0.conv2"; "" where the state dict is the layer's own.
    library : {"torchvision", "mmcv", "detectron2", "CharlesShang", "chengdazhi"}
        Whose layer it is.
    modulated : bool or None
        Whether the branch makes masks too. None finds out by the number of its channels and the bias, and is
        an error where both are possible.

    Returns
    -------
    DeformConvWeights
        The arrays themselves, not copies.

    Raises
    ------
    TypeError
        An entry of the state dict is no array.
    ValueError
        A key that is missing or unknown, shapes that do not fit, or a library that is not known.

    See Also
    --------
    layers_from : All layers of a state dict.
    offset_channels : Other orders of channels.

    Notes
    -----
    =============  ==========================  ===================================  ===============
    library        filters                     branch                               bias
    =============  ==========================  ===================================  ===============
    torchvision    <prefix>.weight             none                                 optional
    mmcv           <prefix>.weight             <prefix>.conv_offset,                if modulated
                                               <prefix>_offset before version 2
    detectron2     <prefix>.weight             <prefix>_offset                      if modulated
    CharlesShang   <prefix>.weight             <prefix>.conv_offset_mask            always
    chengdazhi     <prefix>.weight             <prefix>.conv_offset_mask            always
    =============  ==========================  ===================================  ===============

    Where the code of a library splits the output of its branch into three and calls the first two x and y,
    the names mislead: joined again, they are (y, x) of each tap.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.checkpoints import layer_from
    >>> state_dict = {
    ...     "conv2.weight": numpy.zeros((8, 4, 3, 3)),
    ...     "conv2_offset.weight": numpy.zeros((27, 4, 3, 3)),
    ...     "conv2_offset.bias": numpy.zeros(27),
    ... }
    >>> layer = layer_from(state_dict, "conv2", library="detectron2")
    >>> layer.modulated, layer.offset_groups
    (True, 1)
    """
    rules = _rules(library)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is {shown(state_dict)}; wanted a mapping of str to numpy.ndarray")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix is {shown(prefix)}; wanted a string, the name of the layer")
    layer = prefix.removesuffix(".")
    inside = _inside(layer)
    weight = _array(state_dict, f"{inside}weight", 4)
    bias = _array(state_dict, f"{inside}bias", 1) if f"{inside}bias" in state_dict else None
    branch = _branch(state_dict, layer, rules)
    _check_known(state_dict, inside, branch, rules, library)
    if bias is not None:
        _check_shape(f"{inside}bias", bias, (weight.shape[0],), "one per output channel")
    elif rules.bias == "always":
        raise ValueError(f"there is no {inside}bias; a layer of {library} always has one")
    if branch is None:
        return DeformConvWeights(weight, bias, None, None, None, None, None, None)
    return _with_branch(state_dict, branch, weight, bias, rules, library, modulated)


def layers_from(state_dict: Mapping[str, Array], *, library: str) -> dict[str, DeformConvWeights]:
    """Take all layers of deformable convolution out of a state dict.

    Parameters
    ----------
    state_dict : mapping of str to numpy.ndarray
        What `dcn_np.pth.state_dict_of` returns.
    library : {"mmcv", "detectron2", "CharlesShang", "chengdazhi"}
        Whose layers they are. Those of torchvision have no branch to know them by.

    Returns
    -------
    dict of str to DeformConvWeights
        Layers by name, in the order of the state dict: all whose filters and branch are both there. Empty if
        there is none.

    Raises
    ------
    TypeError
        An entry of the state dict is no array.
    ValueError
        A layer is not as `layer_from` wants it, or the library is not known or has no branches.

    See Also
    --------
    layer_from : One layer.
    """
    branches = _rules(library).branches
    if not branches:
        raise ValueError(f"layers of {library} have no branch to know them by; name them to layer_from")
    names: dict[str, None] = {}
    for key in state_dict:
        for end in (f"{branch}.weight" for branch in branches):
            name = f".{key}".removesuffix(end)
            if name != f".{key}" and _inside(name[1:]) + "weight" in state_dict:
                names[name[1:]] = None
    return {name: layer_from(state_dict, name, library=library) for name in names}


# ---- keys and shapes


def _rules(library: str) -> _Library:
    return _LIBRARIES[checked_choice("library", library, _LIBRARIES)]


def _inside(layer: str) -> str:
    return f"{layer}." if layer else ""


def _array(state_dict: Mapping[str, Array], key: str, axes: int) -> Array:
    if key not in state_dict:
        near = [other for other in state_dict if other.startswith(key[: key.rfind(".") + 1])] or [*state_dict]
        there = ", ".join(map(shown, near[:8])) + (", ..." if len(near) > 8 else "")
        raise ValueError(f"there is no key {key!r}; there is {there or 'none at all'}")
    value = state_dict[key]
    if not isinstance(value, numpy.ndarray):
        raise TypeError(f"{key} is {shown(value)}; wanted a numpy.ndarray")
    if value.ndim != axes or 0 in value.shape:
        raise ValueError(
            f"{key} has the shape {value.shape}; wanted {count(axes, 'axis')}, none of them empty"
        )
    return value


def _branch(state_dict: Mapping[str, Array], layer: str, rules: _Library) -> str | None:
    """Return the name of the branch."""
    names = [f"{layer}{branch}".removeprefix(".") for branch in rules.branches]
    there = [name for name in names if f"{name}.weight" in state_dict]
    if len(there) > 1:
        raise ValueError(
            f"there are both {there[0]}.weight and {there[1]}.weight; wanted one branch of a layer"
        )
    return next(iter(there or names), None)


def _check_known(
    state_dict: Mapping[str, Array], inside: str, branch: str | None, rules: _Library, library: str
) -> None:
    known = [f"{inside}weight", f"{inside}bias"]
    known += [f"{branch}.weight", f"{branch}.bias"] if branch else []
    begins = (inside, f"{branch}.") if branch else (inside,)
    ignored = tuple(f"{inside}{name}" for name in rules.ignored)
    _check_only(state_dict, begins, known, library, ignored)


def _check_only(
    state_dict: Mapping[str, Array],
    begins: tuple[str, ...],
    known: Sequence[str],
    library: str,
    ignored: tuple[str, ...] = (),
) -> None:
    for key in state_dict:
        if key.startswith(begins) and key not in known and not key.startswith(ignored):
            raise ValueError(
                f"{key} is {shown(state_dict[key])}; a layer of {library} here has {listed(known)} only"
            )


def _check_shape(key: str, value: Array, wanted: tuple[int, ...], why: str) -> None:
    if value.shape != wanted:
        raise ValueError(f"{key} has the shape {value.shape}; wanted {wanted}, {why}")


def _with_branch(
    state_dict: Mapping[str, Array],
    branch: str,
    weight: Array,
    bias: Array | None,
    rules: _Library,
    library: str,
    modulated: bool | None,
) -> DeformConvWeights:
    offset_weight = _array(state_dict, f"{branch}.weight", 4)
    offset_bias = _array(state_dict, f"{branch}.bias", 1)
    channels, in_channels, *kernel = offset_weight.shape
    _check_shape(f"{branch}.bias", offset_bias, (channels,), f"one per channel of {branch}.weight")
    if tuple(kernel) != weight.shape[2:]:
        raise ValueError(
            f"{branch}.weight has a kernel of {tuple(kernel)}; wanted that of the layer, {weight.shape[2:]}"
        )
    _check_groups(branch, in_channels, weight, rules, library)
    per_tap, offset_groups = _channels_per_tap(branch, offset_weight, bias, rules, library, modulated)
    return DeformConvWeights(
        weight,
        bias,
        offset_weight,
        offset_bias,
        modulated=per_tap == 3,
        offset_groups=offset_groups,
        mask_activation="sigmoid" if per_tap == 3 else None,
        offset_dilated=rules.offset_dilated,
    )


def _check_groups(branch: str, in_channels: int, weight: Array, rules: _Library, library: str) -> None:
    out_channels, each = weight.shape[:2]
    groups, rest = divmod(in_channels, each)
    came = f"{branch}.weight takes {count(in_channels, 'input channel')} and each filter of the layer {each}"
    if rest or out_channels % groups:
        raise ValueError(f"{came}; wanted a multiple, in groups that divide the {out_channels} filters")
    if groups > 1 and not rules.groups:
        raise ValueError(f"{came}; wanted as many, since {library} has no groups")


def _channels_per_tap(
    branch: str,
    offset_weight: Array,
    bias: Array | None,
    rules: _Library,
    library: str,
    modulated: bool | None,
) -> tuple[int, int]:
    """Return 2 for offsets or 3 for offsets and masks, and the number of offset groups."""
    channels, in_channels, *kernel = offset_weight.shape
    taps = int(numpy.prod(kernel))
    allowed = [
        per_tap
        for per_tap in rules.channels_per_tap
        if modulated in (None, per_tap == 3) and not (per_tap == 2 and bias is not None)
    ]
    fitting = {
        per_tap: channels // (per_tap * taps)
        for per_tap in allowed
        if channels % (per_tap * taps) == 0 and in_channels % (channels // (per_tap * taps)) == 0
    }
    if len(fitting) != 1:
        raise ValueError(_not_one(branch, channels, taps, in_channels, allowed, fitting, library))
    return next(iter(fitting.items()))


def _not_one(
    branch: str,
    channels: int,
    taps: int,
    in_channels: int,
    allowed: Sequence[int],
    fitting: Mapping[int, int],
    library: str,
) -> str:
    """Say why the channels of a branch fit no layer, or two."""
    came = f"{branch}.weight has {count(channels, 'channel')}"
    if fitting:
        return (
            f"{came}: 2*{taps}*{fitting[2]} offsets, or 3*{taps}*{fitting[3]} offsets and masks; "
            "say modulated=False or modulated=True"
        )
    wanted = " or ".join(f"{per_tap}*{taps}*offset_groups" for per_tap in allowed)
    return (
        f"{came}; a layer of {library} as asked for has {wanted or 'no branch of this kind'}, "
        f"where offset_groups divides the {count(in_channels, 'input channel')}"
    )


# ---- poolings over regions


@dataclass(frozen=True, eq=False)
class RoIPoolWeights:
    """The arrays of one pooling over regions, and what its checkpoint tells of how to use them.

    A regular pooling, one row for each region, goes through fully connected layers with ReLU between. They
    make 2 * bins offsets of each region, x of all bins, then y, row by row as `dcn_np.deform_roi_pool` takes
    them; and if the layer is modulated, bins more numbers, which `mask_activation` turns into masks.

    Parameters
    ----------
    arrays : dict of str to numpy.ndarray
        The weights, (outputs, inputs), and biases of the branches, by the keys of the state dicts of
        `dcn_np.layers`: "offset_fc.0.weight", "offset_fc.0.bias" and so on.
    modulated : bool
        Whether there are masks too.
    shared_branch : bool or None
        Whether one branch, `offset_mask_fc`, makes offsets and masks, or `mask_fc` masks beside `offset_fc`.
        None without masks.
    in_channels : int
        The channels of the maps.
    bins : int
        Of each region: the product of height and width of the result.
    hidden_channels : int
        The width of the hidden layers.
    mask_activation : {"sigmoid", "2*sigmoid"} or None
        None where no masks are made. All libraries that `roi_pool_from` reads have "sigmoid".
    position_sensitive : bool
        Whether the library pools by the rule of `dcn_np.deform_psroi_pool`, with one group, and not by that
        of `dcn_np.deform_roi_pool`.
    """

    arrays: dict[str, Array]
    modulated: bool
    shared_branch: bool | None
    in_channels: int
    bins: int
    hidden_channels: int
    mask_activation: MaskActivation | None
    position_sensitive: bool


@dataclass(frozen=True)
class _FullyConnected:
    """A branch: how many layers it has, and what it makes for each bin."""

    layers: int
    per_bin: int


_FULLY_CONNECTED = {
    "offset_fc": _FullyConnected(3, 2),
    "mask_fc": _FullyConnected(2, 1),
    "offset_mask_fc": _FullyConnected(3, 3),
}


@dataclass(frozen=True)
class _PoolingLibrary:
    """Which branches a layer of a library may have together, and by which rule it pools."""

    branches: tuple[tuple[str, ...], ...]
    position_sensitive: bool


_SHARED = ("offset_mask_fc",)
_SEPARATE = (("offset_fc",), ("offset_fc", "mask_fc"))
_POOLING_LIBRARIES = {
    "mmcv": _PoolingLibrary(_SEPARATE, False),
    "CharlesShang": _PoolingLibrary((_SHARED,), True),
    # Versions differ in whether masks have a branch of their own.
    "chengdazhi": _PoolingLibrary((*_SEPARATE, _SHARED), True),
}


def roi_pool_from(state_dict: Mapping[str, Array], prefix: str = "", *, library: str) -> RoIPoolWeights:
    """Take one deformable pooling over regions, with its branches, out of a state dict.

    Parameters
    ----------
    state_dict : mapping of str to numpy.ndarray
        What `dcn_np.pth.state_dict_of` returns.
    prefix : str
        The name of the layer, such as "roi_head.bbox_roi_extractor.roi_layers.0"; "" where the state dict is
        the layer's own.
    library : {"mmcv", "CharlesShang", "chengdazhi"}
        Whose layer it is.

    Returns
    -------
    RoIPoolWeights
        The arrays themselves, not copies.

    Raises
    ------
    TypeError
        An entry of the state dict is no array, or the library no string.
    ValueError
        A key that is missing or unknown, shapes that do not fit, or a library that is not known.

    See Also
    --------
    layer_from : The same for convolutions.

    Notes
    -----
    =============  =====================================================  ======================
    library        branches                                               pools as
    =============  =====================================================  ======================
    mmcv           offset_fc; modulated also mask_fc                      `deform_roi_pool`
    CharlesShang   offset_mask_fc                                         `deform_psroi_pool`
    chengdazhi     offset_fc; modulated also mask_fc, or offset_mask_fc   `deform_psroi_pool`
    =============  =====================================================  ======================

    mmdet 1 has the layers of chengdazhi; poolings of mmdet 2 and later are mmcv's.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.checkpoints import roi_pool_from
    >>> shapes = {0: (16, 8 * 49), 2: (16, 16), 4: (3 * 49, 16)}
    >>> state_dict = {f"offset_mask_fc.{i}.weight": numpy.zeros(shape) for i, shape in shapes.items()}
    >>> state_dict |= {f"offset_mask_fc.{i}.bias": numpy.zeros(shape[0]) for i, shape in shapes.items()}
    >>> layer = roi_pool_from(state_dict, library="CharlesShang")
    >>> layer.modulated, layer.in_channels, layer.bins, layer.hidden_channels
    (True, 8, 49, 16)
    """
    rules = _POOLING_LIBRARIES[checked_choice("library", library, _POOLING_LIBRARIES)]
    inside = _inside(prefix.removesuffix("."))
    branches = _branches_there(state_dict, inside, rules, library)
    in_channels, bins, hidden = _sizes_of_pooling(state_dict, inside, branches[0])
    arrays: dict[str, Array] = {}
    for branch in branches:
        arrays |= _fully_connected(state_dict, inside, branch, in_channels, bins, hidden)
    _check_only(state_dict, (inside,), [f"{inside}{key}" for key in arrays], library)
    modulated = branches != ("offset_fc",)
    return RoIPoolWeights(
        arrays,
        modulated=modulated,
        shared_branch=branches == _SHARED if modulated else None,
        in_channels=in_channels,
        bins=bins,
        hidden_channels=hidden,
        mask_activation="sigmoid" if modulated else None,
        position_sensitive=rules.position_sensitive,
    )


def _branches_there(
    state_dict: Mapping[str, Array], inside: str, rules: _PoolingLibrary, library: str
) -> tuple[str, ...]:
    """Return the names of the branches, those with offsets first."""
    there = tuple(
        branch
        for branch in _FULLY_CONNECTED
        if any(key.startswith(f"{inside}{branch}.") for key in state_dict)
    )
    if there and there not in rules.branches:
        wanted = ", or ".join(" and ".join(names) for names in rules.branches)
        layer = inside.removesuffix(".") or "the state dict"
        raise ValueError(f"{layer} has {' and '.join(there)}; a pooling of {library} has {wanted}")
    return there or rules.branches[0]


def _sizes_of_pooling(state_dict: Mapping[str, Array], inside: str, branch: str) -> tuple[int, int, int]:
    """Return the channels of the maps, the number of bins, and the width of the hidden layers."""
    form = _FULLY_CONNECTED[branch]
    first = f"{inside}{branch}.0.weight"
    hidden, features = _array(state_dict, first, 2).shape
    last = f"{inside}{branch}.{2 * form.layers - 2}.weight"
    outputs = _array(state_dict, last, 2).shape[0]
    bins, rest = divmod(outputs, form.per_bin)
    if rest:
        raise ValueError(f"{last} has {count(outputs, 'output')}; wanted {form.per_bin} for each bin")
    in_channels, rest = divmod(features, bins)
    if rest:
        raise ValueError(
            f"{first} has {count(features, 'input')}; {last} is of {count(bins, 'bin')}: wanted a multiple"
        )
    return in_channels, bins, hidden


def _fully_connected(
    state_dict: Mapping[str, Array], inside: str, branch: str, in_channels: int, bins: int, hidden: int
) -> dict[str, Array]:
    """Return the arrays of a branch by their keys in the layer."""
    form = _FULLY_CONNECTED[branch]
    widths = [in_channels * bins, *[hidden] * (form.layers - 1), form.per_bin * bins]
    why = f"for {count(in_channels, 'channel')}, {count(bins, 'bin')} and {hidden} hidden channels"
    arrays = {}
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        for what, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            key = f"{branch}.{2 * index}.{what}"
            arrays[key] = _array(state_dict, inside + key, len(shape))
            _check_shape(inside + key, arrays[key], shape, why)
    return arrays


# ---- orders of channels


@dataclass(frozen=True)
class _Order:
    """Where a library has the (y, x) of tap t of group g, of `taps` and `groups`; and its mask.

    t counts column by column if `columns`. If `packed`, masks are in the tensor of the offsets.
    """

    y: Callable[[Array, Array, int, int], Array]
    x: Callable[[Array, Array, int, int], Array]
    mask: Callable[[Array, Array, int, int], Array] | None
    columns: bool = False
    packed: bool = False
    groups: bool = True


def _in_turn(g: Array, t: Array, groups: int, taps: int) -> Array:
    return g * taps + t


_INTERLEAVED = _Order(
    y=lambda g, t, groups, taps: 2 * (g * taps + t),
    x=lambda g, t, groups, taps: 2 * (g * taps + t) + 1,
    mask=_in_turn,
)

_ORDERS = {
    **dict.fromkeys(_LIBRARIES, _INTERLEAVED),
    "Chainer": _Order(
        y=lambda g, t, groups, taps: taps + t, x=lambda g, t, groups, taps: t, mask=None, groups=False
    ),
    "4uiiurz1": _Order(
        y=lambda g, t, groups, taps: t, x=lambda g, t, groups, taps: taps + t, mask=_in_turn, groups=False
    ),
    "MindSpore": _Order(
        y=lambda g, t, groups, taps: groups * taps + g * taps + t,
        x=_in_turn,
        mask=lambda g, t, groups, taps: 2 * groups * taps + g * taps + t,
        packed=True,
    ),
    "DCNv3": _Order(
        y=lambda g, t, groups, taps: 2 * (g * taps + t) + 1,
        x=lambda g, t, groups, taps: 2 * (g * taps + t),
        mask=_in_turn,
        columns=True,
    ),
    "DCNv4": _Order(
        y=lambda g, t, groups, taps: g * 3 * taps + 2 * t + 1,
        x=lambda g, t, groups, taps: g * 3 * taps + 2 * t,
        mask=lambda g, t, groups, taps: g * 3 * taps + 2 * taps + t,
        columns=True,
        packed=True,
    ),
}


def offset_channels(
    library: str, kernel: int | tuple[int, int], offset_groups: int = 1
) -> NDArray[numpy.intp]:
    """Return where another library has the channels of `offset`, in the order of this one.

    Parameters
    ----------
    library : str
        "Chainer", "4uiiurz1", "MindSpore", "DCNv3" or "DCNv4"; or one that `layer_from` reads, whose order is
        the one here.
    kernel : int or (int, int)
        The height and width of the kernel.
    offset_groups : int
        The number of offset groups.

    Returns
    -------
    numpy.ndarray, shape (2 * offset_groups * taps,) or (3 * offset_groups * taps,)
        For an array `theirs` with that library's channels on axis 1, `theirs[:, index]` has them as
        `dcn_np.deform_conv` wants them. The longer form is for MindSpore and DCNv4, which keep masks in the
        same array: offsets come first, then the masks. The filters and the bias of the convolution that makes
        them are reordered by `weight[index]` and `bias[index]`.

    Raises
    ------
    TypeError, ValueError
        A library that is not known, sizes below 1 or no integers, or offset groups where it has none.

    See Also
    --------
    mask_channels : The same for masks in an array of their own.

    Notes
    -----
    =============  ==============================================================================
    Chainer        x of all taps, then y of all taps; no offset groups
    4uiiurz1       y of all taps, then x of all taps; no offset groups
    MindSpore      x of all taps of all groups, then y of all, then the masks of all
    DCNv3          (x, y) of each tap, taps column by column, groups outermost
    DCNv4          for each group: (x, y) of each tap, taps column by column, then its masks
    =============  ==============================================================================

    DCNv3 and DCNv4 have channels on the last axis, and DCNv4 may have more than are used here, at the end.
    Where they drop the tap of the centre, there is no such order. 4uiiurz1 samples otherwise at the border
    than `dcn_np.deform_conv`.

    Examples
    --------
    >>> from dcn_np.checkpoints import offset_channels
    >>> offset_channels("Chainer", (1, 3))
    array([3, 0, 4, 1, 5, 2])
    """
    order, g, t, groups, taps = _places(library, kernel, offset_groups)
    offsets = numpy.stack([order.y(g, t, groups, taps), order.x(g, t, groups, taps)], axis=-1).ravel()
    if order.mask is None or not order.packed:
        return offsets
    return numpy.concatenate([offsets, order.mask(g, t, groups, taps).ravel()])


def mask_channels(library: str, kernel: int | tuple[int, int], offset_groups: int = 1) -> NDArray[numpy.intp]:
    """Return where another library has the channels of `mask`, in the order of this one.

    Parameters
    ----------
    library : str
        "4uiiurz1" or "DCNv3"; or one that `layer_from` reads, whose order is the one here.
    kernel : int or (int, int)
        The height and width of the kernel.
    offset_groups : int
        The number of offset groups.

    Returns
    -------
    numpy.ndarray, shape (offset_groups * taps,)
        For an array `theirs` of that library's masks with channels on axis 1, `theirs[:, index]` has them as
        `dcn_np.modulated_deform_conv` wants them.

    Raises
    ------
    TypeError, ValueError
        As for `offset_channels`; or a library that has no masks, or keeps them in the array of the offsets.

    See Also
    --------
    offset_channels : The same for offsets.

    Examples
    --------
    >>> from dcn_np.checkpoints import mask_channels
    >>> mask_channels("DCNv3", (2, 2))
    array([0, 2, 1, 3])
    """
    order, g, t, groups, taps = _places(library, kernel, offset_groups)
    if order.mask is None:
        raise ValueError(f"{library} has no masks")
    if order.packed:
        raise ValueError(f"{library} has masks and offsets in one array: offset_channels orders both")
    return order.mask(g, t, groups, taps).ravel()


def _places(
    library: str, kernel: int | tuple[int, int], groups: int
) -> tuple[_Order, NDArray[numpy.intp], NDArray[numpy.intp], int, int]:
    """Return the library's order, and each group and tap by its number there, taps in the order of ours."""
    order = _ORDERS[checked_choice("library", library, _ORDERS)]
    height, width = numbers_per_axis("kernel", checked_integers("kernel", kernel, 1), 2)
    groups = checked_whole("offset_groups", groups)
    if groups > 1 and not order.groups:
        raise ValueError(f"offset_groups is {groups}; {library} has no offset groups: wanted 1")
    taps = numpy.arange(height * width, dtype=numpy.intp)
    if order.columns:
        taps = taps.reshape(width, height).T.ravel()
    return order, numpy.arange(groups, dtype=numpy.intp)[:, None], taps, groups, height * width
