"""dcn_np.tensorflow eagerly and in graphs, and TensorFlow's tensors in the plain functions."""

import os
import subprocess
import sys

import numpy as np
import pytest
from adapters import INPUTS, OverArrays, address, addresses
from problems import DTYPES, HALVES, assert_backward, assert_forward, random_problem

import dcn_np
from dcn_np import _dlpack

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow")
dcn_tf = pytest.importorskip("dcn_np.tensorflow")


class Eager(OverArrays):
    tensor = staticmethod(tf.constant)

    def array(self, tensor):
        return tensor.numpy()

    def gradients(self, function, tensors, grad_output):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = function(*tensors)
        return tape.gradient(y, tensors, grad_output)


class Graph(Eager):
    def called(self, arrays, parameters):
        given = dict(zip(INPUTS, arrays, strict=True))
        given = {name: self.tensor(array) for name, array in given.items() if array is not None}
        graph = tf.function(
            lambda **tensors: self.adapter.modulated_deform_conv(*map(tensors.get, INPUTS), *parameters)
        )
        y = graph(**given)
        assert graph.get_concrete_function(**given).output_shapes.as_list() == y.shape
        return y

    def gradients(self, function, tensors, grad_output):
        return super().gradients(tf.function(function), tensors, grad_output)


class TapeInGraph(Eager):
    def gradients(self, function, tensors, grad_output):
        gradients = super().gradients
        return tf.function(lambda *tensors: gradients(function, tensors, grad_output))(*tensors)


def problem_of(ndim=2, dtype=np.float32, seed=0, **sizes):
    sizes = {"batch": 2, "in_channels": 4, "out_channels": 6, "groups": 2, "offset_groups": 2} | sizes
    fixed = {"with_offset": True, "with_mask": True, "with_bias": True}
    return random_problem(seed, ndim, dtype, special=False, **fixed | sizes)


def tensors_of(problem):
    arrays = (problem.x, problem.offset, problem.mask, problem.weight, problem.bias)
    return [None if array is None else tf.constant(array) for array in arrays]


@pytest.mark.parametrize("way", [Eager, Graph, TapeInGraph])
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_results_and_gradients_are_those_of_the_definition(ndim, dtype, way):
    for seed in range(4):
        problem = random_problem(seed, ndim, dtype)
        assert_forward(problem, way(dcn_tf))
        assert_backward(problem, way(dcn_tf))


def test_an_input_that_is_not_there():
    problem = problem_of()
    x, offset, mask, weight, bias = tensors_of(problem)
    for inputs in [
        (x, None, None, weight, None),
        (x, offset, None, weight, bias),
        (x, None, mask, weight, None),
    ]:
        given = [tensor for tensor in inputs if tensor is not None]
        for wrapped in (lambda function: function, tf.function):
            with tf.GradientTape() as tape:
                tape.watch(given)
                y = wrapped(dcn_tf.modulated_deform_conv)(*inputs, *problem.parameters)
            want = dcn_np.modulated_deform_conv_backward(tf.ones_like(y), *inputs[:4], *problem.parameters)
            for tensor, gradient, wanted in zip(
                inputs, _all(tape.gradient(y, given), inputs), want, strict=True
            ):
                assert tensor is None or np.array_equal(gradient, wanted)


def _all(gradients, inputs):
    gradients = iter(gradients)
    return [None if tensor is None else next(gradients) for tensor in inputs]


def test_only_what_a_tape_asks_for_is_computed(monkeypatch):
    asked = []
    backward = dcn_np.modulated_deform_conv_backward

    def spy(*arguments, needs, **keywords):
        asked.append(set(needs))
        return backward(*arguments, needs=needs, **keywords)

    monkeypatch.setattr(dcn_np, "modulated_deform_conv_backward", spy)
    problem = problem_of()
    x, offset, mask, weight, bias = tensors_of(problem)
    weight = tf.Variable(weight)
    with tf.GradientTape() as outer, tf.GradientTape() as tape:
        outer.watch(mask)
        y = dcn_tf.modulated_deform_conv(x, offset, mask, weight, bias, *problem.parameters)
    assert tape.gradient(y, [x, weight])[0] is None
    assert outer.gradient(y, mask) is not None
    assert asked == [{"mask", "weight"}] * 2


def test_gradients_of_variables():
    problem = problem_of()
    keras = pytest.importorskip("keras")
    x, offset, mask, weight, bias = tensors_of(problem)
    for variable in (tf.Variable(weight), keras.Variable(weight)):
        with tf.GradientTape() as tape:
            y = dcn_tf.modulated_deform_conv(x, offset, mask, variable, bias, *problem.parameters)
        source = variable if isinstance(variable, tf.Variable) else variable.value
        want = problem.replace(grad_output=np.ones(y.shape, np.float32)).backward(dcn_np).weight
        assert np.array_equal(tape.gradient(y, source), want)


def test_a_sparse_gradient_of_the_result():
    problem = problem_of()
    tensors = tensors_of(problem)
    for wrapped in (lambda function: function, tf.function):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = wrapped(lambda *t: dcn_tf.modulated_deform_conv(*t, *problem.parameters))(*tensors)
            last = tf.gather(y, [1])
        grad_output = np.zeros(y.shape, np.float32)
        grad_output[1] = 1
        gradients = tape.gradient(last, tensors)
        want = problem.replace(grad_output=grad_output).backward(dcn_np)
        assert all(map(np.array_equal, gradients, want))


# ---- memory


@pytest.mark.parametrize("wrapped", [lambda function: function, tf.function], ids=["eager", "graph"])
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
def test_nothing_is_copied(monkeypatch, wrapped, dtype):
    problem = problem_of(dtype=dtype)
    tensors = tensors_of(problem)
    tensors[3] = tf.Variable(tensors[3])
    grad_output = tf.constant(problem.grad_output)
    with addresses(monkeypatch) as calls:
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = wrapped(lambda *t: dcn_tf.modulated_deform_conv(*t, *problem.parameters))(*tensors)
        gradients = tape.gradient(y, tensors, grad_output)
    (read, written), (read_again, written_again) = calls
    inputs = [address_of(tensor) for tensor in tensors]
    assert read == inputs
    assert read_again == [address_of(grad_output), *inputs[:4]]
    assert written == [address_of(y)]
    assert written_again == [address_of(gradient) for gradient in gradients]
    # TensorFlow aborts the process at memory that is not.
    assert not any(number % 64 for number in written + written_again)


def address_of(tensor):
    return address(_dlpack.memory_of(tf.convert_to_tensor(tensor).__dlpack__()))


# ---- graphs


def specs_of(tensors, unknown):
    """Signatures of the tensors with the axes left open that `unknown` has for the input, or None for all."""
    specs = []
    for name, tensor in zip(INPUTS, tensors, strict=True):
        axes = unknown.get(name, ())
        shape = axes if axes is None else [None if i in axes else n for i, n in enumerate(tensor.shape)]
        specs.append(tf.TensorSpec(shape, tensor.dtype))
    return specs


@pytest.mark.parametrize(
    ("unknown", "known"),
    [
        ({}, (0, 1, 2, 3)),
        ({"x": (0,), "offset": (0,), "mask": (0,)}, (1, 2, 3)),
        ({"x": (0,)}, (0, 1, 2, 3)),
        ({"x": (0, 2, 3)}, (0, 1)),
        ({"x": (0, 2, 3), "offset": (0, 2, 3), "mask": (0, 2, 3), "weight": (0,)}, ()),
        ({"x": None}, None),
        ({"bias": None}, None),
    ],
)
def test_shapes_in_a_graph(unknown, known):
    problem = problem_of()
    tensors, shapes = tensors_of(problem), []

    @tf.function(input_signature=specs_of(tensors, unknown))
    def graph(*tensors):
        y = dcn_tf.modulated_deform_conv(*tensors, *problem.parameters)
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            z = dcn_tf.modulated_deform_conv(*tensors, *problem.parameters)
        shapes.extend(
            [y.shape, [(g.shape, t.shape) for g, t in zip(tape.gradient(z, tensors), tensors, strict=True)]]
        )
        return y

    y = graph(*tensors)
    want = problem.forward(dcn_np)
    assert np.array_equal(y, want)
    if known is None:
        assert shapes[0].rank is None
    else:
        assert shapes[0].as_list() == [n if axis in known else None for axis, n in enumerate(want.shape)]
    assert all(str(gradient) == str(tensor) for gradient, tensor in shapes[1])


def test_a_graph_learns_what_eager_calls_learn():
    problem = problem_of()
    x, *_ = tensors_of(problem)
    learned = []
    for wrapped in (lambda function: function, tf.function):
        variables = [tf.Variable(tensor) for tensor in tensors_of(problem)[1:]]

        @wrapped
        def step(x, variables=variables):
            with tf.GradientTape() as tape:
                y = dcn_tf.modulated_deform_conv(x, *variables, *problem.parameters)
                loss = tf.reduce_mean(tf.square(y))
            for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
                variable.assign_sub(0.01 * gradient)
            return loss

        losses = [float(step(x)) for _ in range(5)]
        assert losses[-1] < losses[0]
        learned.append(variables)
    for one, other in zip(*learned, strict=True):
        assert np.allclose(one, other, atol=1e-6)


def test_autograph_rewrites_nothing_here(monkeypatch):
    callers, watched = [], dcn_tf._watched

    def spy(tensors):
        callers.append(sys._getframe(1).f_code.co_filename)
        return watched(tensors)

    monkeypatch.setattr(dcn_tf, "_watched", spy)
    x, *others = tensors_of(problem_of(groups=1))

    def function(x):
        return dcn_tf.deform_conv(x, None, others[2])

    tf.function(function)(x)
    assert callers == [dcn_tf.__file__]


def test_several_calls_at_once():
    problem = problem_of(batch=8)
    _, _offset, _mask, weight, bias = tensors_of(problem)
    images = tf.data.Dataset.from_tensor_slices((problem.x, problem.offset, problem.mask)).batch(1)

    def convolve(x, offset, mask):
        return dcn_tf.modulated_deform_conv(x, offset, mask, weight, bias, *problem.parameters)

    got = list(images.map(convolve, num_parallel_calls=4))
    assert np.array_equal(tf.concat(got, 0), problem.forward(dcn_np))


@pytest.mark.parametrize("persistent", [False, True])
def test_two_tapes_over_a_graph(persistent):
    problem = problem_of()
    tensors = tensors_of(problem)
    graph = tf.function(lambda *t: dcn_tf.modulated_deform_conv(*t, *problem.parameters))
    with tf.GradientTape(persistent) as one, tf.GradientTape(persistent) as other:
        one.watch(tensors)
        other.watch(tensors)
        y = graph(*tensors)
    want = dcn_np.modulated_deform_conv_backward(tf.ones_like(y), *tensors[:4], *problem.parameters)
    assert all(map(np.array_equal, one.gradient(y, tensors), want))
    assert all(map(np.array_equal, other.gradient(y, tensors), want))


def test_no_compilation_by_xla():
    problem = problem_of()
    graph = tf.function(lambda *t: dcn_tf.modulated_deform_conv(*t, *problem.parameters), jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="EagerPyFunc"):
        graph(*tensors_of(problem))


LOAD = """
import sys, tensorflow
try:
    tensorflow.saved_model.load(sys.argv[1]).call(tensorflow.zeros({shape}))
except tensorflow.errors.InvalidArgumentError as error:
    print(error)
"""


def test_a_saved_model_needs_the_process_that_saved_it(tmp_path):
    problem = problem_of()
    x, *rest = tensors_of(problem)
    module = tf.Module()
    module.call = tf.function(
        lambda x: dcn_tf.modulated_deform_conv(x, *rest, *problem.parameters),
        input_signature=[tf.TensorSpec(x.shape, x.dtype)],
    )
    tf.saved_model.save(module, str(tmp_path))
    assert np.array_equal(tf.saved_model.load(str(tmp_path)).call(x), problem.forward(dcn_np))
    command = [sys.executable, "-c", LOAD.format(shape=problem.x.shape), str(tmp_path)]
    elsewhere = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Could not find callback with key=pyfunc_" in elsewhere.stdout, elsewhere.stderr


# ---- what is refused


def both_ways(function, tensors):
    return [lambda: function(*tensors), lambda: tf.function(function)(*tensors)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": lambda t: t[:, :1]}, ValueError, "weight has 1 channel on axis 1; x has 4"),
        ({"offset": lambda t: t[:1]}, ValueError, "offset has a batch of 1; x has 2"),
        (
            {"x": lambda t: tf.cast(t, tf.float64)},
            TypeError,
            "offset has dtype float32 but x has float64|weight has",
        ),
        ({"x": lambda t: tf.cast(t, tf.int32)}, TypeError, "int32"),
        ({"x": lambda t: t[0, 0]}, ValueError, "x has 2 axes"),
        ({"x": lambda t: tf.constant(1.0)}, ValueError, "x has 0 axes"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    problem = problem_of()
    tensors = [change.get(name, lambda t: t)(t) for name, t in zip(INPUTS, tensors_of(problem), strict=True)]
    for call in both_ways(lambda *t: dcn_tf.modulated_deform_conv(*t, *problem.parameters), tensors):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("name", INPUTS)
def test_other_libraries_are_named(name):
    problem = problem_of()
    tensors = dict(zip(INPUTS, tensors_of(problem), strict=True))
    for value in (tensors[name].numpy(), tf.sparse.from_dense(tf.ones((2, 2)))):
        other = tensors | {name: value}
        wanted = f"{name} is .*; wanted a tf.Tensor or a tf.Variable"
        for call in both_ways(lambda: dcn_tf.modulated_deform_conv(**other), ()):  # noqa: B023
            with pytest.raises(TypeError, match=wanted):
                call()


def test_what_is_missing():
    problem = problem_of()
    x, offset, _, weight, _ = tensors_of(problem)
    with pytest.raises(TypeError, match=r"x is None; wanted a tf\.Tensor"):
        dcn_tf.deform_conv(None, offset, weight)
    with pytest.raises(TypeError, match=r"weight is None; wanted a tf\.Tensor"):
        dcn_tf.deform_conv(x, offset, None)


def test_numbers_are_checked_while_a_graph_is_traced():
    problem = problem_of()
    x, _, _, weight, _ = tensors_of(problem)
    for keywords, error in [
        ({"stride": 0}, ValueError),
        ({"groups": 2.0}, TypeError),
        ({"float32_matmul": "fast"}, ValueError),
    ]:
        graph = tf.function(lambda x: dcn_tf.deform_conv(x, None, weight, **keywords))  # noqa: B023
        with pytest.raises(error, match=next(iter(keywords))):
            graph.get_concrete_function(x)


def test_a_graph_of_unknown_shapes_checks_when_it_runs():
    problem = problem_of()
    tensors = tensors_of(problem)
    signature = specs_of(tensors, {"x": None})
    graph = tf.function(
        lambda *t: dcn_tf.modulated_deform_conv(*t, *problem.parameters), input_signature=signature
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="ValueError: x has 2 axes"):
        graph(tensors[0][0, 0], *tensors[1:])


@pytest.mark.parametrize("wrapped", [lambda function: function, tf.function], ids=["eager", "graph"])
def test_gradients_have_no_gradients(wrapped):
    problem = problem_of()
    tensors = tensors_of(problem)
    convolve = wrapped(lambda *t: dcn_tf.modulated_deform_conv(*t, *problem.parameters))
    x = tensors[0]

    def second_derivative():
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.square(convolve(*tensors))
            penalty = tf.square(tape.gradient(y, x))
        return outer.gradient(penalty, x)

    with pytest.raises(NotImplementedError, match="second derivatives are not computed"):
        second_derivative()
    with (
        pytest.raises(NotImplementedError, match="second derivatives are not computed"),
        tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)),
    ):
        convolve(*tensors)


# ---- the plain functions


@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
def test_the_plain_functions_take_tensors(dtype):
    for seed in range(20):
        problem = random_problem(seed, dtype=dtype)
        mine = problem.map_arrays(tf.constant)
        y, gradients = mine.forward(dcn_np), mine.backward(dcn_np)
        assert isinstance(y, tf.Tensor)
        want = problem.backward(dcn_np)
        assert y.dtype == problem.dtype
        assert np.array_equal(y, problem.forward(dcn_np), equal_nan=True)
        for gradient, wanted in zip(gradients, want, strict=True):
            assert (gradient is None) == (wanted is None)
            if wanted is not None:
                assert isinstance(gradient, tf.Tensor)
                assert np.array_equal(gradient, wanted, equal_nan=True)


def test_the_plain_functions_have_no_gradient():
    problem = problem_of()
    tensors = tensors_of(problem)
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = dcn_np.modulated_deform_conv(*tensors, *problem.parameters)
    assert tape.gradient(y, tensors) == [None] * 5


def test_what_the_plain_functions_do_not_take():
    problem = problem_of()
    x, offset, _, weight, _ = tensors_of(problem)
    y = dcn_np.deform_conv(x, offset, weight, None, *problem.parameters)
    with pytest.raises(ValueError, match="out is read-only"):
        dcn_np.deform_conv(x, offset, weight, None, *problem.parameters, out=tf.zeros_like(y))
    with pytest.raises(
        ValueError, match=r"weight is a numpy\.ndarray, but x is a tensorflow array on the CPU"
    ):
        dcn_np.deform_conv(x, offset, problem.weight)
    with pytest.raises(TypeError, match=r"^weight is .*; dcn_np\.tensorflow takes variables"):
        dcn_np.deform_conv(x, offset, tf.Variable(weight))
    with pytest.raises(TypeError, match=r"x is .*SymbolicTensor.*; dcn_np\.tensorflow takes"):
        tf.function(lambda x: dcn_np.deform_conv(x, offset, weight), autograph=False)(x)


def test_channels_last():
    """The recipes of the docstring."""
    problem = problem_of(groups=1)
    _, offset, mask, weight, _ = tensors_of(problem)
    x = tf.constant(np.ascontiguousarray(problem.x.transpose(0, 2, 3, 1)))
    kernel = tf.transpose(weight, (2, 3, 1, 0))
    y = dcn_tf.modulated_deform_conv(
        tf.transpose(x, (0, 3, 1, 2)),
        offset,
        mask,
        tf.transpose(kernel, (3, 2, 0, 1)),
        None,
        *problem.parameters,
    )
    view = np.from_dlpack(x).transpose(0, 3, 1, 2)
    arrays = [tensor.numpy() for tensor in (offset, mask, weight)]
    strided = dcn_np.modulated_deform_conv(view, *arrays, None, *problem.parameters)
    assert strided.transpose(0, 2, 3, 1).flags.c_contiguous
    want = problem.replace(bias=None).forward(dcn_np)
    assert np.array_equal(y, want)
    assert np.array_equal(strided, want)
