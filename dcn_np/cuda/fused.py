"""When the fused kernels can compute a call, with which tiles, and how much shared memory they need.

A choice of tiles never changes a bit of a result: the order of every sum depends on the problem alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..geometry import Geometry
from .launching import positions_of
from .modules import HALVES, TYPES, Module

LEAST_ARCHITECTURE = 80

# Bytes of the channels of one step, the largest that divides comes first: it decides the order of sums.
ROWS = (128, 64)

# What a block's shared memory may hold, by compute capability; less elsewhere.
_SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
_SHARED_ELSEWHERE = 99

_CHUNK = 16
_BYTES_PER_SAMPLE = 20
_RESULT_PITCH = 65
# The place of a pixel in a table of samples has 28 bits with its sign, and counts chunks.
_MOST_CHUNKS = 2**27
# With fewer outputs per group most of a tile would be empty.
_LEAST_OUTPUTS = 32
_MOST_GRID_ROWS = 65535


@dataclass(frozen=True)
class Tile:
    """The work of one block.

    Attributes
    ----------
    positions, outputs : int
        Extents of the tile.
    warp_positions, warp_outputs : int
        Those of one warp's part.
    stages : int
        Tiles of weights in shared memory.
    speed : float
        Products per time relative to the fastest tile, predicted from the shared memory traffic.
    """

    positions: int
    outputs: int
    warp_positions: int
    warp_outputs: int
    stages: int
    speed: float

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.positions // self.warp_positions * (self.outputs // self.warp_outputs) * 32


# By how factors are multiplied. Strict sums of float32 take twice the registers.
TILES = {
    "half": (
        Tile(128, 256, 64, 64, 3, 1.0),
        Tile(128, 128, 64, 32, 3, 0.85),
        Tile(64, 128, 32, 32, 3, 0.7),
    ),
    "tf32": (Tile(128, 128, 64, 32, 3, 1.0), Tile(64, 64, 32, 16, 3, 0.6)),
    "strict": (Tile(128, 64, 32, 32, 3, 1.0), Tile(64, 64, 32, 16, 3, 0.8)),
}


@dataclass(frozen=True)
class Launch:
    """A fused kernel for one call."""

    module: Module
    tile: Tile
    row: int
    shared: int


def products_of(dtype: Any, float32_matmul: str) -> str:
    """Return the key of TILES for a dtype."""
    return "half" if str(dtype) in HALVES else float32_matmul


@cache
def forward_module(dtype: str, position_dtype: str, products: str, row: int, tile: Tile) -> Module:
    """Return the fused forward kernel with these tiles."""
    defines = {
        "DCN_T": TYPES[dtype],
        "DCN_P": TYPES[position_dtype],
        "DCN_STRICT": str(int(products == "strict")),
        "DCN_ROW": str(row),
        "DCN_BM": str(tile.positions),
        "DCN_BN": str(tile.outputs),
        "DCN_WM": str(tile.warp_positions),
        "DCN_WN": str(tile.warp_outputs),
        "DCN_STAGES": str(tile.stages),
    }
    return Module("fused_forward.cu", tuple(defines.items()), LEAST_ARCHITECTURE)


def every_module() -> Iterator[Module]:
    """Yield all that a call can ask for."""
    for dtype in TYPES:
        if dtype == "float64":
            continue
        for position_dtype in (dtype, "float32") if dtype in HALVES else (dtype,):
            for products in ("half",) if dtype in HALVES else ("tf32", "strict"):
                for row in ROWS:
                    for tile in TILES[products]:
                        yield forward_module(dtype, position_dtype, products, row, tile)


def forward_shared(tile: Tile, row: int, taps: int) -> int:
    """Return the bytes of shared memory of the fused forward kernel."""
    tiles = (2 * tile.positions + tile.stages * tile.outputs) * row
    results = tile.positions * (_RESULT_PITCH * 4 + 8)
    return max(tiles + taps * tile.positions * _BYTES_PER_SAMPLE, results)


def forward_launches(geometry: Geometry, float32_matmul: str, architecture: int) -> list[Launch]:
    """Return every way to compute a forward pass, none where the fused kernel does not apply."""
    row = _row_of(geometry, architecture)
    outputs = geometry.out_channels // geometry.groups
    if row is None or outputs < _LEAST_OUTPUTS:
        return []
    products = products_of(geometry.dtype, float32_matmul)
    dtypes = str(geometry.dtype), str(geometry.position_dtype)
    launches = []
    for tile in TILES[products]:
        shared = forward_shared(tile, row, geometry.taps)
        rows = geometry.groups * -(-outputs // tile.outputs)
        if shared <= _shared_limit(architecture) and rows <= _MOST_GRID_ROWS and _fits(geometry, tile):
            launches.append(Launch(forward_module(*dtypes, products, row, tile), tile, row, shared))
    return launches


def chosen(geometry: Geometry, launches: list[Launch], multiprocessors: int) -> Launch:
    """Return the one with the least predicted time: whole rounds of blocks on all multiprocessors."""

    def predicted(launch: Launch) -> float:
        tile = launch.tile
        blocks = -(-positions_of(geometry) // tile.positions) * grid_rows(geometry, tile)
        return -(-blocks // multiprocessors) * tile.positions * tile.outputs / tile.speed

    return min(launches, key=predicted)


def grid_rows(geometry: Geometry, tile: Tile) -> int:
    """Return the blocks that share positions: output tiles of all groups."""
    return geometry.groups * -(-(geometry.out_channels // geometry.groups) // tile.outputs)


def _row_of(geometry: Geometry, architecture: int) -> int | None:
    """Return the bytes of the channels of one step, or None where no step would be whole."""
    if geometry.ndim != 2 or architecture < LEAST_ARCHITECTURE or geometry.dtype.itemsize > 4:
        return None
    if not geometry.in_channels:
        return None
    blocks = [geometry.in_channels // count for count in (geometry.groups, geometry.offset_groups)]
    for row in ROWS:
        if all(channels * geometry.dtype.itemsize % row == 0 for channels in blocks):
            return row
    return None


def _fits(geometry: Geometry, tile: Tile) -> bool:
    """Tell whether the images of one tile of positions lie within the reach of a table of samples.

    Images are taken to be without gaps: where they are not, the caller copies them.
    """
    per_image = geometry.output[0] * geometry.output[1]
    images = min(geometry.batch, (tile.positions - 2) // per_image + 2)
    pixels = (images + 1) * (geometry.input[0] + 2) * (geometry.input[1] + 2)
    return pixels * geometry.in_channels * geometry.dtype.itemsize // _CHUNK < _MOST_CHUNKS


def _shared_limit(architecture: int) -> int:
    return _SHARED.get(architecture, _SHARED_ELSEWHERE) * 1024
