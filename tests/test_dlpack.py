"""Arrays of other libraries: taken and given back without a copy, and capsules that lie."""

import ctypes
import gc
import sys
import types
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from calls import python
from problems import LAYOUTS, random_problem

import dcn_np
from dcn_np import _dlpack

# ---- a library of our own: NumPy's memory behind DLPack


class Tensor:
    """An array of a library that has nothing but DLPack."""

    __module__ = "other_library"

    def __init__(self, array, *, versioned=True):
        self.array, self.versioned = array, versioned

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **asked):
        if not self.versioned:
            if asked:
                raise TypeError("unexpected keyword")
            return self.array.__dlpack__()
        return self.array.__dlpack__(**asked)


def from_dlpack(exported):
    array = np.asarray(_dlpack.memory_of(exported.__dlpack__(max_version=(1, 0))))
    return Tensor(array)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    module = types.ModuleType("other_library")
    module.from_dlpack = from_dlpack
    monkeypatch.setitem(sys.modules, "other_library", module)
    return module


def problem_of(dtype=np.float32, seed=0, **kind):
    return random_problem(
        seed, 2, dtype, batch=2, with_offset=True, with_mask=True, with_bias=True, special=False, **kind
    )


def call(problem, wrap, **keywords):
    """y and gradients with every array wrapped."""
    arrays = [wrap(a) for a in (problem.x, problem.offset, problem.mask, problem.weight)]
    bias, grad = wrap(problem.bias), wrap(problem.grad_output)
    y = dcn_np.modulated_deform_conv(*arrays, bias, *problem.parameters, **keywords)
    return y, dcn_np.modulated_deform_conv_backward(grad, *arrays, *problem.parameters)


@pytest.mark.parametrize("versioned", [True, False], ids=["versioned", "from before versions"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=lambda dtype: dtype.__name__)
def test_the_same_kind_comes_out(dtype, versioned):
    problem = problem_of(dtype)
    y, gradients = call(problem, lambda array: Tensor(array, versioned=versioned))
    want, wanted = call(problem, lambda array: array)
    assert type(y) is Tensor
    assert np.array_equal(y.array, want)
    for one, other in zip(gradients, wanted, strict=True):
        assert type(one) is Tensor
        assert one.array.dtype == dtype
        assert np.array_equal(one.array, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_order(layout):
    problem = problem_of()
    laid_out = problem.map_arrays(LAYOUTS[layout])
    y, gradients = call(laid_out, Tensor)
    want, wanted = call(problem, lambda array: array)
    assert np.array_equal(y.array, want)
    assert all(np.array_equal(one.array, other) for one, other in zip(gradients, wanted, strict=True))


def test_nothing_is_copied(monkeypatch):
    """The kernels get the caller's addresses, and the caller the kernels'."""
    from dcn_np import cpu

    seen = {}
    native = cpu._native.deform_conv

    def spy(isa, dtype, images, positions, threads, geometry, x, offset, mask, weight, bias, output):
        arrays = {"x": x, "offset": offset, "mask": mask, "weight": weight, "bias": bias, "y": output}
        seen.update({name: array.ctypes.data for name, array in arrays.items()})
        return native(isa, dtype, images, positions, threads, geometry, x, offset, mask, weight, bias, output)

    monkeypatch.setattr(cpu, "_native", types.SimpleNamespace(**{**vars(cpu._native), "deform_conv": spy}))
    for layout in ("contiguous", "channels_last", "read_only"):
        problem = problem_of()
        x = LAYOUTS[layout](problem.x)
        y = dcn_np.modulated_deform_conv(
            *map(Tensor, (x, problem.offset, problem.mask, problem.weight, problem.bias)), *problem.parameters
        )
        assert seen["x"] == x.ctypes.data
        for name in ("offset", "mask", "weight", "bias"):
            assert seen[name] == getattr(problem, name).ctypes.data
        assert seen["y"] == y.array.ctypes.data
        assert y.array.ctypes.data % 64 == 0


def test_results_are_aligned():
    problem = problem_of(seed=3)
    y, gradients = call(problem, lambda array: array)
    for array in (y, *gradients):
        assert array.ctypes.data % 64 == 0
    last = problem.map_arrays(LAYOUTS["channels_last"])
    y, gradients = call(last, lambda array: array)
    assert np.moveaxis(y, 1, -1).flags.c_contiguous
    assert np.moveaxis(gradients.x, 1, -1).flags.c_contiguous


def test_out_of_another_library():
    problem = problem_of()
    out = Tensor(np.full_like(problem.grad_output, 7))
    arrays = [Tensor(a) for a in (problem.x, problem.offset, problem.mask, problem.weight, problem.bias)]
    assert dcn_np.modulated_deform_conv(*arrays, *problem.parameters, out=out) is out
    assert np.array_equal(out.array, problem.forward(dcn_np))
    read_only = Tensor(LAYOUTS["read_only"](problem.grad_output))
    with pytest.raises(ValueError, match="out is read-only"):
        dcn_np.modulated_deform_conv(*arrays, *problem.parameters, out=read_only)


def test_memory_lives_as_long_as_it_is_used():
    problem = problem_of()
    y, gradients = call(problem, lambda array: Tensor(array.copy()))
    want = problem.forward(dcn_np)
    gc.collect()
    garbage = [np.full(y.array.shape, 3.0, np.float32) for _ in range(50)]
    assert np.array_equal(y.array, want)
    assert len(garbage) == 50
    assert all(np.isfinite(gradient.array).all() for gradient in gradients)


def test_two_libraries_in_one_call_are_refused():
    problem = problem_of()
    with pytest.raises(
        ValueError, match=r"offset is a numpy\.ndarray, but x is a other_library array on the CPU"
    ):
        dcn_np.modulated_deform_conv(
            Tensor(problem.x), problem.offset, problem.mask, problem.weight, None, *problem.parameters
        )


def test_what_has_a_buffer_is_read_and_gives_numpy_arrays():
    problem = problem_of()
    views = [memoryview(a) for a in (problem.x, problem.offset, problem.mask, problem.weight)]
    y = dcn_np.modulated_deform_conv(*views, None, *problem.parameters)
    assert type(y) is np.ndarray
    assert np.array_equal(y, problem.replace(bias=None).forward(dcn_np))


class WithGradient(Tensor):
    __module__ = "torch"
    requires_grad = True

    def detach(self):
        return Tensor(self.array)


@pytest.mark.parametrize("recording", [True, False])
def test_a_tensor_with_gradient(monkeypatch, recording):
    torch = types.ModuleType("torch")
    torch.is_grad_enabled, torch.from_dlpack = lambda: recording, from_dlpack
    monkeypatch.setitem(sys.modules, "torch", torch)
    problem = problem_of()
    arrays = [
        WithGradient(a) for a in (problem.x, problem.offset, problem.mask, problem.weight, problem.bias)
    ]
    if recording:
        with pytest.raises(TypeError, match=r"^x is a torch\.Tensor that requires a gradient.*dcn_np\.torch"):
            dcn_np.modulated_deform_conv(*arrays, *problem.parameters)
    else:
        y = dcn_np.modulated_deform_conv(*arrays, *problem.parameters)
        assert np.array_equal(y.array, problem.forward(dcn_np))


def test_a_library_that_takes_nothing_back(monkeypatch, library):
    del library.from_dlpack
    problem = problem_of()
    with pytest.raises(TypeError, match="other_library has no from_dlpack"):
        call(problem, Tensor)


class Elsewhere(Tensor):
    __module__ = "other_library"

    def __dlpack_device__(self):
        return 10, 0  # ROCm


def test_other_devices_are_refused():
    problem = problem_of()
    with pytest.raises(TypeError, match=r"^x is .* on a device of DLPack's type 10; wanted"):
        call(problem, Elsewhere)


class Broken(Tensor):
    __module__ = "other_library"

    def __dlpack__(self, **asked):
        raise RuntimeError("conjugated")


class Placed(Tensor):
    """One that says where it is twice."""

    __module__ = "other_library"

    def __init__(self, array, device, dlpack_device=(1, 0)):
        super().__init__(array)
        self.device, self.dlpack_device = device, dlpack_device

    def __dlpack_device__(self):
        return self.dlpack_device


def test_devices_are_compared():
    problem = problem_of()
    arrays = problem.x, problem.offset, problem.mask, problem.weight
    y = dcn_np.modulated_deform_conv(*[Placed(a, "cpu") for a in arrays], None, *problem.parameters)
    assert np.array_equal(y.array, problem.replace(bias=None).forward(dcn_np))
    *others, weight = [Placed(a, "cpu") for a in arrays]
    weight.device, weight.dlpack_device = "gpu", (2, 0)
    with pytest.raises(
        ValueError, match="weight is a other_library array on CUDA device 0, but x is a other"
    ):
        dcn_np.modulated_deform_conv(*others, weight, None, *problem.parameters)


def test_integers_are_refused_with_what_is_wanted():
    with pytest.raises(TypeError, match=r"it holds int32; wanted float32, float64, float16 or bfloat16$"):
        consume(Hostile(code=0))


def test_what_a_library_raises_is_passed_on_with_the_name():
    with pytest.raises(TypeError, match=r"^x is .*cannot be read through DLPack: conjugated"):
        call(problem_of(), Broken)


# ---- capsules


def test_bfloat16_goes_out_and_comes_in():
    bits = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    memory = _dlpack.memory_of(_dlpack.Exported(bits, True).__dlpack__(max_version=(1, 1)))
    assert memory.is_bfloat16
    back = np.asarray(memory).view(ml_dtypes.bfloat16)
    assert back.ctypes.data == bits.ctypes.data
    assert np.array_equal(back.view(np.uint16), bits)


def test_bool_goes_out_and_comes_in():
    given = np.array([[True, False], [False, True]])
    back = np.asarray(_dlpack.memory_of(given.__dlpack__()))
    assert back.ctypes.data == given.ctypes.data
    assert back.dtype == bool
    assert np.array_equal(back, given)
    problem = problem_of()
    with pytest.raises(TypeError, match=r"^mask has dtype bool"):
        call(replace(problem, mask=problem.mask > 0), Tensor)


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_numpy_reads_what_we_export(max_version):
    given = np.arange(12.0).reshape(3, 4)[:, ::-1]
    exported = _dlpack.Exported(given)
    assert exported.__dlpack_device__() == (1, 0)
    back = np.from_dlpack(exported)
    assert back.ctypes.data == given.ctypes.data
    assert np.array_equal(back, given)
    before = sys.getrefcount(given)
    capsule = exported.__dlpack__(max_version=max_version)
    assert sys.getrefcount(given) > before
    del capsule  # never consumed: it lets go of the array itself
    assert sys.getrefcount(given) == before
    with pytest.raises(BufferError):
        exported.__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError):
        exported.__dlpack__(copy=True)


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", DELETER))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    )


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = (
    ctypes.py_object,
    (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
)


class Hostile:
    """An array whose capsule says what it is told to say."""

    __module__ = "other_library"

    def __init__(self, *, versioned=False, name=None, deleter=True, major=1, flags=0, **lies):
        self.data = np.arange(16.0, dtype=np.float32)
        shape, strides = lies.pop("shape", (1, 1, 4, 4)), lies.pop("strides", None)
        self.extents = (ctypes.c_int64 * max(1, len(shape)))(*shape) if shape is not None else None
        self.steps = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        self.deleted = 0
        fields = {
            "data": self.data.ctypes.data,
            "device_type": 1,
            "ndim": 4 if shape is None else len(shape),
            "code": 2,
            "bits": 32,
            "lanes": 1,
            "byte_offset": 0,
        } | lies

        def delete(pointer):
            self.deleted += 1

        self.delete = DELETER(delete) if deleter else DELETER()
        self.managed = Versioned() if versioned else Managed()
        self.managed.deleter = self.delete
        if versioned:
            self.managed.major, self.managed.flags = major, flags
        for field, value in fields.items():
            setattr(self.managed.tensor, field, value)
        if self.extents is not None:
            self.managed.tensor.shape = self.extents
        if self.steps is not None:
            self.managed.tensor.strides = self.steps
        self.name = name or (b"dltensor_versioned" if versioned else b"dltensor")

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **asked):
        return new_capsule(ctypes.addressof(self.managed), self.name, None)


class ExchangeTable(ctypes.Structure):
    """DLPackExchangeAPI, as far as it is read."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("from_array", ctypes.c_void_p),
        ("to_array", ctypes.c_void_p),
        ("lend", ctypes.c_void_p),
    )


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.c_void_p))
def from_array(array, to):
    array.asked += 1
    to[0] = ctypes.addressof(array.managed)
    return 0


MADE = []  # keeps what to_array makes, which gives its only reference away


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
def to_array(tensor, to):
    MADE.append(Tensor(np.asarray(_dlpack.memory_of(new_capsule(tensor, b"dltensor_versioned", None)))))
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(MADE[-1]))
    to[0] = id(MADE[-1])
    return 0


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
def lend(array, to):
    to[0].device_type, to[0].device_id = array.device
    return 0


def table(function, major=1, back=to_array, lend=None):
    functions = (ctypes.cast(one, ctypes.c_void_p) for one in (function, back, lend))
    return ExchangeTable(major, 0, None, None, *functions)


def table_capsule(table, name=b"dlpack_exchange_api"):
    return new_capsule(ctypes.addressof(table), name, None)


# One that makes nothing: -1 where __bool__ raises, else 1.
NOTHING = ctypes.pythonapi.PyObject_IsTrue
TABLE, SECOND, LENDING = table(from_array), table(from_array, 2), table(from_array, lend=lend)
FAILING, FAILING_EVERYWHERE = table(NOTHING), table(NOTHING, lend=NOTHING)


class Exchanging(Hostile):
    """The same through C functions."""

    __dlpack_c_exchange_api__ = table_capsule(TABLE)
    __module__ = "other_library"

    def __init__(self, **lies):
        super().__init__(versioned=True, **lies)
        self.asked = 0

    def __dlpack__(self, **asked):
        raise BufferError("its __dlpack__ was called")


def consume(value):
    return dcn_np.deform_conv(value, None, Tensor(np.ones((1, 1, 1, 1), np.float32)))


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize(
    "honest",
    [
        {},
        {"strides": (16, 16, 4, 1)},
        {"strides": (16, 16, 1, 4)},
        {"strides": (0, 0, 0, 0)},
        {"shape": (1, 1, 2, 4), "byte_offset": 32},
        {"shape": (1, 1, 2, 4), "byte_offset": 2},  # unaligned
        {"deleter": False},
        {"shape": (0, 1, 4, 4), "data": None},
    ],
    ids=str,
)
def test_an_honest_capsule_is_taken_and_deleted_once(versioned, honest):
    value = Hostile(versioned=versioned, **honest)
    y = consume(value)
    del y
    gc.collect()
    assert value.deleted == (0 if honest.get("deleter") is False else 1)


LIES = {
    "negative extent": {"shape": (1, 1, -4, 4)},
    "more elements than memory": {"shape": (1, 2**31, 2**31, 4)},
    "extents whose product overflows to 0": {"shape": (1, 2**32, 2**32, 1)},
    "bytes that overflow": {"shape": (1, 1, 2**61, 1)},
    "no shape": {"shape": None},
    "negative ndim": {"ndim": -1},
    "65 axes": {"ndim": 65},
    "lanes": {"lanes": 4},
    "no lanes": {"lanes": 0},
    "integers": {"code": 0},
    "8 bits": {"bits": 8},
    "128 bits": {"bits": 128},
    "an unknown kind": {"code": 77},
    "no data": {"data": None},
    "another device": {"device_type": 2},
    "an offset beyond memory": {"byte_offset": 2**63},
    "strides beyond memory": {"strides": (2**62, 2**62, 2**61, 1)},
    "negative strides beyond memory": {"strides": (1, 1, -(2**63), 1)},
}


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_a_capsule_that_lies_is_refused_and_deleted_once(versioned, lie):
    value = Hostile(versioned=versioned, **LIES[lie])
    with pytest.raises(TypeError, match=r"^x is .*cannot be read through DLPack: it"):
        consume(value)
    gc.collect()
    assert value.deleted == 1


@pytest.mark.parametrize("lie", LIES)
def test_a_c_function_that_lies_is_refused_and_what_it_made_deleted_once(lie):
    value = Exchanging(**LIES[lie])
    with pytest.raises(TypeError, match=r"^x is .*cannot be read through DLPack: its __dlpack__ was called"):
        consume(value)
    gc.collect()
    assert (value.asked, value.deleted) == (1, 1)


def test_c_functions_are_preferred():
    value = Exchanging(shape=(1, 1, 2, 4), byte_offset=32)
    y = consume(value)
    assert np.array_equal(y.array, value.data[8:].reshape(1, 1, 2, 4))
    gc.collect()
    assert (value.asked, value.deleted) == (1, 1)
    read_only = _dlpack.memory_by(Exchanging.__dlpack_c_exchange_api__, Exchanging(flags=1))
    assert not np.asarray(read_only).flags.writeable


def test_a_result_goes_out_by_the_c_function(library):
    del library.from_dlpack
    y = consume(Exchanging(shape=(1, 1, 2, 4)))
    assert y is MADE[-1]
    again = _dlpack.array_by(Exchanging.__dlpack_c_exchange_api__, _dlpack.Exported(y.array))
    assert again.array.ctypes.data == y.array.ctypes.data
    assert sys.getrefcount(again) == 3  # MADE, a name and the argument


def test_a_result_that_the_c_function_does_not_take():
    idle = table(from_array, back=ctypes.pythonapi.PyErr_CheckSignals)
    with pytest.raises(BufferError, match="made nothing"):
        _dlpack.array_by(table_capsule(idle), _dlpack.Exported(np.zeros(3)))


def test_c_functions_say_where_an_array_is():
    class Lending(Exchanging):
        __module__ = "other_library"
        __dlpack_c_exchange_api__ = table_capsule(LENDING)
        device = 1, 0

        def __dlpack_device__(self):
            raise AssertionError("was called")

    x, weight = Lending(), Lending()
    assert dcn_np.deform_conv(x, None, weight).array.shape == (1, 1, 1, 1)
    weight.device = 2, 3
    with pytest.raises(ValueError, match=r"weight is .* on CUDA device 3, but x is .* on the CPU"):
        dcn_np.deform_conv(x, None, weight)


@pytest.mark.parametrize("fails", [True, False], ids=["raises", "makes nothing"])
def test_where_a_c_function_fails_the_method_is_asked(fails):
    class Failing(Exchanging):
        __module__ = "other_library"
        __dlpack_c_exchange_api__ = table_capsule(FAILING_EVERYWHERE if fails else FAILING)

        def __bool__(self):
            if fails:
                raise RuntimeError("the C function does not like this one")
            return True

    with pytest.raises(TypeError, match=r"its __dlpack__ was called"):
        consume(Failing())
    with pytest.raises(RuntimeError if fails else BufferError, match=r"does not like|made nothing"):
        _dlpack.memory_by(Failing.__dlpack_c_exchange_api__, Failing())


@pytest.mark.parametrize(
    "capsule",
    [table_capsule(SECOND), table_capsule(TABLE, b"another"), "no capsule"],
    ids=["version 2", "another name", "no capsule"],
)
def test_other_c_functions_are_not_called(capsule):
    class Other(Exchanging):
        __module__ = "other_library"
        __dlpack_c_exchange_api__ = capsule
        __dlpack__ = Hostile.__dlpack__

    value = Other()
    assert consume(value).array.shape == (1, 1, 4, 4)
    assert value.asked == 0


def test_c_functions_of_a_base_class_are_not_called():
    class Derived(Exchanging):
        __module__ = "other_library"
        __dlpack__ = Hostile.__dlpack__

    value = Derived()
    assert consume(value).array.shape == (1, 1, 4, 4)
    assert value.asked == 0


def test_who_lies_about_the_device_is_found_out():
    x, weight = Hostile(), Hostile(device_type=2)
    x.device = weight.device = "cpu"
    with pytest.raises(TypeError, match=r"^weight is .*its capsule says device type 2, not the CPU's"):
        dcn_np.deform_conv(x, None, weight)


def test_an_unknown_version_is_only_deleted():
    value = Hostile(versioned=True, major=2, shape=None, ndim=77)
    with pytest.raises(TypeError, match="version 2 of DLPack"):
        consume(value)
    assert value.deleted == 1


@pytest.mark.parametrize("name", [b"used_dltensor", b"other", b"dltensor_versioned2"])
def test_a_capsule_of_another_name_is_left_alone(name):
    value = Hostile(name=name)
    with pytest.raises(TypeError, match="used up, or none of DLPack"):
        consume(value)
    assert value.deleted == 0


def test_a_capsule_is_used_up():
    value = Hostile()
    capsule = value.__dlpack__()
    memory = _dlpack.memory_of(capsule)
    with pytest.raises(BufferError, match="used up"):
        _dlpack.memory_of(capsule)
    del memory
    assert value.deleted == 1


def test_what_is_no_capsule():
    with pytest.raises(TypeError, match="is a str; wanted a capsule"):
        _dlpack.memory_of("capsule")


def test_read_only_memory_is_read_only():
    value = Hostile(versioned=True, flags=1)
    array = np.asarray(_dlpack.memory_of(value.__dlpack__()))
    assert not array.flags.writeable


def test_memory_that_outlives_the_interpreter():
    code = """
import sys, numpy as np
from dcn_np import _dlpack
class Keep:
    pass
sys.modules["kept"] = _dlpack.Exported(np.zeros(3)).__dlpack__(max_version=(1, 0))
print("right")
"""
    assert python(code) == "right"
