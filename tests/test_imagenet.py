"""models/imagenet.py: torchvision's networks are the reference; on small images the whole trainer runs with them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from fastres.bench.roofline import work_of
from fastres.cli import run
from fastres.cli.flags import parse_model
from fastres.config import make_config
from fastres.data import synthetic
from fastres.errors import InputError
from fastres.evaluate import load_trained
from fastres.models.cifar import init_he_, num_parameters
from fastres.models.imagenet import ImageNetNet
from fastres.models.norm import BatchNorm
from fastres.responses import layer_responses
from fastres.step import compile_blocks
from fastres.weights import read_weights
from tests.runs import tiny

# Parameters with 1,000 classes, as torchvision documents them of its weights
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


def reference(depth: int, **options: Any) -> nn.Module:
    net: nn.Module = getattr(torchvision.models, f"resnet{depth}")(**options)
    return net


def made(depth: int, seed: int = 0, **options: Any) -> ImageNetNet:
    """Weights and running statistics that no layer has in common with another."""
    net, generator = ImageNetNet(depth, **options), torch.Generator().manual_seed(seed)
    init_he_(net, mode="fan_in", generator=generator)
    for name, buffer in net.named_buffers():
        buffer.copy_(torch.rand(buffer.shape, generator=generator) + (0.5 if name.endswith("var") else -0.5))
    return net


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameters_and_names_are_torchvisions(depth: int) -> None:
    with torch.device("meta"):
        net, theirs = ImageNetNet(depth, stem="large", num_classes=1000), reference(depth)
    assert num_parameters(net) == PARAMETERS[depth]
    wanted = {k: v.shape for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert {k: v.shape for k, v in net.state_dict().items()} == wanted


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients_are_torchvisions(depth: int, training: bool) -> None:
    net, theirs = made(depth, stem="large", num_classes=7).double(), reference(depth, num_classes=7).double()
    theirs.load_state_dict(net.state_dict(), strict=False)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found: list[tuple[Tensor, Tensor]] = []
    for one in (net, theirs):
        logits = one.train(training)(images)
        logits.square().sum().backward()
        first = one.get_parameter("conv1.weight").grad
        assert first is not None
        found.append((logits.detach(), first))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_the_small_stem_keeps_the_map() -> None:
    net = made(18)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("bn1", "layer1", "layer2", "layer3", "layer4"):
        net.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:]))
        )
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert list(shapes.values()) == [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("pad", ["both", "after"])
def test_option_a_has_no_parameters_and_carries_the_old_channels(depth: int, pad: Any) -> None:
    net = made(depth, shortcut="A", pad=pad)
    assert not [name for name in net.state_dict() if "downsample" in name]
    for stage in (net.layer1, net.layer2):
        block = stage[0]
        last = block.bn2 if depth == 18 else block.bn3
        assert isinstance(last, nn.BatchNorm2d)
        nn.init.zeros_(last.weight)  # leaves the shortcut alone
    x = torch.rand(1, 64, 8, 8)
    with torch.no_grad():
        out = net.layer1[0](x)
        down = net.layer2[0](out)

    def place(num_new: int) -> int:  # of the first old channel
        return num_new // 2 if pad == "both" else 0

    first = place(out.shape[1] - 64)
    torch.testing.assert_close(out[:, first : first + 64], x)
    assert out.sum() == pytest.approx(float(x.sum()), rel=1e-5)
    kept = down[:, place(down.shape[1] - out.shape[1]) :][:, : out.shape[1]]
    torch.testing.assert_close(kept, out[:, :, ::2, ::2])


def test_options_reach_every_norm() -> None:
    for depth, num_norms in ((18, 20), (50, 53)):
        net = ImageNetNet(depth, bn_eps=1e-3, bn_momentum=0.25, norm_batch=4)
        norms = [(m.eps, m.momentum, m.group) for m in net.modules() if isinstance(m, BatchNorm)]
        assert norms == [(1e-3, 0.25, 4)] * num_norms


@pytest.mark.parametrize(("depth", "shortcut"), [(18, "B"), (50, "B"), (50, "A")])
def test_work_is_what_torch_counts(depth: int, shortcut: Any) -> None:
    net = made(depth, shortcut=shortcut)
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert work_of(net, 2, 4).multiply_adds == counter.get_total_flops() / 2


def test_a_fresh_block_compiled_is_the_block() -> None:
    net, images = made(18).eval(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = net(images)
        compile_blocks(net, None)
        torch.testing.assert_close(net(images), before, rtol=1e-4, atol=1e-4)
    assert not [name for name in net.state_dict() if "_orig_mod" in name]


@pytest.mark.parametrize(("depth", "layers"), [(18, 17), (50, 17)])
def test_responses_are_of_the_3x3_layers(depth: int, layers: int) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = layer_responses(made(depth), [(images, torch.zeros(2))], torch.float32)
    assert (len(found), found[0].name, found[-1].name) == (layers, "conv1", f"layer4.{1 if depth == 18 else 2}.conv2")


def test_a_run_from_the_command_line_to_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = synthetic.make_synthetic()
    few = dataclasses.replace(images, test_images=images.test_images[:100], test_labels=images.test_labels[:100])
    monkeypatch.setattr(synthetic, "make_synthetic", lambda: few)
    folder = tmp_path / "run"
    line = ["train", "--model", "ImageNetResNet18", "--dataset", "synthetic", "--steps", "2", "--batch-size", "8"]
    assert run([*line, "--threads", "2", "--precision", "fp32", "--out", str(folder)]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["num_parameters"] == PARAMETERS[18] - 3 * 64 * (49 - 9) - 513 * 990  # another stem, ten classes
    assert fastres.RunConfig.from_dict(json.loads((folder / "config.json").read_text())).model.shortcut == "B"
    assert run(["report", str(folder), "--no-eval"]) == 0
    text = (folder / "report.html").read_text()
    assert "ImageNet-style ResNet-18" in text
    assert "not the paper&#x27;s experiment" in text
    trained = load_trained(folder, {"device": "cpu"}, say=lambda _: None)
    assert (trained.name, trained.arch, trained.net.depth) == ("ImageNetResNet18", "imagenet", 18)


def test_weights_of_other_projects(tmp_path: Path) -> None:
    net = made(50)
    state = {
        f"module.{name}".replace("downsample", "shortcut").replace("fc.", "linear."): tensor
        for name, tensor in net.state_dict().items()
    }
    torch.save({"net": state}, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert (found.arch, found.depth, found.shortcut) == ("imagenet", 50, "B")
    images = torch.randn(2, 3, 32, 32)
    loaded = ImageNetNet(50)
    loaded.load_state_dict(found.state)
    assert torch.equal(loaded.eval()(images), net.eval()(images))
    torch.save(reference(18).state_dict(), tmp_path / "large.pth")  # 7x7 stem, a thousand classes
    with pytest.raises(InputError, match=r"does not fit a ResNet of 18 layers for 32x32 images: conv1\.weight is"):
        read_weights(tmp_path / "large.pth")


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="depth 20 is none of the ImageNet networks'; they have 18, 34, 50, 101, 152"):
        make_config(model={"arch": "imagenet", "depth": 20})
    assert make_config(model={"arch": "imagenet"}).name == "ImageNetResNet18"
    assert parse_model("imagenet-resnet-50") == ("imagenet", 50)
    assert run(["reproduce", "all", "--nets", "ImageNetResNet18", "--runs", str(tmp_path)]) == 2
    assert "no ImageNet-style network" in capsys.readouterr().err
    with pytest.raises(InputError, match="val_split"):
        tiny(tmp_path, model={"arch": "imagenet", "depth": 18}, data={"val_split": True})
