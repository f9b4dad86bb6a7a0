"""Tiles over dask arrays give the bits of one call; a halo that is too small is an error."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import problems

import dcn_np
from dcn_np.tiling import Axis, checked_halo, place, required_halo

da = pytest.importorskip("dask.array")
tiled = pytest.importorskip("dcn_np.dask")


@pytest.fixture(autouse=True)
def synchronous():
    import dask

    with dask.config.set(scheduler="synchronous"):
        yield


def halo_of(problem):
    if problem.offset is None:
        return 0
    return required_halo(problem.offset, problem.weight.shape[2:], *problem.parameters[:3])


def chunked(array, cuts):
    """A dask array with chunk borders near these fractions of each axis."""
    if array is None:
        return None
    chunks = []
    for extent, fractions in itertools.zip_longest(array.shape, cuts[: array.ndim], fillvalue=()):
        borders = sorted({0, extent, *(round(fraction * extent) for fraction in fractions)})
        chunks.append(tuple(np.diff(borders).tolist()) or (0,))
    return da.from_array(array, chunks=tuple(chunks))


def forward_in_tiles(problem, halo, x_cuts, tile_cuts):
    x, offset, mask = (
        chunked(problem.x, x_cuts),
        chunked(problem.offset, tile_cuts),
        chunked(problem.mask, tile_cuts),
    )
    return tiled.modulated_deform_conv(
        x, offset, mask, problem.weight, problem.bias, *problem.parameters, halo=halo
    )


cuts = st.lists(st.lists(st.floats(0.1, 0.9), max_size=3).map(tuple), min_size=5, max_size=5)


@given(problem=problems(non_finite=False), x_cuts=cuts, tile_cuts=cuts)
def test_tiles_give_the_bits_of_the_whole(problem, x_cuts, tile_cuts):
    y = forward_in_tiles(problem, halo_of(problem), x_cuts, tile_cuts)
    wanted = problem.forward(dcn_np, modulated=True)
    assert (y.shape, y.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(y.compute(), wanted)
