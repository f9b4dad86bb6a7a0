"""Do the benchmarks that need torch time right results only?"""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from dcn_np import torch as dcn_torch
from dcn_np.commands import bench_timing

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
networks = importlib.import_module("networks")
overhead = importlib.import_module("overhead")

SIZE = "96x96"  # smaller ones lose a whole layer to offsets


class Rival:
    """Stands in for torchvision."""

    name, version = "torchvision", "1"

    def __init__(self, factor=1.0):
        self.factor = factor

    def convolve(self, *arguments):
        return dcn_torch.deform_conv2d(*arguments) * self.factor


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(bench_timing, "FIRST_SETTLE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def x():
    return torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_every_way_to_call_with_tensors_is_right():
    for passes, count in (("forward", 3), ("both", 1)):
        cases = bench_timing.time_problem(overhead.TINY, passes, overhead.torch_callers(), rounds=1)
        assert len(cases) == count
        assert [case.refused for case in cases] == [None] * count


def test_offsets_are_as_wide_as_said(x):
    network = networks.networks(x, None)[networks.OWN]
    widths = []
    for layer in network.layers:
        layer.conv_offset.register_forward_hook(lambda _, inputs, made: widths.append(made[:, :18].std()))
    with torch.no_grad():
        network.model.train()(x)  # with the statistics that the widths were set by
    assert len(widths) == 13
    assert torch.stack(widths).tolist() == pytest.approx([networks.OFFSET_SIGMA] * 13, rel=1e-3)


def test_networks_have_the_same_parameters(x):
    found = networks.networks(x, Rival().convolve)
    assert list(found) == ["dcn_np", "ordinary", "torchvision"]
    own, ordinary, rival = (dict(network.model.named_parameters()) for network in found.values())
    assert all(torch.equal(own[name], value) for name, value in ordinary.items())
    assert [name.replace(".layer.", ".") for name in rival] == list(own)
    assert all(torch.equal(*pair) for pair in zip(own.values(), rival.values(), strict=True))
    assert all(type(layer) is networks.TorchvisionConv for layer in found["torchvision"].layers)


@pytest.mark.parametrize("passes", ["forward", "both"])
def test_layers_are_a_part_of_the_time(x, passes):
    network = networks.networks(x, None)[networks.OWN]
    case = networks.Case(networks.OWN, SIZE, passes, 1)
    seconds = bench_timing.measure(networks.work_of(case, network, x), 1)
    assert 0 < case.layer_seconds[0] < seconds
    gradients = [parameter.grad for parameter in network.model.parameters()]
    assert all((gradient is None) == (passes == "forward") for gradient in gradients)


def test_networks_are_compared_and_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks.peers, "load", lambda names: ([Rival()], {}))
    file = tmp_path / "networks.json"
    words = ["--sizes", SIZE, "--threads", "1", "--rounds", "2", "--json", str(file)]
    assert networks.main(words) == 0
    output = capsys.readouterr().out
    assert "output 0.0e+00, gradient 0.0e+00" in output
    record = json.loads(file.read_text())
    timed = [(result["network"], result["passes"]) for result in record["results"]]
    names = ["dcn_np", "ordinary", "torchvision"]
    assert timed == [(name, passes) for passes in ("forward", "both") for name in names]
    for result in record["results"]:
        assert len(result["seconds"]) == len(result["layer_seconds"]) == 2
        assert result["layer_median"] < result["median"]
    own, _, rival = record["results"][:3]
    pairs = zip(rival["layer_seconds"], own["layer_seconds"], strict=True)
    assert record["goals"][0]["reached"] == pytest.approx(sum(one / two for one, two in pairs) / 2)
    assert [goal["goal"] for goal in record["goals"]] == [10, 10]


@pytest.mark.parametrize("factor", [1.001, math.nan])
def test_networks_that_differ_are_not_timed(monkeypatch, capsys, factor):
    monkeypatch.setattr(networks.peers, "load", lambda names: ([Rival(factor)], {}))
    assert networks.main(["--sizes", SIZE, "--threads", "1", "--rounds", "1"]) == 1
    output = capsys.readouterr()
    assert "nothing is timed" in output.err
    assert "layers s" not in output.out


@pytest.mark.parametrize("size", ["64", "0x64", "64x64x3"])
def test_bad_sizes_are_refused(size, capsys):
    with pytest.raises(SystemExit):
        networks.parser().parse_args(["--sizes", size])
    assert "is not heightxwidth" in capsys.readouterr().err
