"""Where the seconds go: one stopwatch with named phases, of which exactly one runs at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Clocks:
    """Seconds by phase. A phase entered inside another pauses the outer one, so phases never count a second twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # finished time by phase
        self._running: list[str] = []
        self._since = perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block's seconds under `phase`."""
        self._charge()
        self._running.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def read(self, phase: str) -> float:
        """Seconds of `phase` so far, the running part included."""
        self._charge()
        return self.seconds.get(phase, 0.0)

    def totals(self) -> dict[str, float]:
        """Seconds by phase so far."""
        self._charge()
        return dict(self.seconds)

    def total(self) -> float:
        """Seconds of all phases so far."""
        return sum(self.totals().values())

    def add(self, seconds: dict[str, float]) -> None:
        """Count what earlier processes of the same run took."""
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    def _charge(self) -> None:
        now = perf_counter()
        if self._running:
            phase = self._running[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now
