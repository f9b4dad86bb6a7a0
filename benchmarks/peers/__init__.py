"""Other libraries to time beside dcn_np: one module each, none of them needed.

A module here has a function ``load()`` that returns a `dcn_np.commands.bench_timing.Implementation`; an error
of its imports is the reason why the peer is left out.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from dcn_np.commands.bench_timing import Implementation

NAMES = ("ordinary", "torchvision", "onnxruntime", "openvino")


Loaded = TypeVar("Loaded")


def load(names: Iterable[str]) -> tuple[list[Implementation], dict[str, str]]:
    """The peers that can be imported, and for each of the others the reason why it cannot."""
    return installed({name: functools.partial(_peer, name) for name in names})


def installed(loaders: Mapping[str, Callable[[], Loaded]]) -> tuple[list[Loaded], dict[str, str]]:
    """What the loaders return; by name the reason of those that cannot."""
    found, missing = [], {}
    for name, loader in loaders.items():
        try:
            found.append(loader())
        # A broken installation raises anything (RuntimeError, OSError): the caller reports it.
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def _peer(name: str) -> Implementation:
    peer: Implementation = importlib.import_module(f"peers.{name}_peer").load()
    return peer
