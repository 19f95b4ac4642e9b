"""The paper's Table 6 (section 4.2) from run folders: for each network n, mean, spread, the paper's number, a verdict.

Every number is of the last step, and stands beside the run folders that it comes from.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from urllib.parse import quote

from rich.table import Table

from fastres.errors import InputError, OutsideTolerance
from fastres.files import write_json, write_text
from fastres.plots.series import held_out_names
from fastres.reproduce.figure import write_csv
from fastres.reproduce.networks import Network, by_network, sentence
from fastres.reproduce.paper import TABLE_6, TOLERANCE, departures, differences
from fastres.result import RunResult, result_of
from fastres.rundir import RunDir

FEW = 3  # runs from which on a mean is judged, and has an interval: of two it would reach below zero

AGREES, BETTER, NO_WORSE = "within the paper's spread", "better", "no worse, perhaps better"
FEW_RUNS = "too few runs to say"
UNKNOWN = "machine not recorded"
DIGITS = 9  # of an error, a fraction: 0.0895 - 0.0875 is 0.002, not a little more

NUMBERS = re.compile(r"[\d.]+ (\N{PLUS-MINUS SIGN}|to) [\d.]+")  # in a cell

# Student's t for a two-sided interval of 95 %, by degrees of freedom from 2 on
T_95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


@dataclass(frozen=True)
class Row:
    """One network. Errors are fractions; None where there is nothing to say."""

    network: str  # ResNet-20
    parameters: int | None
    held_out: str  # the images that errors are of: "test" or "validation"
    n: int  # finished runs, of which the numbers are
    unfinished: int
    diverged: int
    damaged: int  # finished, and the result cannot be read
    mean: float | None
    std: float | None
    interval: tuple[float, float] | None  # 95 %, Student's t
    best: float | None  # the best seed's last step
    best_seed: int | None
    paper: float | None
    paper_best: float | None
    paper_std: float | None
    delta: float | None  # mean less the paper's
    verdict: str
    experiment: str  # "the paper's", or in what it is another: "steps 64,000 -> 3,910"
    choices: str  # other than our defaults, where the paper leaves it open; "" for none
    caveat: str  # what there is to say of the images; "" for the official CIFAR-10 files
    data: str | None  # digest of the images, where recorded
    seconds: float | None  # of the training clock, a run; of runs side by side their share of it
    images_per_second: float | None  # summed over runs side by side
    machines: tuple[str, ...]  # GPUs, or CPUs, each with its precision
    runs: tuple[str, ...]  # folders behind the row


def rows_of(runs: Sequence[RunDir]) -> list[Row]:
    """Table 6's rows, plain nets last, by depth.

    Args:
        runs: Of any networks, finished or not; those of one network differ in their seed alone.

    Raises:
        InputError: Runs of one network are of different configs, or had different images.
    """
    networks = by_network(runs)
    networks.sort(key=lambda net: (net.config.model.arch == "plain", net.config.model.depth))
    return [_row(network) for network in networks]


def _row(network: Network) -> Row:
    results: dict[int, RunResult] = {}  # by seed
    machines, damaged = set[str](), 0
    for seed, run in network.runs:
        if run.status == "finished":
            try:
                results[seed] = result_of(run)
            except InputError:
                damaged += 1
            else:
                machines |= _machines(run)
    diverged = sum(run.status == "diverged" for _, run in network.runs)
    errors = [result.test_error for result in results.values()]
    published = TABLE_6.get((network.config.model.arch, network.config.model.depth))
    paper = published.error if published else None
    others = list(map(str, departures(network.config)))
    mean = fmean(errors) if errors else None
    best_seed = min(results, key=lambda seed: results[seed].test_error) if results else None
    return Row(
        network=network.name,
        parameters=next((result.num_parameters for result in results.values()), None),
        held_out=network.config.data.held_out,
        n=len(results),
        unfinished=len(network.runs) - len(results) - diverged - damaged,
        diverged=diverged,
        damaged=damaged,
        mean=mean,
        std=stdev(errors) if len(errors) > 1 else None,
        interval=interval(errors),
        best=None if best_seed is None else results[best_seed].test_error,
        best_seed=best_seed,
        paper=paper,
        paper_best=published.best if published else None,
        paper_std=published.std if published else None,
        delta=round(mean - paper, DIGITS) if mean is not None and paper is not None and not others else None,
        verdict=verdict(errors, paper) if not others or not errors else "not the paper's experiment",
        experiment=", ".join(others) or "the paper's",
        choices=", ".join(str(one) for one in differences(network.config) if one.is_open),
        caveat=network.caveat,
        data=network.digest,
        seconds=_mean([result.seconds.get("train", 0.0) / result.side_by_side for result in results.values()]),
        images_per_second=_mean([result.images_per_second * result.side_by_side for result in results.values()]),
        machines=tuple(sorted(machines)),
        runs=tuple(str(run.path) for _, run in network.runs),
    )


def _machines(run: RunDir) -> set[str]:
    """GPU, or else CPU, on which a run was trained, and in which precision; several where it was resumed elsewhere."""
    found = {
        ", ".join(str(word) for word in (env.get("gpu") or env.get("cpu") or UNKNOWN, env.get("precision")) if word)
        for env in run.environments()
    }
    return found or {UNKNOWN}


def interval(errors: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean by Student's t, which takes the errors as normally distributed; None below `FEW`."""
    n = len(errors)
    if n < FEW:
        return None
    half = _student(n - 1) * stdev(errors) / math.sqrt(n)
    return fmean(errors) - half, fmean(errors) + half


def _student(freedom: int) -> float:
    """Student's t for a two-sided interval of 95 %, within 0.001; `freedom` of 2 or more.

    Beyond the table by the first terms of the expansion in 1/freedom (Abramowitz and Stegun, 26.7.5).
    """
    if freedom - 2 < len(T_95):
        return T_95[freedom - 2]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def verdict(errors: Sequence[float], paper: float | None) -> str:
    """What the mean of last-step errors says beside the paper's number, which counts as met within 0.2 points.

    A mean within that is known well enough if its 95 % interval reaches no more than twice as far to either side. One
    farther off is better or worse if all of its interval is, and no better or no worse if none of it is by that much.
    """
    if not errors:
        return "no finished run"
    if paper is None:
        return "the paper prints no number"
    ends = interval(errors)
    if ends is None:
        return FEW_RUNS
    low, mean, high = (round(error - paper, DIGITS) for error in (ends[0], fmean(errors), ends[1]))
    if abs(mean) <= TOLERANCE:
        return AGREES if round(high - mean, DIGITS) <= 2 * TOLERANCE else FEW_RUNS
    if mean < 0 and high <= TOLERANCE:
        return BETTER if high < -TOLERANCE else NO_WORSE
    if mean > 0 and low >= -TOLERANCE:
        return "worse" if low > TOLERANCE else "no better, perhaps worse"
    return FEW_RUNS


def write(rows: Sequence[Row], folder: Path, *, note: str) -> list[Path]:
    """Write `table6.md`, `table6.csv` and `table6.json`. Run folders are named as seen from `folder`.

    Args:
        rows: From `rows_of`.
        folder: Where to.
        note: Caveats, printed first (`networks.note_of`).

    Raises:
        MachineError: The folder cannot be written.
    """
    rows = [replace(row, runs=tuple(_seen_from(folder, run) for run in row.runs)) for row in rows]
    paths = [folder / f"table6.{suffix}" for suffix in ("md", "csv", "json")]
    write_text(paths[0], markdown(rows, note=note))
    _write_csv(paths[1], rows)
    write_json(paths[2], {"schema": 2, "note": note, "tolerance": TOLERANCE, "rows": [asdict(row) for row in rows]})
    return paths


def _seen_from(folder: Path, run: str) -> str:
    """Relative, so that table and runs can move together."""
    return Path(os.path.relpath(Path(run).resolve(), folder.resolve())).as_posix()


def check(rows: Sequence[Row], *, num_missing: int = 0) -> None:
    """Raise OutsideTolerance where Table 6 is not reproduced, and say of each network why.

    That takes every run that was asked for, finished; the paper's experiment on the official files; and of every
    network with a published number, of which there must be one, a mean no worse than it, known well enough to say so.

    Args:
        rows: From `rows_of`.
        num_missing: Runs that were asked for and not begun.
    """
    bad = [f"{row.network}: {', '.join(why)}" for row in rows if (why := _shortcomings(row))]
    if num_missing:
        bad.append(f"{num_missing} of the runs not begun")
    if not any(row.paper is not None for row in rows):
        bad.append("no network among them of which the paper prints a number")
    if bad:
        raise OutsideTolerance("Table 6 does not hold: " + "; ".join(bad))


def _shortcomings(row: Row) -> list[str]:
    found = _lost(row)
    if row.paper is not None and row.verdict not in (AGREES, BETTER, NO_WORSE):
        found.append(row.verdict)
    return [*found, row.caveat] if row.caveat else found


def _lost(row: Row) -> list[str]:
    """Runs without a result, by what became of them."""
    counts = ((row.unfinished, "unfinished"), (row.diverged, "diverged"), (row.damaged, "damaged"))
    return [f"{count} {word}" for count, word in counts if count]


LEGEND = (
    "Error of the last step: mean and standard deviation over the runs, and the 95 % interval of the mean by Student's "
    f"t. A mean within {100 * TOLERANCE:.1f} points of the paper's counts as within its spread (its five runs of "
    f"ResNet-110 have a standard deviation of 0.16), if there are {FEW} runs and the interval reaches no more than "
    f"{200 * TOLERANCE:.1f} points to each side; one farther off is better or worse if all of its interval is, else "
    "perhaps, and where the interval reaches beyond the other side, there are too few runs to say. The best seed was "
    "chosen on the images it was tested on, so it is no result. Seconds are of the training clock alone; of runs side "
    "by side they are a run's share, and img/s is their sum."
)
ERROR = "error, %"
HEADS = (
    "network",
    "parameters",
    "n",
    ERROR,
    "95 %",
    "best seed",
    "paper",
    "delta",
    "verdict",
    "s/run",
    "img/s",
)


def heads(rows: Sequence[Row]) -> list[str]:
    """`HEADS`, the error called by the images that it is of."""
    error = f"{held_out_names(row.held_out for row in rows)} {ERROR}"
    return [error if head == ERROR else head for head in HEADS]


def cells(row: Row) -> list[str]:
    """A row as a reader sees it, in the order of `HEADS`."""
    spread = f" ± {100 * row.std:.2f}" if row.std is not None else ""
    lost = _lost(row)
    paper = "" if row.paper is None else f"{100 * row.paper:.2f}"
    if row.paper_std is not None and row.paper_best is not None:
        paper += f" ± {100 * row.paper_std:.2f} (best {100 * row.paper_best:.2f})"
    return [
        row.network,
        "" if row.parameters is None else f"{row.parameters:,}",
        f"{row.n}" + (f" ({', '.join(lost)})" if lost else ""),
        "" if row.mean is None else f"{100 * row.mean:.2f}{spread}",
        "" if row.interval is None else f"{100 * row.interval[0]:.2f} to {100 * row.interval[1]:.2f}",
        "" if row.best is None else f"{100 * row.best:.2f} (seed {row.best_seed})",
        paper,
        "" if row.delta is None else f"{100 * row.delta:+z.2f}",
        row.verdict + ("; not on the official files" if row.delta is not None and row.caveat else ""),
        "" if row.seconds is None else f"{row.seconds:,.0f}",
        "" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
    ]


def terminal(rows: Sequence[Row]) -> Table:
    """The table for a terminal of 80 columns: what a row comes to."""
    table = Table(box=None, pad_edge=False)
    kept = [HEADS.index(head) for head in ("network", "n", ERROR, "95 %", "paper", "verdict")]
    for k in kept:
        table.add_column(heads(rows)[k], justify="left" if k in (kept[0], kept[-1]) else "right")
    for row in rows:
        shown = cells(row)
        table.add_row(*(shown[k].replace(" (best", "\n(best") for k in kept))
    return table


def markdown(rows: Sequence[Row], *, note: str) -> str:
    """The table as Markdown, with links to its run folders."""
    lines = [f"**{sentence(note)}**", ""] if note else []
    lines += [f"| {' | '.join(heads(rows))} |", f"| --- |{' ---: |' * 7} --- | ---: | ---: |"]
    lines += [f"| {' | '.join(unbroken(cells(row)))} |" for row in rows]
    lines += ["", LEGEND, ""]
    for row in rows:
        links = (f"[{_escaped(Path(run).name)}]({quote(os.fsencode(run))})" for run in row.runs)
        machine = f" ({', '.join(row.machines)})" if row.machines else ""
        lines.append(f"- {row.network}{machine}: {', '.join(links)}")
    return "\n".join(lines) + "\n"


def unbroken(row: Sequence[str]) -> list[str]:
    """Cells of which no number is folded where a page is narrow."""
    return [cell.replace(" ", "\N{NO-BREAK SPACE}") if NUMBERS.fullmatch(cell) else cell for cell in row]


def _escaped(name: str) -> str:
    """A folder's name as text of a Markdown link."""
    return re.sub(r"([\\`*_\[\]|<>])", r"\\\1", name)


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    names = [name for name in Row.__dataclass_fields__ if name != "interval"]
    flat = []
    for row in rows:
        values = [getattr(row, name) for name in names]
        flat.append(["; ".join(v) if isinstance(v, tuple) else v for v in values] + [*(row.interval or ("", ""))])
    write_csv(path, [*names, "interval_low", "interval_high"], flat)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
