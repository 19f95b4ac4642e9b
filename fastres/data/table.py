"""Resident batches on a CPU: one gather of ready-made rows, where a GPU computes each pixel (resident.py)."""

import copy

import numpy as np
import torch
from torch import Tensor

from fastres.data.imageset import IMAGE_SIZE, Float32Array, ImageSet
from fastres.data.pixels import pixels
from fastres.data.plan import PAD, EpochPlan

CHUNK = 1_000  # images converted at a time, to bound memory
PITCH = (
    IMAGE_SIZE + PAD
)  # pixels from one row to the next, rows from one image to the next: neighbours share their zeros
IMAGE_PITCH = PITCH * PITCH  # pixels from one image to the next
MARGIN = PAD * PITCH + PAD  # pixels of zeros before the first image


class TableLoader:
    """Training batches by one gather from a table of zero-padded pixels in the training precision.

    The table is one stream of pixels: each row is followed by four zeros and each image by four rows of zeros, which
    serve the neighbours on both sides. Every row of every crop is then 32 neighbouring pixels of it, and a batch is a
    gather of `batch * 32` such rows. A mirrored copy of the table stands behind the plain one: the mirrored crop at
    column dx is the mirror image's crop at column 8 - dx.

    Args:
        images: Its training images are used.
        plan: Order, crops and flips.
        mean: float32 `(32, 32, 3)`, 0 to 255, of the training images.
        batch_size: Images a step.
        device, dtype: Of the batches.
        channels_last: Memory format of the batches; False makes another copy.
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
    ) -> None:
        self.plan, self.batch_size, self.device, self.channels_last = plan, batch_size, device, channels_last
        num_images = len(images.train_images)
        half = MARGIN + num_images * IMAGE_PITCH
        table = torch.zeros(2 * half, 3, dtype=dtype, device=device)
        plain, mirrored = (
            part[MARGIN:].view(num_images, PITCH, PITCH, 3)[:, :IMAGE_SIZE, :IMAGE_SIZE]
            for part in (table[:half], table[half:])
        )
        for start in range(0, num_images, CHUNK):
            part = slice(start, start + CHUNK)
            chunk = torch.from_numpy(pixels(images.train_images[part], mean)).to(device)
            plain[part] = chunk
            mirrored[part] = chunk.flip(2)
        self._mirror_offset = half
        # Row r of this view is pixels r to r + 31; the rows overlap, nothing is copied.
        self._rows = table.as_strided((2 * half - IMAGE_SIZE + 1, IMAGE_SIZE * 3), (3, 1))
        self._labels = torch.from_numpy(images.train_labels.astype(np.int64)).to(device)
        self._row_starts = np.arange(IMAGE_SIZE, dtype=np.int64) * PITCH

    def sharing(self, plan: EpochPlan) -> "TableLoader":
        """Another plan's loader, of the same table."""
        other = copy.copy(self)
        other.plan = plan
        return other

    def prepare(self, step: int) -> None:
        """Nothing to do ahead."""

    def load(self, counter: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of a 0-based step: images `(batch, 3, 32, 32)`, labels int64 `(batch,)`. New tensors each time."""
        step = int(counter)
        samples = self.plan.at(step * self.batch_size, self.batch_size)
        index = samples.index.astype(np.int64)
        column = np.where(samples.flip, self._mirror_offset + 2 * PAD - samples.dx, samples.dx)
        first = index * IMAGE_PITCH + samples.dy * PITCH + column
        starts = (first[:, None] + self._row_starts).reshape(-1)
        rows = self._rows.index_select(0, torch.from_numpy(starts).to(self.device))
        batch = rows.view(-1, IMAGE_SIZE, IMAGE_SIZE, 3).permute(0, 3, 1, 2)
        labels = self._labels.index_select(0, torch.from_numpy(index).to(self.device))
        return (batch if self.channels_last else batch.contiguous()), labels

    def close(self) -> None:
        """Nothing to release."""
