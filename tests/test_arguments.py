"""Is every wrong argument refused, in words that help, before anything is written?"""

from __future__ import annotations

import doctest
import enum
import sys

import numpy
import pytest

import dcn_np
from dcn_np import cpu
from dcn_np.geometry import GEOMETRY_DTYPE, Geometry

FORWARD = (dcn_np.deform_conv, dcn_np.modulated_deform_conv)
BACKWARD = (dcn_np.deform_conv_backward, dcn_np.modulated_deform_conv_backward)
PUBLIC = FORWARD + BACKWARD
AXES = {1: "x", 2: "yx", 3: "zyx"}

# Around every place where 32-bit, 62-bit and 64-bit integers end, and where counts begin.
NUMBERS = (0, -1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**64, -(2**31), -(2**63), -(2**64), 10**5000)

PARAMETERS = ("stride", "padding", "dilation", "groups", "offset_groups")


def arrays(ndim=2, function=dcn_np.modulated_deform_conv, dtype=numpy.float32, **window):
    """The arrays of a small call that fits: batch 2, 4 channels to 6, input 5 x 6 x 7, kernel 3 x 2 x 1."""
    input_extents, kernel = (5, 6, 7)[:ndim], (3, 2, 1)[:ndim]
    stride, padding = window.get("stride", 1), window.get("padding", 0)
    output = [(i + 2 * padding - k) // stride + 1 for i, k in zip(input_extents, kernel, strict=True)]
    taps = numpy.prod(kernel)
    random = numpy.random.default_rng(1)
    shapes = {
        "grad_output": (2, 6, *output),
        "x": (2, 4, *input_extents),
        "offset": (2, ndim * taps, *output),
        "mask": (2, taps, *output),
        "weight": (6, 4, *kernel),
        "bias": (6,),
    }
    return {name: random.normal(size=shapes[name]).astype(dtype) for name in taken(function)}


def taken(function):
    """The arrays that a public function takes."""
    mask = ("mask",) if "modulated" in function.__name__ else ()
    if function in BACKWARD:
        return ("grad_output", "x", "offset", *mask, "weight")
    return ("x", "offset", *mask, "weight", "bias")


def refused(function, error, match, given, **parameters):
    """Call and expect `error`; every array, and an `out` prefilled with a pattern, must stay as it was."""
    if function in FORWARD and "out" not in parameters:
        x, weight = given.get("x"), given.get("weight")
        if isinstance(x, numpy.ndarray) and isinstance(weight, numpy.ndarray):
            parameters["out"] = numpy.full((2, 6, *(3, 5, 7)[: x.ndim - 2]), 7, numpy.float32)
    values = [v for v in (*given.values(), parameters.get("out")) if isinstance(v, numpy.ndarray)]
    before = [v.tobytes() for v in values]
    with pytest.raises(error, match=match) as caught:
        function(**given, **parameters)
    assert type(caught.value) is error
    assert [v.tobytes() for v in values] == before


@pytest.fixture(params=PUBLIC, ids=lambda function: function.__name__)
def function(request):
    return request.param


# ---- numbers


def places(ndim):
    """Every place of an integer: a parameter, and how to put a value there among ones that fit."""
    for name in PARAMETERS:
        yield name, lambda value: value
    for name in ("stride", "padding", "dilation"):
        for axis in range(ndim):
            fits = 0 if name == "padding" else 1
            yield (
                name,
                lambda value, axis=axis, fits=fits: [fits] * axis + [value] + [fits] * (ndim - axis - 1),
            )
    for axis in range(ndim):
        for end in (0, 1):
            yield (
                "padding",
                lambda value, axis=axis, end=end: [
                    ((value, 0) if end == 0 else (0, value)) if a == axis else (0, 0) for a in range(ndim)
                ],
            )


@pytest.mark.parametrize(
    "value", NUMBERS, ids=lambda value: f"{value.bit_length() * (1 if value >= 0 else -1)}bits"
)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_number_that_fits_nowhere_is_refused_in_every_place(function, ndim, value):
    """Padding 0 is the only one of NUMBERS that these arrays fit; an axis of 1 tap takes any dilation."""
    given = arrays(ndim, function)
    for name, put in places(ndim):
        parameters = {name: put(value)}
        try:
            Geometry.of(*of_arrays(given), **window(**parameters))
        except ValueError:
            refused(function, ValueError, name_or_consequence(name), given, **parameters)
        else:
            legal = (name == "padding" and value == 0) or (
                name == "dilation" and ndim == 3 and 0 < value <= 2**62
            )
            assert legal, parameters


def of_arrays(given):
    return [cpu.dtypes(), *(given.get(name) for name in ("x", "offset", "mask", "weight", "bias"))]


def window(**parameters):
    return {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "offset_groups": 1, **parameters}


def name_or_consequence(name):
    """Stride and the like may be legal in themselves and not fit the offsets: then these are named."""
    return {
        "stride": r"^(stride|offset is|the output)",
        "padding": r"^(padding|offset is|the output)",
        "dilation": r"^(dilation|offset is|the output)",
    }.get(name, f"^{name}")


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("value", [0, -1, -(2**64)])
def test_least_values(function, name, value):
    if name == "padding" and value == 0:
        return
    least = 0 if name == "padding" else 1
    refused(
        function,
        ValueError,
        rf"^{name} is {value}; wanted at least {least}$",
        arrays(2, function),
        **{name: value},
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_numbers_past_62_bits_are_refused_by_name(function, name):
    for value in (2**63 - 1, 2**64, 10**5000):
        refused(
            function, ValueError, rf"^{name} .*wanted at most 2\^62", arrays(2, function), **{name: value}
        )


def test_an_integer_too_long_to_be_written_is_named(function):
    for name in ("x", "weight"):
        for value in (10**5000, [10**5000]):
            with pytest.raises(TypeError, match=f"^{name} is .*an integer of 16610 bits"):
                function(**arrays(2, function) | {name: value})


@pytest.mark.parametrize("wrong", [None, numpy.zeros(2), ["avx2"]])
def test_an_instruction_set_that_is_no_string_is_refused(wrong):
    with pytest.raises(TypeError, match=r"^name is .*; wanted one of baseline"), dcn_np.use_isa(wrong):
        pass


@pytest.mark.parametrize("stride", [2**31 - 1, 2**31, 2**32, 2**62])
def test_a_stride_past_the_image_gives_its_first_position(stride):
    given = arrays(2, dcn_np.deform_conv)
    given["offset"] = given["offset"][..., :1, :1]
    first = dcn_np.deform_conv(**given, stride=(9, 9))
    assert first.shape == (2, 6, 1, 1)
    numpy.testing.assert_array_equal(dcn_np.deform_conv(**given, stride=stride), first)


@pytest.mark.parametrize("far", [2**31 - 1, 2**31, 2**32, 2**61 - 1])
def test_a_padding_of_billions_is_zeros(far):
    """Three positions a stride of `far` apart; only the middle one meets the image."""
    x, weight = numpy.ones((1, 1, 5)), numpy.ones((1, 1, 1))
    y = dcn_np.deform_conv(x, numpy.zeros((1, 1, 3)), weight, stride=far, padding=[(far, far - 4)])
    numpy.testing.assert_array_equal(y.ravel(), [0, 1, 0])


def test_a_padded_size_past_62_bits_is_refused():
    """Each number alone is allowed; the stride keeps the output small."""
    given = {"x": numpy.ones((1, 1, 5)), "offset": None, "weight": numpy.ones((1, 1, 1))}
    match = rf"^padding is \(1, {2**62}\) on spatial axis 0: .* 5\+1\+{2**62} = .*wanted at most 2\^62"
    refused(dcn_np.deform_conv, ValueError, match, given, stride=2**62, padding=((1, 2**62),), out=None)


def test_a_padding_too_large_for_memory_is_refused():
    given = arrays(2, dcn_np.deform_conv) | {"offset": None}
    refused(
        dcn_np.deform_conv,
        ValueError,
        r"^the output has shape .* bytes; wanted at most 2\^63-1",
        given,
        padding=2**40,
    )


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        1.0,
        1.5,
        float("nan"),
        numpy.True_,
        numpy.float32(1),
        "1",
        None,
        1j,
        b"1",
        {1: 1},
        numpy.array(1.0),
    ],
    ids=repr,
)
def test_kinds_that_are_no_integers(function, name, value):
    refused(function, TypeError, rf"^{name} is .*; wanted an integer", arrays(2, function), **{name: value})
    if name in ("stride", "padding", "dilation"):
        refused(
            function,
            TypeError,
            rf"^{name}\[1\] is .*; wanted an integer",
            arrays(2, function),
            **{name: (1, value)},
        )


def test_a_refusal_is_not_forgotten_after_an_equal_number_was_taken():
    """1 == True == 1.0: a cache keyed carelessly would take them."""
    given = arrays(2, dcn_np.deform_conv)
    dcn_np.deform_conv(**given, stride=1, groups=1)
    dcn_np.deform_conv(**given, stride=(1, 1))
    for value in (True, 1.0, (True, 1), (1, 1.0)):
        refused(dcn_np.deform_conv, TypeError, "^stride", given, stride=value)
    for value in (True, 1.0):
        refused(dcn_np.deform_conv, TypeError, "^groups", given, groups=value)


class One(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "one",
    [
        numpy.int8(1),
        numpy.uint64(1),
        numpy.array(1),
        One.ONE,
        [1, 1],
        (1, One.ONE),
        numpy.array([1, 1]),
        [numpy.int32(1), 1],
    ],
    ids=repr,
)
def test_every_kind_of_integer_is_taken(one):
    given = arrays(2, dcn_np.deform_conv)
    wanted = dcn_np.deform_conv(**given)
    numpy.testing.assert_array_equal(dcn_np.deform_conv(**given, stride=one, dilation=one), wanted)


@pytest.mark.parametrize("name", ["stride", "dilation", "padding"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_one_number_per_axis_or_one_for_all(function, name, ndim):
    for length in {0, 1, 2, 3, 4} - {ndim}:
        match = rf"^{name} has {length} entr.*; x has {ndim} spatial ax"
        refused(function, ValueError, match, arrays(ndim, function), **{name: (1,) * length})


def test_forms_of_padding():
    forms = {
        1: [2, (2,), [(2, 2)], ((2, 2),), numpy.array([[2, 2]])],
        2: [2, (2, 2), [(2, 2), (2, 2)], (2, (2, 2)), numpy.array([[2, 2], [2, 2]])],
        3: [2, (2, 2, 2), ((2, 2),) * 3],
    }
    for ndim, paddings in forms.items():
        given = arrays(ndim, padding=2)
        taken = [Geometry.of(*of_arrays(given), **window(padding=padding)).padding for padding in paddings]
        assert set(taken) == {((2, 2),) * ndim}


def test_begin_and_end_of_padding_differ():
    x, weight = numpy.arange(1.0, 4.0).reshape(1, 1, 3), numpy.ones((1, 1, 1))
    y = dcn_np.deform_conv(x, None, weight, padding=((1, 2),))
    numpy.testing.assert_array_equal(y.ravel(), [0, 1, 2, 3, 0, 0])
    given = {"x": x, "offset": None, "weight": weight}
    refused(
        dcn_np.deform_conv,
        ValueError,
        r"x has 1 spatial axis.* such as \(\(begin, end\),\)",
        given,
        padding=(1, 2),
    )
    refused(dcn_np.deform_conv, ValueError, r"^padding\[0\] has 3 entries", given, padding=((1, 2, 3),))
    refused(dcn_np.deform_conv, TypeError, r"^padding\[0\]\[1\] is \(1,\)", given, padding=((1, (1,)),))


def test_groups_divide_channels(function):
    given = arrays(2, function)
    refused(
        function, ValueError, r"^groups is 3; x has 4 channels, and 4/3 leaves a rest of 1", given, groups=3
    )
    refused(function, ValueError, r"^groups is 4; weight has 6 output channels, and 6/4", given, groups=4)
    refused(function, ValueError, r"^offset_groups is 3; x has 4 channels", given, offset_groups=3)
    match = r"^weight has 4 channels on axis 1; x has 4 .*: wanted 4/2 = 2\. This weight fits groups=1"
    refused(function, ValueError, match, given, groups=2)


def test_a_long_value_is_shown_in_a_few_words(function):
    given = arrays(2, function)
    with pytest.raises(TypeError, match=r"^offset is \[\[\[.{70,80}\.\.\. \(list\); wanted a") as caught:
        function(**given | {"offset": given["offset"].tolist()})
    assert len(str(caught.value)) < 300


def test_channels_that_come_last_are_noticed(function):
    given = arrays(2, function)
    given["x"] = numpy.moveaxis(given["x"], 1, -1)
    match = r"^weight has 4 channels .*\. The last axis of x has 4: .* numpy\.moveaxis\(x, -1, 1\) puts them"
    refused(function, ValueError, match, given)
    for name in {"offset", "mask"}.intersection(taken(function)):
        given = arrays(2, function)
        given[name] = numpy.moveaxis(given[name], 1, -1)
        match = rf"^{name} has .* channels; .*\. Its channels are last: numpy\.moveaxis\(array, -1, 1\)"
        refused(function, ValueError, match, given)


def test_a_weight_for_one_group_is_not_taken_for_channels_that_come_last():
    x, weight = numpy.ones((1, 4, 8, 8)), numpy.ones((6, 4, 3, 3))
    with pytest.raises(ValueError, match=r"wanted 4/2 = 2\. This weight fits groups=1$"):
        dcn_np.deform_conv(x, None, weight, groups=2)


def test_groups_of_no_channels_are_bounded():
    x, weight = numpy.ones((1, 0, 3)), numpy.ones((0, 0, 1))
    assert dcn_np.deform_conv(x, None, weight, groups=3, offset_groups=2).shape == (1, 0, 3)
    for name in ("groups", "offset_groups"):
        with pytest.raises(ValueError, match=rf"^{name} is .* 0 channels: wanted at most 2\^16"):
            dcn_np.deform_conv(x, None, weight, **{name: 2**31})


# ---- kinds and dtypes of arrays


class Foreign:
    """An array of another library, as far as its methods tell."""

    shape = (2, 4, 5, 6)
    dtype = numpy.dtype(numpy.float32)

    def __repr__(self):
        return "Foreign()"  # the name of a test, and the same in every process: no address

    def __dlpack__(self):
        raise AssertionError("must not be asked")


@pytest.mark.parametrize(
    "value", [[[1.0]], "x", 1, 1.5, (1,), Foreign(), numpy.float32(1), True, b"x"], ids=repr
)
def test_what_is_no_array(function, value):
    for name in taken(function):
        refused(
            function, TypeError, rf"^{name} is .*wanted a numpy\.ndarray", arrays(2, function) | {name: value}
        )


def test_what_may_be_none(function):
    for name in taken(function):
        given = arrays(2, function) | {name: None}
        if name in ("offset", "mask", "bias"):
            function(**given)
        else:
            refused(function, TypeError, rf"^{name} is None; wanted a numpy\.ndarray", given)


def test_another_library_is_told_how_to_convert():
    given = arrays(2, dcn_np.deform_conv) | {"x": Foreign()}
    refused(dcn_np.deform_conv, TypeError, r"numpy\.from_dlpack\(x\)", given)


def test_masked_arrays_are_refused_and_other_subclasses_taken(function, tmp_path):
    given = arrays(2, function)
    for name, value in given.items():
        refused(function, TypeError, rf"{name}\.filled\(0\)", given | {name: numpy.ma.array(value)})
    mapped = {}
    for name, value in given.items():
        mapped[name] = numpy.memmap(tmp_path / name, value.dtype, "w+", shape=value.shape)
        mapped[name][:] = value
    for got, wanted in zip(results(function(**mapped)), results(function(**given)), strict=True):
        assert type(got) is numpy.ndarray
        numpy.testing.assert_array_equal(got, wanted)


def results(result):
    values = result if isinstance(result, tuple) else (result,)
    return [value for value in values if value is not None]


UNSUPPORTED = [
    "?",
    "i1",
    "u1",
    "i4",
    "i8",
    ">f2",
    "F",
    "D",
    "O",
    "S4",
    "U4",
    "M8[s]",
    "V4",
    ">f4",
    ">f8",
    "f4,f4",
]
if numpy.dtype(numpy.longdouble).itemsize > 8:
    UNSUPPORTED.append("g")


@pytest.mark.parametrize("dtype", UNSUPPORTED)
def test_dtypes_that_are_not_computed(function, dtype):
    given = arrays(2, function)
    for name in taken(function):
        value = numpy.zeros(given[name].shape, dtype)
        refused(function, TypeError, rf"^{name} has dtype .*; wanted ", given | {name: value})
    everything = {name: numpy.zeros(value.shape, dtype) for name, value in given.items()}
    refused(function, TypeError, "^x has dtype .*; wanted float32, float64", everything)


def test_hints_of_dtypes():
    given = arrays(2, dcn_np.deform_conv)
    image = {"x": numpy.ones(given["x"].shape, numpy.uint8)}
    match = r"^x has dtype uint8; wanted .*float16: astype\(numpy\.float32\) converts"
    refused(dcn_np.deform_conv, TypeError, match, given | image)
    swapped = given["x"].astype(given["x"].dtype.newbyteorder())
    refused(dcn_np.deform_conv, TypeError, "byte order of this machine", given | {"x": swapped})


def test_mixed_dtypes_name_the_odd_one(function):
    for name in taken(function):
        given = arrays(2, function)
        given[name] = given[name].astype(numpy.float64)
        odd, others = (name, "float32") if name != "x" else (r"\w+", "float64")
        refused(
            function, TypeError, rf"^{odd} has dtype float\d\d but x has {others}; wanted one dtype", given
        )


# ---- shapes


def test_ranks(function):
    given = arrays(2, function)
    for ndim in (0, 1, 2, 6):
        x = numpy.zeros((2,) * ndim, numpy.float32)
        refused(
            function, ValueError, rf"^x has {ndim} ax.*wanted 3, 4 or 5", given | {"x": x}, **no_out(function)
        )


def no_out(function):
    return {"out": None} if function in FORWARD else {}


def test_every_other_array_has_the_axes_of_x(function):
    given = arrays(2, function)
    for name in ("offset", "mask", "weight"):
        if name in given:
            refused(
                function, ValueError, rf"^{name} has 3 axes, .*but x has 4", given | {name: given[name][0]}
            )
            more = given[name][None]
            refused(function, ValueError, rf"^{name} has 5 axes, .*but x has 4", given | {name: more})


def test_every_extent_of_every_array_is_checked(function):
    """An extent one larger, or one smaller, of any array on any axis does not fit the others."""
    given = arrays(2, function)
    for name, value in given.items():
        for axis in range(value.ndim):
            for extent in (value.shape[axis] + 1, value.shape[axis] - 1, 0):
                shape = (*value.shape[:axis], extent, *value.shape[axis + 1 :])
                wrong = given | {name: numpy.zeros(shape, value.dtype)}
                refused(function, ValueError, r"; wanted|: wanted|needs", wrong)


def test_kernel_of_no_taps(function):
    given = arrays(2, function)
    given["weight"] = given["weight"][:, :, :, :0]
    refused(
        function,
        ValueError,
        r"^weight has shape \(6, 4, 3, 0\): 0 taps on spatial axis 1; wanted at least 1",
        given,
    )


def test_output_of_nothing_names_span_and_padded_size(function):
    match = (
        r"empty on axis 0: with dilation 4 a kernel of 3 taps spans 4\*\(3-1\)\+1 = 9, but x .* 5\+1\+2 = 8"
    )
    refused(function, ValueError, match, arrays(2, function), dilation=(4, 1), padding=((1, 2), (0, 0)))


def test_grad_output_shape():
    given = arrays(2, dcn_np.deform_conv_backward)
    given["grad_output"] = given["grad_output"][:, :5]
    match = (
        r"^grad_output has shape \(2, 5, 3, 5\); wanted .* = \(2, 6, 3, 5\): floor\(\(5\+0\+0-3\)/1\)\+1 = 3"
    )
    refused(dcn_np.deform_conv_backward, ValueError, match, given)


def zero_sizes():
    yield {"x": (0, 4, 5, 6), "weight": (6, 4, 3, 2), "padding": 0}, (0, 6, 3, 5)
    yield {"x": (2, 0, 5, 6), "weight": (6, 0, 3, 2), "padding": 0}, (2, 6, 3, 5)
    yield {"x": (2, 4, 5, 6), "weight": (0, 4, 3, 2), "padding": 0}, (2, 0, 3, 5)
    yield {"x": (2, 4, 0, 6), "weight": (6, 4, 3, 2), "padding": ((2, 1), 0)}, (2, 6, 1, 5)
    yield {"x": (2, 4, 5, 0), "weight": (6, 4, 3, 2), "padding": 1}, (2, 6, 5, 1)


@pytest.mark.parametrize(("sizes", "output"), [*zero_sizes()])
@pytest.mark.parametrize("deformed", [False, True])
def test_zero_sizes_give_empty_results_or_zeros_plus_bias(sizes, output, deformed):
    x, weight = numpy.ones(sizes["x"]), numpy.ones(sizes["weight"])
    shapes = (output[0], 12, *output[2:]), (output[0], 6, *output[2:])
    offset, mask = (numpy.full(shape, 0.3) for shape in shapes) if deformed else (None, None)
    bias = numpy.arange(float(output[1]))
    y = dcn_np.modulated_deform_conv(x, offset, mask, weight, bias, padding=sizes["padding"])
    assert y.shape == output
    if x.size == 0:
        numpy.testing.assert_array_equal(y, numpy.broadcast_to(bias[:, None, None], output))
    gradients = dcn_np.modulated_deform_conv_backward(
        numpy.ones(output), x, offset, mask, weight, padding=sizes["padding"]
    )
    for name, value in {"x": x, "offset": offset, "mask": mask, "weight": weight}.items():
        gradient = getattr(gradients, name)
        assert (gradient is None) == (value is None)
        if value is not None:
            numpy.testing.assert_array_equal(gradient, numpy.zeros(value.shape))
    numpy.testing.assert_array_equal(gradients.bias, numpy.ones(output).sum((0, 2, 3)))


# ---- the mistakes that users make


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_offset_channels_show_the_arithmetic_and_the_layout(function, ndim):
    taps, kernel = {1: (3, "3 long"), 2: (6, "3x2"), 3: (6, "3x2x1")}[ndim]
    channels = ndim * taps
    given = arrays(ndim, function)
    given["offset"] = given["offset"][:, 1:]
    arithmetic = rf"{ndim}\*{taps}\*1 = {channels}"
    match = f"^offset has {channels - 1} channels; a {kernel} kernel with 1 offset group needs {arithmetic}"
    refused(function, ValueError, match, given)
    if ndim > 1:
        refused(
            function, ValueError, f"interleaved.*{', '.join(a + '0' for a in AXES[ndim])}.*not all", given
        )


def test_every_message_about_the_shape_of_offset_tells_the_layout(function):
    given = arrays(2, function)
    offset = given["offset"]
    for wrong in (offset[:1], offset[:, 2:], offset[:, :, 1:], offset[..., 1:], offset[0], offset[None]):
        refused(function, ValueError, r"y0, x0, y1, x1, .*not all y, then all x", given | {"offset": wrong})


def offset_of(extents, channels=18):
    return numpy.zeros((1, channels, *extents), numpy.float32)


@pytest.mark.parametrize(
    ("extents", "parameters", "match"),
    [
        (
            (160, 160),
            {"stride": 2, "padding": 1},
            r"160x160 in space; the output is 80x80.*stride=2 was .*forgotten",
        ),
        (
            (162, 162),
            {"dilation": 2, "padding": 2},
            r"162x162 in space; the output is 160x160.*dilation=2 was .*forgotten",
        ),
        (
            (162, 162),
            {"dilation": 2, "stride": 2, "padding": 2},
            r"80x80.*stride=2 and dilation=2 was .*forgotten",
        ),
        ((158, 158), {"padding": 1}, r"padding=1 was .*forgotten in the layer"),
        (
            (158, 158),
            {"padding": 2, "dilation": 2},
            r"160x160.*is what dilation and padding left .*dilation=2 and padding=2 was",
        ),
        ((160, 159), {"stride": (2, 1), "padding": (1, (1, 0))}, r"stride=\(2, 1\) was .*forgotten"),
        ((80, 80), {"padding": 1}, r"stride=2 would give: stride was forgotten in this call"),
        ((156, 156), {}, r"dilation=2 would give: dilation was forgotten in this call"),
        ((77, 80), {"stride": 2, "padding": 1}, r"stride or dilation is what is usually forgotten there"),
    ],
)
def test_a_forgotten_stride_or_dilation_is_recognised(extents, parameters, match):
    given = {
        "x": numpy.zeros((1, 1, 160, 160), numpy.float32),
        "offset": offset_of(extents),
        "weight": numpy.zeros((1, 1, 3, 3), numpy.float32),
    }
    refused(dcn_np.deform_conv, ValueError, f"{match}.*interleaved", given, **parameters, out=None)
    given |= {"offset": None, "mask": offset_of(extents, 9)}
    refused(dcn_np.modulated_deform_conv, ValueError, match, given, **parameters, out=None)


def test_offsets_and_masks_in_one_tensor():
    given = arrays(2)
    both = numpy.concatenate([given["offset"], given["mask"]], axis=1)
    match = (
        r"^offset has 18 channels.* = 12\. 18 = 3\*6 could be .*t\[:, :12\] and mask = t\[:, 12:\].*sigmoid"
    )
    refused(dcn_np.modulated_deform_conv, ValueError, match, given | {"offset": both})
    match = r"^mask has 18 channels.* = 6\. 18 = 3\*6 could be"
    refused(dcn_np.modulated_deform_conv, ValueError, match, given | {"mask": both})


def test_offset_and_mask_swapped():
    given = arrays(2)
    swapped = given | {"offset": given["mask"], "mask": given["offset"]}
    refused(dcn_np.modulated_deform_conv, ValueError, "^offset has 6 .*may be swapped", swapped)
    refused(
        dcn_np.modulated_deform_conv,
        ValueError,
        "^mask has 12 .*may be swapped",
        given | {"mask": given["offset"]},
    )


def test_another_number_of_offset_groups_is_recognised():
    given = arrays(2)
    doubled = numpy.concatenate([given["offset"]] * 2, axis=1)
    refused(
        dcn_np.modulated_deform_conv,
        ValueError,
        "24 channels fit offset_groups=2",
        given | {"offset": doubled},
    )
    refused(
        dcn_np.modulated_deform_conv, ValueError, "12 channels fit offset_groups=1", given, offset_groups=2
    )


@pytest.mark.parametrize("stride", [1, (1, 1), [2, 2], False, 1.0])
def test_the_argument_order_of_mmcv_is_recognised(stride):
    x, offset, weight, _ = arrays(2, dcn_np.deform_conv).values()
    with pytest.raises(TypeError, match=r"^bias is .*mmcv's .* has stride where bias is here"):
        dcn_np.deform_conv(x, offset, weight, stride, 0, 1)


def test_a_mask_given_to_the_form_without():
    x, offset, mask, weight, bias = arrays(2).values()
    with pytest.raises(
        ValueError, match=r"^bias has 4 axes.*modulated_deform_conv\(x, offset, mask, weight, bias\) does"
    ):
        dcn_np.deform_conv(x, offset, mask, weight)
    with pytest.raises(TypeError, match=r"^stride is an array .*a mask only in modulated_deform_conv"):
        dcn_np.deform_conv(x, offset, mask, weight, bias)


def test_a_mask_missing_in_the_form_with():
    x, offset, _, weight, bias = arrays(2).values()
    with pytest.raises(ValueError, match=r"^weight has 1 axis.*deform_conv\(x, offset, weight, bias\)"):
        dcn_np.modulated_deform_conv(x, offset, weight, bias)
    with pytest.raises(TypeError, match=r"^weight is 1 .*Without a mask"):
        dcn_np.modulated_deform_conv(x, offset, weight, 1)


def test_a_bias_given_to_the_backward():
    given = arrays(2, dcn_np.deform_conv_backward)
    with pytest.raises(TypeError, match=r"^stride is an array .* a bias in no backward function"):
        dcn_np.deform_conv_backward(*given.values(), numpy.zeros(6, numpy.float32))


def test_an_image_without_a_batch():
    given = arrays(2, dcn_np.deform_conv)
    refused(dcn_np.deform_conv, ValueError, r"x\[None\]", given | {"x": given["x"][0]}, out=None)


# ---- out


def read_only(array):
    array.setflags(write=False)
    return array


def broadcast(array):
    return numpy.lib.stride_tricks.as_strided(array, strides=(*array.strides[:-1], 0))


def overlapping_rows(array):
    return numpy.lib.stride_tricks.as_strided(array, strides=(*array.strides[:-2], 4, 4))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda y: y[..., :-1], ValueError, r"^out has shape \(2, 6, 3, 4\); wanted .*\(2, 6, 3, 5\)"),
        (lambda y: y[0], ValueError, "^out has shape"),
        (lambda y: y.astype(numpy.float64), TypeError, "^out has dtype float64 but x has float32"),
        (lambda y: y.astype(">f4"), TypeError, "^out has dtype"),
        (lambda y: y.tolist(), TypeError, r"^out is .*; wanted a numpy\.ndarray, or an array .*, or None"),
        (lambda y: numpy.ma.array(y), TypeError, "^out is "),
        (read_only, ValueError, "^out is read-only"),
        (broadcast, ValueError, "^out has strides .*share memory"),
        (overlapping_rows, ValueError, "^out has strides .*share memory"),
    ],
)
@pytest.mark.parametrize("function", FORWARD, ids=lambda function: function.__name__)
def test_an_out_that_cannot_be_written_to(function, make, error, match):
    given = arrays(2, function)
    out = make(numpy.full((2, 6, 3, 5), 7, numpy.float32))
    refused(function, error, match, given, out=out)


@pytest.mark.parametrize("name", ["x", "offset", "mask", "weight", "bias"])
def test_out_in_the_memory_of_an_input(name):
    given = arrays(2)
    size = given[name].size
    buffer = numpy.zeros(size + 2 * 6 * 3 * 5, numpy.float32)
    for start in (0, size - 1):
        buffer[:size] = given[name].ravel()
        view = buffer[:size].reshape(given[name].shape)
        out = buffer[start : start + 180].reshape(2, 6, 3, 5)
        match = f"^out and {name} lie in overlapping memory"
        refused(dcn_np.modulated_deform_conv, ValueError, match, given | {name: view}, out=out)


def test_out_beside_an_input_is_written_and_returned():
    given = arrays(2)
    wanted = dcn_np.modulated_deform_conv(**given)
    buffer = numpy.zeros(6 + 180, numpy.float32)
    buffer[:6] = given["bias"]
    for out in (
        buffer[6:].reshape(2, 6, 3, 5),
        numpy.empty((5, 3, 6, 2), numpy.float32).T,
        buffer[:5:-1].reshape(wanted.shape),
    ):
        out[...] = 7
        assert dcn_np.modulated_deform_conv(**given | {"bias": buffer[:6]}, out=out) is out
        numpy.testing.assert_array_equal(out, wanted)


def test_a_refused_call_leaves_out_alone():
    """The last thing checked is wrong, everything else fits."""
    given = arrays(2)
    out = numpy.full((2, 6, 3, 5), 7, numpy.float32)
    refused(
        dcn_np.modulated_deform_conv, ValueError, "^float32_matmul", given, out=out, float32_matmul="fast"
    )
    refused(
        dcn_np.modulated_deform_conv, ValueError, "^mask", given | {"mask": given["mask"][:, 1:]}, out=out
    )


# ---- needs and the other options


@pytest.mark.parametrize("function", BACKWARD, ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("needs", "error", "match"),
    [
        ("x", TypeError, r"^needs is the string 'x'; wanted .*needs=\('x',\)"),
        ("weight", TypeError, "^needs is the string"),
        (b"x", TypeError, "^needs is the string"),
        (("x", "input"), ValueError, "^needs holds 'input'; wanted names out of 'x', 'offset', "),
        (("grad_x",), ValueError, "^needs holds 'grad_x'"),
        ((0,), TypeError, "^needs holds 0"),
        ((None,), TypeError, "^needs holds None"),
        (([],), TypeError, "^needs is "),
        (None, TypeError, "^needs is None; wanted a tuple"),
        (True, TypeError, "^needs is True"),
    ],
)
def test_needs_that_are_no_names(function, needs, error, match):
    refused(function, error, match, arrays(2, function), needs=needs)


def test_needs_of_a_mask_that_the_function_does_not_take():
    given = arrays(2, dcn_np.deform_conv_backward)
    refused(
        dcn_np.deform_conv_backward, ValueError, "^needs holds 'mask'; wanted", given, needs=("x", "mask")
    )


@pytest.mark.parametrize("function", BACKWARD, ids=lambda function: function.__name__)
def test_needs_takes_any_iterable_and_computes_just_those(function):
    given = arrays(2, function)
    names = [*taken(function)[1:], "bias"]
    for needs in (
        [],
        ["x"],
        {"weight", "bias"},
        (name for name in names),
        dict.fromkeys(names),
        numpy.array(["offset"]),
    ):
        needs = list(needs)
        gradients = function(**given, needs=iter(needs))
        assert {name for name in gradients._fields if getattr(gradients, name) is not None} == set(needs)


def test_needs_of_what_was_not_given_is_none():
    given = arrays(2, BACKWARD[1])
    gradients = BACKWARD[1](**given | {"offset": None}, needs=("offset", "mask"))
    assert gradients.offset is None
    assert gradients.mask.shape == given["mask"].shape
    gradients = BACKWARD[1](**given | {"offset": None, "mask": None})
    assert [name for name in gradients._fields if getattr(gradients, name) is None] == ["offset", "mask"]


def test_float32_matmul(function):
    given = arrays(2, function)
    refused(
        function,
        ValueError,
        "^float32_matmul is 'fast'; wanted one of 'strict', 'tf32'",
        given,
        float32_matmul="fast",
    )
    for value in (1, True, ["strict"], numpy.ones(2)):
        refused(function, TypeError, "^float32_matmul is .*; wanted one of", given, float32_matmul=value)
    strict, tf32 = (results(function(**given, float32_matmul=value)) for value in ("strict", "tf32"))
    for a, b in zip(strict, tf32, strict=True):
        numpy.testing.assert_array_equal(a, b)


def test_set_float32_matmul():
    assert dcn_np.get_float32_matmul() == "strict"
    try:
        dcn_np.set_float32_matmul("tf32")
        assert dcn_np.get_float32_matmul() == "tf32"
        with pytest.raises(ValueError, match=r"^float32_matmul is 'bf16'"):
            dcn_np.set_float32_matmul("bf16")
        assert dcn_np.get_float32_matmul() == "tf32"
    finally:
        dcn_np.set_float32_matmul("strict")


@pytest.mark.parametrize("function", BACKWARD, ids=lambda function: function.__name__)
def test_deterministic_is_a_bool(function):
    for value in (1, 0, "yes", None):
        refused(
            function,
            TypeError,
            "^deterministic is .*; wanted True or False",
            arrays(2, function),
            deterministic=value,
        )
    function(**arrays(2, function), deterministic=numpy.True_)


# ---- Geometry


def test_geometry_holds_what_was_given():
    given = arrays(3)
    for name in ("offset", "mask"):
        given[name] = numpy.zeros((2, given[name].shape[1] * 2, 4, 3, 11), numpy.float32)
    given["weight"] = given["weight"][:, :2]
    geometry = Geometry.of(
        *of_arrays(given),
        stride=(1, 2, 1),
        padding=((1, 2), 0, (4, 0)),
        dilation=(2, 1, 5),
        groups=2,
        offset_groups=2,
    )
    record = geometry.struct
    expected = {
        "ndim": 3,
        "batch": 2,
        "in_channels": 4,
        "out_channels": 6,
        "groups": 2,
        "offset_groups": 2,
        "input": (5, 6, 7),
        "kernel": (3, 2, 1),
        "stride": (1, 2, 1),
        "dilation": (2, 1, 5),
        "output": (4, 3, 11),
    }
    assert {name: getattr(geometry, name) for name in expected} == expected
    assert geometry.padding == ((1, 2), (0, 0), (4, 0))
    assert record["padding"].tolist() == [1, 0, 4]
    assert all(numpy.array_equal(record[name], value) for name, value in expected.items())
    assert (geometry.taps, geometry.output_shape, geometry.dtype) == (6, (2, 6, 4, 3, 11), numpy.float32)


def test_struct_is_one_shared_record_of_int64():
    given = of_arrays(arrays(1))
    record = Geometry.of(*given, **window()).struct
    assert record is Geometry.of(*given, **window()).struct
    assert record.dtype == GEOMETRY_DTYPE
    assert (record.shape, GEOMETRY_DTYPE.itemsize, record.flags.writeable) == ((), 192, False)
    assert {GEOMETRY_DTYPE[name].base for name in GEOMETRY_DTYPE.names} == {numpy.dtype(numpy.int64)}
    unused = {
        name: record[name][1:].tolist()
        for name in ("input", "kernel", "stride", "dilation", "output", "padding")
    }
    assert unused == {name: [1, 1] for name in unused} | {"padding": [0, 0]}


def test_a_dtype_with_metadata_is_its_dtype():
    """Of equal calls the first one's Geometry serves all; no other test has these shapes."""
    x = numpy.zeros((1, 1, 41), numpy.dtype(numpy.float32, metadata={"unit": "m"}))
    weight = numpy.zeros((1, 1, 1), numpy.float32)
    assert x.dtype.metadata
    assert Geometry.of(cpu.dtypes(), x, None, None, weight, None, **window()).dtype.metadata is None


# ---- what the docstrings show


def test_examples_of_the_docstrings():
    failed, attempted = doctest.testmod(sys.modules["dcn_np.deform_conv"])
    assert attempted > 10
    assert failed == 0


def test_docstrings_are_filled_in(function):
    text = function.__doc__
    assert "{" not in text.replace('{"strict", "tf32"}', "")
    for name in (
        "x :",
        "offset :",
        "weight :",
        "stride :",
        "offset_groups :",
        "float32_matmul :",
        "ValueError",
    ):
        assert name in text
