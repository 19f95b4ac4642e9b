"""responses.py: the std of each layer is what numpy finds in what each convolution gave, whatever the batches."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastres
from fastres.cli import run as command
from fastres.models.cifar import CifarNet, init_he_
from fastres.responses import Response, layer_responses
from tests.few import NUM_TEST
from tests.runs import tiny

NETS = [(8, True, "A"), (14, True, "B"), (14, False, "A")]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def lively_net(depth: int, residual: bool, shortcut: str) -> CifarNet:
    """A network whose batch norms do something: scales, shifts and statistics as after training."""
    net = CifarNet(depth, residual=residual, shortcut=shortcut)  # type: ignore[arg-type]
    chance = torch.Generator().manual_seed(1)
    init_he_(net, mode="fan_in", generator=chance)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.2, 2.0),
                (module.bias.data, -1.5, 1.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.3, 3.0),
            ):
                assert tensor is not None
                tensor.uniform_(low, high, generator=chance)
    return net


def batches(size: int, total: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """Images that grow in contrast and brightness, so that batches differ in mean and spread."""
    images = torch.randn(total, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    growth = torch.linspace(0, 1, total).view(-1, 1, 1, 1)
    images = images * (0.2 + growth) + 3 * growth
    for part in images.split(size):
        yield part, torch.zeros(len(part), dtype=torch.int64)


def measured(net: CifarNet, size: int, total: int = 500) -> list[Response]:
    return layer_responses(net, batches(size, total), torch.float32)


def by_numpy(net: CifarNet, total: int = 500) -> dict[str, float]:
    """Each 3x3 convolution's output, kept as it left the convolution; batch norm and std by the book, in float64."""
    kept: dict[str, list[np.ndarray]] = {}
    names = {module: name for name, module in net.named_modules()}

    def keep(module: nn.Module, _: object, output: Tensor) -> None:
        kept.setdefault(names[module], []).append(output.detach().numpy().astype(np.float64))

    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    handles = [module.register_forward_hook(keep) for module in convolutions]
    net.eval()
    with torch.no_grad():
        for images, _ in batches(125, total):
            net(images)
    for handle in handles:
        handle.remove()
    stds = {}
    for name, parts in kept.items():
        norm = net.get_submodule(name.replace("conv", "bn"))
        mean, var, weight, bias = (
            getattr(norm, key).detach().double().numpy()[:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        out = (np.concatenate(parts) - mean) / np.sqrt(var + 1e-5) * weight + bias
        stds[name] = float(out.std())
    return stds


@pytest.mark.parametrize(("depth", "residual", "shortcut"), NETS)
def test_equal_to_a_direct_computation(depth: int, residual: bool, shortcut: str) -> None:
    net = lively_net(depth, residual, shortcut)
    expected = by_numpy(net)
    assert len(expected) == depth - 1  # 6n+1 of the 6n+2 layers are 3x3
    assert {r.name: r.std for r in measured(net, 100)} == pytest.approx(expected, rel=1e-5)
    assert [r.name for r in measured(net, 500)] == list(expected)


def test_the_population_std_is_meant() -> None:
    """Two images are few enough that n - 1 would show."""
    net = lively_net(8, True, "A")
    assert {r.name: r.std for r in measured(net, 1, total=2)} == pytest.approx(by_numpy(net, total=2), rel=1e-5)


def test_low_precision_activations_are_summed_in_float64() -> None:
    net, kept = lively_net(8, True, "A"), list[Tensor]()
    net.bn1.register_forward_hook(lambda _, __, output: kept.append(output.clone()))
    first = layer_responses(net, batches(100), torch.bfloat16)[0]
    assert {part.dtype for part in kept} == {torch.bfloat16}
    assert first.std == pytest.approx(torch.cat(kept).double().numpy().std(), rel=1e-6)


def test_batch_size_does_not_matter() -> None:
    """170 leaves a smaller last batch, which must count for less."""
    net = lively_net(8, True, "A")
    reference = [r.std for r in measured(net, 100)]
    for size in (170, 250):
        assert [r.std for r in measured(net, size)] == pytest.approx(reference, rel=1e-6)


def test_values_far_from_zero_keep_their_spread() -> None:
    """Sums of squares around zero would leave nothing of a std that is a millionth of the mean."""
    net = lively_net(8, True, "A")
    net.bn1.weight.data.fill_(1e-3)
    net.bn1.bias.data.fill_(0.0)
    near = measured(net, 100)[0].std
    net.bn1.double()
    net.bn1.bias.data.fill_(1e4)
    net.bn1.register_forward_pre_hook(lambda _, args: args[0].double())
    net.layer1[0].register_forward_pre_hook(lambda _, args: args[0].float())
    assert measured(net, 100)[0].std == pytest.approx(near, rel=1e-5)


def test_the_network_is_left_as_it_was() -> None:
    net = lively_net(8, True, "A").train()
    net.layer2.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    measured(net, 250)
    modes = {name: module.training for name, module in net.named_modules()}
    assert (modes[""], modes["layer1.0.bn1"], modes["layer2.0.bn1"]) == (True, True, False)
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_failure_leaves_no_hooks_and_no_batches_are_refused() -> None:
    net = lively_net(8, True, "A").train()
    with pytest.raises(RuntimeError):
        layer_responses(net, [(torch.zeros(1, 5, 32, 32), torch.zeros(1))], torch.float32)
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(ValueError, match="no batches"):
        layer_responses(net, [], torch.float32)


# --- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("responses") / "run"
    fastres.train(tiny(out, recipe={"steps": 3}), verbosity="quiet")
    return out


def test_command_prints_a_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "responses.png"
    assert command(["responses", str(run), "--device", "cpu", "--out", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ResNet8 at step 3: ")
    assert lines[1] == f"{NUM_TEST} images of synthetic"
    assert [line.split()[:2] for line in lines[2:4]] == [["1", "conv1"], ["2", "layer1.0.conv1"]]
    stds = [float(line.split()[2]) for line in lines[2:]]
    bars = [line.count("#") for line in lines[2:]]
    assert len(stds) == 7
    assert max(bars) == bars[stds.index(max(stds))] == 24
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_takes_foreign_weights_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = lively_net(8, False, "A")
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    line = f"responses {tmp_path / 'w.safetensors'} --arch plain --dataset synthetic --device cpu --json"
    assert command([*line.split(), "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["step"], told["precision"], told["num_images"]) == ("PlainNet8", None, "fp32", NUM_TEST)
    assert [(r["index"], r["layer"]) for r in told["responses"]][:2] == [(1, "conv1"), (2, "layer1.0.conv1")]
    assert all(r["std"] > 0 for r in told["responses"])


def test_command_refuses_other_pictures_before_it_works(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["responses", str(run), "--out", "x.jpg"]) == 2
    assert re.search(r"--out is x\.jpg; .*\.png or \.svg", capsys.readouterr().err)
    assert command(["responses", str(tmp_path / "nothing")]) == 2
