"""Figure 6 of the paper: training and test error against iterations, plain nets and ResNets side by side."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.configtree import is_number
from fastres.errors import InputError
from fastres.plots.curves import print_note
from fastres.plots.series import FEW_POINTS, held_out_names
from fastres.reproduce.figure import ASIDE, colours_of, paper_style, place_legend, save, write_csv
from fastres.reproduce.networks import Network, by_network
from fastres.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = ("plain networks", "ResNets", "ResNets with 110 layers and more")
KINDS = ("train", "test", "train_clean")
PAPER_YLIM = 0.2  # the error at the upper end of the paper's y axis, a fraction
CAPTION_COLUMNS = 190  # that fit below the figure
MARGIN = 65 / 64  # of the x axis: the paper's 64,000 iterations end it at 6.5e4

Points = list[tuple[int, float]]  # (step, error in per cent)


def draw(
    runs: Sequence[RunDir],
    folder: Path,
    *,
    note: str,
    clean: bool = False,
    ylim: float = PAPER_YLIM,
) -> list[Path]:
    """Draw Figure 6 from the metrics of runs, as far as they got.

    Training error thin and dashed, test error bold; the mean over a network's seeds as far as all of them got, with a
    band from the lowest to the highest. Plain nets left, ResNets in the middle, those of 110 layers and more right;
    like the paper, ResNet-110 is in both. Training error is the running error over the augmented stream; the paper does
    not say whether its own is.

    Args:
        runs: Run folders; of one network only those that differ in the seed alone.
        folder: Takes fig6.png, fig6.svg and fig6.csv (network, seed, step, kind, error as a fraction, images).
        note: Printed on the figure's face; "" for none.
        clean: Draw the error on the training images as they are, without augmentation, instead of the running error.
        ylim: Error at the upper end of the y axis, a fraction. Another than the paper's is named in the figure.

    Returns:
        The three files.

    Raises:
        InputError: Runs of one network differ in more than the seed, or `clean` and no run has that record.
        MachineError: The files cannot be written.
    """
    networks = by_network(runs)
    records = {run.path: _records(run) for network in networks for _, run in network.runs}
    kind = "train_clean" if clean else "train"
    if clean and not any(record["kind"] == kind for of_run in records.values() for record in of_run):
        raise InputError(
            f"none of the {len(records)} runs recorded its error on the plain training images, and none is trained "
            "again: reproduce with --clean from the start in another --runs, or leave --clean out"
        )
    rows = [
        (network.name, seed, record["step"], record["kind"], record["error"], network.images)
        for network in networks
        for seed, run in network.runs
        for record in records[run.path]
    ]
    with paper_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.9), layout="constrained")
        panels = figure.subplots(1, 3)
        last = max((row[2] for row in rows), default=64_000)
        curves = {path: _curves(of_run) for path, of_run in records.items()}
        colours = colours_of(network.config.model.depth for network in networks)
        for axes, title, members in zip(panels, PANELS, _by_panel(networks), strict=True):
            axes.set_title(title, fontsize=9)
            _panel(axes, members, curves, kind, colours, last=last, top=100 * ylim)
        caption = "\n".join(textwrap.wrap(_caption(networks, clean, ylim), CAPTION_COLUMNS))
        figure.supxlabel(caption, fontsize=8, color="0.3")
        print_note(figure, note)
        for axes in panels:
            if axes.lines:
                place_legend(axes)
        written = save(figure, [folder / "fig6.png", folder / "fig6.svg"])
    header = ("network", "seed", "step", "kind", "error", "images")
    return [*written, write_csv(folder / "fig6.csv", header, rows)]


def _records(run: RunDir) -> list[dict[str, Any]]:
    """The errors that a run has recorded, in order. A record without one, from a damaged file, is left out."""
    return [record for record in run.metrics() if record["kind"] in KINDS and is_number(record.get("error"))]


def _curves(records: Sequence[dict[str, Any]]) -> dict[str, Points]:
    """Error over steps by kind of record."""
    return {kind: [(r["step"], 100 * r["error"]) for r in records if r["kind"] == kind] for kind in KINDS}


def _by_panel(networks: Sequence[Network]) -> list[list[Network]]:
    plain = [network for network in networks if network.config.model.arch == "plain"]
    resnets = [network for network in networks if network.config.model.arch == "resnet"]
    shallow = [network for network in resnets if network.config.model.depth <= 110]
    return [plain, shallow, [network for network in resnets if network.config.model.depth >= 110]]


def _panel(
    axes: "Axes",
    networks: Sequence[Network],
    curves: dict[Path, dict[str, Points]],
    kind: str,
    colours: Mapping[int, str],
    *,
    last: int,
    top: float,
) -> None:
    """Draw networks into a panel, up to step `last` and an error of `top` per cent; that there is none is said."""
    unit = 10_000 if last >= 10_000 else 1
    axes.set(xlim=(0, MARGIN * last / unit), ylim=(0, top), ylabel="error (%)")
    axes.set_xlabel("iter. (1e4)" if unit > 1 else "iter.")
    axes.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10])
    drawn = [n for n in networks if any(curves[run.path][k] for _, run in n.runs for k in (kind, "test"))]
    if not drawn:
        axes.text(0.5, 0.5, "no run", transform=axes.transAxes, ha="center", va="center", color="0.6", fontsize=12)
        return
    for step in sorted({step for network in drawn for step in _lr_drops(network)}):
        axes.axvline(step / unit, color="0.6", linewidth=0.8, linestyle=":", gid=ASIDE)
    for network in drawn:
        every = [curves[run.path] for _, run in network.runs]
        errors = [point for of_run in every for k in (kind, "test") for point in of_run[k]]
        hidden = f" (above {top:g} %)" if min(error for _, error in errors) > top else ""
        counts = [sum(bool(of_run[k]) for of_run in every) for k in (kind, "test")]
        num_drawn = min(count for count in counts if count)
        label = network.label(max(step for step, _ in errors), num_drawn) + hidden
        colour = colours[network.config.model.depth]
        _line(axes, [of_run[kind] for of_run in every], unit, colour, {"linewidth": 0.9, "dashes": (4, 1.5)})
        _line(axes, [of_run["test"] for of_run in every], unit, colour, {"linewidth": 1.9, "label": label})


def _line(axes: "Axes", curves: Sequence[Points], unit: int, colour: str, how: dict[str, Any]) -> None:
    """The mean over seeds and the band from the lowest to the highest, as far as all of them got; then each alone."""
    there = [curve for curve in curves if curve]
    steps, mean, low, high = _over_seeds(there)
    x = [step / unit for step in steps]
    marks: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(x) < FEW_POINTS else {}
    axes.plot(x, mean, color=colour, **marks, **how)
    if len(there) > 1:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    shared = _shared(there)[1]
    for curve in there:
        rest = curve[max((k for k, (step, _) in enumerate(curve) if step <= shared), default=0) :]
        if len(rest) > 1:
            alone = {**how, "linewidth": 0.5 * how["linewidth"], "label": None}
            axes.plot([step / unit for step, _ in rest], [error for _, error in rest], color=colour, alpha=0.6, **alone)


def _over_seeds(curves: Sequence[Points]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps at which any run has a record and that all reached, and there the mean, least and greatest error.

    Between its records a run's error is a straight line: seeds may have been logged at other steps. A mean over the
    runs that got farther would jump where one of them ends.
    """
    import numpy as np

    first, last = _shared(curves)
    steps = sorted({step for curve in curves for step, _ in curve if first <= step <= last})
    if not steps:
        return [], [], [], []
    known = [np.array(curve, np.float64).T for curve in curves]
    table = np.array([np.interp(steps, at, error) for at, error in known])
    mean, low, high = (of(table, axis=0).tolist() for of in (np.mean, np.min, np.max))
    return steps, mean, low, high


def _shared(curves: Sequence[Points]) -> tuple[int, int]:
    """The steps between which all curves have a value; none where the first is above the last."""
    return max((curve[0][0] for curve in curves), default=0), min((curve[-1][0] for curve in curves), default=-1)


def _lr_drops(network: Network) -> tuple[int, ...]:
    recipe = network.config.recipe
    return recipe.milestones if recipe.schedule == "step" else ()


def _caption(networks: Sequence[Network], clean: bool, ylim: float) -> str:
    """What the lines are."""
    data = [network.config.data for network in networks]
    augmented = "augmented " if all(d.augment for d in data) else ""
    how = "on the training images without augmentation" if clean else f"running over the {augmented}stream"
    held_out = held_out_names(d.held_out for d in data)
    parts = [f"thin, dashed: training error, {how}", f"bold: {held_out} error"]
    if any(len(network.runs) > 1 for network in networks):
        parts.append("lines: mean over n seeds, up to the last step that all reached; bands: lowest to highest")
    if any(_lr_drops(network) for network in networks):
        parts.append("dotted: lr drops")
    if ylim != PAPER_YLIM:
        parts.append(f"y axis to {100 * ylim:g} %, the paper's to {100 * PAPER_YLIM:g} %")
    return "; ".join(parts)
