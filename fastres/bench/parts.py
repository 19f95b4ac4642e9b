"""Marks between the parts of a step, to see where its time goes."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch

from fastres.runtime import synchronize
from fastres.step import Replica

PARTS = ("load", "forward", "backward", "update", "log")


class Marks:
    """Named moments, in the order in which they were first marked: CUDA events, or on a CPU readings of the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moments: dict[str, Any] = {}

    def mark(self, name: str) -> None:
        """This moment, on the current stream; a name used before is moved."""
        if self.device.type != "cuda":
            self._moments[name] = perf_counter()
            return
        # An external event becomes a node of the graph that is being captured, recorded anew at each replay.
        capturing = torch.cuda.is_current_stream_capturing()
        event = torch.cuda.Event(enable_timing=True, external=capturing)  # type: ignore[no-untyped-call]
        event.record()
        self._moments[name] = event

    def seconds(self) -> dict[str, float]:
        """From each moment to the one after it, by the later one's name. Waits for the device."""
        synchronize(self.device)
        pairs = itertools.pairwise(self._moments)
        return {later: self._between(self._moments[sooner], self._moments[later]) for sooner, later in pairs}

    def _between(self, sooner: Any, later: Any) -> float:
        return float(sooner.elapsed_time(later)) / 1e3 if self.device.type == "cuda" else later - sooner


@contextlib.contextmanager
def marked(replica: Replica, marks: Marks) -> Iterator[None]:
    """Inside the block, each step of the replica marks "start" and the end of each of its `PARTS`.

    On a CPU "load" begins where the host prepares the step; on a GPU that happens ahead, beside the steps before.
    """
    loader = replica.loader
    begins = loader.load if marks.device.type == "cuda" else loader.prepare

    def start(*args: Any) -> Any:
        marks.mark("start")
        return begins(*args)

    def ends(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def marked_part(*args: Any) -> Any:
            result = function(*args)
            marks.mark(part)
            return result

        return marked_part

    with contextlib.ExitStack() as stack:

        def replace(owner: object, name: str, function: Callable[..., Any]) -> None:
            setattr(owner, name, function)
            stack.callback(delattr, owner, name)  # the method of its class shows again

        if marks.device.type == "cuda":
            replace(loader, "load", ends("load", start))
        else:
            replace(loader, "prepare", start)
            replace(loader, "load", ends("load", loader.load))
        for part in PARTS[1:]:
            replace(replica, part, ends(part, getattr(replica, part)))
        yield
