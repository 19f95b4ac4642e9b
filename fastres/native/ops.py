"""The kernels as torch's operators `fastres::*`, which torch.compile takes as they are.

Maps are `(batch, channels, h, w)`, float32 or bfloat16, channels last; what belongs to a channel is float32.
"""

import torch
from torch import Tensor
from torch.library import Library, register_fake

from fastres.native.kernels import kernels


def norm_relu(
    x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    eps: float, momentum: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Batch norm in training, the addition of `add`, and ReLU; running statistics move.

    Returns:
        The maps, and what the backward needs of each channel, `(4, channels)`: mean, one over the standard deviation,
        that times weight, and bias.
    """
    out, kept = _norm_relu_results(x, add, weight)
    kernels().norm_forward[x.dtype](
        *map(_address, (x, add, weight, bias, running_mean, running_var, out, kept)),
        x.numel(), x.shape[1], eps, momentum, torch.get_num_threads(),
    )  # fmt: skip
    return out, kept


def _norm_relu_results(x: Tensor, _: Tensor | None, weight: Tensor, *__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(4, x.shape[1])


def norm_relu_backward(
    grad: Tensor, x: Tensor, out: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of maps, weight, bias and what was added.

    Args:
        grad: Of the result.
        x, kept: As `norm_relu` took and gave them.
        out: What it gave, where something was added; else None, and the last gradient is empty.
    """
    results = _norm_relu_gradients(grad, x, out, kept)
    grad_x, grad_weight, grad_bias, grad_add = results
    kernels().norm_backward[x.dtype](
        *map(_address, (grad, x, out, kept, grad_x, None if out is None else grad_add, grad_weight, grad_bias)),
        x.numel(), x.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return results


def _norm_relu_gradients(
    _: Tensor, x: Tensor, out: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_channel = kept.new_empty(x.shape[1])
    return torch.empty_like(x), of_channel, of_channel.clone(), x.new_empty(0) if out is None else torch.empty_like(x)


def conv3x3_weight_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The float32 gradient of the weights of a 3x3 convolution of stride 1 with padding 1.

    By torch, rounded, where there is no kernel for it.

    Args:
        grad: Of its result, bfloat16, of a multiple of 16 channels.
        x: What it was given, the same, and of an even width.
        weight: Its weights, bfloat16, of which only the shape is looked at.
    """
    kernel = kernels().conv_weight_grad
    if kernel is None:
        args = (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (False, True, False)
        by_torch: Tensor = torch.ops.aten.convolution_backward(grad, x, weight, None, *args)[1]
        return by_torch.to(torch.float32, memory_format=torch.channels_last)
    result = _weight_like(grad, x, weight)
    batch, channels, height, width = x.shape
    threads = torch.get_num_threads()
    kernel(*map(_address, (x, grad, result)), batch, height, width, channels, len(weight), threads)
    return result


def _weight_like(_: Tensor, __: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32, memory_format=torch.channels_last)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


NORM_RELU = (
    "norm_relu(Tensor x, Tensor? add, Tensor weight, Tensor bias, Tensor(a!) mean, Tensor(b!) var, float eps,"
    " float momentum) -> (Tensor, Tensor)"
)
BACKWARD = "norm_relu_backward(Tensor grad, Tensor x, Tensor? out, Tensor kept) -> (Tensor, Tensor, Tensor, Tensor)"
WEIGHT_GRAD = "conv3x3_weight_grad(Tensor grad, Tensor x, Tensor weight) -> Tensor"
LIBRARY = Library("fastres", "DEF")  # type: ignore[no-untyped-call]
for _schema, _operator, _results in (
    (NORM_RELU, norm_relu, _norm_relu_results),
    (BACKWARD, norm_relu_backward, _norm_relu_gradients),
    (WEIGHT_GRAD, conv3x3_weight_grad, _weight_like),
):
    LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(_operator.__name__, _operator, "CPU")  # type: ignore[no-untyped-call]
    register_fake(f"fastres::{_operator.__name__}", _results, lib=LIBRARY)
