"""How long steps take, without waiting for the device: events on a GPU, the host's clock on a CPU."""

from time import perf_counter
from typing import Any

import numpy as np
import torch


class StepTimer:
    """Seconds between marks, each shared among the steps launched between them.

    On a GPU a mark is an event behind the launched step; its time is read in `collect`, when the device is done anyway.

    Args:
        device: On which the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, int]] = []  # event or seconds, and number of steps; 0 steps: a beginning
        self._free: list[Any] = []

    def begin(self) -> None:
        """What comes now is not part of a step before it."""
        self.mark(0)

    def mark(self, num_steps: int) -> None:
        """`num_steps` have been launched since the last mark."""
        if not self._cuda:
            self._marks.append((perf_counter(), num_steps))
            return
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((event, num_steps))

    def collect(self) -> list[float]:
        """Seconds of each step marked so far, which are then forgotten. On a GPU after a host sync only."""
        seconds = []
        for (before, _), (after, num_steps) in zip(self._marks, self._marks[1:], strict=False):
            if num_steps:
                between = before.elapsed_time(after) / 1e3 if self._cuda else after - before
                seconds += [between / num_steps] * num_steps
        if self._cuda:
            self._free += [event for event, _ in self._marks]
        self._marks.clear()
        return seconds


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds; nothing of nothing."""
    if not seconds:
        return {}
    p50, p99 = np.percentile(seconds, (50, 99)).tolist()
    return {"p50": 1e3 * p50, "p99": 1e3 * p99}
