"""Batch normalisation (Ioffe and Szegedy 2015, arXiv:1502.03167)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BatchNorm"]

# Inductor of torch 2.11 takes `_stored` for a view of something else, and gradients come out wrong; of the versions
# between nothing is known.
ONE_PASS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)


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

    def __init__(self, channels: int, *, eps: float, momentum: float, group: int = 0) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.group = group
        self.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, channels, h, w)` -> the same shape, dtype and layout."""
        if not self.training or self.group in (0, x.shape[0]):
            if ONE_PASS and self.training and x.device.type == "cpu" and torch.compiler.is_compiling():
                return self._for_inductor(x)
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

    def _for_inductor(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        around = self.running_mean.clone()  # as it was: it changes below
        out, mean, variance = _OnePass.apply(x, self.weight, self.bias, around, self.eps)
        num = x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (num / (num - 1)), self.momentum)
        normed: Tensor = out
        return normed

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


class _OnePass(torch.autograd.Function):
    """Batch norm in training, written for Inductor on a CPU; its own decomposition is slower there than eager kernels.

    Statistics are sums in one pass, where Inductor's are Welford's, which wait for themselves; of differences from the
    running mean, without which small variances would drown in large means. Each image is summed on its own first:
    short sums are plain additions in the generated code, long ones are not. What belongs to a channel is computed once,
    where Inductor would do it again for every pixel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, around: Tensor, eps: float) -> tuple[Tensor, ...]:
        """Normalised maps `(batch, channels, h, w)`, and the batch's mean and biased variance `(channels,)`."""
        num, maps = x.numel() // x.shape[1], _widened(x)
        off = maps - _of_channel(around)
        first, second = _sum(off) / num, _sum(off * off) / num
        mean = _stored(around + first)
        variance = _stored((second - first * first).clamp_min(0))
        rstd = _stored((variance + eps).rsqrt())
        scale = _stored(weight * rstd)
        shift = _stored(bias - mean * scale)
        ctx.save_for_backward(x, mean, rstd, scale)
        ctx.mark_non_differentiable(mean, variance)
        return (maps * _of_channel(scale) + _of_channel(shift)).to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of maps, weight and bias."""
        x, mean, rstd, scale = ctx.saved_tensors
        num, maps, grad = x.numel() // x.shape[1], _widened(x), _widened(grads[0])
        grad_sum, grad_off = _sum(grad), _sum(grad * (maps - _of_channel(mean)))
        slope = _stored(-scale * rstd * rstd * grad_off / num)
        offset = _stored(-scale * grad_sum / num - slope * mean)
        out = grad * _of_channel(scale) + maps * _of_channel(slope) + _of_channel(offset)
        return out.to(x.dtype), grad_off * rstd, grad_sum, None, None


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _sum(maps: Tensor) -> Tensor:
    """Over all but the channels."""
    return _stored(maps.sum((2, 3))).sum(0)


def _of_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _stored(values: Tensor) -> Tensor:
    """The same, which Inductor writes to memory instead of computing it again where it is used: so it treats views."""
    return values.as_strided(values.shape, values.stride())
