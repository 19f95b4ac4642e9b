"""step.py: the update is the plain one, its log is true, and how it runs does not change what is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.models.cifar import CifarNet, init_he_
from fastres.optim import make_sgd, momentum_buffers
from fastres.runtime import DTYPES, Runtime
from fastres.step import Evaluation, TrainStep, evaluate

BATCH, STEPS = 8, 6
CPU = torch.device("cpu")


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """A cold compiler cache takes its time. torch looks at `.grad` while it traces and hides the warning too late."""
    quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    return pytest.mark.timeout(300)(quiet(test))


class Noise:
    """A loader of random batches, a function of the step."""

    name = "noise"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def load(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (BATCH,), generator=generator)
        return images.to(self.dtype).contiguous(memory_format=torch.channels_last), labels

    def close(self) -> None: ...


def make_net(dtype: torch.dtype = torch.float32) -> CifarNet:
    net = CifarNet(8, residual=True)
    init_he_(net, mode="fan_in", generator=torch.Generator().manual_seed(0))
    return net.to(dtype)


def make_step(
    precision: str = "fp32", *, compiled: bool = False, dtype: torch.dtype | None = None, steps: int = STEPS
) -> TrainStep:
    """A TrainStep on noise; `dtype` makes the whole network of that type, without autocast."""
    runtime = Runtime(CPU, precision, compiled, 1, ())
    net = make_net(dtype or torch.float32)
    optimizer = make_sgd(net, lr=0.1, weight_decay=1e-2)
    return TrainStep(net, optimizer, Noise(dtype or runtime.dtype), runtime, num_steps=steps)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_steps_are_the_plain_loop() -> None:
    ours, net = make_step(), make_net()
    velocities = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    loader = Noise()
    for k in range(STEPS):
        lr = 0.1 / (k + 1)
        ours(k, lr)
        images, labels = loader.load(k)
        logits = net(images)
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(net.named_parameters(), gradients, strict=True):
                velocities[name].mul_(0.9).add_(g.add(p, alpha=1e-2))
                p.sub_(velocities[name] * lr)
        assert float(ours.losses[k]) == pytest.approx(loss.item(), rel=1e-5)
        assert int(ours.errors[k]) == int((logits.argmax(1) != labels).sum())
    for (name, a), b in zip(ours.net.state_dict().items(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)  # the fused update rounds its own way
    window = ours.window(1, 4)
    assert window.start == 1
    assert window.losses == ours.losses[1:4].tolist()
    assert window.errors == ours.errors[1:4].tolist()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_its_state_in_fp32(precision: str) -> None:
    ours = make_step(precision, steps=2)
    ours(0, 0.1)
    state = [*ours.net.state_dict().values(), *momentum_buffers(ours.net, ours.optimizer).values(), ours.losses]
    assert {t.dtype for t in state} == {torch.float32}
    logits, loss = ours.forward(*ours.loader.load(1))
    assert logits.dtype == DTYPES[precision]
    assert loss.dtype == torch.float32
    assert ours.scaler.is_enabled() == (precision == "fp16")


def test_a_bf16_gradient_is_the_fp32_gradient_but_for_rounding() -> None:
    def gradient(precision: str) -> Tensor:
        ours = make_step(precision)
        ours.backward(ours.forward(*ours.loader.load(0))[1])
        return torch.cat([p.grad.flatten() for p in ours.net.parameters() if p.grad is not None])

    exact, rounded = gradient("fp32"), gradient("bf16")
    assert not torch.equal(exact, rounded)
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.99


def snapshot(ours: TrainStep) -> dict[str, Tensor]:
    buffers = momentum_buffers(ours.net, ours.optimizer)
    return {k: t.clone() for k, t in {**ours.net.state_dict(), **{f"v/{k}": t for k, t in buffers.items()}}.items()}


def test_warm_up_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backward that also updates, as capture of a whole step does: weights, velocities and BN all change."""
    ours = make_step()
    ours(0, 0.1)
    before, generator = snapshot(ours), torch.get_rng_state()
    during: list[dict[str, Tensor]] = []
    backward = ours.backward

    def whole_step(loss: Tensor) -> None:
        backward(loss)
        ours.optimizer.step()
        during.append(snapshot(ours))

    monkeypatch.setattr(ours, "backward", whole_step)
    ours.warm_up(*ours.loader.load(1))
    assert {name for name in before if torch.equal(before[name], during[0][name])} == set()  # it would show
    after = snapshot(ours)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set()
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in ours.net.parameters())


@compiles
def test_compiled_is_eager_in_fp64_over_50_steps() -> None:
    """fp64, where rounding cannot grow into a difference within 50 steps, so that only a wrong formula would."""
    eager, compiled = (make_step(compiled=on, dtype=torch.float64, steps=50) for on in (False, True))
    names = list(compiled.net.state_dict())
    for k in range(50):
        losses = []
        for one in (eager, compiled):
            images, labels = one.loader.load(k)
            loss = one.forward(images, labels)[1]
            one.backward(loss)
            one.update()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert names == list(eager.net.state_dict())  # saved names stay clean
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5  # equal blocks share their code


@compiles
def test_compiled_bf16_is_as_exact_as_eager_bf16() -> None:
    def gradient(**how: Any) -> Tensor:
        ours = make_step(**how)
        images, labels = Noise(torch.bfloat16).load(0)
        ours.backward(ours.forward(images.to(ours.loader.load(0)[0].dtype), labels)[1])
        return torch.cat([p.grad.flatten().double() for p in ours.net.parameters() if p.grad is not None])

    exact = gradient(dtype=torch.float64)
    eager = (gradient(precision="bf16") - exact).norm()
    compiled = (gradient(precision="bf16", compiled=True) - exact).norm()
    assert eager > 0
    assert compiled <= 1.2 * eager


class Fixed(nn.Module):
    """Answers with its input's first ten numbers; complains in training mode."""

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return images.flatten(1)[:, :10]


def batches_of(answers: list[int], labels: list[int], size: int) -> list[tuple[Tensor, Tensor]]:
    images = torch.zeros(len(answers), 3, 32, 32)
    images.view(len(answers), -1)[torch.arange(len(answers)), torch.tensor(answers)] = 1
    target = torch.tensor(labels)
    return [(images[k : k + size], target[k : k + size]) for k in range(0, len(answers), size)]


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_evaluation_counts_what_was_answered(size: int) -> None:
    answers, labels = [0, 1, 2, 2, 9, 9, 3], [0, 1, 2, 3, 9, 0, 3]
    net = Fixed()
    result = evaluate(net, batches_of(answers, labels, size), torch.float32)
    assert net.training
    assert result.num_images == 7
    assert result.error == pytest.approx(2 / 7)
    assert result.confusion[3][2] == 1
    assert result.confusion[0][9] == 1
    assert result.class_errors[:4] == [0.5, 0.0, 0.0, 0.5]
    assert result.class_errors[5] is None
    exp = torch.tensor(1.0).exp()
    right, wrong = (-torch.log(v / (exp + 9)) for v in (exp, torch.tensor(1.0)))
    assert result.loss == pytest.approx(float(5 * right + 2 * wrong) / 7, rel=1e-6)


def test_evaluation_uses_running_statistics_and_leaves_them() -> None:
    net = make_net()
    images, labels = Noise().load(0)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    together = evaluate(net, [(images, labels)], torch.float32)
    one_by_one = evaluate(net, [(images[k : k + 1], labels[k : k + 1]) for k in range(BATCH)], torch.float32)
    assert together.confusion == one_by_one.confusion
    assert together.loss == pytest.approx(one_by_one.loss, rel=1e-5)
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items())
    assert net.training


def test_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no batches"):
        evaluate(make_net(), [], torch.float32)
    assert Evaluation(0.0, [[1, 0], [0, 1]]).error == 0
