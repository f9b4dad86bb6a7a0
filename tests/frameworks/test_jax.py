"""dcn_np.jax: numbers, gradients, jit, vmap, shard_map, errors, threads and memory."""

import gc
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapters import addresses
from calls import mapped_and_resident, python_with_calls
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from problems import assert_close, random_problem

import dcn_np
from dcn_np import jax as dcn_jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)

FLOATS = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
NAMES = ("x", "offset", "mask", "weight", "bias")


def problem_of(ndim=2, dtype=np.float64, seed=0, **sizes):
    """A problem, its arrays for JAX, and its parameters."""
    sizes = {"batch": 2, "in_channels": 4, "out_channels": 6, "groups": 2, "offset_groups": 2} | sizes
    sizes = {"with_offset": True, "with_mask": True, "with_bias": True} | sizes
    problem = random_problem(seed, ndim, np.float64, special=False, **sizes).astype(dtype)
    arrays = [getattr(problem, name) for name in NAMES]
    return problem, [None if array is None else jnp.asarray(array) for array in arrays], problem.parameters


def convolution(parameters):
    return lambda *arrays: dcn_jax.modulated_deform_conv(*arrays, *parameters)


def backward(problem, arrays):
    """The gradients that reverse mode gives, by name."""
    _, pull = jax.vjp(convolution(problem.parameters), *arrays)
    return dict(zip(NAMES, pull(jnp.asarray(problem.grad_output)), strict=True))


# ---- numbers


def check_against_the_reference(ndim, dtype):
    problem, arrays, parameters = problem_of(ndim, dtype)
    scales = problem.scales()
    y = jax.jit(convolution(parameters))(*arrays)
    assert y.dtype == dtype
    assert_close(y, problem.expected_forward(), dtype, scales["y"], what="y")
    gradients = backward(problem, arrays)
    for name, want in problem.expected_backward()._asdict().items():
        assert gradients[name].dtype == dtype
        assert_close(gradients[name], want, dtype, scales[name], what=name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_against_the_reference(ndim, dtype):
    check_against_the_reference(ndim, dtype)


WITHOUT = [(), ("offset",), ("mask",), ("bias",), ("offset", "mask", "bias")]


def check_bits(plain, without, dtype):
    """Those of dcn_np's functions, as they are or for the emulated GPU."""
    problem, arrays, parameters = problem_of(
        dtype=dtype, **{f"with_{name}": name not in without for name in ("offset", "mask", "bias")}
    )
    want = problem.forward(plain, modulated=True)
    assert np.array_equal(convolution(parameters)(*arrays), want)
    assert np.array_equal(jax.jit(convolution(parameters))(*arrays), want)
    gradients = backward(problem, arrays)
    for name, gradient in problem.backward(plain, modulated=True)._asdict().items():
        if name in without:
            assert gradients[name] is None
        else:
            assert gradients[name].dtype == gradient.dtype
            assert np.array_equal(gradients[name], gradient), name


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("without", WITHOUT)
def test_the_bits_are_those_of_the_plain_functions(without, dtype):
    check_bits(dcn_np, without, dtype)


def test_v1_is_v2_without_a_mask():
    problem, (x, offset, _, weight, bias), parameters = problem_of(with_mask=False)
    y = dcn_jax.deform_conv(x, offset, weight, bias, *parameters)
    assert np.array_equal(y, problem.forward(dcn_np))


@pytest.mark.parametrize("half", FLOATS[2:])
def test_halves_with_positions_in_float32(half):
    problem, (x, offset, mask, weight, bias), parameters = problem_of(dtype=half)
    offset, mask = offset.astype(np.float32) + 0.001, mask.astype(np.float32)
    problem = problem.replace(offset=np.asarray(offset), mask=np.asarray(mask))
    assert np.array_equal(convolution(parameters)(x, offset, mask, weight, bias), problem.forward(dcn_np))
    gradients = backward(problem, (x, offset, mask, weight, bias))
    assert gradients["offset"].dtype == np.float32
    assert np.array_equal(gradients["offset"], problem.backward(dcn_np).offset)


EMPTY = [{"batch": 0}, {"in_channels": 0, "groups": 1}, {"out_channels": 0}]


def check_empty(plain, sizes):
    problem, arrays, parameters = problem_of(**sizes)
    assert np.array_equal(convolution(parameters)(*arrays), problem.forward(plain))
    for name, gradient in problem.backward(plain)._asdict().items():
        assert np.array_equal(backward(problem, arrays)[name], gradient), name


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty_arrays(sizes):
    check_empty(dcn_np, sizes)


def test_numpy_arrays_are_taken():
    problem, _, parameters = problem_of(dtype=np.float32)
    y = convolution(parameters)(*(getattr(problem, name) for name in NAMES))
    assert isinstance(y, jax.Array)
    assert np.array_equal(y, problem.forward(dcn_np))


# ---- derivatives


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradients_are_slopes(ndim):
    _, arrays, parameters = problem_of(ndim, out_channels=2, extent=(3,) * ndim, kernel=(2,) * ndim,
        stride=(1,) * ndim, padding=((1, 0),) * ndim, dilation=(1,) * ndim)  # fmt: skip
    fraction = np.random.default_rng(0).uniform(0.2, 0.8, arrays[1].shape)
    arrays[1] = jnp.floor(arrays[1]) + fraction  # away from the kinks
    check_grads(convolution(parameters), arrays, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
    x, offset, _, weight, bias = arrays
    check_grads(
        lambda *a: dcn_jax.deform_conv(*a, *parameters),
        (x, offset, weight, bias),
        order=1,
        modes=["rev"],
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("needed", [(0,), (1,), (3,), (4,), (0, 2, 3)])
def test_only_what_is_needed_is_computed(monkeypatch, needed):
    asked = []
    backward = dcn_jax._backward

    def spy(geometry, needs, *arrays):
        asked.append(tuple(needs))
        return backward(geometry, needs, *arrays)

    monkeypatch.setattr(dcn_jax, "_backward", spy)
    problem, arrays, parameters = problem_of(extent=(7, 6), kernel=(2, 3))

    def loss(*some):
        given = list(arrays)
        for place, array in zip(needed, some, strict=True):
            given[place] = array
        return (convolution(parameters)(*given) * problem.grad_output).sum()

    gradients = jax.jit(jax.grad(loss, argnums=tuple(range(len(needed)))))(*(arrays[i] for i in needed))
    assert asked == [tuple(place in needed for place in range(5))]
    want = problem.backward(dcn_np)
    for place, gradient in zip(needed, gradients, strict=True):
        assert np.array_equal(gradient, want[place])


def test_a_gradient_that_is_known_to_be_zero_costs_nothing():
    # JAX's contract allows it, though today it leaves out such a call altogether.
    zero = SymbolicZero(jax.typeof(jnp.zeros(3)))
    assert dcn_jax._differentiate(None, (dcn_jax._Needs([True] * 5), [None] * 4), zero) == (None,) * 5


def test_under_checkpoint_and_scan():
    _, arrays, parameters = problem_of(out_channels=4, kernel=(3, 3), stride=(1, 1),
        dilation=(1, 1), padding=((1, 1),) * 2, extent=(5, 6))  # fmt: skip
    x, offset, mask, weight, bias = arrays
    weights = jnp.stack([weight, 2 * weight, -weight])

    def layer(carry, each):
        return jnp.tanh(convolution(parameters)(carry, offset, mask, each, bias)), None

    def scanned(x, weights):
        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()

    def unrolled(x, weights):
        for each in weights:
            x, _ = layer(x, each)
        return x.sum()

    got = jax.jit(jax.grad(scanned, argnums=(0, 1)))(x, weights)
    for one, other in zip(got, jax.grad(unrolled, argnums=(0, 1))(x, weights), strict=True):
        assert jnp.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_what_has_no_derivative_says_so():
    _, arrays, parameters = problem_of()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(convolution(parameters), arrays, arrays)

    def slope(x):
        return jax.grad(lambda x: convolution(parameters)(x, *arrays[1:]).sum())(x).sum()

    for function in (jax.grad(slope), jax.jit(jax.grad(slope))):
        with pytest.raises(NotImplementedError, match="cannot be differentiated"):
            function(arrays[0])


# ---- vmap

BATCHED = [
    (0, 0, 0, None, None),
    (1, 0, None, None, None),
    (None, 2, None, None, None),
    (0, 0, 0, 0, 0),
    (0, None, None, 1, None),
    (None, None, None, 0, None),
    (None, None, None, None, 0),
]


def stacks(arrays, batched, count=3):
    return [
        array if dim is None else jnp.stack([array + 0.01 * i for i in range(count)], dim)
        for array, dim in zip(arrays, batched, strict=True)
    ]


def entries(stacked, batched, index):
    return [a if dim is None else jnp.take(a, index, dim) for a, dim in zip(stacked, batched, strict=True)]


@pytest.mark.parametrize("batched", BATCHED, ids=str)
def test_vmap(batched):
    _, arrays, parameters = problem_of()
    call, stacked = convolution(parameters), stacks(arrays, batched)
    got = jax.jit(jax.vmap(call, batched))(*stacked)
    for index in range(3):
        assert np.array_equal(got[index], call(*entries(stacked, batched, index)))


@pytest.mark.parametrize("needed", [(0, 1, 2), (0, 1, 2, 3, 4), (3,)])
@pytest.mark.parametrize("batched", BATCHED, ids=str)
def test_vmap_of_gradients(batched, needed):
    _, arrays, parameters = problem_of(dtype=np.float32)
    stacked = stacks(arrays, batched)
    gradients = jax.grad(lambda *a: (convolution(parameters)(*a) ** 2).sum(), needed)
    got = jax.jit(jax.vmap(gradients, batched))(*stacked)
    for index in range(3):
        for one, other in zip(got, gradients(*entries(stacked, batched, index)), strict=True):
            assert np.array_equal(one[index], other)


def test_gradients_of_vmap():
    _, arrays, parameters = problem_of()
    x = jnp.stack([arrays[0] + 0.1 * i for i in range(3)])

    def loss(call):
        return lambda x, weight: (call(x, arrays[1], arrays[2], weight, arrays[4]) ** 2).sum()

    call = convolution(parameters)
    got = jax.grad(loss(jax.vmap(call, (0, None, None, None, None))), (0, 1))(x, arrays[3])
    each = [jax.grad(loss(call), (0, 1))(one, arrays[3]) for one in x]
    assert np.array_equal(got[0], jnp.stack([gradient for gradient, _ in each]))
    assert jnp.allclose(got[1], sum(gradient for _, gradient in each), rtol=1e-12)


def test_vmap_of_vmap():
    _, arrays, parameters = problem_of()
    x = jnp.stack([jnp.stack([arrays[0] + i + 10 * j for i in range(2)]) for j in range(3)])
    weights = jnp.stack([arrays[3] * (1 + i) for i in range(2)])
    call = lambda x, weight: convolution(parameters)(x, arrays[1], arrays[2], weight, arrays[4])  # noqa: E731
    got = jax.vmap(jax.vmap(call), (0, None))(x, weights)
    for j in range(3):
        for i in range(2):
            assert np.array_equal(got[j, i], call(x[j, i], weights[i]))


def test_images_of_one_weight_are_one_call():
    _, arrays, parameters = problem_of()
    batched = (0, 0, 0, None, None)
    stacked = stacks(arrays, batched)
    gradients = jax.grad(lambda *a: convolution(parameters)(*a).sum(), (0, 1, 2))
    for function in (convolution(parameters), gradients):
        text = jax.jit(jax.vmap(function, batched)).lower(*stacked).as_text()
        assert "while" not in text
    assert "while" in jax.jit(jax.vmap(function, (0,) * 5)).lower(*stacks(arrays, (0,) * 5)).as_text()


# ---- shard_map: two devices

SPECS = (PartitionSpec("data"),) * 3 + (PartitionSpec(),) * 2


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def mesh(request):
    return jax.make_mesh((2,), ("data",), axis_types=(request.param,))


def sharded(mesh):
    problem, arrays, parameters = problem_of(batch=4)
    placed = [
        jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, SPECS, strict=True)
    ]
    return problem, placed, parameters


def compiled_text(function, arrays):
    return jax.jit(function).lower(*arrays).compile().as_text()


@pytest.mark.parametrize("check", [True, False], ids=["check_vma", "no check_vma"])
def test_shard_map(mesh, check):
    problem, arrays, parameters = sharded(mesh)
    call = jax.shard_map(
        convolution(parameters), mesh=mesh, in_specs=SPECS, out_specs=PartitionSpec("data"), check_vma=check
    )
    y = jax.jit(call)(*arrays)
    assert len(y.sharding.device_set) == 2
    assert np.array_equal(y, problem.forward(dcn_np))
    assert "all-gather" not in compiled_text(call, arrays)

    gradients = jax.grad(lambda *a: (call(*a) * problem.grad_output).sum(), tuple(range(5)))
    got = dict(zip(NAMES, jax.jit(gradients)(*arrays), strict=True))
    for name, want in problem.backward(dcn_np)._asdict().items():
        assert jnp.allclose(got[name], want, rtol=1e-10, atol=1e-12), name
    text = compiled_text(gradients, arrays)
    assert "all-reduce" in text  # of the gradients of weight and bias
    assert "all-gather" not in text


def test_gradients_inside_shard_map(mesh):
    problem, arrays, parameters = sharded(mesh)

    def step(*arrays):
        def loss(*arrays):
            return (convolution(parameters)(*arrays) ** 2).sum()

        return jax.grad(loss, (0, 3))(*arrays)

    specs = (PartitionSpec("data"), PartitionSpec())
    got = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=SPECS, out_specs=specs))(*arrays)
    y = problem.forward(dcn_np)
    want = problem.replace(grad_output=2 * y).backward(dcn_np)
    assert np.array_equal(got[0], want.x)
    assert jnp.allclose(got[1], want.weight, rtol=1e-10)


def test_vmap_inside_shard_map(mesh):
    problem, arrays, parameters = sharded(mesh)

    def each(*arrays):
        def loss(*arrays):
            return (convolution(parameters)(*arrays) ** 2).sum()

        images = [array[:, None] for array in arrays[:3]]
        return jax.vmap(jax.value_and_grad(loss, (0, 3)), (0, 0, 0, None, None))(*images, *arrays[3:])

    data, whole = PartitionSpec("data"), PartitionSpec()
    call = jax.shard_map(each, mesh=mesh, in_specs=SPECS, out_specs=(data, (data, whole)))
    values, (grad_x, grad_weight) = jax.jit(call)(*arrays)
    y = problem.forward(dcn_np)
    want = problem.replace(grad_output=2 * y).backward(dcn_np)
    assert jnp.allclose(values, (y**2).sum((1, 2, 3)), rtol=1e-12)
    assert np.array_equal(grad_x[:, 0], want.x)
    assert jnp.allclose(grad_weight.sum(0), want.weight, rtol=1e-10)


def test_without_shard_map_the_batch_is_gathered():
    """What the docs warn of, and a proof that the tests above would see it."""
    _, arrays, parameters = sharded(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)))
    assert "all-gather" in compiled_text(convolution(parameters), arrays)


def test_both_devices_at_the_same_time():
    problem, arrays, parameters = problem_of(dtype=np.float32, extent=(24, 24), kernel=(3, 3))
    call = jax.jit(convolution(parameters))
    placed = [jax.device_put(arrays, device) for device in jax.devices()]
    want = problem.forward(dcn_np)
    results = [call(*placed[step % 2]) for step in range(40)]
    assert {device for y in results for device in y.devices()} == set(jax.devices())
    assert all(np.array_equal(y, want) for y in results)


# ---- arguments


def test_what_does_not_fit_is_named():
    _, (x, offset, mask, weight, bias), parameters = problem_of()
    call = convolution(parameters)
    for function in (call, jax.jit(call), lambda *a: jax.eval_shape(call, *a)):
        with pytest.raises(ValueError, match=r"^weight has 1 channel"):
            function(x, offset, mask, weight[:, :1], bias)
        with pytest.raises(TypeError, match=r"^mask has dtype float32 but x has float64"):
            function(x, offset, mask.astype(np.float32), weight, bias)
    with pytest.raises(TypeError, match=r"^x has dtype int64"):
        call(x.astype(int), offset, mask, weight, bias)
    with pytest.raises(TypeError, match=r"^offset is a list; wanted a jax\.Array or a numpy\.ndarray"):
        call(x, [offset], mask, weight, bias)
    with pytest.raises(TypeError, match=r"^weight is a NoneType"):
        call(x, offset, mask, None, bias)
    with pytest.raises(ValueError, match=r"^float32_matmul is 'fast'"):
        dcn_jax.deform_conv(x, offset, weight, float32_matmul="fast")
    with pytest.raises(TypeError, match=r"^deterministic is 1 \(int\); wanted True or False"):
        dcn_jax.deform_conv(x, offset, weight, deterministic=1)


def test_the_plain_function_copies_nothing(monkeypatch):
    _, arrays, parameters = problem_of()
    with addresses(monkeypatch) as calls:
        y = dcn_np.modulated_deform_conv(*arrays, *parameters)
        gradients = dcn_np.modulated_deform_conv_backward(y, *arrays[:4], *parameters)
    inputs = [array.unsafe_buffer_pointer() for array in arrays]
    result = y.unsafe_buffer_pointer()
    wanted = [gradient.unsafe_buffer_pointer() for gradient in gradients]
    assert calls == [(inputs, [result]), ([result, *inputs[:4]], wanted)]


def test_the_plain_function_names_this_one_where_jax_traces():
    _, arrays, parameters = problem_of()
    plain = lambda *a: dcn_np.modulated_deform_conv(*a, *parameters)  # noqa: E731
    along_batch = jax.vmap(plain, (0, None, None, None, None))
    for traced in (jax.jit(plain), jax.grad(lambda *a: plain(*a).sum()), along_batch):
        with pytest.raises(TypeError, match=r"^x is .*Tracer.*; dcn_np\.jax has the same functions"):
            traced(*arrays)
    assert isinstance(plain(*arrays), jax.Array)


def test_extents_without_a_number_are_refused():
    _, arrays, parameters = problem_of()
    batch = jax.export.symbolic_shape("n")[0]
    shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]) if i < 3 else a.shape, a.dtype)
              for i, a in enumerate(arrays)]  # fmt: skip
    with pytest.raises(ValueError, match=r"^x has shape \(n, .*known when it is traced"):
        jax.export.export(jax.jit(convolution(parameters)))(*shapes)


@pytest.mark.parametrize("differentiated", [False, True])
def test_other_devices_are_refused(differentiated):
    x, weight = jnp.ones((1, 4, 6, 6)), jnp.ones((4, 4, 3, 3))

    def loss(x, weight):
        return dcn_jax.deform_conv(x, None, weight).sum()

    traced = jax.jit(jax.grad(loss) if differentiated else loss).trace(x, weight)
    with pytest.raises(NotImplementedError, match=r"^dcn_np\.jax .* but is lowered for tpu: "):
        traced.lower(lowering_platforms=("tpu",))


def test_an_exported_program():
    problem, arrays, parameters = problem_of()
    ours = jax.export.DisabledSafetyCheck.custom_call("dcn_np_deform_conv")
    program = jax.export.export(jax.jit(convolution(parameters)), disabled_checks=[ours])(*arrays)
    assert np.array_equal(program.call(*arrays), problem.forward(dcn_np))


def test_a_donated_array_is_not_written_to_too_early():
    problem, arrays, parameters = problem_of(dtype=np.float32, in_channels=6, out_channels=6, kernel=(3, 3),
        stride=(1, 1), dilation=(1, 1), padding=((1, 1),) * 2, extent=(9, 8))  # fmt: skip
    donating = jax.jit(convolution(parameters), donate_argnums=0)
    for _ in range(5):
        assert np.array_equal(donating(jnp.array(problem.x), *arrays[1:]), problem.forward(dcn_np))


# ---- the process around it


def test_calls_from_eight_threads():
    problem, arrays, parameters = problem_of(dtype=np.float32, extent=(20, 20), kernel=(3, 3))
    call = jax.jit(lambda *a: jax.vjp(convolution(parameters), *a)[1](problem.grad_output))
    want, wrong = problem.backward(dcn_np), []

    def work():
        for _ in range(30):
            if not all(map(np.array_equal, call(*arrays), want)):
                wrong.append(threading.current_thread().name)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_repeated_calls_keep_no_memory():
    problem, arrays, parameters = problem_of(dtype=np.float32, extent=(64, 64), kernel=(3, 3))
    call = jax.jit(lambda *a: jax.vjp(convolution(parameters), *a)[1](problem.grad_output))

    def resident(calls):
        for _ in range(calls):
            jax.block_until_ready(call(*arrays))
        gc.collect()
        return mapped_and_resident()[1]

    before = resident(50)
    assert resident(200) - before < 100 * problem.x.nbytes


LIMITED = """
import jax
import dcn_np.jax
arrays = [jax.numpy.asarray(array) for array in problem(channels=32, size=60)]
call = jax.jit(dcn_np.jax.modulated_deform_conv)
dcn_np.set_num_threads(1)
want = dcn_np.modulated_deform_conv(*map(np.asarray, arrays))

def started():
    before = tasks()
    for _ in range(3):
        assert same([call(*arrays)], [want])
    return tasks() - before

started()
assert started() == 0
dcn_np.set_num_threads(None)
print(started(), started())
"""


def test_the_limit_of_the_process_holds_in_compiled_functions():
    if dcn_np.get_num_threads() < 2:
        pytest.skip("there is one CPU")
    first, second = python_with_calls(LIMITED, DCN_NP_NUM_THREADS="2").split()
    assert (int(first), int(second)) == (1, 0)
    assert python_with_calls(LIMITED, DCN_NP_NUM_THREADS="1").split() == ["0", "0"]


STARTED = """
import jax
import dcn_np.jax
call = jax.jit(dcn_np.jax.modulated_deform_conv)
arrays = [jax.numpy.asarray(array) for array in problem(channels=32, size=60)]
compiled = call.lower(*arrays).compile()
call(*problem(size=5)).block_until_ready()  # XLA's own threads
before = tasks()
for _ in range(3):
    compiled(*arrays).block_until_ready()
print(tasks() - before)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_the_limit_of_the_environment_holds(threads):
    if dcn_np.get_num_threads() < threads:
        pytest.skip("there is one CPU")
    assert python_with_calls(STARTED, DCN_NP_NUM_THREADS=str(threads)) == str(threads - 1)


FORKED = """
import signal, warnings
import jax
import dcn_np.jax
warnings.simplefilter("ignore")  # jax warns of every fork
arrays = problem(channels=32)
want = both(arrays)
y = jax.jit(dcn_np.jax.modulated_deform_conv)(*arrays)
assert same([y], want[:1])
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if same(both(arrays), want) else 1)
assert os.waitpid(child, 0)[1] == 0
assert same([jax.jit(dcn_np.jax.modulated_deform_conv)(*arrays)], want[:1])
print("done")
"""


def test_a_forked_child_computes_with_numpy():
    assert python_with_calls(FORKED) == "done"


@pytest.mark.parametrize("isa", dcn_np.available_isas())
def test_the_instruction_set_is_that_of_the_process(isa):
    code = """
import dcn_np.jax
arrays = problem()
assert same([dcn_np.jax.modulated_deform_conv(*arrays)], [dcn_np.modulated_deform_conv(*arrays)])
print(dcn_np.isa())
"""
    assert python_with_calls(code, DCN_NP_ISA=isa) == isa


def test_the_examples_of_the_docstrings():
    code = "import doctest, dcn_np.jax; print(doctest.testmod(dcn_np.jax))"
    assert python_with_calls(code) == "TestResults(failed=0, attempted=7)"
