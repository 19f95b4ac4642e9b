"""SGD as the paper has it (section 3.4), and its learning rate as a pure function of the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastres.config import Recipe

WARMUP_WINDOW = 391  # steps: about an epoch of 50,000 images in batches of 128
WARMUP_LOOK_EVERY = 100  # steps between two looks at the training error
WARMUP_ERROR = 0.8  # training error, a fraction, below which ResNet-110's warm-up ends (section 4.2)


@dataclass(frozen=True)
class LrSchedule:
    """The learning rate of every step, as a recipe has it: a warm-up, then steps or a straight line."""

    recipe: Recipe

    def at(self, step: int, warmup_end: int | None = None) -> float:
        """The learning rate of one update.

        Args:
            step: 0-based index of the update about to be made.
            warmup_end: "error" only: the step that was the first without warm-up, None while it goes on.
        """
        recipe = self.recipe
        end = self._first_full_step(warmup_end)
        if end is None or step < end:
            # A ramp's first step is already above zero; the step after its last is the first at the full rate.
            ramp = recipe.lr * (step + 1) / (recipe.warmup_steps + 1)
            return ramp if recipe.warmup == "ramp" else recipe.warmup_lr
        if recipe.schedule == "linear":
            # Falls from `lr`, at the first step after the warm-up, to zero at `steps`, which is never taken.
            return recipe.lr * (recipe.steps - step) / max(1, recipe.steps - end)
        passed = sum(step >= milestone for milestone in recipe.milestones)
        # Dividing by a whole number where the decay is one over it: 0.1 -> 0.01 -> 0.001, each rounded once.
        divisor = round(1 / recipe.lr_decay)
        whole = divisor > 0 and 1 / divisor == recipe.lr_decay
        return recipe.lr / divisor**passed if whole else recipe.lr * recipe.lr_decay**passed

    def _first_full_step(self, seen: int | None) -> int | None:
        """The first step without warm-up, or None while it goes on; `seen` is what "error" was told."""
        if self.recipe.warmup == "none":
            return 0
        return seen if self.recipe.warmup == "error" else self.recipe.warmup_steps


def warmup_over(errors: Sequence[int], batch_size: int) -> bool:
    """Whether ResNet-110's warm-up is over: training error below 80 % over the preceding `WARMUP_WINDOW` steps.

    The paper's words (section 4.2): "we use 0.01 to warm up the training until the training error is below 80%".

    Args:
        errors: Wrong answers in each of the last steps, newest last. What is before the window is not looked at; a
            shorter history is judged as it is, an empty one is no proof.
        batch_size: Images in each step.
    """
    window = errors[-WARMUP_WINDOW:]
    return sum(window) < WARMUP_ERROR * batch_size * len(window)


def make_sgd(
    net: nn.Module,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    weight_decay_on: Literal["all", "weights"] = "all",
    lr_in_velocity: bool = False,
    fused: bool = True,
) -> torch.optim.SGD:
    """SGD with momentum, no Nesterov, no dampening: v <- momentum v + (g + weight_decay w), w <- w - lr v.

    The learning rate stays outside the velocity, as in PyTorch; in Caffe, where the paper's networks were trained, it
    is inside: u <- momentum u + lr (g + weight_decay w), w <- w - u. The two differ only for the steps after a change
    of lr, in which old velocity counts with the new rate here and with the old one there. Since u = lr v, Caffe's is
    had by scaling v with the old rate over the new one before the update (`lr_ratios`, `scale_velocities`); v, in units
    of gradients, is what the optimizer holds and a checkpoint saves either way.

    The learning rate is a tensor on the device, which `set_lr` fills in place, and the velocities exist, as zeros,
    before the first step: a captured graph and a checkpoint see the same tensors from step 0 on.

    Args:
        net: On its device.
        lr: Of the first step.
        momentum, weight_decay: As in the formula.
        weight_decay_on: "all" parameters, as most reproductions do (the paper does not say), or "weights" of
            convolutions and linear layers only, without batch norm's and biases.
        lr_in_velocity: Only noted here, under this name in the parameter groups, for whoever calls `step`.
        fused: One kernel for many parameters. The others are for comparison.
    """
    device = next(net.parameters()).device
    decayed = [p for p in net.parameters() if p.ndim > 1 or weight_decay_on == "all"]
    others = [p for p in net.parameters() if p.ndim <= 1 and weight_decay_on == "weights"]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "lr_in_velocity": lr_in_velocity},
        {"params": others, "weight_decay": 0.0, "lr_in_velocity": lr_in_velocity},
    ]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=torch.tensor(lr, dtype=torch.float32, device=device),
        momentum=momentum,
        fused=fused,
        foreach=False if not fused else None,
    )
    if momentum:
        for parameter in net.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer: torch.optim.SGD, lr: Tensor) -> None:
    """Set the learning rate of the next step, in place: the tensor stays the one that a captured graph reads.

    Args:
        optimizer: From `make_sgd`.
        lr: One number, float32, on the optimizer's device.
    """
    optimizer.param_groups[0]["lr"].copy_(lr.view(()))  # that of all groups


def lr_ratios(lrs: Tensor) -> Tensor:
    """What velocities are scaled with before each step's update to have the rate inside: the last rate over this one.

    Args:
        lrs: float32 `(steps,)`, the rates of steps in a row.

    Returns:
        float32 `(steps,)`: exactly 1 where the rate stays, for the first, before which there was no velocity, and where
        the rate is zero in fp32.
    """
    before = torch.cat([lrs[:1], lrs[:-1]]).double()
    return torch.where(lrs > 0, before / lrs, 1.0).float()


def scale_velocities(velocities: list[Tensor], ratio: Tensor) -> None:
    """Multiply in place, in few launches; `ratio` is one number on their device, and is not read by the host."""
    torch._foreach_mul_(velocities, ratio.view(()))


def momentum_buffers(net: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """The velocities by parameter name, for a checkpoint: the very tensors, not copies. Empty without momentum."""
    state = optimizer.state
    named = net.named_parameters()
    return {name: state[p]["momentum_buffer"] for name, p in named if "momentum_buffer" in state[p]}
