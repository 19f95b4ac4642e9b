"""What only a GPU can show: graph equals no graph, loaders equal the reference, nothing waits, resume is exact."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastres
from benchmarks.gpu_timing import launch_seconds
from fastres.build import build_evaluators, build_loaders, build_net, build_optimizer
from fastres.config import Model, RunConfig, make_config
from fastres.configtree import merge
from fastres.cudagraph import CapturedGraph
from fastres.data.dali import dali_available
from fastres.data.imageset import ImageSet
from fastres.data.plan import EpochPlan
from fastres.data.synthetic import make_synthetic
from fastres.data.table import TableLoader
from fastres.evaluator import Evaluator
from fastres.models.cifar import CifarNet
from fastres.native.fusednet import FusedNet, Inference
from fastres.native.layernet import LayerInference
from fastres.optim import LrSchedule
from fastres.resolve import SMALL, Verdict, check_kernels, prepare_for, prepare_unchecked
from fastres.step import Replica, TrainStep
from fastres.steptimer import StepTimer
from tests.interpreted import far, network
from tests.runs import assert_same_run
from tests.test_layernet import assert_as_exact_as_autocast
from tests.test_loop import train_until
from tests.test_step import assert_compiled_bf16_is_as_exact_as_eager, assert_compiled_is_eager_in_fp64, compiles

# torch has notices of its own on a GPU: prototype sync-debug mode, .grad of a tensor that is traced. One is no notice:
# gradients that are accumulated on another stream than their forward's.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:The AccumulateGrad node's stream"),
]
LOADERS = ["resident", pytest.param("dali", marks=pytest.mark.skipif(not dali_available(), reason="DALI is missing"))]
DETERMINISTIC = {"deterministic": True, "device": "cuda"}


@pytest.fixture(autouse=True)
def switches_put_back() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()
    yield
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before[:3]
    torch.use_deterministic_algorithms(before[3])


def config(**changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        "data": {"dataset": "synthetic"},
        "execution": {"device": "cuda"},
        "recipe": {"steps": 300, "lr": 0.05, "milestones": [150, 250]},
    }
    return make_config("paper", **merge(base, changes))


def built(config: RunConfig, *, seeds: tuple[int, ...] = (0,)) -> tuple[TrainStep, Any]:
    """A TrainStep, warmed up and captured as `train` does, and its evaluator."""
    images = make_synthetic()
    runtime, mean = prepare_for(config), images.mean_image()
    assert runtime.native == prepare_unchecked(config).native  # else this would be a test of torch's kernels
    configs = [RunConfig.from_dict({**config.to_dict(), "seed": seed}) for seed in seeds]
    replicas = []
    for one, loader in zip(configs, build_loaders(configs, images, mean, runtime), strict=True):
        net = build_net(one, runtime, num_classes=10)
        replica = Replica(net, build_optimizer(net, one.recipe), loader, runtime, num_steps=one.recipe.steps)
        replica.set_lrs(LrSchedule(one.recipe).at)
        replicas.append(replica)
    step = TrainStep(replicas)
    if runtime.compile_scope != "none" or runtime.cuda_graph:
        step.warm_up(CapturedGraph if runtime.cuda_graph else None, graph_steps=config.execution.graph_steps)
    return step, build_evaluators([replicas[0].net], config, images, mean, runtime)[0]


def close(step: TrainStep) -> None:
    for replica in step.replicas:
        replica.loader.close()


@compiles
@pytest.mark.parametrize("scope", ["blocks", "whole"])
def test_compiled_is_eager_in_fp64_over_50_steps(scope: Literal["blocks", "whole"]) -> None:
    assert_compiled_is_eager_in_fp64(scope, torch.device("cuda", 0))


@compiles
@pytest.mark.parametrize("scope", ["blocks", "whole"])
def test_compiled_bf16_is_as_exact_as_eager_bf16(scope: str) -> None:
    assert_compiled_bf16_is_as_exact_as_eager(scope, torch.device("cuda", 0))


def on_cpu(images: ImageSet, dtype: torch.dtype) -> TableLoader:
    """The CPU's loader of the same samples."""
    plan = EpochPlan(0, len(images.train_images))
    how: dict[str, Any] = {"mean": images.mean_image(), "batch_size": 128, "dtype": dtype}
    return TableLoader(images, plan, device=torch.device("cpu"), **how)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_batches_on_the_gpu_are_the_cpus(loader: str, precision: str) -> None:
    step, _ = built(config(execution={"loader": loader, "precision": precision, "compile": False, "cuda_graph": False}))
    replica, images = step.replicas[0], make_synthetic()
    reference = on_cpu(images, replica.dtype)
    for k in range(3 * len(images.train_images) // 128 + 2):
        replica.loader.prepare(k)
        counter = torch.tensor([k])
        for ours, theirs in zip(replica.loader.load(counter.cuda()), reference.load(counter), strict=True):
            assert torch.equal(ours.cpu(), theirs), k
    close(step)


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_right_while_the_host_runs_ahead(loader: str) -> None:
    """Nothing is read before the last step is launched, and the device is kept busy: no buffer is reused early."""
    step, _ = built(config(execution={"loader": loader, "precision": "fp32", "compile": False, "cuda_graph": False}))
    replica, images, num_steps = step.replicas[0], make_synthetic(), 400
    weights = torch.randn(128, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    on_gpu, counters = weights.cuda(), torch.arange(num_steps, device="cuda").view(-1, 1)
    sums, busy = torch.zeros(num_steps, dtype=torch.float64, device="cuda"), torch.randn(4096, 4096, device="cuda")
    for k in range(num_steps):
        replica.loader.prepare(k)
        torch.mm(busy, busy)
        sums[k] = (replica.loader.load(counters[k])[0].double() * on_gpu).sum()
    reference = on_cpu(images, torch.float32)
    for k, ours in enumerate(sums.tolist()):
        reference.prepare(k)
        theirs = float((reference.load(torch.tensor([k]))[0].double() * weights).sum())
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9), k
    close(step)


@pytest.mark.parametrize("batch_size", [128, 250])
@pytest.mark.parametrize("residual", [True, False])
def test_a_launch_a_layer_is_as_exact_as_autocast_and_the_same_each_time(residual: bool, batch_size: int) -> None:
    assert_as_exact_as_autocast(torch.device("cuda", 0), 20, batch_size, {"residual": residual})


@pytest.mark.parametrize("residual", [True, False])
def test_fused_is_as_exact_as_autocast_and_the_same_each_time(residual: bool) -> None:
    """fastres' own kernels, one step of a network of the paper's widths against fp64."""
    device, bf16 = torch.device("cuda", 0), torch.bfloat16
    nets = [network(20, {"residual": residual}).to(device) for _ in range(3)]  # channels last
    exact, autocast, net = nets[0].double(), nets[1], nets[2]
    chance = torch.Generator().manual_seed(2)
    images, grad = (torch.randn(shape, generator=chance) for shape in ((128, 3, 32, 32), (128, 64, 8, 8)))
    images, grad = (x.to(device, bf16, memory_format=torch.channels_last) for x in (images, grad))
    fused = FusedNet(net, {n: p.detach().to(bf16) for n, p in net.named_parameters() if p.ndim == 4}, 128)
    fused_maps = fused.maps_of(images)
    fused.backward_from(grad)

    def step_of(net: CifarNet, images: Tensor) -> list[Tensor]:
        maps = net.layer3(net.layer2(net.layer1(torch.relu(net.bn1(net.conv1(images))))))
        maps.backward(grad.to(maps.dtype))
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        weights = [g.permute(0, 2, 3, 1).flatten() for g in grads if g.ndim == 4]
        return [maps.detach(), *weights, *(g for g in grads if g.ndim == 1), *net.buffers()]

    wanted = step_of(exact, images.double())
    with torch.autocast("cuda", bf16):
        theirs = step_of(autocast, images)
    convs = [p.numel() for p in net.parameters() if p.ndim == 4]
    norms = [p.numel() for name, p in net.named_parameters() if p.ndim == 1 and not name.startswith("fc")]
    ours = [fused_maps, *fused.weight_grads.clone().split(convs), *fused.norm_grads.clone().split(norms)]
    ours += net.buffers()
    # Each by itself; single gradients of few numbers are now nearer, now farther, as ReLUs happen to flip.
    assert (
        max(far(mine, best) / (far(its, best) + 1e-6) for mine, its, best in zip(ours, theirs, wanted, strict=True)) < 2
    )
    for some in (slice(1), slice(1, 1 + len(convs)), slice(1 + len(convs), 1 + len(convs) + len(norms))):
        mine, its, best = (torch.cat([x.double().flatten() for x in each[some]]) for each in (ours, theirs, wanted))
        assert far(mine, best) < 1.2 * far(its, best)
    assert torch.equal(fused.maps_of(images), fused_maps)
    fused.backward_from(grad)
    assert torch.equal(fused.weight_grads, torch.cat(ours[1 : 1 + len(convs)]))
    assert torch.equal(fused.norm_grads, torch.cat(ours[1 + len(convs) : 1 + len(convs) + len(norms)]))


@pytest.mark.parametrize("layer_kernels", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_finds_no_fault_with_them(deterministic: bool, layer_kernels: bool) -> None:
    how = {"device": "cuda", "deterministic": deterministic, "layer_kernels": layer_kernels}
    for batch_size in (128, 100, 8):
        runtime = prepare_unchecked(make_config(recipe={"batch_size": batch_size}, execution=how))
        bare = replace(runtime, compile_scope="none", cuda_graph=False)
        for arch in ("resnet", "plain"):
            assert check_kernels(bare, Model(arch=arch, depth=SMALL), batch_size) == Verdict(), (batch_size, arch)


@pytest.mark.parametrize("kind", [Inference, LayerInference])
@pytest.mark.parametrize("batch_size", [1000, 37])
def test_inference_is_as_exact_as_autocast(batch_size: int, kind: type[Inference] | type[LayerInference]) -> None:
    device, bf16 = torch.device("cuda", 0), torch.bfloat16
    net = network(20, {}).to(device)
    images = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    images = images.to(device, bf16, memory_format=torch.channels_last)
    with torch.no_grad():
        net.train()(images.float())  # running statistics that are somebody's
        net.eval()
        exact = network(20, {}).to(device).double()
        exact.load_state_dict(net.state_dict())
        wanted = exact.eval()(images.double())
        with torch.autocast("cuda", bf16):
            theirs = net(images)
        assert far(kind(net)(images), wanted) < 1.2 * far(theirs, wanted)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "how",
    [
        {"precision": "bf16"},
        {"precision": "bf16", "layer_kernels": True},
        {"precision": "bf16", "native": False},
        {"precision": "fp16"},
        {"precision": "fp32"},
    ],
    ids=str,
)
def test_graph_equals_no_graph_in_every_bit(loader: str, how: dict[str, Any]) -> None:
    states: list[list[Tensor]] = []
    for graph, graph_steps in ((False, 1), (True, 1), (True, 4)):
        graphs = {"cuda_graph": graph, "graph_steps": graph_steps, "loader": loader}
        step, _ = built(config(execution={**graphs, **how, **DETERMINISTIC}))
        done = 0
        while done < 100:
            done += step(done, 100)
        states.append([t.cpu() for t in step.replicas[0].state()])
        close(step)
    for other in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], other, strict=True))


def test_graph_equals_no_graph_with_the_papers_other_readings() -> None:
    states: list[list[Tensor]] = []
    for graph in (False, True):
        changes = {"model": {"norm_batch": 64}, "recipe": {"lr_in_velocity": True, "milestones": [40, 80]}}
        step, _ = built(config(**changes, execution={"cuda_graph": graph, **DETERMINISTIC}))
        for k in range(100):
            step(k)
        states.append([t.cpu() for t in step.replicas[0].state()])
        close(step)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("layer_kernels", [False, True])
def test_warm_up_and_capture_leave_no_trace(layer_kernels: bool) -> None:
    how = {**DETERMINISTIC, "layer_kernels": layer_kernels}
    step, _ = built(config(execution=how))
    fresh, _ = built(config(execution={**how, "compile": False, "cuda_graph": False}))
    for a, b in zip(step.replicas[0].state(), fresh.replicas[0].state(), strict=True):
        assert torch.equal(a, b)
    close(step)
    close(fresh)


@pytest.mark.parametrize("layer_kernels", [False, True])
@pytest.mark.parametrize("loader", LOADERS)
def test_replicas_side_by_side_are_what_each_is_alone(loader: str, layer_kernels: bool) -> None:
    how = {**DETERMINISTIC, "loader": loader, "layer_kernels": layer_kernels}
    together, _ = built(config(execution=how), seeds=(0, 1, 2))
    for k in range(60):
        together(k)
    for seed in range(3):
        alone, _ = built(config(execution=how), seeds=(seed,))
        for k in range(60):
            alone(k)
        for a, b in zip(alone.replicas[0].state(), together.replicas[seed].state(), strict=True):
            assert torch.equal(a, b)
        close(alone)
    close(together)


@pytest.mark.parametrize("layer_kernels", [False, True])
@pytest.mark.parametrize("loader", LOADERS)
def test_steps_wait_for_nothing(loader: str, layer_kernels: bool) -> None:
    """No host sync in 200 timed steps, which are launched in under 20 % of the time the GPU takes for them."""
    step, _ = built(config(execution={"loader": loader, "layer_kernels": layer_kernels}))
    for k in range(64):
        step(k)
    torch.cuda.synchronize()
    timer, launched, whole = StepTimer(torch.device("cuda", 0)), 0.0, 0.0
    for start in (64, 164):  # as from one log step to the next: the second time with the first one's events
        began = time.perf_counter()
        launched += launch_seconds(step, timer, start, start + 100)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        steps = timer.collect()
        assert len(steps) == 100
        assert sum(steps) == pytest.approx(seconds, rel=0.2)  # the events' clock is the host's
        whole += seconds
    assert launched < 0.2 * whole
    step.check()
    close(step)


@pytest.mark.parametrize("loader", LOADERS)
def test_the_profiler_sees_no_synchronisation_either(loader: str) -> None:
    """The debug mode sees neither torch.cuda.synchronize nor DALI's waits."""
    step, _ = built(config(execution={"loader": loader}))
    for k in range(64):
        step(k)
    timer = StepTimer(torch.device("cuda", 0))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        launch_seconds(step, timer, 64, 128)
    events = seen.events()
    # DALI's threads may wait. `event.thread` of a call that no operator made is the thread that stops the profiler.
    threads = {event.device_resource_id for event in events if event.name == "cudaGraphLaunch"}
    assert len(threads) == 1
    waits = Counter(e.name for e in events if "Synchronize" in e.name and e.device_resource_id in threads)
    assert waits.pop("cudaDeviceSynchronize", 0) <= 1  # the profiler's own, at its end
    assert not waits
    close(step)


@pytest.mark.parametrize("layer_kernels", [False, True])
def test_an_evaluation_captured_is_one_launched_kernel_by_kernel(layer_kernels: bool) -> None:
    step, captured = built(config(execution={**DETERMINISTIC, "layer_kernels": layer_kernels}))
    for k in range(50):
        step(k)
    first = captured()
    assert captured() == first
    net, batches = captured.net, captured._batches
    forward = (LayerInference if layer_kernels else Inference)(net)
    launched = Evaluator(net, batches, num_classes=10, dtype=captured.dtype, forward=forward)
    assert launched().confusion == first.confusion
    close(step)


def resumable(out: Path, loader: str = "auto", **execution: Any) -> RunConfig:
    return config(
        execution={**DETERMINISTIC, "loader": loader, **execution},
        recipe={"steps": 120, "milestones": [60]},
        output={"out": str(out), "log_every": 10, "eval_every": 40, "checkpoint_every": "25"},
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_resumed_is_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str) -> None:
    fastres.train(resumable(tmp_path / "whole", loader), verbosity="quiet")
    train_until(monkeypatch, 63, resumable(tmp_path / "cut", loader))
    fastres.train(resume=tmp_path / "cut", verbosity="quiet")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "how", [{"compile_scope": "whole"}, {"compile_scope": "blocks"}, {"layer_kernels": True}], ids=str
)
def test_resumed_in_a_new_process_with_an_empty_compile_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """What was compiled anew computes the same bits: no choice was made by timing, and none was only remembered."""
    fastres.train(resumable(tmp_path / "whole", **how), verbosity="quiet")
    train_until(monkeypatch, 63, resumable(tmp_path / "cut", **how))
    caches = {name: str(tmp_path / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    command = [sys.executable, "-m", "fastres", "train", "--quiet", "--resume", str(tmp_path / "cut")]
    subprocess.run(command, env={**os.environ, **caches}, cwd=Path(__file__).parent.parent, check=True)
    assert any((tmp_path / "TORCHINDUCTOR_CACHE_DIR").iterdir())
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_training_learns_in_every_precision(tmp_path: Path) -> None:
    for precision in ("bf16", "fp16", "tf32"):
        changes = {
            "execution": {"device": "cuda", "precision": precision},
            "output": {"out": str(tmp_path / precision)},
        }
        assert fastres.train(make_config("smoke", **changes), verbosity="quiet").test_error < 0.1
