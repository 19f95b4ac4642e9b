"""resolve.py: kernels that are wrong or do not run are found before a run begins, and torch's take their place."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres import resolve, step
from fastres.build import build_net
from fastres.config import Model, make_config
from fastres.errors import MachineError, OutOfMemory, Stop
from fastres.models.cifar import CifarNet
from fastres.native import fusednet
from fastres.native.fusednet import layers_of
from fastres.native.layernet import LayerInference, LayerNet, kind_of
from fastres.resolve import Verdict, check_kernels, prepare_for
from fastres.runtime import Runtime, prepare
from tests.test_fusednet import Double, needs_triton
from tests.test_layernet import folder, launched, needs_compiler, roomy_gpu, weights_of  # noqa: F401 (fixtures)

RUNTIME = Runtime(torch.device("cpu"), "bf16", shadow_weights=True, native=True)
SMALL = Model(depth=8)  # quicker than resolve's own
IN_TRITON: dict[int, Callable[..., Any]] = {}  # what stands for the kernels in Triton


@pytest.fixture(autouse=True)
def checked_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels of a GPU's have doubles here; a test is of few images."""

    class OnCpu(step.Replica):
        def __init__(self, net: nn.Module, *args: Any, **kwargs: Any) -> None:
            super().__init__(net, *args, **kwargs)
            if args[2].native:
                self._make_passes = LayerNet if args[2].layer_kernels else IN_TRITON[0]

    monkeypatch.setattr(resolve, "Replica", OnCpu)
    monkeypatch.setattr(resolve, "build_net", lambda c, r, **how: build_net(c, replace(r, native=False), **how))
    monkeypatch.setattr(resolve, "EVALUATION_BATCH", 8)
    monkeypatch.setitem(IN_TRITON, 0, Double)
    monkeypatch.setattr(resolve, "inference_of", lambda net, r: LayerInference(net) if r.layer_kernels else None)
    resolve._VERDICTS.clear()
    yield
    resolve._VERDICTS.clear()


def broken(**parts: Callable[[Tensor], Tensor]) -> type[Double]:
    """A double whose results are not what they were."""

    class Broken(Double):
        def maps_of(self, images: Tensor) -> Tensor:
            return parts.get("maps", Tensor.clone)(super().maps_of(images))

        def backward_from(self, grad: Tensor) -> None:
            super().backward_from(grad)
            for name in {"weight_grads", "norm_grads"} & parts.keys():
                setattr(self, name, parts[name](getattr(self, name)))

    return Broken


def test_right_kernels_have_no_fault() -> None:
    assert check_kernels(RUNTIME, SMALL, 16) == Verdict()
    assert check_kernels(RUNTIME, replace(SMALL, arch="plain"), 3) == Verdict()


@needs_compiler
@pytest.mark.parametrize("batch_size", [3, 16])
def test_the_layer_kernels_have_no_fault(batch_size: int, launched: list[str]) -> None:  # noqa: F811
    assert check_kernels(replace(RUNTIME, layer_kernels=True), SMALL, batch_size) == Verdict()
    assert "backward_layer" in launched


def without_a_tap(grads: Tensor) -> Tensor:
    """Of the last convolution, 64 x 3 x 3 x 64."""
    grads = grads.clone()
    grads[-64 * 9 * 64 :].view(64, 9, 64)[:, 8] = 0
    return grads


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("layer3.0.conv2.weight", {"weight_grads": without_a_tap}),
        ("", {"weight_grads": lambda grads: grads * 1.3}),
        ("", {"weight_grads": lambda grads: grads * 1.1}),
        ("conv1.weight", {"weight_grads": lambda grads: grads + torch.nan}),
        ("bn1.weight", {"norm_grads": lambda grads: grads.flip(0)}),
        ("", {"maps": lambda maps: maps.flip(0)}),  # of other images
    ],
)
def test_what_they_get_wrong_is_found(
    what: str, wrong: dict[str, Callable[[Tensor], Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(IN_TRITON, 0, broken(**wrong))
    fault = check_kernels(RUNTIME, SMALL, 32).fault
    assert fault
    assert f"are wrong on this GPU: gradient of {what}" in fault


def test_an_evaluation_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(net: nn.Module, runtime: Runtime) -> Callable[[Tensor], Tensor] | None:
        return (lambda images: net(images) * 1.2) if runtime.native else None

    monkeypatch.setattr(resolve, "inference_of", other)
    fault = check_kernels(RUNTIME, SMALL, 32).fault
    assert fault
    assert "are wrong on this GPU: logits is" in fault


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_kernels_that_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IN_TRITON, 0, failing(ValueError("out of resource: shared memory\nRequired: 131072")))
    assert (
        check_kernels(RUNTIME, SMALL, 8).fault == "do not run on this GPU (ValueError: out of resource: shared memory)"
    )
    resolve._VERDICTS.clear()
    monkeypatch.setitem(IN_TRITON, 0, failing(RuntimeError("CUDA out of memory.")))
    verdict = check_kernels(RUNTIME, SMALL, 8)  # no fault of theirs; whether training fits is seen later
    assert not verdict.fault
    assert verdict.notes == ("fastres' own GPU kernels could not be checked: RuntimeError: CUDA out of memory.",)


def test_a_gpu_that_is_lost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setitem(IN_TRITON, 0, failing(error))
    monkeypatch.setattr(torch, "zeros", failing(error))
    monkeypatch.setattr(resolve, "_results", lambda runtime, *_: failing(error)() if runtime.native else {})
    with pytest.raises(
        MachineError, match=r"failed while .* were checked \(RuntimeError: CUDA error: an illegal.*; try --no-native"
    ):
        check_kernels(RUNTIME, SMALL, 8)


def test_a_full_gpu_is_no_fault_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
    monkeypatch.setattr(resolve, "_results", failing(error))
    monkeypatch.setattr(torch, "zeros", failing(error))
    with pytest.raises(OutOfMemory, match="cpu is full"):
        check_kernels(RUNTIME, SMALL, 8)


def test_torch_does_not_keep_the_checks_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache of cuDNN's plans tells deterministic ones from others, and not searched ones from others."""
    seen = []
    take = step.Replica.step

    def watched(self: step.Replica) -> None:
        seen.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))
        take(self)

    monkeypatch.setattr(step.Replica, "step", watched)
    before = torch.backends.cudnn.deterministic
    check_kernels(RUNTIME, SMALL, 8)
    assert set(seen) == {(True, False)}
    assert torch.backends.cudnn.deterministic == before


def test_what_cannot_be_compared_is_told_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_results", failing(RuntimeError("cuDNN is not there")))
    verdict = check_kernels(RUNTIME, SMALL, 8)
    assert not verdict.fault
    assert verdict.notes == ("fastres' own GPU kernels could not be checked: RuntimeError: cuDNN is not there",)


def test_torchs_kernels_take_the_place_of_those_with_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy_gpu(monkeypatch)
    monkeypatch.setattr(resolve, "check_kernels", lambda runtime, *_: Verdict("are wrong" if runtime.native else None))
    runtime = prepare_for(make_config(execution={"threads": 1}))
    assert not runtime.native
    assert not runtime.layer_kernels
    assert "training without --native kernels, more slowly: they are wrong" in runtime.notes
    with pytest.raises(MachineError, match="--native kernels are wrong; use --no-native"):
        prepare_for(make_config(execution={"threads": 1, "native": True}))
    with pytest.raises(MachineError, match="--layer-kernels are wrong; use --no-layer-kernels"):
        prepare_for(make_config(execution={"threads": 1, "layer_kernels": True}))


def test_what_could_not_be_checked_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may have been short for a moment."""
    verdicts = [Verdict(notes=("a note",)), Verdict()]
    monkeypatch.setattr(resolve, "_compare", lambda *_: verdicts.pop(0))
    assert [check_kernels(RUNTIME, SMALL, 8).notes for _ in range(3)] == [("a note",), (), ()]


def test_it_is_done_once_a_process_and_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def compare(*_: Any) -> Verdict:
        done.append("compared")
        return Verdict()

    monkeypatch.setattr(resolve, "_compare", compare)
    for batch_size in (8, 8, 16, 8):
        check_kernels(RUNTIME, SMALL, batch_size, done.append)
    assert done == ["checking fastres' own kernels on this GPU", "compared"] * 2


def test_a_signal_is_no_fault_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = failing(Stop("stopped by SIGTERM", 15))
    for of_torch in (True, False):

        def results(runtime: Runtime, *_: Any, of_torch: bool = of_torch) -> Any:
            return stop() if runtime.native != of_torch else {}

        monkeypatch.setattr(resolve, "_results", results)
        with pytest.raises(Stop):
            check_kernels(RUNTIME, SMALL, 8)


@needs_triton
def test_the_small_network_has_every_kernel_of_a_deep_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all that Triton compiles a kernel anew for: numbers, which tensors are the same, what is not there."""
    seen: set[Any] = set()

    def launch(kernel: Any, programs: int, how: Any, *args: Any) -> None:
        tensors = {id(arg): k for k, arg in enumerate(args) if isinstance(arg, Tensor)}
        seen.add((kernel.fn.__name__, programs, how, *(tensors.get(id(arg), arg) for arg in args)))

    monkeypatch.setattr(fusednet, "_launch", launch)

    def kernels_of(depth: int, arch: str) -> set[Any]:
        seen.clear()
        net = CifarNet(depth, residual=arch == "resnet").to(memory_format=torch.channels_last)
        weights = {name: p.detach().bfloat16() for name, p in net.named_parameters() if p.ndim == 4}
        fused = fusednet.FusedNet(net, weights, 16)
        images = torch.zeros(16, 3, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        fused.backward_from(torch.zeros_like(fused.maps_of(images)))
        fusednet.Inference(net)(images)
        return {launch for launch in seen if launch[0] != "add_up"}  # as many programs as there are weights

    for arch in ("resnet", "plain"):
        assert kernels_of(resolve.SMALL, arch) == kernels_of(32, arch)
    assert kernels_of(8, "resnet") < kernels_of(32, "resnet")
    kinds = [{kind_of(layer) for layer in layers_of(CifarNet(d), weights_of(CifarNet(d)), 16)} for d in (8, 32)]
    assert kinds[0] == kinds[1]  # of the layer kernels


def test_what_there_was_to_say_before_the_check_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy_gpu(monkeypatch)
    prepared = prepare
    monkeypatch.setattr(
        resolve, "prepare", lambda *args, **how: replace(prepared(*args, **how), notes=("said before",))
    )
    for verdict in (Verdict(), Verdict("are wrong"), Verdict(notes=("could not be checked",))):
        monkeypatch.setattr(resolve, "check_kernels", lambda *_, verdict=verdict: verdict)
        assert prepare_for(make_config(execution={"threads": 1})).notes[0] == "said before"
