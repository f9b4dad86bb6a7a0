"""Modules that pool over regions in dcn_np.torch: what they compute, how they begin, and what torch asks."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import dcn_np
from dcn_np import layers as plain_layers
from dcn_np import torch as dcn_torch
from dcn_np.torch import DeformRoIPool, ModulatedDeformRoIPool

SIZES = {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2, "gamma": 0.2}
ROIS = [[1, 2.25, 1.75, 11.5, 8.5], [0, 0.75, 3.25, 7.5, 12.25], [1, -3.25, 9.5, 6.75, 17.25]]
BINS = 6
KINDS = {
    "offsets": (DeformRoIPool, {}),
    "shared": (ModulatedDeformRoIPool, {}),
    "twice": (ModulatedDeformRoIPool, {"mask_activation": "2*sigmoid"}),
    "separate": (ModulatedDeformRoIPool, {"shared_branch": False}),
    "position-sensitive": (DeformRoIPool, {"position_sensitive": True}),
    "shared, position-sensitive": (ModulatedDeformRoIPool, {"position_sensitive": True}),
}
BRANCHES = {
    "offsets": {"offset_fc": [0, 2, 4]},
    "shared": {"offset_mask_fc": [0, 2, 4]},
    "separate": {"offset_fc": [0, 2, 4], "mask_fc": [0, 2]},
}
EACH = pytest.mark.parametrize("kind", KINDS)


def filled(module):
    """The module with last layers that make numbers too, so that bins move and masks differ."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def built(kind, dtype=torch.float64, **given):
    torch.manual_seed(0)
    module, options = KINDS[kind]
    sizes = {"in_channels": 4, "hidden_channels": 5, "dtype": dtype} | SIZES
    return filled(module(**sizes | options | given))


def problem(dtype=torch.float64, *, grad=True):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64, generator=generator).to(dtype)
    return x.requires_grad_(grad), torch.tensor(ROIS, dtype=dtype)


def by_definition(module, x, rois):
    """The module from the plain functions over arrays and the parameters of the module."""
    sizes = module.output_size, module.spatial_scale

    def pooled(offset, mask):
        if not module.position_sensitive:
            others = module.sampling_ratio, module.gamma
            return dcn_np.modulated_deform_roi_pool(x, rois, offset, mask, *sizes, *others)
        y = dcn_np.deform_psroi_pool(x, rois, offset, 4, 1, *sizes, None, module.sampling_ratio, module.gamma)
        return y if mask is None else y * mask

    def branch(name, layers):
        rows = pooled(None, None).reshape(len(rois), -1)
        for index in layers:
            weight, bias = (module.state_dict()[f"{name}.{index}.{what}"] for what in ("weight", "bias"))
            rows = (rows.relu() if index else rows) @ weight.T + bias
        return rows

    if not isinstance(module, ModulatedDeformRoIPool):
        return pooled(branch("offset_fc", [0, 2, 4]).reshape(-1, 2, 2, 3), None)
    if module.shared_branch:
        rows = branch("offset_mask_fc", [0, 2, 4])
    else:
        rows = torch.cat([branch("offset_fc", [0, 2, 4]), branch("mask_fc", [0, 2])], dim=1)
    factor = 2 if module.mask_activation == "2*sigmoid" else 1
    mask = factor / (1 + torch.exp(-rows[:, 2 * BINS :]))
    return pooled(rows[:, : 2 * BINS].reshape(-1, 2, 2, 3).contiguous(), mask.reshape(-1, 1, 2, 3))


# ---- what is computed


@EACH
def test_the_output_is_that_of_the_definition(kind):
    module, (x, rois) = built(kind), problem(grad=False)
    wanted = by_definition(module, x, rois)
    assert torch.allclose(module(x, rois), wanted, rtol=1e-12, atol=1e-12)


@EACH
def test_gradients(kind):
    module, (x, rois) = built(kind), problem()
    names = [name for name, _ in module.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x, rois))

    assert torch.autograd.gradcheck(call, (x, *module.parameters()))
    module(x, rois).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@EACH
def test_without_regions(kind):
    module, (x, rois) = built(kind), problem()
    y = module(x, rois[:0])
    y.sum().backward()
    assert y.shape == (0, 4, 2, 3)
    assert not x.grad.any()


@EACH
def test_channels_last(kind):
    module, (x, rois) = built(kind), problem(grad=False)
    y = module(x.contiguous(memory_format=torch.channels_last), rois)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, module(x, rois), rtol=1e-12, atol=1e-12)


@EACH
def test_the_numbers_are_those_of_the_layers_without_a_framework(kind):
    module, (x, rois) = built(kind), problem()
    layer = getattr(plain_layers, type(module).__name__)(
        4, hidden_channels=5, dtype=np.float64, **SIZES | KINDS[kind][1]
    )
    layer.load_state_dict({key: value.numpy() for key, value in module.state_dict().items()})
    y = module(x, rois)
    grad_output = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    y.backward(grad_output)
    given = x.detach().numpy(), rois.numpy()
    np.testing.assert_allclose(layer.forward(*given), y.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.backward(grad_output.numpy()), x.grad.numpy(), rtol=1e-11, atol=1e-12)
    for (key, parameter), name in zip(module.named_parameters(), layer.gradients, strict=True):
        found = layer.gradients[name]
        np.testing.assert_allclose(found, parameter.grad.numpy(), rtol=1e-10, atol=1e-12, err_msg=key)


# ---- how they begin


@EACH
def test_a_new_module_is_the_regular_pooling(kind):
    module, options = KINDS[kind]
    made = module(4, hidden_channels=5, dtype=torch.float64, **SIZES | options)
    x, rois = problem(grad=False)
    if made.position_sensitive:
        regular = dcn_np.deform_psroi_pool(x, rois, None, 4, 1, (2, 3), 0.5, None, 2, 0.2)
    else:
        regular = dcn_np.roi_align(x, rois, (2, 3), 0.5, 2)
    masks = 0.5 if module is ModulatedDeformRoIPool and not options.get("mask_activation") else 1
    assert torch.allclose(made(x, rois), masks * regular, rtol=1e-14)


@pytest.mark.parametrize("kind", BRANCHES)
def test_branches_begin_as_in_the_papers(kind):
    torch.manual_seed(1)
    module, options = KINDS[kind]
    made = module(64, (2, 3), **options)
    keys = [
        f"{name}.{index}.{what}"
        for name, layers in BRANCHES[kind].items()
        for index in layers
        for what in ("weight", "bias")
    ]
    state = made.state_dict()
    assert list(state) == keys
    for name, layers in BRANCHES[kind].items():
        *first, last = layers
        channels = BINS * {"offset_fc": 2, "mask_fc": 1, "offset_mask_fc": 3}[name]
        assert state[f"{name}.0.weight"].shape == (1024, 64 * BINS)
        assert state[f"{name}.{last}.weight"].shape == (channels, 1024)
        assert not state[f"{name}.{last}.weight"].any()
        for index in first:
            weight = state[f"{name}.{index}.weight"]
            assert abs(weight.std().item() / 0.01 - 1) < 0.01
            assert abs(weight.mean().item()) < 1e-4
            assert 0.03 < weight.abs().max().item() < 0.07  # normal, not uniform
        assert not any(state[f"{name}.{index}.bias"].any() for index in layers)


@pytest.mark.parametrize("kind", BRANCHES)
def test_branches_learn_as_fast_as_the_rest(kind):
    network = nn.ModuleList([built(kind), dcn_torch.DeformConv2d(4, 4, 3)])
    others, branches = dcn_torch.parameter_groups(network, lr=0.01)
    assert math.isclose(others["lr"], 0.01)
    slower = set(map(id, network[1].conv_offset.parameters()))
    assert set(map(id, branches["params"])) == slower
    assert set(map(id, network[0].parameters())) <= set(map(id, others["params"]))


def test_a_module_learns_where_to_look():
    """The target is what lies beside the regions: bins that move can find it, regular ones cannot."""
    torch.manual_seed(0)
    x = nn.functional.avg_pool2d(torch.randn(2, 3, 24, 24), 5, 1, 2)
    low = 4 + 8 * torch.rand(12, 2)
    rois = torch.cat([torch.arange(12)[:, None] % 2, low, low + 8], dim=1)
    target = dcn_np.roi_align(x, rois + torch.tensor([0, 2, 0, 2, 0]), 2)
    module = DeformRoIPool(3, 2, gamma=0.5, hidden_channels=16)
    optimiser = torch.optim.Adam(module.parameters(), 0.02)
    losses = []
    for _ in range(120):
        optimiser.zero_grad()
        loss = (module(x, rois) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


# ---- what torch asks


@EACH
def test_compiled_without_a_break(kind):
    module, (x, rois) = built(kind), problem()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    y, again = module(x, rois), compiled(x, rois)
    assert torch.allclose(y, again)
    wanted = torch.autograd.grad(y.square().sum(), (x, *module.parameters()))
    found = torch.autograd.grad(again.square().sum(), (x, *compiled.parameters()))
    for one, other in zip(wanted, found, strict=True):
        assert torch.allclose(one, other)


@EACH
def test_exported_for_any_number_of_regions(kind):
    module, (x, rois) = built(kind, torch.float32).eval(), problem(torch.float32, grad=False)
    shapes = {"x": None, "rois": {0: torch.export.Dim("regions", min=2, max=64)}}
    program = torch.export.export(module, (x, rois), dynamic_shapes=shapes)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum(name.startswith("dcn_np.") for name in names) == 2
    more = torch.cat([rois, rois.flip(0)])
    assert torch.allclose(program.module()(x, more), module(x, more), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH
def test_autocast(kind, dtype):
    module, (x, rois) = built(kind, torch.float32), problem(torch.float32)
    exact = module(x, rois).detach()
    with torch.autocast("cpu", dtype):
        y = module(x, rois)
    assert y.dtype == dtype
    assert torch.allclose(y.float(), exact, atol=0.1)
    y.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in (x, *module.parameters()))


@EACH
def test_half_features_beside_regions_in_float32(kind):
    module, (x, rois) = built(kind, torch.bfloat16), problem(torch.bfloat16, grad=False)
    y = module(x, rois.float())
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y, module(x, rois), atol=0.1)


@EACH
def test_modules_are_copied_and_saved(kind, tmp_path):
    module, (x, rois) = built(kind), problem(grad=False)
    torch.save(module.state_dict(), tmp_path / "module.pth")
    options = SIZES | KINDS[kind][1]
    other = KINDS[kind][0](4, hidden_channels=5, dtype=torch.float64, **options)
    other.load_state_dict(torch.load(tmp_path / "module.pth"))
    assert torch.equal(other(x, rois), module(x, rois))
    assert torch.equal(copy.deepcopy(module)(x, rois), module(x, rois))


def test_what_does_not_fit_is_named():
    module, (x, rois) = built("shared"), problem(grad=False)
    with pytest.raises(ValueError, match=r"^x has shape \(2, 3, 7, 9\); wanted \(batch, 4, height, width\)"):
        module(x[:, :3], rois)
    with pytest.raises(ValueError, match=r"^x has 3 axes"):
        module(x[0], rois)
    with pytest.raises(ValueError, match=r"^rois has shape \(3, 4\)"):
        module(x, rois[:, 1:])
    with pytest.raises(TypeError, match=r"^rois has dtype"):
        module(x, rois.float())
    with pytest.raises(ValueError, match="mask_activation is 'tanh'; wanted one of"):
        ModulatedDeformRoIPool(4, 2, hidden_channels=5, mask_activation="tanh")
    with pytest.raises(ValueError, match="sample_per_part is 0; wanted at least 1"):
        built("position-sensitive", sampling_ratio=0)(x, rois)


def test_a_module_writes_itself():
    assert repr(built("separate")).startswith(
        "ModulatedDeformRoIPool(\n  4, output_size=(2, 3), spatial_scale=0.5, sampling_ratio=2, gamma=0.2, "
        "position_sensitive=False\n  (offset_fc)"
    )


# ---- layers of other libraries

SEPARATE, BY_POSITION = {"shared_branch": False}, {"position_sensitive": True}
SAVED = [
    ("mmcv", DeformRoIPool, {}),
    ("mmcv", ModulatedDeformRoIPool, SEPARATE),
    ("CharlesShang", ModulatedDeformRoIPool, BY_POSITION),
    ("chengdazhi", DeformRoIPool, BY_POSITION),
    ("chengdazhi", ModulatedDeformRoIPool, SEPARATE | BY_POSITION),
    ("chengdazhi", ModulatedDeformRoIPool, BY_POSITION),
]


@pytest.mark.parametrize(("library", "module", "options"), SAVED)
def test_layers_of_other_libraries_are_loaded(library, module, options):
    torch.manual_seed(0)
    saved, other = (filled(module(4, hidden_channels=5, **SIZES | options)) for _ in range(2))
    state = {f"roi_layers.0.{key}": value for key, value in saved.state_dict().items()}
    x, rois = problem(torch.float32, grad=False)
    assert not torch.equal(other(x, rois), saved(x, rois))
    dcn_torch.load_state_dict_from(other, state | {"fc": x}, "roi_layers.0", library=library)
    assert torch.equal(other(x, rois), saved(x, rois))


def test_what_a_module_cannot_be():
    state = built("separate").state_dict()

    def load(kind, library="mmcv", **given):
        dcn_torch.load_state_dict_from(built(kind, **given), state, library=library)

    load("separate")
    with pytest.raises(ValueError, match=r"the layer '' has .*'mask_fc.0.bias'.* wants .*offset_mask_fc"):
        load("shared")
    with pytest.raises(ValueError, match=r"the layer '' has .*'mask_fc.0.bias'.* wants .*offset_fc"):
        load("offsets")
    with pytest.raises(ValueError, match="masks go through sigmoid; wanted a module with that"):
        load("separate", mask_activation="2*sigmoid")
    with pytest.raises(ValueError, match=r"chengdazhi pools with position_sensitive=True; .* not False"):
        load("separate", "chengdazhi")
    with pytest.raises(
        ValueError, match=r"offset_fc.4.weight of the layer '' has shape \(12, 5\); .* \(8, 5"
    ):
        load("separate", output_size=2, in_channels=6)
    with pytest.raises(ValueError, match="library is 'torchvision'; wanted one of 'mmcv'"):
        load("separate", "torchvision")
    with pytest.raises(TypeError, match="module is a Linear; wanted a deformable convolution, or pooling"):
        dcn_torch.load_state_dict_from(nn.Linear(2, 2), state, library="mmcv")
