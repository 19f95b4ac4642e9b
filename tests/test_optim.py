"""The schedule at its corners, the warm-up rule, and SGD against the paper's formula."""

import dataclasses
from typing import Literal

import pytest
import torch
from torch import nn

from fastres.models.cifar import CifarNet
from fastres.optim import LrSchedule, make_sgd, momentum_buffers, set_lr, warmup_over

PAPER = LrSchedule(
    schedule="step",
    lr=0.1,
    milestones=(32_000, 48_000),
    lr_decay=0.1,
    num_steps=64_000,
    warmup="none",
    warmup_steps=400,
    warmup_lr=0.01,
)


def test_the_papers_schedule() -> None:
    expected = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    assert {step: PAPER.at(step) for step in expected} == expected


def test_any_decay_and_milestone() -> None:
    schedule = dataclasses.replace(PAPER, lr=1.0, lr_decay=0.3, milestones=(2, 3, 7))
    assert [schedule.at(step) for step in (1, 2, 3, 7)] == pytest.approx([1, 0.3, 0.09, 0.027])
    assert dataclasses.replace(PAPER, lr=1.0, lr_decay=3.0).at(48_000) == 9.0
    # a decay just below one half must not be taken for it
    assert dataclasses.replace(PAPER, lr=1.0, lr_decay=0.499).at(48_000) == pytest.approx(0.499**2, rel=1e-12)


def test_constant_warmup_ends_by_itself() -> None:
    schedule = dataclasses.replace(PAPER, warmup="constant")
    assert [schedule.at(step) for step in (0, 399, 400, 32_000)] == [0.01, 0.01, 0.1, 0.01]


def test_error_warmup_ends_when_told() -> None:
    schedule = dataclasses.replace(PAPER, warmup="error")
    assert schedule.at(5_000, None) == 0.01
    assert [schedule.at(step, 500) for step in (499, 500, 32_000, 48_000)] == [0.01, 0.1, 0.01, 0.001]


@pytest.mark.parametrize("warmup_steps", [1, 4])
def test_ramp_and_line(warmup_steps: int) -> None:
    """Above zero from the first step to the last, straight on both sides, `lr` at the top, once."""
    schedule = dataclasses.replace(
        PAPER, schedule="linear", warmup="ramp", warmup_steps=warmup_steps, num_steps=20, milestones=()
    )
    lrs = [schedule.at(step) for step in range(20)]
    assert lrs[warmup_steps] == max(lrs) == 0.1
    assert min(lrs) > 0
    up = [b - a for a, b in zip([0.0, *lrs[:warmup_steps]], lrs[: warmup_steps + 1], strict=True)]
    down = [a - b for a, b in zip(lrs[warmup_steps:], [*lrs[warmup_steps + 1 :], 0.0], strict=True)]
    assert up == pytest.approx([0.1 / (warmup_steps + 1)] * len(up))
    assert down == pytest.approx([0.1 / (20 - warmup_steps)] * len(down))


def test_ramp_then_steps_and_line_without_warmup() -> None:
    ramp = dataclasses.replace(PAPER, warmup="ramp")
    assert 0 < ramp.at(0) < ramp.at(399) < ramp.at(400) == 0.1
    assert ramp.at(32_000) == 0.01
    line = dataclasses.replace(PAPER, schedule="linear", num_steps=10)
    assert [line.at(step) for step in range(10)] == pytest.approx([0.01 * (10 - step) for step in range(10)])
    error = dataclasses.replace(line, warmup="error")
    assert [error.at(step, 5) for step in (4, 5, 9)] == pytest.approx([0.01, 0.1, 0.02])


def test_a_ramp_as_long_as_the_run() -> None:
    schedule = dataclasses.replace(PAPER, schedule="linear", warmup="ramp", warmup_steps=3, num_steps=3)
    assert [schedule.at(step) for step in range(3)] == pytest.approx([0.025, 0.05, 0.075])


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
