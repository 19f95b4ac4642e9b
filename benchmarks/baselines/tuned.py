"""A well-tuned PyTorch script: tensors on the device, batches augmented there, bf16, channels-last, max-autotune.

What a careful engineer writes today after reading PyTorch's performance guide
(https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html): the network of `plain.py`, compiled as a whole.
`tuned_graphs.py` is the same with Inductor's own CUDA graphs. On a CPU it stays in fp32, where bf16 pays only with AMX.
"""

from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.plain import BATCH_SIZE, CHANNEL_MEAN, CHANNEL_STD, Cifar10, resnet

READ_EVERY = 100  # steps
PAD = 4


def train(data_dir: Path, depth: int = 20, *, mode: str = "max-autotune-no-cudagraphs") -> Generator[float, None, None]:
    """Train without end; yields the mean loss as last read from the device."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    images, labels = _on_device(Cifar10(data_dir), device, dtype)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    net = resnet(depth).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)

    def forward(batch: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            logits = net(batch)
        return F.cross_entropy(logits, target)

    compiled = torch.compile(forward, mode=mode if gpu else "default")
    loss_sum, step, mean = torch.zeros((), device=device), 0, float("nan")
    while True:
        order = torch.randperm(len(labels), device=device)
        for chosen in torch.split(order, BATCH_SIZE)[: len(labels) // BATCH_SIZE]:
            loss = compiled(_augmented(images[chosen]), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.detach()
            step += 1
            if step % READ_EVERY == 0:
                mean = loss_sum.item() / READ_EVERY
                loss_sum.zero_()
            yield mean


def _on_device(data: Cifar10, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All images, normalised and padded, `(50000, 3, 40, 40)` channels-last, and their labels."""
    pixels = torch.from_numpy(data.images).to(device).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (CHANNEL_MEAN, CHANNEL_STD))
    padded = [F.pad(((part / 255 - mean) / std).to(dtype), (PAD,) * 4) for part in torch.split(pixels, 5_000)]
    labels = torch.from_numpy(np.array(data.labels)).to(device)
    return torch.cat(padded).contiguous(memory_format=torch.channels_last), labels


def _augmented(padded: Tensor) -> Tensor:
    """A random crop and flip of each image, all at once by one gather of rows and one of columns."""
    num, device = len(padded), padded.device
    span = torch.arange(32, device=device)
    rows = torch.randint(0, 2 * PAD + 1, (num, 1), device=device) + span
    columns = torch.randint(0, 2 * PAD + 1, (num, 1), device=device) + span
    columns = torch.where(torch.rand(num, 1, device=device) < 0.5, columns, columns.flip(1))
    which = torch.arange(num, device=device)[:, None, None]
    crops = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2)
