"""Capture a function into a CUDA graph, and replay it. Knows nothing of models.

A capture records the kernels that a function launches, with the addresses they read and write; a replay launches them
all at once and asks nothing of the function. So the function may not read from the device, and every tensor it reads or
changes must stay where it was: `static` tensors are checked.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # before the capture: compilation, cuDNN's choice of algorithms, lazy allocations


class Replay(Protocol):
    """What a capture gives."""

    def replay(self) -> None:
        """Launch what was captured, behind everything else on the current stream."""

    def check(self) -> None:
        """Raise RuntimeError where a static tensor has moved since the capture."""


Capture = Callable[[Sequence[Callable[[], None]], Sequence[Tensor]], Replay]


class CapturedGraph:
    """Functions without arguments, captured as parallel branches of one CUDA graph.

    Each branch is warmed up and captured on a stream of its own: autograd launches a node of the backward on the stream
    of its forward, and gradients are accumulated on the stream that first did so.

    Args:
        branches: Independent of each other; each is called `WARM_UP_CALLS` times, then captured. What they change
            stays changed.
        static: Tensors that live outside the graph and that it reads or writes.
    """

    def __init__(self, branches: Sequence[Callable[[], None]], static: Sequence[Tensor]) -> None:
        self._static = [(tensor, tensor.data_ptr()) for tensor in static]
        main = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        streams = [torch.cuda.Stream() for _ in branches]  # type: ignore[no-untyped-call]
        main.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(main):
            for _ in range(WARM_UP_CALLS):
                _fork_and_join(main, streams, branches)
        torch.cuda.current_stream().wait_stream(main)
        torch.cuda.synchronize()  # once a run: nothing of the warm-up may run into the capture
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: DALI's and the data loader's threads may allocate while this one captures
        with torch.cuda.graph(self._graph, stream=main, capture_error_mode="thread_local"):
            _fork_and_join(main, streams, branches)

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()

    def check(self) -> None:
        """Raise RuntimeError where a static tensor has moved since the capture: the graph would use freed memory."""
        for tensor, address in self._static:
            if tensor.data_ptr() != address:
                raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} moved after it was captured")


def _fork_and_join(
    main: torch.cuda.Stream, streams: Sequence[torch.cuda.Stream], branches: Sequence[Callable[[], None]]
) -> None:
    if len(branches) == 1:  # no fork to pay for
        branches[0]()
        return
    forked = []
    try:
        for stream, branch in zip(streams, branches, strict=True):
            stream.wait_stream(main)
            forked.append(stream)
            with torch.cuda.stream(stream):
                branch()
    finally:  # else a capture that an error ends could not be ended itself, and would stay the caller's stream
        for stream in forked:
            main.wait_stream(stream)
