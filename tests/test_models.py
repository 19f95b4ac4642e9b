"""The networks against an independent slow reference, the paper's counts, and their initial weights."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastres.errors import InputError
from fastres.models.cifar import Block, CifarNet, init_he_, logits_of, num_parameters, shortcut_of
from fastres.models.depth import check_depth
from fastres.models.imagenet import ImageNetNet
from fastres.models.norm import BatchNorm

# Design table: parameters, and the forward's multiply-adds of one image in millions
COUNTS = {
    20: (269_722, 40.6),
    32: (464_154, 68.9),
    44: (658_586, 97.2),
    56: (853_018, 125.5),
    110: (1_727_962, 252.9),
    1202: (19_421_274, None),
}


def make(depth: int = 20, seed: int = 0, **options: Any) -> CifarNet:
    net = CifarNet(depth, **options)
    init_he_(net, mode="fan_in", generator=torch.Generator().manual_seed(seed))
    return net


def unlike_init_(net: nn.Module, seed: int = 1) -> None:
    """Give batch norms gains, offsets and statistics that a forgotten or swapped one cannot hide behind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.ndim == 1:
                uniform = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(0.5 + uniform if name.endswith(("weight", "running_var")) else uniform - 0.5)


def reference_logits(state: dict[str, Tensor], images: Tensor, n: int, *, residual: bool, training: bool) -> Tensor:
    """The paper's network from its state dict, written plainly; nothing in common with `fastres.models`."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if training:
            mean = x.mean(dim=(0, 2, 3))
            var = ((x - mean[None, :, None, None]) ** 2).mean(dim=(0, 2, 3))
        scaled = (x - mean[None, :, None, None]) / (var + 1e-5)[None, :, None, None].sqrt()
        return scaled * state[f"{name}.weight"][None, :, None, None] + state[f"{name}.bias"][None, :, None, None]

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        """A 3x3 (or 1x1) convolution as a sum of shifted products, one per tap."""
        weight = state[f"{name}.weight"]
        size, height = weight.shape[-1], x.shape[-1]
        padded = F.pad(x, (size // 2,) * 4)
        taps = [(row, column) for row in range(size) for column in range(size)]
        products = [
            torch.einsum(
                "oi,nihw->nohw",
                weight[:, :, row, column],
                padded[:, :, row : row + height : stride, column : column + height : stride],
            )
            for row, column in taps
        ]
        return torch.stack(products).sum(dim=0)

    x = norm(conv(images, "conv1"), "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        for block in range(n):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            inner = norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1").clamp(min=0)
            inner = norm(conv(inner, f"{name}.conv2"), f"{name}.bn2")
            if residual and f"{name}.downsample.0.weight" in state:
                inner = inner + norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            elif residual and stride == 2:
                channels = x.shape[1]
                inner[:, channels // 2 : channels // 2 + channels] += x[:, :, 0::2, 0::2]
            elif residual:
                inner = inner + x
            x = inner.clamp(min=0)
    return x.flatten(2).sum(-1) / 64 @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("training", [True, False], ids=["batch-statistics", "running-statistics"])
@pytest.mark.parametrize(("residual", "shortcut"), [(True, "A"), (True, "B"), (False, "A")], ids=["A", "B", "plain"])
def test_forward_is_the_papers(residual: bool, shortcut: str, training: bool) -> None:
    net = make(14, residual=residual, shortcut=shortcut).double().train(training)
    unlike_init_(net)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = reference_logits(dict(net.state_dict()), images, 2, residual=residual, training=training)
    torch.testing.assert_close(net(images), expected, rtol=1e-9, atol=1e-9)


def test_option_a_takes_even_pixels_and_zeroes_the_outer_channels() -> None:
    block = make().layer2[0]
    assert isinstance(block, Block)
    x = torch.arange(2 * 16 * 4 * 4, dtype=torch.float32).reshape(2, 16, 4, 4) + 1
    for layout in (torch.contiguous_format, torch.channels_last):
        out = shortcut_of(x.contiguous(memory_format=layout), block.stride, block.zeros, block.downsample)
        assert out.shape == (2, 32, 2, 2)
        assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
        assert not out[:, :8].any()
        assert not out[:, 24:].any()
        assert out.is_contiguous(memory_format=layout)


def test_zero_channels_behind_the_old_ones_are_a_permutation() -> None:
    """With the second and third stage's channels renamed, and every weight with them, it is the same network."""
    both, after = make(14).double().eval(), make(14, pad="after").double().eval()
    unlike_init_(both)
    second = torch.tensor([*range(8, 24), *range(8), *range(24, 32)])  # of the "both" net, in the order of the other
    third = torch.cat([16 + second, torch.arange(16), torch.arange(48, 64)])
    writes = {"layer2": second, "layer3": third}
    state = dict(both.state_dict())
    for name, tensor in state.items():
        stage = name.partition(".")[0]
        reads = {"layer2.0.conv1.weight": None, "layer3.0.conv1.weight": second, "fc.weight": third}
        inputs = reads.get(name, writes.get(stage)) if tensor.ndim > 1 else None
        moved = tensor[writes[stage]] if stage in writes else tensor
        state[name] = moved if inputs is None else moved[:, inputs]
    after.load_state_dict(state)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(after(images), both(images), rtol=1e-10, atol=1e-10)
    block = make(pad="after").layer2[0]
    assert isinstance(block, Block)
    x = torch.rand(2, 16, 4, 4).contiguous(memory_format=torch.channels_last) + 1
    out = shortcut_of(x, block.stride, block.zeros, block.downsample)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2])
    assert not out[:, 16:].any()
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("depth", COUNTS)
@pytest.mark.parametrize("residual", [True, False], ids=["resnet", "plain"])
def test_parameter_counts_are_the_papers(depth: int, residual: bool) -> None:
    with torch.device("meta"):
        assert num_parameters(CifarNet(depth, residual=residual)) == COUNTS[depth][0]


@pytest.mark.parametrize("depth", [depth for depth, (_, madds) in COUNTS.items() if madds])
def test_multiply_adds_are_the_papers(depth: int) -> None:
    with torch.device("meta"):
        net, images = CifarNet(depth).eval(), torch.empty(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        net(images)
    assert round(counter.get_total_flops() / 2 / 1e6, 1) == COUNTS[depth][1]


def test_strides_are_where_the_map_shrinks() -> None:
    with torch.device("meta"):
        strides = {n: m.stride for n, m in CifarNet(32).named_modules() if isinstance(m, nn.Conv2d)}
    assert {name for name, stride in strides.items() if stride == (2, 2)} == {"layer2.0.conv1", "layer3.0.conv1"}


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_state_dict_has_the_common_names_and_goes_both_ways(shortcut: str) -> None:
    """Against a net of torch's own layers, whose batch norms count batches."""

    def norm(stem: str) -> list[str]:
        return [f"{stem}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]

    expected = ["conv1.weight", *norm("bn1")]
    for stage in (1, 2, 3):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            expected += [f"{name}.conv1.weight", *norm(f"{name}.bn1"), f"{name}.conv2.weight", *norm(f"{name}.bn2")]
            if shortcut == "B" and stage > 1 and block == 0:
                expected += [f"{name}.downsample.0.weight", *norm(f"{name}.downsample.1")]
    expected += ["fc.weight", "fc.bias"]
    net = make(14, shortcut=shortcut)
    unlike_init_(net)
    assert list(net.state_dict()) == expected

    counting = make(14, shortcut=shortcut)
    for name, module in list(counting.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, leaf = name.rpartition(".")
            setattr(counting.get_submodule(parent), leaf, nn.BatchNorm2d(module.num_features))
    for state in (net.state_dict(), dict(net.state_dict())):  # with torch's version metadata, and from a file without
        counting.load_state_dict(state, strict=True)
    theirs = counting.state_dict()
    assert "bn1.num_batches_tracked" in theirs
    for state in (theirs, dict(theirs), net.state_dict(), dict(net.state_dict())):
        ours = make(14, seed=5, shortcut=shortcut)
        ours.load_state_dict(state, strict=True)
        assert all(
            torch.equal(a, b) for a, b in zip(ours.state_dict().values(), net.state_dict().values(), strict=True)
        )
    with pytest.raises(RuntimeError, match="bn1"):
        net.load_state_dict({k: v for k, v in theirs.items() if k != "layer1.0.bn1.running_var"})


def test_running_statistics_follow_the_batch() -> None:
    net = make(8, bn_momentum=0.25)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    maps = net.conv1(images)
    net(images)
    torch.testing.assert_close(net.bn1.running_mean, 0.25 * maps.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(net.bn1.running_var, 0.75 + 0.25 * maps.var(dim=(0, 2, 3)))
    norms = [m for m in CifarNet(8, bn_eps=1e-3).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {1e-3}


def test_pooling_and_logits_are_fp32_in_half_precision() -> None:
    maps = (3 + torch.randn(4, 64, 8, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    fc = make(8, num_classes=7).fc
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(maps, fc)
    exact = maps.double().mean(dim=(2, 3)) @ fc.weight.double().T + fc.bias.double()
    assert logits.shape == (4, 7)
    torch.testing.assert_close(logits, exact.float(), rtol=1e-5, atol=1e-5)  # a pooling in bf16 is some 1e-3 off


def test_a_plain_net_has_no_shortcuts_of_either_kind() -> None:
    nets = [CifarNet(8, residual=False, shortcut=shortcut) for shortcut in ("A", "B")]
    assert list(nets[0].state_dict()) == list(nets[1].state_dict())


# --- batch norm over groups of the batch


def norms(group: int, **how: Any) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Ours over groups of images and torch's own, with equal and unlikely weights and statistics."""
    ours, theirs = BatchNorm(5, eps=1e-3, momentum=0.3, group=group), nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)
    unlike_init_(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(**how), theirs.to(**how)


def maps(count: int, seed: int = 0) -> Tensor:
    """Maps in fp64 whose groups of images differ in mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, 4, 4, dtype=torch.float64, generator=generator)
    return x * torch.linspace(0.5, 2, count)[:, None, None, None] + torch.linspace(-1, 3, count)[:, None, None, None]


@pytest.mark.parametrize("group", [1, 3, 4])
def test_groups_are_torchs_batch_norm_on_each_of_them(group: int) -> None:
    """Outputs, gradients, and running statistics once a step: towards the mean of the groups'."""
    ours, theirs = norms(group, dtype=torch.float64)
    x, weight = maps(12), maps(12, seed=1)  # the weight makes no two outputs' gradients equal
    inputs = x.clone().requires_grad_()
    out = ours(inputs)
    (out * weight).sum().backward()

    other = x.clone().requires_grad_()
    each = [copy.deepcopy(theirs) for _ in range(12 // group)]
    parts = torch.cat([norm(images) for norm, images in zip(each, other.split(group), strict=True)])
    (parts * weight).sum().backward()

    def over_groups(of: Callable[[nn.BatchNorm2d], Tensor | None]) -> Tensor:
        return torch.stack([value for norm in each if (value := of(norm)) is not None])

    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    close(out, parts)
    close(inputs.grad, other.grad)
    close(ours.weight.grad, over_groups(lambda norm: norm.weight.grad).sum(0))
    close(ours.bias.grad, over_groups(lambda norm: norm.bias.grad).sum(0))
    close(ours.running_mean, over_groups(lambda norm: norm.running_mean).mean(0))
    close(ours.running_var, over_groups(lambda norm: norm.running_var).mean(0))
    assert not ours.running_mean.requires_grad  # type: ignore[union-attr]


def test_the_whole_batch_is_one_group_and_evaluation_knows_none() -> None:
    x = maps(12).float()
    for group in (0, 12):
        ours, theirs = norms(group)
        for _ in range(2):
            assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours.running_var, theirs.running_var)  # type: ignore[arg-type]
    ours, theirs = norms(4)
    assert not torch.equal(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    assert torch.equal(ours.eval()(x[:5]), theirs.eval()(x[:5]))  # five images make no groups of four


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_groups_in_bf16_keep_layout_and_dtype_and_are_as_exact(layout: torch.memory_format) -> None:
    ours, theirs = norms(4)
    x = maps(12).bfloat16().contiguous(memory_format=layout)
    exact = torch.cat([norms(0, dtype=torch.float64)[0](images) for images in x.double().split(4)])
    expected = torch.cat([theirs(images) for images in x.split(4)])
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
    assert (out.dtype, out.stride()) == (torch.bfloat16, x.stride())
    assert ours.running_mean is not None
    assert ours.running_mean.dtype == torch.float32
    assert (out - exact).norm() <= 1.05 * (expected - exact).norm()


def test_a_net_in_groups_has_the_plain_nets_names_and_all_its_norms_group() -> None:
    net, plain = make(14, shortcut="B", norm_batch=4), make(14, shortcut="B")
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [m.group for m in net.modules() if isinstance(m, BatchNorm)] == [4] * 15
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    halves = torch.cat([make(14, shortcut="B")(images[:4]), make(14, shortcut="B")(images[4:])])
    torch.testing.assert_close(net(images), halves, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [True, False], ids=["resnet", "plain"])
def test_layouts_agree_and_gradients_reach_every_parameter(residual: bool) -> None:
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, 2, 3])
    seen = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = make(14, residual=residual).double().to(memory_format=layout)
        F.cross_entropy(net(images.contiguous(memory_format=layout)), labels).backward()
        seen.append({name: p.grad for name, p in net.named_parameters()})
    for name, gradient in seen[0].items():
        assert gradient is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, seen[1][name], rtol=1e-7, atol=1e-12)


def test_gradients_are_the_references() -> None:
    """The in-place sums and ReLUs must not disturb what the backward pass reads."""
    net = make(14).double()
    unlike_init_(net)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([1, 4, 9])
    F.cross_entropy(net(images), labels).backward()
    state = {name: tensor.detach().clone().requires_grad_() for name, tensor in net.state_dict().items()}
    F.cross_entropy(reference_logits(state, images, 2, residual=True, training=True), labels).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("norm_batch", [0, 1])
def test_one_graph_without_breaks(norm_batch: int) -> None:
    """What `torch.compile(fullgraph=True)` needs, without the cost of a compiler."""
    net = make(8, norm_batch=norm_batch)
    images = torch.randn(2, 3, 32, 32)
    expected = make(8, norm_batch=norm_batch)(images)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(images), expected)


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_he_initialisation(mode: Literal["fan_in", "fan_out"]) -> None:
    net = CifarNet(56)
    unlike_init_(net)
    init_he_(net, mode=mode, generator=torch.Generator().manual_seed(0))
    weights = {name: p for name, p in net.named_parameters() if p.ndim > 1}
    for name, weight in weights.items():
        by_outputs = mode == "fan_out" and weight.ndim == 4
        fan = weight.shape[0] * weight[0, 0].numel() if by_outputs else weight[0].numel()
        unit = weight.detach().flatten() / math.sqrt(2 / fan)  # standard normal
        margin = 5 / math.sqrt(len(unit))  # five standard errors of the mean; those of the deviation are smaller
        assert abs(unit.mean()) < margin, name
        assert abs(unit.std() - 1) < margin, name
    state = net.state_dict()
    assert all((t == 1).all() for n, t in state.items() if t.ndim == 1 and n.endswith(("weight", "running_var")))
    assert all((t == 0).all() for n, t in state.items() if n.endswith(("bias", "running_mean")))


def test_a_seed_means_the_same_weights() -> None:
    torch.manual_seed(1)
    first = make(20, seed=7).state_dict()
    torch.manual_seed(2)
    again, other = make(20, seed=7).double().state_dict(), make(20, seed=8).state_dict()
    assert all(torch.equal(first[name], again[name].float()) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(first["layer1.0.conv1.weight"], first["layer1.0.conv2.weight"])


def test_initialisation_leaves_the_global_generator_alone() -> None:
    net = CifarNet(8)
    before = torch.get_rng_state()
    init_he_(net, mode="fan_in", generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_its_batch_norms_can_be_replaced() -> None:
    net, images = make(8), torch.randn(2, 3, 32, 32)
    setattr(net, "bn1", nn.Identity())  # noqa: B010 (typed as it was)
    net.get_submodule("layer1.0").register_module("bn2", nn.BatchNorm2d(16))
    assert net(images).shape == (2, 10)


@pytest.mark.parametrize(
    ("depth", "nearest"), [(21, "20 and 26"), (109, "104 and 110"), (7, "8"), (2, "8"), (-4, "8"), (112, "110 and 116")]
)
def test_other_depths_are_refused_with_the_nearest(depth: int, nearest: str) -> None:
    with pytest.raises(InputError, match=rf"depth {depth} is not 6n\+2; nearest: {nearest}$"):
        CifarNet(depth)


def test_valid_depths_pass() -> None:
    for depth in (8, 20, 26, *COUNTS):
        check_depth(depth)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CifarNet(20, shortcut="b"), "shortcut is 'b'; it must be one of A, B"),  # type: ignore[arg-type]
        (lambda: CifarNet(20, pad="before"), "pad is 'before'; it must be one of both, after"),  # type: ignore[arg-type]
        (lambda: CifarNet("20"), "depth is '20'; it must be an integer"),  # type: ignore[arg-type]
        (lambda: CifarNet(18), "depth 18 is not 6n.2; nearest: 14 and 20; of the ImageNet networks: ImageNetResNet18"),
        (lambda: ImageNetNet(18, stem="tiny"), "stem is 'tiny'; it must be one of small, large"),  # type: ignore[arg-type]
        (lambda: ImageNetNet(18, shortcut="b"), "shortcut is 'b'"),  # type: ignore[arg-type]
    ],
)
def test_options_that_there_are_not(make: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


@pytest.mark.parametrize("net", [CifarNet(8), ImageNetNet(18)], ids=["CifarNet", "ImageNetNet"])
def test_a_network_may_be_bfloat16_itself(net: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = net.eval()(images)
    found = net.bfloat16()(images.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 0.05 * exact.norm()
