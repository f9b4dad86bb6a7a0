"""When the fused kernels can compute a call, with which tiles, and how much shared memory they need.

A choice of tiles never changes a bit of a result: the order of every sum depends on the problem alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from ..geometry import Geometry
from .launching import Device, Launch, positions_of
from .modules import HALVES, TYPES, Module

LEAST_ARCHITECTURE = 80

# Bytes of the channels of one step, the largest that divides comes first: it decides the order of sums.
_ROWS = (128, 64)
# Where no border of channels has to be met.
_WHOLE_ROW = _ROWS[0]

# As in the kernels: bytes of a chunk, of a sample in a table, of its corners and dots; floats in a row of
# results and beyond a row of columns; samples in the tables of fused_weights.cu, and
# those looked up at a time.
_CHUNK = 16
_SAMPLE, _CORNERS, _DOTS = 20, 80, 16
_RESULT_PITCH, _COLUMN_PADDING = 65, 8
_TABLES, _TABLE = 512, 256
# The place of a pixel in a table of samples has 28 bits with its sign, and counts chunks.
_MOST_CHUNKS = 2**27

# With fewer outputs or channels per group most of a tile would be empty.
_LEAST_IN_TILE = 32


@dataclass(frozen=True)
class Tile:
    """The product that one block computes at a time.

    Attributes
    ----------
    rows, columns : int
        Extents of the tile.
    warp_rows, warp_columns : int
        Those of one warp's part.
    stages : int
        Steps whose factors are in shared memory or under way.
    speed : float
        Products per time relative to the fastest tile, predicted from the shared memory traffic.
    """

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    stages: int
    speed: float

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.rows // self.warp_rows * (self.columns // self.warp_columns) * 32


_LARGE = Tile(128, 256, 64, 64, 3, 1.0)
_MIDDLE = Tile(128, 128, 64, 32, 3, 0.85)
_WIDE = Tile(64, 128, 32, 32, 3, 0.7)
_LONG = Tile(128, 64, 32, 32, 3, 0.7)
_SMALL = Tile(64, 64, 32, 16, 3, 0.6)

# By kernel and by how factors are multiplied: what registers and shared memory have room for. Each source has
# one kernel, of its name.
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "fused_forward": {
        "half": (_LARGE, _MIDDLE, _WIDE),
        "tf32": (_LARGE, _MIDDLE, _SMALL),
        "strict": (_LONG, _SMALL),
    },
    "fused_positions": {
        "half": (_MIDDLE, _WIDE),
        "tf32": (_MIDDLE, _SMALL),
        "strict": (_LONG, _SMALL),
    },
    "fused_weights": {
        "half": (_MIDDLE, _WIDE),
        "tf32": (_MIDDLE, _SMALL),
        "strict": (_LONG, _SMALL),
    },
}


@cache
def module(kernel: str, dtype: str, position_dtype: str, products: str, row: int, tile: Tile) -> Module:
    """Return one of the fused kernels; `products` as in TILES, `row` in bytes."""
    defines = {
        "DCN_T": TYPES[dtype],
        "DCN_P": TYPES[position_dtype],
        "DCN_STRICT": str(int(products == "strict")),
        "DCN_ROW": str(row),
        "DCN_BM": str(tile.rows),
        "DCN_BN": str(tile.columns),
        "DCN_WM": str(tile.warp_rows),
        "DCN_WN": str(tile.warp_columns),
        "DCN_STAGES": str(tile.stages),
    }
    return Module(f"{kernel}.cu", tuple(defines.items()), LEAST_ARCHITECTURE)


def every_module() -> Iterator[Module]:
    """Yield all that a call can ask for."""
    for dtype in TYPES:
        if dtype == "float64":
            continue
        for position_dtype in (dtype, "float32") if dtype in HALVES else (dtype,):
            for products in ("half",) if dtype in HALVES else ("tf32", "strict"):
                for kernel, tiles in TILES.items():
                    for row in (_WHOLE_ROW,) if kernel == "fused_weights" else _ROWS:
                        for tile in tiles[products]:
                            yield module(kernel, dtype, position_dtype, products, row, tile)


def forward_launches(geometry: Geometry, float32_matmul: str, device: Device) -> list[Launch]:
    """Return every way to compute y, none where the fused kernel does not apply."""
    row = _row_of(geometry)
    outputs = geometry.out_channels // geometry.groups
    if row is None or outputs < _LEAST_IN_TILE:
        return []

    def shared(tile: Tile) -> int:
        factors = (2 * tile.rows + tile.stages * tile.columns) * row
        return max(factors + geometry.taps * tile.rows * _SAMPLE, tile.rows * (_RESULT_PITCH * 4 + 8))

    def blocks(tile: Tile) -> int:
        return geometry.groups * -(-outputs // tile.columns)

    candidates = _Candidates(geometry, float32_matmul, device)
    return list(candidates.launches("fused_forward", row, shared, blocks))


def positions_launches(geometry: Geometry, float32_matmul: str, device: Device) -> list[Launch]:
    """Return every way to compute the gradients of x, offset and mask; none as above."""
    row = _row_of(geometry)
    channels = geometry.in_channels // geometry.groups
    if row is None or channels < _LEAST_IN_TILE or not _outputs_are_whole(geometry):
        return []

    def shared(tile: Tile) -> int:
        columns = tile.rows * (row // geometry.dtype.itemsize + _COLUMN_PADDING) * 4
        return tile.stages * (tile.rows + tile.columns) * row + columns + tile.rows * (_CORNERS + _DOTS)

    candidates = _Candidates(geometry, float32_matmul, device)
    return list(
        candidates.launches(
            "fused_positions",
            row,
            shared,
            lambda tile: geometry.taps,
            lambda tile: geometry.groups * -(-channels // tile.columns),
        )
    )


def weights_launches(geometry: Geometry, float32_matmul: str, device: Device, parts: int) -> list[Launch]:
    """Return every way to compute the gradient of the weights in `parts` parts; none as above."""
    outputs = geometry.out_channels // geometry.groups
    run = math.gcd(geometry.in_channels // geometry.groups, geometry.in_channels // geometry.offset_groups)
    if _row_of(geometry) is None or not _outputs_are_whole(geometry) or outputs < _LEAST_IN_TILE:
        return []

    def shared(tile: Tile) -> int:
        positions = _WHOLE_ROW // geometry.dtype.itemsize
        numbers = positions * (tile.stages * tile.rows + 2 * tile.columns)
        return numbers * geometry.dtype.itemsize + _TABLES * _SAMPLE

    def blocks(tile: Tile) -> int:
        tiles = geometry.in_channels // run * -(-run // tile.columns) * -(-outputs // tile.rows)
        return tiles * geometry.taps * parts

    candidates = _Candidates(geometry, float32_matmul, device)
    positions = positions_of(geometry)
    return list(candidates.launches("fused_weights", _WHOLE_ROW, shared, blocks, positions=positions))


class _Candidates:
    """All tiles for one problem on one device."""

    def __init__(self, geometry: Geometry, float32_matmul: str, device: Device) -> None:
        self.geometry = geometry
        self.products = "half" if str(geometry.dtype) in HALVES else float32_matmul
        self.device = device

    def launches(
        self,
        kernel: str,
        row: int,
        shared: Callable[[Tile], int],
        blocks: Callable[[Tile], int],
        tiles_per_block: Callable[[Tile], int] = lambda tile: 1,
        positions: int | None = None,
    ) -> Iterator[Launch]:
        """Yield a launch for every tile; a block works on tile.rows positions, or the given number."""
        dtypes = str(self.geometry.dtype), str(self.geometry.position_dtype)
        if self.device.architecture < LEAST_ARCHITECTURE:
            return
        for tile in TILES[kernel][self.products]:
            reach = tile.rows if positions is None else _TABLE
            if shared(tile) > self.device.most_shared or not self._fits(reach):
                continue
            yield Launch(
                module(kernel, *dtypes, self.products, row, tile),
                kernel,
                blocks(tile),
                tile.rows if positions is None else positions,
                tile.threads,
                shared(tile),
                f"{tile.rows}x{tile.columns}",
                tiles_per_block(tile) * tile.rows * tile.columns / tile.speed,
            )

    def _fits(self, positions: int) -> bool:
        """Tell whether the images that so many positions lie in are within the reach of a table of samples.

        Images are taken to be without gaps: where they are not, the caller copies them.
        """
        geometry = self.geometry
        per_image = geometry.output[0] * geometry.output[1]
        images = min(geometry.batch, (positions - 2) // per_image + 2)
        pixels = (images + 1) * (geometry.input[0] + 2) * (geometry.input[1] + 2)
        return pixels * geometry.in_channels * geometry.dtype.itemsize // _CHUNK < _MOST_CHUNKS


def _row_of(geometry: Geometry) -> int | None:
    """Return the bytes of the channels of one step, or None where no step would be whole."""
    if geometry.ndim != 2 or geometry.dtype.itemsize > 4 or not geometry.in_channels:
        return None
    blocks = [geometry.in_channels // count for count in (geometry.groups, geometry.offset_groups)]
    for row in _ROWS:
        if all(channels * geometry.dtype.itemsize % row == 0 for channels in blocks):
            return row
    return None


def _outputs_are_whole(geometry: Geometry) -> bool:
    """Tell whether the outputs of a group are whole chunks, of which there are some."""
    size = geometry.out_channels // geometry.groups * geometry.dtype.itemsize
    return size > 0 and size % _CHUNK == 0
