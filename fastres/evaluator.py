"""Testing a network: loss, and what was answered for each class."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.cudagraph import Capture, Replay
from fastres.runtime import autocast, eager


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
        return (self.num_images - right) / self.num_images

    @property
    def class_errors(self) -> list[float | None]:
        """Fraction of wrong answers by true class; None for a class without images."""
        return [(sum(row) - row[k]) / sum(row) if sum(row) else None for k, row in enumerate(self.confusion)]


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """The network in evaluation mode inside the block; the mode of each of its parts is put back."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Evaluator:
    """Tests one network on one set of images, again and again; the images stay on the device.

    Args:
        net: On its device; gives logits `(batch, num_classes)`.
        batches: Images `(batch, 3, 32, 32)` and labels int64 `(batch,)`, on the same device; any sizes.
        num_classes: Logits.
        dtype: Precision of the activations; loss and answers are taken from fp32 logits.
        forward: Gives the network's logits in its stead; default: the network, under autocast.
        capture: `cudagraph.CapturedGraph`: all batches are captured as one graph, by `warm_up` or the first call. None:
            launched one by one.
    """

    def __init__(
        self,
        net: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        num_classes: int,
        dtype: torch.dtype,
        forward: Callable[[Tensor], Tensor] | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.net, self.num_classes, self.dtype, self._forward = net, num_classes, dtype, forward
        self._batches = list(batches)
        if not self._batches:
            raise ValueError("no batches to evaluate")
        device = self._batches[0][1].device
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
        self._capture = capture
        self._graph: Replay | None = None

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile and capture, before any clock runs; without a capture the first call compiles."""
        if self._capture and not self._graph:
            with evaluating(self.net):
                self._graph = self._capture([self._launch], [*self.net.state_dict().values()])

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        """Test the network in evaluation mode (running BN statistics); its mode is put back. Waits for the device."""
        self.warm_up()
        with evaluating(self.net):
            if self._graph:
                self._graph.check()
                self._graph.replay()
            else:
                self._launch()
        counts = self._confusion.view(self.num_classes, -1).tolist()  # host sync: the evaluation's one read
        return Evaluation(float(self._loss_sum) / sum(map(sum, counts)), counts)

    def _logits(self, images: Tensor) -> Tensor:
        if self._forward:
            return self._forward(images)
        with autocast(images.device, self.dtype):
            logits: Tensor = self.net(images)
        return logits

    def _launch(self) -> None:
        self._loss_sum.zero_()
        self._confusion.zero_()
        with eager():
            for images, labels in self._batches:
                logits = self._logits(images)
                self._loss_sum.add_(F.cross_entropy(logits, labels, reduction="sum"))
                answers = labels * self.num_classes + logits.argmax(dim=1)
                # not bincount, which asks the device for its length
                self._confusion.index_add_(0, answers, torch.ones_like(answers))
