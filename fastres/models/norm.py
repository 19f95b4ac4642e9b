"""Batch normalisation (Ioffe and Szegedy 2015, arXiv:1502.03167)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation without torch's counter of batches, over the whole batch or over groups of it.

    The counter is read only where `momentum=None`, and costs one kernel a layer and step, where a step at batch 128 is
    bound by its number of kernels. Weights go both ways: a foreign counter is dropped, and a net that has counters
    takes our weights.

    Args:
        channels: Of the maps.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running statistics.
        group: Images, neighbours in the batch, that share their statistics in training, as on a GPU of several; 0: the
            whole batch. Each step moves the running statistics once, towards the mean over the groups of their means
            and of their unbiased variances; nothing of a group's own is kept, so evaluation is the same for all images.
    """

    _version = 1  # of the state dict: before torch had counters, so that torch's own layer does not miss one in ours
    momentum: float
    native = False  # whether `layer` may use fastres' own kernels

    def __init__(self, channels: int, *, eps: float, momentum: float, group: int = 0) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.group = group
        self.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, channels, h, w)` -> the same shape, dtype and layout."""
        if not self.training or self.group in (0, x.shape[0]):
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        # One by one by torch's own kernel is quicker than one formula for all groups: eager it makes fewer passes over
        # memory, compiled it becomes fewer kernels, since Inductor joins those that the groups have in common.
        groups = x.view(-1, self.group, *x.shape[1:]).unbind()
        normed, means, variances = zip(*map(self._normed, groups), strict=True)
        self.running_mean.lerp_(sum(means[1:], means[0]) / len(means), self.momentum)
        self.running_var.lerp_(sum(variances[1:], variances[0]) / len(means), self.momentum)
        return torch.cat(normed)

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps normalised by their own statistics, which are the mean and the unbiased variance of each channel."""
        mean, variance = torch.zeros_like(self.bias), torch.zeros_like(self.bias)
        out = F.batch_norm(x, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        return out, mean, variance

    def reset_running_stats(self) -> None:
        """Mean 0 and variance 1 again."""
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)  # noqa: SLF001 (past the parent, who adds it)
