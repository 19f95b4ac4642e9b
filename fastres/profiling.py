"""Where a step's time goes, kernel by kernel, by torch.profiler."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table
from rich.text import Text
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from fastres.bench import Bench, Cell
from fastres.build import load_images
from fastres.checkpoint import disk_error

STEPS = 20
ROWS = 10


@dataclass(frozen=True)
class Kernel:
    """What one kernel (on a CPU: operator) costs in a step."""

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class Profile:
    """A step under the profiler. Seconds are of one step."""

    label: str
    step_seconds: float  # unmodified, before the profiler was on
    profiled_seconds: float
    kernels: list[Kernel]  # the most costly first
    idle: float | None  # share of the profiled steps in which the GPU ran nothing; None on a CPU

    @property
    def busy_seconds(self) -> float:
        """In kernels, those of parallel streams counted each."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def calls(self) -> float:
        """Kernels in a step."""
        return sum(kernel.calls for kernel in self.kernels)


def take_profile(cell: Cell, trace: Path, *, say: Callable[[str], None]) -> Profile:
    """Profile 20 steps of a warmed-up cell.

    Args:
        cell: What to run.
        trace: Where the Chrome trace goes (chrome://tracing, https://ui.perfetto.dev); packed where it ends in .gz.
        say: Takes one-line notices.

    Raises:
        MachineError: The trace cannot be written.
    """
    try:
        trace.open("w").close()  # before the work; the profiler would only log that it cannot write
    except OSError as error:
        raise disk_error(error, trace.parent, 0) from error
    bench = Bench(cell, load_images(cell.config.data, cell.config.execution, say=say))
    gpu = bench.runtime.device.type == "cuda"
    unmodified = median(bench.run(STEPS) for _ in range(3))
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        profiled = bench.run(STEPS)
    bench.close()
    profiler.export_chrome_trace(str(trace))
    spent = [
        Kernel(event.key, event.count / STEPS, microseconds / STEPS / 1e6)
        for event in profiler.key_averages()
        if (microseconds := event.self_device_time_total if gpu else event.self_cpu_time_total) > 0
    ]
    times = [event.time_range for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    return Profile(
        cell.label,
        unmodified,
        profiled,
        sorted(spent, key=lambda kernel: kernel.seconds, reverse=True),
        idle_share((time.start, time.end) for time in times) if times else None,
    )


def idle_share(times: Iterable[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no (start, end) covers."""
    ordered = sorted(times)
    begin, until = ordered[0]
    idle = 0.0
    for start, end in ordered:
        idle += max(0.0, start - until)
        until = max(until, end)
    return idle / (until - begin) if until > begin else 0.0


def profile_cell(cell: Cell, trace: Path, *, say: Callable[[str], None]) -> tuple[Text, Table]:
    """The profile of a cell for people; arguments and errors as `take_profile`.

    Returns:
        A title, and the ten kernels (on a CPU: operators) that cost most: milliseconds a step, share, calls a step.
    """
    taken = take_profile(cell, trace, say=say)
    gpu = taken.idle is not None
    idle = f", {100 * taken.idle:.1f} % idle" if taken.idle is not None else ""
    title = Text(
        f"{taken.label}: {1e3 * taken.step_seconds:.3g} ms a step, {1e3 * taken.profiled_seconds:.3g} under the "
        f"profiler, {1e3 * taken.busy_seconds:.3g} of them in {'kernels' if gpu else 'operators'} "
        f"({taken.calls:,.0f} calls){idle}",
        style="bold",
    )
    result = Table(box=None, pad_edge=False)
    for head in ("ms/step", "share", "calls/step"):
        result.add_column(head, justify="right")
    result.add_column("kernel" if gpu else "operator", overflow="ellipsis", no_wrap=True)
    for kernel in taken.kernels[:ROWS]:
        share = kernel.seconds / taken.busy_seconds
        result.add_row(f"{1e3 * kernel.seconds:.3g}", f"{100 * share:.1f} %", f"{kernel.calls:,.0f}", kernel.name)
    return title, result
