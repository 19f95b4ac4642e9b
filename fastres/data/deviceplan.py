"""The samples of the steps to come as tensors on the device, so that a captured step can look its own up."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastres.data.plan import EpochPlan, Samples

CHUNK = 256  # steps that are copied at a time
CHUNKS = 2  # in use, and the one before, whose last steps may not have been launched yet
INDEX_BITS, OFFSET_BITS = 20, 4  # over a million images; offsets 0 to 8


class DevicePlan:
    """A window of the plan that moves along with the steps; a sample is one int32.

    Args:
        plan: Samples in order.
        batch_size: Samples a step.
        device: Where the window lives.

    Attributes:
        codes: The window: int32 `(steps, batch)`, a step in row `step % steps`.
    """

    def __init__(self, plan: EpochPlan, batch_size: int, device: torch.device) -> None:
        if plan.num_images > 1 << INDEX_BITS:
            raise ValueError(f"{plan.num_images:,} images; at most {1 << INDEX_BITS:,} fit")
        self.plan, self.batch_size, self.device = plan, batch_size, device
        self.codes = torch.zeros(CHUNKS * CHUNK, batch_size, dtype=torch.int32, device=device)
        self._have = [-1] * CHUNKS  # the chunk that each place holds

    def prepare(self, step: int) -> None:
        """Have 0-based step `step` on the device, behind all that was launched before.

        Up to `CHUNK` steps may be prepared before the first of them is launched.
        """
        chunk = step // CHUNK
        place = chunk % CHUNKS
        if self._have[place] == chunk:
            return
        codes = torch.from_numpy(self._chunk(chunk))
        if self.device.type == "cuda":
            codes = codes.pin_memory()  # or the copy would wait for the device
        self.codes[place * CHUNK : (place + 1) * CHUNK].copy_(codes, non_blocking=True)
        self._have[place] = chunk

    def _chunk(self, chunk: int) -> npt.NDArray[np.int32]:
        count = CHUNK * self.batch_size
        return encode(self.plan.at(chunk * count, count)).reshape(CHUNK, self.batch_size)


def look_up(codes: Tensor, counter: Tensor) -> Tensor:
    """The codes int32 `(batch,)` of the step that `counter` says, from a plan's window."""
    return codes.index_select(0, counter % len(codes)).view(-1)


def encode(samples: Samples) -> npt.NDArray[np.int32]:
    """Index, dy, dx and flip in one int32, lowest bits first."""
    code = samples.index | samples.dy << INDEX_BITS | samples.dx << (INDEX_BITS + OFFSET_BITS)
    encoded: npt.NDArray[np.int32] = code | samples.flip.astype(np.int32) << (INDEX_BITS + 2 * OFFSET_BITS)
    return encoded


def decode_index(codes: Tensor) -> Tensor:
    """The index (int64) of int32 codes, any shape."""
    return codes.long() & ((1 << INDEX_BITS) - 1)


def decode(codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index, dy, dx (int64) and flip (bool) of int32 codes, any shape."""
    wide, index = codes.long(), decode_index(codes)
    offset = (1 << OFFSET_BITS) - 1
    dy = wide >> INDEX_BITS & offset
    dx = wide >> (INDEX_BITS + OFFSET_BITS) & offset
    return index, dy, dx, (wide >> (INDEX_BITS + 2 * OFFSET_BITS)).bool()
