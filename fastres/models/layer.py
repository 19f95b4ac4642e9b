"""A layer of the networks: convolution, batch norm, what is added, ReLU; by fastres' own kernels where they fit."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastres.models.norm import BatchNorm
from fastres.native import ops  # noqa: F401 (makes torch.ops.fastres)
from fastres.native.kernels import COLUMNS, DTYPES, LANES


def layer(conv: nn.Conv2d, norm: BatchNorm, x: Tensor, add: Tensor | None = None) -> Tensor:
    """ReLU(norm(conv(x)) + add), `add` being the shortcut where there is one.

    In training with `norm.native` it is one operation, which calls neither module, so that their hooks do not run. It
    is as exact as torch's, but not the same in every bit: sums run in another order, bfloat16 is rounded once instead
    of after each part, and gradients of bfloat16 weights are not rounded at all. It can be differentiated once.

    Args:
        conv: Without bias.
        norm: Of its channels.
        x: `(batch, in_channels, h, w)`.
        add: Of the result's shape.

    Returns:
        `(batch, channels, h / stride, w / stride)`.
    """
    if getattr(norm, "native", False) and norm.training and _fits(conv, norm, x, add):
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.momentum
        return _Layer.apply(x, conv.weight, norm.weight, norm.bias, add, *statistics, conv.stride, conv.padding)  # type: ignore[no-any-return]
    out: Tensor = norm(conv(x))
    # In place where autograd allows it: batch norm keeps its input, ReLU its output, neither the sum.
    if add is not None:
        out += add
    return F.relu(out, inplace=True)


def _fits(conv: nn.Conv2d, norm: BatchNorm, x: Tensor, add: Tensor | None) -> bool:
    """Whether native/norm.cpp, which asks nothing, can take these."""
    if conv.bias is not None or conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return False
    if isinstance(conv.padding, str):
        return False
    channels, columns = conv.out_channels, max(conv.out_channels, COLUMNS)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else conv.weight.dtype
    shape = _result_shape(conv, x)
    of_channels = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return (
        x.dtype == dtype
        and dtype in DTYPES
        and conv.weight.dtype == torch.float32
        and all(
            t is not None and t.dtype == torch.float32 and t.shape == (channels,) and t.is_contiguous()
            for t in of_channels
        )
        and norm.group in (0, len(x))
        and columns % min(channels, COLUMNS) == math.prod(shape) % columns == 0
        and math.prod(shape) > channels  # torch says best what is wrong with one value
        and x.is_contiguous(memory_format=torch.channels_last)
        and (add is None or (add.dtype == x.dtype and add.shape == shape))
    )


def _result_shape(conv: nn.Conv2d, x: Tensor) -> tuple[int, ...]:
    padding = [int(pad) for pad in conv.padding]
    sizes = zip(x.shape[2:], padding, conv.kernel_size, conv.stride, strict=True)
    return len(x), conv.out_channels, *((size + 2 * pad - kernel) // stride + 1 for size, pad, kernel, stride in sizes)


class _Layer(torch.autograd.Function):
    """`layer` in training: convolutions by torch, their weights' gradient and all else by native/*.cpp where it can."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, add: Tensor | None, mean: Tensor,
        variance: Tensor, eps: float, momentum: float, stride: tuple[int, int], padding: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        weight, ctx.stride, ctx.padding = weight.to(x.dtype), stride, padding
        maps = _channels_last(torch.conv2d(x, weight, None, stride, padding))
        add = None if add is None else _channels_last(add)
        out, kept = torch.ops.fastres.norm_relu(maps, add, scale, shift, mean, variance, eps, momentum)
        ctx.save_for_backward(x, weight, maps, kept, None if add is None else out)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, maps, kept, out = ctx.saved_tensors
        x, maps = _channels_last(x), _channels_last(maps)  # as they were, but for hooks on what is saved
        out = None if out is None else _channels_last(out)
        grads = torch.ops.fastres.norm_relu_backward(_channels_last(grad), maps, out, kept)
        grad_maps, grad_scale, grad_shift, grad_add = grads
        grad_x, grad_weight = None, None
        for_x, for_weight, *_ = ctx.needs_input_grad
        if for_weight and _weight_grad_fits(weight, x, ctx.stride, ctx.padding):
            grad_weight, for_weight = torch.ops.fastres.conv3x3_weight_grad(grad_maps, x, weight), False
        if for_x or for_weight:
            args = ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, (for_x, for_weight, False)
            grad_x, by_torch, _ = torch.ops.aten.convolution_backward(grad_maps, x, weight, None, *args)
            grad_weight = by_torch.float() if for_weight else grad_weight
        return grad_x, grad_weight, grad_scale, grad_shift, None if out is None else grad_add, *[None] * 6


def _weight_grad_fits(weight: Tensor, x: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether native/conv.cpp, which asks nothing, can take these."""
    plain = (*weight.shape[2:], *stride, *padding) == (3, 3, 1, 1, 1, 1)
    even = weight.shape[0] % LANES == weight.shape[1] % LANES == x.shape[3] % 2 == 0
    return plain and even and x.dtype == torch.bfloat16


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
