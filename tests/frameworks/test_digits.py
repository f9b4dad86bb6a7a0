"""The digits example with torch: the same numbers as with NumPy, and a training from end to end."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dcn_np.commands import demo_digits

architecture, data, networks, runs, torch_networks, train = (
    demo_digits.part(name)
    for name in ("architecture", "data", "numpy_network", "runs", "torch_network", "train")
)
VARIANTS = list(architecture.KINDS)


def digits(count):
    training, _ = data.originals()
    return data.Digits(*(array[:count] for array in training))


def both(variant, seed=0, scale=0.1):
    """The network with NumPy and with torch, their branches filled alike."""
    network, rng = networks.Network(variant, seed), np.random.default_rng(seed)
    for name, value in network.parameters().items():
        if "conv_offset" in name:
            value[:] = rng.normal(0, scale, value.shape)
    module = torch_networks.Network(variant, seed)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in network.state_dict().items()})
    return network, module


def test_no_digit_is_in_both_sets():
    from sklearn.datasets import load_digits

    training, test = data.originals()
    assert (len(training.labels), len(test.labels)) == (data.TRAINING, 797)
    every = np.concatenate([training.images, test.images])
    np.testing.assert_array_equal(every, load_digits().images)
    flat = [{image.tobytes() for image in part.images} for part in (training, test)]
    assert not flat[0] & flat[1]


def test_the_stored_originals_are_the_test_set():
    for found, wanted in zip(runs.read_weights()[2], data.originals()[1], strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_begins_alike_in_both(variant):
    begin = networks.Network(variant, 7).state_dict()
    state = torch_networks.Network(variant, 7).state_dict()
    assert list(state) == list(begin)
    for key, value in state.items():
        np.testing.assert_array_equal(value.numpy(), begin[key])


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_agree(variant):
    network, module = both(variant)
    images, labels = data.warped(digits(40), np.random.default_rng(0))
    x, labels = data.as_input(images), labels.astype(np.int64)
    logits = module(torch.from_numpy(x))
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    loss.backward()
    np.testing.assert_allclose(network.logits(x), logits.detach().numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(module.logits(x), logits.detach().numpy(), rtol=0, atol=1e-6)
    mine, grad = networks.cross_entropy(network.forward(x), labels)
    assert mine == pytest.approx(loss.item(), rel=1e-5)
    gradients = network.backward(grad)
    wanted = dict(module.named_parameters())
    assert len(gradients) == len(wanted)
    for name, found in gradients.items():
        gradient = wanted[name.replace("conv_offset_", "conv_offset.")].grad.numpy()
        assert np.abs(gradient).max() > 0, name
        np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-4 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_trainings_take_the_same_steps(variant):
    network, module = both(variant, scale=0.02)
    few = digits(200)
    mine = list(networks.train(network, few, 0, 3, offset_factor=0.1))
    theirs = list(torch_networks.train(module, few, 0, 3, offset_factor=0.1))
    assert len(mine) == 6
    assert len(set(mine)) == 6
    np.testing.assert_allclose(mine, theirs, rtol=2e-3)


def test_training_from_end_to_end(tmp_path, capsys, monkeypatch):
    few = digits(200)
    monkeypatch.setattr(train, "originals", lambda: (few, digits(30)))
    train.main(["--epochs", "1", "--seeds", "0", "1", "--output", str(tmp_path)])
    train.main(["--epochs", "1", "--seeds", "0", "--numpy", "--output", str(tmp_path)])
    text = capsys.readouterr().out
    assert {run[:4] for run in runs.read_runs(tmp_path)} == {
        (variant, trainer, seed, 1)
        for variant in VARIANTS
        for trainer, seed in (("torch", 0), ("torch", 1), ("numpy", 0))
    }
    assert text.count("\n| DCNv2 | 15806 | torch | 1 | ") == 2  # a table after each call
    assert text.count("\n| DCNv2 | 15806 | numpy | 1 | ") == 1
    root = Path(demo_digits.EXAMPLE).parents[1]
    command = [sys.executable, "-m", "examples.digits.run", str(tmp_path / "weights.npz")]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "torch was not imported" in found.stdout
