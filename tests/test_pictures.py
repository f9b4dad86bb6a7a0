"""Do the pictures of dcn_np.analysis.plot look as those that are stored? tests/drawings.py draws both.

Versions of matplotlib write letters differently, which moves axes by a few pixels. What lies inside the axes
is compared after averaging over cells, with bounds between what 3.8 to 3.11 differ by and the faults below.
"""

import numpy as np
import pytest

pytest.importorskip("matplotlib")
import drawings

from dcn_np.analysis import plot

if not drawings.STORED.is_dir():
    pytest.skip("the stored pictures are not here", allow_module_level=True)

MOST_MOVED = 6  # pixels, of the borders of axes
MOST = 3.2  # grey levels
WIDER = {"show_image": 5, "sheet_of_regions": 4.5}


def alike(name):
    """Whether a picture is as the stored one, and how far it is apart."""
    picture, wanted = drawings.drawn(drawings.PICTURES[name]), drawings.stored(name)
    moved = drawings.moved(picture, wanted)
    if moved > MOST_MOVED:
        return False, moved
    apart = max(drawings.differences(picture, wanted))
    return apart <= WIDER.get(name, MOST), apart


@pytest.mark.parametrize("name", drawings.PICTURES)
def test_a_picture_looks_as_the_stored_one(name):
    same, apart = alike(name)
    assert same, f"{name} is {apart:.1f} apart: if that is meant, python tests/drawings.py draws it anew"


def test_every_public_function_that_draws_has_a_picture():
    shown = {name for name in plot.__all__ if not name.startswith("new_")}
    assert shown <= set(drawings.PICTURES)
    assert {path.stem for path in drawings.STORED.glob("*.png")} == set(drawings.PICTURES)


def test_the_stored_pictures_are_small():
    assert sum(path.stat().st_size for path in drawings.STORED.iterdir()) < 300_000


def test_the_users_style_does_not_matter(monkeypatch):
    import matplotlib

    changed = {"font.family": "serif", "axes.facecolor": "black", "font.size": 20, "image.origin": "lower"}
    with matplotlib.rc_context(changed):
        assert alike("sampling_points")[0]


POINTS = "sampling_points", "sampling_points_without_strength", "sheet"
FIELDS = "receptive_field", "sheet"
REGIONS = "salient_region", "sheet"
BOXES = "outlined_box", "sheet_of_regions"
IMAGES = "show_image", "show_image_pale", "sheet"
drawn = {name: getattr(plot, name) for name in plot.__all__}

# What goes wrong, in which function, what it does then, and the pictures that show it.
FAULTS = {
    "points shifted": (
        "sampling_points",
        lambda axes, points, *rest, **named: drawn["sampling_points"](
            axes, np.add(points, (0, 1)), *rest, **named
        ),
        POINTS,
    ),
    "points with axes swapped": (
        "sampling_points",
        lambda axes, points, *rest, **named: drawn["sampling_points"](
            axes, np.asarray(points)[:, ::-1], *rest, **named
        ),
        POINTS,
    ),
    "points all as large": (
        "sampling_points",
        lambda axes, points, modulation, *rest, **named: drawn["sampling_points"](
            axes, points, None, *rest, **named
        ),
        ["sampling_points"],
    ),
    "points of one colour": (
        "sampling_points",
        lambda axes, points, modulation, strength=None, **named: drawn["sampling_points"](
            axes, points, modulation, **named
        ),
        ["sampling_points"],
    ),
    "field shifted": (
        "receptive_field",
        lambda axes, field: drawn["receptive_field"](axes, np.roll(field, 1, axis=1)),
        FIELDS,
    ),
    "field upside down": (
        "receptive_field",
        lambda axes, field: drawn["receptive_field"](axes, np.flipud(field)),
        FIELDS,
    ),
    "region shifted": (
        "salient_region",
        lambda axes, mask: drawn["salient_region"](axes, np.roll(mask, 1, axis=0)),
        REGIONS,
    ),
    "region inside out": ("salient_region", lambda axes, mask: drawn["salient_region"](axes, ~mask), REGIONS),
    "region without outline": ("_edges", lambda mask: np.zeros((0, 2, 2)), REGIONS),
    "box shifted": (
        "outlined_box",
        lambda axes, box: drawn["outlined_box"](axes, np.add(box, (0, 1, 0, 1))),
        BOXES,
    ),
    "box with axes swapped": (
        "outlined_box",
        lambda axes, box: drawn["outlined_box"](axes, np.take(box, (1, 0, 3, 2))),
        BOXES,
    ),
    "image shifted": (
        "show_image",
        lambda axes, image, **named: drawn["show_image"](axes, np.roll(image, 1, axis=2), **named),
        IMAGES,
    ),
    "image upside down": (
        "show_image",
        lambda axes, image, **named: drawn["show_image"](axes, image[:, ::-1], **named),
        IMAGES,
    ),
    "image not around": (
        "show_image",
        lambda axes, image, around=0, **named: drawn["show_image"](axes, image, **named),
        ["show_image", "sheet"],
    ),
    "axes without labels": ("label_pixels", lambda axes: axes, ["label_pixels", *IMAGES]),
    "strengths in other colours": ("STRENGTHS", "plasma", ["sheet"]),
    "fields in other colours": ("FIELDS", "viridis", FIELDS),
}


@pytest.mark.parametrize(("fault", "name"), [(fault, name) for fault in FAULTS for name in FAULTS[fault][2]])
def test_a_fault_is_seen(fault, name, monkeypatch):
    part, wrong, _ = FAULTS[fault]
    monkeypatch.setattr(plot, part, wrong)
    same, apart = alike(name)
    assert not same, f"only {apart:.2f} apart"
