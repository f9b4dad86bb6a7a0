"""Nodes of modules of torch: gradients, layers, regions; what the layers sample; what a call costs."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dcn_np.torch
from dcn_np import analysis, layers
from dcn_np.analysis import Node, effective_receptive_field, error_bounded_saliency, offset_statistics
from dcn_np.analysis.torch import of_module
from dcn_np.commands import demo_digits

networks, torch_networks = (demo_digits.part(name) for name in ("numpy_network", "torch_network"))


def digits_both(variant, dtype=np.float64):
    """The digits network with NumPy and with torch, of the same weights; offsets are no whole numbers."""
    network, rng = networks.Network(variant, 0, dtype), np.random.default_rng(0)
    for name, value in network.parameters().items():
        if "conv_offset" in name:
            value[:] = rng.normal(0, 0.1, value.shape)
    module = torch_networks.Network(variant, 0).to(torch.from_numpy(np.zeros(0, dtype)).dtype)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in network.state_dict().items()})
    return network.stages(), module.eval()


def image_of(seed=1, dtype=np.float64):
    return np.random.default_rng(seed).random((1, 28, 28)).astype(dtype)


class Head(nn.Module):
    """A detector's head: two features of each region from a deformable pooling."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.fc = nn.Linear(3 * 9, 5)

    def forward(self, x, rois):
        offset = 0.1 * torch.ones(len(rois), 2, 3, 3, dtype=x.dtype)
        pooled = dcn_np.torch.deform_roi_pool(self.conv(x), rois, offset, 3)
        return torch.tanh(self.fc(pooled.flatten(1)))


@pytest.mark.parametrize("node", [Node("conv3", 2, (1, 4)), Node("conv4", position=(3, 3)), Node("conv2", 1)])
@pytest.mark.parametrize("variant", ["plain", "DCNv1", "DCNv2"])
def test_the_node_is_that_of_the_layers_without_torch(variant, node):
    stages, module = digits_both(variant)
    response, gradient = of_module(module, node)(image_of())
    wanted, by_image = analysis.of_layers(stages, node)(image_of())
    assert response == pytest.approx(wanted, rel=1e-10)
    np.testing.assert_allclose(gradient, by_image, rtol=0, atol=1e-10 * np.abs(by_image).max())
    assert gradient.any()


def test_the_module_itself_has_nodes_and_its_parameters_no_gradients():
    _, module = digits_both("DCNv2")
    of_node = of_module(module, Node(channel=4))
    with torch.no_grad():
        response, gradient = of_node(image_of())
        assert response == module(torch.from_numpy(image_of()[None]))[0, 4].item()
    assert gradient.shape == (1, 28, 28)
    assert all(parameter.grad is None for parameter in module.parameters())
    of_inner = of_module(module, Node("conv3", 0, (1, 1)))
    of_inner(image_of())
    of_inner.strengths(image_of())
    of_inner.sampled_layers(image_of())
    assert not any(layer._forward_hooks for layer in module.modules())


def test_the_gradient_of_a_region_of_a_head_is_that_of_differences():
    torch.manual_seed(0)
    head = Head().double().eval()
    rois = torch.tensor([[0, 2.0, 3, 12, 14], [0, 5.0, 4, 19, 16]], dtype=torch.float64)
    of_node = of_module(head, Node(item=1), (rois,))
    image = np.random.default_rng(0).random((1, 20, 20))
    response, gradient = of_node(image)
    features = of_node.forward(image)
    assert response == pytest.approx(np.linalg.norm(features))
    assert features.shape == (5,)
    step = 1e-5
    for place in [(0, 9, 9), (0, 15, 12), (0, 0, 0)]:
        moved = [image.copy(), image.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        difference = (of_node(moved[0])[0] - of_node(moved[1])[0]) / (2 * step)
        assert gradient[place] == pytest.approx(difference, abs=1e-7)
    assert gradient[0, 0, 0] == 0
    assert gradient[0, 9, 9] != 0


def test_the_analyses_take_modules():
    _, module = digits_both("DCNv2", np.float32)
    of_node = of_module(module, Node("conv4", position=(3, 3)))
    images = np.stack([image_of(seed, np.float32) for seed in range(3)])
    field = effective_receptive_field(of_node, images)
    assert 0 < field.size() < 28
    found = error_bounded_saliency(of_node.cosine_error(images[0]), images[0], cell=4, relaxed_steps=20)
    assert found.error <= 0.1
    assert 0 < found.area < 1


def test_what_the_layers_sample_is_what_they_do_without_torch():
    stages, module = digits_both("DCNv2")
    image = image_of()
    wanted = analysis.of_layers(stages, Node("conv4")).sampled_layers(image)
    found = of_module(module, Node("conv4")).sampled_layers(image)
    assert [*wanted, "classifier"] == list(found)
    for name, layer in wanted.items():
        assert layer.geometry == found[name].geometry
        assert layer.scale == found[name].scale
        for array, other in ((layer.offset, found[name].offset), (layer.mask, found[name].mask)):
            assert (array is None) == (other is None)
            if array is not None:
                np.testing.assert_allclose(other, array, rtol=1e-12, atol=1e-12)
    chain = [found[name] for name in wanted]
    assert analysis.trace_sampling(chain, [[3, 3]]).positions.shape == (1, 9**4, 2)
    assert [record.name for record in offset_statistics(found)] == ["conv3", "conv4"]


@pytest.mark.parametrize("variant", ["DCNv1", "DCNv2"])
def test_strengths_are_those_without_torch(variant):
    stages, module = digits_both(variant)
    node = Node("conv4", position=(3, 2))
    wanted = analysis.of_layers(stages, node).strengths(image_of())
    found = of_module(module, node).strengths(image_of())
    assert list(found) == ["conv3", "conv4"]
    for name, values in found.items():
        np.testing.assert_allclose(values, wanted[name], rtol=0, atol=1e-10 * wanted[name].max())
        assert values.any()
    unseen = of_module(module, Node("conv2", 0, (3, 3))).strengths(image_of())
    assert not any(values.any() for values in unseen.values())


class DeformConv2d(nn.Module):
    """A layer as torchvision's: it is given its offsets, and its groups follow from shapes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, 3, 3, dtype=torch.float64))
        self.kernel_size, self.stride, self.padding, self.dilation = (3, 3), (2, 2), (1, 1), (1, 1)

    def forward(self, input, offset, mask=None):  # noqa: A002 - torchvision's name
        window = self.stride, self.padding, self.dilation
        return dcn_np.torch.deform_conv2d(input, offset, self.weight, None, *window, mask)


class Given(nn.Module):
    """A network whose layer is given offsets and masks by branches of its own, the mask by name."""

    def __init__(self):
        super().__init__()
        self.offsets = nn.Conv2d(2, 2 * 2 * 9, 3, 2, 1, dtype=torch.float64)
        self.masks = nn.Conv2d(2, 2 * 9, 3, 2, 1, dtype=torch.float64)
        self.pool = nn.MaxPool2d(2)
        self.same = nn.Conv2d(2, 2, 3, padding="same", dtype=torch.float64)
        self.deform = DeformConv2d()

    def forward(self, x):
        x = self.same(self.pool(x))
        return self.deform(x, self.offsets(x), mask=torch.sigmoid(self.masks(x)))


@pytest.mark.parametrize("variant", ["plain", "DCNv2"])
def test_a_view_is_that_without_torch(variant):
    (stages, module), node = digits_both(variant), Node("conv4", position=(2, 3))
    layers, module = (
        analysis.view_node(of_node, image_of(), relaxed_steps=2)
        for of_node in (analysis.of_layers(stages, node), of_module(module, node))
    )
    np.testing.assert_allclose(module.positions, layers.positions, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(module.place, layers.place)
    if variant == "plain":
        assert module.strength is None
    else:
        np.testing.assert_allclose(module.strength, layers.strength, rtol=1e-6)


def test_a_module_without_deformable_convolutions_has_no_strengths():
    of_node = of_module(nn.Conv2d(1, 2, 3).eval(), Node(position=(1, 1)))
    assert of_node.strengths(np.ones((1, 6, 6), "float32")) == {}


def test_layers_that_are_given_their_offsets():
    torch.manual_seed(1)
    module, image = Given().eval(), np.random.default_rng(2).normal(size=(2, 24, 20))
    of_node = of_module(module, Node(channel=1, position=(2, 2)))
    found = of_node.sampled_layers(image)
    assert list(found) == ["pool", "offsets", "masks", "deform"]
    layer = found["deform"]
    assert (layer.offset_groups, layer.scale, layer.geometry.input) == (2, (2, 2), (12, 10))
    x = module.same(module.pool(torch.from_numpy(image[None])))
    np.testing.assert_array_equal(layer.offset, module.offsets(x).detach())
    np.testing.assert_array_equal(layer.mask, torch.sigmoid(module.masks(x)).detach())
    offset = module.offsets(x).detach().requires_grad_()
    module.deform(x, offset, torch.sigmoid(module.masks(x)))[0, 1, 2, 2].backward()
    by_position = offset.grad.numpy().reshape(1, 2, 9, 2, 6, 5)
    strengths = of_node.strengths(image)["deform"]
    np.testing.assert_allclose(strengths, np.linalg.norm(by_position, axis=3), rtol=1e-12, atol=1e-14)


class ModulatedDeformConv2dPack(DeformConv2d):
    """A layer as mmcv's, with the branch that makes offsets and masks."""

    def __init__(self):
        super().__init__()
        self.deform_groups = 2
        self.conv_offset = nn.Conv2d(2, 3 * 2 * 9, 3, 2, 1, dtype=torch.float64)

    def forward(self, x):
        made = self.conv_offset(x)
        return super().forward(x, made[:, :36], torch.sigmoid(made[:, 36:]))


def test_layers_with_the_branch_of_mmcv():
    torch.manual_seed(2)
    layer, image = ModulatedDeformConv2dPack().eval(), np.random.default_rng(2).normal(size=(2, 12, 10))
    of_node = of_module(nn.Sequential(layer).eval(), Node(channel=1, position=(2, 2)))
    found = of_node.sampled_layers(image)
    assert list(found) == ["0"]
    made = layer.conv_offset(torch.from_numpy(image[None])).detach()
    np.testing.assert_array_equal(found["0"].offset, made[:, :36])
    np.testing.assert_array_equal(found["0"].mask, torch.sigmoid(made[:, 36:]))
    assert of_node.strengths(image)["0"].shape == (1, 2, 9, 6, 5)
    del layer.deform_groups
    with pytest.raises(TypeError, match="a ModulatedDeformConv2dPack is called without offsets"):
        of_node.sampled_layers(image)


def test_of_a_layer_called_twice_the_last_output_is_looked_at():
    layer = nn.Conv2d(1, 1, 1, bias=False).double()
    layer.weight.data[:] = 3
    module = nn.Sequential(layer, nn.Identity(), layer).eval()
    response, gradient = of_module(module, Node("0", 0, (0, 0)))(np.ones((1, 2, 2)))
    assert (response, gradient.sum()) == (9, 9)


def test_poolings_that_round_up_are_left_out():
    module = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 2, 1)).eval()
    found = of_module(module, Node()).sampled_layers(np.ones((1, 9, 9)))
    assert {name: layer.geometry.output for name, layer in found.items()} == {"1": (3, 3)}


def test_a_call_is_one_forward_and_one_backward():
    calls = {"forward": 0, "backward": 0, "weight": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            calls["forward"] += 1
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            calls["backward"] += 1
            calls["weight"] += ctx.needs_input_grad[1]
            return grad, None

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return Counted.apply(x, self.weight)

    of_module(Module().eval(), Node(channel=0, position=(1, 1)))(np.ones((1, 4, 4)))
    assert (calls["forward"], calls["backward"]) == (1, 1)


def test_the_benchmark_compares_a_receptive_field_with_a_forward_and_a_backward(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = importlib.import_module("analysis")
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    line = benchmark.receptive_field(128)
    field, plain = re.search(r"128 x 128: ([\d.]+) s; a forward and a backward: ([\d.]+) s", line).groups()
    assert 0 < float(field) < 20 * float(plain)


def test_arrays_of_torch_are_read():
    offset, mask = torch.randn(1, 18, 5, 5, dtype=torch.float64), torch.rand(1, 9, 5, 5, dtype=torch.float64)
    found = analysis.sampling_positions(offset, 3, padding=1)
    np.testing.assert_array_equal(found, analysis.sampling_positions(offset.numpy(), 3, padding=1))
    layer = analysis.SampledLayer((5, 5), 3, padding=1, offset=offset, mask=mask)
    np.testing.assert_array_equal(layer.mask, mask.numpy())
    x, weight = torch.randn(1, 2, 5, 5, dtype=torch.float64), torch.randn(1, 2, 3, 3, dtype=torch.float64)
    arrays = torch.ones(1, 1, 5, 5, dtype=torch.float64), x, offset, mask, weight
    strengths = analysis.effective_sampling(*arrays, padding=1)
    wanted = analysis.effective_sampling(*(array.numpy() for array in arrays), padding=1)
    np.testing.assert_array_equal(strengths, wanted)
    with pytest.raises(TypeError, match=r"offset is a torch\.Tensor that requires a gradient"):
        analysis.sampling_positions(offset.requires_grad_(), 3)


def test_hostile_arguments_are_refused():
    _, module = digits_both("DCNv1")
    for given, kind, message in (
        ((lambda x: x, Node()), TypeError, "module is .*; wanted a torch.nn.Module"),
        ((module, Node("conv9")), ValueError, r"node.layer is 'conv9'; the module has \['conv1'"),
        ((nn.Dropout(), Node()), ValueError, r"training mode.*wanted module\.eval\(\)"),
    ):
        with pytest.raises(kind, match=message):
            of_module(*given)
    with pytest.raises(ValueError, match=r"position\[0\] is 7; .*wanted 0 to 6"):
        of_module(module, Node("conv4", 0, (7, 0)))(image_of())


class Odd(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output, self.unused = output, nn.Identity()

    def forward(self, x):
        return self.output(x)


def test_outputs_that_have_no_node_are_refused():
    for module, node, kind, message in (
        (Odd(lambda x: (x, x)), Node(), TypeError, "the output of 'the module' is .*; wanted a Tensor"),
        (Odd(lambda x: x.detach()), Node(), ValueError, "the node does not depend on the image"),
        (Odd(lambda x: x), Node("unused"), ValueError, "the module does not call 'unused'"),
    ):
        with pytest.raises(kind, match=message):
            of_module(module.eval(), node)(np.ones((1, 4, 4)))


# ---- heads over regions


class RegionHead(nn.Module):
    """A detector's head over a pooling that is a module."""

    def __init__(self, pool):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 4, 3, stride=2, padding=1), pool
        self.fc = nn.Linear(4 * 6, 6)
        self.after = nn.Conv2d(4, 2, 1)

    def forward(self, x, rois):
        pooled = self.pool(self.conv(x), rois)
        self.after(pooled)
        return torch.relu(self.fc(pooled.flatten(1)))


NUMBERS = {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2, "gamma": 0.2}
ROIS = np.array([[0, 3.3, 2.2, 17.1, 14.6], [0, 8.4, 5.7, 21.3, 18.2]])
POOLINGS = {
    "DCNv1": ("DeformRoIPool", {}),
    "DCNv2": ("ModulatedDeformRoIPool", {}),
    "separate branches": ("ModulatedDeformRoIPool", {"shared_branch": False, "mask_activation": "2*sigmoid"}),
    "position-sensitive": ("ModulatedDeformRoIPool", {"position_sensitive": True}),
}


def head_both(kind):
    """A head with NumPy and with torch, of the same weights; bins move."""
    name, options = POOLINGS[kind]
    options = {"hidden_channels": 5} | NUMBERS | options
    module = RegionHead(getattr(dcn_np.torch, name)(4, **options)).double().eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.3, tuple(parameter.shape))))
    made = {"rng": 0, "dtype": np.float64}
    stages = {
        "conv": layers.Conv2d(1, 4, 3, stride=2, padding=1, **made),
        "pool": getattr(layers, name)(4, **options, **made),
        "fc": layers.Conv2d(4, 6, (2, 3), **made),
        "relu": analysis.ReLU(),
    }
    state = {key: value.numpy() for key, value in module.state_dict().items()}
    state["fc.weight"] = state["fc.weight"].reshape(6, 4, 2, 3)
    for stage in ("conv", "pool", "fc"):
        own = {key: state[f"{stage}.{key}"] for key in stages[stage].state_dict()}
        stages[stage].load_state_dict(own)
    return stages, module


@pytest.mark.parametrize("kind", POOLINGS)
def test_a_view_of_a_region_is_that_without_torch(kind):
    stages, module = head_both(kind)
    image = np.random.default_rng(1).random((1, 22, 26))
    of_stages = analysis.of_layers(stages, Node(item=1), ROIS)
    of_torch = of_module(module, Node(item=1), (torch.from_numpy(ROIS),))
    wanted, found = (
        analysis.view_node(of_node, image, relaxed_steps=2, epsilon=0.01, cell=4)
        for of_node in (of_stages, of_torch)
    )
    assert found.layer == "pool"
    for name in ("place", "positions", "modulation", "strength", "box"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.field.field, wanted.field.field, rtol=0, atol=1e-12)
    assert found.region.error <= 0.01
    assert list(of_torch.sampled_layers(image)) == ["conv"]
    with pytest.raises(ValueError, match="item is 2; 'pool' pools 2 regions"):
        analysis.view_node(of_module(module, Node(item=2), (torch.from_numpy(ROIS),)), image)


def test_poolings_that_are_called_after_the_node_are_not_its_own():
    _, module = head_both("DCNv2")
    image, rois = np.random.default_rng(1).random((1, 22, 26)), (torch.from_numpy(ROIS),)
    assert of_module(module, Node("conv"), rois).sampled_regions(image) == {}
    assert list(of_module(module, Node("pool"), rois).sampled_regions(image)) == ["pool"]
    assert list(of_module(module, Node("fc"), rois).sampled_regions(image)) == ["pool"]
    view = analysis.view_node(
        of_module(module, Node("conv", position=(4, 4)), rois), image, relaxed_steps=1, cell=4
    )
    assert (view.layer, view.box) == ("conv", None)


class RoIAlign(nn.Module):
    """A pooling as torchvision's, aligned."""

    def __init__(self, aligned=True):
        super().__init__()
        self.output_size, self.spatial_scale, self.sampling_ratio = (2, 3), 0.5, -1
        self.aligned = aligned

    def forward(self, input, rois):  # noqa: A002 - torchvision's name
        return dcn_np.torch.roi_align(input, rois, (2, 3), 0.5, 0)


def test_bins_that_do_not_move_have_strengths_too():
    module = RegionHead(RoIAlign()).double().eval()
    image, rois = np.random.default_rng(1).random((1, 22, 26)), torch.from_numpy(ROIS)
    of_node = of_module(module, Node(item=1), (rois,))
    view = analysis.view_node(of_node, image, relaxed_steps=1, cell=4)
    np.testing.assert_allclose(
        view.positions, analysis.SampledRegions(ROIS, (2, 3), 0.5).positions[1].reshape(2, 6).T
    )
    x = module.conv(torch.from_numpy(image[None])).detach()
    offset = torch.zeros(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    pooled = dcn_np.torch.deform_roi_pool(x, rois, offset, (2, 3), 0.5, 0, 1.0)
    torch.relu(module.fc(pooled.flatten(1)))[1].norm().backward()
    pixels = 0.5 * (rois[1, 3:] - rois[1, 1:3])
    wanted = (offset.grad[1] / pixels[:, None, None]).norm(dim=0).reshape(6)
    np.testing.assert_allclose(view.strength, wanted, rtol=1e-9)
    module.pool.forward = lambda x, rois: dcn_np.torch.roi_align(x, rois[0], (2, 3), 0.5, 0)
    with pytest.raises(
        TypeError, match=r"a RoIAlign is called with the regions .*; wanted a Tensor \(R, 5\)"
    ):
        of_module(module, Node(), ([rois],)).sampled_regions(image)
    del module.pool.forward
    module.pool.aligned = False  # half a pixel apart from what dcn_np tells
    assert of_node.sampled_regions(image) == {}


class DeformRoIPool(nn.Module):
    """A pooling that is given its offsets, as mmcv's."""

    def __init__(self):
        super().__init__()
        self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma = (2, 3), 0.5, 2, 0.2

    def forward(self, input, rois, offset=None):  # noqa: A002 - mmcv's name
        return dcn_np.torch.deform_roi_pool(input, rois, offset, (2, 3), 0.5, 2, 0.2)


class ModulatedDeformRoIPoolPack(DeformRoIPool):
    """A pooling with branches as mmcv's."""

    def __init__(self):
        super().__init__()
        self.offset_fc = nn.Linear(24, 12)
        self.mask_fc = nn.Sequential(nn.Linear(24, 6), nn.Sigmoid())

    def forward(self, input, rois):  # noqa: A002 - mmcv's name
        numbers = (2, 3), 0.5, 2
        features = dcn_np.torch.roi_align(input, rois, *numbers).flatten(1)
        offset = self.offset_fc(features).view(-1, 2, 2, 3)
        mask = self.mask_fc(features).view(-1, 1, 2, 3)
        return dcn_np.torch.modulated_deform_roi_pool(input, rois, offset, mask, *numbers, 0.2)


def test_poolings_that_are_given_offsets_or_have_the_branches_of_mmcv():
    torch.manual_seed(3)
    image, rois = np.random.default_rng(1).random((1, 22, 26)), torch.from_numpy(ROIS)
    packed = RegionHead(ModulatedDeformRoIPoolPack()).double().eval()
    found = of_module(packed, Node(item=1), (rois,)).sampled_regions(image)["pool"]
    x = packed.conv(torch.from_numpy(image[None]))
    features = dcn_np.torch.roi_align(x, rois, (2, 3), 0.5, 2).flatten(1)
    np.testing.assert_allclose(found.offset, packed.pool.offset_fc(features).view(2, 2, 2, 3).detach())
    np.testing.assert_allclose(found.mask, packed.pool.mask_fc(features).view(2, 1, 2, 3).detach())

    class Given(RegionHead):
        def forward(self, x, rois):
            offset = torch.full((2, 2, 2, 3), 0.7, dtype=x.dtype)
            return self.fc(self.pool(self.conv(x), rois=rois, offset=offset).flatten(1))

    given = Given(DeformRoIPool()).double().eval()
    of_node = of_module(given, Node(item=0), (rois,))
    found = of_node.sampled_regions(image)["pool"]
    assert (found.offset == 0.7).all()
    assert (found.mask, found.gamma) == (None, 0.2)
    assert of_node.strengths(image)["pool"].shape == (2, 2, 3)
