"""Layers from the checkpoints of other libraries: each against its library's definition, in plain loops.

`evaluated` computes a layer from the library's own tensors. What a library does to them before is written as
that library does it, and shares nothing with dcn_np.
"""

import itertools
import math

import numpy as np
import pytest

import dcn_np
from dcn_np.checkpoints import layer_from, layers_from, mask_channels, offset_channels, roi_pool_from
from dcn_np.layers import DeformRoIPool, ModulatedDeformRoIPool

RNG = np.random.default_rng(0)

# ---- the definitions


def sample(image, y, x):
    """Interpolate between the four pixels around a point; there are zeros outside."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column]
    return total


def evaluated(x, weight, bias, moved, factor, offset_groups, stride=1, padding=0, dilation=1):
    """Sum over channels and taps; moved(n, g, i, j, row, column) is (dy, dx), factor(...) the mask."""
    out_channels, each, height, width = weight.shape
    rows = (x.shape[2] + 2 * padding - dilation * (height - 1) - 1) // stride + 1
    columns = (x.shape[3] + 2 * padding - dilation * (width - 1) - 1) // stride + 1
    groups = x.shape[1] // each
    y = np.zeros((len(x), out_channels, rows, columns))
    for n, o, row, column in np.ndindex(*y.shape):
        y[n, o, row, column] = 0 if bias is None else bias[o]
        for c, i, j in np.ndindex(each, height, width):
            channel = o // (out_channels // groups) * each + c
            place = (n, channel // (x.shape[1] // offset_groups), i, j, row, column)
            dy, dx = moved(*place)
            at = sample(
                x[n, channel],
                row * stride - padding + i * dilation + dy,
                column * stride - padding + j * dilation + dx,
            )
            y[n, o, row, column] += weight[o, c, i, j] * factor(*place) * at
    return y


def still(*place):
    return 0.0, 0.0


def whole(*place):
    return 1.0


def convolved(x, weight, bias, **window):
    return evaluated(x, weight, bias, still, whole, 1, **window)


def logistic(values):
    return 1 / (1 + np.exp(-values))


def interleaved(offset, height, width):
    """Read offsets as torchvision, mmcv, detectron2 and their kin do: two channels a tap, y before x."""

    def moved(n, g, i, j, row, column):
        pair = offset[n].reshape(-1, height * width, 2, *offset.shape[2:])[g, i * width + j]
        return pair[0, row, column], pair[1, row, column]

    return moved


def in_turn(mask, height, width):
    return lambda n, g, i, j, row, column: mask[n, g * height * width + i * width + j, row, column]


# ---- layers with a branch


def drawn(*shape):
    return RNG.standard_normal(shape)


def arrays(per_tap, groups=2, offset_groups=2, bias=True, kernel=(3, 2), channels=4):
    branch = per_tap * math.prod(kernel) * offset_groups
    return {
        "weight": drawn(6, channels // groups, *kernel),
        **({"bias": drawn(6)} if bias else {}),
        "offset.weight": 0.3 * drawn(branch, channels, *kernel),
        "offset.bias": drawn(branch),
    }


def named(layer, weight, branch):
    """Give the arrays of a layer the names of a library."""
    ends = {"weight": f"{weight}weight", "bias": f"{weight}bias"}
    return {ends.get(key, f"{branch}.{key.removeprefix('offset.')}"): value for key, value in layer.items()}


def computed(layer, x, groups=1, **window):
    """Run a layer as the documentation of DeformConvWeights says."""
    own = window | ({} if layer.offset_dilated else {"dilation": 1})
    made = dcn_np.deform_conv(x, None, layer.offset_weight, layer.offset_bias, **own)
    offsets = 2 * layer.offset_groups * math.prod(layer.weight.shape[2:])
    mask = logistic(made[:, offsets:]) if layer.modulated else None
    assert layer.mask_activation == ("sigmoid" if layer.modulated else None)
    return dcn_np.modulated_deform_conv(
        x,
        made[:, :offsets],
        mask,
        layer.weight,
        layer.bias,
        groups=groups,
        offset_groups=layer.offset_groups,
        **window,
    )


def by_definition(layer, x, modulated, offset_groups, dilated, **window):
    """Run the arrays as mmcv, detectron2, CharlesShang's and chengdazhi's layers do."""
    height, width = layer["weight"].shape[2:]
    own = window if dilated else window | {"dilation": 1}
    made = convolved(x, layer["offset.weight"], layer["offset.bias"], **own)
    factor = whole
    if modulated:
        first, second, mask = np.split(made, 3, axis=1)
        made, factor = np.concatenate([first, second], axis=1), in_turn(logistic(mask), height, width)
    moved = interleaved(made, height, width)
    return evaluated(x, layer["weight"], layer.get("bias"), moved, factor, offset_groups, **window)


# Library, does it make masks, the names of filters and branch, the prefix, and what the library allows.
WIDE = {"stride": 2, "padding": 2, "dilation": 2}
NARROW = {"stride": 2, "padding": 1}
LAYERS = {
    "mmcv DCN": ("mmcv", False, "a.conv2.", "a.conv2.conv_offset", "a.conv2", {"bias": False}, WIDE),
    "mmcv DCN, version 1": ("mmcv", False, "a.conv2.", "a.conv2_offset", "a.conv2", {"bias": False}, WIDE),
    "mmcv DCNv2": ("mmcv", True, "conv2.", "conv2.conv_offset", "conv2.", {}, WIDE),
    "mmcv DCNv2, version 1": ("mmcv", True, "conv2.", "conv2_offset", "conv2", {"bias": False}, WIDE),
    "mmcv DCNv2 alone": ("mmcv", True, "", "conv_offset", "", {}, WIDE),
    "detectron2 v1": (
        "detectron2",
        False,
        "r.0.conv2.",
        "r.0.conv2_offset",
        "r.0.conv2",
        {"bias": False},
        WIDE,
    ),
    "detectron2 v2": (
        "detectron2",
        True,
        "r.0.conv2.",
        "r.0.conv2_offset",
        "r.0.conv2",
        {"bias": False},
        WIDE,
    ),
    "CharlesShang": ("CharlesShang", True, "up.", "up.conv_offset_mask", "up", {"groups": 1}, NARROW),
    "chengdazhi": ("chengdazhi", True, "c.", "c.conv_offset_mask", "c", {}, NARROW),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_computes_what_its_library_does(case):
    library, modulated, filters, branch, prefix, options, window = LAYERS[case]
    layer = arrays(3 if modulated else 2, **options)
    state_dict = named(layer, filters, branch)
    read = layer_from(state_dict, prefix, library=library, modulated=modulated)
    assert read.modulated is modulated
    assert read.offset_groups == 2
    assert read.offset_dilated is ("dilation" in window)
    x = drawn(1, 4, 5, 4)
    wanted = by_definition(layer, x, modulated, 2, read.offset_dilated, **window)
    assert np.allclose(computed(read, x, groups=options.get("groups", 2), **window), wanted, 1e-12, 1e-12)


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_keeps_its_arrays(case):
    library, modulated, filters, branch, prefix, options, _ = LAYERS[case]
    layer = arrays(3 if modulated else 2, **options)
    read = layer_from(named(layer, filters, branch), prefix, library=library, modulated=modulated)
    assert read.weight is layer["weight"]
    assert read.bias is layer.get("bias")
    assert read.offset_weight is layer["offset.weight"]
    assert read.offset_bias is layer["offset.bias"]


@pytest.mark.parametrize("bias", [True, False])
def test_torchvision(bias):
    weight, x = drawn(4, 2, 3, 2), drawn(1, 4, 5, 4)
    state_dict = {"layer.weight": weight} | ({"layer.bias": drawn(4)} if bias else {})
    layer = layer_from(state_dict, "layer", library="torchvision")
    assert layer.weight is weight
    assert layer.bias is state_dict.get("layer.bias")
    assert layer.offset_weight is layer.offset_bias is layer.modulated is layer.offset_groups is None
    offset, mask = drawn(1, 24, 3, 3), drawn(1, 12, 3, 3)
    wanted = evaluated(x, weight, layer.bias, interleaved(offset, 3, 2), in_turn(mask, 3, 2), 2)
    got = dcn_np.modulated_deform_conv(x, offset, mask, layer.weight, layer.bias, groups=2, offset_groups=2)
    assert np.allclose(got, wanted, 1e-12, 1e-12)


@pytest.mark.parametrize(
    ("channels", "in_channels", "bias", "modulated", "offset_groups"),
    [
        (18, 4, False, False, 1),
        (27, 4, False, True, 1),
        (72, 4, False, False, 4),
        (108, 256, False, True, 4),  # 6 groups of offsets do not divide 256 channels
        (54, 6, True, True, 2),  # without masks there is no bias
    ],
)
def test_masks_are_known_by_the_number_of_channels(channels, in_channels, bias, modulated, offset_groups):
    state_dict = {
        "weight": drawn(2, in_channels, 3, 3),
        "conv_offset.weight": drawn(channels, in_channels, 3, 3),
        "conv_offset.bias": drawn(channels),
    } | ({"bias": drawn(2)} if bias else {})
    layer = layer_from(state_dict, library="mmcv")
    assert (layer.modulated, layer.offset_groups) == (modulated, offset_groups)


def test_masks_that_may_be_or_not_must_be_told():
    state_dict = named(arrays(3, 1, 2, bias=False, kernel=(3, 3), channels=6), "", "conv_offset")
    with pytest.raises(
        ValueError, match=r"has 54 channels: 2\*9\*3 offsets, or 3\*9\*2 offsets and masks; say"
    ):
        layer_from(state_dict, library="mmcv")
    assert layer_from(state_dict, library="mmcv", modulated=True).offset_groups == 2
    assert layer_from(state_dict, library="mmcv", modulated=False).offset_groups == 3


# ---- finding layers


def test_all_layers_are_found():
    one, two = arrays(3, offset_groups=1), arrays(2, offset_groups=1, bias=False)
    other = {"conv1.weight": drawn(2, 2, 3, 3), "fc.bias": drawn(3), "offset.weight": drawn(2)}
    state_dict = (
        other | named(two, "b.conv2.", "b.conv2_offset") | named(one, "a.conv2.", "a.conv2.conv_offset")
    )
    layers = layers_from(state_dict, library="mmcv")
    assert list(layers) == ["b.conv2", "a.conv2"]
    assert [layer.modulated for layer in layers.values()] == [False, True]
    assert layers["a.conv2"].weight is one["weight"]
    assert list(layers_from(state_dict, library="detectron2")) == ["b.conv2"]
    assert layers_from(state_dict, library="chengdazhi") == {}


def test_a_layer_alone_is_found():
    state_dict = named(arrays(3), "", "conv_offset_mask")
    assert list(layers_from(state_dict, library="chengdazhi")) == [""]


def test_torchvision_has_nothing_to_find_layers_by():
    with pytest.raises(ValueError, match="layers of torchvision have no branch"):
        layers_from({}, library="torchvision")


def test_norms_of_detectron2_are_left_out():
    layer = named(arrays(3, bias=False), "conv2.", "conv2_offset")
    norm = {"conv2.norm.weight": drawn(6), "conv2.norm.running_var": drawn(6), "conv3.weight": drawn(2)}
    assert layer_from(layer | norm, "conv2", library="detectron2", modulated=True).offset_groups == 2


# ---- what does not fit

GOOD = named(arrays(3, groups=1, offset_groups=1), "c.", "c.conv_offset")

WRONG = {
    "no filters": (
        {"c.weight": None},
        "there is no key 'c.weight'; there is 'c.bias', 'c.conv_offset.weight'",
    ),
    "no branch": ({"c.conv_offset.weight": None}, "c.conv_offset.weight"),
    "no bias of the branch": ({"c.conv_offset.bias": None}, "there is no key 'c.conv_offset.bias'"),
    "an unknown key": (
        {"c.scale": drawn(3)},
        r"c.scale is an array \(ndarray\) of shape \(3,\); a layer of mmcv",
    ),
    "an unknown key of the branch": ({"c.conv_offset.mask": drawn(3)}, "c.conv_offset.mask is an array"),
    "both branches": (
        {"c_offset.weight": drawn(18, 4, 3, 2)},
        "both c.conv_offset.weight and c_offset.weight",
    ),
    "filters of one axis": ({"c.weight": drawn(3)}, r"c.weight has the shape \(3,\); wanted 4 axes"),
    "empty filters": ({"c.weight": drawn(0, 4, 3, 2)}, "none of them empty"),
    "no array": ({"c.weight": [1.0]}, r"c.weight is \[1.0\] \(list\); wanted a numpy.ndarray"),
    "a bias of another size": (
        {"c.bias": drawn(5)},
        r"c.bias has the shape \(5,\); wanted \(6,\), one per output",
    ),
    "a bias of the branch": (
        {"c.conv_offset.bias": drawn(5)},
        r"shape \(5,\); wanted \(18,\), one per channel",
    ),
    "another kernel": (
        {"c.conv_offset.weight": drawn(18, 4, 1, 1)},
        r"kernel of \(1, 1\); wanted that of the",
    ),
    "no groups that fit": (
        {"c.weight": drawn(6, 3, 3, 2)},
        "takes 4 input channels and each filter of the layer 3",
    ),
    "groups of filters": ({"c.weight": drawn(6, 1, 3, 2)}, "in groups that divide the 6 filters"),
    "channels of the branch": (
        {"c.conv_offset.weight": drawn(20, 4, 3, 2), "c.conv_offset.bias": drawn(20)},
        r"has 20 channels; a layer of mmcv as asked for has 3\*6\*offset_groups",
    ),
    "masks that have no room": (
        {"c.conv_offset.weight": drawn(12, 4, 3, 2), "c.conv_offset.bias": drawn(12)},
        "has 12 channels; a layer of mmcv",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(case):
    changes, message = WRONG[case]
    state_dict = {key: value for key, value in (GOOD | changes).items() if value is not None}
    with pytest.raises(TypeError if case == "no array" else ValueError, match=message):
        layer_from(state_dict, "c", library="mmcv")


def test_rules_of_single_libraries():
    grouped = named(arrays(3, groups=2), "c.", "c.conv_offset_mask")
    with pytest.raises(ValueError, match="wanted as many, since CharlesShang has no groups"):
        layer_from(grouped, "c", library="CharlesShang")
    for library in ("CharlesShang", "chengdazhi"):
        with pytest.raises(ValueError, match=f"there is no c.bias; a layer of {library} always has one"):
            layer_from(
                named(arrays(3, groups=1, bias=False), "c.", "c.conv_offset_mask"), "c", library=library
            )
    with pytest.raises(ValueError, match=r"c\.conv_offset\.weight is an array"):
        layer_from(GOOD, "c", library="torchvision")
    with pytest.raises(ValueError, match="as asked for has no branch of this kind"):
        layer_from(GOOD, "c", library="mmcv", modulated=False)
    for function in (layer_from, layers_from):
        with pytest.raises(ValueError, match="library is 'keras'; wanted one of 'torchvision', 'mmcv'"):
            function(GOOD, library="keras")
        with pytest.raises(TypeError, match=r"^library is \['mmcv'\] \(list\); wanted one of"):
            function(GOOD, library=["mmcv"])
    with pytest.raises(TypeError, match=r"^state_dict is None; wanted a mapping"):
        layer_from(None, library="torchvision")
    with pytest.raises(TypeError, match=r"^prefix is None; wanted a string"):
        layer_from(GOOD, None, library="torchvision")


# ---- poolings over regions

POOL, SCALE, SAMPLES, GAMMA = 2, 0.5, 2, 0.2
REGIONS = [(1, 2.25, 1.75, 10.5, 8.5), (0, 0.75, 3.25, 7.5, 11.25), (1, -3.25, 5.5, 6.75, 13.25)]


def clamped_sample(image, y, x):
    """Interpolate between the pixels around a point, which is moved into the image first."""
    height, width = image.shape
    return sample(np.pad(image, 1, mode="edge"), np.clip(y, 0, height - 1) + 1, np.clip(x, 0, width - 1) + 1)


def averaged(image, points, outside):
    """Average samples: points outside are 0, or where `outside` is None are left out."""
    height, width = image.shape
    values = []
    for y, x in points:
        if outside is None:
            if -0.5 <= y <= height - 0.5 and -0.5 <= x <= width - 0.5:
                values.append(clamped_sample(image, y, x))
        else:
            there = -1 <= y <= height and -1 <= x <= width
            values.append(clamped_sample(image, y, x) if there else outside)
    return sum(values) / max(len(values), 1)


def mmcv_pool(x, offset):
    """Bins of "aligned" RoIAlign, with samples in the middle of their parts; offset channel 0 moves to the
    right."""
    y = np.zeros((len(REGIONS), x.shape[1], POOL, POOL))
    for r, c, i, j in np.ndindex(*y.shape):
        image, left, top, right, bottom = REGIONS[r]
        left, top = left * SCALE - 0.5, top * SCALE - 0.5
        width, height = right * SCALE - 0.5 - left, bottom * SCALE - 0.5 - top
        dx, dy = GAMMA * width * offset[r, 0, i, j], GAMMA * height * offset[r, 1, i, j]
        parts = (np.arange(SAMPLES) + 0.5) / SAMPLES
        points = [
            (top + (i + v) * height / POOL + dy, left + (j + u) * width / POOL + dx)
            for v in parts
            for u in parts
        ]
        y[r, c, i, j] = averaged(x[image, c], points, 0)
    return y


def authors_pool(x, offset):
    """Bins of rounded regions, with samples at the corners of their parts, and what is outside left out."""
    y = np.zeros((len(REGIONS), x.shape[1], POOL, POOL))
    for r, c, i, j in np.ndindex(*y.shape):
        image, *corners = REGIONS[r]
        left, top, right, bottom = (math.copysign(math.floor(abs(v) + 0.5), v) for v in corners)
        left, top = left * SCALE - 0.5, top * SCALE - 0.5
        width = max((right + 1) * SCALE - 0.5 - left, 0.1)
        height = max((bottom + 1) * SCALE - 0.5 - top, 0.1)
        begin_x = j * width / POOL + left + offset[r, 0, i, j] * GAMMA * width
        begin_y = i * height / POOL + top + offset[r, 1, i, j] * GAMMA * height
        parts = np.arange(SAMPLES) / SAMPLES
        points = [(begin_y + v * height / POOL, begin_x + u * width / POOL) for v in parts for u in parts]
        y[r, c, i, j] = averaged(x[image, c], points, None)
    return y


def through(rows, state_dict, name, layers):
    """nn.Sequential of nn.Linear and nn.ReLU in turn."""
    for index in range(0, 2 * layers, 2):
        rows = rows if index == 0 else rows.clip(0)
        weight, bias = state_dict[f"{name}.{index}.weight"], state_dict[f"{name}.{index}.bias"]
        rows = np.array([[weight[o] @ row + bias[o] for o in range(len(bias))] for row in rows])
    return rows


def pooled_by(pool, state_dict, x, name):
    """A layer as its library writes it: pool, make offsets and masks of all that, and pool again."""
    rows = pool(x, np.zeros((len(REGIONS), 2, POOL, POOL))).reshape(len(REGIONS), -1)
    shape = (len(REGIONS), -1, POOL, POOL)
    if f"{name}offset_mask_fc.0.weight" in state_dict:
        o1, o2, mask = np.split(through(rows, state_dict, f"{name}offset_mask_fc", 3).reshape(shape), 3, 1)
        return pool(x, np.concatenate([o1, o2], axis=1)) * logistic(mask)
    y = pool(x, through(rows, state_dict, f"{name}offset_fc", 3).reshape(shape))
    if f"{name}mask_fc.0.weight" not in state_dict:
        return y
    return y * logistic(through(rows, state_dict, f"{name}mask_fc", 2)).reshape(shape)


def branches_of(prefix, **outputs):
    """The arrays of branches for 3 channels, with 5 hidden ones, by their number of outputs."""
    state_dict = {}
    for branch, made in outputs.items():
        widths = [3 * POOL**2, 5, made] if branch == "mask_fc" else [3 * POOL**2, 5, 5, made]
        for index, (inputs, outputs_) in enumerate(itertools.pairwise(widths)):
            state_dict[f"{prefix}{branch}.{2 * index}.weight"] = 0.4 * drawn(outputs_, inputs)
            state_dict[f"{prefix}{branch}.{2 * index}.bias"] = 0.4 * drawn(outputs_)
    return state_dict


POOLINGS = {
    "mmcv": ("mmcv", mmcv_pool, {"offset_fc": 8}),
    "mmcv, modulated": ("mmcv", mmcv_pool, {"offset_fc": 8, "mask_fc": 4}),
    "CharlesShang": ("CharlesShang", authors_pool, {"offset_mask_fc": 12}),
    "chengdazhi": ("chengdazhi", authors_pool, {"offset_fc": 8}),
    "chengdazhi, modulated": ("chengdazhi", authors_pool, {"offset_fc": 8, "mask_fc": 4}),
    "chengdazhi, one branch": ("chengdazhi", authors_pool, {"offset_mask_fc": 12}),
}


@pytest.mark.parametrize("prefix", ["", "roi_layers.0."])
@pytest.mark.parametrize("case", POOLINGS)
def test_a_pooling_computes_what_its_library_does(case, prefix):
    library, pool, outputs = POOLINGS[case]
    state_dict = branches_of(prefix, **outputs)
    others = {"roi_layers.1.offset_fc.0.weight": drawn(1, 1)} if prefix else {}
    read = roi_pool_from(state_dict | others, prefix.removesuffix("."), library=library)
    assert (read.in_channels, read.bins, read.hidden_channels) == (3, POOL**2, 5)
    assert read.modulated is (set(outputs) != {"offset_fc"})
    assert read.shared_branch is (("offset_mask_fc" in outputs) if read.modulated else None)
    assert read.mask_activation == ("sigmoid" if read.modulated else None)
    assert all(read.arrays[key.removeprefix(prefix)] is value for key, value in state_dict.items())
    layer = (ModulatedDeformRoIPool if read.modulated else DeformRoIPool).from_weights(
        read, POOL, SCALE, SAMPLES, GAMMA
    )
    x = drawn(2, 3, 6, 7)
    wanted = pooled_by(pool, state_dict, x, prefix)
    assert np.allclose(layer.forward(x, np.array(REGIONS)), wanted, 1e-12, 1e-12)
    first = next(iter(layer.parameters()))
    getattr(layer, first)[:] += 1  # a copy
    assert not np.array_equal(getattr(layer, first), next(iter(state_dict.values())))


WRONG_POOLINGS = {
    "nothing": ({}, ValueError, "there is no key 'p.offset_fc.0.weight'; there is none at all"),
    "a branch of another library": (
        branches_of("p.", offset_mask_fc=12),
        ValueError,
        r"^p has offset_mask_fc; a pooling of mmcv has offset_fc, or offset_fc and mask_fc",
    ),
    "masks alone": (branches_of("p.", mask_fc=4), ValueError, r"^p has mask_fc; a pooling of mmcv has"),
    "an unknown key": (
        {"p.mask_fc.3.bias": drawn(3)} | branches_of("p.", offset_fc=8, mask_fc=4),
        ValueError,
        r"p\.mask_fc\.3\.bias is an array .* a layer of mmcv here has 'p\.offset_fc\.0\.weight'",
    ),
    "another width": (
        branches_of("p.", offset_fc=8) | {"p.offset_fc.2.weight": drawn(6, 5)},
        ValueError,
        r"offset_fc\.2\.weight has the shape \(6, 5\); wanted \(5, 5\), for 3 channels, 4 bins and 5 hidden",
    ),
    "a bias of another size": (
        branches_of("p.", offset_fc=8) | {"p.offset_fc.4.bias": drawn(7)},
        ValueError,
        r"offset_fc\.4\.bias has the shape \(7,\); wanted \(8,\)",
    ),
    "masks of other bins": (
        branches_of("p.", offset_fc=8, mask_fc=6),
        ValueError,
        r"mask_fc\.2\.weight has the shape \(6, 5\); wanted \(4, 5\)",
    ),
    "half an offset": (
        branches_of("p.", offset_fc=7),
        ValueError,
        r"p\.offset_fc\.4\.weight has 7 outputs; wanted 2 for each bin",
    ),
    "no whole channel": (
        branches_of("p.", offset_fc=10),
        ValueError,
        r"p\.offset_fc\.0\.weight has 12 inputs; p\.offset_fc\.4\.weight is of 5 bins: wanted a multiple",
    ),
    "no array": (
        branches_of("p.", offset_fc=8) | {"p.offset_fc.2.bias": [1.0]},
        TypeError,
        r"p\.offset_fc\.2\.bias is \[1\.0\] \(list\); wanted a numpy\.ndarray",
    ),
}


@pytest.mark.parametrize("case", WRONG_POOLINGS)
def test_a_pooling_that_does_not_fit_is_named(case):
    state_dict, error, message = WRONG_POOLINGS[case]
    with pytest.raises(error, match=message):
        roi_pool_from(state_dict, "p", library="mmcv")


def test_poolings_of_single_libraries():
    with pytest.raises(
        ValueError, match="library is 'torchvision'; wanted one of 'mmcv', 'CharlesShang', 'c"
    ):
        roi_pool_from({}, library="torchvision")
    with pytest.raises(
        ValueError, match="state dict has offset_fc; a pooling of CharlesShang has offset_mask"
    ):
        roi_pool_from(branches_of("", offset_fc=8), library="CharlesShang")


def test_weights_of_another_pooling_are_named():
    plain = roi_pool_from(branches_of("", offset_fc=8), library="mmcv")
    modulated = roi_pool_from(branches_of("", offset_fc=8, mask_fc=4), library="mmcv")
    with pytest.raises(
        ValueError, match=r"weights.modulated is True; wanted False, or ModulatedDeformRoIPool"
    ):
        DeformRoIPool.from_weights(modulated, 2)
    with pytest.raises(ValueError, match=r"weights.modulated is False; wanted True, or DeformRoIPool"):
        ModulatedDeformRoIPool.from_weights(plain, 2)
    with pytest.raises(ValueError, match=r"output_size is \(2, 3\): 6 bins; the weights are of 4"):
        DeformRoIPool.from_weights(plain, (2, 3))
    assert DeformRoIPool.from_weights(plain, (4, 1)).output_size == (4, 1)


# ---- other orders of channels


def chainer(offset, height, width):
    """The first half moves to the right, the second down."""
    right, down = np.split(offset, 2, axis=1)
    return lambda n, g, i, j, row, column: (
        down[n, i * width + j, row, column],
        right[n, i * width + j, row, column],
    )


def uiiurz(offset, height, width):
    """The first half is added to the row, the second to the column."""
    taps = height * width
    return lambda n, g, i, j, row, column: (
        offset[n, i * width + j, row, column],
        offset[n, taps + i * width + j, row, column],
    )


def mindspore(tensor, height, width):
    """Three blocks, each over all groups and taps: x, y, mask."""
    blocks = tensor.reshape(len(tensor), 3, -1, height, width, *tensor.shape[2:])

    def moved(n, g, i, j, row, column):
        return blocks[n, 1, g, i, j, row, column], blocks[n, 0, g, i, j, row, column]

    return moved, lambda n, g, i, j, row, column: blocks[n, 2, g, i, j, row, column]


def by_columns(height, width):
    """Number the taps as the kernels of DCNv3 and DCNv4 count: the outer loop over the width."""
    numbers, counter = {}, 0
    for column in range(width):
        for row in range(height):
            numbers[row, column] = counter
            counter += 1
    return numbers


def dcnv3(offset, mask, height, width):
    """Channels last: of each group, (x, y) of each tap; masks beside."""
    taps, number = height * width, by_columns(height, width)

    def moved(n, g, i, j, row, column):
        at = (g * taps + number[i, j]) * 2
        return offset[n, row, column, at + 1], offset[n, row, column, at]

    return moved, lambda n, g, i, j, row, column: mask[n, row, column, g * taps + number[i, j]]


def dcnv4(tensor, height, width):
    """Channels last: of each group, (x, y) of each tap, then the masks of its taps."""
    taps, number = height * width, by_columns(height, width)

    def moved(n, g, i, j, row, column):
        pair = tensor[n, row, column, g * taps * 3 + number[i, j] * 2 :]
        return pair[1], pair[0]

    return moved, lambda n, g, i, j, row, column: tensor[
        n, row, column, g * taps * 3 + taps * 2 + number[i, j]
    ]


KERNELS = pytest.mark.parametrize("kernel", [(3, 2), (2, 3), (1, 1)], ids=str)


def problem(kernel, groups=1):
    x, weight = drawn(2, 4, 5, 4), drawn(3, 4, *kernel)
    output = (2, 6 - kernel[0], 5 - kernel[1])
    return x, weight, groups * math.prod(kernel), output


def channels_last(array):
    return np.moveaxis(array, 1, -1)


@KERNELS
@pytest.mark.parametrize(("library", "definition"), [("Chainer", chainer), ("4uiiurz1", uiiurz)])
def test_blocked_orders(library, definition, kernel):
    x, weight, each, (batch, *size) = problem(kernel)
    # 4uiiurz1 treats borders in another way: its definition is that of the others within the image.
    offset = RNG.uniform(-0.4, 0.4, (batch, 2 * each, *size))
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    offset = np.pad(offset, ((0, 0), (0, 0), (1, 1), (1, 1)))
    wanted = evaluated(x, weight, None, definition(offset, *kernel), whole, 1)
    got = dcn_np.deform_conv(x, offset[:, offset_channels(library, kernel)], weight)
    assert np.allclose(got, wanted, 1e-12, 1e-12)


@KERNELS
def test_masks_of_4uiiurz1_stay_in_order(kernel):
    assert np.array_equal(mask_channels("4uiiurz1", kernel), np.arange(math.prod(kernel)))


@KERNELS
@pytest.mark.parametrize("groups", [1, 2])
def test_the_order_of_mindspore(kernel, groups):
    x, weight, each, (batch, *size) = problem(kernel, groups)
    tensor = drawn(batch, 3 * each, *size)
    moved, factor = mindspore(tensor, *kernel)
    wanted = evaluated(x, weight, None, moved, factor, groups)
    ours = tensor[:, offset_channels("MindSpore", kernel, groups)]
    got = dcn_np.modulated_deform_conv(
        x, ours[:, : 2 * each], ours[:, 2 * each :], weight, offset_groups=groups
    )
    assert np.allclose(got, wanted, 1e-12, 1e-12)


@KERNELS
@pytest.mark.parametrize("groups", [1, 2])
def test_the_order_of_dcnv3(kernel, groups):
    x, weight, each, (batch, *size) = problem(kernel, groups)
    offset, mask = drawn(batch, 2 * each, *size), drawn(batch, each, *size)
    moved, factor = dcnv3(channels_last(offset), channels_last(mask), *kernel)
    wanted = evaluated(x, weight, None, moved, factor, groups)
    offset = offset[:, offset_channels("DCNv3", kernel, groups)]
    mask = mask[:, mask_channels("DCNv3", kernel, groups)]
    got = dcn_np.modulated_deform_conv(x, offset, mask, weight, offset_groups=groups)
    assert np.allclose(got, wanted, 1e-12, 1e-12)


@KERNELS
@pytest.mark.parametrize("groups", [1, 2])
def test_the_order_of_dcnv4(kernel, groups):
    x, weight, each, (batch, *size) = problem(kernel, groups)
    tensor = drawn(batch, math.ceil(3 * each / 8) * 8, *size)  # what is above 3 * each is not used
    moved, factor = dcnv4(channels_last(tensor), *kernel)
    wanted = evaluated(x, weight, None, moved, factor, groups)
    ours = tensor[:, offset_channels("DCNv4", kernel, groups)]
    got = dcn_np.modulated_deform_conv(
        x, ours[:, : 2 * each], ours[:, 2 * each :], weight, offset_groups=groups
    )
    assert np.allclose(got, wanted, 1e-12, 1e-12)


@pytest.mark.parametrize("library", ["torchvision", "mmcv", "detectron2", "CharlesShang", "chengdazhi"])
def test_orders_that_are_ours(library):
    assert np.array_equal(offset_channels(library, 3, 2), np.arange(36))
    assert np.array_equal(mask_channels(library, (3, 3), 2), np.arange(18))


@pytest.mark.parametrize("library", ["Chainer", "4uiiurz1", "MindSpore", "DCNv3", "DCNv4"])
def test_every_channel_is_used_once(library):
    index = offset_channels(library, (2, 3))
    assert index.dtype == np.intp
    assert np.array_equal(np.sort(index), np.arange(18 if library in ("MindSpore", "DCNv4") else 12))


def test_orders_that_are_not():
    for function in (offset_channels, mask_channels):
        with pytest.raises(ValueError, match="library is 'keras'; wanted one of"):
            function("keras", 3)
        with pytest.raises(ValueError, match=r"kernel\[1\] is 0; wanted at least 1"):
            function("DCNv3", (3, 0))
        with pytest.raises(TypeError, match=r"kernel is 3.0 \(float\); wanted an integer"):
            function("DCNv3", 3.0)
        with pytest.raises(ValueError, match="offset_groups is -1; wanted at least 1"):
            function("DCNv3", 3, -1)
        with pytest.raises(ValueError, match="offset_groups is 2; 4uiiurz1 has no offset groups"):
            function("4uiiurz1", 3, 2)
    with pytest.raises(ValueError, match="Chainer has no masks"):
        mask_channels("Chainer", 3)
    for library in ("MindSpore", "DCNv4"):
        with pytest.raises(ValueError, match="masks and offsets in one array"):
            mask_channels(library, 3)
