"""The smallest region that keeps a node's features: where it is known, and on networks; hostile input."""

import itertools
import math
import sys
import types

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from dcn_np import analysis
from dcn_np.analysis import Node, error_bounded_saliency, of_layers
from dcn_np.analysis.saliency import _filled
from dcn_np.commands import demo_digits


class Support(analysis.NodeFunction):
    """Features that a matrix makes of the pixels of a region, the sum of the channels of each."""

    def __init__(self, region, mix=None):
        self.region, self.calls = region, 0
        self.mix = np.eye(region.sum()) if mix is None else mix

    def forward(self, image):
        self.calls += 1
        self.shape = image.shape
        return self.mix @ image.sum(axis=0)[self.region]

    def backward(self, grad_features):
        by_pixel = np.zeros(self.shape[1:])
        by_pixel[self.region] = self.mix.T @ grad_features
        return np.broadcast_to(by_pixel, self.shape)


def box(size, *slices):
    region = np.zeros(size, bool)
    region[slices] = True
    return region


REGIONS = {
    "1d": box((40,), slice(7, 19)),
    "2d": box((17, 23), slice(3, 7), slice(14, 20)),
    "2d, two pieces": box((20, 20), slice(0, 4), slice(0, 2)) | box((20, 20), slice(15, 17), slice(8, 14)),
    "3d": box((6, 8, 7), slice(1, 3), slice(4, 7), slice(0, 3)),
}


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_region_is_the_support_where_every_pixel_of_it_is_needed(region, channels):
    # Without one of n equal pixels the cosine is sqrt(1 - 1/n), beyond the bound.
    image = np.ones((channels, *region.shape))
    epsilon = 0.9 * (1 - math.sqrt(1 - 1 / region.sum()))
    of_node = Support(region)
    found = error_bounded_saliency(of_node.cosine_error(image), image, epsilon)
    np.testing.assert_array_equal(found.mask, region)
    assert found.error == pytest.approx(0, abs=1e-12)
    assert found.area == pytest.approx(region.mean(), rel=1e-15)
    np.testing.assert_array_equal(found.image, image * region)


def test_the_support_is_found_behind_a_mixture():
    rng, region = np.random.default_rng(0), REGIONS["2d"]
    mix = rng.normal(size=(30, region.sum()))
    image = rng.uniform(0.5, 1.5, (2, *region.shape))
    found = error_bounded_saliency(Support(region, mix).cosine_error(image), image, 1e-5)
    np.testing.assert_array_equal(found.mask, region)


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.3])
def test_of_equal_pixels_as_few_are_kept_as_the_bound_allows(epsilon):
    region = REGIONS["2d"]
    image = np.ones((1, *region.shape))
    found = error_bounded_saliency(Support(region).cosine_error(image), image, epsilon)
    fewest = math.ceil(region.sum() * (1 - epsilon) ** 2 - 1e-9)
    assert found.mask.sum() == fewest
    assert not (found.mask & ~region).any()
    assert found.error <= epsilon


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.3])
def test_of_unequal_pixels_hardly_more_are_kept_than_the_fewest(epsilon):
    rng, region = np.random.default_rng(1), box((17, 23), slice(1, 11), slice(3, 18))
    image = rng.exponential(size=(1, *region.shape))
    found = error_bounded_saliency(Support(region).cosine_error(image), image, epsilon)
    squares = np.sort(image[0][region] ** 2)[::-1]
    fewest = int(np.argmax(np.cumsum(squares) >= (1 - epsilon) ** 2 * squares.sum())) + 1
    assert fewest <= found.mask.sum() <= 1.1 * fewest
    assert found.error <= epsilon


def test_cells_are_kept_or_removed_as_a_whole():
    region = box((18, 21), slice(5, 11), slice(10, 20))
    image = np.ones((1, *region.shape))
    found = error_bounded_saliency(Support(region).cosine_error(image), image, 1e-4, cell=5)
    np.testing.assert_array_equal(found.mask, box((18, 21), slice(5, 15), slice(10, 20)))
    assert found.area == found.mask.mean()


@pytest.mark.parametrize(("size", "side"), [((32, 32), 1), ((33, 32), 2), ((3, 2000), 3), ((1100,), 2)])
def test_large_images_are_cut_into_few_cells(size, side):
    first = (0,) * len(size)

    def error_of(image):
        gradient = np.zeros_like(image)
        gradient[(0, *first)] = -1
        return 1 - image[(0, *first)], gradient

    found = error_bounded_saliency(error_of, np.ones((1, *size)))
    np.testing.assert_array_equal(found.mask, box(size, *[slice(0, side)] * len(size)))


# ---- what is put in place of what is removed


def test_fills():
    image = np.random.default_rng(2).normal(size=(2, 12, 16))
    assert not _filled(image, "zero").any()
    mean = image.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(_filled(image, "mean"), np.broadcast_to(mean, image.shape), rtol=1e-14)
    inside = gaussian_filter(np.ones((12, 16)), 2, mode="constant", truncate=20)
    blurred = [gaussian_filter(one, 2, mode="constant", truncate=20) / inside for one in image]
    np.testing.assert_allclose(_filled(image, "blur"), blurred, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fill", ["zero", "mean", "blur"])
def test_the_fill_stands_where_nothing_is_kept(fill):
    region, rng = REGIONS["2d"], np.random.default_rng(3)
    image = rng.uniform(0.5, 2, (2, *region.shape)).astype("float32")
    found = error_bounded_saliency(Support(region).cosine_error(image), image, 0.01, fill=fill)
    np.testing.assert_array_equal(found.image, np.where(found.mask, image, _filled(image, fill)))
    assert found.image.dtype == image.dtype
    assert found.error <= 0.01
    assert not (found.mask & ~region).any()


@pytest.mark.parametrize("fill", ["mean", "blur"])
def test_a_region_is_empty_where_the_fill_says_it_all(fill):
    image = np.ones((1, 9, 9))
    found = error_bounded_saliency(Support(np.ones((9, 9), bool)).cosine_error(image), image, fill=fill)
    assert (found.area, found.mask.any()) == (0, False)
    assert found.error == pytest.approx(0, abs=1e-12)


# ---- on trained networks


@pytest.fixture(scope="module")
def digits():
    """Nodes of the trained networks, each the most active of the last convolution, with their images."""
    if not demo_digits.is_here():
        pytest.skip("the examples folder is not here")
    told = demo_digits.TrainedDigits()

    def node(variant, number):
        stages = told.network(variant).stages()
        image = told.example["data"].as_input(told.digits.images[number : number + 1])[0]
        features = of_layers(stages, Node("conv4.relu")).forward(image)
        place = np.unravel_index(features.sum(axis=0).argmax(), features.shape[1:])
        return of_layers(stages, Node("conv4.relu", position=tuple(map(int, place)))), image

    return node


def test_the_error_of_fifty_nodes_is_within_the_bound(digits):
    for number in range(50):
        of_node, image = digits(("plain", "DCNv1", "DCNv2")[number % 3], number)
        found = error_bounded_saliency(of_node.cosine_error(image), image, relaxed_steps=10)
        a, b = of_node.forward(image).copy(), of_node.forward(found.image)
        cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert found.error == pytest.approx(1 - cosine, abs=1e-6)
        assert found.error <= 0.1
        assert 0 < found.area < 0.2


def test_no_pixel_of_the_region_can_go(digits):
    of_node, image = digits("DCNv2", 1)
    error_of = of_node.cosine_error(image)
    found = error_bounded_saliency(error_of, image, 0.02)
    for pixel in np.argwhere(found.mask):
        without = found.image.copy()
        without[(slice(None), *pixel)] = 0
        assert error_of(without)[0] > 0.02


def test_the_same_seed_gives_the_same_region(digits):
    of_node, image = digits("DCNv2", 2)
    first, again, other = (
        error_bounded_saliency(of_node.cosine_error(image), image, seed=seed) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first.mask, again.mask)
    np.testing.assert_array_equal(first.relaxed, again.relaxed)
    assert (first.error, first.steps) == (again.error, again.steps)
    assert (first.relaxed != other.relaxed).any()


def test_the_steps_tell_the_search(digits):
    of_node, image = digits("DCNv2", 3)
    error_of, calls = of_node.cosine_error(image), []

    def counted(other):
        calls.append(other)
        return error_of(other)

    found = error_bounded_saliency(counted, image, relaxed_steps=15)
    assert found.evaluations == len(calls)
    phases = [step.phase for step in found.steps]
    assert phases == sorted(phases, key=["relaxed", "thresholded", "removed"].index)
    assert phases.count("relaxed") == 15
    regions = [step for step in found.steps if step.phase != "relaxed"]
    assert all(step.error <= 0.1 for step in regions)
    assert [step.area for step in regions] == sorted((step.area for step in regions), reverse=True)
    assert (regions[-1].area, regions[-1].error) == (pytest.approx(found.area), found.error)
    relaxed = [step for step in found.steps if step.phase == "relaxed"]
    assert relaxed[0].area > 0.5 > relaxed[-1].area
    assert found.relaxed[found.mask].min() > found.relaxed.mean()


def test_a_bound_out_of_the_reach_of_relaxed_masks_overflows_nothing():
    image = np.ones((1, 3, 3))

    def error_of(other):
        return float((other != image).any()), np.zeros_like(image)

    found = error_bounded_saliency(error_of, image, relaxed_steps=8000)
    assert found.mask.all()
    assert np.isfinite(found.relaxed).all()


# ---- the progress bar


def saliency_with_a_bar():
    image = np.ones((1, 9, 9))
    of_node = Support(box((9, 9), slice(2, 4), slice(3, 6)))
    error_bounded_saliency(of_node.cosine_error(image), image, relaxed_steps=7, progress=True)


def test_a_progress_bar_moves_to_its_end(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **given):
            self.n, self.total, self.given = 0, None, given
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self):
            self.n += 1
            assert self.n <= self.total

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    saliency_with_a_bar()
    assert len(bars) == 1
    assert bars[0].n > 7


def test_without_tqdm_there_is_no_bar(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    saliency_with_a_bar()
    assert capsys.readouterr() == ("", "")


# ---- hostile input


IMAGE = np.ones((1, 6, 6))


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"epsilon": 0}, ValueError, r"epsilon is 0 \(int\); wanted a number above 0"),
        ({"epsilon": -0.1}, ValueError, r"epsilon is -0.1 \(float\); wanted a number above 0"),
        ({"epsilon": np.nan}, ValueError, "epsilon is nan"),
        ({"epsilon": np.inf}, ValueError, "epsilon is inf"),
        ({"epsilon": "0.1"}, TypeError, "epsilon is '0.1'; wanted a number above 0"),
        ({"epsilon": True}, TypeError, "epsilon is True"),
        ({"fill": "grey"}, ValueError, "fill is 'grey'; wanted one of 'zero', 'mean', 'blur'"),
        ({"cell": 0}, ValueError, "cell is 0; wanted at least 1"),
        ({"cell": 1.5}, TypeError, "cell is 1.5"),
        ({"relaxed_steps": 0}, ValueError, "relaxed_steps is 0; wanted at least 1"),
        ({"image": IMAGE * np.nan}, ValueError, "image holds 36 numbers that are NaN or infinite"),
        ({"image": IMAGE.astype(int)}, TypeError, "image has dtype int64"),
        ({"image": IMAGE[0, 0]}, ValueError, "image has 1 axis"),
        ({"image": [[1.0]]}, TypeError, "image is "),
    ],
)
def test_hostile_arguments_are_refused(given, kind, message):
    error_of = Support(np.ones((6, 6), bool)).cosine_error(IMAGE)
    with pytest.raises(kind, match=message):
        error_bounded_saliency(error_of, **({"image": IMAGE} | given))


def test_an_error_of_another_image_is_refused():
    of_node = Support(np.ones((6, 6), bool))
    other = np.random.default_rng(0).normal(size=(1, 6, 6))
    with pytest.raises(ValueError, match=r"error_and_grad gives .* for the whole image; wanted at most"):
        error_bounded_saliency(of_node.cosine_error(other), IMAGE)


def test_an_error_that_changes_its_mind_is_refused():
    calls = itertools.count()

    def error_of(image):
        return (0.0 if next(calls) < 52 else 1.0), np.zeros_like(image)

    with pytest.raises(ValueError, match="wanted a function that always gives the same"):
        error_bounded_saliency(error_of, IMAGE, relaxed_steps=50)


def test_gradients_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="value_and_grad returned what is NaN or infinite"):
        error_bounded_saliency(lambda image: (0.0, image * np.inf), IMAGE)
