"""Doubles of torch.cuda's streams, events and graphs, which keep account of what is ordered behind what."""

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import pytest
import torch


class FakeStream:
    """A CUDA stream that knows how far it is.

    Attributes:
        before: What its next piece of work comes after: launched here, or before an event that was waited for.
        clock: Seconds of work launched here.
    """

    cuda_stream = 0  # its handle

    def __init__(self) -> None:
        self.before: set[Hashable] = set()
        self.clock = 0.0

    def record_event(self) -> "Recorded":
        return Recorded(self.before)

    def wait_event(self, event: frozenset[Hashable]) -> None:
        self.before |= event

    def wait_stream(self, other: "FakeStream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None: ...


class Recorded(frozenset[Hashable]):
    """An event: what comes before it, and whether the device has got there, which it has when it is told so."""

    done = False

    def query(self) -> bool:
        return self.done


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel, and where and behind what it was launched; equal to itself alone."""

    kernel: str
    stream: FakeStream
    before: frozenset[Hashable]


class FakeGraph:
    """A CUDA graph: the names of the kernels that were captured."""

    def __init__(self, cuda: "FakeCuda") -> None:
        self._cuda = cuda
        self.kernels: list[str] = []
        self.stream: FakeStream | None = None  # which captured
        self.error_mode = ""

    def replay(self) -> None:
        for kernel in self.kernels:
            self._cuda.launch(kernel)


class FakeEvent:
    """An event of a stream's clock."""

    def __init__(self, cuda: "FakeCuda", *, enable_timing: bool) -> None:
        self._cuda, self._timing = cuda, enable_timing
        self._at: float | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        self._at = (stream or self._cuda.current).clock

    def elapsed_time(self, later: "FakeEvent") -> float:
        if not (self._timing and later._timing) or self._at is None or later._at is None:
            raise RuntimeError("both events must have timing, and be recorded")
        return 1e3 * (later._at - self._at)


class FakeCuda:
    """Stands in for what torch.cuda has of these, as long as the test runs.

    Attributes:
        current: The current stream.
        launches: All kernels, in the order of their launches.
        log: Their names, and what else the host did: "synchronize", "capture", "captured".
        graphs, events: All that were made.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current = FakeStream()
        self.launches: list[Launch] = []
        self.log: list[str] = []
        self.graphs: list[FakeGraph] = []
        self.events: list[FakeEvent] = []
        self._captured: list[Launch] | None = None  # so far, while a stream captures
        doubles = {
            "Stream": FakeStream,
            "Event": self._event,
            "CUDAGraph": self._graph,
            "current_stream": lambda: self.current,
            "stream": self._stream,
            "graph": self._capture,
            "synchronize": lambda: self.log.append("synchronize"),
        }
        for name, double in doubles.items():
            patch.setattr(torch.cuda, name, double)

    def launch(self, kernel: str, seconds: float = 0.0) -> None:
        """Launch a kernel on the current stream. Raises as CUDA where others capture, and this stream does not."""
        one = Launch(kernel, self.current, frozenset(self.current.before))
        if self._captured is not None:
            if "capture" not in one.before:
                raise RuntimeError(f"{kernel} is on a stream that does not take part in the capture")
            self._captured.append(one)
        self.launches.append(one)
        self.log.append(kernel)
        self.current.before.add(one)
        self.current.clock += seconds

    def _event(self, *, enable_timing: bool = False) -> FakeEvent:
        self.events.append(FakeEvent(self, enable_timing=enable_timing))
        return self.events[-1]

    def _graph(self) -> FakeGraph:
        self.graphs.append(FakeGraph(self))
        return self.graphs[-1]

    @contextlib.contextmanager
    def _stream(self, stream: FakeStream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def _capture(self, graph: FakeGraph, *, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        self.log.append("capture")
        graph.stream, graph.error_mode, self._captured = stream, capture_error_mode, []
        stream.before.add("capture")
        try:
            with self._stream(stream):
                yield
        finally:
            kernels, self._captured = self._captured, None
            if not stream.before.issuperset(kernels):
                raise RuntimeError("the capture ends before streams that take part in it have joined")
        graph.kernels = [one.kernel for one in kernels]
        self.log.append("captured")
