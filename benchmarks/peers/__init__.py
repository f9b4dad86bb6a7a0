"""Other libraries to time beside dcn_np: one module each, none of them needed.

A module here has a function ``load()`` that returns a `dcn_np.commands.bench_timing.Implementation`; an error
of its imports is the reason why the peer is left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from dcn_np.commands.bench_timing import Implementation

NAMES = ("ordinary", "torchvision", "onnxruntime", "openvino")


def load(names: Iterable[str]) -> tuple[list[Implementation], dict[str, str]]:
    """The peers that can be imported, and for each of the others the reason why it cannot."""
    found, missing = [], {}
    for name in names:
        try:
            found.append(importlib.import_module(f"peers.{name}_peer").load())
        # A broken installation raises anything (RuntimeError, OSError): the caller reports it.
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing
