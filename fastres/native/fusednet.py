"""A CIFAR network in training on a GPU, forward and backward, by the kernels of `native/gpu_*.py`.

cuDNN's kernels for 16 to 64 channels take two thirds of a step on an H200, several times what the maps' bytes need, and
autograd's pieces can't share a pass over memory. Here a layer is two launches forward, convolution and norm, and two
backward, which carry along what neighbours need: the norm's sums, the shortcut and its gradient.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastres.config import Model
from fastres.models.cifar import WIDTHS, Block, CifarNet, logits_of, predict_maps
from fastres.models.norm import BatchNorm

Predict = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Launch(NamedTuple):
    """How a kernel is launched."""

    block: int  # pixels a tile
    programs: int  # about as many, at most twice as many
    warps: int = 4
    stages: int = 1  # of the loop's pipeline


class Launches(NamedTuple):
    """Those of a layer, tuned on an H200 at batch 128 (docs/LOG.md)."""

    conv: Launch
    norm: Launch
    norm_grad: Launch
    weights: Launch  # of a convolution's gradients, the one of its weights, and with `warps` for both
    source: Launch


# By channels: 16 at 32x32 pixels, 32 at 16x16, 64 at 8x8.
LAUNCHES = {
    16: Launches(
        Launch(256, 264, 4, 3), Launch(128, 264), Launch(128, 264), Launch(128, 88, 4, 3), Launch(256, 512, 4, 3)
    ),
    32: Launches(
        Launch(256, 1024, 4, 4), Launch(64, 264), Launch(64, 264), Launch(64, 64, 4, 2), Launch(128, 256, 4, 3)
    ),
    64: Launches(Launch(64, 264, 4, 4), Launch(64, 528), Launch(64, 264), Launch(64, 32, 4, 3), Launch(64, 128, 4, 3)),
}
FIRST, FIRST_GRAD = Launch(256, 1024), Launch(128, 256, 4, 2)
SUMS = Launch(64, 528)  # of the last layer's norm
ADD_UP, ADD_UP_ROWS = Launch(256, 0), 16  # weights a program, and shares at a time


class Split(NamedTuple):
    """Pixels shared out to programs."""

    block: int  # pixels a tile
    tiles: int  # a program
    programs: int
    launch: Launch  # by which they are


def split(pixels: int, launch: Launch) -> Split:
    """Pixels in a whole number of tiles, those in programs that all have the same number: about as many as wanted."""
    block = launch.block
    while pixels % block:
        block //= 2
    tiles = pixels // block
    choices = [n for n in range(1, min(tiles, 2 * launch.programs) + 1) if tiles % n == 0]
    programs = min(choices, key=lambda n: abs(math.log(n / launch.programs)))
    return Split(block, tiles // programs, programs, launch)


def is_paper_net(model: Model, batch_size: int) -> bool:
    """Whether a network has only 3x3 layers of the paper's widths, shortcuts without weights, norms over the batch."""
    if model.arch == "imagenet" or (model.arch == "resnet" and model.shortcut == "B"):
        return False
    return model.norm_batch in (0, batch_size)


def supports(model: Model, batch_size: int) -> bool:
    """Whether these kernels are for a network, and quick at a batch size.

    A batch whose size has a large prime factor cannot be shared out evenly (`split`).
    """
    if not is_paper_net(model, batch_size):
        return False
    for width, how in LAUNCHES.items():
        pixels = batch_size * (32 * WIDTHS[0] // width) ** 2
        for launch in how:
            tiles, programs = pixels // launch.block, split(pixels, launch).programs
            if 4 * programs < min(tiles, launch.programs):
                return False
    return True


class Layer:
    """A convolution, its norm, and how they are launched."""

    def __init__(self, weight: Tensor, norm: BatchNorm, side: int, stride: int, batch_size: int) -> None:
        self.weight, self.norm, self.side, self.stride = weight, norm, side, stride
        self.out_channels, self.in_channels = weight.shape[:2]
        self.pixels = batch_size * side**2
        self.is_stem = self.in_channels not in WIDTHS
        how = LAUNCHES[self.out_channels]
        self.conv = split(self.pixels, FIRST if self.is_stem else how.conv)
        self.weights = split(self.pixels, FIRST_GRAD if self.is_stem else how.weights)
        self.source = split(self.pixels * stride**2, how.source)
        self.norm_forward, self.norm_backward = split(self.pixels, how.norm), split(self.pixels, how.norm_grad)
        self.span = _power(3 * self.in_channels) if self.in_channels < 64 else 0
        self.shortcut_from = -1  # the layer whose result the shortcut that ends here takes; -1: none
        self.shortcut_to = -1  # the layer at which the shortcut that begins here ends; -1: none
        self.pad = 0  # zero channels before the shortcut's own


def layers_of(net: CifarNet, weights: Mapping[str, Tensor], batch_size: int) -> list[Layer]:
    """The convolutions with their norms, in order; weights by parameter name."""
    layers = [Layer(weights["conv1.weight"], net.bn1, 32, 1, batch_size)]
    for name, block in net.named_modules():
        if isinstance(block, Block):
            side = layers[-1].side // block.stride
            for number, norm, stride in ((1, block.bn1, block.stride), (2, block.bn2, 1)):
                layers.append(Layer(weights[f"{name}.conv{number}.weight"], norm, side, stride, batch_size))
            if block.residual:
                end = len(layers) - 1
                layers[end].shortcut_from, layers[end].pad, layers[end - 1].shortcut_to = end - 2, block.zeros[0], end
    return layers


class FusedNet:
    """Training passes of a network on batches of one size.

    Args:
        net: On a GPU, and of a kind that `supports`; its running statistics move.
        weights: bfloat16, of the convolutions, by parameter name, channels last; read in each pass.
        batch_size: Images.
        predict: `predict_maps`, or what a compiler makes of it.

    Attributes:
        weight_grads: float32: of all convolutions, one after the other, as they lie in memory.
        norm_grads: float32: of scale and shift of all norms, one after the other.
    """

    def __init__(
        self, net: nn.Module, weights: Mapping[str, Tensor], batch_size: int, *, predict: Predict = predict_maps
    ) -> None:
        assert isinstance(net, CifarNet)
        self.batch_size, self._predict = batch_size, predict
        self._fc, device = net.fc, net.fc.weight.device
        self.layers = layers_of(net, weights, batch_size)
        sizes = [layer.weight.numel() for layer in self.layers]
        self.weight_grads = torch.zeros(sum(sizes), device=device)
        self.norm_grads = torch.zeros(2 * sum(layer.out_channels for layer in self.layers), device=device)
        counts, table = sum_table(sizes, [layer.weights.programs for layer in self.layers], ADD_UP.block)
        self._shares, self._table = torch.zeros(sum(counts), device=device), table.to(device)
        self._one = torch.ones((), device=device)  # the loss's own gradient, which autograd would fill anew each step
        self._images: Tensor | None = None
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # of each layer: maps, result, statistics
        self._maps: Tensor | None = None  # of the last forward, `(batch, h, w, channels)`

    @property
    def grads(self) -> tuple[Tensor, Tensor]:
        """`weight_grads` and `norm_grads`; the last layer's are in its `.grad`."""
        return self.weight_grads, self.norm_grads

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy, float32, and the number of wrong answers, int32: both `()`."""
        self._maps = self.maps_of(images).permute(0, 2, 3, 1).requires_grad_()
        return self._predict(self._maps, self._fc.weight, self._fc.bias, labels)

    def backward(self, loss: Tensor) -> None:
        """All gradients; `loss` is what `forward` gave, which must be the last call."""
        loss.backward(self._one)  # type: ignore[no-untyped-call]
        assert self._maps is not None
        assert self._maps.grad is not None
        self.backward_from(self._maps.grad.permute(0, 3, 1, 2))
        self._maps = None

    @torch.no_grad()
    def maps_of(self, images: Tensor) -> Tensor:
        """Images `(batch, 3, 32, 32)` -> the last block's maps `(batch, 64, 8, 8)`, both bfloat16 and channels last."""
        check_images(images, self.layers[0].weight, self.batch_size)
        conv, norms = _kernels()
        self._kept, self._images, source = [], images, images
        for layer in self.layers:
            num, side, norm, how = layer.out_channels, layer.side, layer.norm, layer.conv
            maps, out = (new_maps(images, num, side) for _ in range(2))
            shares, kept = self._shares.new_empty((how.programs, 2, num)), self._shares.new_empty((3, num))
            _launch(
                conv.conv3x3, how.programs, how.launch,
                source, layer.weight, maps, shares, side, side, layer.in_channels, num, layer.stride,
                how.block, how.tiles, how.launch.stages,
            )  # fmt: skip
            share_pixels, how = layer.pixels // how.programs, layer.norm_forward
            begins = self._kept[layer.shortcut_from][1] if layer.shortcut_from >= 0 else None
            _launch(
                norms.norm_forward, how.programs, how.launch,
                maps, shares, maps if begins is None else begins, norm.weight, norm.bias, norm.running_mean,
                norm.running_var, out, kept, norm.eps, norm.momentum, side, side, num,
                0 if begins is None else begins.shape[1], layer.pad, len(shares), _power(len(shares)), share_pixels,
                how.block, how.tiles,
            )  # fmt: skip
            self._kept.append((maps, out, kept))
            source = out
        return source

    @torch.no_grad()
    def backward_from(self, grad: Tensor) -> None:
        """Fill `weight_grads` and `norm_grads`.

        Args:
            grad: Of what `maps_of` gave, which must have been the last call.
        """
        conv, norms = _kernels()
        grads: list[Tensor | None] = [None] * len(self.layers)  # of each layer's result
        grads[-1] = grad = grad.contiguous(memory_format=torch.channels_last)
        maps, out, kept = self._kept[-1]
        how, num = split(self.layers[-1].pixels, SUMS), maps.shape[1]
        norm_shares = kept.new_empty((how.programs, 2, num))
        _launch(
            norms.norm_sums, how.programs, how.launch, grad, maps, out, kept, norm_shares, num, how.block, how.tiles
        )
        at_norm, at_share = len(self.norm_grads), len(self._shares)
        for k in reversed(range(len(self.layers))):
            layer = self.layers[k]
            num, side, how, weights = layer.out_channels, layer.side, layer.norm_backward, layer.weights
            maps, out, kept = self._kept[k]
            grad_maps, at_norm = torch.empty_like(maps), at_norm - 2 * num
            _launch(
                norms.norm_backward, how.programs, how.launch,
                grads[k], maps, out, kept, norm_shares, grad_maps, self.norm_grads[at_norm:],
                self.norm_grads[at_norm + num :], num, len(norm_shares), _power(len(norm_shares)), layer.pixels,
                how.block, how.tiles,
            )  # fmt: skip
            at_share -= weights.programs * layer.weight.numel()
            shares = self._shares[at_share:]
            if layer.is_stem:
                _launch(
                    conv.first_weight_grad, weights.programs, weights.launch,
                    grad_maps, self._images, shares, side, side, layer.in_channels, num,
                    weights.block, weights.tiles, weights.launch.stages,
                )  # fmt: skip
                continue
            below, source, below_kept = self._kept[k - 1]
            grads[k - 1] = grad_source = torch.empty_like(source)
            own, end = layer.source, layer.shortcut_to
            norm_shares = kept.new_empty((own.programs, 2, layer.in_channels))
            over = (grads[end], self._kept[end][1]) if end >= 0 else (grad_maps, grad_maps)
            _launch(
                conv.conv3x3_grads, 3 * weights.programs + own.programs, weights.launch,
                grad_maps, source, layer.weight, grad_source, shares, below, below_kept, norm_shares, *over,
                side, side, layer.in_channels, num, layer.stride, self.layers[end].out_channels if end >= 0 else 0,
                self.layers[end].pad if end >= 0 else 0, weights.programs,
                layer.span, weights.block, weights.tiles, weights.launch.stages,
                own.block, own.tiles, own.launch.stages,
            )  # fmt: skip
            del self._kept[k + 1 :], grads[k + 1 :]  # the layer below needs this one's at most
        _launch(
            conv.add_up, len(self._table), ADD_UP, self._shares, self.weight_grads, self._table, ADD_UP_ROWS,
            ADD_UP.block,
        )  # fmt: skip
        self._kept, self._images = [], None


class Inference:
    """A network in evaluation mode: a launch for each layer, which reads and writes its maps once.

    Args:
        net: Of a kind that `supports`; weights and running statistics are read in each call.
    """

    def __init__(self, net: nn.Module) -> None:
        assert isinstance(net, CifarNet)
        self.net = net
        self._masters = {name: p for name, p in net.named_parameters() if p.ndim == 4}
        self._weights = {name: p.detach().bfloat16() for name, p in self._masters.items()}
        self._layers: dict[int, list[Layer]] = {}  # by the number of images

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images `(batch, 3, 32, 32)`, bfloat16 and channels last -> float32 logits `(batch, classes)`."""
        check_images(images, self._weights["conv1.weight"])
        torch._foreach_copy_(list(self._weights.values()), list(self._masters.values()))
        if len(images) not in self._layers:
            self._layers[len(images)] = layers_of(self.net, self._weights, len(images))
        source = before = images  # of a layer, and of the one before it, where a block's shortcut begins
        for layer in self._layers[len(images)]:
            num, side, norm, how = layer.out_channels, layer.side, layer.norm, layer.conv
            out = new_maps(images, num, side)
            _launch(
                _kernels()[1].inference, how.programs, how.launch,
                source, layer.weight, before, norm.weight, norm.bias, norm.running_mean, norm.running_var, out,
                norm.eps, side, side, layer.in_channels, num, layer.stride,
                before.shape[1] if layer.shortcut_from >= 0 else 0, layer.pad, how.block, how.tiles, how.launch.stages,
            )  # fmt: skip
            before, source = source, out
        return logits_of(source, self.net.fc)


def sum_table(sizes: Sequence[int], shares: Sequence[int], step: int) -> tuple[list[int], Tensor]:
    """How the shares of the layers' gradients of weights are summed.

    Args:
        sizes, shares: Of each layer's weights, and in how many its gradient is made.
        step: Weights that a program sums.

    Returns:
        The length of each layer's shares, and a row for each program, int32: where these shares begin, how many they
        are, how long each, the place in them, and where the sum goes.
    """
    counts = [size * num for size, num in zip(sizes, shares, strict=True)]
    begins = zip(sizes, shares, accumulate(counts, initial=0), accumulate(sizes, initial=0), strict=False)
    rows = [[start, num, size, at, place] for size, num, start, place in begins for at in range(0, size, step)]
    return counts, torch.tensor(rows, dtype=torch.int32)


def check_images(images: Tensor, weight: Tensor, batch_size: int | None = None) -> None:
    """Raise ValueError where images are not as the kernels, which validate nothing, take them, or not so many."""
    kind, last = (images.device, images.dtype), images.is_contiguous(memory_format=torch.channels_last)
    if images.shape[1:] != (3, 32, 32) or kind != (weight.device, weight.dtype) or not last:
        raise ValueError(
            f"images {tuple(images.shape[1:])}, {images.dtype} on {images.device}, channels last: {last}; "
            f"wanted (3, 32, 32), {weight.dtype} on {weight.device}, channels last"
        )
    if batch_size not in (None, len(images)):
        raise ValueError(f"{len(images)} images; this is for batches of {batch_size}")


def _launch(kernel: Any, programs: int, launch: Launch, *args: Any) -> None:
    # Multiply and add in one rounding, as Triton did by default until 3.9, which warns that it will not.
    kernel[programs,](*args, num_warps=launch.warps, enable_fp_fusion=True)


def _kernels() -> tuple[Any, Any]:
    from fastres.native import gpu_kernels, gpu_norm  # Triton, a second

    return gpu_kernels, gpu_norm


def new_maps(like: Tensor, channels: int, side: int) -> Tensor:
    """`(batch, channels, side, side)`, channels last, not filled; the rest as what they are like."""
    return like.new_empty((len(like), side, side, channels)).permute(0, 3, 1, 2)


def _power(number: int) -> int:
    """The least power of 2 that is no less."""
    return 1 << (number - 1).bit_length()
