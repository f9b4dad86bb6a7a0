"""The digits example without torch: data, networks, training, stored weights, and the demo of them."""

import math
import subprocess
import sys

import numpy as np
import pytest
from calls import IMPORTED_FROM

from dcn_np.commands import demo, demo_digits

if not demo_digits.is_here():
    pytest.skip("the examples folder is not here", allow_module_level=True)

architecture, data, networks, run, runs, sampling, schedule = (
    demo_digits.part(name)
    for name in ("architecture", "data", "numpy_network", "run", "runs", "sampling", "schedule")
)
VARIANTS = list(architecture.KINDS)


@pytest.fixture(scope="module")
def stored():
    """State dicts, counts of right answers, and the originals that they were counted on."""
    return runs.read_weights()


def some_digits(stored, count=32, seed=0):
    images, labels = data.warped(data.Digits(*(array[:count] for array in stored[2])), rng_of(seed))
    return images, labels.astype(np.int64)


def rng_of(seed):
    return np.random.default_rng(seed)


def perturbed(variant, seed=0, dtype=np.float64):
    """A network whose branches are not zeros, so that no tap lies where the derivative jumps."""
    network, rng = networks.Network(variant, seed, dtype), rng_of(seed)
    for name, value in network.parameters().items():
        value += rng.normal(0, 0.1 if "conv_offset" in name else 0.01, value.shape).astype(dtype)
    return network


# ---- data


def test_a_warp_is_drawn_from_its_generator(stored):
    first, again, other = (some_digits(stored, seed=seed)[0] for seed in (1, 1, 2))
    assert first.shape == (32, data.CANVAS, data.CANVAS)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=(1, 2)).all()


def test_a_warp_without_a_warp_is_the_digit_twice_as_large(stored, monkeypatch):
    for name, value in {"SCALES": (1.0, 1.0), "DEGREES": 0.0, "SHIFT": 0.0, "BEND": 0.0}.items():
        monkeypatch.setattr(data, name, value)
    original = stored[2].images[0].astype(float)
    found = data.warp(original, rng_of(0))
    middle = slice((data.CANVAS - 2 * data.SIDE) // 2, (data.CANVAS + 2 * data.SIDE) // 2)
    halves = found[middle, middle].reshape(data.SIDE, 2, data.SIDE, 2).mean(axis=(1, 3)) / 255 * data.LARGEST
    assert np.corrcoef(halves.ravel(), original.ravel())[0, 1] > 0.97
    outside = found.copy()
    outside[middle, middle] = 0
    assert outside.sum() < 0.05 * found.sum()


def test_a_turn_goes_as_far_as_it_says(monkeypatch):
    for name, value in {"SCALES": (1.0, 1.0), "SHIFT": 0.0, "BEND": 0.0}.items():
        monkeypatch.setattr(data, name, value)
    bar = np.zeros((8, 8))
    bar[3:5, :] = data.LARGEST
    places = np.indices((data.CANVAS,) * 2).reshape(2, -1) - (data.CANVAS - 1) / 2
    angles = []
    for seed in range(200):
        image = data.warp(bar, rng_of(seed)).ravel()
        (yy, yx), (_, xx) = np.cov(places, aweights=image)
        angles.append(math.degrees(0.5 * math.atan2(2 * yx, xx - yy)))
    assert 0.9 * data.DEGREES < max(np.abs(angles)) < data.DEGREES + 3


def test_the_test_set_is_always_the_same(stored):
    first, second = data.test_set(stored[2]), data.test_set(stored[2])
    np.testing.assert_array_equal(first.images, second.images)
    assert len(first.images) == len(first.labels) == data.TEST_WARPS * len(stored[2].labels)
    np.testing.assert_array_equal(first.labels[:: data.TEST_WARPS], stored[2].labels)


def test_every_epoch_warps_every_digit_anew(stored):
    digits = data.Digits(*(array[:200] for array in stored[2]))
    found = list(schedule.batches(digits, seed=3, epochs=2))
    assert len(found) == schedule.count_steps(digits, 2) == 2 * 200 // schedule.BATCH
    labels = np.concatenate([labels for _, labels in found]).reshape(2, 200)
    np.testing.assert_array_equal(np.sort(labels), np.sort([digits.labels] * 2))
    sums = {float(image.sum()) for images, _ in found for image in images}
    assert len(sums) == 400
    again = next(schedule.batches(digits, seed=3, epochs=1))
    np.testing.assert_array_equal(again[0], found[0][0])


def test_the_rate_rises_and_falls():
    factors = [schedule.rate_factor(step, 100) for step in range(100)]
    peak = factors.index(1.0)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0 < factors[0] <= 0.1 + 1e-9
    assert 0 < factors[-1] < 0.01


# ---- networks


def test_all_networks_have_as_many_parameters():
    counts = {
        variant: sum(value.size for value in networks.Network(variant).parameters().values())
        for variant in VARIANTS
    }
    assert max(counts.values()) < 1.02 * min(counts.values()), counts


def test_all_networks_begin_as_ordinary_ones(stored):
    images, _ = some_digits(stored)
    for variant in VARIANTS:
        network, rigid = networks.Network(variant, 5), networks.Network(variant, 5)
        for name in ("conv3", "conv4"):
            layer = rigid.layers[name]
            conv = architecture.convolutions(variant)[name]._replace(kind="Conv2d")
            rigid.layers[name] = networks.dcn_np.layers.Conv2d(**conv.arguments)
            rigid.layers[name].load_state_dict({"weight": layer.weight, "bias": layer.bias})
        x = data.as_input(images)
        np.testing.assert_allclose(network.forward(x), rigid.forward(x), rtol=1e-4, atol=1e-5)
        assert network.forward(x).std() > 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stages_are_the_network(variant, stored):
    network, x = perturbed(variant), data.as_input(some_digits(stored)[0]).astype(np.float64)
    y = x
    for stage in network.stages().values():
        y = stage.forward(y)
    np.testing.assert_array_equal(y[:, :, 0, 0], network.logits(x))
    assert set(network.layers) < set(network.stages())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_differences(variant, stored):
    network, (images, labels) = perturbed(variant), some_digits(stored, 4)
    x, rng = data.as_input(images).astype(np.float64), rng_of(1)
    _, grad = networks.cross_entropy(network.forward(x), labels)
    gradients, parameters = network.backward(grad), network.parameters()
    assert list(gradients) == list(parameters)
    for name, parameter in parameters.items():
        direction, kept, step = rng.normal(size=parameter.shape), parameter.copy(), 1e-7
        losses = []
        for sign in (1, -1):
            parameter[:] = kept + sign * step * direction
            losses.append(networks.cross_entropy(network.forward(x), labels)[0])
        parameter[:] = kept
        slope = np.vdot(gradients[name], direction)
        assert slope != 0, name
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_with_numpy_lowers_the_loss(variant, stored):
    network, (images, labels) = networks.Network(variant), some_digits(stored, 20)
    optimiser, losses = networks.Adam(network.parameters()), []
    for _ in range(60):
        loss, grad = networks.cross_entropy(network.forward(data.as_input(images)), labels)
        optimiser.step(network.backward(grad), 0.01)
        losses.append(loss)
    assert losses[-1] < 0.5 * losses[0]


def test_a_training_learns_more_than_chance(stored):
    digits = data.Digits(*(array[:600] for array in stored[2]))
    network = networks.Network("DCNv2", state=stored[0]["DCNv2"])
    for value in network.layers["classifier"].parameters().values():
        value[:] = 0  # the features stay, so that a few steps are enough
    losses = list(networks.train(network, digits, seed=0, epochs=3))
    assert losses[0] == pytest.approx(math.log(architecture.CLASSES), rel=1e-5)
    assert np.mean(losses[-3:]) < 0.7 * losses[0]


def test_offset_branches_learn_at_a_rate_of_their_own():
    parameters = {"conv3.weight": np.zeros(2), "conv3.conv_offset_weight": np.zeros(2)}
    optimiser = networks.Adam(parameters, offset_factor=0.25)
    for _ in range(2):
        optimiser.step({name: np.array([3.0, -3.0]) for name in parameters}, rate=0.1)
    # Adam's step by an unchanging gradient is the rate.
    np.testing.assert_allclose(parameters["conv3.weight"], [-0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(parameters["conv3.conv_offset_weight"], [-0.05, 0.05], rtol=1e-6)


def test_cross_entropy_of_huge_logits_is_finite():
    loss, grad = networks.cross_entropy(np.array([[1e4, 0, -1e4]]), np.array([1]))
    assert loss == 1e4
    np.testing.assert_array_equal(grad, [[1, -1, 0]])


# ---- runs and weights


def a_run(variant="DCNv2", seed=0, right=80, **other):
    state = networks.Network(variant, seed).state_dict()
    settings = {"trained_with": "numpy", "epochs": 3, "offset_factor": 0.5, "digits": 100, "seconds": 2.0}
    return runs.Run(variant=variant, seed=seed, right=right, state=state, **settings | other)


def test_a_run_is_read_as_it_was_saved(tmp_path):
    saved = a_run()
    runs.save_run(tmp_path, saved)
    runs.save_run(tmp_path, a_run(seed=1))
    (found,) = (run for run in runs.read_runs(tmp_path) if run.seed == 0)
    assert found[:-1] == saved[:-1]
    assert list(found.state) == list(saved.state)
    for key, value in found.state.items():
        np.testing.assert_array_equal(value, saved.state[key])


def test_the_table_has_a_row_for_each_network_and_its_settings():
    several = [a_run(seed=seed, right=right) for seed, right in enumerate((80, 90, 85))]
    text = runs.table([*several, a_run("plain", right=50), a_run(epochs=9, right=99)])
    assert [line for line in text.splitlines() if line.startswith(("| plain", "| DCN"))] == [
        "| plain | 15795 | numpy | 3 | – | 1 | 50.0 % | 50.0 % | 50.0 % | 2 |",
        "| DCNv2 | 15806 | numpy | 3 | 0.5x | 3 | 85.0 ± 5.0 % | 80.0 % | 90.0 % | 2 |",
        "| DCNv2 | 15806 | numpy | 9 | 0.5x | 1 | 99.0 % | 99.0 % | 99.0 % | 2 |",
    ]


def test_the_stored_file_is_small_and_whole(stored):
    assert runs.WEIGHTS.stat().st_size < 300_000
    states, counts, originals = stored
    assert list(states) == list(counts) == VARIANTS
    assert originals.images.shape == (797, data.SIDE, data.SIDE)
    assert originals.images.max() == data.LARGEST
    assert set(originals.labels) == set(range(architecture.CLASSES))


@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_weights_reach_the_stored_accuracy(variant, stored):
    states, counts, originals = stored
    digits = data.test_set(originals)
    network = networks.Network(variant, state=states[variant])
    assert counts[variant] > 0.75 * len(digits.labels)
    assert abs(data.count_right(network.logits, digits) - counts[variant]) <= run.ALLOWED_DIFFERENCE


def test_the_stored_networks_run_without_torch():
    # A module of None cannot be imported.
    code = (
        f"import sys; sys.path[:0] = {IMPORTED_FROM}; sys.modules['torch'] = None;"
        "from dcn_np.commands import demo_digits; status = demo_digits.part('run').main([]); sys.exit(status)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert [line.split()[0] for line in found.stdout.splitlines()[1:4]] == VARIANTS


def test_running_notices_other_answers(tmp_path, capsys, stored):
    states, _, originals = stored
    few = data.Digits(*(array[:50] for array in originals))
    network = networks.Network("plain", state=states["plain"])
    right = data.count_right(network.logits, data.test_set(few))
    for claimed, status in ((right, 0), (right + run.ALLOWED_DIFFERENCE + 1, 1)):
        claim = a_run("plain", right=claimed)._replace(state=states["plain"])
        runs.save_weights(tmp_path / "weights.npz", [claim], few)
        assert run.main([str(tmp_path / "weights.npz")]) == status
        assert f"{right} right" in capsys.readouterr().out


# ---- where it looks


def test_sampling_points_are_the_taps_in_pixels(stored):
    network, image = networks.Network("DCNv2"), some_digits(stored, 1)[0][0]
    found = sampling.most_active(network, image)
    np.testing.assert_allclose(found.points, found.rigid)
    np.testing.assert_allclose(found.modulation, 1)
    np.testing.assert_array_equal(np.ptp(found.rigid, axis=0), [8, 8])  # two steps of 2 * 2 pixels
    bias = network.layers["conv4"].conv_offset_bias
    bias[:18:2], bias[1:18:2], bias[18:] = 0.5, -1, -100
    moved = sampling.most_active(network, image)
    np.testing.assert_allclose(moved.points - moved.rigid, np.tile([2.0, -4.0], (9, 1)), atol=1e-5)
    np.testing.assert_allclose(moved.modulation, 0, atol=1e-6)


def test_the_middle_tap_is_the_middle_of_the_pixels_that_matter():
    network, image = networks.Network("DCNv2"), np.zeros((data.CANVAS, data.CANVAS), np.uint8)
    for layer in network.layers.values():
        layer.weight[:] = 1
    image[12, 16] = 255
    rigid = sampling.most_active(network, image).rigid
    network.forward(data.as_input(np.full_like(image, 255)[None]))
    grad = np.zeros_like(network.rectified[3])
    grad[:, :, 3, 4] = 1
    for name in ("conv4", "conv3", "conv2", "conv1"):
        grad = network.layers[name].backward(grad)
    mattering = np.argwhere(grad[0, 0])
    np.testing.assert_array_equal((mattering.min(axis=0) + mattering.max(axis=0)) / 2, [12, 16])
    np.testing.assert_array_equal(rigid[4], [12, 16])


# ---- the demo


@pytest.fixture
def told(tmp_path):
    """What the demo's last step says, and its exit status."""
    pytest.importorskip("matplotlib")

    def tell():
        shown = demo.Demo(32, tmp_path / "pictures")
        shown.tell_digits()
        return "\n".join(shown.lines), shown.verdict()

    return tell


def test_the_demo_shows_the_networks_at_work(told, tmp_path):
    text, status = told()
    assert status == 0
    assert all(f"ok     {variant}" in text for variant in demo_digits.SHOWN)
    assert (tmp_path / "pictures" / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_notices_a_network_that_answers_otherwise(told, tmp_path, monkeypatch, capsys):
    right = demo_digits.TrainedDigits.network

    def wrong(self, variant):
        network = right(self, variant)
        network.layers["classifier"].bias[:] += 3 * np.arange(10) * (variant == "DCNv2")
        return network

    monkeypatch.setattr(demo_digits.TrainedDigits, "network", wrong)
    text, status = told()
    assert status == 1
    assert "WRONG  DCNv2" in text
    assert "WRONG: DCNv2" in capsys.readouterr().out
    assert not (tmp_path / "pictures").exists()


def test_the_demo_of_a_wheel_says_what_it_lacks(told, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_digits, "EXAMPLE", tmp_path)
    text, status = told()
    assert status == 0
    assert "examples/digits of the repository" in text
