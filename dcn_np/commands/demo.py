"""python -m dcn_np demo: the main job on a photograph, checked and drawn; then trained networks at work."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

import dcn_np
from dcn_np.commands import demo_digits
from dcn_np.commands.comparison import ALLOWED_ROUNDINGS, Comparison, compare, compare_with_reference
from dcn_np.commands.demo_problem import (
    DILATION,
    KERNEL,
    MAGNIFICATION,
    PADDING,
    TURN_DEGREES,
    Problem,
    make_problem,
)

NEEDED = {"skimage": "scikit-image", "scipy": "scipy", "matplotlib": "matplotlib", "tqdm": "tqdm"}
SMALLEST = 32
REPEATS = 3
CHECKED_PER_AXIS = 64  # the reference takes about a second for this many positions squared
PARAMETERS: dict[str, Any] = {"padding": PADDING, "dilation": DILATION}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="FOLDER",
        help="where the pictures go (default: ./demo_output)",
    )
    parser.add_argument(
        "--size",
        type=picture_size,
        default=512,
        metavar="PIXELS",
        help="width and height the photo is scaled to (default: 512, its own size)",
    )


def picture_size(text: str) -> int:
    """Read --size; below the smallest size the close-ups would not fit."""
    size = int(text)
    if size < SMALLEST:
        raise argparse.ArgumentTypeError(f"got {size}, needs at least {SMALLEST}")
    return size


def main(args: argparse.Namespace) -> int:
    """Run the demo; 0 when every check passed."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"The demo needs {', '.join(missing)}: pip install 'dcn_np[demo]'", file=sys.stderr)
        return 1
    try:
        args.output.mkdir(parents=True, exist_ok=True)  # before anything is computed
    except OSError as error:
        print(f"demo: --output cannot be made: {error}", file=sys.stderr)
        return 1
    return Demo(args.size, args.output).run()


class Demo:
    """The steps of the demo and what they hand on to each other."""

    problem: Problem
    y: numpy.ndarray
    gradients: Any  # dcn_np.Gradients

    def __init__(self, size: int, output: Path) -> None:
        self.size = size
        self.output = output
        self.comparisons: list[Comparison | demo_digits.Count] = []
        self.lines: list[str] = []

    def run(self) -> int:
        """Take all steps, under a progress bar once they have taken two seconds."""
        import tqdm

        steps = [
            self.prepare,
            self.forward,
            self.backward,
            self.check_reference,
            self.check_scipy,
            self.check_adjoint,
            self.draw_sampling_points,
            self.draw_responses,
            self.draw_gradient,
            self.tell_digits,
        ]
        with tqdm.tqdm(steps, desc="demo", unit="step", delay=2, leave=False, disable=None) as bar:
            for step in bar:
                step()
                bar.clear()
                print("\n".join(self.lines), flush=True)
                self.lines.clear()
        return self.verdict()

    def say(self, text: str) -> None:
        """Keep a line; it is printed when the step is done, so that it does not cut the progress bar."""
        self.lines.append(text)

    def prepare(self) -> None:
        """Make the arrays and say what they are."""
        self.problem = problem = make_problem(self.size)
        self.say(f"Modulated deformable convolution of a photograph, with dcn_np {dcn_np.__version__}\n")
        self.say("What goes in (all float32)")
        for name, meaning in (
            ("x", f"a photograph of an astronaut, {self.size} x {self.size} pixels, red, green and blue"),
            (
                "weight",
                f"{len(problem.names)} filters of {KERNEL} x {KERNEL} taps that lie {DILATION} pixels apart",
            ),
            (
                "offset",
                f"turn the sampling points {TURN_DEGREES:g} degrees clockwise about the centre of the photo\n"
                f"and pull them {MAGNIFICATION:g} times closer to it: a (y, x) displacement per tap",
            ),
            ("mask", "modulation of each tap: 1 at the centre, fading to 0 at the borders"),
            ("bias", "zeros"),
        ):
            self.say_array(name, getattr(problem, name), meaning)

    def say_array(self, name: str, array: numpy.ndarray, meaning: str) -> None:
        """Describe one array: its name, its shape, its meaning in as many lines as it has."""
        head, *more = meaning.split("\n")
        self.say(f"  {name:<12} {array.shape!s:<20} {head}")
        for line in more:
            self.say(" " * 36 + line)

    def forward(self) -> None:
        """Compute the responses."""
        problem = self.problem
        self.y, seconds = timed(
            lambda: dcn_np.modulated_deform_conv(
                problem.x, problem.offset, problem.mask, problem.weight, problem.bias, **PARAMETERS
            )
        )
        self.say(f"\nForward: dcn_np.modulated_deform_conv, {self.speed(seconds)}")
        self.say_array("y", self.y, "the responses: each filter at each position, where the points say")

    def backward(self) -> None:
        """Compute all five gradients of half the sum of the squared responses, whose gradient by y is y."""
        self.gradients, seconds = timed(lambda: self.gradients_of(self.y))
        self.say(f"\nBackward: dcn_np.modulated_deform_conv_backward, {self.speed(seconds)}")
        self.say("  How half the sum of all squared responses changes with each input:")
        for name, gradient in self.gradients._asdict().items():
            self.say_array(f"grad_{name}", gradient, f"largest {numpy.abs(gradient).max():.3g}")

    def gradients_of(self, grad_output: numpy.ndarray) -> Any:
        """All gradients of the sum of grad_output * y."""
        problem = self.problem
        return dcn_np.modulated_deform_conv_backward(
            grad_output, problem.x, problem.offset, problem.mask, problem.weight, **PARAMETERS
        )

    def speed(self, seconds: float) -> str:
        """Time of one call and what it ran on."""
        points = self.problem.mask.size / seconds / 1e6
        return (
            f"{seconds * 1e3:.1f} ms ({points:.0f} million sampling points a second; "
            f"{dcn_np.get_num_threads()} threads, {dcn_np.isa()}; median of {REPEATS})"
        )

    def check_reference(self) -> None:
        """Compare forward and backward with the reference, on every step-th position of every step-th row.

        These positions alone are the same convolution with a stride of `step`, quickly done by the reference.
        The backward gets a grad_output that is zero everywhere else, so all its gradients can be compared.
        """
        problem, step = self.problem, self.step
        chosen = (..., slice(None, None, step), slice(None, None, step))
        grad_output = numpy.zeros_like(self.y)
        grad_output[chosen] = self.y[chosen]
        gradients = self.gradients_of(grad_output)
        thinned = gradients._replace(offset=gradients.offset[chosen], mask=gradients.mask[chosen])
        self.say(f"\nChecks (in roundings of float32; up to {ALLOWED_ROUNDINGS:g} are allowed)")
        some, all_of_them = grad_output[0, 0][chosen].size, grad_output[0, 0].size
        self.say(f"  against dcn_np.reference in float64, at {some} of {all_of_them} positions")
        self.judge(
            compare_with_reference(
                self.y[chosen],
                thinned,
                self.y[chosen],
                problem.x,
                problem.offset[chosen],
                problem.mask[chosen],
                problem.weight,
                problem.bias,
                stride=step,
                **PARAMETERS,
            )
        )

    @property
    def step(self) -> int:
        """One in how many rows and columns the slow checks look at."""
        return max(1, -(-self.size // CHECKED_PER_AXIS))

    def check_scipy(self) -> None:
        """Sample with SciPy, contract with einsum, and compare the responses at the same positions."""
        from scipy.ndimage import map_coordinates

        problem, step = self.problem, self.step
        chosen = (..., slice(None, None, step), slice(None, None, step))
        points = sampling_points(problem.offset[chosen], step)
        # With mode='constant' SciPy does not interpolate between the border and the zeros outside; a ring of
        # zeros around the photo makes it do so.
        ringed = numpy.pad(problem.x[0].astype(numpy.float64), ((0, 0), (1, 1), (1, 1)))
        samples = [
            map_coordinates(channel, points + 1, order=1, mode="constant", cval=0.0) for channel in ringed
        ]
        taps = problem.weight.reshape(*problem.weight.shape[:2], -1).astype(numpy.float64)
        expected = numpy.einsum(
            "ock,ckp,kp->op", taps, samples, problem.mask[chosen].reshape(len(points[0]), -1)
        )
        scale = numpy.einsum("ock,kp->op", numpy.abs(taps), problem.mask[chosen].reshape(len(points[0]), -1))
        self.say(
            "  against scipy.ndimage.map_coordinates and a plain sum over channels and taps, same positions"
        )
        result = self.y[chosen].reshape(expected.shape)
        self.judge([compare("y", result, expected, scale)])

    def check_adjoint(self) -> None:
        """Check the whole backward: y is linear in x, mask and weight, so <grad_a, a> = <y, y> for each."""
        whole = numpy.vdot(self.y.astype(numpy.float64), self.y)
        self.say("  gradient times input, summed, is the sum of the squared responses; at all positions")
        for name in ("x", "mask", "weight"):
            with numpy.errstate(all="ignore"):  # a wrong gradient may hold anything
                terms = getattr(self.gradients, name).astype(numpy.float64) * getattr(self.problem, name)
                total = numpy.array(terms.sum(), numpy.float32)
                scale = numpy.abs(terms).sum() + whole
            self.judge([compare(f"grad_{name}", total, numpy.array(whole), scale)])

    def judge(self, comparisons: list[Comparison]) -> None:
        """Note the comparisons and say how each came out."""
        for comparison in comparisons:
            verdict = "ok" if comparison.passed else "WRONG"
            self.say(f"    {verdict:<6} {comparison.name:<12} {comparison.roundings:.3g}")
        self.comparisons += comparisons

    def draw_sampling_points(self) -> None:
        """Draw where the convolution looks."""
        self.say("\nPictures")
        self.save("sampling_points.png", lambda pictures: pictures.sampling_points(self.problem))

    def draw_responses(self) -> None:
        """Draw what it answers."""
        self.save("responses.png", lambda pictures: pictures.responses(self.problem, self.y))

    def draw_gradient(self) -> None:
        """Draw the gradients of one output: those by a grad_output that is 1 there and 0 elsewhere."""

        def gradient(pictures: Any) -> Any:
            place = pictures.strongest_edge(self.y)
            grad_output = numpy.zeros_like(self.y)
            grad_output[(0, *place)] = 1
            return pictures.gradient(self.problem, self.gradients_of(grad_output), *place)

        self.save("gradient.png", gradient)

    def tell_digits(self) -> None:
        """Let trained networks tell warped digits, and draw where the deformable one looks."""
        self.say("\nTrained networks: warped handwritten digits, told with NumPy alone")
        if not demo_digits.is_here():
            self.say(
                "  not here: the networks lie in examples/digits of the repository, not in what pip installs"
            )
            return
        trained = demo_digits.TrainedDigits()
        for variant in demo_digits.SHOWN:
            count, total = trained.count(variant), len(trained.digits.labels)
            self.say(
                f"    {'ok' if count.passed else 'WRONG':<6} {variant:<12} {count.right} of {total} digits "
                f"({100 * count.right / total:.1f} %), after training {count.wanted}"
            )
            self.comparisons.append(count)
        self.save("digits.png", lambda pictures: pictures.digits(trained.samplings()))

    def save(self, name: str, draw: Callable[[Any], Any]) -> None:
        """Draw and write a picture, unless it would show what is known to be wrong."""
        if not all(comparison.passed for comparison in self.comparisons):
            self.say(f"  {name}: not drawn, because a check failed")
            return
        from dcn_np.commands import demo_pictures

        self.output.mkdir(parents=True, exist_ok=True)
        draw(demo_pictures).savefig(self.output / name)
        self.say(f"  {self.output / name}")

    def verdict(self) -> int:
        """Say whether all checks passed and return the exit status."""
        wrong = [comparison.name for comparison in self.comparisons if not comparison.passed]
        print(f"\nWRONG: {', '.join(wrong)}" if wrong else f"\nAll {len(self.comparisons)} checks passed.")
        return 1 if wrong else 0


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a call and the median time of REPEATS calls, after one that is not timed."""
    result, seconds = call(), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def sampling_points(offset: numpy.ndarray, stride: int) -> numpy.ndarray:
    """Where each tap samples, by the definition: (2, taps, positions) in pixels of the photo, float64."""
    _, channels, height, width = offset.shape
    position = numpy.indices((height, width)).reshape(2, 1, -1) * stride
    tap = numpy.indices((KERNEL, KERNEL)).reshape(2, -1, 1) * DILATION
    moved = offset.reshape(channels // 2, 2, -1).swapaxes(0, 1).astype(numpy.float64)
    return position - PADDING + tap + moved
