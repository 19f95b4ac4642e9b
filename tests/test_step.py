"""step.py: the update is the plain one, its log is true, and how it runs does not change what is computed."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.config import MAX_GRAPH_STEPS
from fastres.cudagraph import WARM_UP_CALLS
from fastres.models.cifar import CifarNet, init_he_
from fastres.optim import make_sgd, momentum_buffers
from fastres.runtime import DTYPES, Runtime
from fastres.step import Replica, TrainStep, compile_options

BATCH, STEPS = 8, 6
CPU = torch.device("cpu")


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """A cold compiler cache takes its time. torch looks at `.grad` while it traces and hides the warning too late."""
    quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    return pytest.mark.timeout(300)(quiet(test))


class Noise:
    """A loader of random batches, a function of seed and step."""

    name, prefetched, period = "noise", 0, 1

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device = CPU) -> None:
        self.dtype, self.seed, self.device = dtype, seed, device
        self.prepared: list[int] = []

    def prepare(self, step: int) -> None:
        self.prepared.append(step)

    def load(self, counter: Tensor | int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + int(counter))
        images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (BATCH,), generator=generator)
        images = images.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        return images, labels.to(self.device)

    def close(self) -> None: ...


def make_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> CifarNet:
    net = CifarNet(8, residual=True)
    init_he_(net, mode="fan_in", generator=torch.Generator().manual_seed(seed))
    return net.to(dtype)


def make_replica(
    precision: str = "fp32",
    *,
    scope: Literal["none", "blocks", "whole"] = "none",
    dtype: torch.dtype | None = None,
    steps: int = STEPS,
    seed: int = 0,
    device: torch.device = CPU,
) -> Replica:
    """A replica on noise; `dtype` makes the whole network of that type, without autocast."""
    runtime = Runtime(device, precision, scope)
    net = make_net(dtype or torch.float32, seed).to(device)
    optimizer = make_sgd(net, lr=0.1, momentum=0.9, weight_decay=1e-2)
    replica = Replica(net, optimizer, Noise(dtype or runtime.dtype, seed, device), runtime, num_steps=steps)
    replica.set_lrs(lambda step: 0.1 / (step + 1))
    return replica


def gradient(**how: Any) -> Tensor:
    """The gradient of the first batch, all parameters in one; the batch is the same but for rounding."""
    replica = make_replica(**how)
    images, labels = Noise(torch.bfloat16, device=how.get("device", CPU)).load(0)
    replica.backward(replica.forward(images.to(replica.loader.load(replica.counter)[0].dtype), labels)[0])
    return torch.cat([p.grad.flatten().double() for p in replica.net.parameters() if p.grad is not None])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_steps_are_the_plain_loop() -> None:
    replica, net = make_replica(), make_net()
    ours, loader = TrainStep([replica]), Noise()
    velocities = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for k in range(STEPS):
        assert ours(k) == 1
        images, labels = loader.load(k)
        logits = net(images)
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(net.named_parameters(), gradients, strict=True):
                velocities[name].mul_(0.9).add_(g.add(p, alpha=1e-2))
                p.sub_(velocities[name] * (0.1 / (k + 1)))
        assert float(replica.losses[k]) == pytest.approx(loss.item(), rel=1e-5)
        assert int(replica.errors[k]) == int((logits.argmax(1) != labels).sum())
    for (name, a), b in zip(replica.net.state_dict().items(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)  # the fused update rounds its own way
    assert replica.loader.prepared == list(range(STEPS))  # type: ignore[attr-defined]
    assert int(replica.counter) == STEPS
    window = replica.window(1, 4)
    assert (window.start, window.losses, window.errors) == (
        1,
        replica.losses[1:4].tolist(),
        replica.errors[1:4].tolist(),
    )


def test_learning_rates_change_from_a_step_on() -> None:
    replica = make_replica()
    replica.set_lrs(lambda step: step + 0.5, 2)
    assert replica.lrs[:STEPS].tolist() == pytest.approx([0.1, 0.05, 2.5, 3.5, 4.5, 5.5])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_its_state_in_fp32(precision: str) -> None:
    replica = make_replica(precision, steps=2)
    TrainStep([replica])(0)
    floats = [t for t in replica.state() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float32}
    seen: list[torch.dtype] = []
    replica.net.get_submodule("layer3").register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    replica.net.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    loss, _ = replica.forward(*replica.loader.load(replica.counter))
    assert seen == [DTYPES[precision], torch.float32]  # the layers, and the logits
    assert loss.dtype == torch.float32
    assert replica.scaler.is_enabled() == (precision == "fp16")


def test_a_bf16_gradient_is_the_fp32_gradient_but_for_rounding() -> None:
    exact, rounded = gradient(precision="fp32"), gradient(precision="bf16")
    assert not torch.equal(exact, rounded)
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.99


# --- warm-up and capture, with a stand-in for the GPU's graph


def everything(replica: Replica) -> list[Tensor]:
    """Every tensor of a replica, listed here once more: what `state` forgets is not put back after a capture."""
    lrs = [group["lr"] for group in replica.optimizer.param_groups]
    logs = [replica.counter, replica.lrs, replica.losses, replica.errors]
    return [*replica.net.state_dict().values(), *momentum_buffers(replica.net, replica.optimizer).values(), *lrs, *logs]


class StandIn:
    """Does to weights, momentum, BN statistics and counters what a capture does, and replays by calling."""

    def __init__(self, branches: Sequence[Callable[[], None]], static: Sequence[Tensor]) -> None:
        self.branches, self.static = branches, static
        self.replays = 0
        self.before = [t.clone() for t in static]
        for _ in range(WARM_UP_CALLS):
            for branch in branches:
                branch()
        self.changed = [not torch.equal(now, was) for now, was in zip(static, self.before, strict=True)]

    def replay(self) -> None:
        self.replays += 1
        for branch in self.branches:
            branch()

    def check(self) -> None: ...


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_warm_up_and_capture_leave_no_trace(precision: str) -> None:
    seeds = (0, 1) if precision == "fp32" else (0,)  # fp16 takes a second a step on a CPU
    ours = TrainStep([make_replica(precision, seed=seed) for seed in seeds])
    ours(0)
    state = [t for replica in ours.replicas for t in everything(replica)]
    before, generator = [t.clone() for t in state], torch.get_rng_state()
    scales = [replica.scaler.state_dict() for replica in ours.replicas]
    made: list[StandIn] = []

    def capture(branches: Sequence[Callable[[], None]], static: Sequence[Tensor]) -> StandIn:
        made.append(StandIn(branches, static))
        return made[-1]

    ours.warm_up(capture, graph_steps=2)
    assert len(made) == 2
    assert all(made[0].changed)  # or a tensor that is left out of the restore would not show
    assert all(torch.equal(now, was) for now, was in zip(state, before, strict=True))
    assert [replica.scaler.state_dict() for replica in ours.replicas] == scales
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for replica in ours.replicas for p in replica.net.parameters())


def test_captured_steps_are_the_same_steps_one_or_several_at_a_time() -> None:
    plain, captured = TrainStep([make_replica(steps=10)]), TrainStep([make_replica(steps=10)])
    made: list[int] = []

    def capture(branches: Sequence[Callable[[], None]], static: Sequence[Tensor]) -> StandIn:
        return StandIn(branches, static)

    captured.warm_up(capture, graph_steps=4)
    step = 0
    while step < 10:  # to a log step at 6, then to the end: 4 1 1 4
        made.append(captured(step, 6 if step < 6 else 10))
        step += made[-1]
    assert made == [4, 1, 1, 4]
    for step in range(10):
        plain(step)
    for a, b in zip(plain.replicas[0].state(), captured.replicas[0].state(), strict=True):
        assert torch.equal(a, b)
    assert captured.replicas[0].loader.prepared == [0, *range(10)]  # type: ignore[attr-defined]


def test_a_run_of_one_step_has_room_for_the_warm_up_of_the_longest_graph() -> None:
    """On a GPU an index past the end ends the process."""
    replica = make_replica(steps=1)
    step, furthest = TrainStep([replica]), 0

    def count() -> None:
        nonlocal furthest
        furthest = int(replica.counter)
        replica.log(torch.zeros(()), torch.zeros((), dtype=torch.int32))

    replica.step = count  # type: ignore[method-assign] # 192 of the real ones take long
    step.warm_up(StandIn, graph_steps=MAX_GRAPH_STEPS)
    assert furthest == WARM_UP_CALLS * MAX_GRAPH_STEPS - 1
    assert len(replica.lrs) == len(replica.losses) == len(replica.errors) > furthest


def test_several_steps_of_several_replicas_are_prepared_step_by_step() -> None:
    """A pipeline that they share goes one way: a step back would start it anew."""
    step = TrainStep([make_replica(steps=8), make_replica(steps=8)])
    step.warm_up(StandIn, graph_steps=3)
    asked: list[int] = []
    for replica in step.replicas:
        replica.loader.prepare = asked.append  # type: ignore[method-assign, assignment]
    assert step(0, 8) == 3
    assert asked == [0, 0, 1, 1, 2, 2]


def test_replicas_side_by_side_are_what_each_is_alone() -> None:
    together = TrainStep([make_replica(seed=seed) for seed in range(3)])
    for step in range(STEPS):
        together(step)
    for seed in range(3):
        alone = TrainStep([make_replica(seed=seed)])
        for step in range(STEPS):
            alone(step)
        for a, b in zip(alone.replicas[0].state(), together.replicas[seed].state(), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(together.replicas[0].losses, together.replicas[1].losses)


def test_seek() -> None:
    ours = TrainStep([make_replica(), make_replica(seed=1)])
    ours.seek(4)
    ours(4)
    assert [int(replica.counter) for replica in ours.replicas] == [5, 5]
    assert float(ours.replicas[0].losses[4]) > 0
    assert not ours.replicas[0].losses[:4].any()


# --- compiled


def assert_compiled_is_eager_in_fp64(scope: Literal["blocks", "whole"], device: torch.device) -> None:
    """fp64, where rounding cannot grow into a difference within 50 steps, so that only a wrong formula would."""
    make = functools.partial(make_replica, dtype=torch.float64, steps=50, device=device)
    eager, compiled = make(), make(scope=scope)
    names = list(compiled.net.state_dict())
    for _ in range(50):
        losses = []
        for one in (eager, compiled):
            images, labels = one.loader.load(one.counter)
            loss = one.forward(images, labels)[0]
            one.backward(loss)
            one.update()
            one.counter.add_(1)
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert names == list(eager.net.state_dict())  # saved names stay clean
    for name, value in eager.net.state_dict().items():
        torch.testing.assert_close(compiled.net.state_dict()[name], value, rtol=1e-6, atol=1e-9)


def assert_compiled_bf16_is_as_exact_as_eager(scope: str, device: torch.device) -> None:
    exact = gradient(dtype=torch.float64, device=device)
    found = (gradient(precision="bf16", scope=s, device=device) for s in ("none", scope))
    eager, compiled = ((one - exact).norm() for one in found)
    assert eager > 0
    assert compiled <= 1.2 * eager


@compiles
@pytest.mark.parametrize("scope", ["blocks", "whole"])
def test_compiled_is_eager_in_fp64_over_50_steps(scope: Literal["blocks", "whole"]) -> None:
    assert_compiled_is_eager_in_fp64(scope, CPU)


@compiles
@pytest.mark.parametrize("scope", ["blocks", "whole"])
def test_compiled_bf16_is_as_exact_as_eager_bf16(scope: str) -> None:
    assert_compiled_bf16_is_as_exact_as_eager(scope, CPU)


@pytest.mark.parametrize("mode", ["default", "plain", "max-autotune"])
def test_compile_modes_are_options_that_torch_knows(mode: str) -> None:
    gpu, cpu = (compile_options(torch.device(kind), mode) or {} for kind in ("cuda", "cpu"))
    assert ("combo_kernels" in gpu, "max_autotune" in gpu) == (mode != "plain", mode == "max-autotune")
    assert "combo_kernels" not in cpu
    for options in (gpu, cpu):
        torch.compile(lambda x: x, options=dict(options))  # names and types are checked here, and nothing is compiled


@compiles
@pytest.mark.parametrize(("scope", "graphs"), [("blocks", 5), ("whole", 1)])
def test_equal_networks_share_one_compilation(scope: Literal["blocks", "whole"], graphs: int) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours = TrainStep([make_replica(scope=scope, seed=seed) for seed in range(3)])
    ours.warm_up()
    ours(0)
    ours(1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs
