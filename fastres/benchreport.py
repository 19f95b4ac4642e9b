"""What a benchmark says: table, chart, comparison. Works on the report that `bench.measure` makes and on its JSON."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastres.bench import SCHEMA
from fastres.checkpoint import disk_error
from fastres.errors import InputError
from fastres.parts import PARTS

Report = dict[str, Any]
MACHINE = ("gpu", "driver", "cpu", "cores", "threads", "platform")  # keys of the environment that must be equal
RESAMPLINGS = 2_000


# --- one report


def tables(report: Report) -> Group:
    """How fast each cell is, and where its step goes."""
    fast = _table(("img/s", "ms/step", "p5 to p95", "x floor", "compile s"))
    optional = [
        (head, key, scale)
        for head, key, scale in (("GB", "peak_memory", 1e9), ("mJ/img", "joules_per_image", 1e-3))
        if any(cell[key] is not None for cell in report["cells"])
    ]
    for head, _, _ in optional:
        fast.add_column(head, justify="right", no_wrap=True)
    shares = _table((*PARTS, "gaps"))
    for cell in report["cells"]:
        step = cell["step_seconds"]
        fast.add_row(
            cell["label"],
            f"{cell['images_per_second']:,.0f}",
            _milliseconds(step["median"]),
            f"{_milliseconds(step['p5'])} to {_milliseconds(step['p95'])}",
            f"{cell['over_floor']:.2f}",
            f"{cell['compile_seconds']:.1f}",
            *("-" if cell[key] is None else f"{cell[key] / scale:.3g}" for _, key, scale in optional),
        )
        parts = (100 * cell["profiled_pass"][part] / step["median"] for part in (*PARTS, "gaps"))
        shares.add_row(cell["label"], *(f"{part:.1f}" for part in parts))
    where = Text("Where the step goes, % (a separate, profiled pass; gaps: what it does not account for)", style="bold")
    return Group("", Text(_machine(report), style="bold"), fast, "", where, shares, "")


def _table(heads: Sequence[str]) -> Table:
    table = Table(pad_edge=False, box=None)
    table.add_column("cell", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def footnote(report: Report) -> str:
    """How the tables' numbers came about."""
    rounds = report["cells"][0]["step_seconds"]["n"]
    ceilings = "; ".join(
        f"{precision} product {c['multiply_adds_per_second'] / 1e9:,.0f} G multiply-adds/s, "
        f"copy {c['bytes_per_second'] / 1e9:,.0f} GB/s"
        + (f", graph launch {1e6 * c['launch_seconds']:.1f} us" if c["launch_seconds"] else "")
        for precision, c in report["ceilings"].items()
    )
    return (
        f"Medians of {rounds} rounds of the unmodified step, cells in turns, after compilation and first steps.\n"
        f"x floor: over the least time that arithmetic and memory traffic need here, as measured now: {ceilings}."
    )


def write_json(report: Report, path: Path) -> None:
    """Write a report. Raises MachineError where it cannot be written."""
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise disk_error(error, path.parent, 0) from error


def read_json(path: Path) -> Report:
    """A report from a file.

    Raises:
        InputError: It cannot be read, is none, or has another schema.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; write one with: fastres bench --json {path}") from error
    if not isinstance(report, dict) or not {"schema", "environment", "cells"} <= report.keys():
        raise InputError(f"{path} is not a benchmark report; write one with: fastres bench --json FILE")
    if report["schema"] != SCHEMA:
        raise InputError(f"{path} has schema {report['schema']!r}, this fastres reads {SCHEMA}; measure it again")
    return report


def draw(report: Report, path: Path) -> None:
    """A bar a cell, img/s with the 5th to 95th percentile; PNG or SVG by the file's ending.

    Raises:
        InputError: Another ending.
        MachineError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot is {path}; give a name that ends in .png or .svg")
    cells = report["cells"]
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(cells)), layout="constrained")
    axes = figure.add_subplot()
    rates = [cell["images_per_second"] for cell in cells]
    sizes = [cell["config"]["recipe"]["batch_size"] for cell in cells]
    spread = [
        [rate - size / cell["step_seconds"]["p95"] for rate, size, cell in zip(rates, sizes, cells, strict=True)],
        [size / cell["step_seconds"]["p5"] - rate for rate, size, cell in zip(rates, sizes, cells, strict=True)],
    ]
    bars = axes.barh([cell["label"] for cell in cells], rates, xerr=spread, color="#4477aa", ecolor="0.35", capsize=3)
    inside = [f" {rate:,.0f}  ({cell['over_floor']:.1f}x the floor)" for rate, cell in zip(rates, cells, strict=True)]
    axes.bar_label(bars, inside, label_type="edge", padding=6, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="images a second (median, 5th to 95th percentile)", xlim=(0, 1.45 * max(rates)))
    axes.set_title(_machine(report), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise disk_error(error, path.parent, 0) from error


def _machine(report: Report) -> str:
    env = report["environment"]
    commit = f", commit {env['commit'][:9]}" if env.get("commit") else ""
    return f"{env['gpu'] or env['cpu']}, {env['threads']} CPU threads, torch {env['torch']}{commit}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


# --- two of them


@dataclass(frozen=True)
class Comparison:
    """How much longer B's steps take than A's."""

    ratio: float  # of B's seconds over A's
    low: float
    high: float  # of the 99 % bootstrap interval
    verdict: str  # "faster", "slower" or "no difference": of B

    def line(self, label: str) -> str:
        """In words."""
        change, low, high = (100 * (value - 1) for value in (self.ratio, self.low, self.high))
        return f"{label}: {self.verdict} ({change:+.1f} % time a step; 99 % interval {low:+.1f} to {high:+.1f} %)"


def compare(a: Sequence[float], b: Sequence[float], *, paired: bool, dead_band: float = 0.01) -> Comparison:
    """Compare two cells' chunks.

    The interval is a percentile bootstrap (Efron 1979, https://doi.org/10.1214/aos/1176344552) of the median ratio over
    rounds, or of the ratio of medians; 2,000 resamplings from a fixed seed, 99 %.

    Args:
        a, b: Seconds a step, one value a round.
        paired: The n-th chunks of both were measured in turns, so that a round is drawn as a whole.
        dead_band: Differences within it are none.
    """
    chance = random.Random(0)  # noqa: S311 (no secret)
    if paired:
        ratios = [y / x for x, y in zip(a, b, strict=True)]
        middle = median(ratios)
        found = sorted(median(chance.choices(ratios, k=len(ratios))) for _ in range(RESAMPLINGS))
    else:
        middle = median(b) / median(a)
        found = sorted(
            median(chance.choices(b, k=len(b))) / median(chance.choices(a, k=len(a))) for _ in range(RESAMPLINGS)
        )
    tail = RESAMPLINGS // 200  # half a per cent
    low, high = found[tail], found[-tail - 1]
    verdict = "slower" if low > 1 + dead_band else "faster" if high < 1 - dead_band else "no difference"
    return Comparison(middle, low, high, verdict)


def compare_reports(a: Report, b: Report) -> dict[str, Comparison]:
    """The cells that two reports have in common, by label.

    They were measured at different times, so the noise between the two runs is not in the interval.

    Raises:
        InputError: The machines differ, or there is no common cell.
    """
    ours, theirs = a["environment"], b["environment"]
    other = [f"{key}: {ours.get(key)} and {theirs.get(key)}" for key in MACHINE if ours.get(key) != theirs.get(key)]
    if other:
        raise InputError(f"the reports come from different machines ({'; '.join(other)}); measure both on one machine")
    chunks = {cell["label"]: cell for cell in a["cells"]}
    common = [(chunks[cell["label"]], cell) for cell in b["cells"] if cell["label"] in chunks]
    if not common:
        raise InputError(
            f"the reports have no cell in common: {', '.join(chunks)} and {', '.join(c['label'] for c in b['cells'])}"
        )
    return {x["label"]: compare(x["chunks"], y["chunks"], paired=False) for x, y in common}
