"""Figure 7 of the paper: how strongly the layers of plain nets and ResNets respond."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres import checkpoint
from fastres.errors import InputError
from fastres.evaluate import Trained, load_trained
from fastres.plots.curves import print_note
from fastres.reproduce.figure import colours_of, paper_style, place_legend, save, write_csv
from fastres.reproduce.networks import Network, by_network, paper_name
from fastres.reproduce.paper import FIGURE_7
from fastres.responses import Response, layer_responses
from fastres.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Responses:
    """One network in the figure."""

    label: str
    depth: int
    residual: bool  # solid; plain nets are dashed
    stds: Sequence[float]  # of each 3x3 layer, in the network's order


def draw(
    runs: Sequence[RunDir],
    folder: Path,
    execution: dict[str, Any],
    *,
    note: str,
    named: bool = False,
    say: Callable[[str], None],
) -> list[Path]:
    """Measure the layer responses of runs at their newest checkpoints, and draw Figure 7.

    Of several seeds the mean over them of each layer's standard deviation is shown, and sorted below; if some are
    finished, only of those. If networks of the paper's figure are among the runs, others are left out, unless `named`.

    Args:
        runs: Run folders; of one network only those that differ in the seed alone. Those without a checkpoint (weights
            are large, and need not be kept) are left out, and `say` is told.
        folder: Takes fig7.png, fig7.svg and fig7.csv (network, seed, layer index and name, std, images).
        execution: Changes to `fastres.config.Execution`: device, where the data is. Precision "auto" means fp32 here,
            on every machine: measured is the network, not how it was rounded in training.
        note: Printed on the figure's face, with what there is to say of the images that were measured on.
        named: The networks were asked for by name.
        say: Takes one-line notices.

    Returns:
        The three files.

    Raises:
        InputError: Runs of one network differ in more than the seed, or no run has a checkpoint.
        MachineError: No data, no such device, or the files cannot be written.
    """
    networks = by_network([run for run in runs if has_weights(run, say)])
    networks = networks if named else _as_in_the_paper(networks, say)
    if not networks:
        raise InputError("Figure 7 needs weights, and none of the runs has a checkpoint; give runs that kept theirs")
    precision = execution.get("precision", "auto")
    execution = {**execution, "precision": "fp32" if precision == "auto" else precision}
    lines, rows, notes = [], list[tuple[str, int, int, str, float, str]](), {note: None}
    for network in networks:
        measured, steps = list[list[Response]](), list[int]()
        finished = [(seed, run) for seed, run in network.runs if run.status == "finished"]
        chosen = finished or network.runs  # a mean over networks at different steps would be of no network
        for seed, run in chosen:
            trained = load_trained(run.path, execution, say=say)
            say(f"{network.name}, seed {seed}: layer responses over {len(trained.images.test_images):,} images")
            responses = layer_responses(trained.net, trained.batches(), trained.runtime.dtype)
            measured.append(responses)
            steps.append(trained.step or 0)
            images = "other" if set(trained.caveats) - {network.caveat} else network.images
            rows += [(network.name, seed, i, r.name, r.std, images) for i, r in enumerate(responses, 1)]
            notes |= {words: None for words in trained.caveats if words not in note}
        stds = [sum(r.std for r in of_layer) / len(of_layer) for of_layer in zip(*measured, strict=True)]
        model = network.config.model
        lines.append(Responses(network.label(min(steps), len(chosen)), model.depth, model.arch == "resnet", stds))
    with paper_style():
        written = save(plot(lines, "; ".join(filter(None, notes))), [folder / "fig7.png", folder / "fig7.svg"])
    header = ("network", "seed", "layer_index", "layer_name", "std", "images")
    return [*written, write_csv(folder / "fig7.csv", header, rows)]


def draw_one(trained: Trained, responses: Sequence[Response], path: Path) -> None:
    """Draw one network alone, into a PNG or SVG file. Raises MachineError where it cannot be written."""
    net = trained.net
    name = paper_name(trained.arch, net.depth)
    label = name if trained.step is None else f"{name}, step {trained.step:,}"
    line = Responses(label, net.depth, net.residual, [r.std for r in responses])
    with paper_style():
        save(plot([line], "; ".join(trained.caveats)), [path])


def plot(lines: Sequence[Responses], note: str) -> "Figure":
    """Both panels: above in the layers' order, below sorted by magnitude. To be called within `paper_style`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    most, colours = max(len(line.stds) for line in lines), colours_of(line.depth for line in lines)
    for axes, order in ((top, list), (bottom, lambda stds: sorted(stds, reverse=True))):
        for line in lines:
            axes.plot(
                range(1, len(line.stds) + 1),
                order(line.stds),
                color=colours[line.depth],
                linewidth=1.4 if line.residual else 1.1,
                linestyle="-" if line.residual else (0, (4, 1.5)),
                label=line.label,
            )
        axes.set(xlim=(0, most + 1), ylim=(0, None), ylabel="std")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.set_xlabel("layer index (original order)")
    bottom.set_xlabel("layer index (sorted by magnitude)")
    print_note(figure, note)
    place_legend(bottom)
    return figure


def has_weights(run: RunDir, say: Callable[[str], None] = lambda _: None) -> bool:
    """Whether a run has saved what can be measured; `say` is told if not."""
    if any((run.path / name).exists() for name in (checkpoint.NEWEST, checkpoint.PREVIOUS)):
        return True
    say(f"{run.path} has no checkpoint: left out of Figure 7")
    return False


def _as_in_the_paper(networks: Sequence[Network], say: Callable[[str], None]) -> list[Network]:
    """The paper's five where there are some of them, else all."""
    chosen = [network for network in networks if (network.config.model.arch, network.config.model.depth) in FIGURE_7]
    if not chosen:
        return list(networks)
    if others := [network.name for network in networks if network not in chosen]:
        say(f"not in the paper's Figure 7, left out: {', '.join(others)}")
    return chosen
