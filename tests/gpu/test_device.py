"""On a GPU: streams, graphs, devices, huge arrays, and the tools that watch memory."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulated
import numpy as np
import pytest
import test_emulation
from calls import environment
from problems import LAYOUTS
from roi_problems import OPERATORS
from test_gpu_fused import problem_of
from test_gpu_regions import NO_REGIONS, problem_with

import dcn_np
from dcn_np.cuda import modules, nvrtc
from dcn_np.cuda.launching import ARGUMENTS_DTYPE

HERE = Path(__file__).parent


def on_gpu(cupy, problem):
    """The arrays of a problem, in the order of the modulated functions."""
    arrays = problem.x, problem.offset, problem.mask, problem.weight
    return [cupy.asarray(array) for array in arrays]


def same(one, other):
    return all(bool((a == b).all()) for a, b in zip(one, other, strict=True))


def both(arrays, parameters, grad_output):
    y = dcn_np.modulated_deform_conv(*arrays, None, *parameters)
    gradients = dcn_np.modulated_deform_conv_backward(
        grad_output, *arrays, *parameters, deterministic=True, needs=("x", "offset", "mask", "weight", "bias")
    )
    return [y, *gradients]


# ---- streams and graphs


def kept_busy(cupy, seconds):
    """Queue work on the current stream that takes about so long."""
    a = cupy.random.rand(4096, 4096)
    a @ a
    cupy.cuda.get_current_stream().synchronize()
    started = time.perf_counter()
    a @ a
    cupy.cuda.get_current_stream().synchronize()
    for _ in range(int(seconds / (time.perf_counter() - started)) + 1):
        a @ a


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_a_late_producer_writes_is_read(cupy, record, dtype):
    problem = problem_of("3x3", 1, np.dtype(dtype), special=False)
    arrays, grad = on_gpu(cupy, problem), cupy.asarray(problem.grad_output)
    wanted = both(arrays, problem.parameters, grad)
    late = [cupy.full_like(array, float("nan")) for array in arrays]
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        kept_busy(cupy, 0.5)
        for to, array in zip(late, arrays, strict=True):
            to[...] = array
        started = time.perf_counter()
        results = both(late, problem.parameters, grad)
        queued = time.perf_counter() - started
        assert not stream.done, "the call waited for the stream, or the producer was too fast to tell"
    record[f"seconds to queue forward and backward, {dtype}"] = queued
    stream.synchronize()
    assert same(results, wanted)


@pytest.mark.parametrize("name", ["3x3", "offset groups"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_captured_graph_computes_anew(cupy, name, dtype):
    first = problem_of(name, 2, np.dtype(dtype), special=False)
    second = problem_of(name, 3, np.dtype(dtype), special=False)
    arrays, grad = on_gpu(cupy, first), cupy.asarray(first.grad_output)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        both(arrays, first.parameters, grad)  # loads the kernels
        stream.synchronize()
        stream.begin_capture()
        results = both(arrays, first.parameters, grad)
        graph = stream.end_capture()
        for to, array in zip(arrays, on_gpu(cupy, second), strict=True):
            to[...] = array
        graph.launch(stream)
        stream.synchronize()
        assert same(results, both(arrays, first.parameters, grad))
        stream.synchronize()


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_captured_graph_pools_other_regions(cupy, operator):
    """A graph looks at the regions when it runs: nothing of them was decided on the host."""
    first, second = (problem_with(region, operator) for region in [(0, 1, 1, 2, 3), NO_REGIONS["NaN"]])
    arrays, wanted = first.map_arrays(cupy.asarray), second.map_arrays(cupy.asarray).forward(dcn_np)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        arrays.forward(dcn_np)  # loads the kernels
        stream.synchronize()
        stream.begin_capture()
        result = arrays.forward(dcn_np)
        graph = stream.end_capture()
        arrays.rois[...] = cupy.asarray(second.rois)
        graph.launch(stream)
        stream.synchronize()
    assert cupy.isnan(wanted).any()
    assert bool(cupy.array_equal(result, wanted, equal_nan=True))


def test_several_threads_each_on_a_stream_of_its_own(cupy):
    problems = [problem_of("3x3", seed, np.dtype(np.float16), special=False) for seed in range(8)]

    def one(problem):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            arrays, grad = on_gpu(cupy, problem), cupy.asarray(problem.grad_output)
            results = [cupy.asnumpy(array) for array in both(arrays, problem.parameters, grad)]
            stream.synchronize()
        return results

    alone = [one(problem) for problem in problems]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, problems))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


# ---- arrays


def test_arrays_of_two_kinds_are_refused(cupy):
    problem = problem_of("3x3", 4)
    x, _, mask, weight = on_gpu(cupy, problem)
    with pytest.raises(ValueError, match="offset"):
        dcn_np.modulated_deform_conv(x, problem.offset, mask, weight, None, *problem.parameters)


def test_arrays_on_two_devices_are_refused(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    problem = problem_of("3x3", 4)
    x, offset, mask, weight = on_gpu(cupy, problem)
    with cupy.cuda.Device(1):
        weight = cupy.asarray(problem.weight)
    with pytest.raises(ValueError, match="weight"):
        dcn_np.modulated_deform_conv(x, offset, mask, weight, None, *problem.parameters)


def test_results_follow_the_memory_order(cupy):
    problem = problem_of("3x3", 5).map_arrays(LAYOUTS["channels_last"])
    x = cupy.asarray(np.ascontiguousarray(problem.x.transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2)
    _, offset, mask, weight = on_gpu(cupy, problem)
    y = dcn_np.modulated_deform_conv(x, offset, mask, weight, None, *problem.parameters)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous


def free_bytes(cupy):
    return cupy.cuda.runtime.memGetInfo()[0]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_more_than_2_31_elements(cupy, record, dtype):
    """The last image of a batch beyond 32-bit indices is what it is alone."""
    batch, channels, extent = 5, 256, 1320
    size = np.dtype(dtype).itemsize
    if free_bytes(cupy) < batch * channels * extent**2 * (2 * size + 8) + 2**33:
        pytest.skip("not enough memory")
    assert batch * channels * extent**2 > 2**31
    random = cupy.random.RandomState(0)

    def normal(*shape):
        array = cupy.empty(shape, dtype)
        for part in array:
            part[...] = random.standard_normal(part.shape, dtype=np.float32)
        return array

    x = normal(batch, extent, extent, channels).transpose(0, 3, 1, 2)
    offset, mask = normal(batch, 18, extent, extent), normal(batch, 9, extent, extent)
    weight = normal(64, channels, 3, 3)
    arrays, last = (x, offset, mask, weight), (x[-1:], offset[-1:], mask[-1:], weight)
    y = dcn_np.modulated_deform_conv(*arrays, None, 1, 1)
    assert bool((dcn_np.modulated_deform_conv(*last, None, 1, 1)[0] == y[-1]).all())
    needs = ("x", "offset", "mask")
    gradients = dcn_np.modulated_deform_conv_backward(y, *arrays, 1, 1, needs=needs)
    alone = dcn_np.modulated_deform_conv_backward(y[-1:].copy(), *last, 1, 1, needs=needs)
    assert bool((alone.offset[0] == gradients.offset[-1]).all())
    assert bool((alone.mask[0] == gradients.mask[-1]).all())
    assert bool(cupy.allclose(alone.x[0], gradients.x[-1], rtol=1e-2, atol=1e-1))
    cupy.get_default_memory_pool().free_all_blocks()


def test_one_long_axis(cupy):
    """The plain kernels, in one dimension, with 64-bit places in every array."""
    length = 2**31 + 1000
    if free_bytes(cupy) < 12 * length:
        pytest.skip("not enough memory")
    x = cupy.zeros((1, 1, length), np.float16)
    x[..., -500:] = cupy.arange(500)
    weight = cupy.ones((1, 1, 1), np.float16)
    y = dcn_np.deform_conv(x, None, weight)
    assert bool((y == x).all())
    cupy.get_default_memory_pool().free_all_blocks()


# ---- the emulation is like the device


def launched(cupy, kernel, given, results, threads, count=0, fault=False):
    """Run one of the emulation's own test kernels on the GPU."""
    text = test_emulation.FAULTS.read_text()
    headers = {file.name: file.read_text() for file in emulated.KERNELS.glob("*.hpp")}
    architecture = int(cupy.cuda.Device().compute_capability)
    options = [f"-arch=sm_{architecture}", "--std=c++17", "-lineinfo", *(["-DFAULT=1"] if fault else [])]
    cubin, _ = nvrtc.nvrtc().compile("faults.cu", text, headers, options)
    path = modules.cache_folder() / f"faults-{int(fault)}.cubin"
    modules.replace_file(path, cubin)
    function = cupy.RawModule(path=str(path)).get_function(kernel)
    there, back = cupy.asarray(given.view(np.uint8)), cupy.asarray(results.view(np.uint8))
    record = np.zeros(1, ARGUMENTS_DTYPE)
    record["x"]["data"], record["between"], record["count"] = there.data.ptr, back.data.ptr, count
    function((1, 1, 1), (threads, 1, 1), (record,), shared_mem=2 * 16 * threads)
    return cupy.asnumpy(back).view(results.dtype).reshape(results.shape)


@pytest.mark.parametrize("kernel", ["matrices", "product_f16", "product_bf16", "product_tf32", "shuffles"])
def test_the_device_does_what_the_emulation_does(cupy, kernel):
    rng = np.random.default_rng(0)
    given = rng.integers(-8, 8, 1024).astype(np.float32)
    if kernel == "product_f16":
        given = rng.integers(-8, 8, 2048).astype(np.float16)
    if kernel == "product_bf16":
        given = (rng.integers(-8, 8, 1024).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if kernel == "shuffles":
        given = given.astype(np.float64)
    results = np.zeros(512, np.uint32)
    there = launched(cupy, kernel, given, results.copy(), 32)
    assert np.array_equal(there, test_emulation.launch(kernel, given, results.copy(), threads=32))


def test_conversions_on_the_device_are_those_of_the_emulation(cupy):
    values = np.random.default_rng(1).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    results = np.zeros((values.size, 3), np.uint32)
    there = launched(cupy, "conversions", values, results.copy(), 32, values.size)
    here = test_emulation.launch("conversions", values, results.copy(), threads=32, count=values.size)
    assert np.array_equal(there, here)


# ---- compute-sanitizer


RUN = """
import cupy
import numpy as np
cupy.cuda.set_allocator(None)  # every array its own allocation: a step outside is seen
from test_gpu_fused import CASES, problem_of
from problems import random_problem
from roi_problems import OPERATORS, random_roi_problem
from test_gpu_regions import NO_REGIONS, problem_with
import dcn_np
import test_device

def run(problem):
    if problem.mask is None or problem.offset is None:
        return
    arrays = test_device.on_gpu(cupy, problem)
    test_device.both(arrays, problem.parameters, cupy.asarray(problem.grad_output))
for seed in range({cases}):
    run(random_problem(seed, with_mask=True, with_offset=True, non_finite=seed % 2 == 0))
for dtype in ("float16", "float32"):
    for name in list(CASES)[:: {step}]:
        run(problem_of(name, 1, np.dtype(dtype)))
for operator in OPERATORS:
    wrong = [problem_with(region, operator) for region in NO_REGIONS.values()]
    for problem in [random_roi_problem(3, operator), *wrong]:
        problem = problem.map_arrays(cupy.asarray)
        problem.forward(dcn_np), problem.backward(dcn_np)
cupy.cuda.Device().synchronize()
print("right")
"""

PLANTED = """
import cupy
import numpy as np
import test_device
cupy.cuda.set_allocator(None)
given = np.zeros(64, np.float32)
test_device.launched(cupy, "{kernel}", given, given.copy(), 64, fault={fault})
cupy.cuda.Device().synchronize()
print("right")
"""


def watched(tool, code, timeout=560):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([str(HERE), variables["PYTHONPATH"]])
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("tool", "kernel", "word"),
    [("memcheck", "global_out_of_bounds", "Invalid"), ("racecheck", "missing_barrier", "hazard")],
)
def test_the_tools_find_what_was_planted(cupy, tool, kernel, word):
    planted = PLANTED.format(kernel=kernel)
    fault = planted.replace("import test_device\n", "import test_device\ntest_device.FAULT = True\n", 1)
    right, wrong = watched(tool, planted), watched(tool, fault)
    assert right.returncode == 0, right.stdout + right.stderr
    assert wrong.returncode == 9
    assert word in wrong.stdout


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_tools_find_nothing(cupy, tool):
    done = watched(tool, RUN.format(cases=10, step=3))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "right" in done.stdout
