"""Common to Figures 6 and 7: runs by network, the paper's names and colours, files that repeat bit for bit."""

import csv
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.checkpoint import disk_error
from fastres.config import RunConfig
from fastres.configtree import differences
from fastres.errors import InputError
from fastres.rundir import DIVERGED, RESULT, RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# By depth: the hues of the paper's figures, in Tol's bright scheme, which the colour-blind can tell apart.
COLOURS = {20: "#ccbb44", 32: "#66ccee", 44: "#228833", 56: "#ee6677", 110: "#000000", 1202: "#aa3377"}
OTHERS = ("#4477aa", "#882255", "#999933")  # of depths that the paper has not
WARNING = "#b3261e"
NOTE_COLUMNS = 10  # letters of a note in an inch of a figure's width
ASIDE = "aside"  # gid of lines that are no curves: lr drops
STYLE = {
    "font.size": 9,
    "axes.linewidth": 0.8,
    "xtick.direction": "in",
    "ytick.direction": "in",
    "svg.hashsalt": "fastres",
}
LEGEND: dict[str, Any] = {"fontsize": 8, "handlelength": 1.5, "labelspacing": 0.25, "borderaxespad": 0.6}
PLACES = ("upper right", "lower left", "lower right", "upper left", "upper center", "lower center", "center right")


@dataclass(frozen=True)
class Network:
    """The runs of one network: one config, several seeds."""

    name: str  # as in the paper: plain-20, ResNet-110
    config: RunConfig  # of the first run
    runs: tuple[tuple[int, RunDir], ...]  # (seed, run), by seed

    @property
    def colour(self) -> str:
        """Of its lines."""
        return colour_of(self.config.model.depth)

    def label(self, reached: int) -> str:
        """Its name in a legend: how many seeds, and what became of those without a result; `reached` in steps."""
        lost = [run for _, run in self.runs if (run.path / DIVERGED).is_file()]
        cut = [run for _, run in self.runs if run not in lost and not (run.path / RESULT).is_file()]
        if len(self.runs) == 1:
            notes = [f"diverged at {reached:,}"] * len(lost) + [f"unfinished, at {reached:,}"] * len(cut)
        else:
            some = ((len(lost), "diverged"), (len(cut), "unfinished"))
            notes = [f"n = {len(self.runs)}", *(f"{count} {what}" for count, what in some if count)]
        return f"{self.name} ({', '.join(notes)})" if notes else self.name


def colour_of(depth: int) -> str:
    """The colour of a network's lines."""
    return COLOURS.get(depth) or OTHERS[depth // 6 % len(OTHERS)]


def paper_name(arch: str, depth: int) -> str:
    """ "plain-20", "ResNet-110"."""
    return f"{'ResNet' if arch == 'resnet' else 'plain'}-{depth}"


def by_network(runs: Iterable[RunDir]) -> list[Network]:
    """The runs of each network, plain nets first, by depth.

    Raises:
        InputError: Runs of one network differ in more than the seed, or two of them have the same seed.
    """
    read = [(run.config(), run) for run in runs]
    read.sort(key=lambda pair: (pair[0].model.arch, pair[0].model.depth, pair[0].seed, str(pair[1].path)))
    networks = []
    for name, group in groupby(read, key=lambda pair: paper_name(pair[0].model.arch, pair[0].model.depth)):
        (first, first_run), *others = members = list(group)
        for before, (config, run) in zip(members, others, strict=False):
            if changed := differences({**first.what(), "seed": 0}, {**config.what(), "seed": 0}):
                raise InputError(
                    f"the runs of {name} are not of one config: {first_run.path} and {run.path} differ in "
                    f"{'; '.join(changed)}. Give runs that differ in the seed alone"
                )
            if before[0].seed == config.seed:
                raise InputError(
                    f"{before[1].path} and {run.path} are both {name} with seed {config.seed}; give one of them"
                )
        networks.append(Network(name, first, tuple((config.seed, run) for config, run in members)))
    return networks


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw and save inside: the same look whatever the user's matplotlibrc says, and SVG ids that are not random."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        yield


def place_legend(axes: "Axes") -> None:
    """Put a legend into the first place where it covers no curve and no band; below the axes where there is none."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    for place in PLACES:
        legend = axes.legend(**{**LEGEND, "loc": place})
        figure.draw_without_rendering()  # to know where it came to lie
        if not _covers(legend.get_window_extent(), axes):
            return
    axes.legend(**{**LEGEND, "loc": "upper center", "bbox_to_anchor": (0.5, -0.22), "ncols": 2})


def _covers(box: "Bbox", axes: "Axes") -> bool:
    """Whether a curve or band passes through a box (display coordinates). Lines marked `ASIDE` may be covered."""
    for line in axes.lines:
        curve = line.get_transform().transform_path(line.get_path())
        if line.get_gid() != ASIDE and curve.intersects_bbox(box, filled=False):
            return True
    bands = [(band.get_transform(), path) for band in axes.collections for path in band.get_paths()]
    return any(transform.transform_path(path).intersects_bbox(box, filled=True) for transform, path in bands)


def print_note(figure: "Figure", note: str) -> None:
    """Print what a reader must know, such as "synthetic data", on the figure's face; nothing for ""."""
    if note:
        width = int(NOTE_COLUMNS * figure.get_figwidth())
        figure.suptitle("\n".join(textwrap.wrap(note, width)), color=WARNING, fontsize=10, fontweight="bold")


def save(figure: "Figure", paths: Sequence[Path]) -> list[Path]:
    """Write a figure as PNG or SVG, by each path's ending. Equal figures give equal bytes.

    Raises:
        MachineError: A file cannot be written.
    """
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise disk_error(error, path.parent, 0) from error
    return list(paths)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a table. Raises MachineError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
    except OSError as error:
        raise disk_error(error, path.parent, 0) from error
    return path
