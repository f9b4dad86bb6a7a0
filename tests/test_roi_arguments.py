"""Is every wrong argument of pooling over regions refused, in words that help?"""

from __future__ import annotations

import doctest
import re
import sys
import types

import numpy
import pytest

import dcn_np
from dcn_np import backends
from dcn_np.roi_geometry import ROI_GEOMETRY_DTYPE, RoIGeometry

ALIGNED = ("roi_align", "deform_roi_pool", "modulated_deform_roi_pool")
OPERATORS = (*ALIGNED, "deform_psroi_pool")
EVERY = [name + direction for name in OPERATORS for direction in ("", "_backward")]
NUMBERS = (0, -1, 2**31, 2**62, 2**63 - 1, 2**64, -(2**63), 10**5000)


@pytest.fixture(params=EVERY)
def name(request):
    return request.param


def arguments(name, dtype=numpy.float32):
    """Arguments by name of a small call that fits: batch 2, 8 channels, 5 x 6, three regions, 2 x 3 bins."""
    random = numpy.random.default_rng(1)
    given = {
        "x": random.standard_normal((2, 8, 5, 6)),
        "rois": numpy.array([[0, 1, 1, 4, 4], [1, 0, 0, 5, 5], [0, 2, 1, 3, 3]]),
        "output_size": (2, 3),
    }
    operator = name.removesuffix("_backward")
    outputs = 8
    if operator == "deform_psroi_pool":
        outputs = 2
        given |= {"offset": random.standard_normal((3, 4, 2, 3)), "output_dim": 2, "group_size": 2}
    elif operator != "roi_align":
        given["offset"] = random.standard_normal((3, 2, 2, 3))
    if operator == "modulated_deform_roi_pool":
        given["mask"] = random.random((3, 1, 2, 3))
    if name.endswith("_backward"):
        given["grad_output"] = random.standard_normal((3, outputs, 2, 3))
    return {key: value.astype(dtype) if hasattr(value, "astype") else value for key, value in given.items()}


def call(name, **changes):
    return getattr(dcn_np, name)(**arguments(name) | changes)


def refused(name, error, match, **changes):
    with pytest.raises(error, match=match) as caught:
        call(name, **changes)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 600


def test_the_arguments_fit(name):
    call(name)


def test_x_has_four_axes(name):
    x = arguments(name)["x"]
    refused(name, ValueError, r"^x has 3 axes, shape \(8, 5, 6\); wanted 4: .* given as x\[None\]", x=x[0])
    refused(name, ValueError, r"^x has 5 axes", x=x[None])


def test_rois_have_five_columns(name):
    rois = arguments(name)["rois"]
    refused(
        name, ValueError, r"^rois has shape \(3, 4\); wanted \(R, 5\): .*index of their", rois=rois[:, 1:]
    )
    refused(name, ValueError, r"^rois has shape \(5,\); wanted \(R, 5\)", rois=rois[0])
    refused(name, ValueError, r"^rois has shape \(3, 6\)", rois=rois[:, [0, 1, 2, 3, 4, 4]])


@pytest.mark.parametrize("image", [-1, 2, 1e9, -1e30, 0.5, 1.25])
def test_an_image_that_does_not_exist_is_named(name, image):
    rois = arguments(name)["rois"]
    rois[1, 0] = image
    refused(
        name, ValueError, r"^rois\[1\] is \(.*x has a batch of 2: wanted a whole index .* 0 to 1$", rois=rois
    )


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, -numpy.inf])
@pytest.mark.parametrize("column", range(5))
def test_a_region_that_is_not_finite_is_named(name, column, value):
    rois = arguments(name)["rois"]
    rois[1:, column] = value
    refused(name, ValueError, r"^rois\[1\] is \(.*\) \(and 1 more\); wanted finite numbers", rois=rois)


def test_a_region_whose_size_overflows_is_named(name):
    given = arguments(name, numpy.float64)
    given["rois"][2, 1:] = [-1.7e308, 0, 1.7e308, 1]
    refused(name, ValueError, r"^rois\[2\] is .* no finite number of pixels", **given)


def test_no_image_exists_in_an_empty_batch(name):
    x = arguments(name)["x"][:0]
    refused(name, ValueError, r"^rois\[0\] is .* a batch of 0: .* none, since the batch is empty", x=x)


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: f"{value.bit_length()}bits{value < 0:d}")
@pytest.mark.parametrize("size", ["output_size", "group_size", "output_dim", "part_size", "sample_per_part"])
def test_sizes_out_of_range(name, size, value):
    if size != "output_size" and "psroi" not in name:
        return
    if name == "roi_align" and value == 2**31:  # fits, where there are 400 GB of memory
        return
    refused(name, ValueError, f"^({size} is|x has 8 channels|offset has|the output)", **{size: value})
    if size in ("output_size", "part_size"):
        refused(
            name,
            ValueError,
            rf"^({size}\[1\] is|offset has|the output|mask|grad_output)",
            **{size: (2, value)},
        )


@pytest.mark.parametrize("value", [True, 1.0, "2", None, 1j, numpy.float32(2)], ids=repr)
@pytest.mark.parametrize(
    "size", ["output_size", "sampling_ratio", "group_size", "output_dim", "sample_per_part"]
)
def test_sizes_of_the_wrong_kind(name, size, value):
    if (size == "sampling_ratio") == ("psroi" in name) and size != "output_size":
        return
    refused(name, TypeError, f"^{size} is .*; wanted an integer", **{size: value})


def test_output_size_is_one_number_or_two(name):
    refused(
        name,
        ValueError,
        r"^output_size has 3 entries; wanted an integer or \(height, width\)",
        output_size=(1, 2, 3),
    )
    for size in ([2, 3], numpy.array([2, 3]), (numpy.int8(2), 3)):
        numpy.testing.assert_array_equal(call(name, output_size=size)[0], call(name)[0])


@pytest.mark.parametrize("name", [name for name in EVERY if "psroi" not in name])
def test_sampling_ratio(name):
    for ratio in (-1, -(2**70)):
        refused(
            name,
            ValueError,
            r"^sampling_ratio is .*; wanted at least 0, which takes as many",
            sampling_ratio=ratio,
        )
    for ratio in (2**16 + 1, 2**70):
        refused(name, ValueError, r"^sampling_ratio is .*; wanted at most 65536", sampling_ratio=ratio)
    call(name, sampling_ratio=2**16)


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, 10**400])
@pytest.mark.parametrize("number", ["spatial_scale", "gamma", "trans_std"])
def test_numbers_are_finite(name, number, value):
    operator = name.removesuffix("_backward")
    own = {"roi_align": None, "deform_psroi_pool": "trans_std"}.get(operator, "gamma")
    if number not in ("spatial_scale", own):
        return
    refused(name, ValueError, f"^{number} is .*; wanted a finite number", **{number: value})
    for wrong in (True, "1", None, 1j, numpy.ones(2)):
        refused(name, TypeError, f"^{number} is .*; wanted a number", **{number: wrong})


@pytest.mark.parametrize("scale", [0, -1, -0.0])
def test_spatial_scale_is_positive(name, scale):
    refused(name, ValueError, "^spatial_scale is .*; wanted more than 0", spatial_scale=scale)


def test_shapes_of_offset_and_mask():
    for name in ("deform_roi_pool", "modulated_deform_roi_pool_backward"):
        offset = arguments(name)["offset"]
        match = r"^offset has shape \(3, 2, 3, 2\); wanted \(R, 2, \*output_size\) = \(3, 2, 2, 3\)"
        refused(name, ValueError, match, offset=offset.transpose(0, 1, 3, 2))
        match = r"channels are last: numpy.moveaxis\(array, -1, 1\)"
        refused(name, ValueError, match, offset=numpy.moveaxis(offset, 1, -1))
        refused(name, ValueError, r"^offset has shape \(2, 2, 2, 3\)", offset=offset[:2])
    mask = numpy.ones((3, 2, 3), numpy.float32)
    match = r"^mask has shape \(3, 2, 3\); wanted \(R, 1, \*output_size\) = \(3, 1, 2, 3\)"
    refused("modulated_deform_roi_pool", ValueError, match, mask=mask)


def test_position_sensitive_channels_and_classes():
    name = "deform_psroi_pool"
    refused(
        name, ValueError, r"^x has 8 channels; output_dim=2 and group_size=3 need 2\*3\*3 = 18", group_size=3
    )
    match = r"^offset has 6 channels; wanted .* two for each class, .* divides output_dim=2"
    refused(name, ValueError, match, offset=numpy.zeros((3, 6, 2, 3), numpy.float32))
    refused(name, ValueError, "^offset has 3 channels", offset=numpy.zeros((3, 3, 2, 3), numpy.float32))
    refused(name, ValueError, "^offset has 0 channels", offset=numpy.zeros((3, 0, 2, 3), numpy.float32))
    match = r"^offset has shape \(3, 4, 2, 3\); wanted \(R, 2 \* classes, \*part_size\) = \(3, .*, 7, 7\)"
    refused(name, ValueError, match, part_size=7)
    refused(name, ValueError, r"^offset has shape \(3, 4\)", offset=numpy.zeros((3, 4), numpy.float32))


def test_grad_output_has_the_shape_of_the_result():
    for name in EVERY:
        if name.endswith("_backward"):
            grad = arguments(name)["grad_output"]
            refused(
                name, ValueError, r"^grad_output has shape .*; wanted \(R, channels", grad_output=grad[:, :1]
            )
            refused(name, TypeError, "^grad_output has dtype float64", grad_output=grad.astype(numpy.float64))


def test_an_output_that_no_memory_holds():
    refused(
        "roi_align", ValueError, r"^the output has shape .* bytes; wanted at most 2\^63-1", output_size=2**33
    )


def test_dtypes(name):
    given = arguments(name)
    for key, value in given.items():
        if isinstance(value, numpy.ndarray):
            match = "^[a-z_]+ has dtype .*; wanted"
            refused(name, TypeError, match, **{key: value.astype(numpy.float64)})
            refused(
                name,
                TypeError,
                rf"^{key} has dtype (int64|>f4)|but x has",
                **{key: value.astype(numpy.int64)},
            )
            refused(name, TypeError, rf"^{key} has dtype|but x has", **{key: value.astype(">f4")})
    half = {key: v.astype(numpy.float16) if hasattr(v, "astype") else v for key, v in given.items()}
    getattr(dcn_np, name)(**half)
    getattr(dcn_np, name)(**half | {"rois": given["rois"]})
    with pytest.raises(TypeError, match=r"rois, offset and mask may be float32"):
        getattr(dcn_np, name)(**half | {"rois": given["rois"].astype(numpy.float64)})
    if "mask" in given:
        with pytest.raises(
            TypeError, match="mask has dtype float16 but offset has float32; wanted one dtype"
        ):
            getattr(dcn_np, name)(**half | {"offset": given["offset"]})


@pytest.mark.parametrize("value", [[[1.0]], "x", 1, None, b"x", numpy.float32(1)], ids=repr)
def test_arrays_of_the_wrong_kind(name, value):
    given = arguments(name)
    for key in ("x", "rois", "grad_output"):
        if key in given:
            refused(name, TypeError, f"^{key} is .*; wanted a numpy.ndarray", **{key: value})
    for key in ("offset", "mask"):
        if key in given and value is not None:
            refused(name, TypeError, f"^{key} is .*; wanted a numpy.ndarray.*, or None", **{key: value})


def test_needs():
    for operator in OPERATORS:
        name = f"{operator}_backward"
        refused(name, ValueError, "^needs holds 'rois'; wanted names out of 'x'", needs=["rois"])
        refused(name, TypeError, "^needs is the string", needs="x")
        assert all(gradient is None for gradient in call(name, needs=()))
    refused("roi_align_backward", ValueError, "^needs holds 'offset'", needs=["offset"])
    refused("deform_roi_pool_backward", ValueError, "^needs holds 'mask'", needs=["mask"])


def test_arrays_of_another_library_come_back_as_such():
    class Foreign:
        """What DLPack takes and gives; its library is this module."""

        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **keywords):
            return self.array.__dlpack__(**keywords)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    library = types.ModuleType("a_library_for_regions")
    library.from_dlpack = lambda exported: Foreign(numpy.from_dlpack(exported))
    Foreign.__module__ = library.__name__
    sys.modules[library.__name__] = library
    try:
        for name in EVERY:
            given = arguments(name)
            ours = getattr(dcn_np, name)(**given)
            foreign = {k: Foreign(v) if isinstance(v, numpy.ndarray) else v for k, v in given.items()}
            theirs = getattr(dcn_np, name)(**foreign)
            pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
            for one, other in pairs:
                assert (one is None and other is None) or numpy.array_equal(one, other.array)
    finally:
        del sys.modules[library.__name__]


def test_geometry_has_what_the_kernels_read():
    given = arguments("deform_psroi_pool")
    geometry = RoIGeometry.of_position_sensitive(
        [numpy.dtype(numpy.float32)],
        given["x"],
        given["rois"],
        given["offset"],
        2,
        2,
        (2, 3),
        0.5,
        None,
        3,
        0.2,
    )
    assert geometry.struct.dtype == ROI_GEOMETRY_DTYPE
    record = {name: geometry.struct[name].tolist() for name in ROI_GEOMETRY_DTYPE.names}
    assert record == {
        "batch": 2,
        "channels": 8,
        "rois": 3,
        "outputs": 2,
        "position_sensitive": 1,
        "group": 2,
        "classes": 2,
        "samples": 3,
        "input": [5, 6],
        "output": [2, 3],
        "part": [2, 3],
        "spatial_scale": 0.5,
        "offset_scale": 0.2,
    }


def test_results_have_their_own_gradients_type():
    assert isinstance(call("roi_align_backward"), backends.RoIGradients)


@pytest.mark.parametrize("name", [*EVERY, "feature_mimic_loss", "feature_mimic_loss_backward"])
def test_examples_and_shared_texts_of_docstrings(name):
    function = getattr(dcn_np, name)
    assert not re.search(r"\{\w+\}", function.__doc__)
    finder, runner = (
        doctest.DocTestFinder(recurse=False),
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE),
    )
    results = [runner.run(test) for test in finder.find(function, name, globs={})]
    assert sum(result.attempted for result in results) > 2
    assert sum(result.failed for result in results) == 0
