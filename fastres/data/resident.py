"""Batches by plain torch from images that live on the device; the host is asked nothing, so a step can be captured."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastres.data.deviceplan import DevicePlan, decode, look_up
from fastres.data.imageset import IMAGE_SIZE, Bytes, Float32Array, ImageSet
from fastres.data.pixels import SCALE, pixels
from fastres.data.plan import PAD, EpochPlan

# Inductor's: images and labels in one kernel; coordinates computed where they are used instead of stored for reuse.
ONE_KERNEL: dict[str, Any] = {"combo_kernels": True, "realize_opcount_threshold": 1000, "realize_reads_threshold": 100}


class ResidentLoader:
    """Training batches computed pixel by pixel from the uint8 images: one kernel, where it is compiled.

    Args:
        images: Its training images are used; uint8, 3,072 bytes each on the device.
        plan: Order, crops and flips.
        mean: float32 `(32, 32, 3)`, 0 to 255, of the training images.
        batch_size: Images a step.
        device, dtype: Of the batches.
        channels_last: Memory format of the batches; False makes another copy.
        compiled: Compile it to one kernel; else each operation is one.
    """

    name, prefetched, period = "resident", 0, 1

    def __init__(
        self,
        images: ImageSet,
        plan: EpochPlan,
        *,
        mean: Float32Array,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool = True,
        compiled: bool = False,
    ) -> None:
        self.dtype, self.channels_last = dtype, channels_last
        self.window = DevicePlan(plan, batch_size, device)
        self._pixels = torch.from_numpy(images.train_images).view(-1, 3).to(device)
        self._mean = torch.from_numpy(mean).view(-1, 3).to(device)
        self._labels = torch.from_numpy(images.train_labels.astype(np.int64)).to(device)
        self._batch: Callable[..., tuple[Tensor, Tensor]] = _batch
        if compiled:
            self._batch = torch.compile(_batch, fullgraph=True, dynamic=False, options=ONE_KERNEL)

    def sharing(self, plan: EpochPlan) -> "ResidentLoader":
        """Another plan's loader, of the same images on the device."""
        other = copy.copy(self)
        other.window = DevicePlan(plan, self.window.batch_size, self.window.device)
        return other

    def prepare(self, step: int) -> None:
        """Copy the plan of steps to come, once in many steps."""
        self.window.prepare(step)

    def load(self, counter: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of the step that `counter` says: images `(batch, 3, 32, 32)`, labels int64 `(batch,)`."""
        plan = self.window.codes
        batch, labels = self._batch(counter, plan, self._pixels, self._mean, self._labels, self.dtype)
        batch = batch.permute(0, 3, 1, 2)
        return (batch if self.channels_last else batch.contiguous()), labels

    def close(self) -> None:
        """Nothing to release."""


def _batch(counter: Tensor, plan: Tensor, *data: Any) -> tuple[Tensor, Tensor]:
    """The batch of the step that `counter` says; the rest goes to `crop`."""
    return crop(look_up(plan, counter), *data)


def crop(codes: Tensor, table: Tensor, mean: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Crop, flip, mean and cast, as `pixels.py` defines a pixel.

    Args:
        codes: int32 `(batch,)`, from `deviceplan.encode`.
        table: uint8 `(num_images * 1024, 3)`, the images' pixels.
        mean: float32 `(1024, 3)`.
        labels: int64 `(num_images,)`.
        dtype: Of the result.

    Returns:
        Images `(batch, 32, 32, 3)` and labels `(batch,)`.
    """
    index, dy, dx, flip = decode(codes)
    place = torch.arange(IMAGE_SIZE, device=codes.device)
    rows = place + (dy - PAD)[:, None]
    columns = torch.where(flip[:, None], IMAGE_SIZE - 1 - place, place) + (dx - PAD)[:, None]
    rows, columns = rows[:, :, None], columns[:, None, :]
    inside = (rows >= 0) & (rows < IMAGE_SIZE) & (columns >= 0) & (columns < IMAGE_SIZE)
    source = rows.clamp(0, IMAGE_SIZE - 1) * IMAGE_SIZE + columns.clamp(0, IMAGE_SIZE - 1)  # (batch, 32, 32)
    values = table[index[:, None, None] * IMAGE_SIZE**2 + source].float() - mean[source]
    return torch.where(inside[..., None], values * SCALE, 0.0).to(dtype), labels[index]


def evaluation_batches(
    images: Bytes,
    labels: Bytes,
    mean: Float32Array,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The plain single view of each image, in order; the last batch may be smaller.

    Args:
        images, labels: uint8 `(num, 32, 32, 3)` and `(num,)`.
        mean: float32 `(32, 32, 3)`, of the training images.
        batch_size, device, dtype, channels_last: Of the batches.

    Yields:
        Images `(batch, 3, 32, 32)` and labels int64 `(batch,)`.
    """
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        batch = torch.from_numpy(pixels(images[part], mean)).to(device).to(dtype).permute(0, 3, 1, 2)
        target = torch.from_numpy(labels[part].astype(np.int64)).to(device)
        yield (batch if channels_last else batch.contiguous()), target
