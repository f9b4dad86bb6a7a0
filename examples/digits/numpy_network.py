"""The networks with NumPy alone: forward, backward, and a training with Adam."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy

import dcn_np.layers

from .architecture import convolutions
from .data import Array, Digits
from .schedule import OFFSET_FACTOR, RATE, batches, count_steps, rate_factor

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8  # those of torch's Adam


class Network:
    """One of the three networks: of a state dict, or drawn from a seed."""

    def __init__(
        self,
        variant: str,
        seed: int = 0,
        dtype: type = numpy.float32,
        state: Mapping[str, Array] | None = None,
    ) -> None:
        self.layers: dict[str, Any] = {}
        self.outputs: dict[str, Array] = {}  # of prepared convolutions
        if state is None:
            self._draw(variant, seed, dtype)
            return
        for name, conv in convolutions(variant).items():
            start = f"{name}."
            found = {key.removeprefix(start): state[key] for key in state if key.startswith(start)}
            kind = getattr(dcn_np.layers, conv.kind)
            self.layers[name] = kind.from_state_dict(found, **conv.arguments, dtype=dtype)

    def _draw(self, variant: str, seed: int, dtype: type) -> None:
        """Draw filters from He's uniform distribution; all else is zero."""
        rng = numpy.random.default_rng(seed)
        self.layers = {
            name: getattr(dcn_np.layers, conv.kind)(**conv.arguments, rng=rng, dtype=dtype)
            for name, conv in convolutions(variant).items()
        }
        for layer in self.layers.values():
            layer.weight *= math.sqrt(6)  # from a variance of 1 / (3 fan_in) to 2 / fan_in
            layer.bias[:] = 0

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Let the layers pack their weights and take their memory, for images (batch, 1, height, width)."""
        *convs, (_, classifier) = self.layers.items()
        x = numpy.zeros(shape, classifier.dtype)
        for name, conv in convs:
            conv.prepare(x.shape)
            x = self.outputs[name] = conv.forward(x)
        classifier.prepare((*x.shape[:2], 1, 1))

    def forward(self, x: Array) -> Array:
        """Return the logits (batch, CLASSES) of images (batch, 1, height, width)."""
        *convs, (_, classifier) = self.layers.items()
        self.rectified = []
        for name, conv in convs:
            y = conv.forward(x, out=self.outputs.get(name))
            x = numpy.maximum(y, 0, out=y)
            self.rectified.append(x)
        return classifier.forward(x.mean(axis=(2, 3), keepdims=True))[:, :, 0, 0]

    logits = forward  # the name that it has in both networks

    def backward(self, grad_logits: Array) -> dict[str, Array]:
        """Return the gradients of the last `forward`, by the names of `parameters()`."""
        *convs, classifier = self.layers.values()
        last = self.rectified[-1]
        grad = classifier.backward(grad_logits[:, :, None, None]) / math.prod(last.shape[2:])
        grad = numpy.broadcast_to(grad, last.shape)
        for conv, y in zip(reversed(convs), reversed(self.rectified), strict=True):
            grad = conv.backward(grad * (y > 0))
        return joined({name: layer.gradients for name, layer in self.layers.items()})

    def stages(self) -> dict[str, Any]:
        """Return what the network is made of, in order: what `dcn_np.analysis.of_layers` takes."""
        from dcn_np import analysis  # networks that only answer, examples/edge, do without

        *convs, classifier = self.layers.items()
        stages: dict[str, Any] = {}
        for name, conv in convs:
            stages |= {name: conv, f"{name}.relu": analysis.ReLU()}
        return stages | {"pool": analysis.GlobalAveragePool(), classifier[0]: classifier[1]}

    def parameters(self) -> dict[str, Array]:
        """Return the parameters themselves, such as conv3.conv_offset_weight."""
        return joined({name: layer.parameters() for name, layer in self.layers.items()})

    def state_dict(self) -> dict[str, Array]:
        """Return the parameters by the names that torch's network has, such as conv3.conv_offset.weight."""
        return joined({name: layer.state_dict() for name, layer in self.layers.items()})


def joined(by_layer: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """Make one dictionary of one per layer."""
    return {f"{name}.{key}": value for name, arrays in by_layer.items() for key, value in arrays.items()}


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Return the mean cross-entropy of labels (batch,), and its gradient by the logits (batch, CLASSES)."""
    rows = numpy.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_total = numpy.log(numpy.exp(shifted).sum(axis=1, keepdims=True))
    loss = (log_total[:, 0] - shifted[rows, labels]).mean()
    grad = numpy.exp(shifted - log_total)
    grad[rows, labels] -= 1
    return float(loss), grad / len(labels)


class Adam:
    """Kingma and Ba's Adam; the offset branches learn `offset_factor` times as fast as all else."""

    def __init__(self, parameters: Mapping[str, Array], offset_factor: float = OFFSET_FACTOR) -> None:
        self.parameters, self.offset_factor, self.steps = parameters, offset_factor, 0
        self.first = {name: numpy.zeros_like(value) for name, value in parameters.items()}
        self.second = {name: numpy.zeros_like(value) for name, value in parameters.items()}

    def step(self, gradients: Mapping[str, Array], rate: float) -> None:
        """Change the parameters in place."""
        self.steps += 1
        for name, parameter in self.parameters.items():
            gradient, first, second = gradients[name], self.first[name], self.second[name]
            first += (1 - FIRST_DECAY) * (gradient - first)
            second += (1 - SECOND_DECAY) * (gradient**2 - second)
            mean, square = first / (1 - FIRST_DECAY**self.steps), second / (1 - SECOND_DECAY**self.steps)
            factor = self.offset_factor if "conv_offset" in name else 1.0
            parameter -= rate * factor * mean / (numpy.sqrt(square) + EPSILON)


def train(
    network: Network, digits: Digits, seed: int, epochs: int, offset_factor: float = OFFSET_FACTOR
) -> Iterator[float]:
    """Train; yield the loss of each step."""
    steps = count_steps(digits, epochs)
    optimiser = Adam(network.parameters(), offset_factor)
    for step, (images, labels) in enumerate(batches(digits, seed, epochs)):
        loss, grad = cross_entropy(network.forward(images), labels)
        optimiser.step(network.backward(grad), RATE * rate_factor(step, steps))
        yield loss
