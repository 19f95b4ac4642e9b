"""The plain script with the usual advice followed: AMP, a tuned DataLoader, no read from the device at each step.

Everything else is `plain.py`'s: its network, its transforms, its optimizer. bf16 where the device has it natively,
else fp16 with loss scaling; on a CPU bf16, as torch's AMP recipe has it
(https://docs.pytorch.org/tutorials/recipes/recipes/amp_recipe.html).
"""

from collections.abc import Generator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from benchmarks.baselines.plain import BATCH_SIZE, Cifar10, resnet

READ_EVERY = 100  # steps


def train(data_dir: Path, depth: int = 20) -> Generator[float, None, None]:
    """Train without end; yields the mean loss as last read from the device."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if not gpu or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    loader = DataLoader(
        Cifar10(data_dir),
        BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=min(8, torch.get_num_threads()),
        pin_memory=gpu,
        persistent_workers=True,
        prefetch_factor=4,
    )
    torch.backends.cudnn.benchmark = True
    net = resnet(depth).to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    loss_sum, step, mean = torch.zeros((), device=device), 0, float("nan")
    while True:
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)  # noqa: PLW2901
            with torch.autocast(device.type, dtype):
                loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            loss_sum += loss.detach()
            step += 1
            if step % READ_EVERY == 0:
                mean = loss_sum.item() / READ_EVERY
                loss_sum.zero_()
            yield mean
