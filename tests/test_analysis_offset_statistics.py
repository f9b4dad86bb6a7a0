"""The statistics of offsets and masks, against loops over samples; and the table of text."""

import itertools
import math

import numpy as np
import pytest

from dcn_np.analysis import Node, SampledLayer, of_layers, offset_statistics, offset_table, sampling_positions
from dcn_np.layers import Conv2d, ModulatedDeformConv2d


def random_layer(ndim, seed=0, *, mask=True, scale=1.0):
    rng = np.random.default_rng(seed)
    size, kernel = (7, 6, 5)[:ndim], (3, 2, 2)[:ndim]
    output = tuple((e + 2 - (k - 1) - 1) // 2 + 1 for e, k in zip(size, kernel, strict=True))
    taps = 2 * math.prod(kernel)
    return SampledLayer(
        size, kernel, 2, 1, offset=rng.normal(0, 2, (2, taps * ndim, *output)),
        mask=rng.random((2, taps, *output)) if mask else None, offset_groups=2, scale=scale,
    )  # fmt: skip


def by_loops(layer):
    """Lengths, lengths in the image, distances of neighbours, and how many samples are outside."""
    geometry = layer.geometry
    positions = sampling_positions(layer.offset, layer.kernel_size, 2, 1, 1, 2)
    offset = layer.offset.reshape(positions.shape)
    scale = np.broadcast_to(layer.scale, geometry.ndim)
    lengths, in_image, distances, outside = [], [], [], 0
    taps = list(np.ndindex(*geometry.kernel))
    for image, group, place in itertools.product(range(2), range(2), np.ndindex(*geometry.output)):
        of_tap = {tap: (image, group, number, slice(None), *place) for number, tap in enumerate(taps)}
        for tap, index in of_tap.items():
            lengths.append(math.hypot(*offset[index]))
            in_image.append(math.hypot(*(scale * offset[index])))
            read = positions[index]
            outside += any(not -1 < q < extent for q, extent in zip(read, geometry.input, strict=True))
            for axis in range(geometry.ndim):
                next_tap = tuple(t + (a == axis) for a, t in enumerate(tap))
                if next_tap in of_tap:
                    distances.append(math.dist(read, positions[of_tap[next_tap]]))
    return np.array(lengths), np.array(in_image), np.array(distances), outside


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_statistics_are_those_of_loops_over_samples(ndim):
    layer = random_layer(ndim, scale=(4.0, 2.0, 3.0)[:ndim])
    (record,) = offset_statistics({"conv": layer}, threshold=0.2)
    lengths, in_image, distances, outside = by_loops(layer)
    assert (record.name, record.layers, record.samples) == ("conv", 1, lengths.size)
    found = (record.mean, record.median, record.percentile_95, record.largest)
    wanted = (lengths.mean(), np.median(lengths), np.percentile(lengths, 95), lengths.max())
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert record.in_image == pytest.approx(in_image.mean(), rel=1e-12)
    assert record.dilation == pytest.approx(distances.mean(), rel=1e-12)
    assert record.outside == outside / lengths.size > 0.05
    assert record.not_finite == 0
    assert record.mask_mean == pytest.approx(layer.mask.mean(), rel=1e-12)
    assert record.near_zero == pytest.approx((layer.mask < 0.2).mean())


def test_a_stage_is_all_samples_of_its_layers():
    layers = {f"layer2.{number}.conv2": random_layer(2, number, scale=number + 1) for number in range(3)}
    layers |= {"layer2.0.conv1": SampledLayer((7, 6), 1), "conv5": random_layer(2, 9, mask=False)}
    records = {record.name: record for record in offset_statistics(layers)}
    assert list(records) == [*(f"layer2.{number}.conv2" for number in range(3)), "conv5", "layer2"]
    stage = records["layer2"]
    found = [by_loops(layers[f"layer2.{number}.conv2"]) for number in range(3)]
    lengths, in_image, distances, outside = (
        np.concatenate([np.atleast_1d(each) for each in column]) for column in zip(*found, strict=True)
    )
    assert (stage.layers, stage.samples) == (3, lengths.size)
    assert stage.median == pytest.approx(np.median(lengths))
    assert stage.in_image == pytest.approx(in_image.mean())
    assert stage.dilation == pytest.approx(distances.mean())
    assert stage.outside == pytest.approx(outside.sum() / lengths.size)
    assert (records["conv5"].mask_mean, records["conv5"].near_zero) == (None, None)


def test_stages_can_be_named():
    layers = {"a.x": random_layer(1), "b.x": random_layer(1, 1), "c": random_layer(1, 2)}
    records = offset_statistics(layers, stages={"a.x": "first", "c": "first"})
    assert [(record.name, record.layers) for record in records] == [
        ("a.x", 1), ("b.x", 1), ("c", 1), ("first", 2),
    ]  # fmt: skip


def test_the_rigid_grid_has_its_dilation():
    layer = SampledLayer((20, 20), 3, 1, 2, 2, offset=np.zeros((1, 18, 20, 20)))
    (record,) = offset_statistics({0: layer})
    assert (record.name, record.largest, record.dilation, record.near_zero) == ("0", 0, 2, None)
    # Along an axis the first and the last of three taps are outside at two of 20 positions each.
    assert record.outside == pytest.approx(1 - (56 / 60) ** 2)
    masked = SampledLayer((20, 20), 3, 1, 1, mask=np.zeros((1, 9, 20, 20)))
    assert offset_statistics({"m": masked})[0].near_zero == 1


def test_a_sample_a_pixel_beyond_the_border_is_outside():
    offset = np.zeros((1, 1, 5))
    offset[0, 0] = -0.999, -2, 0.999, 2, 0.999
    (record,) = offset_statistics({"conv": SampledLayer((5,), 1, offset=offset)})
    assert record.outside == 0.4  # those at -1 and 5


def test_what_is_not_finite_is_counted_apart():
    layer = random_layer(2)
    layer.offset[0, 0, 0, 0], layer.offset[1, 3, 1, 1] = np.nan, np.inf
    (record,) = offset_statistics({"conv": layer})
    assert record.not_finite == pytest.approx(2 / record.samples)
    assert np.isfinite(record[3:9]).all()
    clean = random_layer(2)
    clean.offset[0, 0, 0, 0], clean.offset[1, 3, 1, 1] = 0, 0
    (other,) = offset_statistics({"conv": clean})
    assert abs(round((record.outside - other.outside) * record.samples)) <= 1
    nothing = SampledLayer((5,), 1, offset=np.full((1, 1, 5), np.nan))
    (record,) = offset_statistics({"conv": nothing})
    assert (record.not_finite, record.outside) == (1, 0)
    assert np.isnan(record[3:9]).all()


def test_a_sample_that_is_nan_is_not_outside_however_far_its_other_coordinate():
    offset = np.zeros((1, 2, 5, 5))
    offset[0, :, 0, 0], offset[0, :, 1, 1] = (np.nan, 100), (0, 100)
    (record,) = offset_statistics({"conv": SampledLayer((5, 5), 1, offset=offset)})
    assert record.outside == 1 / 25


def test_a_network_without_offsets_has_no_records():
    of_node = of_layers([Conv2d(1, 1, 3, rng=0)], Node())
    records = offset_statistics(of_node.sampled_layers(np.ones((1, 5, 5), "float32")))
    assert records == []
    assert offset_table(records).startswith("layer | mean, px")


def test_half_precision_is_measured_in_double():
    offset = np.full((1, 2, 4, 4), 300, np.float16)
    (record,) = offset_statistics({"conv": SampledLayer((4, 4), 1, offset=offset)})
    assert record.mean == pytest.approx(math.hypot(300, 300))


def test_the_table_says_what_the_records_do():
    layer = ModulatedDeformConv2d(1, 1, 3, padding=1, rng=0)
    layer.conv_offset_bias[:18] = 0.5
    of_node = of_layers({"stage.conv": layer}, Node())
    records = offset_statistics(of_node.sampled_layers(np.ones((1, 6, 6), "float32")))
    lines = [[cell.strip() for cell in line.split("|")] for line in offset_table(records).splitlines()]
    assert lines[1] == [
        *("stage.conv", "0.71", "0.71", "0.71", "0.71", "0.71", "1", "10.8 %", "0.50", "0.0 %"),
    ]  # fmt: skip
    assert lines[2] == ["stage", *lines[1][1:]]
    assert len({len(line) for line in offset_table(records).splitlines()}) == 1


# ---- against the scale of objects


PLACES = {"small": [[1.5, 3.5, 6.5, 9.5]], "large": [[8.0, 0, 20, 8], [-3, 11.0, 40, 40]]}


def test_samples_are_told_by_the_objects_that_their_positions_lie_on():
    layers = {"layer2.0.conv2": random_layer(2, 3, scale=2), "layer2.1.conv2": random_layer(2, 4, scale=2)}
    records = offset_statistics(layers, places=PLACES)
    assert [(record.name, record.where) for record in records] == [
        (name, where) for name in (*layers, "layer2") for where in (None, "small", "large", "elsewhere")
    ]
    plain = offset_statistics(layers)
    assert [record for record in records if record.where is None] == plain
    of_first = {record.where: record for record in records[:4]}
    layer = layers["layer2.0.conv2"]
    geometry = layer.geometry
    offset = layer.offset.reshape(2, 2, geometry.taps, 2, *geometry.output)
    mask = layer.mask.reshape(2, 2, geometry.taps, *geometry.output)
    lengths, masks = {}, {}
    for y, x in np.ndindex(*geometry.output):
        at = 4 * y, 4 * x  # the stride of the layer times its scale
        hit = [
            name
            for name, boxes in PLACES.items()
            if any(y1 <= at[0] < y2 and x1 <= at[1] < x2 for y1, x1, y2, x2 in boxes)
        ]
        for name in hit or ["elsewhere"]:
            lengths.setdefault(name, []).append(np.hypot(*np.moveaxis(offset[..., y, x], 3, 0)).ravel())
            masks.setdefault(name, []).append(mask[..., y, x].ravel())
    assert len(lengths) == 3
    for name, values in lengths.items():
        record = of_first[name]
        assert record.samples == np.concatenate(values).size
        assert record.mean == pytest.approx(np.concatenate(values).mean(), rel=1e-12)
        assert record.in_image == pytest.approx(2 * record.mean, rel=1e-12)
        assert record.mask_mean == pytest.approx(np.concatenate(masks[name]).mean(), rel=1e-12)
    names = [line.split("|")[0].strip() for line in offset_table(records).splitlines()]
    assert names[1:5] == [
        "layer2.0.conv2",
        *(f"layer2.0.conv2, {name}" for name in ("small", "large", "elsewhere")),
    ]


def test_the_dilation_and_the_share_outside_are_those_of_the_place():
    offset = np.zeros((1, 18, 12, 12))
    taps = np.indices((3, 3)).reshape(2, 9) - 1.0
    offset[0, ::2, 6:], offset[0, 1::2, 6:] = taps[0][:, None, None], taps[1][:, None, None]  # twice as far
    layer = SampledLayer((12, 12), 3, 1, 1, offset=offset, scale=8)
    box = [[47.5, -0.5, 95.5, 95.5]]
    whole, lower, upper = offset_statistics({"conv": layer}, places={"lower": box})
    assert (lower.dilation, upper.dilation) == (2, 1)
    assert whole.dilation == 1.5
    assert lower.outside > upper.outside > 0
    (only,) = offset_statistics({"conv": layer}, places={"nothing": np.zeros((0, 4))})[1:]
    assert (only.where, only.samples) == ("elsewhere", whole.samples)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"a": [1, 2, 3, 4]}, r"places\['a'\] has shape \(4,\); wanted \(boxes, 4\)"),
        ({"a": [[0, 0, 1, 1], [3, 3, 3, 9]]}, r"places\['a'\]\[1\] is .*, an empty box"),
        ({"a": [[0, 0, np.nan, 1]]}, r"places\['a'\]\[0\] is .*, an empty box"),
        ({"elsewhere": [[0, 0, 1, 1]]}, "places has the name 'elsewhere'"),
    ],
)
def test_wrong_places_are_refused(places, said):
    with pytest.raises(ValueError, match=said):
        offset_statistics({"conv": random_layer(2)}, places=places)


def test_places_are_in_a_plane():
    with pytest.raises(ValueError, match="a layer with 1 spatial axis; wanted 2"):
        offset_statistics({"conv": random_layer(1)}, places=PLACES)


def test_what_is_no_layer_is_refused():
    with pytest.raises(TypeError, match=r"layers\['conv'\] is an array .*; wanted a SampledLayer"):
        offset_statistics({"conv": np.zeros((1, 18, 4, 4))})
