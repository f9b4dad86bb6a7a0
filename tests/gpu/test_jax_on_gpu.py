"""On a GPU: dcn_np.jax in compiled programs, where XLA's own kernels run before and after."""

import os

import ml_dtypes
import numpy as np
import pytest
from test_gpu_fused import problem_of

# Before JAX is imported: else XLA takes three quarters of the memory from the other tests.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax = pytest.importorskip("jax")
NAMES = ("x", "offset", "mask", "weight", "bias")


@pytest.fixture(scope="module")
def convolution(cupy):
    """The function, and a device of JAX for it."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip("this JAX has no CUDA")
    from dcn_np.jax import modulated_deform_conv

    jax.config.update("jax_enable_x64", True)
    return modulated_deform_conv, device


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_bits_are_those_of_the_plain_functions(gpu, convolution, dtype):
    function, device = convolution
    problem = problem_of("3x3", 1, np.dtype(dtype), special=False, batch=2, extent=(40, 40))
    arrays = [getattr(problem, name) for name in NAMES]
    placed = [None if a is None else jax.device_put(2 * a, device) for a in arrays]

    @jax.jit
    def both(grad_output, *arrays):
        halved = [None if array is None else array / 2 for array in arrays]
        call = lambda *a: function(*a, *problem.parameters, deterministic=True)  # noqa: E731
        y, pull = jax.vjp(call, *halved)
        gradients = pull(grad_output)
        return y + y, [None if gradient is None else gradient + gradient for gradient in gradients]

    grad_output = jax.device_put(problem.grad_output, device)
    for _ in range(20):
        y, gradients = both(grad_output, *placed)
        assert np.array_equal(np.asarray(y) / 2, problem.forward(gpu))
        wanted = problem.backward(gpu, deterministic=True)
        for name, gradient in zip(NAMES, gradients, strict=True):
            want = getattr(wanted, name)
            assert (gradient is None) == (want is None), name
            assert want is None or np.array_equal(np.asarray(gradient) / 2, want), name
