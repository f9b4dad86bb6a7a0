"""Pooling over regions and the mimicking loss in dcn_np.torch: autograd, compilation, export, autocast."""

import pytest
import torch
from torch import nn

import dcn_np
from dcn_np import _torch_regions
from dcn_np import torch as dcn_torch

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = {"output_size": (2, 3), "spatial_scale": 0.5}
# Of each operator: its arrays after x and rois, and its numbers.
OPERATORS = {
    "roi_align": ((), SIZES | {"sampling_ratio": 2}),
    "deform_roi_pool": (("offset",), SIZES | {"sampling_ratio": 0, "gamma": 0.2}),
    "modulated_deform_roi_pool": (("offset", "mask"), SIZES | {"sampling_ratio": 2}),
    "deform_psroi_pool": (
        ("class offset",),
        SIZES | {"output_dim": 2, "group_size": 2, "part_size": (3, 2), "sample_per_part": 2},
    ),
}


def problem_of(operator, dtype=torch.float64, *, grad=True, position_dtype=None):
    """The tensors x, rois and others, and the numbers; places are no whole numbers, where slopes jump."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad)

    positions, numbers = OPERATORS[operator]
    position_dtype = dtype if position_dtype is None else position_dtype
    # The last one lies across the border, where samples are clamped, faded or left out.
    corners = [[1, 2.25, 1.75, 11.5, 8.5], [0, 0.75, 3.25, 7.5, 12.25], [1, -3.25, 9.5, 6.75, 17.25]]
    shapes = {"offset": (3, 2, 2, 3), "mask": (3, 1, 2, 3), "class offset": (3, 4, 3, 2)}
    rois = torch.tensor(corners).to(position_dtype)
    others = [normal(*shapes[name], dtype=position_dtype) for name in positions]
    return [normal(2, 8, 7, 9), rois, *others], numbers


def call_of(operator, numbers):
    return lambda *tensors: getattr(dcn_torch, operator)(*tensors, **numbers)


def differentiable(tensors):
    return [tensor for index, tensor in enumerate(tensors) if index != 1]


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients(operator):
    tensors, numbers = problem_of(operator)
    assert torch.autograd.gradcheck(call_of(operator, numbers), tensors)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_numbers_are_those_of_the_plain_functions(operator, dtype):
    tensors, numbers = problem_of(operator, dtype)
    y = call_of(operator, numbers)(*tensors)
    grad_output = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype)
    y.backward(grad_output)
    plain = [tensor.detach() for tensor in tensors]
    assert y.dtype == dtype
    assert torch.equal(y, getattr(dcn_np, operator)(*plain, **numbers))
    found = getattr(dcn_np, f"{operator}_backward")(grad_output, *plain, **numbers)
    wanted = [gradient for gradient in found if gradient is not None]
    for tensor, gradient in zip(differentiable(tensors), wanted, strict=True):
        assert gradient.abs().sum() > 0
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("operator", OPERATORS)
def test_regions_have_no_gradient(operator):
    tensors, numbers = problem_of(operator)
    tensors[1].requires_grad_()
    call_of(operator, numbers)(*tensors).sum().backward()
    assert tensors[1].grad is None
    assert all(tensor.grad is not None for tensor in differentiable(tensors))


BACKWARDS = {"roi_align": "modulated_deform_roi_pool", "deform_roi_pool": "modulated_deform_roi_pool"}

LAST = {
    "roi_align": "x",
    "deform_roi_pool": "offset",
    "modulated_deform_roi_pool": "mask",
    "deform_psroi_pool": "offset",
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_only_what_is_needed_is_computed(operator, monkeypatch):
    asked = []
    name = f"{BACKWARDS.get(operator, operator)}_backward"
    backward = getattr(dcn_np, name)

    def spy(*arguments, needs, **keywords):
        asked.append(set(needs))
        return backward(*arguments, needs=needs, **keywords)

    monkeypatch.setattr(dcn_np, name, spy)
    tensors, numbers = problem_of(operator, grad=False)
    last = differentiable(tensors)[-1].requires_grad_()
    call_of(operator, numbers)(*tensors).sum().backward()
    assert asked == [{LAST[operator]}]
    assert [tensor.grad is not None for tensor in tensors] == [tensor is last for tensor in tensors]


@pytest.mark.parametrize("operator", ["deform_roi_pool", "deform_psroi_pool"])
def test_without_offsets(operator):
    (x, rois, _), numbers = problem_of(operator)
    numbers = {name: value for name, value in numbers.items() if name != "part_size"}
    y = getattr(dcn_torch, operator)(x, rois, None, **numbers)
    y.square().sum().backward()
    plain = x.detach()
    assert torch.equal(y, getattr(dcn_np, operator)(plain, rois, None, **numbers))
    backward = getattr(dcn_np, f"{operator}_backward")
    assert torch.equal(x.grad, backward(2 * y.detach(), plain, rois, None, **numbers).x)


def test_the_grid_of_offsets_is_that_of_the_bins():
    (x, rois, _), numbers = problem_of("deform_psroi_pool", grad=False)
    offset = torch.randn(3, 4, 2, 3, dtype=x.dtype)
    y = dcn_torch.deform_psroi_pool(x, rois, offset, **numbers | {"part_size": None})
    assert torch.equal(y, dcn_np.deform_psroi_pool(x, rois, offset, **numbers | {"part_size": None}))


def of_the_library(operator, tensors, numbers):
    """The operator and its backward as torch holds them, and the arguments of the forward."""
    scale, output = numbers["spatial_scale"], list(numbers["output_size"])
    if operator == "deform_psroi_pool":
        sizes = (2, 2, output, scale, list(numbers["part_size"]), numbers["sample_per_part"], 0.1)
        return _torch_regions._pool_by_position, _torch_regions._pool_by_position_backward, (*tensors, *sizes)
    arrays = (*tensors, *[None] * (4 - len(tensors)))
    sizes = (output, scale, numbers["sampling_ratio"], numbers.get("gamma", 0.1))
    return _torch_regions._pool, _torch_regions._pool_backward, (*arrays, *sizes)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_keep_the_rules_of_torch(operator, layout):
    tensors, numbers = problem_of(operator, torch.float32)
    tensors[0] = tensors[0].detach().contiguous(memory_format=layout).requires_grad_()
    forward, backward, arguments = of_the_library(operator, tensors, numbers)
    assert set(torch.library.opcheck(forward, arguments).values()) == {"SUCCESS"}
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    y = forward(*plain)
    assert y.is_contiguous(memory_format=layout)
    count = 3 if operator == "deform_psroi_pool" else 4
    for needs in ([True, False, *[True] * (count - 2)], [False] * (count - 1) + [True]):
        found = torch.library.opcheck(backward, (y, *plain, needs))
        assert set(found.values()) == {"SUCCESS"}


class Pool(nn.Module):
    def __init__(self, operator, numbers):
        super().__init__()
        self.operator, self.numbers = operator, numbers

    def forward(self, x, rois, *others):
        return getattr(dcn_torch, self.operator)(x * 2, rois, *others, **self.numbers).relu()


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled_without_a_break(operator):
    tensors, numbers = problem_of(operator)
    module = Pool(operator, numbers)
    y = module(*tensors)
    wanted = torch.autograd.grad(y.square().sum(), differentiable(tensors))
    again = torch.compile(module, fullgraph=True, backend="aot_eager")(*tensors)
    found = torch.autograd.grad(again.square().sum(), differentiable(tensors))
    assert torch.allclose(y, again)
    for one, other in zip(wanted, found, strict=True):
        assert torch.allclose(one, other)


@pytest.mark.parametrize("operator", OPERATORS)
def test_exported_for_any_number_of_regions(operator):
    tensors, numbers = problem_of(operator, torch.float32, grad=False)
    module, regions = Pool(operator, numbers), torch.export.Dim("regions", min=2, max=64)
    others = tuple({0: regions} for _ in tensors[2:])
    shapes = {"x": None, "rois": {0: regions}} | ({"others": others} if others else {})
    program = torch.export.export(module, tuple(tensors), dynamic_shapes=shapes)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum(name.startswith("dcn_np.") for name in names) == 1
    other = [tensors[0], *[torch.cat([tensor, tensor.flip(0)]) for tensor in tensors[1:]]]
    assert torch.equal(program.module()(*other), module(*other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_keeps_places_in_float32(operator, dtype):
    tensors, numbers = problem_of(operator, torch.float32)
    with torch.autocast("cpu", dtype):
        y = call_of(operator, numbers)(*tensors)
    plain = [tensors[0].detach().to(dtype), *[tensor.detach() for tensor in tensors[1:]]]
    assert y.dtype == dtype
    assert torch.equal(y, getattr(dcn_np, operator)(*plain, **numbers))
    y.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in differentiable(tensors))


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_have_no_gradients(operator):
    tensors, numbers = problem_of(operator)
    y = call_of(operator, numbers)(*tensors)
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{BACKWARDS.get(operator, operator)}_backward"):
        grad.sum().backward()


def entries_of(operator, batched, count=3, **keywords):
    """Tensors of which some have one axis more, which may be any; and those of each entry."""
    tensors, numbers = problem_of(operator, grad=False, **keywords)
    dims = [dim if one in batched else None for one, dim in zip("xrop", (1, 0, 2, 0), strict=True)]
    dims = dims[: len(tensors)]
    stacked = [
        tensor
        if dim is None
        else torch.stack([tensor + (0.25 * i if j != 1 else 0) for i in range(count)], dim)
        for j, (tensor, dim) in enumerate(zip(tensors, dims, strict=True))
    ]
    if "r" in batched:
        stacked[1][1, :, 0] = 0  # other images in another entry
    entries = [
        [a if dim is None else a.select(dim, i) for a, dim in zip(stacked, dims, strict=True)]
        for i in range(count)
    ]
    return stacked, tuple(dims), entries, numbers


@pytest.mark.parametrize("batched", ["xrop", "x", "r", "xr", "op", "xo"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap(operator, batched, monkeypatch):
    """One call for all entries, forward and backward, gives what a call for each does."""
    stacked, dims, entries, numbers = entries_of(operator, batched)
    if set(dims) == {None}:
        pytest.skip("nothing with another axis")
    call = call_of(operator, numbers)
    places = [i for i in range(len(stacked)) if i != 1]

    def loss(*tensors):
        return call(*tensors).sin().sum()

    def gradients(*tensors):
        differentiated = [tensors[i].requires_grad_() for i in places]
        return torch.autograd.grad(loss(*tensors), differentiated)

    wanted = [(call(*entry), gradients(*[a.clone() for a in entry])) for entry in entries]
    calls = []
    name = BACKWARDS.get(operator, operator)
    for function in (name, f"{name}_backward"):
        plain = getattr(dcn_np, function)
        monkeypatch.setattr(
            dcn_np, function, lambda *a, plain=plain, **k: calls.append(plain.__name__) or plain(*a, **k)
        )
    got = torch.vmap(call, dims)(*stacked)
    found = torch.vmap(torch.func.grad(loss, tuple(places)), dims)(*stacked)
    assert calls == [name, name, f"{name}_backward"]
    for i, (y, gradient) in enumerate(wanted):
        assert torch.equal(got[i], y)
        assert all(torch.equal(one[i], other) for one, other in zip(found, gradient, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap_over_more_images_than_a_half_can_name(operator):
    """bfloat16 has no 257: each entry is a call of its own."""
    stacked, dims, entries, numbers = entries_of(operator, "x", 140, dtype=torch.bfloat16)
    call = call_of(operator, numbers)
    got = torch.vmap(call, dims)(*stacked)
    assert all(torch.equal(got[i], call(*entry)) for i, entry in enumerate(entries))
    wanted = torch.func.grad(lambda *a: call(*a).sum())(*entries[139])
    found = torch.vmap(torch.func.grad(lambda *a: call(*a).sum()), dims)(*stacked)
    assert torch.equal(found[139], wanted)


@pytest.mark.parametrize("image", [2, -1, 0.5, float("nan")])
@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap_reads_no_image_of_another_entry(operator, image):
    stacked, dims, _, numbers = entries_of(operator, "xr")
    stacked[1][0, 2, 0] = image
    with pytest.raises(ValueError, match=r"^rois\[2\] is"):
        torch.vmap(call_of(operator, numbers), dims)(*stacked)


def test_vmap_rounds_no_part_of_an_image_away():
    """140.5 is 140 in bfloat16."""
    stacked, dims, _, numbers = entries_of("roi_align", "xr", 100, dtype=torch.bfloat16)
    stacked[1][70, 2, 0] = 0.5
    with pytest.raises(ValueError, match=r"^rois\[212\] is"):
        torch.vmap(call_of("roi_align", numbers), dims)(*stacked)


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_does_not_fit_is_named(operator):
    (x, rois, *others), numbers = problem_of(operator, grad=False)
    call = call_of(operator, numbers)
    with pytest.raises(ValueError, match=r"^rois has shape \(3, 4\); wanted"):
        call(x, rois[:, :4], *others)
    with pytest.raises(ValueError, match=r"rois\[0\] is .*x has a batch of 1"):
        call(x[:1], rois, *others)
    with pytest.raises(TypeError, match=r"^rois has dtype"):
        call(x, rois.float(), *others)
    with pytest.raises(ValueError, match=r"^output_size has 3 entries"):
        call_of(operator, numbers | {"output_size": (1, 2, 3)})(x, rois, *others)


# ---- the mimicking loss


def features_of(dtype=torch.float64, *, grad=True):
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator).to(dtype)
    return [features.clone().requires_grad_(grad) for features in pair]


WEIGHTS = {
    "none": lambda dtype: None,
    "numbers": lambda dtype: torch.tensor([0.5, 0, 1, -2, 3], dtype=dtype),
    "mask": lambda dtype: torch.tensor([True, False, True, True, False]),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_loss_is_that_of_the_plain_function(dtype, weights):
    features, weights = features_of(dtype), WEIGHTS[weights](dtype)
    loss = dcn_torch.feature_mimic_loss(*features, weights)
    (0.1 * loss).backward()
    plain = [tensor.detach() for tensor in features]
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = torch.tensor(dcn_np.feature_mimic_loss(*plain, weights), dtype=loss.dtype)
    assert torch.equal(loss, wanted)
    factor = torch.tensor(0.1, dtype=loss.dtype).item()
    gradients = dcn_np.feature_mimic_loss_backward(factor, *plain, weights)
    for tensor, gradient in zip(features, gradients, strict=True):
        assert gradient.abs().sum() > 0
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_of_the_loss(weights):
    features, weights = features_of(), WEIGHTS[weights](torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: dcn_torch.feature_mimic_loss(a, b, weights), features)


def test_vmap_of_the_loss():
    features, weights = features_of(grad=False), WEIGHTS["numbers"](torch.float64)
    stacked = [torch.stack([tensor + i for i in range(3)]) for tensor in features]
    got = torch.vmap(dcn_torch.feature_mimic_loss, (0, 0, None))(*stacked, weights)
    found = torch.vmap(torch.func.grad(dcn_torch.feature_mimic_loss, (0, 1)), (0, 0, None))(*stacked, weights)
    for i in range(3):
        entry = [tensor[i].clone().requires_grad_() for tensor in stacked]
        loss = dcn_torch.feature_mimic_loss(*entry, weights)
        assert torch.equal(got[i], loss)
        for one, other in zip(found, torch.autograd.grad(loss, entry), strict=True):
            assert torch.equal(one[i], other)


def test_weights_have_no_gradient():
    features, weights = features_of(), torch.rand(5, dtype=torch.float64, requires_grad=True)
    dcn_torch.feature_mimic_loss(*features, weights).backward()
    assert weights.grad is None
    wanted = dcn_np.feature_mimic_loss_backward(1.0, *[t.detach() for t in (*features, weights)])
    assert all(torch.equal(tensor.grad, want) for tensor, want in zip(features, wanted, strict=True))


def test_one_of_the_features_is_fixed():
    rcnn, features = features_of()
    dcn_torch.feature_mimic_loss(rcnn.detach(), features).backward()
    assert rcnn.grad is None
    _, wanted = dcn_np.feature_mimic_loss_backward(1.0, rcnn.detach(), features.detach())
    assert torch.equal(features.grad, wanted)


@pytest.mark.parametrize("weights", ["none", "numbers"])
def test_the_loss_keeps_the_rules_of_torch(weights):
    features, weights = features_of(torch.float32), WEIGHTS[weights](torch.float32)
    features[1] = features[1].detach().T.contiguous().T.requires_grad_()
    arguments = (*features, weights)
    assert set(torch.library.opcheck(_torch_regions._mimic, arguments).values()) == {"SUCCESS"}
    plain = [tensor.detach() for tensor in features]
    for needs in ([True, True, False], [False, True, False]):
        backward = (torch.tensor(0.1), *plain, weights, needs)
        found = torch.library.opcheck(_torch_regions._mimic_backward, backward)
        assert set(found.values()) == {"SUCCESS"}


def test_the_loss_is_compiled_without_a_break():
    features = features_of()
    compiled = torch.compile(dcn_torch.feature_mimic_loss, fullgraph=True, backend="aot_eager")
    loss, again = dcn_torch.feature_mimic_loss(*features), compiled(*features)
    assert torch.equal(loss, again)
    pairs = (torch.autograd.grad(one, features) for one in (loss, again))
    assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_loss_is_in_float32_under_autocast(weights):
    (rcnn, features), weights = features_of(torch.float32), WEIGHTS[weights](torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dcn_torch.feature_mimic_loss(rcnn.bfloat16(), features, weights)
    loss.backward()
    assert loss.dtype == torch.float32
    factors = weights if weights is None else weights.float()
    wanted = dcn_np.feature_mimic_loss(rcnn.detach().bfloat16().float(), features.detach(), factors)
    assert torch.equal(loss, torch.tensor(wanted, dtype=torch.float32))
    assert features.grad.dtype == torch.float32
