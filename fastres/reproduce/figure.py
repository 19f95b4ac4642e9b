"""Common to Figures 6 and 7: the paper's look and colours, and files that repeat bit for bit."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.files import save_figure, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# By depth: the hues of the paper's figures, in Tol's bright scheme, which the colour-blind can tell apart; its yellow
# and cyan are darker here, for white paper.
COLOURS = {20: "#998a20", 32: "#1f8fc0", 44: "#228833", 56: "#ee6677", 110: "#000000", 1202: "#aa3377"}
OTHERS = ("#4477aa", "#882255", "#7a5c00", "#888888")  # of depths that the paper has not
ASIDE = "aside"  # gid of lines that are no curves: lr drops
STYLE = {
    "font.size": 9,
    "axes.linewidth": 0.8,
    "xtick.direction": "in",
    "ytick.direction": "in",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
}
LEGEND: dict[str, Any] = {"fontsize": 8, "handlelength": 1.5, "labelspacing": 0.25, "borderaxespad": 0.6}
PLACES = ("upper right", "lower left", "lower right", "upper left", "upper center", "lower center", "center right")


def colours_of(depths: Iterable[int]) -> dict[int, str]:
    """The colours of networks' lines, by depth."""
    others = sorted({depth for depth in depths if depth not in COLOURS})
    return COLOURS | {depth: OTHERS[k % len(OTHERS)] for k, depth in enumerate(others)}


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw and save inside: the same look whatever the user's matplotlibrc says."""
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


def save(figure: "Figure", paths: Sequence[Path]) -> list[Path]:
    """Write a figure to each path, as `files.save_figure`."""
    for path in paths:
        save_figure(figure, path, dpi=200)
    return list(paths)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a table. Raises MachineError where it cannot be written."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())
    return path
