"""dcn_np.jax on CUDA: what it lowers to, and the numbers, on the emulated GPU.

XLA here knows no CUDA: its calls of Python on the CPU, and buffers there, take the place of those on a GPU.
"""

import sys
from functools import partial

import emulated_gpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.buffer_callback import buffer_callback
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_jax import (
    EMPTY,
    FLOATS,
    NAMES,
    WITHOUT,
    backward,
    check_against_the_reference,
    check_bits,
    check_empty,
    convolution,
    problem_of,
    stacks,
)

import dcn_np
from dcn_np import cuda
from dcn_np import jax as dcn_jax

STREAM = 0xABC0


class Context:
    """What XLA says of a call."""

    stream = STREAM


class Buffer:
    """A buffer on the CPU that passes for one on a GPU."""

    def __init__(self, buffer):
        self._array = np.asarray(buffer)
        self.shape, self.dtype = buffer.shape, buffer.dtype
        self.__cuda_array_interface__ = {"data": (self._array.ctypes.data, not buffer.writeable)}

    def __dlpack_device__(self):
        return 2, 0

    def poison(self):
        self._array[...] = np.nan


def lent(callback, results):
    """`buffer_callback`, of buffers that pass for those on a GPU."""

    def call(context, out, *arguments):
        made = [Buffer(each) for each in out]
        for buffer in made:
            buffer.poison()
        callback(Context(), made, *map(Buffer, arguments))

    return buffer_callback(call, results)


def lower(function, platform="cpu"):
    mlir.register_lowering(
        dcn_jax._engine, mlir.lower_fun(function, multiple_results=True), platform=platform
    )
    jax.clear_caches()


@pytest.fixture
def gpu(monkeypatch):
    """The functions of dcn_np on the emulated GPU, which those of dcn_np.jax compute on too."""
    monkeypatch.setattr(dcn_jax, "buffer_callback", lent)
    lower(dcn_jax._on_cuda)
    with emulated_gpu.emulated_gpu():
        yield emulated_gpu
    lower(dcn_jax._on_cpu)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_against_the_reference(ndim, dtype):
    check_against_the_reference(ndim, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("without", WITHOUT)
def test_the_bits_are_those_of_the_plain_functions(gpu, without, dtype):
    check_bits(gpu, without, dtype)


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty_arrays(gpu, sizes):
    check_empty(gpu, sizes)


def test_kernels_are_queued_on_the_stream_of_xla(gpu):
    problem, arrays, _ = problem_of()
    emulated_gpu.streams.clear()
    backward(problem, arrays)
    assert set(emulated_gpu.streams) == {STREAM}
    problem.forward(gpu)
    assert set(emulated_gpu.streams) == {STREAM, 0}


def test_what_the_call_says_of_the_device_arrives(gpu, monkeypatch):
    asked = []
    for name in ("deform_conv", "deform_conv_backward_into"):
        plain = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *a, plain=plain: (asked.append(a), plain(*a))[1])
    _, (x, *others), parameters = problem_of(dtype=np.float32)

    def gradient(**keywords):
        asked.clear()
        call = partial(dcn_jax.modulated_deform_conv, **keywords)
        jax.grad(lambda x: call(x, *others, *parameters).sum())(x).block_until_ready()
        (*_, of_forward), (*_, gradients, deterministic, of_backward) = asked
        assert [name for name, array in gradients._asdict().items() if array is not None] == ["x"]
        assert of_forward == of_backward
        return deterministic, of_forward

    assert gradient() == (False, "strict")
    assert gradient(deterministic=True, float32_matmul="tf32") == (True, "tf32")
    dcn_np.set_float32_matmul("tf32")
    try:
        assert gradient() == (False, "tf32")
    finally:
        dcn_np.set_float32_matmul("strict")


def test_vmap_of_gradients(gpu):
    _, arrays, parameters = problem_of()
    batched = (0, 0, 0, None, None)
    stacked = stacks(arrays, batched)
    gradients = jax.grad(lambda *a: (convolution(parameters)(*a) ** 2).sum(), (0, 3))
    got = jax.jit(jax.vmap(gradients, batched))(*stacked)
    for index in range(3):
        one = gradients(*(a if dim is None else a[index] for a, dim in zip(stacked, batched, strict=True)))
        assert np.array_equal(got[0][index], one[0])
        assert np.array_equal(got[1][index], one[1])


def test_shard_map(gpu):
    problem, arrays, parameters = problem_of(batch=4)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    data, whole = PartitionSpec("data"), PartitionSpec()
    specs = (data, data, data, whole, whole)
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]
    call = jax.shard_map(convolution(parameters), mesh=mesh, in_specs=specs, out_specs=data)
    assert np.array_equal(jax.jit(call)(*placed), problem.forward(gpu))
    gradients = jax.grad(lambda *a: (call(*a) * problem.grad_output).sum(), tuple(range(5)))
    got = dict(zip(NAMES, jax.jit(gradients)(*placed), strict=True))
    for name, want in problem.backward(gpu)._asdict().items():
        assert jnp.allclose(got[name], want, rtol=1e-10, atol=1e-12), name


def test_an_error_of_the_device_is_raised(gpu, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("NVRTC 13.0 does not know this GPU")

    monkeypatch.setattr(cuda, "deform_conv", fails)
    _, arrays, parameters = problem_of()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"NVRTC 13\.0 does not know this GPU"):
        convolution(parameters)(*arrays).block_until_ready()


# ---- what it lowers to


def traced(differentiated):
    def loss(x, weight):
        return dcn_jax.deform_conv(x, None, weight).sum()

    x, weight = jnp.ones((1, 4, 6, 6), jnp.float16), jnp.ones((4, 4, 3, 3), jnp.float16)
    return jax.jit(jax.grad(loss) if differentiated else loss).trace(x, weight)


@pytest.mark.parametrize("differentiated", [False, True])
def test_each_platform_has_its_own_call(monkeypatch, differentiated):
    ours, of_python = "dcn_np_deform_conv", "xla_buffer_python_gpu_callback"
    on_cpu = traced(differentiated).lower(lowering_platforms=("cpu",)).as_text()
    assert f"@{ours}" in on_cpu
    assert of_python not in on_cpu
    monkeypatch.setitem(sys.modules, "cupy", emulated_gpu)
    on_cuda = traced(differentiated).lower(lowering_platforms=("cuda",)).as_text()
    assert f"@{of_python}" in on_cuda
    assert f"custom_call @{ours}" not in on_cuda


def test_without_cupy_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"^dcn_np\.jax .* on a CUDA device, .* pip install"):
        traced(False).lower(lowering_platforms=("cuda",))
