"""The ImageNet networks of He et al. (CVPR 2016, section 4.1 and Table 1), first layer for small or large images.

Layers have torchvision's names, so that its weights fit: `conv1`, `bn1`, `layer1.0.conv1`, ..., `layer4.2.bn3`, `fc`.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastres.models.cifar import Block, CifarNet, check_option, logits_of, shortcut_of, zeros_of
from fastres.models.depth import IMAGENET_BLOCKS, check_depth
from fastres.models.layer import layer
from fastres.models.norm import BatchNorm

WIDTHS = (64, 128, 256, 512)  # filters of the 3x3 layers at the four map sizes
EXPANSION = 4  # channels that leave a bottleneck, over those of its 3x3 layer
BOTTLENECKS_FROM = 50  # layers


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 layer and the shortcut around them (Figure 5, right).

    The 3x3 layer strides where the map shrinks, as in torchvision; the authors' Caffe models stride in the first 1x1
    layer. The paper does not say.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        *,
        shortcut: Literal["A", "B"],
        pad: Literal["both", "after"],
        norm: Callable[[int], BatchNorm],
    ) -> None:
        super().__init__()
        channels = EXPANSION * width
        self.stride = stride
        self.zeros = zeros_of(channels - in_channels, pad)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = norm(channels)
        self.downsample: nn.Module | None = None
        if shortcut == "B" and in_channels != channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` -> `(batch, 4 * width, h / stride, w / stride)`."""
        out = layer(self.conv2, self.bn2, layer(self.conv1, self.bn1, x))
        return layer(self.conv3, self.bn3, out, shortcut_of(x, self.stride, self.zeros, self.downsample))


class ImageNetNet(nn.Module):
    """ResNet-18, -34, -50, -101 or -152: two layers a block in the first two, bottlenecks in the others.

    Args:
        depth: One of the five.
        stem: "small": one 3x3 layer that keeps the map, for images of 32x32 as CIFAR-10's; "large": a 7x7 layer and max
            pooling, each of stride 2, for 224x224, as the paper has it.
        shortcut: Where the shape changes: "B" projects, as the paper's bottlenecks do (section 4.1), "A" pads with zero
            channels, as its Table 2 has ResNet-18 and -34.
        pad, num_classes, norm_batch, bn_eps, bn_momentum: As of `CifarNet`.

    Raises:
        InputError: There is no such depth or option.
    """

    residual = True

    def __init__(
        self,
        depth: int,
        *,
        stem: Literal["small", "large"] = "small",
        shortcut: Literal["A", "B"] = "B",
        pad: Literal["both", "after"] = "both",
        num_classes: int = 10,
        norm_batch: int = 0,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        check_depth(depth, imagenet=True)
        check_option("stem", stem, ("small", "large"))
        check_option("shortcut", shortcut, ("A", "B"))
        check_option("pad", pad, ("both", "after"))
        self.depth, self.stem, self.shortcut = depth, stem, shortcut
        norm = functools.partial(BatchNorm, eps=bn_eps, momentum=bn_momentum, group=norm_batch)
        first = (7, 2, 3) if stem == "large" else (3, 1, 1)  # kernel, stride, padding
        self.conv1 = nn.Conv2d(3, WIDTHS[0], *first, bias=False)
        self.bn1 = norm(WIDTHS[0])
        channels = WIDTHS[0]

        def stage(width: int, num_blocks: int) -> nn.Sequential:
            nonlocal channels
            blocks: list[nn.Module] = []
            for k in range(num_blocks):
                if depth < BOTTLENECKS_FROM:
                    blocks.append(Block(channels, width, residual=True, shortcut=shortcut, pad=pad, norm=norm))
                    channels = width
                else:
                    stride = 2 if k == 0 and width != WIDTHS[0] else 1
                    blocks.append(Bottleneck(channels, width, stride, shortcut=shortcut, pad=pad, norm=norm))
                    channels = EXPANSION * width
            return nn.Sequential(*blocks)

        self.layer1, self.layer2, self.layer3, self.layer4 = map(stage, WIDTHS, IMAGENET_BLOCKS[depth])
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, 3, h, w)` of the stem's size, any memory format -> logits `(batch, num_classes)`, fp32."""
        x = layer(self.conv1, self.bn1, images)
        if self.stem == "large":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        return logits_of(self.layer4(self.layer3(self.layer2(self.layer1(x)))), self.fc)


Network = CifarNet | ImageNetNet
