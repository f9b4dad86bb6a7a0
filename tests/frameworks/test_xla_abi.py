"""src/xla.cpp behind XLA's interface: our declarations against its header; frames that must be refused."""

import ctypes
import os
import subprocess
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from calls import python
from problems import random_problem

import dcn_np
import dcn_np.jax as dcn_jax
from dcn_np.geometry import GEOMETRY_DTYPE, Geometry

ROOT = Path(__file__).parent.parent.parent
FORWARD, BACKWARD = 0, 1
NAMES = ("x", "offset", "mask", "weight", "bias", "output")
INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED = 3, 8, 12
EXECUTE = 3
BUFFER, ARRAY, SCALAR = 1, 1, 3
# As XLA numbers them; the first five are what the handlers know.
DTYPES = {"float32": 11, "float64": 12, "float16": 10, "bfloat16": 16, "int64": 5, "int32": 4}

PARTS = {"with_offset": True, "with_mask": True, "with_bias": True}
COUNTS = {"batch": 2, "in_channels": 4, "out_channels": 6, "groups": 2, "offset_groups": 2}
WINDOW = {"kernel": (3, 2), "stride": (1, 2), "padding": ((1, 1),) * 2, "dilation": (1, 1)}
SIZES = PARTS | COUNTS | WINDOW | {"extent": (6, 7)}


class Value(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("extents", ctypes.POINTER(ctypes.c_int64)),
        ("kind", ctypes.c_int),
    ]


class Frame(ctypes.Structure):
    _fields_ = [
        ("size_lacking", ctypes.c_size_t),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
        ("stage", ctypes.c_int),
        ("arguments", ctypes.c_int64),
        ("results", ctypes.c_int64),
        ("attributes", ctypes.c_int64),
        ("values", ctypes.POINTER(Value)),
    ]


def value(array, kind=BUFFER, name=b""):
    rank = -1 if kind == SCALAR else array.ndim
    extents = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
    return Value(name, DTYPES[array.dtype.name], array.ctypes.data, rank, extents, kind)


def pointer_of(handler):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.c_void_p(get(dcn_np.cpu.xla_handlers()[handler], None))


@pytest.fixture(scope="session")
def frames(tmp_path_factory):
    """The compiled xla_frames.cpp; that it compiles is the proof of every size and place."""
    library = tmp_path_factory.mktemp("xla") / "frames.so"
    includes = [f"-I{folder}" for folder in (jax.ffi.include_dir(), ROOT / "src")]
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-shared", "-fPIC", *includes]
    source = Path(__file__).with_name("xla_frames.cpp")
    done = subprocess.run([*command, str(source), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = ctypes.CDLL(str(library))
    found.seen_pointers.restype = ctypes.POINTER(ctypes.c_void_p)
    return found


def bits(names):
    return np.int64(sum(1 << NAMES.index(name) for name in names))


class Call:
    """One frame, right unless a test makes it wrong."""

    def __init__(self, handler=FORWARD, dtype="float32", **sizes):
        problem = random_problem(0, 2, np.float64, special=False, **SIZES | sizes)
        problem = problem.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self.handler, self.problem = handler, problem
        self.geometry = Geometry.of(
            dcn_np.cpu.dtypes(), problem.x, problem.offset, problem.mask, problem.weight, problem.bias,
            *problem.parameters,
        )  # fmt: skip
        wide = np.float32 if problem.x.itemsize == 2 else problem.dtype
        self.arrays = {"x": problem.x, "offset": problem.offset, "mask": problem.mask,
                       "weight": problem.weight.astype(wide), "bias": problem.bias.astype(wide)}  # fmt: skip
        if handler == FORWARD:
            self.given, self.needs = NAMES[:5], ("output",)
            self.results = {"output": np.full(self.geometry.output_shape, 7, problem.dtype)}
        else:
            self.arrays["output"] = problem.grad_output
            self.given, self.needs = ("x", "offset", "mask", "weight", "output"), NAMES[:5]
            self.results = {name: np.full_like(self.arrays[name], 7) for name in self.needs}
        self.numbers = np.frombuffer(self.geometry.struct, np.int64).copy()
        self.record = self.numbers.view(GEOMETRY_DTYPE)
        self.attributes = [
            value(self.numbers, ARRAY, b"geometry"),
            value(self.scalar(bits(self.given)), SCALAR, b"given"),
            value(self.scalar(bits(self.needs)), SCALAR, b"needs"),
        ]
        self.arguments = [value(self.arrays[name]) for name in self.given]
        self.places = [value(self.results[name]) for name in self.needs]
        self.frame = {"size_lacking": 0, "major": 0, "minor": 3, "stage": EXECUTE}

    def scalar(self, number):
        kept = np.array(number)
        self.__dict__.setdefault("scalars", []).append(kept)
        return kept

    def make(self, frames):
        """Return the code and the message of the error; 0 is none."""
        values = [*self.arguments, *self.places, *self.attributes]
        frame = Frame(*self.frame.values(), len(self.arguments), len(self.places), len(self.attributes),
                      (Value * len(values))(*values))  # fmt: skip
        message = ctypes.c_char_p()
        code = frames.call_handler(pointer_of(self.handler), ctypes.byref(frame), ctypes.byref(message))
        return code, message.value.decode()

    def untouched(self):
        return all((result == 7).all() for result in self.results.values())


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("handler", [FORWARD, BACKWARD])
def test_a_right_frame_is_computed(frames, handler, dtype):
    call = Call(handler, dtype)
    assert call.make(frames) == (0, "")
    if handler == FORWARD:
        assert np.array_equal(call.results["output"], call.problem.forward(dcn_np))
        return
    for name, gradient in call.problem.backward(dcn_np)._asdict().items():
        assert np.array_equal(call.results[name].astype(gradient.dtype), gradient)


def wrong_numbers():
    """What may not stand in a geometry: field, index, number."""
    counts = ["batch", "in_channels", "out_channels", "groups", "offset_groups"]
    for name in counts:
        yield name, (), -1
        yield name, (), 2**62 + 1
    yield from [("ndim", (), number) for number in (0, 4, -1, 3)]
    yield from [(name, (), 0) for name in ("groups", "offset_groups")]
    yield from [(name, (), 3) for name in ("groups", "offset_groups", "in_channels", "out_channels", "batch")]
    for name in ("input", "kernel", "stride", "padding", "dilation", "output"):
        yield name, (0,), -1
        yield name, (1,), 2**62 + 1
        yield name, (2,), 2
    yield from [(name, (1,), 0) for name in ("kernel", "stride", "dilation", "output")]
    yield from [(name, (1,), 50) for name in ("input", "kernel", "output")]
    yield from [(name, (1,), 2**61) for name in ("input", "kernel", "output")]


@pytest.mark.parametrize("handler", [FORWARD, BACKWARD])
@pytest.mark.parametrize(("name", "index", "number"), list(wrong_numbers()))
def test_a_geometry_that_is_not_of_the_arrays_is_refused(frames, handler, name, index, number):
    call = Call(handler)
    call.record[name][0, *index] = number
    code, message = call.make(frames)
    assert code == INVALID_ARGUMENT
    assert message.startswith("dcn_np: ")
    assert call.untouched()


@pytest.mark.parametrize("name", ["stride", "dilation"])
def test_coordinates_beyond_64_bits_are_refused(frames, name):
    call = Call()
    call.record[name][0, 0] = 2**61
    assert call.make(frames) == (INVALID_ARGUMENT, "dcn_np: geometry is not one of this version")


def test_groups_of_nothing_are_bounded(frames):
    call = Call(in_channels=0, out_channels=0, groups=1, offset_groups=1)
    assert call.make(frames)[0] == 0
    call.record["groups"] = 2**40
    assert call.make(frames) == (INVALID_ARGUMENT, "dcn_np: geometry is not one of this version")


def test_what_no_address_reaches_is_refused(frames):
    call = Call(batch=0)
    assert call.make(frames)[0] == 0
    call.record["input"][0, :2] = 2**31
    call.arguments[0].extents = (ctypes.c_int64 * 4)(0, 4, 2**31, 2**31)
    assert call.make(frames) == (INVALID_ARGUMENT, "dcn_np: x is not the array that the geometry says")


def argument(number, **changes):
    def change(call):
        for name, new in changes.items():
            setattr(call.arguments[number], name, new)

    return change


def without(what):
    def change(call):
        del getattr(call, what)[-1]

    return change


def attribute(number, **changes):
    def change(call):
        for name, new in changes.items():
            setattr(call.attributes[number], name, new)

    return change


def given(number):
    def change(call):
        call.scalars[0][...] = number

    return change


def one_more(call):
    call.arguments.append(call.arguments[-1])
    call.scalars[0] |= 1 << 6


def not_given(name):
    def change(call):
        del call.arguments[call.given.index(name)]
        call.scalars[0] ^= bits([name])

    return change


def positions(dtype):
    def change(call):
        for number in (1, 2):
            call.arguments[number].dtype = DTYPES[dtype]

    return change


def no_needs(call):
    call.places.clear()
    call.scalars[1][...] = 0


def needs(number):
    def change(call):
        call.scalars[1][...] = number

    return change


WRONG = {
    "rank": argument(0, rank=3),
    "no data": argument(0, data=None),
    "dtype of x": argument(0, dtype=DTYPES["int32"]),
    "dtype of x alone": argument(0, dtype=DTYPES["float64"]),
    "dtype of offset": argument(1, dtype=DTYPES["float64"]),
    "dtype of offset alone": argument(1, dtype=DTYPES["bfloat16"]),
    "dtype of both": positions("bfloat16"),
    "dtype of mask": argument(2, dtype=DTYPES["float16"]),
    "dtype of weight": argument(3, dtype=DTYPES["float16"]),
    "kind of argument": argument(3, kind=2),
    "too few arguments": without("arguments"),
    "too few results": without("places"),
    "no geometry": attribute(0, name=b"geometri"),
    "geometry as a scalar": attribute(0, kind=SCALAR, rank=-1),
    "geometry of other numbers": attribute(0, dtype=DTYPES["float64"]),
    "geometry too short": attribute(0, extents=(ctypes.c_int64 * 1)(23)),
    "geometry too long": attribute(0, extents=(ctypes.c_int64 * 1)(25)),
    "given as an array": attribute(1, kind=ARRAY, rank=1),
    "given of other numbers": attribute(1, dtype=DTYPES["float32"]),
    "no needs": without("attributes"),
    "no x": not_given("x"),
    "no weight": not_given("weight"),
    "fewer given than arrays": given(0b010111),
    "given of unknown arrays": one_more,
    "given below zero": given(-1),
    "fewer needs than arrays": needs(0),
    "needs of something else": needs(1 << 6),
}


@pytest.mark.parametrize("handler", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_frame_is_refused(frames, handler, name):
    call = Call(handler)
    WRONG[name](call)
    code, message = call.make(frames)
    assert (code, message[:8]) == (INVALID_ARGUMENT, "dcn_np: ")
    assert call.untouched()


def test_a_forward_without_an_output_is_refused(frames):
    call = Call()
    no_needs(call)
    assert call.make(frames) == (INVALID_ARGUMENT, "dcn_np: needs of a forward is the output")


def test_a_backward_of_nothing_is_none(frames):
    call = Call(BACKWARD)
    no_needs(call)
    assert call.make(frames) == (0, "")


def test_a_backward_without_grad_output_is_refused(frames):
    call = Call(BACKWARD)
    not_given("output")(call)
    assert call.make(frames)[0] == INVALID_ARGUMENT


def test_gradients_of_what_is_not_given_are_refused(frames):
    call = Call(BACKWARD)
    del call.arguments[1]
    call.scalars[0][...] = bits(["x", "mask", "weight", "output"])
    assert call.make(frames) == (
        INVALID_ARGUMENT,
        "dcn_np: needs of a backward are gradients of what is given",
    )
    assert call.untouched()


@pytest.mark.parametrize("handler", [FORWARD, BACKWARD])
@pytest.mark.parametrize("wrong", [{"major": 1}, {"minor": 0}, {"size_lacking": 8}, {"stage": 2}], ids=str)
def test_an_unknown_interface_is_refused(frames, handler, wrong):
    call = Call(handler)
    call.frame |= wrong
    code, message = call.make(frames)
    assert code == UNIMPLEMENTED
    assert "unknown" in message or "stage" in message
    assert call.untouched()


def test_a_newer_minor_version_is_served(frames):
    call = Call()
    call.frame["minor"] = 9
    assert call.make(frames) == (0, "")


@pytest.mark.parametrize("handler", [FORWARD, BACKWARD])
@pytest.mark.parametrize(
    ("minor", "lacking", "answer"), [(3, 0, 3), (2, 0, 2), (9, 0, 3), (0, 0, 1), (-1, 0, 1), (3, 8, -1)]
)
def test_the_question_at_registration_is_answered(frames, handler, minor, lacking, answer):
    size = ctypes.c_size_t(lacking)
    assert frames.ask_version(pointer_of(handler), minor, size) == answer


def test_xla_s_own_memory_is_computed_on(frames):
    call = Call(out_channels=4, groups=1)
    arrays = [jax.numpy.asarray(array) for array in call.arrays.values()]
    frames.spy_on(pointer_of(FORWARD))
    jax.ffi.register_ffi_target("dcn_np_spy", jax.ffi.pycapsule(frames.spy), platform="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcn_jax, "_FORWARD", "dcn_np_spy")
        convolve = jax.jit(lambda *a: dcn_jax.modulated_deform_conv(*a, *call.problem.parameters))
        y = convolve(*arrays).block_until_ready()
    want = [array.unsafe_buffer_pointer() for array in (*arrays, y)]
    assert frames.seen_pointers()[: len(want)] == want


WITHOUT_MEMORY = """
import ctypes, resource, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
import test_xla_abi
from calls import mapped_and_resident
frames = ctypes.CDLL(sys.argv[1])
sizes = {"batch": 8, "in_channels": 64, "out_channels": 64, "groups": 1, "extent": (128, 128)}
call = test_xla_abi.Call(int(sys.argv[3]), **sizes)
test_xla_abi.dcn_np.set_num_threads(1)
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (mapped_and_resident()[0] + 2**20, limits[1]))
code, message = call.make(frames)
resource.setrlimit(resource.RLIMIT_AS, limits)
print(code, message, call.make(frames)[0])
"""


@pytest.mark.parametrize("handler", [FORWARD, BACKWARD])
def test_without_memory_there_is_an_error(frames, handler):
    printed = python(WITHOUT_MEMORY, frames._name, Path(__file__).parent, handler)
    assert printed == (
        f"{RESOURCE_EXHAUSTED} dcn_np: no memory for the workspace of a deformable convolution 0"
    )
