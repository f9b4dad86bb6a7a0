"""Prepared layers: the bits of others, no allocation, what ends a preparation, threads, forks, Ctrl-C."""

import copy
import ctypes
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from calls import mapped_and_resident, python, python_with_calls
from emulated_gpu import emulated_gpu, on_gpu

import dcn_np
from dcn_np import layers
from dcn_np.layers import Conv2d, DeformConv2d, ModulatedDeformConv2d
from dcn_np.threads import exactly

KINDS = [getattr(layers, name) for name in layers.__all__ if "Conv" in name]
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
# Just large enough to be given to several threads.
EXTENTS = {1: (700,), 2: (25, 27), 3: (8, 9, 8)}

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a fork, or /proc")


def named(value):
    return value.__name__


def built(kind, channels=16, **given):
    """A layer whose offsets are no whole numbers."""
    rng = np.random.default_rng(1)
    given = {"padding": 1, "rng": rng} | given
    layer = kind(channels, channels, 3, **given)
    if "conv_offset_weight" in layer.parameters():
        layer.conv_offset_weight[:] = rng.normal(0, 0.1, layer.conv_offset_weight.shape)
        layer.conv_offset_bias[:] = rng.normal(0, 1, layer.conv_offset_bias.shape)
    return layer


def image(layer, seed=2, batch=2, extent=None):
    rng = np.random.default_rng(seed)
    shape = (batch, layer.in_channels, *(extent or EXTENTS[layer.ndim]))
    return rng.normal(size=shape).astype(layer.dtype)


def same_bits(some, others):
    return some.dtype == others.dtype and some.shape == others.shape and some.tobytes() == others.tobytes()


# ---- what is computed


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize("team", [1, 3])
def test_a_prepared_call_gives_the_bits_of_another(isa, kind, dtype, team):
    layer = built(kind, dtype=dtype)
    images = [image(layer, seed) for seed in (3, 4)]
    want = [layer.forward(x) for x in images]
    with exactly(team):
        layer.prepare(images[0].shape)
        out = np.empty_like(want[0])
        for x, y in zip([*images, images[0]], [*want, want[0]], strict=True):
            assert layer.forward(x, out=out) is out
            assert same_bits(out, y)


WINDOWS = {
    "groups": {"groups": 4},
    "depthwise": {"groups": 16},
    "offset groups": {"offset_groups": 4},
    "strided, dilated, no bias": {"stride": 2, "dilation": 2, "padding": (3, 2), "bias": False},
    "twice the sigmoid": {"mask_activation": "2*sigmoid"},
}


@pytest.mark.parametrize("window", WINDOWS)
def test_so_it_does_for_any_numbers_of_a_layer(isa, window):
    layer = built(ModulatedDeformConv2d, **WINDOWS[window])
    x = image(layer)
    y = layer.forward(x)
    layer.prepare(x.shape)
    assert same_bits(layer.forward(x), y)


def misaligned(x):
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
    raw[:] = x.reshape(-1).view(np.uint8)
    return raw.view(x.dtype).reshape(x.shape)


def read_only(x):
    x = x.copy()
    x.setflags(write=False)
    return x


ORDERS = {
    "channels last": lambda x: x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2),
    "every second pixel": lambda x: x.repeat(2, axis=3)[..., ::2],
    "backwards": lambda x: x[:, :, ::-1].copy()[:, :, ::-1],
    "misaligned": misaligned,
    "read-only": read_only,
    "a buffer": memoryview,
}


# In an image of many rows it matters to the space whether they follow each other.
@pytest.mark.parametrize("extent", [EXTENTS[2], (3000, 2)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [Conv2d, ModulatedDeformConv2d], ids=named)
def test_images_may_lie_in_any_order(kind, order, extent):
    layer = built(kind)
    x = image(layer, extent=extent)
    given = ORDERS[order](x)
    y = layer.forward(given)
    layer.prepare(x.shape)
    found, out = layer.forward(given), np.empty(y.shape, y.dtype)
    assert same_bits(found, y)
    assert found.strides == y.strides
    assert same_bits(layer.forward(given, out=out), y)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", [Conv2d, ModulatedDeformConv2d], ids=named)
def test_out_may_lie_in_any_order(kind, prepared):
    layer = built(kind)
    x = image(layer)
    y = layer.forward(x)
    if prepared:
        layer.prepare(x.shape)
    for out in (np.empty_like(y), ORDERS["channels last"](y * 0), np.zeros((*y.shape, 2), y.dtype)[..., 0]):
        assert layer.forward(x, out=out) is out
        assert same_bits(out, y)


@pytest.mark.parametrize("channels", [1, 3])
def test_few_channels_and_no_images_are_no_problem(channels):
    layer = built(ModulatedDeformConv2d, channels)
    for batch in (0, 1, 5):
        layer.unprepare()
        x = image(layer, batch=batch)
        y = layer.forward(x)
        layer.prepare(x.shape)
        assert same_bits(layer.forward(x), y)


@pytest.mark.parametrize(("before", "during"), [(1, 4), (4, 1), (4, 2)])
def test_a_call_may_have_fewer_threads_than_were_prepared_for_and_takes_no_more(before, during):
    layer = built(ModulatedDeformConv2d)
    x = image(layer)
    y = layer.forward(x)
    with exactly(before):
        layer.prepare(x.shape)
    with exactly(during):
        assert same_bits(layer.forward(x), y)


def test_the_instruction_set_is_that_of_the_preparation():
    layer = built(ModulatedDeformConv2d)
    x = image(layer)
    for name in dcn_np.available_isas():
        with dcn_np.use_isa(name):
            y = layer.forward(x)
            layer.prepare(x.shape)
        assert same_bits(layer.forward(x), y)
        layer.unprepare()


# ---- arguments


@pytest.fixture
def layer():
    layer = built(ModulatedDeformConv2d)
    layer.prepare((2, 16, 25, 27))
    return layer


@pytest.mark.parametrize("shape", [(1, 16, 25, 27), (2, 16, 27, 25), (2, 16, 25), (2, 8, 25, 27)])
def test_another_shape_than_prepared_names_both(layer, shape):
    with pytest.raises(ValueError, match="x has the shape") as caught:
        layer.forward(np.zeros(shape, np.float32))
    assert f"x has the shape {shape}; the layer is prepared for (2, 16, 25, 27)" in str(caught.value)


def test_another_dtype_than_prepared_names_both(layer):
    with pytest.raises(TypeError, match="x has dtype float64; the layer is prepared for float32"):
        layer.forward(np.zeros((2, 16, 25, 27)))


def test_what_is_no_array_is_named(layer):
    with pytest.raises(TypeError, match=r"x is \[\[1.0\]\] \(list\); wanted a numpy"):
        layer.forward([[1.0]])
    with pytest.raises(TypeError, match=r"out is \[1.0\] \(list\); wanted a numpy"):
        layer.forward(image(layer), out=[1.0])


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (lambda x: np.empty((2, 16, 25, 26), np.float32), ValueError, "out has shape"),
        (lambda x: np.empty((2, 16, 25, 27)), TypeError, "out has dtype float64"),
        (lambda x: read_only(np.empty((2, 16, 25, 27), np.float32)), ValueError, "out is read-only"),
        (lambda x: np.broadcast_to(np.float32(0), (2, 16, 25, 27)), ValueError, "out is read-only"),
        (lambda x: x, ValueError, "out and x lie in overlapping memory"),
        (lambda x: x[::-1], ValueError, "out and x lie in overlapping memory"),
    ],
)
def test_an_out_that_does_not_fit_is_refused_and_nothing_written(layer, prepared, out, error, message):
    if not prepared:
        layer.unprepare()
    x = image(layer)
    before, place = x.copy(), out(x)
    with pytest.raises(error, match=message):
        layer.forward(x, out=place)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(
    ("shape", "given", "error", "message"),
    [
        (5, {}, TypeError, r"input_shape is 5 \(int\); wanted \(batch, 16, \*input\) with 2 spatial axes"),
        ((2, 16, 25), {}, ValueError, r"input_shape is \(2, 16, 25\); wanted \(batch, 16, \*input\)"),
        ((2, 15, 25, 27), {}, ValueError, r"input_shape is \(2, 15, 25, 27\); wanted \(batch, 16"),
        ((2, 16, 25, -1), {}, ValueError, r"input_shape\[3\] is -1; wanted at least 0"),
        ((2, 16, 25, 2.5), {}, TypeError, r"input_shape\[3\] is 2.5"),
        ((2, 16, 0, 9), {"padding": 0}, ValueError, "the output would be empty on axis 0"),
        ((2, 16, 25, 27), {"concurrency": 0}, ValueError, "concurrency is 0; wanted at least 1"),
        ((2, 16, 25, 27), {"concurrency": 1.5}, TypeError, r"concurrency is 1.5 \(float\); wanted"),
        ((2, 16, 25, 27), {"concurrency": 2**31}, ValueError, "concurrency is 2147483648; wanted at most"),
    ],
)
def test_a_wrong_argument_of_prepare_is_named_and_changes_nothing(shape, given, error, message):
    padding = {"padding": given.pop("padding")} if "padding" in given else {}
    layer = built(Conv2d, **padding)
    layer.prepare((1, 16, 9, 9))
    with pytest.raises(error, match=message):
        layer.prepare(shape, **given)
    assert layer.prepared_shape == (1, 16, 9, 9)


def test_what_is_too_large_is_a_memory_error_and_leaves_the_layer_unprepared():
    layer = built(Conv2d, padding=0)
    with pytest.raises(MemoryError):
        layer.prepare((1, 16, 2**28, 2**28))
    assert layer.prepared_shape is None
    assert layer.weight.flags.writeable


@pytest.mark.parametrize("kind", [Conv2d, ModulatedDeformConv2d], ids=named)
def test_a_layer_on_a_gpu_has_nothing_to_prepare(kind):
    layer = built(kind)
    with emulated_gpu():
        for name, value in layer.parameters().items():
            setattr(layer, name, on_gpu(value))
        with pytest.raises(TypeError, match="the parameters are CuPy's; prepare wants NumPy's"):
            layer.prepare((1, 16, 9, 9))
    assert layer.prepared_shape is None


# ---- what ends a preparation


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_parameters_are_read_only_while_the_layer_is_prepared(kind):
    layer = built(kind)
    x = image(layer)
    layer.prepare(x.shape)
    for value in layer.parameters().values():
        with pytest.raises(ValueError, match="read-only"):
            value *= 2
    layer.unprepare()
    for value in layer.parameters().values():
        value *= 2
    y = layer.forward(x)
    layer.prepare(x.shape)
    assert same_bits(layer.forward(x), y)


def test_parameters_that_were_read_only_before_stay_so():
    layer = built(Conv2d)
    layer.weight.setflags(write=False)
    layer.prepare((1, 16, 9, 9))
    layer.prepare((2, 16, 9, 9))
    layer.unprepare()
    layer.unprepare()
    assert not layer.weight.flags.writeable
    assert layer.bias.flags.writeable


def test_a_state_dict_ends_the_preparation(layer):
    other = built(ModulatedDeformConv2d, rng=7)
    old = layer.weight
    x = image(layer)
    layer.load_state_dict(other.state_dict())
    assert layer.prepared_shape is None
    assert old.flags.writeable
    assert same_bits(layer.forward(x), other.forward(x))


def test_a_state_dict_that_does_not_fit_does_not(layer):
    with pytest.raises(ValueError, match="state has no"):
        layer.load_state_dict({})
    assert layer.prepared_shape == (2, 16, 25, 27)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", np.ones((16, 16, 3, 3), np.float32)),
        ("bias", None),
        ("conv_offset_weight", np.zeros((27, 16, 3, 3), np.float32)),
        ("conv_offset_bias", np.ones(27, np.float32)),
        ("stride", (2, 2)),
        ("mask_activation", "2*sigmoid"),
    ],
)
def test_setting_a_parameter_or_a_number_ends_the_preparation(layer, name, value):
    x = image(layer)
    setattr(layer, name, value)
    assert layer.prepared_shape is None
    unprepared = built(ModulatedDeformConv2d)
    setattr(unprepared, name, value)
    assert same_bits(layer.forward(x), unprepared.forward(x))


def test_what_is_written_through_an_older_view_is_not_seen():
    for kind in (Conv2d, ModulatedDeformConv2d):
        layer = built(kind)
        views = [value[:] for value in layer.parameters().values()]
        x = image(layer)
        y = layer.forward(x)
        layer.prepare(x.shape)
        for view in views:
            view[:] = 9
        assert same_bits(layer.forward(x), y)


def test_a_prepared_layer_remembers_nothing_for_backward():
    layer = built(DeformConv2d)
    x = image(layer)
    y = layer.forward(x)
    layer.prepare(x.shape)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the layer is prepared and keeps nothing for backward"):
            layer.backward(y)
        layer.forward(x)
    layer.unprepare()
    with pytest.raises(RuntimeError, match="backward without a forward before it"):
        layer.backward(y)
    layer.forward(x)
    layer.backward(y)


def test_the_branch_of_a_prepared_layer_is_the_same(layer):
    x = image(layer)
    found = layer.branch(x)
    layer.unprepare()
    assert all(same_bits(a, b) for a, b in zip(found, layer.branch(x), strict=True))


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_not_prepared_and_computes_the_same(layer, way):
    x, other = image(layer), way(layer)
    assert other.prepared_shape is None
    assert same_bits(other.forward(x), layer.forward(x))
    assert layer.prepared_shape == x.shape


def test_memory_is_given_back():
    layer = built(ModulatedDeformConv2d, 256, rng=0)

    def prepare_and_forget(times):
        for _ in range(times):
            layer.prepare((1, 256, 9, 9), concurrency=3)
        layer.unprepare()

    prepare_and_forget(3)
    before = mapped_and_resident()[1]
    prepare_and_forget(30)  # of 4 MB and more each
    assert mapped_and_resident()[1] - before < 30 * 2**20


# ---- threads


@pytest.mark.parametrize("kind", [Conv2d, ModulatedDeformConv2d], ids=named)
def test_threads_share_a_layer(kind):
    layer = built(kind)
    images = [image(layer, seed) for seed in range(4)]
    want = [layer.forward(x) for x in images]
    with exactly(2):
        layer.prepare(images[0].shape, concurrency=4)
    wrong, ready = [], threading.Barrier(4)

    def work(number):
        out = np.empty_like(want[0])
        ready.wait()
        for step in range(40):
            index = (number + step) % 4
            layer.forward(images[index], out=out)
            if not same_bits(out, want[index]):
                wrong.append((number, step))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


class Held:
    """A call that waits in the middle."""

    def __init__(self, call):
        self.call, self.begun, self.go_on = call, threading.Event(), threading.Event()

    def run(self, x, out):
        self.begun.set()
        assert self.go_on.wait(20)
        return self.call.run(x, out)


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_call_too_many_is_refused_and_the_others_are_right(concurrency):
    layer = built(ModulatedDeformConv2d)
    x = image(layer)
    y = layer.forward(x)
    layer.prepare(x.shape, concurrency=concurrency)
    idle, found = layer._prepared._idle, []
    held = [Held(idle.popleft()) for _ in range(concurrency)]
    idle.extend(held)
    workers = [threading.Thread(target=lambda: found.append(layer.forward(x))) for _ in held]
    for worker in workers:
        worker.start()
    assert all(call.begun.wait(20) for call in held)
    message = f"prepared for {concurrency} calls? at a time, and as many run; for n wanted prepare"
    with pytest.raises(RuntimeError, match=message):
        layer.forward(x)
    for call in held:
        call.go_on.set()
    for worker in workers:
        worker.join()
    assert [same_bits(y, other) for other in (*found, layer.forward(x))] == [True] * (concurrency + 1)


def test_an_error_in_a_call_gives_its_place_back(layer, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    x = image(layer)
    call = layer._prepared._call
    with monkeypatch.context() as patch:
        patch.setattr(call, "run", fail)
        with pytest.raises(KeyboardInterrupt):
            layer.forward(x)
    layer.forward(x)


# ---- forks and Ctrl-C

LAYER = """
import signal
from test_prepared import built, image, same_bits, ModulatedDeformConv2d
layer = built(ModulatedDeformConv2d)
x = image(layer)
want = layer.forward(x)
with threads.exactly(3):
    layer.prepare(x.shape)
"""

FORKS = """
def right():
    with threads.exactly(3):
        return same_bits(layer.forward(x), want)

assert right()
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if right() and right() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right()
print("done")
"""

# The call of another thread, which does not exist in the child, has the only place.
FORK_AMID_A_CALL = """
from test_prepared import Held
idle = layer._prepared._idle
held = Held(idle.popleft())
idle.append(held)
worker = threading.Thread(target=layer.forward, args=(x,))
worker.start()
assert held.begun.wait(20)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if all(same_bits(layer.forward(x), want) for _ in range(3)) else 1)
assert os.waitpid(child, 0)[1] == 0
held.go_on.set()
worker.join()
assert same_bits(layer.forward(x), want)
print("done")
"""


@linux_only
@pytest.mark.parametrize("code", [FORKS, FORK_AMID_A_CALL], ids=["between calls", "amid a call"])
def test_children_compute_the_same(code):
    assert python_with_calls(LAYER + code) == "done"


INTERRUPTED = """
import signal
from dcn_np.layers import Conv2d

class Stop(Exception):
    pass

def stop(number, frame):
    raise Stop

signal.signal(signal.SIGALRM, stop)
# Enough work on the slowest instruction set to be in the middle of it.
layer = Conv2d(384, 384, 3, padding=1, rng=0)
x = np.random.default_rng(0).standard_normal((1, 384, 40, 40), np.float32)
with threads.exactly(2):
    want = layer.forward(x)
    layer.prepare(x.shape)
    begin = time.perf_counter()
    layer.forward(x)
    whole = time.perf_counter() - begin
    signal.setitimer(signal.ITIMER_REAL, whole / 4)
    begin = time.perf_counter()
    try:
        layer.forward(x)
        print("finished")
    except Stop:
        print("stopped", time.perf_counter() - begin < 0.7 * whole)
    print(np.array_equal(layer.forward(x), want))
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGALRM")
def test_a_signal_ends_a_call_and_the_next_is_right():
    for _ in range(3):  # a busy machine may be late once
        said = python_with_calls(INTERRUPTED, DCN_NP_ISA="baseline")
        if said == "stopped True\nTrue":
            return
    pytest.fail(said)


# ---- allocations

COUNTED = """
import ctypes, sys
import numpy as np
from test_prepared import KINDS, built, image
from dcn_np.threads import exactly

allocations = ctypes.CDLL(None).allocations
allocations.restype = ctypes.c_long

def counted(call, times):
    for _ in range(10):
        call()
    before = allocations()
    for _ in range(times):
        call()
    return allocations() - before

print(counted(lambda: None, 1000), counted(lambda: np.empty(4096), 1000))
for kind in KINDS:
    for dtype, team in (("float16", 1), ("float32", 1), ("float64", 1), ("float32", 2)):
        with exactly(team):
            layer = built(kind, dtype=dtype)
            x = image(layer, batch=1)
            out = layer.forward(x)
            layer.prepare(x.shape)
            # Two threads wait for each other where other tests have the cores.
            times = 1000 if kind.__name__ == "ModulatedDeformConv2d" and team == 1 else 20
            print(counted(lambda: layer.forward(x, out=out), times))
"""


def preloadable(tmp_path):
    """Build the counter, or skip where there is none to build or it would not count."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not hasattr(ctypes.CDLL(None), "__libc_memalign") or "LD_PRELOAD" in os.environ:
        pytest.skip("needs a C compiler, glibc, and nothing else that is preloaded")
    library = tmp_path / "allocations.so"
    source = Path(__file__).parent / "allocations.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


@linux_only
def test_calls_with_out_allocate_nothing(tmp_path):
    lines = python(COUNTED, timeout=200, LD_PRELOAD=preloadable(tmp_path)).splitlines()
    nothing, arrays = map(int, lines[0].split())
    assert nothing == 0
    assert arrays >= 1000
    assert lines[1:] == ["0"] * (len(KINDS) * 4)
