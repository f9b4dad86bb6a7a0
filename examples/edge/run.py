"""python -m examples.edge.run: tell the digits of a stream of frames, and what that takes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy

import dcn_np

from ..digits.data import CANVAS, Digits, as_input
from ..digits.numpy_network import Network
from ..digits.runs import read_weights
from .frames import Frame, FrameError, drawn, from_camera, from_folder, on_canvas
from .memory import memory_of_numpy, peak_memory

VARIANT = "DCNv2"
MIB = 2**20


class Answer(NamedTuple):
    """What the network says of a frame."""

    name: str
    digit: int
    probability: float
    seconds: float  # in the network


def main(arguments: list[str] | None = None) -> int:
    """Answer for each frame; print the rate and the memory at the end."""
    parser = argparse.ArgumentParser(prog="python -m examples.edge.run", description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("folder", nargs="?", type=Path, help="of frames; without one, digits are drawn")
    source.add_argument("--camera", type=int, metavar="NUMBER", help="frames of a camera, through OpenCV")
    parser.add_argument("--frames", type=int, default=200, metavar="N", help="at most so many (default: 200)")
    parser.add_argument("--invert", action="store_true", help="for dark digits on a bright ground")
    options = parser.parse_args(arguments)
    if options.frames < 1:
        parser.error(f"--frames is {options.frames}; wanted at least 1")
    try:
        run(options)
    except FrameError as error:
        parser.error(str(error))
    return 0


def run(options: argparse.Namespace) -> None:
    """Read the network and prepare it, answer, and print."""
    peaks = {"imports": peak_memory()}
    states, _, originals = read_weights()
    network = Network(VARIANT, state=states[VARIANT])
    network.prepare((1, 1, CANVAS, CANVAS))
    peaks["network"] = peak_memory()
    print(f"{VARIANT}, {dcn_np.get_num_threads()} threads, {dcn_np.isa()}")
    seconds = []
    begin = time.perf_counter()
    for answer in answers(network, islice(source_of(options, originals), options.frames), options.invert):
        print(f"{answer.name}: {answer.digit} ({100 * answer.probability:.0f} %)")
        seconds.append(answer.seconds)
    rate = len(seconds) / (time.perf_counter() - begin)
    peaks["frames"] = peak_memory()
    peaks["numpy"] = memory_of_numpy()
    print(
        f"{len(seconds)} frames, {rate:.0f} per second; {1e3 * numpy.median(seconds):.2f} ms in the network, "
        "the median"
    )
    print(memory(peaks, largest_layer(network)))


def source_of(options: argparse.Namespace, originals: Digits) -> Iterator[Frame]:
    """Return the frames that the command line asks for."""
    if options.camera is not None:
        return from_camera(options.camera)
    return drawn(originals) if options.folder is None else from_folder(options.folder)


def answers(network: Network, frames: Iterator[Frame], invert: bool = False) -> Iterator[Answer]:
    """Tell the digit of each frame."""
    for frame in frames:
        pixels = on_canvas(frame)
        begin = time.perf_counter()
        (logits,) = network.logits(as_input((255 - pixels if invert else pixels)[None]))
        seconds = time.perf_counter() - begin
        digit = int(logits.argmax())
        yield Answer(frame.name, digit, float(1 / numpy.exp(logits - logits[digit]).sum()), seconds)


def largest_layer(network: Network) -> int:
    """Return the most bytes of input and output together that a layer had in the last frame."""
    first = numpy.zeros((1, 1, CANVAS, CANVAS), numpy.float32)
    return max(int(x.nbytes + y.nbytes) for x, y in pairwise([first, *network.rectified]))


def memory(peaks: Mapping[str, int], layer: int) -> str:
    """Say what the peak is made of, and how far it is from the goal."""
    numpys, imports, read, all_ = (peaks[name] / MIB for name in ("numpy", "imports", "network", "frames"))
    goal = numpys + 2 * layer / MIB
    return (
        f"peak memory {all_:.1f} MiB: {numpys:.1f} of numpy's import, {imports - numpys:.1f} of dcn_np's and "
        f"the example's, {read - imports:.1f} of the network, {all_ - read:.1f} of the frames\n"
        f"goal {goal:.1f} MiB, numpy's import and twice the {layer} bytes of the largest layer's input and "
        f"output: {'reached' if all_ <= goal else f'missed by {all_ - goal:.1f} MiB'}"
    )


if __name__ == "__main__":
    sys.exit(main())
