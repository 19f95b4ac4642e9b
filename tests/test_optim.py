"""The schedule at its corners, the warm-up rule, and SGD against the paper's formula."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres import checkpoint
from fastres.config import FIRST_LOOK, Recipe
from fastres.errors import InputError
from fastres.models.cifar import CifarNet
from fastres.optim import (
    WARMUP_LOOK_EVERY,
    WARMUP_WINDOW,
    LrSchedule,
    lr_ratios,
    make_sgd,
    momentum_buffers,
    set_lr,
    warmup_over,
)
from fastres.runtime import Runtime
from fastres.step import Replica, TrainStep
from tests.runs import assert_same_run, tiny
from tests.test_loop import train_until
from tests.test_step import CPU, Noise, make_net, one_thread  # noqa: F401 (a fixture for the whole file)

PAPER = LrSchedule(Recipe())


def changed(**changes: Any) -> LrSchedule:
    return LrSchedule(dataclasses.replace(Recipe(), **changes))


def test_the_papers_schedule() -> None:
    expected = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    assert {step: PAPER.at(step) for step in expected} == expected


def test_any_decay_and_milestone() -> None:
    schedule = changed(lr=1.0, lr_decay=0.3, milestones=(2, 3, 7))
    assert [schedule.at(step) for step in (1, 2, 3, 7)] == pytest.approx([1, 0.3, 0.09, 0.027])
    # a decay just below one half must not be taken for it
    assert changed(lr=1.0, lr_decay=0.499).at(48_000) == pytest.approx(0.499**2, rel=1e-12)


def test_constant_warmup_ends_by_itself() -> None:
    schedule = changed(warmup="constant")
    assert [schedule.at(step) for step in (0, 399, 400, 32_000)] == [0.01, 0.01, 0.1, 0.01]


def test_error_warmup_ends_when_told() -> None:
    schedule = changed(warmup="error")
    assert schedule.at(5_000, None) == 0.01
    assert [schedule.at(step, 500) for step in (499, 500, 32_000, 48_000)] == [0.01, 0.1, 0.01, 0.001]


@pytest.mark.parametrize("warmup_steps", [1, 4])
def test_ramp_and_line(warmup_steps: int) -> None:
    """Above zero from the first step to the last, straight on both sides, `lr` at the top, once."""
    schedule = changed(schedule="linear", warmup="ramp", warmup_steps=warmup_steps, steps=20, milestones=())
    lrs = [schedule.at(step) for step in range(20)]
    assert lrs[warmup_steps] == max(lrs) == 0.1
    assert min(lrs) > 0
    up = [b - a for a, b in zip([0.0, *lrs[:warmup_steps]], lrs[: warmup_steps + 1], strict=True)]
    down = [a - b for a, b in zip(lrs[warmup_steps:], [*lrs[warmup_steps + 1 :], 0.0], strict=True)]
    assert up == pytest.approx([0.1 / (warmup_steps + 1)] * len(up))
    assert down == pytest.approx([0.1 / (20 - warmup_steps)] * len(down))


def test_ramp_then_steps_and_line_without_warmup() -> None:
    ramp = changed(warmup="ramp")
    assert 0 < ramp.at(0) < ramp.at(399) < ramp.at(400) == 0.1
    assert ramp.at(32_000) == 0.01
    line = changed(schedule="linear", steps=10)
    assert [line.at(step) for step in range(10)] == pytest.approx([0.01 * (10 - step) for step in range(10)])
    error = changed(schedule="linear", steps=10, warmup="error")
    assert [error.at(step, 5) for step in (4, 5, 9)] == pytest.approx([0.01, 0.1, 0.02])


def test_a_ramp_as_long_as_the_run() -> None:
    schedule = changed(schedule="linear", warmup="ramp", warmup_steps=3, steps=3)
    assert [schedule.at(step) for step in range(3)] == pytest.approx([0.025, 0.05, 0.075])
    assert schedule.at(3) == 0  # the rate after the last step, which the end of the warm-up tells


def test_the_first_look_at_the_training_error_is_where_the_config_says() -> None:
    assert FIRST_LOOK == -(-WARMUP_WINDOW // WARMUP_LOOK_EVERY) * WARMUP_LOOK_EVERY


def test_the_papers_warmup_rule() -> None:
    """Below 80 % over the last 391 steps of 100 images, or 31,280 wrong answers; 80 % itself is not."""
    assert not warmup_over([80] * 391, 100)
    assert warmup_over([79] + [80] * 390, 100)
    assert warmup_over([100] * 1_000 + [79] * 391, 100)  # what was before the window does not count
    assert not warmup_over([0] + [80] * 391, 100)
    assert not warmup_over([], 100)
    assert not warmup_over([128 * 9 // 10] * 391, 128)
    assert warmup_over([128 * 7 // 10] * 391, 128)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("decay_on", ["all", "weights"])
def test_update_is_the_papers(fused: bool, decay_on: Literal["all", "weights"]) -> None:
    """v <- 0.9 v + g + wd w, w <- w - lr v, with lr changing on the way, against plain arithmetic in fp64."""
    net = small_net().double()
    optimizer = make_sgd(net, lr=0.1, momentum=0.9, weight_decay=0.1, weight_decay_on=decay_on, fused=fused)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    velocity = {name: torch.zeros_like(w) for name, w in weights.items()}
    generator = torch.Generator().manual_seed(1)
    for lr in (0.1, 0.1, 0.01, 0.5):
        set_lr(optimizer, torch.tensor([lr]))
        lr32 = float(torch.tensor(lr))  # the optimizer holds it in fp32
        for name, p in net.named_parameters():
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            decay = 0.1 if decay_on == "all" or name in ("0.weight", "3.weight") else 0.0
            velocity[name] = 0.9 * velocity[name] + p.grad + decay * weights[name]
            weights[name] = weights[name] - lr32 * velocity[name]
        optimizer.step()
    buffers = momentum_buffers(net, optimizer)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(buffers[name], velocity[name], rtol=1e-12, atol=1e-14)


def test_equal_to_torchs_plain_sgd_bit_for_bit() -> None:
    """Velocities that begin as zeros give what torch gives, which copies the first gradient."""
    ours, plain = small_net(), small_net()
    optimizer = make_sgd(ours, lr=0.05, momentum=0.9, weight_decay=0.0, weight_decay_on="all", fused=True)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, fused=True)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for net, sgd in ((ours, optimizer), (plain, theirs)):
            sgd.zero_grad()
            net(images).square().mean().backward()
            sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_lr_and_velocities_are_the_same_tensors_throughout() -> None:
    """What a captured graph and a checkpoint rely on."""
    net = CifarNet(8).to(memory_format=torch.channels_last)
    optimizer = make_sgd(net, lr=0.1, momentum=0.9, weight_decay=1e-4, weight_decay_on="weights", fused=True)
    before = momentum_buffers(net, optimizer)
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert list(before) == [name for name, _ in net.named_parameters()]
    assert not any(buffer.any() for buffer in before.values())
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    set_lr(optimizer, torch.tensor([0.025]))
    optimizer.step()
    after = momentum_buffers(net, optimizer)
    assert all(after[name] is before[name] and after[name].any() for name in before if not name.startswith("fc.b"))
    assert [group["lr"] for group in optimizer.param_groups] == [torch.tensor(0.025)] * 2
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs, strict=True))
    parameters = dict(net.named_parameters())
    assert all(after[name].stride() == parameters[name].stride() for name in after)


def test_weight_decay_on_weights_leaves_norms_and_biases_out() -> None:
    net = CifarNet(8)
    optimizer = make_sgd(net, lr=0.1, momentum=0.9, weight_decay=1e-4, weight_decay_on="weights", fused=True)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in net.named_parameters() if id(p) in decayed}
    assert names == {name for name, _ in net.named_parameters() if "conv" in name or name == "fc.weight"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))


def test_no_momentum_keeps_no_velocity() -> None:
    net = small_net()
    optimizer = make_sgd(net, lr=1.0, momentum=0.0, weight_decay=0.0, weight_decay_on="all", fused=True)
    bias = dict(net.named_parameters())["3.bias"]
    before = bias.detach().clone()
    bias.grad = torch.ones(5)
    optimizer.step()
    assert momentum_buffers(net, optimizer) == {}
    assert torch.equal(bias.detach(), before - 1)


# --- the learning rate inside the velocity, as Caffe has it

# Powers of two, whose ratios are exact: a ramp, a fall by 16, a rise by 4, none, a fall by 8.
RATES = [2**-6, 2**-5, 2**-4, 2**-8, 2**-8, 2**-6, 2**-6, 2**-6, 2**-9, 2**-9]


def replica(*, inside: bool, rates: list[float] = RATES, **how: Any) -> Replica:
    """In fp64 unless `how`, options of `Runtime`, says otherwise."""
    runtime = Runtime(CPU, **{"precision": "fp32", **how})
    net = make_net(torch.float32 if how else torch.float64)
    optimizer = make_sgd(net, lr=0.1, momentum=0.9, weight_decay=1e-2, lr_in_velocity=inside)
    made = Replica(net, optimizer, Noise(runtime.dtype if how else torch.float64), runtime, num_steps=len(rates))
    made.set_lrs(rates.__getitem__)
    return made


def run(replica: Replica) -> Replica:
    step = TrainStep([replica])
    for k in range(replica.num_steps):
        step(k)
    return replica


def caffe() -> tuple[nn.Module, dict[str, Tensor]]:
    """Caffe's own formula in a plain loop, in fp64: u <- 0.9 u + lr (g + wd w), w <- w - u."""
    net, loader = make_net(torch.float64), Noise(torch.float64)
    updates = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for k, lr in enumerate(RATES):
        images, labels = loader.load(k)
        gradients = torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters()))
        with torch.no_grad():
            for (name, w), g in zip(net.named_parameters(), gradients, strict=True):
                updates[name] = 0.9 * updates[name] + lr * (g + 1e-2 * w)
                w.sub_(updates[name])
    return net, updates


def test_the_rate_in_the_velocity_is_caffes_formula() -> None:
    ours, (net, updates) = run(replica(inside=True)), caffe()
    outside = run(replica(inside=False)).net.state_dict()
    for name, w in net.named_parameters():
        torch.testing.assert_close(ours.net.get_parameter(name), w, rtol=1e-9, atol=1e-12)
        v = momentum_buffers(ours.net, ours.optimizer)[name]  # what a checkpoint saves
        torch.testing.assert_close(RATES[-1] * v, updates[name], rtol=1e-8, atol=1e-12)
        assert (outside[name] - w).norm() > 1e-4 * w.norm()  # a test that PyTorch's formula would not pass


def test_inside_and_outside_are_equal_in_every_bit_while_the_rate_stays() -> None:
    rates = [0.1] * 8
    for how in ({}, {"precision": "fp32"}, {"precision": "bf16", "shadow_weights": True}):
        inside, outside = (run(replica(inside=inside, rates=rates, **how)) for inside in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(inside.state(), outside.state(), strict=True))


def test_shadowed_weights_too_have_the_rate_inside() -> None:
    """A fall at the last step alone: velocities differ from those without by the ratio's share, and by that only."""
    rates = [0.125] * 3 + [0.03125]
    inside, outside = (
        run(replica(inside=inside, rates=rates, precision="bf16", shadow_weights=True)) for inside in (True, False)
    )
    before = run(replica(inside=False, rates=rates[:3], precision="bf16", shadow_weights=True))
    velocities = [momentum_buffers(one.net, one.optimizer) for one in (inside, outside, before)]
    for name, v in velocities[0].items():
        torch.testing.assert_close(v - velocities[1][name], 0.9 * 3 * velocities[2][name], rtol=1e-4, atol=1e-5)


def test_ratios_of_a_table_that_a_warmup_changes_on_the_way() -> None:
    rates = torch.tensor([0.01, 0.01, 0.1, 0.1, 0.3, 0.003])
    assert lr_ratios(rates).tolist() == pytest.approx([1, 1, 0.1, 1, 1 / 3, 100], rel=1e-6)
    assert lr_ratios(rates)[[0, 1, 3]].tolist() == [1, 1, 1]
    one = replica(inside=True, rates=[0.01] * 6)
    one.set_lrs(lambda _: 0.1, 4)  # the warm-up is over
    assert one.lr_ratios[:6].tolist() == pytest.approx([1, 1, 1, 1, 0.1, 1])
    assert (one.lr_ratios[6:] == 1).all()


def test_a_rate_that_is_zero_in_fp32_leaves_the_velocities_alone() -> None:
    assert lr_ratios(torch.tensor([0.1, 1e-50, 0.0])).tolist() == [1, 1, 1]


def test_without_momentum_there_is_nothing_to_scale() -> None:
    net = make_net()
    optimizer = make_sgd(net, lr=0.1, momentum=0.0, weight_decay=1e-4, lr_in_velocity=True)
    run(Replica(net, optimizer, Noise(), Runtime(CPU, "fp32"), num_steps=2))


def test_a_run_cut_at_a_milestone_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first resumed update is the one at which the rate falls."""
    short = {"steps": 14, "milestones": [12]}
    how = {"recipe": {**short, "lr_in_velocity": True}, "model": {"norm_batch": 8}}
    fastres.train(tiny(tmp_path / "whole", **how), verbosity="quiet")
    train_until(monkeypatch, 11, tiny(tmp_path / "cut", **how))
    assert checkpoint.load(tmp_path / "cut" / checkpoint.NEWEST).meta["step"] == 12
    with pytest.raises(InputError, match=r"recipe\.lr_in_velocity: True -> False"):
        fastres.train(tiny(tmp_path / "cut", recipe=short, model=how["model"]), resume=tmp_path / "cut")
    fastres.train(resume=tmp_path / "cut", verbosity="quiet")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    fastres.train(tiny(tmp_path / "outside", recipe=short, model=how["model"]), verbosity="quiet")
    ours, theirs = (checkpoint.load(tmp_path / name / checkpoint.NEWEST) for name in ("whole", "outside"))
    assert not torch.equal(ours.tensors["conv1.weight"], theirs.tensors["conv1.weight"])
