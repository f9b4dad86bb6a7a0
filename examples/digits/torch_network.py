"""The networks with torch, through `dcn_np.torch`, and their training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import dcn_np.torch

from . import numpy_network
from .architecture import convolutions
from .data import Array, Digits
from .schedule import OFFSET_FACTOR, RATE, batches, count_steps, rate_factor


class Network(nn.Module):
    """One of the three networks, with the weights that the NumPy network of the same seed begins with."""

    def __init__(self, variant: str, seed: int = 0) -> None:
        super().__init__()
        for name, conv in convolutions(variant).items():
            library = nn if conv.kind == "Conv2d" else dcn_np.torch
            self.add_module(name, getattr(library, conv.kind)(**conv.arguments))
        begin = numpy_network.Network(variant, seed).state_dict()
        self.load_state_dict({key: torch.from_numpy(value) for key, value in begin.items()})

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, CLASSES) of images (batch, 1, height, width)."""
        *convs, classifier = self.children()
        for conv in convs:
            x = torch.relu(conv(x))
        logits: Tensor = classifier(x.mean(dim=(2, 3), keepdim=True))
        return logits.flatten(1)

    def logits(self, images: Array) -> Array:
        """Evaluate the network on NumPy arrays."""
        with torch.no_grad():
            found: Array = self(torch.from_numpy(images)).numpy()
        return found


def train(
    network: Network, digits: Digits, seed: int, epochs: int, offset_factor: float = OFFSET_FACTOR
) -> Iterator[float]:
    """Train; yield the loss of each step."""
    steps = count_steps(digits, epochs)
    optimiser = torch.optim.Adam(dcn_np.torch.parameter_groups(network, RATE, offset_factor))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_factor(step, steps))
    for images, labels in batches(digits, seed, epochs):
        loss = nn.functional.cross_entropy(network(torch.from_numpy(images)), torch.from_numpy(labels))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        yield loss.item()
