"""What a benchmark says: table, chart, comparison. Works on the report that `bench.measure` makes and on its JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastres.bench.measure import SCHEMA
from fastres.bench.parts import PARTS
from fastres.configtree import changed_keys
from fastres.errors import InputError
from fastres.files import check_figure, disk_error, save_figure, write_text

Report = dict[str, Any]
MACHINE = ("gpu", "driver", "cpu", "cpu_id", "cores", "threads", "platform")  # of the environment: must be equal
CELL = {"label", "config", "step_seconds", "chunks"}  # keys of a cell that a comparison reads
PROFILE_TOLERANCE = 0.03  # of the profiled pass: off the unmodified step's time, a fraction
RESAMPLINGS = 2_000
LEAST_COMPARED = 8  # of a comparison: all of fewer can lie on one side by chance more often than 1 time in 100


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
    names = (*PARTS, "gaps")
    shares = _table((*names, "x step"))
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
        whole = sum(cell["profiled_pass"].values())
        parts = (f"{100 * cell['profiled_pass'][name] / whole:.1f}" for name in names)
        off = abs(cell["profiled_over_step"] - 1) > PROFILE_TOLERANCE
        shares.add_row(cell["label"], *parts, f"{cell['profiled_over_step']:.2f}{'*' if off else ''}")
    where = Text("Where the step goes, % of a separate, profiled pass (x step: over the unmodified)", style="bold")
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
    off = any(abs(cell["profiled_over_step"] - 1) > PROFILE_TOLERANCE for cell in report["cells"])
    note = f"\n*: more than {PROFILE_TOLERANCE:.0%} off the step's own time; read the parts with care." if off else ""
    turns = f"{rounds} round{'s' if rounds > 1 else ''}"
    return (
        f"Medians of {turns} of the unmodified step, cells in turns, after compilation and first steps; "
        f"{_conditions(report)}.\n"
        f"x floor: over the least time that arithmetic and memory traffic need here, as measured now: {ceilings}.{note}"
    )


def write_json(report: Report, path: Path) -> None:
    """Write a report, whole or not at all. Raises MachineError where it cannot be written."""
    text = json.dumps(report, indent=1) + "\n"
    if not _is_device(path):
        write_text(_target(path), text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_error(error, path.parent) from error


def check_place(path: Path) -> None:
    """Raise where no file can be written at `path`: better before the measurement than after it."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file in it")
    if _is_device(path):
        return
    path = _target(path)
    probe = path.with_name(f".{path.name}.tmp")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise disk_error(error, path.parent) from error


def _is_device(path: Path) -> bool:
    """Whether it is a pipe, a terminal or the like, which is written to and never replaced."""
    return path.exists() and not path.is_file()


def _target(path: Path) -> Path:
    """What a link points to, which stays a link."""
    return path.resolve() if path.is_symlink() and not _is_device(path) else path


def read_json(path: Path) -> Report:
    """A report from a file.

    Raises:
        InputError: It cannot be read, is none, is damaged, or has another schema.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}; write one with: fastres bench --json {path}") from error
    if not isinstance(report, dict) or not {"schema", "environment", "cells"} <= report.keys():
        raise InputError(f"{path} is not a benchmark report; write one with: fastres bench --json FILE")
    if type(report["schema"]) is not int or report["schema"] != SCHEMA:
        raise InputError(f"{path} has schema {report['schema']!r}, this fastres reads {SCHEMA}; measure it again")
    cells = report["cells"]
    if not isinstance(report["environment"], dict) or not isinstance(cells, list) or not all(map(_is_cell, cells)):
        raise InputError(f"{path} is damaged: a cell has no sound {', '.join(sorted(CELL))}; measure it again")
    return report


def _is_cell(cell: Any) -> bool:
    """Whether it has what a comparison reads, and a time for each round."""
    if not isinstance(cell, dict) or not cell.keys() >= CELL:
        return False
    label, config, chunks = cell["label"], cell["config"], cell["chunks"]
    if not isinstance(label, str) or not isinstance(config, dict) or not isinstance(chunks, list) or not chunks:
        return False
    recipe = config.get("recipe")
    if not isinstance(config.get("model"), dict) or not isinstance(recipe, dict) or "batch_size" not in recipe:
        return False
    return all(isinstance(value, float) and 0 < value < math.inf for value in chunks)


def draw(report: Report, path: Path) -> None:
    """A bar a cell, img/s with the 5th to 95th percentile; PNG or SVG by the file's ending.

    Raises:
        InputError: Another ending.
        MachineError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    check_figure(path, "--plot")
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
    furthest = max(rate + above for rate, above in zip(rates, spread[1], strict=True))  # the labels come behind it
    axes.set(xlabel="images a second (median, 5th to 95th percentile)", xlim=(0, 1.45 * furthest))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(f"{_machine(report)}\n{_conditions(report)}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=150)


def _machine(report: Report) -> str:
    env = report["environment"]
    commit = f", commit {short(env['commit'])}" if env.get("commit") else ""
    threads = f"{env['threads']} CPU thread{'s' if env['threads'] != 1 else ''}"
    return f"{env['gpu'] or env['cpu']}, {threads}, torch {env['torch']}{commit}"


def _conditions(report: Report) -> str:
    """What every reader asks first: batch size, precision, whose kernels; all that occur."""
    cells = report["cells"]
    batches = sorted({cell["config"]["recipe"]["batch_size"] for cell in cells})
    resolved = [cell.get("resolved") or {} for cell in cells]  # reports from before had none
    precisions = sorted({found["precision"] for found in resolved if "precision" in found})
    kernels = {found["native"] for found in resolved if "native" in found}
    whose = "" if not kernels else "fastres' own kernels" if kernels == {True} else "torch's kernels"
    if len(kernels) > 1:
        whose = "fastres' own kernels or torch's"
    return ", ".join(filter(None, [f"batch {' or '.join(map(str, batches))}", " or ".join(precisions), whose]))


def short(commit: str) -> str:
    """Nine digits of a commit, and the "+" of a tree that differs from it."""
    return commit[:9] + "+" * commit.endswith("+")


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


# --- two of them


@dataclass(frozen=True)
class Comparison:
    """How much longer B's steps take than A's."""

    ratio: float  # of B's seconds over A's
    low: float
    high: float  # of the 99 % bootstrap interval
    verdict: str  # "faster", "slower", "no difference" or "undecided": of B

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
        dead_band: Differences within it are none; an interval that is neither within nor beyond it is undecided.
    """
    chance = np.random.default_rng(0)

    def medians(values: Sequence[float]) -> npt.NDArray[np.float64]:
        drawn = chance.integers(len(values), size=(RESAMPLINGS, len(values)))
        found: npt.NDArray[np.float64] = np.median(np.asarray(values)[drawn], axis=1)
        return found

    if paired:
        ratios = [y / x for x, y in zip(a, b, strict=True)]
        middle, found = median(ratios), medians(ratios)
    else:
        middle, found = median(b) / median(a), medians(b) / medians(a)
    found.sort()
    tail = RESAMPLINGS // 200  # half a per cent
    low, high = float(found[tail]), float(found[-tail - 1])
    equal = "no difference" if 1 - dead_band <= low and high <= 1 + dead_band else "undecided"
    verdict = "slower" if low > 1 + dead_band else "faster" if high < 1 - dead_band else equal
    return Comparison(middle, low, high, verdict)


def compare_reports(a: Report, b: Report) -> dict[str, Comparison]:
    """The cells that two reports have in common, by label.

    They were measured at different times, so the noise between the two runs is not in the interval.

    Raises:
        InputError: The machines differ, there is no common cell, or one is other work in B, or too short.
    """
    ours, theirs = a["environment"], b["environment"]
    keys = [key for key in MACHINE if key != "cpu_id" or {key} <= ours.keys() & theirs.keys()]  # the first had none
    other = [f"{key}: {ours.get(key)} and {theirs.get(key)}" for key in keys if ours.get(key) != theirs.get(key)]
    if other:
        raise InputError(f"the reports come from different machines ({'; '.join(other)}); measure both on one machine")
    chunks = {cell["label"]: cell for cell in a["cells"]}
    common = [(chunks[cell["label"]], cell) for cell in b["cells"] if cell["label"] in chunks]
    if not common:
        raise InputError(
            f"the reports have no cell in common: {', '.join(chunks)} and {', '.join(c['label'] for c in b['cells'])}"
        )
    for x, y in common:
        if other := changed_keys(_work(x), _work(y)):
            raise InputError(
                f"{x['label']} is other work in the second report ({'; '.join(other)}); measure both with equal flags"
            )
        check_rounds(min(len(x["chunks"]), len(y["chunks"])))
    return {x["label"]: compare(x["chunks"], y["chunks"], paired=False) for x, y in common}


def what_differs(a: Report, b: Report) -> list[str]:
    """What to know of two compared reports: cells that only one has, and cells that ran otherwise."""
    ours, theirs = ({cell["label"]: cell for cell in report["cells"]} for report in (a, b))
    lines = [f"only in the first report: {label}" for label in ours if label not in theirs]
    lines += [f"only in the second report: {label}" for label in theirs if label not in ours]
    for label in [label for label in ours if label in theirs]:
        pair = [cell.get("resolved") or {} for cell in (ours[label], theirs[label])]
        one, other = ({"layer_kernels": False, **resolved} if resolved else {} for resolved in pair)  # newer than some
        unlike = [f"{key} {one[key]} and {other[key]}" for key in one if key in other and one[key] != other[key]]
        lines += [f"{label} ran otherwise: {', '.join(unlike)}"] * bool(unlike)
    return lines


def _work(cell: dict[str, Any]) -> dict[str, Any]:
    """What a step of a cell computes, as far as it takes time."""
    config = cell["config"]
    replicas = cell.get("num_replicas", 1)
    return {"model": config["model"], "batch_size": config["recipe"]["batch_size"], "replicas": replicas}


def check_rounds(rounds: int) -> None:
    """Raise InputError where a comparison has too few rounds for its 99 % interval to be one."""
    if rounds < LEAST_COMPARED:
        raise InputError(
            f"{rounds} rounds are too few for a 99 % interval; measure with --rounds {LEAST_COMPARED} or more"
        )
