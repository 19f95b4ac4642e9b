"""One training step, and evaluation: forward, backward, update.

`train` and the benchmarks run the same `TrainStep`.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres import optim
from fastres.runtime import Runtime, eager


class Loader(Protocol):
    """What yields batches: resident, dali and torchvision loaders."""

    name: str

    def load(self, step: int) -> tuple[Tensor, Tensor]:
        """Images `(batch, 3, 32, 32)` in the training precision and labels int64 `(batch,)` of a 0-based step."""

    def close(self) -> None:
        """Release threads and buffers."""


@dataclass(frozen=True)
class Window:
    """What steps `start + 1` to `start + len(losses)` gave, on the host."""

    start: int  # steps done before it
    losses: list[float]  # mean cross-entropy of each step's batch
    errors: list[int]  # wrong answers in each step's batch


class TrainStep:
    """Forward, loss, backward and update on the batch of one step, with a log of what came out.

    Attributes:
        losses: float32 `(num_steps,)`, the mean cross-entropy of each step's batch; on the device.
        errors: int32 `(num_steps,)`, wrong answers in each step's batch; on the device.
    """

    def __init__(
        self, net: nn.Module, optimizer: torch.optim.SGD, loader: Loader, runtime: Runtime, *, num_steps: int
    ) -> None:
        self.net, self.optimizer, self.loader = net, optimizer, loader
        self.device, self.dtype = runtime.device, runtime.dtype
        self.losses = torch.zeros(num_steps, dtype=torch.float32, device=self.device)
        self.errors = torch.zeros(num_steps, dtype=torch.int32, device=self.device)
        # fp16's range needs its gradients scaled; the scale is part of the state
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if runtime.compile:
            compile_blocks(net)

    def __call__(self, step: int, lr: float) -> None:
        """Take 0-based step `step` with learning rate `lr`. Nothing is read back from the device."""
        images, labels = self.loader.load(step)
        optim.set_lr(self.optimizer, lr)
        logits, loss = self.forward(images, labels)
        self.backward(loss)
        self.update()
        self.losses[step] = loss.detach()
        self.errors[step] = (logits.detach().argmax(dim=1) != labels).sum()

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(batch, classes)` and the mean cross-entropy, taken in fp32 (in fp64 for an fp64 network)."""
        with autocast(self.device, self.dtype):
            logits = self.net(images)
        return logits, F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

    def backward(self, loss: Tensor) -> None:
        """Gradients into `.grad`, which the last update left empty."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """SGD on the fp32 weights."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def window(self, start: int, stop: int) -> Window:
        """The log of 0-based steps `start` to `stop - 1`. Waits for the device; for log steps only."""
        return Window(start, self.losses[start:stop].tolist(), self.errors[start:stop].tolist())

    def warm_up(self, images: Tensor, labels: Tensor) -> None:
        """Compile on a dummy batch, then put back every weight, BN statistic and momentum as it was."""
        state = [*self.net.state_dict().values(), *optim.momentum_buffers(self.net, self.optimizer).values()]
        before = [t.clone() for t in state]
        self.backward(self.forward(images, labels)[1])
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for now, was in zip(state, before, strict=True):
                now.copy_(was)


def compile_blocks(net: nn.Module) -> None:
    """Compile each residual block in place, so that saved names stay clean.

    Equal blocks share their code: five distinct blocks are compiled whatever the depth, so ResNet-110 starts as
    quickly as ResNet-20. (`dynamic=False`: there is one batch shape in a run.)
    """
    for stage in ("layer1", "layer2", "layer3"):
        for block in getattr(net, stage):
            block.compile(fullgraph=True, dynamic=False)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Autocast to `dtype`, or nothing at all in fp32. Weights stay in fp32 and are cast anew each step."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@dataclass(frozen=True)
class Evaluation:
    """What a network says of labelled images, one view each."""

    loss: float  # mean cross-entropy
    confusion: list[list[int]]  # [true class][answer]: number of images

    @property
    def num_images(self) -> int:
        """Images evaluated."""
        return sum(map(sum, self.confusion))

    @property
    def error(self) -> float:
        """Fraction of wrong answers, 0 to 1."""
        right = sum(row[k] for k, row in enumerate(self.confusion))
        return 1 - right / self.num_images

    @property
    def class_errors(self) -> list[float | None]:
        """Fraction of wrong answers by true class; None for a class without images."""
        return [1 - row[k] / sum(row) if sum(row) else None for k, row in enumerate(self.confusion)]


@torch.no_grad()
def evaluate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Evaluation:
    """Test a network in evaluation mode (running BN statistics); its mode is put back afterwards.

    Args:
        net: On its device; gives logits `(batch, classes)`.
        batches: Images `(batch, 3, 32, 32)` and labels int64 `(batch,)`, on the same device.
        dtype: Precision of the activations; loss and counts are taken from fp32 logits.
    """
    training = net.training
    net.eval()
    loss_sum: Tensor | float = 0.0
    confusion: Tensor | None = None
    try:
        with eager():
            for images, labels in batches:
                with autocast(images.device, dtype):
                    logits = net(images).float()
                loss_sum = loss_sum + F.cross_entropy(logits, labels, reduction="sum").double()
                classes = logits.shape[1]
                counts = torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes * classes)
                confusion = counts if confusion is None else confusion + counts
    finally:
        net.train(training)
    if confusion is None:
        raise ValueError("no batches to evaluate")
    side = int(len(confusion) ** 0.5)
    table = confusion.view(side, side).tolist()  # host sync: the evaluation's one read
    return Evaluation(float(loss_sum) / sum(map(sum, table)), table)
