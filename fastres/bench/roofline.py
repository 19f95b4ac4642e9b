"""How fast a step could be: what must be computed and moved, what this machine can do, and the floor that follows.

Work is counted from the network's shapes, ceilings are measured on the machine in the same run. The floor assumes that
arithmetic, memory and kernel launches overlap perfectly: the slowest of them is the least time a step can take.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

from fastres.cudagraph import CapturedGraph
from fastres.models.cifar import num_parameters
from fastres.models.imagenet import Network
from fastres.runtime import synchronize


@dataclass(frozen=True)
class Work:
    """What one training step must do, whatever the implementation."""

    multiply_adds: int  # forward and backward
    bytes_moved: int


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, measured."""

    multiply_adds_per_second: float  # of a large matrix product in the training precision
    bytes_per_second: float  # of a large copy, read and written
    launch_seconds: float = 0.0  # a step's one launch: of a CUDA graph that does next to nothing; 0 on a CPU

    def floor(self, work: Work) -> float:
        """Seconds below which a step cannot go: arithmetic's, memory's or the launch's, whichever is the most.

        The roofline of Williams, Waterman and Patterson (2009), https://doi.org/10.1145/1498765.1498785, with a third
        roof for the launch.
        """
        arithmetic = work.multiply_adds / self.multiply_adds_per_second
        return max(arithmetic, work.bytes_moved / self.bytes_per_second, self.launch_seconds)


def work_of(net: Network, batch_size: int, bytes_each: int) -> Work:
    """Count a training step from the shapes of the network's layers.

    Multiply-adds: a convolution has `out_pixels * out_channels * in_channels * kernel_pixels` an image forward, the fc
    layer `in * out`; the backward has twice that (gradients of input and weight), but for the first layer, whose input
    needs no gradient. Normalisation, ReLU and additions are not counted: they are memory's.

    Bytes, the least with every layer's output in memory once: forward writes each convolution's output, and reads it
    where the next begins; backward reads it once more (for the weight's gradient) and writes and reads its gradient:
    five passes over each output. The images are read twice. Weights, momentum and gradients in fp32: forward and
    backward read the weights, backward writes the gradients, the update reads all three and writes two: eight passes.

    Args:
        net: For images of 32x32. Its layers' shapes are looked at; nothing is run.
        batch_size: Images a step.
        bytes_each: Of an activation: 2 in bf16 and fp16, 4 in fp32.
    """
    forward = backward = outputs = 0
    side = 32
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            if "downsample" not in name:  # a projection's map is that of the layer beside it
                side //= layer.stride[0]
            pixels = side * side
            count = pixels * layer.out_channels * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
            forward += count
            backward += count if name == "conv1" else 2 * count
            outputs += pixels * layer.out_channels
        elif isinstance(layer, nn.Linear):
            forward += layer.in_features * layer.out_features
            backward += 2 * layer.in_features * layer.out_features
    images = 3 * 32 * 32
    moved = batch_size * bytes_each * (5 * outputs + 2 * images) + 8 * 4 * num_parameters(net)
    return Work(batch_size * (forward + backward), moved)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time a large matrix product, on a CPU a convolution too, and a large copy; takes a second or two."""
    gpu = device.type == "cuda"
    side, numbers = (8192, 1 << 28) if gpu else (2048, 1 << 26)
    if gpu:  # of what the networks beside it leave
        room = torch.cuda.mem_get_info(device)[0]
        side = side if room > 4e9 else 4096
        while 8 * numbers > room / 2:
            numbers //= 2
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = side**3 / _best(lambda: torch.mm(a, b), device)
    if not gpu:  # another library's, which may use more of a CPU: on an AMD MKL's fp32 product is half as quick
        maps = torch.randn(16, 64, 32, 32).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(64, 64, 3, 3).to(dtype, memory_format=torch.channels_last)
        convolved = maps.numel() * 64 * 9 / _best(lambda: F.conv2d(maps, weight, padding=1), device)
        product = max(product, convolved)
    source = torch.zeros(numbers, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    return Ceilings(product, copied, replay_seconds(device) if gpu else 0.0)


def replay_seconds(device: torch.device, *, nodes: int = 1, launches: int = 1000) -> float:
    """Of a CUDA graph of so many small kernels, one after the other, launched again and again without waiting."""
    number = torch.zeros(1, device=device)

    def little() -> None:
        for _ in range(nodes):
            number.add_(1)

    graph = CapturedGraph([little], [number])

    def launch() -> None:
        for _ in range(launches):
            graph.replay()

    return _best(launch, device) / launches


def _best(function: Callable[[], object], device: torch.device, *, rounds: int = 7) -> float:
    """The median of the faster half of the rounds, in seconds: ceilings are what the machine can, not what it did."""
    seconds = []
    for _ in range(rounds + 2):
        synchronize(device)
        start = perf_counter()
        function()
        synchronize(device)
        seconds.append(perf_counter() - start)
    return median(sorted(seconds[2:])[: rounds // 2 + 1])
