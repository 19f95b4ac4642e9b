# ruff: noqa: N802 (the names of a double are the driver's)
"""layernet.py and its kernels without a GPU: run by `emulated.h`, and compiled for several GPUs."""

import contextlib
import ctypes
import importlib.util
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastres.config import make_config
from fastres.errors import InputError, MachineError, says_out_of_memory
from fastres.models.cifar import CifarNet
from fastres.native import gpu_layers, layernet
from fastres.native.gpu_layers import Kind, Layers
from fastres.native.layernet import (
    SHARED,
    LayerInference,
    LayerNet,
    programs_for,
    shares_for,
    splits_evenly,
)
from fastres.resolve import prepare_for
from tests import emulated
from tests.interpreted import far, network
from tests.test_fusednet import some_gpu
from tests.test_shadow import everything, make
from tests.test_step import one_thread  # noqa: F401 (a fixture for the whole file)

BF16 = torch.bfloat16
KINDS = [Kind(32, 1, 16, 16), Kind(16, 2, 16, 32), Kind(16, 1, 32, 32), Kind(8, 2, 32, 64), Kind(8, 1, 64, 64)]
FIRST = Kind(32, 1, 16, 16, 1)
CASES = [
    (kind, *how)
    for kind in KINDS
    for how in [("nothing", 1, 2, False), ("as many channels", 2, 2, True), ("half the channels", 3, 1, False)]
    if kind.channels > 16 or how[0] != "half the channels"
]
ROUNDING = 2**-8  # of bfloat16; as a share of a map's norm a rounding is 0.0017
FRAME = 256  # numbers before and after a tensor
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
needs_nvrtc = pytest.mark.skipif(
    not importlib.util.find_spec("cuda") or not importlib.util.find_spec("cuda.bindings"),
    reason="this torch came without cuda-bindings",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


class Frames:
    """Tensors between NaNs: what is read there shows in a result, and what is written there by `check`."""

    def __init__(self) -> None:
        self._all: list[tuple[Tensor, Tensor]] = []

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """NaN."""
        size = math.prod(shape)
        whole = torch.full((size + 2 * FRAME,), math.nan, dtype=dtype)
        inside = whole[FRAME : FRAME + size]
        self._all.append((whole, inside))
        return inside.view(shape)

    def maps(self, *shape: int) -> Tensor:
        """NaN, bfloat16, channels last; `shape` is (images, channels, side, side)."""
        images, channels, *side = shape
        return self.new(images, *side, channels, dtype=BF16).permute(0, 3, 1, 2)

    def of(self, value: Tensor) -> Tensor:
        """A copy."""
        framed = self.maps(*value.shape) if value.ndim == 4 else self.new(*value.shape)
        framed.copy_(value)
        return framed

    def check(self) -> None:
        for whole, inside in self._all:
            assert torch.isnan(whole[:FRAME]).all()
            assert torch.isnan(whole[FRAME + inside.numel() :]).all()


def per_channel(value: Tensor) -> Tensor:
    return value[:, None, None]


def normal(*shape: int, mean: float = 0) -> Tensor:
    return (torch.randn(*shape) + mean).to(BF16).double()


@needs_compiler
@pytest.mark.parametrize(("kind", "add", "images", "programs", "last_first"), CASES, ids=str)
def test_a_layer_is_what_float64_says(
    kind: Kind, add: str, images: int, programs: int, last_first: bool, folder: Path
) -> None:
    """Each kernel by itself, fed with what is right."""
    torch.manual_seed(0)
    side, stride, k, n, _ = kind
    source_side, batch = side * stride, images * programs
    frames = Frames()

    def launch(kernel: str, *args: Any) -> None:
        emulated.launch(folder, kernel, *args, last_first=last_first)
        taken, needed = emulated.turns(kind, folder)
        assert taken <= needed * (1 if stride == 1 else 2)  # every second pixel: two by two they meet in a bank

    # Forward, from shares of one image each.
    below, weight = normal(batch, k, source_side, source_side, mean=3), normal(n, k, 3, 3) / 16
    pixels = below.permute(0, 2, 3, 1).reshape(batch, -1, k)
    means = pixels.mean(1)
    below_shares = frames.of(torch.stack([means, (pixels - means[:, None]).square().sum(1)], 1))
    scale, shift, running = torch.rand(k) + 0.5, torch.randn(k), torch.rand(2, k)
    pad, added, add_maps = 0, torch.zeros(()), None
    if add == "as many channels":
        added = normal(batch, k, source_side, source_side)
        add_maps = frames.of(added)
    elif add == "half the channels":
        pad, wide = k // 4, normal(batch, k // 2, 2 * source_side, 2 * source_side)
        added, add_maps = F.pad(wide[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad)), frames.of(wide)
    source, kept = frames.maps(*below.shape), frames.new(4, k)
    maps, shares, moved = frames.maps(batch, n, side, side), frames.new(programs, 2, n), frames.of(running)
    below_maps, weights = frames.of(below), frames.of(weight)
    launch(
        "forward_layer", kind, programs,
        below_maps, below_shares, add_maps, scale, shift, moved[0], moved[1], source, kept, weights, maps, shares,
        batch, source_side**2, images, 0 if add_maps is None else add_maps.shape[1], pad, 1e-5, 0.1,
    )  # fmt: skip
    mean, var = below.mean((0, 2, 3)), below.var((0, 2, 3), unbiased=False)
    rstd = 1 / torch.sqrt(var + 1e-5)
    factor = rstd * scale
    exact_source = torch.relu((below - per_channel(mean)) * per_channel(factor) + per_channel(shift) + added)
    assert far(source, exact_source) < 0.0018
    assert ((source - exact_source).abs() <= ROUNDING * exact_source + 1e-5).all()
    assert far(kept, torch.stack([mean, rstd, factor, shift - mean * factor])) < 1e-6
    assert far(moved[0], 0.9 * running[0].double() + 0.1 * mean) < 1e-6
    assert far(moved[1], 0.9 * running[1].double() + 0.1 * below.var((0, 2, 3))) < 1e-6
    assert far(maps, F.conv2d(source.double(), weight, stride=stride, padding=1)) < 0.0018
    own = maps.double().permute(0, 2, 3, 1).reshape(programs, -1, n)
    assert far(shares[:, 0], own.mean(1)) < 1e-6
    assert far(shares[:, 1], (own - own.mean(1, keepdim=True)).square().sum(1)) < 1e-6

    # Backward, by a norm and gradients of its result.
    grad, count = normal(batch, n, side, side), batch * side**2
    grad[torch.rand(grad.shape) < 0.5] = 0
    exact_maps = maps.double()
    own_mean, own_rstd = exact_maps.mean((0, 2, 3)), 1 / torch.sqrt(exact_maps.var((0, 2, 3)) + 1e-5)
    own_factor, normed = own_rstd * torch.rand(n), (exact_maps - per_channel(own_mean)) * per_channel(own_rstd)
    sums, products = grad.sum((0, 2, 3)), (grad * normed).sum((0, 2, 3))
    grad_shares = frames.of(torch.stack([grad.sum((2, 3)), (grad * normed).sum((2, 3))], 1))
    own_kept = frames.of(torch.stack([own_mean, own_rstd, own_factor]))
    over_maps, over, over_pad = None, torch.zeros(()), 0
    if add != "nothing":  # a shortcut ends there, and another begins
        beyond = normal(batch, n, side, side)
        over_maps, over = frames.of(beyond), beyond
        if n > k:
            over_pad, over = k // 2, torch.zeros(batch, k, source_side, source_side, dtype=torch.double)
            over[:, :, ::2, ::2] = beyond[:, over_pad : over_pad + k]
    grad_norm, grad_maps = frames.new(2, n), frames.maps(*maps.shape)
    grad_source, source_shares = frames.maps(*source.shape), frames.new(programs, 2, k)
    launch(
        "backward_layer", kind, programs,
        frames.of(grad), maps, own_kept, grad_shares, grad_norm[0], grad_norm[1], grad_maps, weights, below_maps, kept,
        None if add_maps is None else source, over_maps, grad_source, source_shares, batch, count, images, over_pad,
    )  # fmt: skip
    assert far(grad_norm, torch.stack([sums, products])) < 1e-6
    exact = per_channel(own_factor) * (grad - per_channel(sums / count) - normed * per_channel(products / count))
    assert far(grad_maps, exact) < 0.0018
    again = frames.maps(*maps.shape)
    grad_norm_again = frames.new(2, n)
    launch(
        "norm_backward", kind, programs, frames.of(grad), maps, own_kept, grad_shares, *grad_norm_again, again,
        batch, count, images,
    )  # fmt: skip
    assert torch.equal(again, grad_maps)
    assert torch.equal(grad_norm_again, grad_norm)
    exact = conv2d_input(source.shape, weight, grad_maps.double(), stride=stride, padding=1) + over
    exact = torch.where(source > 0, exact, 0)
    assert far(grad_source, exact) < 0.0025  # rounded, and once more with what came over the shortcut
    below_normed = (below - per_channel(mean)) * per_channel(rstd)
    passed, each = grad_source.double(), (programs, images, k, -1)
    assert far(source_shares[:, 0], passed.reshape(each).sum((1, 3))) < 1e-6
    assert far(source_shares[:, 1], (passed * below_normed).reshape(each).sum((1, 3))) < 1e-6

    # The weights of two layers, whose shares are of different numbers of images.
    num_shares = min(2, batch)
    weight_shares = [frames.new(num_shares, n, 3, 3, k) for _ in range(2)]
    launch("weight_grads", kind, (num_shares, 2), ([grad_maps] * 2, [source] * 2, weight_shares), batch)
    exact = conv2d_weight(source.double(), weight.shape, grad_maps.double(), stride=stride, padding=1)
    for own_shares in weight_shares:
        assert far(own_shares.sum(0), exact.permute(0, 2, 3, 1)) < 1e-6
    frames.check()


@pytest.fixture
def launched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is launched, on the CPU."""
    names: list[str] = []

    def launch(kernel: str, *args: Any) -> None:
        names.append(kernel)
        emulated.launch(folder, kernel, *args)

    monkeypatch.setattr(layernet, "launch", launch)
    return names


def weights_of(net: CifarNet) -> dict[str, Tensor]:
    return {name: p.detach().to(BF16) for name, p in net.named_parameters() if p.ndim == 4}


def some_maps(*shape: int) -> Tensor:
    chance = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=chance).to(BF16, memory_format=torch.channels_last)


def assert_as_exact_as_autocast(device: torch.device, depth: int, batch_size: int, how: dict[str, Any]) -> None:
    """A step's losses, gradients and statistics against float64, and the same bits each time."""
    nets = [network(depth, how).to(device) for _ in range(3)]
    exact, autocast, net = nets[0].double(), nets[1], nets[2]
    weights, chance = weights_of(net), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in weights.items():
            dict(exact.named_parameters())[name].copy_(weight)
    images = some_maps(batch_size, 3, 32, 32).to(device)
    labels = torch.randint(10, (batch_size,), generator=chance).to(device)
    fused, before = LayerNet(net, weights, batch_size), [buffer.clone() for buffer in net.buffers()]
    results = []
    for _ in range(2):
        for buffer, was in zip(net.buffers(), before, strict=True):
            buffer.copy_(was)
        losses, wrong = fused.forward(images, labels)
        fused.backward(losses)
        results.append([losses, wrong, fused.weight_grads.clone(), fused.other_grads.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def step_of(net: CifarNet, images: Tensor) -> tuple[list[Tensor], Tensor]:
        logits = net(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        losses.mean().backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        convs = [g.permute(0, 2, 3, 1).flatten() for g in grads if g.ndim == 4]
        others = [g.flatten() for g in grads if g.ndim < 4]
        return [losses.detach(), *convs, *others, *net.buffers()], logits.argmax(1) != labels

    wanted, exactly_wrong = step_of(exact, images.double())
    with torch.autocast(device.type, BF16):
        theirs, _ = step_of(autocast, images)
    convs = [weight.numel() for weight in weights.values()]
    others = [p.numel() for p in net.parameters() if p.ndim < 4]
    ours = [losses, *torch.split(fused.weight_grads, convs), *torch.split(fused.other_grads, others), *net.buffers()]
    assert (wrong != exactly_wrong).sum() <= 0.02 * batch_size  # near ties
    parts = 1, 1 + len(convs), 1 + len(convs) + len(others), len(ours)
    for begin, end in zip((0, *parts), parts, strict=False):
        ratios = [
            far(mine, best) / far(its, best)
            for mine, its, best in zip(ours[begin:end], theirs[begin:end], wanted[begin:end], strict=True)
            if far(its, best) > 1e-6
        ]
        assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 1.1, (begin, ratios)
        assert max(ratios) < 2, (begin, ratios)


@needs_compiler
@pytest.mark.parametrize(
    ("depth", "batch_size", "processors", "how"),
    [(8, 12, 132, {}), (14, 6, 2, {"pad": "after"}), (8, 9, 3, {"residual": False})],
    ids=["ResNet-8", "two blocks a stage, three images a program", "PlainNet, three images a program"],
)
def test_a_step_is_as_exact_as_autocasts(
    depth: int, batch_size: int, processors: int, how: dict[str, Any], launched: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(layernet, "processors_of", lambda _: processors)
    assert_as_exact_as_autocast(torch.device("cpu"), depth, batch_size, how)
    assert launched.count("forward_layer") == 2 * (depth - 1)
    assert launched.count("backward_layer") == 2 * (depth - 2)


@needs_compiler
@pytest.mark.parametrize(
    ("images", "programs", "num_classes", "last_first"),
    [(1, 3, 10, False), (3, 2, gpu_layers.MAX_CLASSES, True), (2, 1, 2, True)],
)
def test_the_head_is_what_float64_says(
    images: int, programs: int, num_classes: int, last_first: bool, folder: Path
) -> None:
    """From the last maps to the losses and back, with a shortcut."""
    torch.manual_seed(0)
    frames, batch, kind = Frames(), images * programs, Kind(8, 1, 64, 64)
    maps, add = normal(batch, 64, 8, 8, mean=3), normal(batch, 64, 8, 8)
    pixels = maps.permute(0, 2, 3, 1).reshape(batch, -1, 64)
    means = pixels.mean(1)
    shares = frames.of(torch.stack([means, (pixels - means[:, None]).square().sum(1)], 1))
    scale, shift, running = torch.rand(64) + 0.5, torch.randn(64), torch.rand(2, 64)
    weight, bias, labels = torch.randn(num_classes, 64), torch.randn(num_classes), torch.randint(num_classes, (batch,))
    kept, grad, grad_shares = frames.new(4, 64), frames.maps(batch, 64, 8, 8), frames.new(programs, 2, 64)
    pooled, grad_logits, losses = frames.new(batch, 64), frames.new(batch, num_classes), frames.new(batch)
    wrong = torch.full((batch,), -1, dtype=torch.int32)
    emulated.launch(
        folder, "head", kind, programs, frames.of(maps), shares, frames.of(add), scale, shift, running[0], running[1],
        kept, weight, bias, labels, grad, grad_shares, pooled, grad_logits, losses, wrong,
        batch, 64, images, 64, 0, 1e-5, 0.1, num_classes, last_first=last_first,
    )  # fmt: skip
    mean, rstd = maps.mean((0, 2, 3)), 1 / torch.sqrt(maps.var((0, 2, 3), unbiased=False) + 1e-5)
    normed = (maps - per_channel(mean)) * per_channel(rstd)
    exact = torch.relu(normed * per_channel(scale) + per_channel(shift) + add).to(BF16).double().requires_grad_()
    exact_pooled = exact.mean((2, 3))
    logits = exact_pooled @ weight.double().T + bias
    logits.retain_grad()
    exact_losses = F.cross_entropy(logits, labels, reduction="none")
    exact_losses.mean().backward()
    assert far(pooled, exact_pooled.detach()) < 1e-4  # single maps that are rounded to the other side
    assert far(losses, exact_losses.detach()) < 1e-4
    assert logits.grad is not None
    assert far(grad_logits, logits.grad) < 1e-4
    assert torch.equal(wrong.bool(), logits.argmax(1) != labels)
    assert exact.grad is not None
    assert far(grad, exact.grad * (exact > 0)) < 0.0025
    each, passed = (programs, images, 64, -1), grad.double()
    assert far(grad_shares[:, 0], passed.reshape(each).sum((1, 3))) < 1e-6
    assert far(grad_shares[:, 1], (passed * normed).reshape(each).sum((1, 3))) < 1e-6
    result = frames.new(num_classes * 65)
    emulated.launch(folder, "head_grads", kind, -(-len(result) // 32), pooled, grad_logits, result, batch, num_classes)
    assert far(result[: num_classes * 64].view(num_classes, 64), grad_logits.double().T @ pooled.double()) < 1e-6
    assert far(result[num_classes * 64 :], grad_logits.double().sum(0)) < 1e-6
    frames.check()


@needs_compiler
def test_a_network_with_more_layers_than_a_launch_takes(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    net, images, labels = network(20, {}), some_maps(2, 3, 32, 32), torch.tensor([3, 1])
    grads = []
    for most in (gpu_layers.MAX_LAYERS, 2):
        monkeypatch.setattr(layernet, "MAX_LAYERS", most)
        fused = LayerNet(net, weights_of(net), 2)
        losses, _ = fused.forward(images, labels)
        fused.backward(losses)
        grads.append(fused.weight_grads)
    assert launched.count("weight_grads") == 6 + 3 + 3 + 3 + 3  # of 6, 5 and 5 layers of a kind, and three kinds of one
    assert far(grads[1], grads[0].double()) < 1e-6


def test_what_it_cannot_take() -> None:
    with pytest.raises(ValueError, match="129 classes; these kernels take 128 at most"):
        LayerNet(CifarNet(8, num_classes=129), {}, 4)
    net = CifarNet(8)
    with pytest.raises(ValueError, match="4 images; this is for batches of 8"):
        LayerNet(net, weights_of(net), 8).forward(some_maps(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))


@needs_compiler
def test_the_step_around_it_trains_as_autocast_does(launched: list[str]) -> None:
    plain, fused = make(shadows=True), make(shadows=True)
    fused._make_passes = LayerNet
    before = {name: value.clone() for name, value in everything(plain).items()}
    for replica in (plain, fused):
        replica.step()
    assert isinstance(fused._passes, LayerNet)
    after = everything(fused)  # of the first update the velocity is the gradient, with the decay of `make`
    convs = {name: p for name, p in fused.net.named_parameters() if p.ndim == 4}
    others = {name: p for name, p in fused.net.named_parameters() if p.ndim < 4}
    for group, grads in ((convs, fused._passes.weight_grads), (others, fused._passes.other_grads)):
        for (name, p), flat in zip(group.items(), torch.split(grads, [p.numel() for p in group.values()]), strict=True):
            grad = flat.as_strided(p.shape, p.stride())
            assert far(after[f"v/{name}"], (grad + 1e-2 * before[name]).double()) < 1e-6, name
    for replica in (plain, fused):
        replica.step()
    assert launched.count("sum_weight_shares") == 2
    ours, theirs = everything(fused), everything(plain)
    assert (ours["errors"][:2] - theirs["errors"][:2]).abs().max() <= 1
    assert ours["errors"][:2].min() > 1  # a sum, and not whether any was wrong
    assert ours["losses"][:2].tolist() == pytest.approx(theirs["losses"][:2].tolist(), rel=0.02)
    for name, was in before.items():  # the gradients of rounded maps: neither's are exact
        if was.dtype == torch.float32 and not torch.equal(theirs[name], was):
            assert far(ours[name] - was, (theirs[name] - was).double()) < 0.3, name


@needs_compiler
def test_logits_are_as_exact_as_autocasts(launched: list[str]) -> None:
    net, images = network(8, {}), some_maps(4, 3, 32, 32)
    with torch.no_grad():
        net.train()(images.float())  # running statistics that are somebody's
        exact = network(8, {}).double()
        exact.load_state_dict(net.state_dict())
        wanted = exact.eval()(images.double())
        with torch.autocast("cpu", BF16):
            theirs = net.eval()(images)
        before = [buffer.clone() for buffer in net.buffers()]
        inference = LayerInference(network(8, {}))
        inference.net.load_state_dict({name: torch.ones_like(value) for name, value in net.state_dict().items()})
        inference(images)
        inference.net.load_state_dict(net.state_dict())  # as training goes on between two evaluations
        inference.net.eval()
        assert far(inference(images), wanted) < 1.2 * far(theirs, wanted)
        assert far(LayerInference(net)(images), wanted) < 1.2 * far(theirs, wanted)
        assert all(torch.equal(buffer, was) for buffer, was in zip(net.buffers(), before, strict=True))
    assert launched == (["forward_layer"] * 7 + ["norm_forward"]) * 3


@needs_compiler
@pytest.mark.parametrize("name", ["conv1.weight", "layer2.0.conv1.weight", "layer3.0.bn2.bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(name: str, value: float, launched: list[str]) -> None:
    """Else a run that diverges would not be seen to."""
    net, images = network(8, {}), some_maps(1, 3, 32, 32)
    with torch.no_grad():
        weight = dict(net.named_parameters())[name]
        weight[(0,) * weight.ndim] = value
    assert not LayerInference(net)(images).isfinite().all()
    losses, _ = LayerNet(net, weights_of(net), 1).forward(images, torch.tensor([1]))
    assert not losses.isfinite().all()
    assert launched


@needs_nvrtc
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["A100", "H200"])
def test_kernels_compile_for_a_gpu(capability: tuple[int, int]) -> None:
    for kind in (*KINDS, FIRST):
        code = gpu_layers.cubin(kind, capability)
        assert code.startswith(b"\x7fELF")
        for name in gpu_layers.NAMES:
            assert name.encode() in code


@needs_nvrtc
def test_what_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("nonsense;\n")
    monkeypatch.setattr(gpu_layers, "SOURCE", source)
    with pytest.raises(MachineError, match=r"(?s)use --no-layer-kernels: broken\.cu.*nonsense"):
        gpu_layers.cubin(KINDS[0], (9, 0))


def test_all_kinds_are_compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(kind: Kind, capability: tuple[int, int]) -> bytes:
        if kind.side == 8:
            raise RuntimeError("it does not compile")
        asked.add((kind, capability))
        return b"code"

    asked: set[tuple[Kind, tuple[int, int]]] = set()
    monkeypatch.setattr(gpu_layers, "_cubin", compiled)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    gpu_layers.compile_for(KINDS, torch.device("cpu"))
    assert not asked
    gpu_layers.compile_for([*KINDS[:3], FIRST], torch.device("cuda", 0))
    assert asked == {(kind, (9, 0)) for kind in (*KINDS[:3], FIRST)}
    with pytest.raises(RuntimeError, match="it does not compile"):
        gpu_layers.compile_for(KINDS, torch.device("cuda", 0))


@needs_compiler
def test_memory_that_is_shared_is_what_the_message_says(folder: Path) -> None:
    told = [emulated.sizes(kind, folder) for kind in (*KINDS, FIRST)]
    assert max(max(sizes[1::2]) for sizes in told) == SHARED
    multiprocessor, reserved = 233_472, 1_024  # bytes of an H100 or H200, and of them for each program
    for sizes in told:
        for threads, shared in zip(sizes[::2], sizes[1::2], strict=True):
            assert threads > 256 or 2 * (shared + reserved) <= multiprocessor  # two programs fit


class Driver:
    """A double of `cuda.bindings.driver`: each call gives its status first."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        for name in ("CUfunction_attribute", "CUlaunchConfig", "CUlaunchAttribute", "CUlaunchAttributeID"):
            setattr(self, name, getattr(driver, name))
        self.status = SimpleNamespace(value=0, name="CUDA_SUCCESS")
        self.allowed: dict[bytes, int] = {}  # bytes of shared memory, by kernel
        self.launches: list[tuple[Any, ...]] = []

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, ...]:
        assert code.startswith(b"\x7fELF")
        return self.status, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, ...]:
        assert module == "module"
        return self.status, name

    def cuFuncSetAttribute(self, function: bytes, attribute: Any, value: int) -> tuple[Any, ...]:
        assert attribute.name == "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
        self.allowed[function] = value
        return (self.status,)

    def cuLaunchKernelEx(self, config: Any, function: bytes, params: int, extra: int) -> tuple[Any, ...]:
        if function == b"report_sizes":
            to = ctypes.c_void_p.from_address(ctypes.c_void_p.from_address(params).value or 0).value or 0
            told = range(100, 100 + 2 * len(gpu_layers.NAMES))
            ctypes.memmove(to, (ctypes.c_int * len(told))(*told), 4 * len(told))
            return (self.status,)
        kinds: tuple[Any, ...] = ctypes.c_int, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p, Layers
        places = (ctypes.c_void_p * len(kinds)).from_address(params)
        args: list[Any] = [kind.from_address(place) for kind, place in zip(kinds, places, strict=True)]
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        threads = config.blockDimX, config.blockDimY, config.blockDimZ
        how = grid, threads, config.sharedMemBytes, int(config.hStream)
        early = [attribute.value.programmaticStreamSerializationAllowed for attribute in config.attrs]
        assert len(early) == config.numAttrs
        self.launches.append((function, how, early, extra, *(arg.value for arg in args[:4]), args[4].source[1]))
        return (self.status,)


@needs_nvrtc
def test_a_launch_as_the_driver_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda.bindings

    driver, tensor = Driver(), torch.zeros(4)
    layers = [tensor, tensor], [tensor, tensor[1:]], [tensor, tensor]
    stream = SimpleNamespace(device=SimpleNamespace(index=0), cuda_stream=4242)
    monkeypatch.setattr(cuda.bindings, "driver", driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    real_zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **how: real_zeros(*size, **{**how, "device": "cpu"}))
    gpu_layers.kernels.cache_clear()
    try:
        gpu_layers.launch("weight_grads", KINDS[0], (22, 6), 7, 1.5, tensor, None, layers)
        assert driver.allowed == {name.encode(): 101 + 2 * k for k, name in enumerate(gpu_layers.NAMES)}
        how = (22, 6, 1), (104, 1, 1), 105, 4242  # programs, threads, bytes, stream
        args = 0, 7, 1.5, tensor.data_ptr(), None, tensor.data_ptr() + 4
        monkeypatch.setattr(gpu_layers, "EARLY", True)
        for kind, capability in ((KINDS[0], (9, 0)), (FIRST, (9, 0)), (KINDS[0], (8, 0))):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, of=capability: of)
            gpu_layers.launch("weight_grads", kind, (22, 6), 7, 1.5, tensor, None, layers)
        assert driver.launches == [(b"weight_grads", how, early, *args) for early in ([], [1], [], [])]
        driver.status = SimpleNamespace(value=2, name="CUDA_ERROR_OUT_OF_MEMORY")
        with pytest.raises(MachineError, match="CUDA_ERROR_OUT_OF_MEMORY") as failed:
            gpu_layers.launch("weight_grads", KINDS[0], (22, 6), 7, 1.5, tensor, None, layers)
        assert says_out_of_memory(failed.value)
    finally:
        gpu_layers.kernels.cache_clear()


@pytest.mark.parametrize(
    ("batch_size", "programs", "shared_out"),
    [
        (1, 1, True),
        (127, 127, True),
        (128, 128, True),
        (137, 137, True),  # a prime number: two rounds
        (256, 128, True),
        (301, 43, False),
        (997, 1, False),
        (1000, 125, True),
        (8192, 128, True),
        (10_000, 125, True),
    ],
)
def test_batches_are_shared_out(batch_size: int, programs: int, shared_out: bool) -> None:
    assert programs_for(batch_size, 132) == programs
    assert splits_evenly(batch_size, 132) == shared_out


def test_shares_of_gradients() -> None:
    for num_layers in (1, 6, 36):
        for size in (16 * 16 * 9, 64 * 64 * 9):
            for batch_size in (1, 7, 128):
                assert 1 <= shares_for(num_layers, size, batch_size, 132) <= min(batch_size, 64)
    assert shares_for(36, 64 * 64 * 9, 128, 132) < shares_for(6, 64 * 64 * 9, 128, 132)  # a full GPU needs fewer


@pytest.mark.parametrize(
    ("model", "batch_size", "suited"),
    [
        ({}, 128, True),
        ({"norm_batch": 64}, 64, True),
        ({}, 127, True),
        ({}, 997, False),
        ({"norm_batch": 64}, 128, False),
        ({"shortcut": "B"}, 128, False),
        ({"arch": "imagenet", "depth": 18}, 128, False),
    ],
    ids=str,
)
def test_what_suits(model: dict[str, Any], batch_size: int, suited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    roomy_gpu(monkeypatch)
    changes: dict[str, Any] = {"model": model, "recipe": {"batch_size": batch_size}}
    why = "cannot share out --batch-size 997 over 132 multi" if batch_size == 997 else "are for the paper's"
    with contextlib.nullcontext() if suited else pytest.raises(InputError, match=f"--layer-kernels {why}"):
        assert prepare_for(make_config(**changes, execution={"threads": 1, "layer_kernels": True})).layer_kernels
    for without in (None, False):
        assert not prepare_for(make_config(**changes, execution={"threads": 1, "layer_kernels": without})).layer_kernels


def roomy_gpu(monkeypatch: pytest.MonkeyPatch, shared: int = 232_448) -> None:
    some_gpu(monkeypatch)
    gpu = SimpleNamespace(shared_memory_per_block_optin=shared, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)


def test_where_they_are_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(**how: Any) -> bool:
        return prepare_for(make_config(execution={"threads": 1, "layer_kernels": True, **how})).layer_kernels

    with pytest.raises(MachineError, match="--layer-kernels need a GPU"):
        ask(device="cpu")
    roomy_gpu(monkeypatch)
    assert ask()
    against: dict[str, dict[str, Any]] = {
        "--no-native": {"native": False},
        "--precision fp32": {"precision": "fp32"},
        "--no-shadow-weights": {"shadow_weights": False},
        "--no-channels-last": {"channels_last": False},
    }
    for flag, how in against.items():
        with pytest.raises(InputError, match=f"do not go with {flag}"):
            ask(**how)
    roomy_gpu(monkeypatch, shared=101_376)  # an RTX 4090's
    with pytest.raises(MachineError, match="147,456 bytes of shared memory a thread block, and this GPU has 101,376"):
        ask()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cuda" else real(name))
    with pytest.raises(MachineError, match="need cuda-bindings"):
        ask()
