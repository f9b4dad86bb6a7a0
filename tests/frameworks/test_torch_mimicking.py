"""R-CNN feature mimicking in dcn_np.torch: regions, crops, losses, and the detector trained with it."""

import copy

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import nn

from dcn_np.torch import FeatureMimicking, MimickingLosses, crop_regions, roi_align, sample_regions

FEATURES, CLASSES, SIZE = 6, 3, 16


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- sampling


def labelled_regions():
    """120 regions of 3 images, in no order; the last image has fewer than 32 of any class but 2."""
    generator = seeded(1)
    image = torch.cat([torch.zeros(50), torch.full((50,), 2.0), torch.full((20,), 5.0)])
    rois = torch.cat([image[:, None], torch.rand(120, 4, generator=generator)], 1)
    labels = torch.randint(-1, 3, (120,), generator=generator)
    order = torch.randperm(120, generator=generator)
    return rois[order], labels[order]


CHOSEN = {"foreground": {1, 2}, "background": {0}, "both": {0, 1, 2}}


@pytest.mark.parametrize("regions", CHOSEN)
@pytest.mark.parametrize("per_image", [1, 9, 32])
def test_at_most_so_many_of_each_image_are_chosen(regions, per_image):
    rois, labels = labelled_regions()
    chosen = sample_regions(rois, labels, per_image, regions, seeded())
    assert chosen.dtype == torch.int64
    assert set(labels[chosen].tolist()) <= CHOSEN[regions]
    # Ascending, so none is there twice.
    assert (chosen[1:] > chosen[:-1]).all()
    may = torch.tensor([label in CHOSEN[regions] for label in labels.tolist()])
    for image in (0, 2, 5):
        there = int((may & (rois[:, 0] == image)).sum())
        assert int((rois[chosen, 0] == image).sum()) == min(per_image, there)


def test_the_paper_chooses_32_of_the_foreground():
    rois = torch.zeros(200, 5)
    labels = torch.arange(200) % 2
    chosen = sample_regions(rois, labels)
    assert len(chosen) == 32
    assert (labels[chosen] == 1).all()


def test_the_choice_is_that_of_the_generator():
    rois, labels = labelled_regions()
    first, again, other = (sample_regions(rois, labels, 5, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    assert torch.equal(sample_regions(rois, labels, 5), first)


def test_each_region_has_the_same_chance():
    rois, labels = torch.zeros(8, 5), torch.ones(8, dtype=torch.int32)
    generator = seeded()
    counts = torch.zeros(8)
    for _ in range(2000):
        counts[sample_regions(rois, labels, 2, generator=generator)] += 1
    # A binomial count: 500 expected, its standard deviation 19.
    assert (counts - 500).abs().max() < 100


@pytest.mark.parametrize("labels", [[], [0, 0, -1]], ids=["no region", "no object"])
def test_nothing_to_choose_from(labels):
    chosen = sample_regions(torch.zeros(len(labels), 5), torch.tensor(labels, dtype=torch.int64))
    assert chosen.shape == (0,)
    assert chosen.dtype == torch.int64


# ---- crops


def problem(dtype=torch.float32):
    generator = seeded(2)
    images = torch.rand(2, 3, 24, 30, generator=generator, dtype=torch.float64).to(dtype)
    # Made larger, made smaller, moved by no whole number, and across the border.
    corners = [
        [1, 3.25, 4.5, 11.5, 9.75],
        [0, 0, 0, 30, 24],
        [1, 20.1, 2.3, 29.2, 21.7],
        [0, -4, 15, 6.5, 27],
    ]
    return images, torch.tensor(corners, dtype=dtype)


def crop_of(image, box, size):
    """A bilinear resize of a box by half-pixel centres; pixel p of the image has its centre at p + 1/2."""
    x1, y1, x2, y2 = box.double().tolist()
    centres = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(y1 + centres * (y2 - y1) - 0.5, x1 + centres * (x2 - x1) - 0.5, indexing="ij")
    inside = (y >= -1) & (y <= image.shape[1]) & (x >= -1) & (x <= image.shape[2])
    planes = [map_coordinates(plane, [y, x], order=1, mode="nearest") for plane in image.double().numpy()]
    return torch.tensor(np.stack(planes) * inside)


@pytest.mark.parametrize("size", [1, 5, 32])
def test_crops_are_bilinear_resizes(size):
    images, rois = problem(torch.float64)
    crops, _ = crop_regions(images, rois, size)
    assert crops.shape == (4, 3, size, size)
    for crop, (image, *_), box in zip(crops, rois, rois[:, 1:], strict=True):
        assert torch.allclose(crop, crop_of(images[int(image)], box, size), rtol=0, atol=1e-12)


def test_a_crop_of_whole_pixels_is_a_slice():
    images, _ = problem()
    crops, _ = crop_regions(images, torch.tensor([[1.0, 7, 5, 15, 13]]), 8)
    assert torch.equal(crops[0], images[1, :, 5:13, 7:15])


def test_smoothing_is_left_to_the_adaptive_pooling():
    images, rois = problem()
    sampled, _ = crop_regions(images, rois[:2], 12)
    averaged = roi_align(images, rois[:2], 12)
    assert torch.equal(sampled[0], averaged[0])
    assert not torch.allclose(sampled[1], averaged[1], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_region_of_a_crop_is_the_whole_crop(dtype):
    # More than bfloat16 can count.
    rois = torch.tensor([[0, 1, 2, 9, 7]], dtype=dtype).repeat(300, 1)
    crops, crop_rois = crop_regions(torch.rand(1, 1, 8, 10).to(dtype), rois, 7)
    assert crops.dtype == dtype
    assert crop_rois.dtype == torch.promote_types(dtype, torch.float32)
    assert crop_rois.tolist() == [[index, 0, 0, 7, 7] for index in range(300)]
    assert torch.equal(roi_align(crops, crop_rois, 7, sampling_ratio=1), crops)


def test_crops_are_of_224_pixels_as_in_the_paper():
    images, rois = problem()
    crops, crop_rois = crop_regions(images, rois)
    assert crops.shape == (4, 3, 224, 224)
    assert crop_rois[-1].tolist() == [3, 0, 0, 224, 224]


def test_images_get_the_gradients_of_their_crops():
    images, rois = problem(torch.float64)
    crop_regions(images.requires_grad_(), rois, 8)[0].sum().backward()
    # A pixel's gradient is its weight: what all pixels have together, crops of ones have too.
    ones, _ = crop_regions(torch.ones_like(images), rois, 8)
    assert torch.allclose(images.grad.sum(), ones.sum(), rtol=1e-12)
    assert not images.grad[0, :, 0, 29].any()


# ---- losses


class Detector(nn.Module):
    """A backbone of one convolution, RoIAlign and two fc layers, whose classifier is its own."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 3 * 3, 8), nn.ReLU(), nn.Linear(8, FEATURES))
        self.classifier = nn.Linear(FEATURES, CLASSES + 1)

    def region_features(self, images, rois):
        maps = self.backbone(images).relu()
        return self.head(roi_align(maps, rois, 3, spatial_scale=0.5, sampling_ratio=2))

    def forward(self, images, rois):
        return self.classifier(self.region_features(images, rois))


def training(dtype=torch.float32, **options):
    """A detector, the branch beside it, and images, regions and labels for both."""
    torch.manual_seed(4)
    images, rois = problem(dtype)
    branch = FeatureMimicking(FEATURES, CLASSES, size=SIZE, dtype=dtype, **options)
    detector = Detector().to(dtype)
    for name, parameter in detector.named_parameters():
        # Else all features were about the biases, and alike from the beginning.
        parameter.data *= 0 if name.endswith("bias") else 2
    return detector, branch, 2 * images - 1, rois, torch.tensor([1, 3, 2, 1])


def losses_of(detector, branch, images, rois, labels):
    return branch(images, rois, labels, detector.region_features(images, rois), detector.region_features)


def direct(detector, branch, images, rois, labels):
    """Both losses by the words of the paper, without factors, each region by itself."""
    cosines, entropies = [], []
    for index, roi in enumerate(rois):
        crop = crop_of(images[int(roi[0])], roi[1:], SIZE).to(images.dtype)
        whole = torch.tensor([[0, 0, 0, SIZE, SIZE]], dtype=images.dtype)
        rcnn = detector.region_features(crop[None], whole)[0]
        faster = detector.region_features(images, roi[None])[0]
        cosines.append(rcnn @ faster / rcnn.norm() / faster.norm())
        entropies.append(-branch.classifier(rcnn).log_softmax(0)[labels[index]])
    return sum(1 - cosine for cosine in cosines) / len(images), sum(entropies) / len(rois)


def parameters_of(detector, branch):
    return [*detector.backbone.parameters(), *detector.head.parameters(), *branch.parameters()]


@pytest.mark.parametrize("weights", [{}, {"mimic_weight": 2, "classification_weight": 0.5}], ids=str)
def test_losses_and_gradients_are_those_of_the_paper(weights):
    problem = training(torch.float64, **weights)
    losses = losses_of(*problem)
    factors = tuple(weights.values()) or (0.1, 0.1)
    wanted = [factor * loss for factor, loss in zip(factors, direct(*problem), strict=True)]
    assert isinstance(losses, MimickingLosses)
    for loss, want in zip(losses, wanted, strict=True):
        assert loss.shape == ()
        assert loss > 0.01
        assert torch.allclose(loss, want, rtol=1e-9)
    grads = [torch.autograd.grad(sum(pair), parameters_of(*problem[:2])) for pair in (losses, wanted)]
    for grad, want in zip(*grads, strict=True):
        assert torch.allclose(grad, want, rtol=1e-6, atol=1e-12)


def test_the_mimic_loss_of_images_alone_has_their_loss_in_a_batch_as_its_mean():
    detector, branch, images, rois, labels = training(torch.float64)
    whole = losses_of(detector, branch, images, rois, labels).mimic
    alone = []
    for index, image in enumerate(images):
        of_image = rois[:, 0] == index
        own = rois[of_image] * torch.tensor([0, 1, 1, 1, 1])
        alone.append(losses_of(detector, branch, image[None], own, labels[of_image]).mimic)
    assert torch.allclose(whole, sum(alone) / 2, rtol=1e-12)


@pytest.mark.parametrize("loss", MimickingLosses._fields)
def test_gradients_reach_backbone_heads_and_classifier(loss):
    detector, branch, *rest = training()
    getattr(losses_of(detector, branch, *rest), loss).backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in parameters_of(detector, branch)]
    of_branch = [loss == "classification"] * 2
    assert reached == [True] * (len(reached) - 2) + of_branch
    assert detector.classifier.weight.grad is None


@pytest.mark.parametrize("loss", MimickingLosses._fields)
def test_which_features_a_loss_has_gradients_for(loss):
    _, branch, images, rois, labels = training()
    features, rcnn = (torch.randn(4, FEATURES, requires_grad=True) for _ in range(2))
    getattr(branch(images, rois, labels, features, lambda *_: rcnn), loss).backward()
    assert rcnn.grad.any()
    assert (features.grad is not None) == (loss == "mimic")


def test_what_is_given_to_extract():
    detector, branch, images, rois, labels = training()
    given = []

    def extract(crops, crop_rois):
        given.extend([crops, crop_rois])
        return detector.region_features(crops, crop_rois)

    branch(images, rois, labels, detector.region_features(images, rois), extract)
    assert len(given) == 2
    assert all(torch.equal(*pair) for pair in zip(given, crop_regions(images, rois, SIZE), strict=True))


@pytest.mark.parametrize("batch", [2, 0])
def test_without_regions_the_losses_are_0_and_have_gradients(batch):
    detector, branch, images, rois, labels = training()
    features = detector.region_features(images, rois)[:0]

    def extract(*_):
        raise AssertionError("called without regions")

    losses = branch(images[:batch], rois[:0], labels[:0], features, extract)
    assert [loss.item() for loss in losses] == [0, 0]
    sum(losses).backward()
    # All of them are there, as distributed training wants.
    assert all(p.grad is not None and not p.grad.any() for p in parameters_of(detector, branch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    detector, branch, *rest = training()
    wanted = losses_of(detector, branch, *rest)
    with torch.autocast("cpu", dtype):
        losses = losses_of(detector, branch, *rest)
    sum(losses).backward()
    for loss, want in zip(losses, wanted, strict=True):
        assert loss.dtype == torch.float32
        assert loss != want
        assert torch.allclose(loss, want, rtol=0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in parameters_of(detector, branch))


def test_labels_of_any_integer_type():
    detector, branch, images, rois, labels = training()
    wanted = losses_of(detector, branch, images, rois, labels)
    for dtype in (torch.int32, torch.uint8):
        assert losses_of(detector, branch, images, rois, labels.to(dtype)) == wanted


# ---- training


def steps_of(detector, branch, images, rois, labels, count):
    """Train the detector's classification, with the branch if there is one, and return the mimic losses."""
    others = [] if branch is None else branch.parameters()
    optimiser = torch.optim.SGD([*detector.parameters(), *others], lr=0.02, momentum=0.9)
    mimic = []
    for _ in range(count):
        features = detector.region_features(images, rois)
        loss = nn.functional.cross_entropy(detector.classifier(features), labels)
        if branch is not None:
            losses = branch(images, rois, labels, features, detector.region_features)
            mimic.append(losses.mimic.item())
            loss = loss + sum(losses)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return mimic


def test_training_makes_the_features_alike():
    with_weight = training(mimic_weight=1.0)
    without = training(mimic_weight=0.0)
    mimic = steps_of(*with_weight, 20)
    steps_of(*without, 20)
    assert mimic[-1] < 0.1 * mimic[0]
    left = direct(*without)[0].item()
    assert direct(*with_weight)[0].item() < 0.5 * left


def test_the_detector_does_not_change():
    detector, _, images, rois, labels = training()
    alone = copy.deepcopy(detector)
    branch = FeatureMimicking(FEATURES, CLASSES, size=SIZE)
    losses_of(detector, branch, images, rois, labels)
    assert torch.equal(detector(images, rois), alone(images, rois))
    assert list(branch.state_dict()) == ["classifier.weight", "classifier.bias"]
    assert branch.classifier.weight.shape == (CLASSES + 1, FEATURES)
    steps_of(detector, branch, images, rois, labels, 3)
    state, names = detector.state_dict(), list(alone.state_dict())
    assert list(state) == names
    # Trained with the branch, loaded and run without it.
    alone.load_state_dict(state)
    assert torch.equal(detector(images, rois), alone(images, rois))


def test_without_weights_the_branch_trains_nothing_of_the_detector():
    problem = training(mimic_weight=0.0, classification_weight=0.0)
    alone = copy.deepcopy(problem[0])
    steps_of(*problem, 3)
    steps_of(alone, None, *problem[2:], 3)
    for one, other in zip(problem[0].parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


# ---- what does not fit


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"rois": torch.zeros(2, 4)},
            ValueError,
            r"^rois has shape \(2, 4\); wanted \(R, 5\).*index of their",
        ),
        ({"rois": torch.zeros(5)}, ValueError, r"^rois has shape \(5,\)"),
        (
            {"rois": torch.full((2, 5), 0.5)},
            ValueError,
            r"^rois\[0\] begins with 0.5; wanted the whole index",
        ),
        ({"rois": torch.tensor([[0.0] * 5, [-1.0] * 5])}, ValueError, r"^rois\[1\] begins with -1"),
        ({"rois": torch.full((2, 5), torch.nan)}, ValueError, r"^rois\[0\] begins with nan"),
        (
            {"labels": torch.ones(3, dtype=torch.int64)},
            ValueError,
            r"^labels has shape \(3,\); wanted.*\(2,\)",
        ),
        ({"labels": torch.ones(2)}, TypeError, r"^labels has dtype torch.float32; wanted integers"),
        ({"labels": torch.ones(2, dtype=torch.bool)}, TypeError, r"^labels has dtype torch.bool"),
        ({"labels": torch.ones(2, dtype=torch.complex64)}, TypeError, r"^labels has dtype torch.complex64"),
        ({"per_image": 0}, ValueError, r"^per_image is 0; wanted at least 1"),
        ({"per_image": 1.5}, TypeError, r"^per_image is 1.5"),
        ({"regions": "all"}, ValueError, r"^regions is 'all'; wanted 'foreground', 'background', 'both'"),
    ],
)
def test_sampling_names_what_does_not_fit(change, error, message):
    arguments = {"rois": torch.zeros(2, 5), "labels": torch.ones(2, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        sample_regions(**arguments | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, ValueError, r"^images has shape \(3, 8, 8\).*as images\[None\]"),
        ({"images": torch.zeros(8, 8)}, ValueError, r"^images has shape \(8, 8\); wanted \(batch.*width\)$"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, TypeError, r"^images has dtype torch.uint8"),
        ({"rois": torch.zeros(2, 4)}, ValueError, r"^rois has shape \(2, 4\)"),
        ({"rois": torch.zeros(2, 5, dtype=torch.float64)}, TypeError, r"^rois has dtype float64"),
        ({"rois": torch.ones(2, 5)}, ValueError, r"^rois\[0\] is \(1, 1, 1, 1, 1\)"),
        ({"rois": torch.full((2, 5), torch.inf)}, ValueError, r"^rois\[0\] is .*finite"),
        ({"size": 0}, ValueError, r"^size is 0; wanted at least 1"),
        ({"size": (2, 3)}, TypeError, r"^size is"),
    ],
)
def test_cropping_names_what_does_not_fit(change, error, message):
    arguments = {"images": torch.zeros(1, 3, 8, 8), "rois": torch.zeros(2, 5)}
    with pytest.raises(error, match=message):
        crop_regions(**arguments | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(3, 24, 30)}, ValueError, r"^images has shape"),
        (
            {"images": torch.zeros(2, 3, 24, 30, dtype=torch.int32)},
            TypeError,
            r"^images has dtype torch.int32",
        ),
        ({"rois": torch.zeros(4, 4)}, ValueError, r"^rois has shape \(4, 4\)"),
        ({"rois": torch.full((4, 5), 2.0)}, ValueError, r"^rois\[0\] is .*a batch of 2"),
        (
            {"labels": torch.ones(3, dtype=torch.int64)},
            ValueError,
            r"^labels has shape \(3,\); wanted.*\(4,\)",
        ),
        ({"labels": torch.ones(4)}, TypeError, r"^labels has dtype torch.float32"),
        ({"labels": torch.tensor([0, 3, -1, 4])}, ValueError, r"^labels\[2\] is -1; wanted 0.* to 3"),
        ({"labels": torch.tensor([0, 3, 0, 4])}, ValueError, r"^labels\[3\] is 4; wanted 0.* to 3"),
        ({"features": torch.zeros(4, 5)}, ValueError, r"^features has shape \(4, 5\); wanted.* = \(4, 6\)"),
        ({"features": torch.zeros(3, 6)}, ValueError, r"^features has shape \(3, 6\); wanted.* = \(4, 6\)"),
    ],
)
def test_nothing_is_extracted_where_something_does_not_fit(change, error, message):
    _, branch, images, rois, labels = training()
    features = torch.zeros(4, FEATURES)

    def extract(*_):
        raise AssertionError("called though an argument does not fit")

    given = {"images": images, "rois": rois, "labels": labels, "features": features, "extract": extract}
    with pytest.raises(error, match=message):
        branch(**given | change)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (torch.zeros(4, 5), ValueError, r"^extract returned features of shape \(4, 5\).* = \(4, 6\)"),
        (torch.zeros(1, 6), ValueError, r"^extract returned features of shape \(1, 6\)"),
        (torch.zeros(4, 6, 1, 1), ValueError, r"^extract returned features of shape \(4, 6, 1, 1\)"),
        (None, TypeError, r"^extract returned None; wanted a tensor"),
    ],
)
def test_what_extract_returns_is_checked(result, error, message):
    _, branch, images, rois, labels = training()
    with pytest.raises(error, match=message):
        branch(images, rois, labels, torch.ones(4, FEATURES), lambda *_: result)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"in_features": 0}, ValueError),
        ({"classes": 0}, ValueError),
        ({"classes": 2.5}, TypeError),
        ({"size": -1}, ValueError),
        ({"mimic_weight": "0.1"}, TypeError),
        ({"classification_weight": float("nan")}, ValueError),
    ],
)
def test_a_branch_that_cannot_be(change, error):
    with pytest.raises(error, match=f"^{next(iter(change))} is "):
        FeatureMimicking(**{"in_features": FEATURES, "classes": CLASSES} | change)
