"""The plain PyTorch script that most people start from: the yardstick for `benchmarks/throughput.py`.

A ResNet of He et al. (CVPR 2016, section 4.2) in eager fp32, NCHW; torchvision transforms in a DataLoader with two
workers; loss and accuracy read from the device at every step. Written from the published recipe, nothing tuned, nothing
slowed.

    python benchmarks/baselines/plain.py --data-dir path/to/cifar-10-batches-bin
"""

import argparse
import json
import time
from collections.abc import Generator
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

BATCH_SIZE = 128
NUM_WORKERS = 2
CHANNEL_MEAN, CHANNEL_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's usual ones
RECORD_BYTES = 1 + 3 * 32 * 32  # label, then the planes R, G, B


class Cifar10(Dataset[tuple[Tensor, int]]):
    """CIFAR-10's training set from its binary layout, served as torchvision serves it: PIL image, transform, label."""

    def __init__(self, data_dir: Path) -> None:
        files = [data_dir / f"data_batch_{i}.bin" for i in range(1, 6)]
        records = np.concatenate([np.fromfile(file, dtype=np.uint8).reshape(-1, RECORD_BYTES) for file in files])
        self.labels: list[int] = records[:, 0].tolist()
        self.images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(CHANNEL_MEAN, CHANNEL_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image: Tensor = self.transform(Image.fromarray(self.images[index]))
        return image, self.labels[index]


class Block(nn.Module):
    """Two 3x3 convolutions and an option A shortcut: subsample, pad with zero channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, height, width)` in and out."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu(out + x)


def resnet(depth: int) -> nn.Sequential:
    """6n+2 layers; 269,722 parameters with 20.

    Raises:
        ValueError: `depth` is not 6n+2 for some n of at least 1.
    """
    num_blocks, rest = divmod(depth - 2, 6)  # at each of the three map sizes
    if num_blocks < 1 or rest:
        raise ValueError(f"depth {depth} is not 6n+2")
    blocks, in_channels = [], 16
    for channels, first_stride in ((16, 1), (32, 2), (64, 2)):
        for stride in (first_stride, *[1] * (num_blocks - 1)):
            blocks.append(Block(in_channels, channels, stride))
            in_channels = channels
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    net = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return net


def train(data_dir: Path, depth: int = 20) -> Generator[tuple[float, float], None, None]:
    """Train without end; yields (loss, accuracy in %) so far, once they are read from the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(
        Cifar10(data_dir), BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS, pin_memory=device.type == "cuda"
    )
    net = resnet(depth).to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    loss_sum, right, seen = 0.0, 0.0, 0
    while True:
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)  # noqa: PLW2901
            logits = net(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            right += (logits.argmax(dim=1) == labels).sum().item()
            seen += len(labels)
            yield loss_sum / seen, 100 * right / seen


def run(data_dir: Path, depth: int, steps: int, warmup: int) -> list[float]:
    """Seconds of each of `steps` steps, after `warmup` steps that are not timed."""
    training = train(data_dir, depth)
    times = []
    for _ in range(warmup):
        next(training)
    for _ in range(steps):
        start = time.perf_counter()
        next(training)
        times.append(time.perf_counter() - start)
    training.close()
    return times


def main() -> None:
    """Print one JSON line: images a second, by chunks of steps."""
    parser = argparse.ArgumentParser(description="The plain PyTorch baseline: a ResNet, batch 128, CIFAR-10")
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of data_batch_1.bin")
    parser.add_argument("--depth", type=int, default=20, help="6n+2 layers, default 20")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10, help="steps that are not timed")
    parser.add_argument("--chunk", type=int, default=15, help="steps a printed number covers")
    args = parser.parse_args()
    times = run(args.data_dir, args.depth, args.steps, args.warmup)
    chunks = [times[i : i + args.chunk] for i in range(0, len(times), args.chunk)]
    rates = [len(chunk) * BATCH_SIZE / sum(chunk) for chunk in chunks]
    print(json.dumps({"images_per_second": median(rates), "chunks": rates, "steps_per_chunk": args.chunk}))


if __name__ == "__main__":
    main()
