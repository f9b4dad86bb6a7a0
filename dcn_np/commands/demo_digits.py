"""The demo's second part: the trained networks of examples/digits at work, with NumPy alone."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy

import dcn_np

EXAMPLE = Path(dcn_np.__file__).parents[1] / "examples" / "digits"
NAME = "dcn_np_example_digits"  # what its modules are imported as, so that no other `examples` is met
SHOWN = "plain", "DCNv2"


class Count(NamedTuple):
    """How many digits a network tells, beside how many it told when it was trained."""

    name: str
    right: int
    wanted: int
    allowed: int

    @property
    def passed(self) -> bool:
        """Whether the two agree."""
        return abs(self.right - self.wanted) <= self.allowed


class TrainedDigits:
    """The stored networks and the warped test digits."""

    def __init__(self) -> None:
        self.example = {name: part(name) for name in ("data", "numpy_network", "run", "runs", "sampling")}
        self.states, self.wanted, originals = self.example["runs"].read_weights()
        self.digits = self.example["data"].test_set(originals)

    def network(self, variant: str) -> Any:
        """Return a network with its stored weights."""
        return self.example["numpy_network"].Network(variant, state=self.states[variant])

    def count(self, variant: str) -> Count:
        """Let a network tell all digits."""
        right = self.example["data"].count_right(self.network(variant).logits, self.digits)
        return Count(variant, right, self.wanted[variant], self.example["run"].ALLOWED_DIFFERENCE)

    def samplings(self) -> list[tuple[Any, int, int, Any]]:
        """Return (image, label, answer, sampling) of the first of each digit, by DCNv2."""
        network, (images, labels) = self.network("DCNv2"), self.digits
        _, chosen = numpy.unique(labels, return_index=True)
        answers = network.logits(self.example["data"].as_input(images[chosen])).argmax(axis=1)
        look = self.example["sampling"].most_active
        return [
            (images[place], int(labels[place]), int(answer), look(network, images[place]))
            for place, answer in zip(chosen, answers, strict=True)
        ]


def is_here() -> bool:
    """Whether the example lies beside the package: in the repository, not in an installed wheel."""
    return (EXAMPLE / "weights.npz").is_file()


def part(name: str) -> Any:
    """Import a module of the example from its folder, wherever Python was started."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, EXAMPLE / "__init__.py", submodule_search_locations=[str(EXAMPLE)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{EXAMPLE} holds no Python package")
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return importlib.import_module(f"{NAME}.{name}")
