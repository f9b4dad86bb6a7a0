"""The detector example with torch: boxes, losses, average precision, and a training from end to end."""

import itertools

import numpy as np
import pytest
import torch
from examples_here import examples

from dcn_np import analysis
from dcn_np.analysis.torch import of_module

pytest.importorskip("pycocotools")
pytest.importorskip("skimage")

boxes, data, digits_data, evaluation, losses, network, runs, show, train, training, variants = examples(
    *(f"detector.{name}" for name in ("boxes", "data")),
    "digits.data",
    *(f"detector.{name}" for name in ("evaluation", "losses", "network", "runs", "show")),
    *(f"detector.{name}" for name in ("train", "training", "variants")),
)
VARIANTS = list(variants.VARIANTS)


@pytest.fixture(scope="module")
def scenes():
    return data.scenes(data.material()[0], [0], 3)


def as_tensors(scenes):
    return torch.from_numpy(data.as_input(scenes)), losses.truths(scenes)


def perturbed(variant, seed=0):
    """A detector whose branches do not begin at zero, where most of their gradients are zero too."""
    detector = training.made(variants.VARIANTS[variant], seed)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    return detector


def random_boxes(count, seed=0, side=100.0):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, side, (count, 2, 2)), axis=1)
    corners[:, 1] += 1
    return torch.from_numpy(corners.reshape(count, 4).astype(np.float32))


# ---- data


def test_no_digit_is_in_both_sets():
    training_set, test_set = data.material()
    flat = [{digit.tobytes() for digit in part.digits} for part in (training_set, test_set)]
    assert [len(part) for part in flat] == [digits_data.TRAINING, 797]
    assert not flat[0] & flat[1]


def test_all_variants_train_on_the_same_scenes():
    first, again = (list(training.batches(5, 2)) for _ in range(2))
    for one, other in zip(itertools.chain(*first), itertools.chain(*again), strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    assert (first[0][0].image != first[1][0].image).any()
    assert (first[0][0].image != next(training.batches(6, 1))[0].image).any()


# ---- boxes


def test_anchors_stand_around_the_middles_of_cells():
    found = boxes.anchors(2, 3, 8, (4.0, 10.0)).reshape(2, 3, 2, 4)
    np.testing.assert_array_equal(found[0, 0], [[2, 2, 6, 6], [-1, -1, 9, 9]])
    np.testing.assert_array_equal(found[1, 2, 0], [18, 10, 22, 14])


def test_overlap_is_intersection_over_union():
    first = torch.tensor([[0.0, 0, 4, 2], [10, 10, 11, 11]])
    second = torch.tensor([[0.0, 0, 4, 2], [2, 1, 6, 3], [4, 0, 8, 2]])
    np.testing.assert_allclose(boxes.overlaps(first, second), [[1, 2 / 14, 0], [0, 0, 0]])


def test_a_regression_makes_the_box_that_it_was_made_of():
    references = random_boxes(40, 1)
    size = references[:, 2:] - references[:, :2]
    truth = torch.cat([references[:, :2] + 0.1 * size, references[:, 2:] + 0.3 * size], dim=1)
    scale = torch.tensor([0.1, 0.1, 0.2, 0.2])
    regression = boxes.encoded(truth, references, scale)
    np.testing.assert_allclose(regression[:, 0], 2, rtol=1e-3)
    np.testing.assert_allclose(regression[:, 2], np.log(1.2) / 0.2, rtol=1e-3)
    np.testing.assert_allclose(boxes.decoded(regression, references, scale, 1000), truth, rtol=1e-4)
    assert boxes.decoded(regression, references, scale, 50).max() == 50


@pytest.mark.parametrize("seed", range(5))
def test_suppression_keeps_what_no_better_kept_box_covers(seed):
    found, scores = random_boxes(60, seed), torch.rand(60, generator=torch.Generator().manual_seed(seed))
    kept = boxes.kept(found, scores, 0.3).tolist()
    assert 5 < len(kept) < 55
    assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)
    overlap = boxes.overlaps(found, found)
    for index in range(60):
        better = [other for other in kept if scores[other] > scores[index]]
        covered = any(overlap[other, index] > 0.3 for other in better)
        assert covered == (index not in kept)


def test_sampling_takes_positives_up_to_their_most():
    positive = torch.arange(20) < 8
    chosen, others = boxes.sampled(positive, ~positive, 10, 5)
    assert (len(chosen), len(others)) == (5, 5)
    assert positive[chosen].all()
    assert not positive[others].any()
    assert len(set(chosen.tolist() + others.tolist())) == 10
    chosen, others = boxes.sampled(positive & (torch.arange(20) < 2), ~positive, 10, 5)
    assert (len(chosen), len(others)) == (2, 8)


# ---- average precision


def scene_of(*corners):
    """Digits 0, 1, ... that fill boxes of MASK_SIDE by MASK_SIDE pixels."""
    side = network.MASK_SIDE
    masks = np.zeros((len(corners), data.CANVAS, data.CANVAS), bool)
    for mask, (left, top) in zip(masks, corners, strict=True):
        mask[top : top + side, left : left + side] = disc()
    found = np.array([[left, top, left + side, top + side] for left, top in corners], np.float32)
    image = np.zeros((data.CANVAS, data.CANVAS, 3), np.uint8)
    return data.Scene(image, found, np.arange(len(corners)), masks)


def disc():
    y, x = np.indices((network.MASK_SIDE,) * 2) - (network.MASK_SIDE - 1) / 2
    return x**2 + y**2 <= (network.MASK_SIDE / 2) ** 2


def detections_of(scene, shift=0.0, labels=None, scores=None):
    found = torch.from_numpy(scene.boxes) + shift * torch.tensor([1.0, 0, 1, 0])
    count = len(found)
    masks = torch.from_numpy(np.repeat(disc()[None], count, axis=0)).float()
    labels = torch.from_numpy(scene.labels if labels is None else np.array(labels))
    return network.Detections(
        found, torch.linspace(0.9, 0.8, count) if scores is None else scores, labels, masks
    )


def test_whole_masks_lie_in_their_boxes():
    scene = scene_of((3, 40), (60, 5))
    np.testing.assert_array_equal(evaluation.whole_masks(detections_of(scene), data.CANVAS), scene.masks)
    larger = detections_of(scene)._replace(boxes=torch.tensor([[0.0, 0, 112, 56], [-28, 0, 28, 56]]))
    found = evaluation.whole_masks(larger, data.CANVAS)
    assert found[0].sum() == pytest.approx(8 * disc().sum(), rel=0.01)
    assert found[1, :56, :28].sum() == pytest.approx(2 * disc().sum(), rel=0.01)
    assert found[1].sum() == found[1, :56, :28].sum()


def test_average_precision_of_known_detections():
    scenes = [scene_of((3, 40), (60, 5)), scene_of((50, 50), (10, 10))]
    exact = [detections_of(scene) for scene in scenes]
    assert evaluation.average_precision(scenes, exact) == dict.fromkeys(
        evaluation.COLUMNS, pytest.approx(100)
    )
    # Boxes that overlap by 22 / 34 = 0.647: right at the thresholds 0.5, 0.55 and 0.6 of ten.
    moved = evaluation.average_precision(scenes, [detections_of(scene, 6.0) for scene in scenes])
    assert moved["box AP"] == pytest.approx(30)
    assert (moved["box AP50"], moved["box AP75"]) == (pytest.approx(100), 0)
    both = (disc()[:, 6:] & disc()[:, :-6]).sum()
    assert 0.55 < both / (2 * disc().sum() - both) < 0.6
    assert moved["mask AP"] == pytest.approx(20)
    # In the second scene each is called by the other's name: behind the right 0, before the right 1.
    swapped = [exact[0], detections_of(scenes[1], labels=[1, 0])]
    assert evaluation.average_precision(scenes, swapped)["box AP"] == pytest.approx(
        100 * (51 + 25.5) / 2 / 101
    )


def test_average_precision_of_nothing_is_zero():
    scenes = [scene_of((3, 40))]
    empty = network.Detections(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=int), torch.zeros(0, 28, 28)
    )
    assert evaluation.average_precision(scenes, [empty]) == dict.fromkeys(evaluation.COLUMNS, 0.0)


# ---- losses


def test_all_variants_have_as_many_parameters():
    counts = [
        sum(parameter.numel() for parameter in network.Detector(variant).parameters())
        for variant in variants.VARIANTS.values()
    ]
    assert max(counts) < 1.002 * min(counts)


def test_regions_say_what_they_cover(scenes):
    _, truth = as_tensors(scenes)
    near = [one.boxes + 0.05 * (one.boxes[:, 2:] - one.boxes[:, :2]).repeat(1, 2) for one in truth]
    found = losses.sampled_regions([torch.cat([one, torch.tensor([[0.0, 0, 3, 3]])]) for one in near], truth)
    every = [torch.cat([one.boxes for one in truth]), torch.cat([one.labels for one in truth])]
    positive = found.classes > 0
    assert positive.sum() == sum(min(2 * len(one.boxes), losses.MOST_POSITIVE_REGIONS) for one in truth)
    np.testing.assert_array_equal(found.boxes[positive], every[0][found.objects[positive]])
    np.testing.assert_array_equal(found.classes[positive] - 1, every[1][found.objects[positive]])
    np.testing.assert_array_equal(found.rois[~positive, 3:], np.full((3, 2), 3))
    for roi, box in zip(found.rois[positive, 1:], found.boxes[positive], strict=True):
        assert boxes.overlaps(roi[None], box[None]).item() > 0.8


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant, scenes):
    detector, images, truth = perturbed(variant), *as_tensors(scenes)
    settings = variants.VARIANTS[variant]
    mimicking = losses.Mimicking(settings.width, settings.mimicking) if settings.mimicking else None
    found = losses.losses(detector, images, truth, mimicking)
    sum(found.values()).backward()
    assert len(found) == (6 if settings.mimicking else 4)
    modules = [detector, *([mimicking] if mimicking else [])]
    for name, parameter in itertools.chain(*(module.named_parameters() for module in modules)):
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_lowers_the_loss(variant, scenes, monkeypatch):
    monkeypatch.setattr(training, "batches", lambda seed, steps: itertools.repeat(scenes, steps))
    detector = training.made(variants.VARIANTS[variant], 0)
    found = [sum(step.values()) for step in training.train(detector, variants.VARIANTS[variant], 0, 12)]
    assert np.isfinite(found).all()
    assert np.mean(found[-3:]) < 0.8 * np.mean(found[:3])


@pytest.mark.parametrize(("regions", "wanted"), [("foreground", {3}), ("background", {0}), ("both", {0, 3})])
def test_mimicking_looks_at_the_regions_of_its_variant(regions, wanted, monkeypatch):
    mimicking, seen = losses.Mimicking(5, regions), []

    def note(images, rois, labels, features, extract):
        np.testing.assert_array_equal(features, rois)
        seen.extend(labels.tolist())
        return losses.dcn_np.torch.MimickingLosses(torch.zeros(()), torch.zeros(()))

    monkeypatch.setattr(mimicking.branch, "forward", note)
    classes, detector = torch.tensor([3, 0] * 8), network.Detector(variants.REGULAR)
    rois = torch.cat([torch.arange(16.0)[:, None] // 8, torch.rand(16, 4)], dim=1)
    sampled = losses.Regions(rois, classes, torch.zeros(16, 4), torch.zeros(16, dtype=int))
    for _ in range(8):
        mimicking(detector, torch.zeros(2, 3, 8, 8), sampled, rois)
    assert set(seen) == wanted
    assert len(seen) == 8 * 2 * losses.MIMICKED_PER_IMAGE


def test_nothing_of_mimicking_is_left_in_a_detector():
    plain, taught = (network.Detector(variants.VARIANTS[name]) for name in ("DCNv2", "DCNv2+mimic-fg"))
    assert [(key, value.shape) for key, value in plain.state_dict().items()] == [
        (key, value.shape) for key, value in taught.state_dict().items()
    ]


# ---- from end to end


def test_detections_are_in_the_image_and_the_best_first(scenes):
    for found in perturbed("DCNv2").detect(as_tensors(scenes)[0]):
        assert 0 < len(found.boxes) <= network.DETECTIONS
        assert 0 <= found.boxes.min() < found.boxes.max() <= data.CANVAS
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        assert found.scores.min() > network.LEAST_SCORE
        assert found.masks.shape == (len(found.boxes), network.MASK_SIDE, network.MASK_SIDE)


def test_training_and_showing_from_end_to_end(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(training, "TEST_SCENES", 3)
    threads = torch.get_num_threads()
    chosen = ["--variants", "regular", "DCNv2+mimic-fg", "--steps", "2", "--output", str(tmp_path)]
    train.main([*chosen, "--seeds", "0"])
    train.main([*chosen, "--seeds", "0", "1", "--missing"])
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert text.count("seed 0: box AP") == 2  # once each: what is there is not trained again
    assert text.count("seed 1: box AP") == 2
    assert [run[:4] for run in runs.read_runs(tmp_path)] == [
        (variant, seed, 2, training.OFFSET_FACTOR)
        for variant in ("regular", "DCNv2+mimic-fg")
        for seed in (0, 1)
    ]
    show.main(["--output", str(tmp_path)])
    assert "scenes, regular, DCNv2+mimic-fg" in capsys.readouterr().out
    assert (tmp_path / "detections-seed0.png").read_bytes().startswith(b"\x89PNG")


def test_a_stored_run_is_read_as_it_was(tmp_path):
    detector = perturbed("DCNv1")
    run = runs.Run("DCNv1", 3, 7, 0.1, 10, 2.5, {"box AP": 12.25})
    runs.save_run(tmp_path, run, detector)
    assert runs.read_runs(tmp_path) == [run]
    for key, value in runs.read_detector(tmp_path, run).state_dict().items():
        np.testing.assert_array_equal(value, detector.state_dict()[key])


def test_the_table_has_means_and_spreads():
    several = [
        runs.Run(variant, seed, steps, 0.1, 10, 60.0, dict.fromkeys(evaluation.COLUMNS, value))
        for steps in (20, 5)
        for variant, values in {"regular": (40.0, 44.0), "DCNv2": (50.0,)}.items()
        for seed, value in enumerate(values)
    ]
    assert runs.table(several).splitlines()[2:] == [
        line
        for steps in (5, 20)
        for line in (
            f"| regular | 10 | {steps} | – | 2 |" + " 42.0 ± 2.8 |" * 6 + " 60 |",
            f"| DCNv2 | 10 | {steps} | 0.1x | 1 |" + " 50.0 |" * 6 + " 60 |",
        )
    ]


# ---- what it sees


class Regions(torch.nn.Module):
    """The features by which a detector judges regions."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images, rois):
        return self.detector.region_features(images, rois)


@pytest.mark.parametrize("variant", ["regular", "DCNv1", "DCNv2"])
def test_a_region_is_seen_by_every_variant(variant, scenes):
    image, box = data.as_input(scenes)[0], scenes[0].boxes[0]
    rois = torch.tensor([[0, *map(float, box)]])
    module = Regions(perturbed(variant)).eval()
    of_node = of_module(module, analysis.Node(), (rois,))
    view = analysis.view_node(of_node, image, relaxed_steps=2, cell=14, epsilon=0.5)
    assert view.layer == "detector.box_pool"
    borders = [box[1] - 0.5, box[0] - 0.5, box[3] - 0.5, box[2] - 0.5]
    np.testing.assert_allclose(view.box, borders)
    assert view.positions.shape == (49, 2)
    assert view.strength.max() > 0
    x = module.detector.backbone(torch.from_numpy(image[None]))
    if variant == "regular":
        offset = None
    else:
        offset, mask = module.detector.box_pool.branch(x, rois)
        assert (mask is None) == (variant == "DCNv1")
        if mask is not None:
            np.testing.assert_allclose(view.modulation, mask.detach().flatten(), rtol=1e-5)
        offset = offset.detach()
        assert offset.abs().max() > 0
    wanted = analysis.SampledRegions(rois, (7, 7), 1 / 8, offset).positions
    np.testing.assert_allclose(view.positions, wanted[0].reshape(2, 49).T, rtol=1e-6)
