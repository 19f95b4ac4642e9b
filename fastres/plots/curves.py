"""Curves of runs as PNG and SVG.

Training error is thin and test error bold; both have their run's colour. What was logged is pale where a smoothed line
stands in front of it. Training error is the running error over the augmented stream.
"""

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastres.files import check_figure, save_figure
from fastres.plots.series import FEW_POINTS, Curve, What, XAxis, curve_of, held_out_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

# Told apart by readers who do not see red and green alike, and dark enough for thin lines on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a63d8f", "#7a5c00", "#3397ce", "#222222")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 2, 1.5, 2)),
)  # after the last colour, the next dash
NUM_STYLES = len(COLOURS) * len(DASHES)
UNITS = (("hours", 3_600.0), ("minutes", 60.0), ("seconds", 1.0))
AXES_HEIGHT, LEGEND_ROW = 4.4, 0.21  # inches
LEGEND_WIDTH, HANDLE = 96, 9  # characters: of the figure, of a handle and the room around it
WARNING = "#b3261e"
NOTE_COLUMNS = 10  # letters of a note in an inch of a figure's width
Entry = tuple[Any, str]  # of a legend: handle and label
Y_LABELS = {"error": "error (%)", "loss": "cross-entropy", "lr": "learning rate"}


def draw_curves(
    records: list[dict[str, Any]], title: str, folder: Path, *, note: str = "", held_out: str = "test"
) -> list[Path]:
    """Draw one run's error over steps, `note` on the face. Returns `curves.png` and `curves.svg` in `folder`.

    Raises:
        MachineError: The files cannot be written.
    """
    paths = [folder / "curves.png", folder / "curves.svg"]
    draw([curve_of(records, "", held_out=held_out)], title, paths, note=note)
    return paths


def draw(
    curves: Sequence[Curve],
    title: str,
    paths: Sequence[Path],
    *,
    note: str = "",
    what: What = "error",
    x: XAxis = "step",
    log_y: bool = False,
    ylim: tuple[float, float] | None = None,
) -> None:
    """Draw curves into one figure and write it to each path; PNG or SVG by the ending. `note`: as `figure_of`.

    Equal curves give equal files: no date, and ids that do not come from chance.

    Raises:
        InputError: Another ending.
        MachineError: A file cannot be written.
    """
    for path in paths:
        check_figure(path)
    figure = figure_of(curves, title, note=note, what=what, x=x, log_y=log_y, ylim=ylim)
    for path in paths:
        save_figure(figure, path, dpi=150)


def figure_of(
    curves: Sequence[Curve],
    title: str,
    *,
    note: str = "",
    what: What = "error",
    x: XAxis = "step",
    log_y: bool = False,
    ylim: tuple[float, float] | None = None,
) -> "Figure":
    """The figure that `draw` writes: curves over one axis, the legend below it; caveats above it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    farthest = max((float(line.x[-1]) for curve in curves for line in curve.lines), default=0.0)
    unit, scale = time_unit(farthest) if x == "time" else ("steps" if x == "step" else "epochs", 1.0)
    key, runs = _key_of_legend(curves, what), _runs_of_legend(curves, title)
    rows = sum(_rows(entries) for entries in (key, runs) if entries)
    room = LEGEND_ROW * rows + 0.05  # inches
    figure = Figure(figsize=(7.4, AXES_HEIGHT + room), layout="constrained")
    axes, below = figure.subplots(2, height_ratios=(AXES_HEIGHT - 0.7, room))
    for number, curve in enumerate(curves):
        _draw_curve(axes, curve, number, scale)
        if len(curves) == 1:
            for place in (*([] if curve.warmup_end is None else [curve.warmup_end]), *curve.lr_falls):
                axes.axvline(place / scale, color="0.55", linewidth=0.9, linestyle=":", zorder=1)
    axes.set_title(title, parse_math=False, fontsize=11)
    axes.set(xlabel=f"{unit} of training" if x == "time" else unit, ylabel=Y_LABELS[what])
    axes.set_xlim(0, 1.015 * farthest / scale or 1)  # a little room for the last marker
    axes.xaxis.set_major_formatter("{x:,.0f}" if x == "step" else "{x:,.6g}")
    if x == "step":
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if log_y:
        axes.set_yscale("log", nonpositive="mask")
        plain_log_ticks(axes.yaxis)
    if ylim is not None:
        axes.set_ylim(ylim)
    elif not log_y:
        axes.set_ylim(0, 1.03 * axes.get_ylim()[1])  # a little room for the highest marker
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    print_note(figure, note)
    below.axis("off")
    if any(curve.lines for curve in curves):
        below.add_artist(_legend(below, key, "upper center"))
        if runs:
            _legend(below, runs, "lower center")
    return figure


def plain_log_ticks(axis: "Axis") -> None:
    """Numbers at 1, 2 and 5 of each decade, written out, since most axes here have one or two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def print_note(figure: "Figure", note: str) -> None:
    """Print what a reader must know, such as "synthetic data", on a figure's face; nothing for ""."""
    if note:
        width = int(NOTE_COLUMNS * figure.get_figwidth())
        figure.suptitle("\n".join(textwrap.wrap(note, width)), color=WARNING, fontsize=10, fontweight="bold")


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which a stretch of time reads well, and its seconds."""
    return next((unit for unit in UNITS if seconds >= 2 * unit[1]), UNITS[-1])


def style(number: int) -> tuple[str, Any]:
    """Colour and dash of the n-th curve."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def _draw_curve(axes: "Axes", curve: Curve, number: int, scale: float) -> None:
    color, dash = style(number)
    for line, width in ((curve.train, 1.0), (curve.test, 2.3)):
        if line is None:
            continue
        x, front = line.x / scale, 3 + (line is curve.test)
        if line.low is not None and line.high is not None:
            axes.fill_between(x, line.low, line.high, color=color, alpha=0.18, linewidth=0, zorder=2)
        elif line.smoothed:
            axes.plot(x, line.y, color=color, linewidth=0.7 * width, alpha=0.25, zorder=2)
        look: dict[str, Any] = {"color": color, "linewidth": width, "linestyle": dash, "markersize": 1.5 * width + 0.5}
        look |= {"marker": "o"} if len(x) < FEW_POINTS else {}
        axes.plot(x, line.smooth, zorder=front, **look)
        if curve.unfinished:  # an open ring where it stands
            axes.plot(
                x[-1:], line.smooth[-1:], "o", color=color, markerfacecolor="white", markersize=6, zorder=front + 2
            )


def changes_of_lr(curve: Curve) -> str:
    """What the dotted lines of a figure mean: "warm-up ends, lr falls"."""
    ends, falls = curve.warmup_end is not None, bool(curve.lr_falls)
    return ", ".join([*(["warm-up ends"] if ends else []), *(["lr falls"] if falls else [])])


def _columns(entries: Sequence[Entry]) -> int:
    """As many columns as fit. matplotlib fills them one by one, the first ones with the row more that is left over."""
    lengths = [len(label) for _, label in entries]
    for columns in range(len(lengths), 1, -1):
        rows, longer = divmod(len(lengths), columns)
        ends = [rows * k + min(k, longer) for k in range(columns + 1)]
        widths = [max(lengths[a:b]) + HANDLE for a, b in pairwise(ends)]
        if sum(widths) <= LEGEND_WIDTH:
            return columns
    return 1


def _rows(entries: Sequence[Entry]) -> int:
    """Lines of text that the legend takes: in one column a label may be several."""
    columns = _columns(entries)
    if columns > 1:
        return math.ceil(len(entries) / columns)
    return sum(len(_lines(label)) for _, label in entries)


def _lines(label: str) -> list[str]:
    """A label, folded where it is wider than the figure."""
    return textwrap.wrap(label, LEGEND_WIDTH - HANDLE) or [label]


def _legend(axes: "Axes", entries: Sequence[Entry], place: Literal["upper center", "lower center"]) -> "Legend":
    legend = axes.legend(
        [handle for handle, _ in entries],
        ["-"] * len(entries),  # a label that begins with "_" would be left out
        loc=place,
        ncols=_columns(entries),
        frameon=False,
        fontsize=9,
        columnspacing=1.6,
        handlelength=2.4,
        borderaxespad=0,
        borderpad=0,
    )
    for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text("\n".join(_lines(label)))
    return legend


def _runs_of_legend(curves: Sequence[Curve], title: str) -> list[Entry]:
    """Runs by colour; a run alone needs no name where the title has it."""
    from matplotlib.lines import Line2D

    if len(curves) == 1 and curves[0].label in title:
        return []
    looks = [(style(number), curve.label) for number, curve in enumerate(curves)]
    return [(Line2D([], [], color=color, linestyle=dash, linewidth=2), label) for (color, dash), label in looks]


def _key_of_legend(curves: Sequence[Curve], what: What) -> list[Entry]:
    """What thin, bold and pale mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    one = len(curves) == 1
    color = COLOURS[0] if one else "0.35"
    lines = [line for curve in curves for line in curve.lines]
    name = {"error": " error", "loss": " loss", "lr": ""}[what]
    key: list[Entry] = []
    if any(curve.train for curve in curves) and what != "lr":
        note = " (running, augmented images)" if one else ""
        key.append((Line2D([], [], color=color, linewidth=1.0), f"training{name}{note}"))
    if any(curve.test for curve in curves):
        key.append(
            (Line2D([], [], color=color, linewidth=2.3), f"{held_out_names(curve.held_out for curve in curves)}{name}")
        )
    if any(line.smoothed and line.low is None for line in lines):
        key.append((Line2D([], [], color=color, linewidth=1.0, alpha=0.35), "as logged"))
    if any(line.low is not None and len(line.x) > 1 for line in lines):
        key.append((Patch(color=color, alpha=0.25), "one standard deviation"))
    if one and (changes := changes_of_lr(curves[0])):
        key.append((Line2D([], [], color="0.55", linewidth=0.9, linestyle=":"), changes))
    if any(curve.unfinished for curve in curves):
        ring = Line2D([], [], color=color, marker="o", markerfacecolor="white", linestyle="none")
        key.append((ring, "unfinished"))
    return key or [(Line2D([], [], color=color, linewidth=1.0), Y_LABELS[what])]
