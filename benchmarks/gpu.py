"""Time dcn_np on a GPU beside torchvision and the ordinary convolution of cuDNN; results are validated first.

    make bench-gpu
    python benchmarks/gpu.py --shapes C256-N32 --modes float16 --json now.json

Needs CuPy, torch with CUDA and torchvision. Everything runs on the default stream; times are CUDA events
around one call, medians over rounds in which the implementations take turns in a random order. Each call
takes the next of several sets of inputs, so that none finds its own in the cache. Offsets are "local",
normal with a standard deviation of 1.5 pixels, or "scattered", anywhere in the image. torchvision in
float64 on the same GPU says what is right. `--device cpu` is a rehearsal with NumPy's arrays and small
shapes: its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dcn_np
from dcn_np.commands import machine

SCHEMA = "dcn_np gpu benchmark 1"
RESULTS = Path(__file__).parent / "results"
SETS = 3  # of inputs that take turns
WARM_UP = 2


@dataclass(frozen=True)
class Shape:
    """A 3 x 3 layer with padding 1 and as many outputs as channels."""

    channels: int
    height: int
    width: int
    batch: int


SHAPES = {
    "C256-N32": Shape(256, 56, 56, 32),
    "C256-N16": Shape(256, 56, 56, 16),
    "C256-large": Shape(256, 50, 84, 8),
    "C128-N8": Shape(128, 100, 167, 8),
    "C128-N2": Shape(128, 100, 167, 2),
    "C512-N8": Shape(512, 25, 42, 8),
    "C512-N2": Shape(512, 25, 42, 2),
}
REHEARSED = {"C64-tiny": Shape(64, 7, 8, 2)}
ACCURACY_EXTENTS = ((56, 56), (200, 334))
REHEARSED_EXTENTS = ((6, 7),)

OFFSETS = ("local", "scattered")
PASSES = ("forward", "both")
# dtype of torch, float32_matmul of ours, and the largest relative error of what is timed
MODES = {
    "float16": ("float16", "strict", 1e-3),
    "bfloat16": ("bfloat16", "strict", 1e-2),
    "float32": ("float32", "strict", 2e-6),
    "tf32": ("float32", "tf32", 2e-3),
}
NAMES = ("x", "offset", "mask", "weight", "bias")


# ---- what is compared


class Device:
    """Where tensors are, what time it is there, and how a tensor becomes an array of dcn_np."""

    def __init__(self, kind: str) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.torchvision: Any = importlib.import_module("torchvision")
        self.kind = kind
        if kind == "cuda":
            self.cupy: Any = importlib.import_module("cupy")
            importlib.import_module("ml_dtypes")  # CuPy's bfloat16

    def array(self, tensor: Any) -> Any:
        """The same memory as dcn_np takes it."""
        if self.kind == "cuda":
            return self.cupy.from_dlpack(tensor.detach())
        if tensor.dtype is self.torch.bfloat16:
            bits = tensor.detach().view(self.torch.int16).numpy()
            return bits.view(importlib.import_module("ml_dtypes").bfloat16)
        return tensor.detach().numpy()

    def tensor(self, array: Any) -> Any:
        """A tensor of what dcn_np returned, in float64."""
        if self.kind == "cuda":
            return self.torch.from_dlpack(array.astype("float64"))
        return self.torch.from_numpy(array.astype("float64"))

    def seconds(self, run: Callable[[], Any]) -> float:
        """How long one call takes on the device."""
        if self.kind != "cuda":
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def extra_bytes(self, run: Callable[[], Any]) -> int | None:
        """How far device memory grows in a call beyond what it returns; None where that cannot be told."""
        if self.kind != "cuda":
            return None
        run()
        self.torch.cuda.synchronize()
        pool = self.cupy.get_default_memory_pool()
        pool.free_all_blocks()
        self.torch.cuda.reset_peak_memory_stats()
        before = pool.total_bytes(), self.torch.cuda.memory_allocated()
        result = run()
        self.torch.cuda.synchronize()
        grown = pool.total_bytes() - before[0] + self.torch.cuda.max_memory_allocated() - before[1]
        returned = result if isinstance(result, tuple | list) else [result]
        return int(grown - sum(array.nbytes for array in returned if array is not None))


@dataclass
class Inputs:
    """One set of inputs as torch has them, channels_last beside it, and the gradient of the result."""

    tensors: dict[str, Any]
    last: Any
    grad: Any
    grad_last: Any


def draw(device: Device, shape: Shape, offsets: str, dtype: str, seed: int) -> Inputs:
    """Inputs from a seed; the numbers are rounded to the dtype before anyone sees them."""
    torch = device.torch
    generator = torch.Generator(device=device.kind).manual_seed(seed)

    def normal(*extents: int) -> Any:
        return torch.randn(*extents, generator=generator, device=device.kind)

    n, c, h, w = shape.batch, shape.channels, shape.height, shape.width
    if offsets == "local":
        offset = normal(n, 18, h, w) * 1.5
    else:
        size = torch.tensor([h, w], device=device.kind).repeat(9).reshape(1, 18, 1, 1)
        offset = (torch.rand(n, 18, h, w, generator=generator, device=device.kind) - 0.5) * size
    values = {
        "x": normal(n, c, h, w),
        "offset": offset,
        "mask": torch.rand(n, 9, h, w, generator=generator, device=device.kind),
        "weight": normal(c, c, 3, 3) / (9 * c) ** 0.5,
        "bias": normal(c),
    }
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in values.items()}
    grad = normal(n, c, h, w).to(getattr(torch, dtype))
    last = torch.channels_last
    return Inputs(
        tensors, tensors["x"].contiguous(memory_format=last), grad, grad.contiguous(memory_format=last)
    )


class Ours:
    """dcn_np over the memory of torch's tensors."""

    def __init__(self, device: Device, float32_matmul: str, channels_last: bool) -> None:
        self.device, self.float32_matmul, self.channels_last = device, float32_matmul, channels_last
        self.name = "dcn_np, channels last" if channels_last else "dcn_np"

    def prepare(self, inputs: Inputs, passes: str) -> Callable[[], Any]:
        """The call to time, over arrays made once."""
        arrays = {name: self.device.array(tensor) for name, tensor in inputs.tensors.items()}
        grad = self.device.array(inputs.grad_last if self.channels_last else inputs.grad)
        if self.channels_last:
            arrays["x"] = self.device.array(inputs.last)
        x, offset, mask, weight, bias = (arrays[name] for name in NAMES)

        def forward() -> Any:
            return dcn_np.modulated_deform_conv(
                x, offset, mask, weight, bias, padding=1, float32_matmul=self.float32_matmul
            )

        def both() -> Any:
            gradients = dcn_np.modulated_deform_conv_backward(
                grad, x, offset, mask, weight, padding=1, float32_matmul=self.float32_matmul
            )
            return [forward(), *gradients]

        return forward if passes == "forward" else both


class OfTorch:
    """A function of torch and its gradients."""

    def __init__(
        self, device: Device, name: str, function: Callable[..., Any], wanted: Sequence[str], last: bool
    ) -> None:
        self.device, self.name, self.function = device, name, function
        self.wanted, self.channels_last = wanted, last

    def prepare(self, inputs: Inputs, passes: str) -> Callable[[], Any]:
        """The call to time."""
        tensors = {name: inputs.tensors[name].detach() for name in self.wanted}
        if self.channels_last:
            tensors["x"] = inputs.last.detach()
        grad = inputs.grad_last if self.channels_last else inputs.grad
        torch = self.device.torch

        def forward() -> Any:
            with torch.no_grad():
                return self.function(**tensors)

        def both() -> Any:
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
            y = self.function(**leaves)
            return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)]

        return forward if passes == "forward" else both


def torchvision(device: Device, name: str = "torchvision") -> OfTorch:
    """torchvision's operator."""

    def call(x: Any, offset: Any, mask: Any, weight: Any, bias: Any) -> Any:
        return device.torchvision.ops.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)

    return OfTorch(device, name, call, NAMES, False)


def ordinary(device: Device) -> OfTorch:
    """The ordinary convolution of the same size: the price to aim at."""

    def call(x: Any, weight: Any, bias: Any) -> Any:
        return device.torch.nn.functional.conv2d(x, weight, bias, padding=1)

    return OfTorch(device, "ordinary convolution", call, ("x", "weight", "bias"), True)


def implementations(device: Device, mode: str) -> list[Any]:
    """Who takes part in a mode."""
    found: list[Any] = [Ours(device, MODES[mode][1], last) for last in (True, False)]
    if mode != "bfloat16":  # torchvision has no kernels for it
        found.append(torchvision(device))
    return [*found, ordinary(device)]


@contextmanager
def tf32_of_torch(device: Device, allowed: bool) -> Iterator[None]:
    """Let torch round the factors of float32 products, or not."""
    backends = device.torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before


# ---- right before fast


def relative_error(device: Device, got: Any, want: Any) -> float:
    """The norm of the difference over that of what is wanted."""
    got = got.double() if isinstance(got, device.torch.Tensor) else device.tensor(got)
    return float((got - want).norm() / want.norm())


def exact(device: Device, inputs: Inputs) -> list[Any]:
    """y and the gradients by x, offset, mask, weight, bias: torchvision's, in float64."""
    wide = Inputs(
        {name: tensor.double() for name, tensor in inputs.tensors.items()},
        inputs.last.double(),
        inputs.grad.double(),
        inputs.grad_last.double(),
    )
    results: list[Any] = torchvision(device).prepare(wide, "both")()
    return results


def errors(device: Device, implementation: Any, inputs: Inputs, want: Sequence[Any]) -> list[float]:
    """Relative errors of y and of every gradient."""
    got = implementation.prepare(inputs, "both")()
    return [relative_error(device, *pair) for pair in zip(got, want, strict=True)]


def validate(device: Device, shape: Shape, mode: str) -> dict[str, list[float]]:
    """Errors of all that compute what we do, on one image; ours have to be small."""
    dtype, _, allowed = MODES[mode]
    one = Shape(shape.channels, shape.height, shape.width, 1)
    found: dict[str, list[float]] = {}
    for offsets in OFFSETS:
        inputs = draw(device, one, offsets, dtype, 1)
        want = exact(device, inputs)
        for implementation in implementations(device, mode):
            if isinstance(implementation, OfTorch) and implementation.wanted != NAMES:
                continue
            worst = errors(device, implementation, inputs, want)
            found[f"{implementation.name}, {offsets}"] = worst
            if isinstance(implementation, Ours) and not max(worst) <= allowed:
                raise SystemExit(
                    f"{implementation.name} is wrong, so nothing is timed: relative errors of y and the "
                    f"gradients {worst} in {mode}, {offsets}; allowed {allowed}"
                )
    return found


# ---- times


def measure(
    device: Device, shape: Shape, offsets: str, mode: str, passes: str, rounds: int, seed: int
) -> list[dict[str, Any]]:
    """Median seconds of every implementation, and the memory that a call takes."""
    dtype = MODES[mode][0]
    sets = [draw(device, shape, offsets, dtype, seed + number) for number in range(SETS)]
    calls = {
        implementation.name: itertools.cycle([implementation.prepare(inputs, passes) for inputs in sets])
        for implementation in implementations(device, mode)
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    with tf32_of_torch(device, mode == "tf32"):
        for call in calls.values():
            for _ in range(WARM_UP):
                device.seconds(next(call))
        names = list(calls)
        for _ in range(rounds):
            random.shuffle(names)
            for name in names:
                times[name].append(device.seconds(next(calls[name])))
        memory = {name: device.extra_bytes(next(call)) for name, call in calls.items()}
    return [
        {
            "shape": shape.__dict__,
            "offsets": offsets,
            "mode": mode,
            "passes": passes,
            "implementation": name,
            "median": statistics.median(values),
            "seconds": values,
            "extra bytes": memory[name],
        }
        for name, values in times.items()
    ]


def accuracy(device: Device, extents: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Relative errors of y in float16, ours and torchvision's, by the size of the image."""
    rows = []
    for height, width in extents:
        inputs = draw(device, Shape(64, height, width, 1), "local", "float16", 2)
        want = exact(device, inputs)[0]
        for implementation in (Ours(device, "strict", False), torchvision(device)):
            error = relative_error(device, implementation.prepare(inputs, "forward")(), want)
            rows.append({"extent": [height, width], "implementation": implementation.name, "error": error})
    return rows


# ---- goals


@dataclass(frozen=True)
class Goal:
    """A ratio of times, ours below or above, with what is asked at least and what is hoped for."""

    what: str
    mode: str
    passes: str
    channels: tuple[int, ...]
    rival: str
    rival_mode: str
    least: float
    hoped: float
    faster: bool = True  # the rival's time over ours, to be large; else ours over the rival's, to be small


RIVAL, CONVOLUTION = "torchvision", "ordinary convolution"
GOALS = (
    Goal("float16 forward", "float16", "forward", (128, 256), RIVAL, "float16", 2.5, 5.0),
    Goal("float16 forward", "float16", "forward", (512,), RIVAL, "float16", 1.5, 5.0),
    Goal("float16 forward", "float16", "forward", (128, 256, 512), CONVOLUTION, "float16", 2.0, 1.4, False),
    Goal("TF32 forward", "tf32", "forward", (128, 256, 512), RIVAL, "float32", 4.0, 8.0),
    Goal("strict float32 forward", "float32", "forward", (128, 256, 512), RIVAL, "float32", 1.5, 2.5),
    Goal("float16 forward + backward", "float16", "both", (128, 256, 512), RIVAL, "float16", 3.0, 7.0),
)
MOST_ERROR = 3e-4


def judged(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every goal with the worst ratio that was measured, for each kind of offsets; channels-last inputs."""
    times = {
        (r["mode"], r["passes"], r["offsets"], r["implementation"], json.dumps(r["shape"])): r["median"]
        for r in results
    }
    rows = []
    for goal, offsets in itertools.product(GOALS, OFFSETS):
        ratios = []
        for (mode, passes, where, name, shape), ours in times.items():
            rival = times.get((goal.rival_mode, passes, where, goal.rival, shape))
            wanted = (mode, passes, where, name) == (goal.mode, goal.passes, offsets, "dcn_np, channels last")
            if wanted and rival and json.loads(shape)["channels"] in goal.channels:
                ratios.append(rival / ours if goal.faster else ours / rival)
        worst = (min if goal.faster else max)(ratios, default=None)
        rows.append(
            {
                "what": f"{goal.what} to {goal.rival}, C {goal.channels}, {offsets}",
                "least": goal.least,
                "hoped": goal.hoped,
                "worst": worst,
                "verdict": verdict(worst, goal),
            }
        )
    return rows


def verdict(worst: float | None, goal: Goal) -> str:
    """In words; no figure is "not measured"."""
    if worst is None:
        return "not measured"
    met = [worst >= limit if goal.faster else worst <= limit for limit in (goal.least, goal.hoped)]
    return "goal met" if met[1] else "met" if met[0] else "NOT MET"


def print_tables(record: dict[str, Any]) -> None:
    """Times beside each other, then goals and errors."""
    for row in record["results"]:
        shape = "x".join(map(str, row["shape"].values()))
        print(
            f"{shape:16} {row['offsets']:10} {row['mode']:9} {row['passes']:8} {row['implementation']:22} "
            f"{row['median'] * 1e3:9.3f} ms  {(row['extra bytes'] or 0) / 2**20:8.1f} MiB more"
        )
    print()
    for row in record["goals"]:
        worst = "-" if row["worst"] is None else f"{row['worst']:.2f}"
        print(f"{row['what']:75} {worst:>7}  at least {row['least']}, goal {row['hoped']}: {row['verdict']}")
    for row in record["accuracy"]:
        bound = f" (at most {MOST_ERROR:g} wanted)" if row["implementation"] == "dcn_np" else ""
        who = row["implementation"]
        print(f"float16, {row['extent']}: relative error of {who} {row['error']:.2g}{bound}")


# ---- the command


def subset(names: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of names with commas between them."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r}; wanted some of {', '.join(names)}")
        return chosen

    return parse


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal")
    add("--shapes", type=subset(list(SHAPES)), default=list(SHAPES), help=", ".join(SHAPES))
    add("--offsets", type=subset(OFFSETS), default=list(OFFSETS), help=", ".join(OFFSETS))
    add("--modes", type=subset(list(MODES)), default=list(MODES), help=", ".join(MODES))
    add("--passes", type=subset(PASSES), default=list(PASSES), help=", ".join(PASSES))
    add("--rounds", type=int, default=20, help="times per implementation; default 20")
    add("--json", type=Path, help="where to write; default benchmarks/results/, named after device and date")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Validate, time, judge, write."""
    arguments = parser().parse_args(words)
    device = Device(arguments.device)
    rehearsal = arguments.device == "cpu"
    shapes = REHEARSED if rehearsal else {name: SHAPES[name] for name in arguments.shapes}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "command": " ".join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if words is None else words)]),
        "rehearsal": rehearsal,
        "date": today,
        **machine.gpu(),
        "commit": machine.commit(),
        "nvrtc": machine.nvrtc()["version"],
        "versions": {"dcn_np": dcn_np.__version__, **machine.optional_packages()},
        "errors": {},
        "results": [],
    }
    for (name, shape), mode in itertools.product(shapes.items(), arguments.modes):
        record["errors"][f"{name}, {mode}"] = validate(device, shape, mode)
        for offsets, passes in itertools.product(arguments.offsets, arguments.passes):
            record["results"] += measure(device, shape, offsets, mode, passes, arguments.rounds, 100)
            print(f"timed {name}, {mode}, {offsets}, {passes}", file=sys.stderr)
    record["goals"] = judged(record["results"])
    record["accuracy"] = accuracy(device, REHEARSED_EXTENTS if rehearsal else ACCURACY_EXTENTS)
    print_tables(record)
    slug = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    path = arguments.json or (None if rehearsal else RESULTS / f"bench-gpu-{slug}-{today}.json")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
