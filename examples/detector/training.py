"""What every training shares: data, budget, learning rates and the steps themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import dcn_np.torch

from ..digits.schedule import rate_factor
from .data import Scene, as_input, material, scenes
from .losses import Mimicking, losses, truths
from .network import Detector
from .variants import Variant

SEEDS = [0, 1, 2]
STEPS = 800
QUICK_STEPS = 200
BATCH = 4
RATE = 0.002  # the largest learning rate of AdamW
OFFSET_FACTOR = 0.1  # the rate of the branches that make offsets and masks, by that of all else
DECAY = 1e-4
LARGEST_NORM = 10.0  # of the gradients together
TEST_SCENES = 300
TEST_SEED = 20_261_125


def test_scenes() -> list[Scene]:
    """Return the scenes that detectors are judged by: always the same."""
    return scenes(material()[1], [TEST_SEED], TEST_SCENES)


def batches(seed: int, steps: int) -> Iterator[list[Scene]]:
    """Yield the scenes of each step, each scene once, the same for all variants."""
    for step in range(steps):
        yield scenes(material()[0], [seed, step], BATCH)


def made(variant: Variant, seed: int) -> Detector:
    """Draw a detector's parameters from a seed."""
    torch.manual_seed(seed)
    return Detector(variant)


def parameter_groups(model: nn.Module, offset_factor: float) -> list[dict[str, Any]]:
    """Let all that makes offsets and masks learn slower, in the poolings too: README.md says why."""
    others, slower = dcn_np.torch.parameter_groups(model, RATE, offset_factor)
    poolings = dcn_np.torch.DeformRoIPool, dcn_np.torch.ModulatedDeformRoIPool
    branches = [p for module in model.modules() if isinstance(module, poolings) for p in module.parameters()]
    ids = set(map(id, branches))
    others["params"] = [parameter for parameter in others["params"] if id(parameter) not in ids]
    slower["params"] += branches
    return [others, slower]


def train(
    detector: Detector, variant: Variant, seed: int, steps: int, offset_factor: float = OFFSET_FACTOR
) -> Iterator[dict[str, float]]:
    """Train; yield the losses of each step by name."""
    mimicking = Mimicking(variant.width, variant.mimicking) if variant.mimicking else None
    both = nn.ModuleList([detector] if mimicking is None else [detector, mimicking])
    optimiser = torch.optim.AdamW(parameter_groups(both, offset_factor), weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_factor(step, steps))
    for batch in batches(seed, steps):
        found = losses(detector, torch.from_numpy(as_input(batch)), truths(batch), mimicking)
        optimiser.zero_grad()
        torch.stack(list(found.values())).sum().backward()
        nn.utils.clip_grad_norm_(both.parameters(), LARGEST_NORM)
        optimiser.step()
        schedule.step()
        yield {name: loss.item() for name, loss in found.items()}
