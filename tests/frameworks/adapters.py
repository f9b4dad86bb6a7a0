"""What the tests of the adapters share: an adapter's functions in the form that `problems` compares."""

from contextlib import contextmanager

import numpy as np

import dcn_np
from dcn_np import cpu

INPUTS = dcn_np.Gradients._fields


class OverArrays:
    """The functions of an adapter over NumPy arrays, with the gradients that its framework finds.

    A subclass knows its framework: `tensor`, `array`, and `gradients(function, tensors, grad_output)`.
    """

    def __init__(self, adapter):
        self.adapter = adapter

    def modulated_deform_conv(self, x, offset, mask, weight, bias, *parameters):
        return self.array(self.called((x, offset, mask, weight, bias), parameters))

    def deform_conv(self, x, offset, weight, bias, *parameters):
        tensors = [None if array is None else self.tensor(array) for array in (x, offset, weight, bias)]
        return self.array(self.adapter.deform_conv(*tensors, *parameters))

    def modulated_deform_conv_backward(self, grad_output, x, offset, mask, weight, *parameters):
        bias = np.zeros(weight.shape[0], weight.dtype)
        arrays = dict(zip(INPUTS, (x, offset, mask, weight, bias), strict=True))
        names = [name for name, array in arrays.items() if array is not None]

        def function(*tensors):
            given = dict(zip(names, tensors, strict=True))
            return self.adapter.modulated_deform_conv(*[given.get(name) for name in INPUTS], *parameters)

        tensors = [self.tensor(arrays[name]) for name in names]
        gradients = self.gradients(function, tensors, self.tensor(grad_output))
        return dcn_np.Gradients(**dict(zip(names, map(self.array, gradients), strict=True)))

    def deform_conv_backward(self, grad_output, x, offset, weight, *parameters):
        return self.modulated_deform_conv_backward(grad_output, x, offset, None, weight, *parameters)

    def called(self, arrays, parameters):
        tensors = [None if array is None else self.tensor(array) for array in arrays]
        return self.adapter.modulated_deform_conv(*tensors, *parameters)


def address(memory):
    return np.asarray(memory).__array_interface__["data"][0]


@contextmanager
def addresses(monkeypatch):
    """Collect the addresses that the kernels read from and write to, two lists for each call."""
    calls = []

    def spy(function, inputs):
        def spied(*arguments):
            results = function(*arguments)
            read = [address(argument) for argument in arguments[inputs] if argument is not None]
            written = results if isinstance(results, tuple) else [results]
            calls.append((read, [address(result) for result in written if result is not None]))
            return results

        return spied

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "deform_conv", spy(cpu.deform_conv, slice(1, 6)))
        patch.setattr(cpu, "deform_conv_backward", spy(cpu.deform_conv_backward, slice(1, 6)))
        yield calls
