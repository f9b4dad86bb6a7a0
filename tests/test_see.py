"""python -m dcn_np see: what it draws and writes, and what it refuses."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from dcn_np import analysis, layers
from dcn_np.__main__ import main
from dcn_np.commands import demo_digits, see

pytest.importorskip("matplotlib")
QUICK = ["--steps", "3"]
needs_digits = pytest.mark.skipif(not demo_digits.is_here(), reason="the examples folder is not here")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")

FACTORIES = """
from dcn_np import analysis, layers

def stages():
    deformable = layers.ModulatedDeformConv2d(4, 6, 3, padding=1, rng=1)
    return {"conv1": layers.Conv2d(3, 4, 3, stride=2, padding=1, rng=0), "relu": analysis.ReLU(),
            "conv2": deformable, "pool": analysis.GlobalAveragePool()}

def few():
    return list(stages().values())[:3]

def module():
    from torch import nn
    import dcn_np.torch
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(),
                         dcn_np.torch.ModulatedDeformConv2d(4, 6, 3, padding=1))

def head():
    pool = layers.ModulatedDeformRoIPool(4, (2, 3), 0.5, 2, 0.2, hidden_channels=5, rng=2)
    pool.offset_mask_fc_4_bias[:] = [0.4, -0.2] * 9
    return {"conv1": layers.Conv2d(3, 4, 3, stride=2, padding=1, rng=0), "pool": pool,
            "fc": layers.Conv2d(4, 6, (2, 3), rng=1)}

def torch_head():
    from torch import nn
    import dcn_np.torch

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.pool = dcn_np.torch.DeformRoIPool(4, (2, 3), 0.5, 2, 0.2, hidden_channels=5)
            self.fc = nn.Linear(24, 6)

        def forward(self, x, rois):
            return self.fc(self.pool(self.conv(x), rois).flatten(1))

    return Head()

def flat():
    return [analysis.ReLU()]

def number():
    return 3

wrong = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with factories of networks and a photograph's array."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "see_factories.py").write_text(FACTORIES)
    np.save("image.npy", np.random.default_rng(0).random((3, 12, 16), dtype="float32"))
    yield tmp_path
    sys.modules.pop("see_factories", None)


def written(folder):
    assert (folder / "see_output" / "see.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "see_output" / "see.json").read_text())


def saw(*arguments):
    return main(["see", *QUICK, *map(str, arguments)])


@needs_digits
def test_the_digits_networks_are_seen_side_by_side(folder, capsys):
    pytest.importorskip("scipy")
    assert saw("--pixel", 12, 19) == 0
    numbers = written(folder)
    titles = [f"{variant} at (12, 19)" for variant in ("plain", "DCNv1", "DCNv2")]
    assert [node["title"] for node in numbers["nodes"]] == titles
    assert all(title in capsys.readouterr().out for title in titles[:1])
    trained = demo_digits.TrainedDigits()
    image = trained.example["data"].as_input(trained.digits.images[:1])[0]
    assert numbers["image_size"] == [28, 28]
    for variant, node in zip(("plain", "DCNv1", "DCNv2"), numbers["nodes"], strict=True):
        assert node["position"] == [3, 5]
        assert node["place"] == [12, 20]
        of_node = analysis.of_layers(
            trained.network(variant).stages(), analysis.Node("conv4.relu", position=(3, 5))
        )
        view = analysis.view_node(of_node, image, relaxed_steps=3)
        np.testing.assert_allclose(node["sampling"]["positions"], view.positions)
        np.testing.assert_allclose(node["sampling"]["modulation"], view.modulation)
        np.testing.assert_allclose(node["sampling"]["strength"], view.strength)
        assert node["receptive_field"]["size"] == view.field.size()
        assert node["saliency"]["error"] == view.region.error <= 0.1
        assert node["saliency"]["area"] == view.region.area
        assert node["saliency"]["pixels"] == np.argwhere(view.region.mask).tolist()
        assert len(node["saliency"]["steps"]) == len(view.region.steps)


def saved_weights(seed):
    """Weights of the factory's stages, other than those that it draws."""
    state, rng = {}, np.random.default_rng(seed)
    made = {
        "conv1": layers.Conv2d(3, 4, 3, stride=2, padding=1),
        "conv2": layers.ModulatedDeformConv2d(4, 6, 3, padding=1),
    }
    for name, layer in made.items():
        for key, value in layer.state_dict().items():
            state[f"{name}.{key}"] = rng.normal(0, 0.3, value.shape).astype("float32")
    return state


def test_weights_are_read_by_the_names_of_stages(folder):
    arguments = ["image.npy", "--factory", "see_factories:stages", "--layer", "conv2"]
    layers.save_npz(folder / "own.npz", saved_weights(0))
    assert saw(*arguments) == 0
    drawn = written(folder)["nodes"][0]
    assert saw(*arguments, "--weights", "own.npz", "--levels", 2) == 0
    (node,) = written(folder)["nodes"]
    assert node["title"] == "own at (6, 8)"
    assert node["response"] != drawn["response"]
    assert np.shape(node["sampling"]["positions"]) == (81, 2)
    assert node["sampling"]["strength"] is None


def test_nodes_by_pixels_and_boxes(folder):
    arguments = ["--pixel", 0, 0, "-p", 11, 15, "--box", 1, 2, 5, 6]
    assert saw("image.npy", "--factory", "see_factories:few", *arguments) == 0
    first, last, box = written(folder)["nodes"]
    assert (first["position"], last["position"]) == ([0, 0], [5, 7])
    assert box["position"] == [[1, 3], [1, 4]]
    assert box["place"] == [3, 4]
    assert len(box["sampling"]["positions"]) == 2 * 3 * 9


def test_a_box_is_a_region_of_a_head(folder, capsys):
    factory = ["image.npy", "--factory", "see_factories:head"]
    assert saw(*factory, "--box", 2, 3, 8, 12, "--box", 0, 0, 11, 15) == 0
    node, whole = written(folder)["nodes"]
    sys.path.insert(0, str(folder))
    stages = importlib.import_module("see_factories").head()
    sys.path.remove(str(folder))
    rois = np.array([[0, 3.0, 2, 13, 9]])
    of_node = analysis.of_layers(stages, analysis.Node(), rois)
    view = analysis.view_node(of_node, np.load("image.npy"), relaxed_steps=3)
    assert node["region"] == view.box.tolist() == [1.5, 2.5, 8.5, 12.5]
    assert (node["position"], node["place"]) == (None, [5, 7.5])
    assert (node["sampling"]["layer"], node["title"]) == ("pool", "head at (2, 3) to (8, 12)")
    np.testing.assert_allclose(node["sampling"]["positions"], view.positions)
    np.testing.assert_allclose(node["sampling"]["modulation"], view.modulation)
    np.testing.assert_allclose(node["sampling"]["strength"], view.strength)
    assert node["response"] == pytest.approx(view.field.responses[0])
    assert whole["region"] == [-0.5, -0.5, 11.5, 15.5]
    # Below the pooling a box is that of positions, as in a network without a head.
    assert saw(*factory, "--layer", "conv1", "--box", 2, 3, 8, 12) == 0
    (node,) = written(folder)["nodes"]
    assert (node["region"], node["position"]) == (None, [[1, 5], [2, 7]])
    assert saw(*factory, "--pixel", 3, 4) == 1
    assert "the network has a node for each region: wanted --box Y0 X0 Y1 X1" in capsys.readouterr().err


def test_the_stage_whose_samples_are_drawn_is_named_by_its_number(folder):
    assert saw("image.npy", "--factory", "see_factories:few", "--sampling", "0", "--pixel", 4, 4) == 0
    (node,) = written(folder)["nodes"]
    assert node["sampling"]["layer"] == 0


def test_a_grey_picture_is_seen_by_a_network_of_colours(folder):
    from matplotlib.image import imsave

    grey = np.random.default_rng(0).integers(0, 256, (12, 16), dtype=np.uint8)
    imsave("grey.png", grey, cmap="gray", vmin=0, vmax=255)
    assert saw("grey.png", "--factory", "see_factories:few") == 0
    image = see.read_image(folder / "grey.png")
    assert image.shape == (3, 12, 16)
    np.testing.assert_allclose(image[0], grey / 255, atol=0.005)
    np.testing.assert_allclose(see.fitted(image, 1)[0], grey / 255, atol=0.005)
    np.save("flat.npy", grey / 255)
    assert see.fitted(see.read_image(folder / "flat.npy"), 3).shape == (3, 12, 16)


@needs_torch
def test_a_module_of_torch_with_its_checkpoint(folder):
    import torch

    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("see_factories").module()
    finally:
        sys.path.remove(str(folder))
    torch.save({"state_dict": module.state_dict()}, folder / "own.pth")
    assert saw("image.npy", "--factory", "see_factories:module", "--weights", "own.pth", "--layer", "2") == 0
    (node,) = written(folder)["nodes"]
    with torch.no_grad():
        features = module(torch.from_numpy(np.load("image.npy"))[None])[0, :, 3, 4]
    assert node["response"] == pytest.approx(features.norm().item(), rel=1e-4)
    torch.save({"2.weight": module[2].weight.detach()}, folder / "few.pth")
    assert saw("image.npy", "--factory", "see_factories:module", "--weights", "few.pth") == 1


@needs_torch
def test_a_box_is_a_region_of_a_head_of_torch(folder):
    factory = ["image.npy", "--factory", "see_factories:torch_head"]
    assert saw(*factory, "--box", 2, 3, 8, 12) == 0
    (node,) = written(folder)["nodes"]
    assert node["region"] == [1.5, 2.5, 8.5, 12.5]
    regular = analysis.SampledRegions(np.array([[0, 3.0, 2, 13, 9]]), (2, 3), 0.5)
    np.testing.assert_allclose(node["sampling"]["positions"], regular.positions[0].reshape(2, 6).T)
    assert saw(*factory, "--layer", "conv", "--box", 2, 3, 8, 12) == 0
    (node,) = written(folder)["nodes"]
    assert (node["region"], node["position"]) == (None, [[1, 5], [2, 7]])


def test_numbers_that_are_not_finite_are_null():
    assert see.plain([[1, np.nan], [np.inf, -2.5]]) == [[1.0, None], [None, -2.5]]
    assert see.plain(np.nan) is None


OWN = ["image.npy", "--factory", "see_factories:few"]
WHOLE = ["image.npy", "--factory", "see_factories:stages"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.png", *OWN[1:]], "nowhere.png"),
        (["see_factories.py", *OWN[1:]], "cannot identify image file"),
        (["words.png", *OWN[1:]], "words.png cannot be read: not a PNG file"),
        (["cut.png", *OWN[1:]], "cut.png cannot be read: "),
        (["empty.npy", *OWN[1:]], "empty.npy cannot be read: No data left in file"),
        (["cut.npy", *OWN[1:]], "cut.npy cannot be read: "),
        ([*OWN, "--seed", -1], "--seed is -1; wanted at least 0"),
        ([*OWN, "--pixel", 12, 3], "--pixel 12 3 is empty or outside the image of 12 rows and 16 columns"),
        ([*OWN, "--pixel", 3, -1], "--pixel 3 -1 is empty or outside"),
        ([*OWN, "--box", 5, 5, 4, 9], "--box 5 5 4 9 is empty or outside"),
        ([*OWN, "--box", 3, 3, 3, 3], "--box 3 3 3 3 holds no node"),
        ([*OWN, "--epsilon", 0], "epsilon is 0"),
        ([*OWN, "--levels", 9], "levels is 9"),
        ([*OWN, "--fill", "pink"], "fill is 'pink'"),
        ([*OWN, "--layer", "conv9"], "node.layer is 'conv9'; the network has [0, 1, 2]"),
        ([*OWN, "--weights", "nowhere.npz"], "nowhere.npz"),
        ([*OWN, "--weights", "image.npy"], "image.npy"),
        ([*OWN, "--weights", "other.npz"], "other.npz has no 0.weight"),
        ([*WHOLE, "--layer", "pool", "--pixel", 11, 15], "lies outside the map of pool"),
        (["image.npy", "--weights", "own.npz"], "--weights is given without --factory"),
        (["image.npy", "--factory", "see_factories"], "wanted MODULE:FUNCTION"),
        (["image.npy", "--factory", "see_factories:none"], "see_factories has no function 'none'"),
        (["image.npy", "--factory", "see_factories:wrong"], "see_factories has no function 'wrong'"),
        (["image.npy", "--factory", "see_factories:flat"], "wanted a convolution"),
        (["image.npy", "--factory", "no_such_module:f"], "No module named 'no_such_module'"),
        (["nan.npy", *OWN[1:]], "image holds 1 number that are NaN or infinite"),
        (["words.npy", *OWN[1:]], "words.npy has shape (2,), <U1; wanted numbers"),
        (OWN[1:], "no image"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(arguments, said, folder, capsys):
    from matplotlib.image import imsave

    layers.save_npz(folder / "other.npz", {"a": np.ones(1)})
    np.save("words.npy", ["a", "b"])
    (folder / "words.png").write_text("words")
    (folder / "empty.npy").write_bytes(b"")
    (folder / "cut.npy").write_bytes((folder / "image.npy").read_bytes()[:200])
    imsave(folder / "cut.png", np.ones((12, 16)))
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-40])
    image = np.load("image.npy")
    image[0, 0, 0] = np.nan
    np.save("nan.npy", image)
    assert saw(*arguments) == 1
    message = capsys.readouterr().err
    assert said in message
    assert message.startswith("see: ")
    assert not (folder / "see_output").exists()


@needs_torch
def test_a_factory_of_something_else_is_refused(folder, capsys):
    assert saw("image.npy", "--factory", "see_factories:number") == 1
    assert "returned 3 (int); wanted a mapping" in capsys.readouterr().err


def test_without_the_examples_a_network_is_asked_for(folder, capsys, monkeypatch):
    monkeypatch.setattr(demo_digits, "EXAMPLE", folder)
    assert saw("image.npy") == 1
    assert "--factory" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(folder, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    assert saw(*OWN) == 1
    assert "pip install 'dcn_np[plot]'" in capsys.readouterr().err
