"""Curves of any runs in one figure: which runs, what tells them apart, which belong together."""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastres.config import RunConfig
from fastres.configtree import is_int, leaves, show_key, show_value
from fastres.data.imageset import caveat
from fastres.errors import InputError
from fastres.files import check_figure, printable
from fastres.plots.curves import NUM_STYLES, draw
from fastres.plots.series import Curve, What, XAxis, curve_of, mean_curve
from fastres.rundir import DIVERGED, RunDir
from fastres.runfolders import find_runs, resume_with

# Keys of the config whose value speaks for itself, and those that the model's name replaces.
BARE = ("name", "dataset")
IN_NAME = ("arch", "depth")


@dataclass(frozen=True)
class Run:
    """A run folder, read: what it is, how far it got, and what tells it from the others."""

    folder: RunDir
    config: RunConfig
    records: list[dict[str, Any]]
    label: str  # "ResNet20, seed 1"; of a run alone: the model

    @property
    def finished(self) -> bool:
        """Whether it has its result."""
        return self.folder.status == "finished"

    @property
    def reached(self) -> int:
        """The last step it logged; 0 before that."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def standing(self) -> str:
        """ "" for a finished run, else how far it got."""
        status = self.folder.status
        if status == "finished":
            return ""
        if status == "diverged":
            with contextlib.suppress(InputError):
                if is_int(step := self.folder.read_json(DIVERGED).get("step")):
                    return f"diverged at step {step:,}"
            return f"diverged after step {self.reached:,}"
        return f"step {self.reached:,} of {self.config.recipe.steps:,}"

    @property
    def caveat(self) -> str:
        """Caveat on its images, for a reader; "" for the official CIFAR-10 files."""
        return caveat(self.config.data.dataset, self.folder.data().get("official"))

    def curve(self, *, what: What = "error", x: XAxis = "step", smooth: int | None = None) -> Curve:
        """What is drawn of it; `fastres.plots.series.curve_of` explains the arguments."""
        epochs_per_step = self.config.recipe.batch_size / self.config.data.num_train
        label = f"{self.label} ({self.standing})" if self.standing else self.label
        return curve_of(
            self.records,
            label,
            what=what,
            x=x,
            epochs_per_step=epochs_per_step,
            smooth=smooth,
            unfinished=not self.finished,
            held_out=self.config.data.held_out,
        )


def read_runs(paths: Iterable[Path], say: Callable[[str], None] = print) -> tuple[str, list[Run]]:
    """The runs that paths name, and what they have in common: "ResNet20, cifar10, seed 0".

    `say` is told of each whose config cannot be read, and which is left out.

    Raises:
        InputError: A path is no run folder and holds none, or no config can be read.
    """
    read = list[tuple[RunDir, RunConfig, list[dict[str, Any]]]]()
    problems = list[InputError]()
    for folder in find_runs(paths):
        try:
            read.append((folder, folder.config(), folder.metrics()))
        except InputError as error:
            problems.append(error)
    if not read:
        raise problems[0]
    for problem in problems:
        say(f"{problem}; left out")
    return labelled([Run(*parts, "") for parts in read])


def labelled(runs: Sequence[Run]) -> tuple[str, list[Run]]:
    """What runs have in common, and the runs, each with what tells it from the others."""
    folders = [run.folder.path.resolve() for run in runs]
    above = os.path.commonpath([folder.parent for folder in folders])
    names = [printable(folder.relative_to(above).as_posix()) for folder in folders]
    common, labels = tell_apart([run.config for run in runs], names)
    return common, [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def tell_apart(configs: Sequence[RunConfig], names: Sequence[str]) -> tuple[str, list[str]]:
    """What runs have in common, and a label for each by what differs: model, data, recipe, seed.

    Where that is the same for two of them, what differs in how they ran is added; where that is the same too, `names`.
    """
    whats = [{"name": config.name} | _flat(config.experiment(), leave_out=IN_NAME) for config in configs]
    common = [_words(key, whats[0][key]) for key in ("name", "dataset", "seed") if _same(whats, key)]
    idle = [{path.rpartition(".")[2] for path in config.idle_keys()} for config in configs]
    idle = [keys | _following(config) for keys, config in zip(idle, configs, strict=True)]
    shown = [{key: value for key, value in what.items() if key not in idle[k]} for k, what in enumerate(whats)]
    labels = _join(shown, [key for key in whats[0] if not _same(whats, key)])
    if _twins(labels):
        hows = [_flat(config.to_dict()["execution"]) for config in configs]
        extra = _join(hows, [key for key in hows[0] if not _same(hows, key)])
        labels = [", ".join(filter(None, pair)) for pair in zip(labels, extra, strict=True)]
    twins = _twins(labels)
    if len(configs) > 1 and twins:
        labels = [
            ", ".join(filter(None, (text, name))) if text in twins else text
            for text, name in zip(labels, names, strict=True)
        ]
    if len(configs) == 1:
        labels = [configs[0].name]
    return ", ".join(common), labels


def _following(config: RunConfig) -> set[str]:
    """Keys that follow from another, which is told."""
    ramp = config.recipe.warmup == "ramp" and config.recipe.warmup_steps == max(1, config.recipe.steps // 10)
    return {"warmup_steps"} if ramp else set()


def _flat(tree: dict[str, Any], leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """Leaves by their last key, which no two sections of the config share."""
    named = {path.rpartition(".")[2]: value for path, value in leaves(tree).items()}
    return {key: value for key, value in named.items() if key not in leave_out}


def _same(trees: Sequence[dict[str, Any]], key: str) -> bool:
    return all(tree[key] == trees[0][key] for tree in trees)


def _join(trees: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    return [", ".join(_words(key, tree[key]) for key in keys if key in tree) for tree in trees]


def _twins(labels: Sequence[str]) -> set[str]:
    return {label for label in labels if labels.count(label) > 1}


def _words(key: str, value: Any) -> str:
    if key in BARE:
        return str(value)
    return f"{show_key(key)} {show_value(key, value)}"


def grouped(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs of one config together, in the order in which their first comes."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(replace(run.config, seed=0).digest, []).append(run)
    return list(groups.values())


def once_a_seed(group: Sequence[Run]) -> list[Run]:
    """Of each seed the run that got farthest: a copy of one tells nothing of how far seeds spread."""
    best: dict[int, Run] = {}
    for run in group:
        other = best.setdefault(run.config.seed, run)
        if (run.finished, run.reached) > (other.finished, other.reached):
            best[run.config.seed] = run
    return [run for run in group if best[run.config.seed] is run]


def plot_runs(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    what: What = "error",
    x: XAxis = "step",
    smooth: int | None = None,
    log_y: bool = False,
    ylim: tuple[float, float] | None = None,
    band: bool = False,
    say: Callable[[str], None],
) -> Path:
    """Draw runs into one figure.

    Args:
        paths: Run folders, or folders of run folders.
        out: A name that ends in .png or .svg. Default: in the folder that was given, if it was one, curves.png (which
            a run draws itself), or by what is drawn instead: loss.png, error-by-time.png.
        what, x, smooth: As `fastres.plots.series.curve_of` takes them.
        log_y, ylim: The y axis.
        band: Draw runs that differ in nothing but the seed as mean and standard deviation.
        say: Takes one-line notices.

    Returns:
        The file that was written.

    Raises:
        InputError: No run folder, no metrics in any, another ending.
        MachineError: The file cannot be written.
    """
    if out is not None:
        check_figure(out)
    common, runs = read_runs(paths, say)
    drawn = [run for run in runs if run.curve(what=what, x=x, smooth=smooth).lines]
    if not drawn:
        where = runs[0].folder.path if len(runs) == 1 else f"none of {len(runs)} runs, {runs[0].folder.path} the first,"
        train_on = resume_with(runs[0].folder.path)
        if len(runs) == 1 and runs[0].folder.status == "diverged":
            raise InputError(f"{where} diverged before it logged any {what} (diverged.json says how)")
        raise InputError(f"{where} has logged no {what} yet, or lost it; to train up to its first log step {train_on}")
    for run in runs:
        if run not in drawn:
            say(f"{run.folder.path} has logged no {what} yet: left out")
    if len(drawn) < len(runs):  # else they would be told from some that are not there
        common, drawn = labelled(drawn)
    groups = [once_a_seed(group) for group in grouped(drawn)] if band else [[run] for run in drawn]
    for run in drawn:
        if not any(run in group for group in groups):
            say(f"{run.folder.path} has the seed of another run of its config: left out of the mean")
    named = zip(groups, mean_labels(groups), strict=True)
    means = [mean_curve([run.curve(what=what, x=x, smooth=smooth) for run in group], label) for group, label in named]
    usual = (what, x, smooth, log_y, ylim, band) == ("error", "step", None, False, None, False)
    name = "curves.png" if usual else f"{what}{'' if x == 'step' else f'-by-{x}'}.png"
    out = out or (paths[0] if len(paths) == 1 else Path()) / name
    if len(means) > NUM_STYLES:
        say(
            f"{len(means)} curves have only {NUM_STYLES} colours and dashes between them; --band draws means over seeds"
        )
    draw(means, common, [out], note=caveats(drawn), what=what, x=x, log_y=log_y, ylim=ylim)
    return out


def once_each(named: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Each remark once; one that is not made on every name says on which: "synthetic data (ResNet20)"."""
    names: dict[str, None] = {}
    found: dict[str, dict[str, None]] = {}
    for name, words in named:
        names[name] = None
        for remark in words:
            found.setdefault(remark, {})[name] = None
    apart = "; " if any("," in name for name in names) else ", "
    return [remark + (f" ({apart.join(of)})" if len(of) < len(names) else "") for remark, of in found.items()]


def caveats(runs: Iterable[Run]) -> str:
    """Caveats on the images behind runs, for a reader; "" where all had the official CIFAR-10 files."""
    return "; ".join(once_each((run.label, [run.caveat] if run.caveat else []) for run in runs))


def group_labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What tells groups of runs apart, whatever their seeds."""
    return tell_apart([replace(group[0].config, seed=0) for group in groups], [""] * len(groups))[1]


def mean_labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The same, and how many runs each group has."""
    named = []
    for label, group in zip(group_labels(groups), groups, strict=True):
        unfinished = sum(not run.finished for run in group)
        named.append(f"{label}, mean of {len(group)}" + (f" ({unfinished} unfinished)" if unfinished else ""))
    return named
