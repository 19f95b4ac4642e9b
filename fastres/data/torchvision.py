"""Batches as most people make them today, by torchvision's transforms in worker processes; for comparison."""

import gc
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from fastres.config import MAX_GRAPH_STEPS
from fastres.data.imageset import IMAGE_SIZE, Float32Array, ImageSet
from fastres.data.pixels import SCALE
from fastres.data.plan import PAD, EpochPlan
from fastres.machine import host

NUM_WORKERS = 2
PREFETCH_FACTOR = 2  # batches a worker makes ahead; torch's default


class TorchvisionLoader:
    """Training batches by `torch.utils.data.DataLoader` and torchvision's RandomCrop and RandomHorizontalFlip.

    Images come in the plan's order; crops and flips are torchvision's own random draws, seeded for each position of the
    stream, so that a resumed run sees what the uninterrupted one saw. They are not the plan's: a run with this loader
    is as good as one with the others, but not bit-equal to it.

    Args:
        images: Its training images are used.
        plan: Order; seed of crops and flips; whether there are any.
        mean: float32 `(32, 32, 3)`, 0 to 255, of the training images.
        batch_size: Images a step.
        device, dtype: Of the batches.
        channels_last: Memory format of the batches.
        num_workers: Processes, at least 1: each seeds its global generator, which in this process is the user's.
            Default: `NUM_WORKERS`, but no more than there are cores, which torch would warn of.
    """

    name, period = "torchvision", 1

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
        num_workers: int | None = None,
    ) -> None:
        if num_workers is None:
            num_workers = min(NUM_WORKERS, host.num_cores())
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; it must be at least 1")
        self.plan, self.batch_size, self.device, self.channels_last = plan, batch_size, device, channels_last
        self.num_workers, self.prefetched = num_workers, num_workers * PREFETCH_FACTOR
        self._dataset = _Images(images, mean, plan)
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None
        self._next = -1  # the step that `_batches` gives next
        # Steps that are prepared before the first of them is launched find their batches here.
        self._images = torch.zeros(MAX_GRAPH_STEPS, batch_size, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=dtype, device=device)
        self._labels = torch.zeros(MAX_GRAPH_STEPS, batch_size, dtype=torch.int64, device=device)

    def prepare(self, step: int) -> None:
        """Wait for the workers' batch and copy it to the device. Any step but the next starts new workers."""
        if step == self._next - 1:
            return  # it is there
        if self._batches is None or step != self._next:
            self.close()
            self._batches, self._next = self._start(step), step
        images, labels = next(self._batches)
        self._next += 1
        self._images[step % MAX_GRAPH_STEPS].permute(0, 3, 1, 2).copy_(images, non_blocking=True)
        self._labels[step % MAX_GRAPH_STEPS].copy_(labels, non_blocking=True)

    def load(self, counter: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of the step that `counter` says: images `(batch, 3, 32, 32)`, labels int64 `(batch,)`."""
        slot = counter % MAX_GRAPH_STEPS
        batch = self._images.index_select(0, slot)[0].permute(0, 3, 1, 2)
        return (batch if self.channels_last else batch.contiguous()), self._labels.index_select(0, slot)[0]

    def close(self) -> None:
        """Stop the worker processes."""
        self._batches, self._next = None, -1  # the last reference: the iterator ends its workers

    def _start(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        # Workers are forks of this process, where that is the platform's way. Were a forgotten DALI pipeline among the
        # garbage that they inherit, collecting it there would wait for DALI's threads, which a fork does not have.
        gc.collect()
        pinned = self.device.type == "cuda"
        order = _Order(self.plan, self.batch_size, step)
        return iter(
            DataLoader(
                self._dataset,
                batch_sampler=order,
                num_workers=self.num_workers,
                prefetch_factor=PREFETCH_FACTOR,
                pin_memory=pinned,
                generator=torch.Generator(),  # else it draws from the global one
            )
        )


class _Order(Sampler[list[tuple[int, int]]]):
    """(position in the stream, image) of each sample of each batch, from a step on, without end."""

    def __init__(self, plan: EpochPlan, batch_size: int, step: int) -> None:
        self.plan, self.batch_size, self.step = plan, batch_size, step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self.step * self.batch_size
        while True:
            index = self.plan.at(position, self.batch_size).index.tolist()
            yield list(enumerate(index, start=position))
            position += self.batch_size


class _Images(Dataset[tuple[Tensor, int]]):
    """The training images by (position, image)."""

    def __init__(self, images: ImageSet, mean: Float32Array, plan: EpochPlan) -> None:
        self.images, self.labels = images.train_images, images.train_labels.tolist()
        self.mean = torch.from_numpy(np.ascontiguousarray(mean.transpose(2, 0, 1)))
        self.seed = plan.seed
        augmentations = [transforms.RandomCrop(IMAGE_SIZE, padding=PAD), transforms.RandomHorizontalFlip()]
        # The mean goes first: what lies outside the image is then zero, as the paper has it, and not black.
        self.transform = transforms.Compose(
            [transforms.PILToTensor(), self._pixels, *(augmentations if plan.augment else [])]
        )

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        position, index = key
        # This process is a worker: its generator serves nobody else. The words are mixed before they become a seed.
        torch.default_generator.manual_seed(int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0]))
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]

    def _pixels(self, image: Tensor) -> Tensor:
        return (image - self.mean) * SCALE
