"""The scenes of the detector example, without torch: exact boxes and masks, the same from the same seed."""

import numpy as np
import pytest
from examples_here import examples

data, digits_data, digits_runs = examples("detector.data", "digits.data", "digits.runs")


@pytest.fixture(scope="module")
def material():
    """Smooth colours in two sizes, and some of the digits that the digits example stores."""
    y, x = np.indices((240, 300)) / 300
    photograph = (255 * np.stack([x, y, (1 + np.sin(9 * x * y)) / 2], axis=-1)).astype(np.uint8)
    digits = digits_data.Digits(*(array[:60] for array in digits_runs.read_weights()[2]))
    return data.Material(data.sizes_of(photograph), data.smoothed(digits.images), digits.labels)


@pytest.fixture(scope="module")
def scenes(material):
    return data.scenes(material, [3], 60)


def test_boxes_are_the_bounds_of_masks(scenes):
    for scene in scenes:
        assert len(scene.boxes) == len(scene.labels) == len(scene.masks)
        for (left, top, right, bottom), mask in zip(scene.boxes, scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert (left, right) == (columns.min(), columns.max() + 1)
            assert (top, bottom) == (rows.min(), rows.max() + 1)


def test_boxes_do_not_overlap(scenes):
    for scene in scenes:
        covered = np.zeros((data.CANVAS, data.CANVAS), int)
        for left, top, right, bottom in scene.boxes.astype(int):
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


def test_scenes_are_varied(scenes):
    counts = [len(scene.labels) for scene in scenes]
    assert data.COUNTS[0] <= min(counts)
    assert max(counts) == data.COUNTS[1]
    heights = np.concatenate([scene.boxes[:, 3] - scene.boxes[:, 1] for scene in scenes])
    assert np.quantile(heights, 0.95) > 2.5 * np.quantile(heights, 0.05)
    assert set(np.concatenate([scene.labels for scene in scenes])) == set(range(10))


def test_scenes_are_drawn_from_their_seed(material, scenes):
    again, other = (data.scenes(material, [seed], 2) for seed in (3, 4))
    for first, second, third in zip(scenes, again, other, strict=False):
        for mine, same in zip(first, second, strict=True):
            np.testing.assert_array_equal(mine, same)
        assert (first.image != third.image).any()


def test_a_digit_is_painted_where_its_mask_is(material):
    rng = np.random.default_rng(0)
    image = data.background(material.photographs, rng)
    before, alpha = image.copy(), data.drawn(material.digits[0], rng)
    mask = data.paste(image, alpha, (10, 20), rng)
    np.testing.assert_array_equal(mask[10 : 10 + alpha.shape[0], 20 : 20 + alpha.shape[1]], alpha >= 0.5)
    assert mask.sum() == (alpha >= 0.5).sum()
    changed = np.abs(image - before).max(axis=-1) > 0
    assert changed[mask].all()
    # Beyond its mask a digit only fades out: within the smoothed edge of its opacity.
    np.testing.assert_array_equal(changed[10 : 10 + alpha.shape[0], 20 : 20 + alpha.shape[1]], alpha > 0)
    assert changed.sum() == (alpha > 0).sum()
    colour, behind = image[mask].mean(axis=0), before[mask].mean(axis=0)
    assert np.linalg.norm(colour - behind) > data.CONTRAST / 4


def test_an_upright_digit_is_the_original_enlarged(material, monkeypatch):
    monkeypatch.setattr(data, "DEGREES", 0.0)
    monkeypatch.setattr(data, "HEIGHTS", (data.FINER * data.SIDE,) * 2)
    original, (clear, opaque) = material.digits[0], data.EDGE
    # Both grids have an even number of pixels along a side, so that they lie on each other.
    wanted = np.clip((original - clear) / (opaque - clear), 0, 1)
    rows, columns = (np.flatnonzero((wanted >= 0.5).any(axis=axis)) for axis in (1, 0))
    wanted = wanted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    np.testing.assert_allclose(data.drawn(original, np.random.default_rng(0)), wanted, atol=1e-9)


def test_a_full_canvas_has_no_place():
    rng, side = np.random.default_rng(0), data.CANVAS
    assert data.free_place((side, side), [], rng) == (0, 0)
    assert data.free_place((2, 2), [[0, 0, side, side]], rng) is None
    top, left = data.free_place((side // 2, side), [[0, 0, side, side // 2]], rng)
    assert (top, left) == (side // 2, 0)


def test_photographs_are_halved_while_a_scene_fits():
    grey = np.arange(500 * 460, dtype=np.uint32).reshape(500, 460).astype(np.uint8)
    found = data.sizes_of(grey)
    assert [image.shape for image in found] == [(500, 460, 3), (250, 230, 3), (125, 115, 3)]
    np.testing.assert_array_equal(found[0][..., 1], grey)
    quarter = grey[:2, :2].astype(float).mean()
    np.testing.assert_array_equal(found[1][0, 0], np.full(3, np.rint(quarter)))


def test_no_photograph_is_in_both_sets():
    pytest.importorskip("skimage")
    assert not set(data.TRAINING_PHOTOGRAPHS) & set(data.TEST_PHOTOGRAPHS)
    found = [
        {data.photograph(name).tobytes() for name in names}
        for names in (data.TRAINING_PHOTOGRAPHS, data.TEST_PHOTOGRAPHS)
    ]
    assert [len(several) for several in found] == [8, 5]
    assert not found[0] & found[1]


def test_input_is_planes_from_minus_one_to_one(scenes):
    x = data.as_input(scenes[:2])
    assert (x.shape, x.dtype) == ((2, 3, data.CANVAS, data.CANVAS), np.float32)
    np.testing.assert_allclose(x[1, 2], scenes[1].image[..., 2] / 127.5 - 1, atol=1e-6)
