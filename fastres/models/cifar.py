"""The CIFAR networks of He et al. (CVPR 2016, section 4.2). ResNet and PlainNet are one class with a switch.

Layers have the names that most published weights have: `conv1`, `bn1`, `layer1.0.conv1`, ..., `layer3.<n-1>.bn2`, `fc`.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.configtree import nearest
from fastres.errors import InputError
from fastres.models.depth import num_blocks
from fastres.models.layer import layer
from fastres.models.norm import BatchNorm

WIDTHS = (16, 32, 64)  # filters at 32x32, 16x16 and 8x8


class Block(nn.Module):
    """Two 3x3 layers and the shortcut around them; the first layer strides where the map shrinks."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        residual: bool,
        shortcut: Literal["A", "B"],
        pad: Literal["both", "after"],
        norm: Callable[[int], BatchNorm],
    ) -> None:
        super().__init__()
        self.stride = 1 if in_channels == channels else 2
        self.residual = residual
        self.zeros = zeros_of(channels - in_channels, pad)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, self.stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample: nn.Module | None = None
        if residual and shortcut == "B" and self.stride != 1:
            projection = nn.Conv2d(in_channels, channels, 1, self.stride, bias=False)
            self.downsample = nn.Sequential(projection, norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` -> `(batch, channels, h / stride, w / stride)`."""
        shortcut = shortcut_of(x, self.stride, self.zeros, self.downsample) if self.residual else None
        return layer(self.conv2, self.bn2, layer(self.conv1, self.bn1, x), shortcut)


def zeros_of(num_new: int, pad: Literal["both", "after"]) -> tuple[int, int]:
    """Option A's zero channels before and after the old ones."""
    return (0, num_new) if pad == "after" else (num_new // 2, num_new // 2)


def shortcut_of(x: Tensor, stride: int, zeros: tuple[int, int], projection: nn.Module | None) -> Tensor:
    """Identity; where the shape changes option A (no parameters) or, if there is a projection, option B (section 3.3).

    Option A takes every second pixel of every second row and adds zero channels.
    """
    if projection is not None:
        projected: Tensor = projection(x)
        return projected
    if stride > 1:
        # Average pooling over one pixel is x[:, :, ::2, ::2], exactly, whose backward would fill and copy whole maps.
        x = F.avg_pool2d(x, 1, stride)
    return F.pad(x, (0, 0, 0, 0, *zeros)) if any(zeros) else x


def logits_of(maps: Tensor, fc: nn.Linear) -> Tensor:
    """Global average pooling and the fc layer, in fp32 under autocast too: `(batch, c, h, w)` -> `(batch, classes)`."""
    if maps.dtype not in (torch.bfloat16, torch.float16):
        return fc(maps.mean(dim=(2, 3)))  # type: ignore[no-any-return]
    with torch.autocast(maps.device.type, enabled=False):
        # A network that is bfloat16 itself, not by autocast, has such a layer.
        return fc(maps.float().mean(dim=(2, 3)).to(fc.weight.dtype))  # type: ignore[no-any-return]


def loss_and_errors(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy, in the logits' type, and the number of wrong answers, int32: both `()`."""
    wrong = logits.detach().argmax(dim=1) != labels  # in the forward, where it costs no kernel of its own
    return F.cross_entropy(logits, labels), wrong.sum(dtype=torch.int32)


def predict_maps(maps: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`loss_and_errors` from the last block's maps `(batch, h, w, channels)` on, of the same logits as `logits_of`.

    Maps as they lie in memory, so that their gradient lies likewise and need not be copied. The last layer is written
    out, so that the compiler makes it and its gradients part of other kernels: cuBLAS takes five, 19 us on an H200.
    """
    pooled = maps.float().mean(dim=(1, 2))
    return loss_and_errors((pooled[:, None] * weight).sum(dim=2) + bias, labels)


def check_option(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise InputError where an option of a network is none of those there are."""
    if value not in known:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(known)}{nearest(str(value), known)}")


class CifarNet(nn.Module):
    """ResNet or PlainNet for 32x32 images: 6n+2 layers, n blocks of two 3x3 layers at each of three map sizes.

    Its weights are torch's initial ones until `init_he_` gives it the paper's, as training does.

    Args:
        depth: Layers with weights, 6n+2: 20, 32, 44, 56, 110, 1202, or any other.
        residual: False makes a PlainNet, the same layers without shortcuts.
        shortcut: Where the shape changes: "A" pads with zero channels (the paper's choice), "B" projects by 1x1
            convolution and batch norm. A PlainNet has none, whatever this says.
        pad: Where option A's zero channels go: "both", half before and half after the old ones, as the most used
            published weights have them, or "after". The paper does not say; one is a permutation of the other.
        num_classes: Logits.
        norm_batch: Images over which batch norm takes its statistics in training, which must divide the batch; 0: all
            of it. The paper's two GPUs (section 4.2) saw 64 each.
        bn_eps, bn_momentum: Batch norm's epsilon, and the weight of the new batch in the running statistics; the
            paper names neither, these are torch's.

    Raises:
        InputError: The depth is not 6n+2, or there is no such option.
    """

    def __init__(
        self,
        depth: int,
        *,
        residual: bool = True,
        shortcut: Literal["A", "B"] = "A",
        pad: Literal["both", "after"] = "both",
        num_classes: int = 10,
        norm_batch: int = 0,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.depth, self.residual, self.shortcut = depth, residual, shortcut
        n = num_blocks(depth)
        check_option("shortcut", shortcut, ("A", "B"))
        check_option("pad", pad, ("both", "after"))
        norm = functools.partial(BatchNorm, eps=bn_eps, momentum=bn_momentum, group=norm_batch)
        kind = functools.partial(Block, residual=residual, shortcut=shortcut, pad=pad, norm=norm)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = norm(WIDTHS[0])

        def stage(in_channels: int, channels: int) -> nn.Sequential:
            inputs = [in_channels] + [channels] * (n - 1)
            return nn.Sequential(*(kind(c, channels) for c in inputs))

        self.layer1 = stage(WIDTHS[0], WIDTHS[0])
        self.layer2 = stage(WIDTHS[0], WIDTHS[1])
        self.layer3 = stage(WIDTHS[1], WIDTHS[2])
        self.fc = nn.Linear(WIDTHS[2], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Mean-subtracted images `(batch, 3, 32, 32)`, any memory format -> logits `(batch, num_classes)`.

        Under autocast too the logits are fp32: pooling and the fc layer cost next to nothing.
        """
        x = layer(self.conv1, self.bn1, images)
        return logits_of(self.layer3(self.layer2(self.layer1(x))), self.fc)


@torch.no_grad()
def init_he_(net: nn.Module, *, mode: Literal["fan_in", "fan_out"], generator: torch.Generator) -> None:
    """Initialise in place: He normal weights (arXiv:1502.01852), batch norm to identity, the fc bias to zero.

    Weights have the standard deviation sqrt(2 / fan); of linear layers the fan-in always, since the fan-out of the last
    one is the number of classes, which makes its logits several times as large. They are drawn on the CPU in fp32, in
    the order of `net.named_parameters()`, so that a seed means the same weights on every device, and one block's
    weights do not depend on what comes after it.

    Args:
        net: A network of convolutions, batch norms and linear layers.
        mode: Which fan of convolutions: "fan_in" keeps the scale of activations, "fan_out" that of gradients. The paper
            cites He et al. 2015, which derives both.
        generator: On the CPU; advanced by the weights drawn.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight, fan = torch.empty(module.weight.shape), mode if isinstance(module, nn.Conv2d) else "fan_in"
            module.weight.copy_(nn.init.kaiming_normal_(weight, mode=fan, nonlinearity="relu", generator=generator))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            module.reset_running_stats()


def num_parameters(net: nn.Module) -> int:
    """Trainable numbers in a network; running statistics are not counted."""
    return sum(p.numel() for p in net.parameters())
