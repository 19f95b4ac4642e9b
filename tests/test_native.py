"""native/: fastres' own CPU kernels against the same arithmetic in float64, how they are built, where they are used."""

import itertools
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.build import build_net
from fastres.config import Execution, make_config
from fastres.errors import InputError, MachineError, says_out_of_memory
from fastres.machine import host
from fastres.models.layer import _weight_grad_fits, layer
from fastres.models.norm import BatchNorm
from fastres.native import kernels as native
from fastres.runtime import Runtime, prepare

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which builds the kernels")

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
LAST_DIGIT = {FP32: 2.0**-23, BF16: 2.0**-8}  # of a number, relative to it
Layer = tuple[nn.Conv2d, BatchNorm]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Kernels are looked for in this empty folder, and not remembered."""
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    native._built.cache_clear()
    yield tmp_path
    native._built.cache_clear()


def randn(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def make(in_channels: int, channels: int, stride: int = 1, *, size: int = 3, use: bool = True) -> Layer:
    conv = nn.Conv2d(in_channels, channels, size, stride, size // 2, bias=False)
    norm = BatchNorm(channels, eps=1e-5, momentum=0.1)
    norm.native = use
    with torch.no_grad():
        conv.weight.data = randn(*conv.weight.shape, seed=1) / conv.weight[0].numel() ** 0.5
        norm.weight.copy_(1 + 0.3 * randn(channels, seed=2))
        norm.bias.copy_(0.3 * randn(channels, seed=3))
        statistics(norm)[0].copy_(randn(channels, seed=4))
    return conv, norm


def statistics(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


class Rounded(torch.autograd.Function):
    """Values and gradients as bfloat16 would hold them, in float64: what a kernel reads and writes."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        return x.bfloat16().double()

    @staticmethod
    def backward(_: object, grad: Tensor) -> Tensor:
        return grad.bfloat16().double()


def run(of: Layer, x: Tensor, add: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """All that a step of one layer gives."""
    conv, norm = of
    x, add = x.clone().requires_grad_(), None if add is None else add.clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=x.dtype == BF16):
        out = layer(conv, norm, x, add)
    out.backward(grad)
    return results(out, x, add, conv.weight, norm.weight, norm.bias, *statistics(norm))


def exact(of: Layer, x: Tensor, add: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """The same in float64, rounded to bfloat16 where the layer stores maps in it."""
    conv, norm = of
    rounded: Callable[[Tensor], Tensor] = Rounded.apply if x.dtype == BF16 else lambda values: values
    x, add = x.double().requires_grad_(), None if add is None else add.double().requires_grad_()
    leaf, weight, bias = (p.detach().double().requires_grad_() for p in (conv.weight, norm.weight, norm.bias))
    used = leaf + (rounded(leaf) - leaf).detach()  # its gradient is not rounded
    maps = rounded(F.conv2d(x, used, None, conv.stride, 0 if conv.kernel_size == (1, 1) else 1))
    maps.retain_grad()
    mean, var = (values.double() for values in statistics(norm))
    out = F.batch_norm(maps, mean, var, weight, bias, True, norm.momentum, norm.eps)
    out = F.relu(out if add is None else out + add)
    out.backward(grad.double())
    assert maps.grad is not None
    return results(out, x, add, leaf, weight, bias, mean, var) | {"grad of maps": maps.grad}


def torchs_rounding(conv: nn.Conv2d, x: Tensor, grad_maps: Tensor) -> dict[str, float]:
    """How far off torch's own gradients of a convolution are in bfloat16: without units for it, more than a digit."""
    given = grad_maps.bfloat16().contiguous(memory_format=torch.channels_last), x, conv.weight.detach().bfloat16()
    how = conv.stride, conv.padding, (1, 1), False, (0, 0), 1, (True, True, False)
    rounded, exactly = (
        torch.ops.aten.convolution_backward(*tensors, None, *how)
        for tensors in (given, [tensor.double() for tensor in given])
    )
    names = ("grad of x", "grad of conv")
    return {name: float((a - b).abs().max()) for name, a, b in zip(names, rounded, exactly, strict=False)}


def results(
    out: Tensor, x: Tensor, add: Tensor | None, conv: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> dict[str, Tensor]:
    leaves = {"x": x, "conv": conv, "weight": weight, "bias": bias} | ({} if add is None else {"add": add})
    grads = {f"grad of {name}": value.grad for name, value in leaves.items()}
    found = {"out": out.detach(), "running mean": mean, "running variance": var, **grads}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("in_channels", "channels", "size", "stride", "shape"),
    [
        (16, 16, 3, 1, (5, 32, 32)),  # the three stages
        (32, 32, 3, 1, (9, 16, 16)),
        (64, 64, 3, 1, (20, 8, 8)),  # several images in a band, the last with fewer
        (3, 16, 3, 1, (4, 32, 32)),  # the first layer
        (16, 32, 3, 2, (4, 32, 32)),  # a change of shape
        (64, 128, 1, 1, (3, 6, 6)),  # of a bottleneck: two tiles side by side
        (32, 16, 3, 1, (3, 10, 26)),  # a last band and a last tile with fewer rows
        (16, 16, 3, 1, (2, 5, 6)),
    ],
)
def test_a_layer_is_what_float64_says(
    in_channels: int, channels: int, size: int, stride: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    num, height, width = shape
    x = F.relu(randn(num, in_channels, height, width, seed=5)).to(dtype)
    grad = randn(num, channels, height // stride, width // stride, seed=6, dtype=dtype)
    for add in (None, randn(*grad.shape, seed=7, dtype=dtype)):
        expected = exact(make(in_channels, channels, stride, size=size), x, add, grad)
        found = run(make(in_channels, channels, stride, size=size), x, add, grad)
        grad_maps = expected.pop("grad of maps")
        assert found.keys() == expected.keys()
        torchs = (
            torchs_rounding(make(in_channels, channels, stride, size=size)[0], x, grad_maps) if dtype == BF16 else {}
        )
        for name, value in expected.items():
            # bf16: the gradient of x has been rounded twice on its way, at last by torch; fp32: sums of thousands.
            digit = LAST_DIGIT[dtype] * value.abs().max().item()
            allowed = digit + max(digit, torchs.get(name, 0.0)) if dtype == BF16 else 64 * digit
            error = (found[name].double() - value).abs().max().item()
            assert error <= allowed, f"{name} is off by {error}, where {allowed} is allowed"
        by_torch = run(make(in_channels, channels, stride, size=size, use=False), x, add, grad)
        assert any(not torch.equal(found[name], by_torch[name]) for name in found)  # it was not torch that ran


@pytest.mark.parametrize(("num", "channels", "height", "width"), [(1, 16, 32, 32), (37, 32, 7, 10), (16, 64, 8, 8)])
def test_weight_gradients_are_sums_in_fp32(num: int, channels: int, height: int, width: int) -> None:
    if native.kernels().conv_weight_grad is None:
        pytest.skip("this CPU has no AVX-512 for bf16, or has AMX")
    x, grad = (randn(num, channels, height, width, seed=seed, dtype=BF16) for seed in (1, 2))
    weight = torch.empty(channels, channels, 3, 3, dtype=BF16)
    found = torch.ops.fastres.conv3x3_weight_grad(grad, x, weight)
    arguments = (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (False, True, False)
    as_double = (values.double() for values in (grad, x, weight))
    expected = torch.ops.aten.convolution_backward(*as_double, None, *arguments)[1]
    assert found.dtype == FP32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_where_there_is_no_kernel_for_it_torch_takes_the_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = (randn(4, 16, 8, 8, seed=seed, dtype=BF16) for seed in (1, 2))
    with_kernel = run(make(16, 16), x, None, grad)["grad of conv"]
    monkeypatch.setattr(native.kernels(), "conv_weight_grad", None)
    by_torch = run(make(16, 16), x, None, grad)["grad of conv"]
    assert by_torch.dtype == FP32
    assert torch.equal(by_torch, by_torch.bfloat16().float())
    torch.testing.assert_close(by_torch, with_kernel, rtol=2**-8, atol=1e-3)


def test_results_do_not_depend_on_the_number_of_threads(set_threads: Callable[[int], None]) -> None:
    x, grad, add = (randn(19, 32, 16, 16, seed=seed, dtype=BF16) for seed in (1, 2, 3))
    found = []
    for count in (1, 2, 3):
        set_threads(count)
        found.append(run(make(32, 32), x, add, grad))
        del found[-1]["grad of x"]  # torch's
    for one, other in itertools.pairwise(found):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_small_variances_do_not_drown_in_large_means() -> None:
    """fp32 squares of 1,000 leave nothing of a variance of 0.0001. Torch's own kernel is off by 0.02 here."""
    conv, norm = make(16, 16, size=1)
    conv.weight.data = torch.eye(16)[:, :, None, None]
    maps = 1_000 + 0.01 * randn(8, 16, 8, 8, seed=1)
    expected = F.batch_norm(maps.double(), None, None, norm.weight.double(), norm.bias.double(), True)
    torch.testing.assert_close(layer(conv, norm, maps).double(), F.relu(expected), rtol=0, atol=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_is_not_finite_stays_so(value: float, dtype: torch.dtype) -> None:
    """Else a run that diverges would not be seen to."""
    x = randn(4, 16, 8, 8, seed=1, dtype=dtype)
    x[1, :, 2, 3] = value
    found = run(make(16, 16), x, None, torch.ones_like(x))
    assert found["out"].isnan().all()
    assert found["running mean"].isfinite().logical_not().all()


def test_maps_in_another_layout_are_brought_into_theirs() -> None:
    """What is added, the gradient, and what hooks on saved tensors give back."""
    x, grad, add = (randn(4, 16, 8, 8, seed=seed) for seed in (1, 2, 3))
    expected = run(make(16, 16), x, add, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved.contiguous()):
        found = run(make(16, 16), x, add.contiguous(), grad.contiguous())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_can_be_differentiated_once() -> None:
    x = randn(4, 16, 8, 8, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(layer(*make(16, 16), x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_which_weights_gradients_fit() -> None:
    weight, x = torch.empty(16, 32, 3, 3, dtype=BF16), torch.empty(2, 32, 8, 8, dtype=BF16)
    assert _weight_grad_fits(weight, x, (1, 1), (1, 1))
    for others in (
        (weight, x, (2, 2), (1, 1)),
        (weight, x, (1, 1), (0, 0)),
        (weight, x.float(), (1, 1), (1, 1)),
        (weight, x[..., :7], (1, 1), (1, 1)),
        (weight[..., :1, :1], x, (1, 1), (1, 1)),
        (weight[:, :8], x[:, :8], (1, 1), (1, 1)),
        (weight[:8], x, (1, 1), (1, 1)),
    ):
        assert not _weight_grad_fits(*others)


OTHERS = [
    "evaluation", "groups", "NCHW", "float64", "float32 under autocast", "float16 under autocast", "bf16 weights",
    "bf16 norm", "24 channels", "9 pixels", "one value", "dilation", "two convolutions", "mirrored edges", "bias",
    "strided statistics", "one map added to all", "float32 added to bf16",
]  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_what_the_kernels_do_not_take_is_torchs(what: str) -> None:
    channels = {"24 channels": 24, "one value": 64}.get(what, 16)
    x = randn(4, 16, 8, 8, seed=1)
    x = {"NCHW": x.contiguous(), "9 pixels": randn(1, 16, 3, 3, seed=1), "one value": x[:1, :, :1, :1]}.get(what, x)
    types = {"float64": torch.float64, "float16 under autocast": torch.float16, "float32 under autocast": FP32}
    low = {"bf16 weights", "bf16 norm", "float32 added to bf16"}
    x = x.to(types.get(what, BF16 if what in low else FP32))
    add = {
        "one map added to all": randn(1, channels, 8, 8, seed=5),
        "float32 added to bf16": randn(4, channels, 8, 8, seed=5),
    }.get(what)
    autocast = torch.float16 if x.dtype == torch.float16 else BF16
    found = []
    for use in (False, True):
        conv, norm = make(16, channels, use=use)
        norm.group = 2 if what == "groups" else 0
        norm.train(what != "evaluation")
        if what == "dilation":
            conv.dilation = conv.padding = (2, 2)
        if what == "two convolutions":
            conv.groups, conv.weight = 2, nn.Parameter(conv.weight[:, :8].contiguous())
        if what == "mirrored edges":
            conv.padding_mode = "reflect"
        if what == "bias":
            conv.bias = nn.Parameter(randn(16, seed=6))
        if what == "strided statistics":
            norm.running_mean = torch.zeros(16, 2)[:, 0]
        if what in ("float64", "bf16 weights"):
            conv.to(x.dtype)
        if what in ("float64", "bf16 norm"):
            norm.to(x.dtype)
        if what == "one value":
            with pytest.raises(ValueError, match="more than 1 value"):
                layer(conv, norm, x)
        else:
            with torch.autocast("cpu", autocast, enabled=what in low or "under autocast" in what):
                found.append((layer(conv, norm, x, add), *statistics(norm)))
    assert all(map(torch.equal, *found)) if found else what == "one value"


def test_a_network_learns_with_them_as_with_torchs() -> None:
    losses = []
    images, labels = randn(32, 3, 32, 32, seed=1), torch.arange(32) % 10
    for use in (False, True):
        net = build_net(make_config(model={"depth": 8}), Runtime(CPU, "fp32", native=use), num_classes=10)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for _ in range(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[0] < 2


def test_a_bf16_gradient_is_as_exact_as_torchs() -> None:
    images, labels = randn(32, 3, 32, 32, seed=1), torch.arange(32) % 10

    def gradient(precision: str, *, use: bool, dtype: torch.dtype) -> Tensor:
        net = build_net(make_config(model={"depth": 14}), Runtime(CPU, precision, native=use), num_classes=10)
        with torch.autocast("cpu", BF16, enabled=precision == "bf16"):
            loss = F.cross_entropy(net.to(dtype)(images.to(BF16 if precision == "bf16" else dtype)), labels)
        loss.backward()
        return torch.cat([p.grad.flatten().double() for p in net.parameters() if p.grad is not None])

    expected = gradient("fp32", use=False, dtype=torch.float64)
    by_torch, ours = ((gradient("bf16", use=use, dtype=FP32) - expected).norm() for use in (False, True))
    assert 0 < ours <= 1.05 * by_torch


@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_they_are_what_they_are_eager() -> None:
    x, add, grad = (randn(4, 16, 8, 8, seed=seed, dtype=BF16) for seed in (1, 2, 3))
    expected = run(make(16, 16), x, add, grad)
    conv, norm = make(16, 16)
    with torch.autocast("cpu", BF16):
        out = torch.compile(layer, fullgraph=True, dynamic=False)(conv, norm, x, add)
    out.backward(grad)
    assert torch.equal(out, expected["out"])
    assert conv.weight.grad is not None
    assert torch.equal(conv.weight.grad, expected["grad of conv"])
    assert torch.equal(statistics(norm)[1], expected["running variance"])


def test_built_once_and_built_again_where_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands, run_command = list[list[str]](), native._run

    def noted(command: list[str]) -> str:
        commands.append(command)
        return run_command(command)

    monkeypatch.setattr(native, "_run", noted)
    native.kernels()
    (path,) = cache.iterdir()  # no folder is left behind
    assert len(commands) == 2
    native._built.cache_clear()
    native.kernels()
    assert len(commands) == 3  # only asked what it would build for
    whole = path.read_bytes()
    for k, damaged in enumerate((whole[: len(whole) // 2], whole[:-5_000] + bytes(5_000))):
        folder = cache / str(k)  # a library that is loaded must not change
        folder.mkdir()
        (folder / path.name).write_bytes(damaged)
        monkeypatch.setenv("FASTRES_CACHE", str(folder))
        native._built.cache_clear()
        native.kernels()
        assert (folder / path.name).read_bytes() == whole


def test_a_compiler_that_fails_is_not_asked_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(command: list[str]) -> str:
        calls.append(command)
        raise MachineError("g++ cannot build them: no room")

    native._built.cache_clear()
    monkeypatch.setattr(native, "_run", fails)
    for _ in range(3):
        with pytest.raises(MachineError, match="no room"):
            native.kernels()
    assert len(calls) == 1


def test_another_cpu_has_kernels_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.kernels()
    run_command = native._run
    monkeypatch.setattr(
        native, "_run", lambda command: run_command(command) + "#define __SSE9__ 1" * ("-dM" in command)
    )
    native._built.cache_clear()
    native.kernels()
    assert len(list(cache.iterdir())) == 2


def test_a_cpu_without_avx512_has_shorter_vectors(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("for x86")
    x, grad = (randn(5, 32, 8, 8, seed=seed, dtype=BF16) for seed in (1, 2))
    expected = run(make(32, 32), x, None, grad)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-march=x86-64"))
    native._built.cache_clear()
    assert native.kernels().conv_weight_grad is None
    found = run(make(32, 32), x, None, grad)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 2 * LAST_DIGIT[BF16] * value.norm(), name


def test_where_memory_runs_out_it_is_said_in_torchs_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        native._check(1)
    assert says_out_of_memory(caught.value)


def test_where_they_are_used() -> None:
    assert prepare(Execution(device="cpu", threads=1)).native
    assert prepare(Execution(device="cpu", threads=1, compile=True)).native
    assert not prepare(Execution(device="cpu", threads=1, native=False)).native
    for use in (False, True):
        net = build_net(make_config(), Runtime(CPU, "fp32", native=use), num_classes=10)
        assert {module.native for module in net.modules() if isinstance(module, BatchNorm)} == {use}


NOT_WITH: list[tuple[str, dict[str, Any]]] = [
    ("--precision fp16", {"precision": "fp16"}),
    ("--shadow-weights", {"precision": "bf16", "shadow_weights": True}),
    ("--no-channels-last", {"channels_last": False}),
]


@pytest.mark.parametrize(("flag", "how"), NOT_WITH)
def test_what_they_do_not_go_with(flag: str, how: dict[str, Any]) -> None:
    assert not prepare(Execution(device="cpu", threads=1, **how)).native
    with pytest.raises(InputError, match=f"--native kernels do not go with {flag}; use --no-native"):
        prepare(Execution(device="cpu", threads=1, native=True, **how))


def no_compiler(monkeypatch: pytest.MonkeyPatch, _: Path) -> str:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return r"there is no g\+\+; apt-get install g\+\+"


def other_system(monkeypatch: pytest.MonkeyPatch, _: Path) -> str:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    return "they are for Linux, and this is Darwin"


def broken_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    (folder / "g++").write_text("#!/no/such/interpreter")
    (folder / "g++").chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(folder / "g++"))
    return r"g\+\+ cannot be run: .*No such file"


def no_header(monkeypatch: pytest.MonkeyPatch, _: Path) -> str:
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-include", "no-such-header.h"))
    return r"g\+\+ cannot build them: .*error: no-such-header.h: No such file"


def no_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    folder.rmdir()
    folder.write_text("in the way")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder))
    return "set FASTRES_CACHE to one"


def test_without_a_cache_they_are_kept_in_the_temporary_folder(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path_factory.mktemp("tmp")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(temporary))
    monkeypatch.setattr(host, "writable", lambda folder: folder != cache)
    assert prepare(Execution(device="cpu", threads=1)).native
    (built,) = temporary.glob("fastres_*/native-*.so")
    assert not list(cache.iterdir())
    built.rename(cache / built.name)  # one that somebody else built there, for all
    native._built.cache_clear()
    assert prepare(Execution(device="cpu", threads=1)).native
    assert not built.exists()


@pytest.mark.parametrize("lacks", [no_compiler, other_system, broken_compiler, no_header, no_cache])
def test_what_cannot_be_built_is_said_and_done_without(
    lacks: Callable[[pytest.MonkeyPatch, Path], str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = lacks(monkeypatch, cache)
    found = prepare(Execution(device="cpu", threads=1))
    assert not found.native
    assert found.notes[-1].startswith("training without fastres' own CPU kernels, more slowly: ")
    with pytest.raises(MachineError, match=f"--native kernels: .*{why}"):
        prepare(Execution(device="cpu", threads=1, native=True))
