"""Where a step's time goes, kernel by kernel, by torch.profiler."""

from collections.abc import Callable
from pathlib import Path
from statistics import median

from rich.table import Table
from rich.text import Text
from torch.profiler import ProfilerActivity, profile

from fastres.bench import Bench, Cell
from fastres.build import load_images
from fastres.checkpoint import disk_error

STEPS = 20
ROWS = 10


def profile_cell(cell: Cell, trace: Path, *, say: Callable[[str], None]) -> tuple[Text, Table]:
    """Profile 20 steps of a warmed-up cell.

    Args:
        cell: What to run.
        trace: Where the Chrome trace goes (chrome://tracing, https://ui.perfetto.dev).
        say: Takes one-line notices.

    Returns:
        A title, and the ten kernels (on a CPU: operators) that cost most: milliseconds a step, share, calls a step.

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
        (event.self_device_time_total if gpu else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
    ]
    whole = sum(microseconds for microseconds, _, _ in spent)
    busy = whole / STEPS / 1e3
    title = Text(
        f"{cell.label}: {1e3 * unmodified:.3g} ms a step, {1e3 * profiled:.3g} under the profiler, "
        f"{busy:.3g} of them in {'kernels' if gpu else 'operators'} ({sum(n for _, n, _ in spent) / STEPS:,.0f} calls)",
        style="bold",
    )
    result = Table(box=None, pad_edge=False)
    for head in ("ms/step", "share", "calls/step"):
        result.add_column(head, justify="right")
    result.add_column("kernel" if gpu else "operator", overflow="ellipsis", no_wrap=True)
    for microseconds, count, name in sorted(spent, reverse=True)[:ROWS]:
        share = microseconds / whole
        result.add_row(f"{microseconds / STEPS / 1e3:.3g}", f"{100 * share:.1f} %", f"{count / STEPS:,.0f}", name)
    return title, result
