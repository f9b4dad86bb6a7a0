"""Times of a ResNet-50 with DCNv2 in conv3 to conv5: on dcn_np, on torchvision, and of the ordinary network.

    python benchmarks/networks.py --sizes 224x224 --threads 1,2 --json now.json

One image; the networks have the same weights, and the branches that make offsets are random: offsets have a
standard deviation of 1.5 pixels. Batch normalisation has fixed statistics, as in the papers' detectors.
"both" is the forward pass and the gradients of all parameters. "layers" is the part of the time that the 13
deformable layers take, each with the convolution that makes its offsets and masks; in the ordinary network,
the 13 convolutions in their place.

Before anything is timed, each layer on torchvision's operator is compared with ours on the same input,
outputs and gradients. (Such a network makes a difference 3 times larger in each layer, whoever computes it:
outputs of whole networks agree in float64 only.)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import goals
import peers
import run
import torch
import tqdm
from peers.torch_arrays import torch_threads
from resnet import RESNET50, resnet
from torch import Tensor, nn

import dcn_np.torch
from dcn_np.commands import bench
from dcn_np.commands.bench_timing import Work, in_round_ratio, interleave, measure
from dcn_np.threads import exactly

OWN, RIVAL, ORDINARY = "dcn_np", "torchvision", bench.BASELINE
SIZES = ("224x224", "800x1333")
OFFSET_SIGMA = 1.5  # pixels
TIMES_FASTER = 10.0  # than torchvision in the deformable layers, with one thread
# Of the norm of a result. torchvision adds positions and offsets in float32: some samples land in the next
# cell, where the value is the same and the derivative is not.
TOLERANCES = {"output": 1e-4, "gradient": 2e-2}


class TorchvisionConv(nn.Module):
    """A layer of `dcn_np.torch`, its parameters and its branch, on torchvision's operator."""

    def __init__(self, layer: nn.Module, convolve: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.convolve = layer, convolve

    def forward(self, x: Tensor) -> Tensor:
        """As the layer does it."""
        layer: Any = self.layer
        made = layer.conv_offset(x)
        offsets = 2 * layer.offset_groups * layer.taps
        offset, mask = made[:, :offsets], torch.sigmoid(made[:, offsets:])
        window = (layer.stride, layer.padding, layer.dilation)
        return self.convolve(x, offset, layer.weight, layer.bias, *window, mask)


class Network:
    """A network, and the seconds that some of its layers take, forward and backward."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.layers = [model.get_submodule(name) for name in names]
        self.seconds = self._started = 0.0
        for layer in self.layers:
            layer.register_forward_pre_hook(self._start)
            layer.register_forward_hook(self._stop)
            layer.register_full_backward_pre_hook(self._start)
            layer.register_full_backward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started


@dataclasses.dataclass
class Case:
    """One network on one size of image, and its times."""

    network: str
    size: str
    passes: str
    threads: int
    calls: int = 1  # in each round
    seconds: list[float] = dataclasses.field(default_factory=list)  # one entry for each round
    layer_seconds: list[float] = dataclasses.field(default_factory=list)  # the part of the deformable layers

    def record(self) -> dict[str, Any]:
        """The case as JSON."""
        medians = {"median": self.seconds, "layer_median": self.layer_seconds}
        return dataclasses.asdict(self) | {name: statistics.median(times) for name, times in medians.items()}


# ---- the networks


def networks(x: Tensor, convolve: Callable[..., Tensor] | None) -> dict[str, Network]:
    """Ours, the ordinary network, and that on torchvision's operator if there is one."""
    torch.manual_seed(0)
    ordinary = resnet(RESNET50)
    for module in ordinary.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    own = copy.deepcopy(ordinary)
    names = dcn_np.torch.replace_convs(own)
    hooks = [own.get_submodule(name).register_forward_pre_hook(_spread_offsets) for name in names]
    models = {OWN: own, ORDINARY: ordinary}
    for model in models.values():
        _fix_statistics(model, x)
    for hook in hooks:
        hook.remove()
    if convolve is not None:
        models[RIVAL] = _on_another_operator(own, names, convolve)
    return {key: Network(model, names) for key, model in models.items()}


def _on_another_operator(
    model: nn.Module, names: Sequence[str], convolve: Callable[..., Tensor]
) -> nn.Module:
    copied = copy.deepcopy(model)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(copied.get_submodule(parent), child, TorchvisionConv(copied.get_submodule(name), convolve))
    return copied


def _spread_offsets(layer: Any, inputs: tuple[Tensor]) -> None:
    """Make the branch of a layer random, with offsets for this input as wide as they should be."""
    branch = layer.conv_offset
    nn.init.normal_(branch.weight)
    offset = branch(inputs[0])[:, : 2 * layer.offset_groups * layer.taps]
    branch.weight.mul_(OFFSET_SIGMA / offset.std())


def _fix_statistics(model: nn.Module, x: Tensor) -> None:
    """Normalise by the statistics of this image from now on."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all images, here one
    with torch.no_grad():
        model.train()(x)
    model.eval()


# ---- what is run


def residuals(own: Network, rival: Network, x: Tensor) -> dict[str, float]:
    """The largest errors of a layer's output and gradients, in norms of what the other network's layer gives.

    Both are given what our layer is given when `x` goes through our network. NaN is larger than all else.
    """
    inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, arrays: inputs.append(arrays[0])) for layer in own.layers
    ]
    with torch.no_grad():
        own.model(x)
    for hook in hooks:
        hook.remove()
    errors = []
    for one, other, given in zip(own.layers, rival.layers, inputs, strict=True):
        pairs = zip(_results(one, given), _results(other, given), strict=True)
        errors.append(torch.stack([(got - wanted).norm() / wanted.norm() for got, wanted in pairs]))
    largest = torch.stack(errors).max(0).values
    return {"output": float(largest[0]), "gradient": float(largest[1:].max())}


def agree(found: Mapping[str, Network], x: Tensor, size: str) -> bool:
    """Print how far torchvision's layers are from ours, and tell whether rounding explains it."""
    errors = residuals(found[OWN], found[RIVAL], x)
    words = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"{size}: largest difference of a layer on torchvision from ours, of the norm: {words}", flush=True)
    right = all(error <= TOLERANCES[name] for name, error in errors.items())
    if not right:
        print(f"more than {TOLERANCES}: nothing is timed", file=sys.stderr)
    return right


def _results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))]


def work_of(case: Case, network: Network, x: Tensor) -> Work:
    """One or two passes through a network, which note the time of its deformable layers."""

    def forward() -> None:
        with torch.no_grad():
            network.model(x)

    def both() -> None:
        network.model.zero_grad()
        y = network.model(x)
        y.backward(torch.ones_like(y))

    def timed() -> None:
        network.seconds = 0.0
        (forward if case.passes == "forward" else both)()
        case.layer_seconds.append(network.seconds)

    return Work(timed, dict, lambda: _threads(case.threads))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    with torch_threads(count), exactly(count):
        yield


def time_networks(
    found: Mapping[str, Network], x: Tensor, size: str, passes: str, threads: Sequence[int], rounds: int
) -> list[Case]:
    """Run each network once, then time them in turns."""
    ready = []
    for name, network in found.items():
        cases = [Case(name, size, passes, count) for count in threads]
        works = [work_of(case, network, x) for case in cases]
        measure(works[-1], 1)
        cases[-1].layer_seconds.clear()
        ready += list(zip(cases, works, strict=True))
    interleave(ready, rounds, progress=lambda turns: tqdm.tqdm(turns, unit="turn", disable=None))
    return [case for case, _ in ready]


# ---- what comes out


def ratios(case: Case, other: Case) -> tuple[float, float]:
    """The times of a case as multiples of another's, taken inside the rounds: all, and in the layers."""
    return (
        in_round_ratio(case.seconds, other.seconds),
        in_round_ratio(case.layer_seconds, other.layer_seconds),
    )


def table(cases: Sequence[Case]) -> str:
    """One line per network and number of threads; ratios are to ours."""
    header = f"{'size':10}{'pass':9}{'threads':>7}  {'network':13}{'s':>9}{'layers s':>10}"
    lines = [f"{header}{'x ' + OWN:>11}{'layers':>9}"]
    for case in cases:
        own = _find(cases, OWN, case)
        whole, layers = ratios(case, own)
        times = f"{statistics.median(case.seconds):9.3f}{statistics.median(case.layer_seconds):10.3f}"
        start = f"{case.size:10}{case.passes:9}{case.threads:7}  {case.network:13}"
        lines.append(f"{start}{times}{whole:11.2f}{layers:9.2f}")
    return "\n".join(lines)


def _find(cases: Sequence[Case], network: str, like: Case) -> Case:
    key = (network, like.size, like.passes, like.threads)
    return next(case for case in cases if (case.network, case.size, case.passes, case.threads) == key)


def rows(cases: Sequence[Case]) -> list[goals.Row]:
    """The goal for one thread, where torchvision was timed."""
    return [
        goals.Row(
            f"{case.passes}, 1 thread: deformable layers faster than torchvision",
            True,
            TIMES_FASTER,
            ratios(case, _find(cases, OWN, case))[1],
            (case.size,),
        )
        for case in cases
        if case.network == RIVAL and case.threads == 1
    ]


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not heightxwidth")
    return text


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, words = parser.add_argument, "comma-separated; default"
    sizes = f"heightxwidth, {words} {','.join(SIZES)}"
    add(
        "--sizes",
        type=lambda text: [_size(word) for word in text.split(",")],
        default=list(SIZES),
        help=sizes,
    )
    bench.add_pass_arguments(parser)
    bench.add_run_arguments(parser, rounds=5)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 where results differ."""
    arguments = parser().parse_args(words)
    threads = bench.thread_counts(arguments)
    found, missing = peers.load([RIVAL])
    rival: Any = found[0] if found else None
    versions = {"torch": torch.__version__} | {peer.name: peer.version for peer in found}
    record = run.begin(versions, missing)
    cases = []
    for size in arguments.sizes:
        x = torch.randn(1, 3, *map(int, size.split("x")), generator=torch.Generator().manual_seed(0))
        with _threads(max(threads)):
            models = networks(x, rival and rival.convolve)
            right = not rival or agree(models, x, size)
        if not right:
            return 1
        for passes in arguments.passes:
            timed = time_networks(models, x, size, passes, threads, arguments.rounds)
            cases += timed
            print(table(timed), end="\n\n", flush=True)
    reached = rows(cases)
    run.print_goals(reached)
    if arguments.json:
        results = {"results": [case.record() for case in cases], "goals": [row.record() for row in reached]}
        bench.write(arguments.json, record | results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
