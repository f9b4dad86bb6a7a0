"""The choice among tiles: predicted, or timed once on request and remembered.

With DCN_NP_AUTOTUNE=1 in the environment the first call of each kind times every candidate and writes the
fastest to ``tuned.json`` in the folder of compiled kernels; whoever finds an entry there uses it. No choice
changes a bit of a result. Nothing is timed while a CUDA graph is captured.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ..geometry import Geometry
from . import modules
from .launching import Device, Launch, positions_of

_FILE = "tuned.json"
# device name -> kind of call -> tile
_Table = dict[str, dict[str, str]]

_lock = threading.Lock()
_read: dict[Path, _Table] = {}


def chosen(
    device: Device,
    geometry: Geometry,
    launches: Sequence[Launch],
    seconds: Callable[[Launch], float | None],
) -> Launch:
    """Return the launch to use.

    Parameters
    ----------
    device : Device
        Where it runs.
    geometry : Geometry
        The problem.
    launches : sequence of Launch
        The candidates, at least one.
    seconds : callable
        Times one of them; None where that is impossible now.

    Returns
    -------
    Launch
        The one remembered, timed or predicted to be the fastest.
    """
    if len(launches) == 1:
        return launches[0]
    kind = kind_of(geometry, launches[0])
    remembered = _table().get(device.name, {}).get(kind)
    for launch in launches:
        if launch.tile == remembered:
            return launch
    if os.environ.get("DCN_NP_AUTOTUNE", "0") not in ("", "0"):
        timed = [(seconds(launch), launch) for launch in launches]
        known = [(time, launch) for time, launch in timed if time is not None]
        if len(known) == len(launches):
            best = min(known, key=lambda one: one[0])[1]
            _remember(device.name, kind, best.tile)
            return best
    return predicted(device, geometry, launches)


def predicted(device: Device, geometry: Geometry, launches: Sequence[Launch]) -> Launch:
    """Return the launch of least predicted time: whole rounds of blocks on all multiprocessors."""

    def time(launch: Launch) -> float:
        blocks = -(-positions_of(geometry) // launch.positions) * launch.blocks
        return -(-blocks // device.multiprocessors) * launch.time

    return min(launches, key=time)


def kind_of(geometry: Geometry, launch: Launch) -> str:
    """Name the calls that share a choice: the same kernel and channels, positions to a factor of two."""
    defines = dict(launch.module.defines)
    products = "strict" if defines["DCN_STRICT"] == "1" else ""
    return " ".join(
        [
            launch.kernel,
            f"{defines['DCN_T']}/{defines['DCN_P']}{products}",
            f"{geometry.in_channels}->{geometry.out_channels}",
            f"groups={geometry.groups},{geometry.offset_groups}",
            f"taps={geometry.taps}",
            f"positions=2^{round(math.log2(positions_of(geometry)))}",
        ]
    )


def _table() -> _Table:
    path = modules.cache_folder() / _FILE
    if path not in _read:
        _read[path] = _load(path)
    return _read[path]


def _load(path: Path) -> _Table:
    """Return what a file remembers; of one that is not as written here, nothing."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or not all(isinstance(kinds, dict) for kinds in found.values()):
        return {}
    return found


def _remember(device: str, kind: str, tile: str) -> None:
    """Add a choice to the file, beside what other processes have written there."""
    path = modules.cache_folder() / _FILE
    with _lock:
        table = _load(path)
        table.setdefault(device, {})[kind] = tile
        modules.replace_file(path, json.dumps(table, indent=1, sort_keys=True).encode())
        _read[path] = table
