"""Where a step's time goes, kernel by kernel, by torch.profiler."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from fastres.bench.cells import Cell
from fastres.bench.measure import Bench
from fastres.build import load_images
from fastres.files import disk_error

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
    idle_between_steps: float | None  # the part of it between two steps; None where these cannot be told apart

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
        raise disk_error(error, trace.parent) from error
    images = load_images(cell.config.data, cell.config.execution, say=say)
    with contextlib.closing(Bench(cell, images)) as bench:
        gpu = bench.runtime.device.type == "cuda"
        unmodified = median(bench.run(STEPS) for _ in range(3))
        activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
        with profile(activities=[activity], acc_events=True) as profiler:  # else torch 2.11 warns
            profiled = bench.timed(STEPS)
    profiler.export_chrome_trace(str(trace))
    spent = [
        Kernel(event.key, event.count / STEPS, microseconds / STEPS / 1e6)
        for event in profiler.key_averages()
        if (microseconds := event.self_device_time_total if gpu else event.self_cpu_time_total) > 0
    ]
    runs = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
    ]
    return Profile(
        cell.label,
        unmodified,
        profiled,
        sorted(spent, key=lambda kernel: kernel.seconds, reverse=True),
        idle_share((start, end) for start, end, _ in runs) if runs else None,
        idle_between(runs, STEPS) if runs else None,
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


def idle_between(runs: Iterable[tuple[float, float, str]], num_steps: int) -> float | None:
    """The share of the time from the first start to the last end that lies between one step's end and the next's start.

    Args:
        runs: (start, end, name) of every kernel of the steps.
        num_steps: How many steps these are. Each must have launched the same kernels in the same order.

    Returns:
        None where they have not: something ran beside them, as DALI does.
    """
    ordered = sorted(runs)
    each, rest = divmod(len(ordered), num_steps)
    steps = [ordered[k * each : (k + 1) * each] for k in range(num_steps)]
    names = [[name for _, _, name in step] for step in steps]
    if rest or any(own != names[0] for own in names):
        return None
    starts, ends = [step[0][0] for step in steps], [max(end for _, end, _ in step) for step in steps]
    idle = sum(max(0.0, start - end) for start, end in zip(starts[1:], ends, strict=False))
    return idle / (max(ends) - starts[0]) if max(ends) > starts[0] else 0.0


def profile_cell(cell: Cell, trace: Path, *, say: Callable[[str], None]) -> tuple[Text, Table]:
    """The profile of a cell for people; arguments and errors as `take_profile`.

    Returns:
        A title, and the ten kernels (on a CPU: operators) that cost most: milliseconds a step, share, calls a step.
    """
    taken = take_profile(cell, trace, say=say)
    kind = "operator" if taken.idle is None else "kernel"
    idle = f", {100 * taken.idle:.1f} % idle" if taken.idle is not None else ""
    title = Text(
        f"{taken.label}: {1e3 * taken.step_seconds:.3g} ms a step, {1e3 * taken.profiled_seconds:.3g} under the "
        f"profiler, {1e3 * taken.busy_seconds:.3g} of them in {kind}s ({taken.calls:,.0f} calls){idle}",
        style="bold",
    )
    return title, kernel_table(taken.kernels, kind)


def kernel_table(kernels: Sequence[Kernel], kind: str) -> Table:
    """The ten that cost most; `kernels` are all of a step, the most costly first."""
    whole = sum(kernel.seconds for kernel in kernels)
    table = Table(box=None, pad_edge=False)
    for head in ("ms/step", "share", "calls/step"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column(kind)  # the one that gives way where there is no room
    for kernel in kernels[:ROWS]:
        share = f"{100 * kernel.seconds / whole:.1f} %"
        table.add_row(f"{1e3 * kernel.seconds:.3g}", share, f"{kernel.calls:,.0f}", Name(kernel.name))
    return table


@dataclass(frozen=True)
class Name:
    """A kernel's name, cut in the middle to the width there is: kernels that begin alike end in different numbers."""

    whole: str

    def __rich_measure__(self, _console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, len(self.whole)).with_maximum(options.max_width)

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        left = max(options.max_width - 1, 0)  # characters beside the ellipsis
        tail = left // 3
        cut = f"{self.whole[: left - tail]}\u2026{self.whole[len(self.whole) - tail :]}"
        yield Text(self.whole if len(self.whole) <= options.max_width else cut, no_wrap=True, overflow="crop")
