"""fusednet.py without a GPU: its kernels by Triton's interpreter and compiled for an H200, and the step around them."""

import collections
import contextlib
import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fastres import step
from fastres.config import Execution, make_config
from fastres.errors import InputError, MachineError
from fastres.models.cifar import CifarNet, logits_of, predict_maps
from fastres.native.fusednet import FusedNet, Inference, Launch, split, supports
from fastres.resolve import Verdict, prepare_for
from fastres.runtime import Runtime, prepare
from fastres.shadow import ShadowedSgd
from tests.interpreted import CASES
from tests.test_shadow import everything, make
from tests.test_step import one_thread  # noqa: F401 (a fixture for the whole file)

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this torch came without Triton")


def told_by(module: str, **environment: str) -> Any:
    """What a module of the tests prints, in a process of its own."""
    of_nan = "ignore::RuntimeWarning"  # numpy's, of what the interpreter multiplies
    command = [sys.executable, "-W", "error", "-W", of_nan, "-m", f"tests.{module}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.timeout(300)
def test_a_step_is_what_float64_says() -> None:
    told = told_by("interpreted", TRITON_INTERPRET="1")
    assert not told["lost"]  # else a run that diverges would not be seen to
    found = told["far"]
    assert found.keys() == CASES.keys()
    for case, distances in found.items():
        layers = CASES[case][0] - 1  # of each weights, scale, shift and two statistics; then maps and logits
        assert len(distances) == 5 * layers + 2
        assert max(distances.values()) < 5e-6, (case, max(distances, key=distances.__getitem__))


@needs_triton
@pytest.mark.timeout(300)
def test_kernels_compile_for_an_h200(tmp_path: Path) -> None:
    launched = told_by("for_h200", TRITON_CACHE_DIR=str(tmp_path))
    counts = collections.Counter(launch["kernel"] for launch in launched)
    layers = 19 + 7  # of the two networks
    assert counts == {
        "conv3x3": layers,
        "norm_forward": layers,
        "norm_sums": 2,
        "norm_backward": layers,
        "conv3x3_grads": layers - 2,
        "first_weight_grad": 2,
        "add_up": 2,
        "inference": layers,
    }
    assert max(launch["shared"] for launch in launched) <= 232_448  # bytes that a program can have there


class Double(FusedNet):
    """A FusedNet that computes nothing by itself: torch does, by autocast."""

    def __init__(self, net: nn.Module, weights: Mapping[str, Tensor], batch_size: int) -> None:
        super().__init__(net, weights, batch_size)
        self.net, self.weights = net, weights

    def maps_of(self, images: Tensor) -> Tensor:
        assert len(images) == self.batch_size
        norms = {n: p for n, p in self.net.named_parameters() if p.ndim == 1 and not n.startswith("fc")}
        convs = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
        last = dict(self.net.named_modules())["layer3"]
        with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
            hook = last.register_forward_hook(lambda _module, _inputs, maps: setattr(self, "last", maps))
            functional_call(self.net, convs, (images,))
        hook.remove()
        self.leaves = [*convs.values(), *norms.values()], len(convs)
        return self.last.detach()

    last: Tensor

    def backward_from(self, grad: Tensor) -> None:
        leaves, num_convs = self.leaves
        grads = torch.autograd.grad(self.last, leaves, grad)
        self.weight_grads = torch.cat([g.float().as_strided((g.numel(),), (1,)) for g in grads[:num_convs]])
        self.norm_grads = torch.cat(grads[num_convs:])


def test_the_step_around_it_is_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in one piece, in the weights' own order, and the head's beside them."""
    plain, fused = make(shadows=True), make(shadows=True)
    # The last layer's sums in the order of the head's.
    monkeypatch.setattr(nn.Linear, "forward", lambda own, x: (x[:, None] * own.weight).sum(dim=2) + own.bias)
    fused._make_passes = Double
    for replica in (plain, fused):
        for _ in range(10):
            replica.step()
    assert isinstance(fused._passes, Double)
    assert plain._passes is None
    for (name, ours), theirs in zip(everything(fused).items(), everything(plain).values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_written_out_is_the_last_layer(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(32, 8, 8, 64, generator=generator).to(dtype).requires_grad_()
    fc, labels = nn.Linear(64, 10), torch.randint(10, (32,), generator=generator)
    leaves = (maps, fc.weight, fc.bias)
    loss, wrong = predict_maps(*leaves, labels)
    exact_maps, exact_fc = maps.detach().double().requires_grad_(), copy.deepcopy(fc).double()
    logits = logits_of(exact_maps.permute(0, 3, 1, 2), exact_fc)
    expected = functional.cross_entropy(logits, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert int(wrong) == int((logits.argmax(dim=1) != labels).sum())
    exact = torch.autograd.grad(expected, (exact_maps, exact_fc.weight, exact_fc.bias))
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), exact, strict=True):
        # Rounded once to bf16, by half a digit. In float64, since two such roundings may fall on neighbours.
        rtol = 1e-5 if ours.dtype == torch.float32 else 2**-8
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=1e-8)


@pytest.mark.parametrize(
    ("model", "batch_size", "suited"),
    [
        ({}, 128, True),
        ({"arch": "plain", "shortcut": "B"}, 128, True),  # it has no shortcuts
        ({"norm_batch": 128}, 128, True),  # the whole batch
        ({"norm_batch": 64}, 128, False),
        ({"shortcut": "B"}, 128, False),
        ({"arch": "imagenet", "depth": 18}, 128, False),
        ({}, 100, True),
        ({}, 1000, True),
        ({}, 8, True),
        ({}, 127, False),  # a prime number
        ({}, 997, False),
    ],
    ids=str,
)
def test_what_suits(model: dict[str, Any], batch_size: int, suited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    some_gpu(monkeypatch)
    config = make_config(model=model, recipe={"batch_size": batch_size}, execution={"threads": 1})
    assert supports(config.model, batch_size) == suited
    runtime = prepare_for(config)
    assert runtime.native == suited
    assert any("training without fastres' own GPU kernels" in note for note in runtime.notes) != suited
    by_name = replace(config, execution=replace(config.execution, native=True))
    with contextlib.nullcontext() if suited else pytest.raises(InputError, match="--native kernels on a GPU are for"):
        assert prepare_for(by_name).native


@pytest.mark.parametrize("batch_size", [*range(1, 33), 48, 64, 96, 100, 125, 128, 250, 256, 500, 1000, 1024, 8192])
def test_common_batches_suit_and_are_shared_out(batch_size: int) -> None:
    assert supports(make_config().model, batch_size)


def test_images_that_it_cannot_take_are_refused() -> None:
    net = CifarNet(8)
    weights = {name: p.detach().bfloat16() for name, p in net.named_parameters() if p.ndim == 4}
    images = torch.zeros(4, 3, 32, 32, dtype=torch.bfloat16)
    last = images.contiguous(memory_format=torch.channels_last)
    for taker in (FusedNet(net, weights, 4).maps_of, Inference(net)):
        with pytest.raises(ValueError, match="channels last: False; wanted"):
            taker(images)
        with pytest.raises(ValueError, match=r"images \(3, 28, 28\)"):
            taker(last[:, :, 2:30, 2:30])
        with pytest.raises(ValueError, match=r"float32 on cpu, channels last: True; wanted .*bfloat16"):
            taker(last.float())
    with pytest.raises(ValueError, match="4 images; this is for batches of 8"):
        FusedNet(net, weights, 8).maps_of(last)


@pytest.mark.parametrize("pixels", [64, 192, 448, 3136, 8192, 131_072, 64 * 997])
def test_pixels_are_shared_out_evenly(pixels: int) -> None:
    for launch in (Launch(256, 264), Launch(64, 1024), Launch(128, 1)):
        block, tiles, programs, _ = split(pixels, launch)
        assert block * tiles * programs == pixels
        assert programs <= 2 * launch.programs
        assert 64 <= block <= launch.block
        assert block & (block - 1) == 0


def some_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastres.machine.gpu.choose", lambda name: (torch.device("cpu" if name == "cpu" else "cuda:0"), None)
    )
    monkeypatch.setattr("fastres.runtime._set_up_cuda", lambda *_, **__: None)
    monkeypatch.setattr("fastres.runtime._check_launchers", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("fastres.resolve.check_kernels", lambda *_: Verdict())


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    some_gpu(monkeypatch)
    assert prepare(Execution(threads=1)).native
    assert not prepare(Execution(threads=1, native=False)).native


@pytest.mark.parametrize(
    ("flag", "how"),
    [
        ("--precision fp32", {"precision": "fp32"}),
        ("--precision fp16", {"precision": "fp16"}),
        ("--no-shadow-weights", {"shadow_weights": False}),
        ("--no-channels-last", {"channels_last": False}),
    ],
)
def test_what_it_does_not_go_with(flag: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    some_gpu(monkeypatch)
    assert not prepare(Execution(threads=1, **how)).native
    with pytest.raises(InputError, match=f"--native kernels do not go with {flag}; use --no-native"):
        prepare(Execution(threads=1, native=True, **how))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    some_gpu(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    runtime = prepare(Execution(threads=1))
    assert not runtime.native
    assert "training without fastres' own GPU kernels, more slowly: torch came without Triton" in runtime.notes
    with pytest.raises(MachineError, match="need Triton, which this torch came without; use --no-native"):
        prepare(Execution(threads=1, native=True))


def test_on_a_cpu_nothing_is_fused() -> None:
    replica = make(shadows=True)
    assert isinstance(replica._sgd, ShadowedSgd)
    assert not replica._make_passes
    assert not step.Replica(
        replica.net, replica.optimizer, replica.loader, Runtime(torch.device("cpu"), "bf16", native=True), num_steps=5
    )._make_passes
