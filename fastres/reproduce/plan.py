"""Which runs a table or figure needs, which of them there are, and the training of the rest.

Runs are known by the digest of what they compute, so a run trained elsewhere under the same folder counts, and one of
another recipe does not.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from fastres.config import RunConfig, differences, make_config, merge
from fastres.console import Console, duration
from fastres.errors import FastresError, InputError, OutOfTime
from fastres.models.depth import num_blocks
from fastres.reproduce.paper import STAGES
from fastres.result import result_of
from fastres.rundir import CONFIG, METRICS, RESULT, RunDir, folders_below
from fastres.sweep import status, train_all


@dataclass(frozen=True)
class Need:
    """Runs of one network that belong together: one stage of the work."""

    name: str  # ResNet20
    folders: dict[Path, RunConfig]


def needs(
    nets: Sequence[tuple[str, int, int]], root: Path, preset: str, changes: dict[str, Any], *, variant: str = ""
) -> list[Need]:
    """The runs of each (architecture, depth, number of seeds), with the folders where they are or will be.

    Args:
        nets: In the order of the work; a network may come twice, with more seeds the second time.
        root: Where runs are looked for, three levels deep, and new ones go: `root/<variant>/<network>/seed<k>`.
        preset: Of `make_config`.
        changes: Laid over it, as far as they concern a network: plain nets have no shortcuts, and only ResNets that
            the paper warms up get another warm-up.
        variant: A folder for what `changes` make of the preset; "" for none.

    Raises:
        InputError: A run folder of another config stands where a new one would go.
    """
    known = _known(root)
    stages: list[Need] = []
    for arch, depth, num_seeds in nets:
        folders: dict[Path, RunConfig] = {}
        for seed in range(num_seeds):
            tree = merge(_concerning(changes, arch, depth), {"model": {"arch": arch, "depth": depth}, "seed": seed})
            config = make_config(preset, **tree)
            place = root / variant / config.name.lower() / f"seed{seed}"
            path = known.get(config.digest, place)
            if (
                path == place
                and (path / CONFIG).exists()
                and (stored := RunDir.open(path).config()).digest != config.digest
            ):
                changed = "; ".join(differences(stored.what(), config.what()))
                raise InputError(f"{path} is a run of another config ({changed}); give another --runs")
            folders[path] = dataclasses.replace(config, output=dataclasses.replace(config.output, out=str(path)))
        stages.append(Need(config.name, folders))
    return stages


def _concerning(changes: dict[str, Any], arch: str, depth: int) -> dict[str, Any]:
    unheard = set[tuple[str, str]]()
    if arch == "plain":
        unheard |= {("model", "shortcut"), ("model", "pad")}
    if make_config("paper", model={"arch": arch, "depth": depth}).recipe.warmup == "none":
        unheard.add(("recipe", "warmup"))
    return {
        section: {key: value for key, value in tree.items() if (section, key) not in unheard}
        for section, tree in changes.items()
    }


def stages_of(nets: Sequence[tuple[str, int]], num_seeds: int, plain_seeds: int) -> list[tuple[str, int, int]]:
    """(architecture, depth, seeds) of the networks asked for, in the order of `paper.STAGES`; then others, as asked."""
    seeds = {"resnet": num_seeds, "plain": plain_seeds}
    staged = [
        (arch, depth, seeds[arch] if few is None or arch == "plain" else min(few, seeds[arch]))
        for arch, depth, few in STAGES
        if (arch, depth) in nets
    ]
    known = {(arch, depth) for arch, depth, _ in STAGES}
    return staged + [(arch, depth, seeds[arch]) for arch, depth in nets if (arch, depth) not in known]


def train_missing(
    stages: Sequence[Need], *, console: Console, deadline: float = math.inf, side_by_side: int = 0
) -> bool:
    """Train what is missing and go on with what was cut, stage by stage; says how far it is and how long it may take.

    Returns:
        Whether all is done; False where the deadline came first (all saved).
    """
    folders = {path: config for stage in stages for path, config in stage.folders.items()}
    counts = [status(path) for path in folders]
    said = [f"{counts.count(kind)} {word}" for kind, word in _WORDS.items() if kind in counts]
    console.say(f"{_plural(len(folders), 'run')}: {', '.join(said)}")
    whole = Whole(folders)
    try:
        for number, stage in enumerate(stages, 1):
            if all(status(path) in ("finished", "diverged") for path in stage.folders):
                continue
            head = f"[{number}/{len(stages)}] {stage.name}, {_plural(len(stage.folders), 'run')}"
            console.say(f"{head}; {whole.so_far()}")
            console.overall = whole.at_step
            begins = whole.begins
            train_all(stage.folders, console=console, deadline=deadline, side_by_side=side_by_side, on_begin=begins)
    except OutOfTime as cut:
        console.say(str(cut))
        return False
    finally:
        console.overall = None
    return True


class Whole:
    """How much of all the runs is done, and how long the rest may take.

    The rate is that of this process; before its first steps that of the finished runs, wherever they were trained.

    Args:
        folders: Configs of all the runs, by run folder.
    """

    def __init__(self, folders: Mapping[Path, RunConfig]) -> None:
        self._folders = folders
        self._work = sum(map(_work, folders.values()))
        self._before = self._done = sum(_work(config) * _share_done(path, config) for path, config in folders.items())
        self._began = perf_counter()
        self._group: dict[Path, RunConfig] = {}  # what is being trained
        self._rate_before = _rate_of_finished(folders)

    def begins(self, group: Mapping[Path, RunConfig]) -> None:
        """Runs are about to be trained, side by side."""
        self._group = dict(group)
        self._done = sum(
            _work(config) * _share_done(path, config) for path, config in self._folders.items() if path not in group
        )

    def at_step(self, step: int) -> str:
        """Where all stands when the runs that are being trained have done `step` steps: "12 % of all, 1:10:00 left"."""
        now = self._done + sum(_work(config) * step / config.recipe.steps for config in self._group.values())
        seconds = perf_counter() - self._began
        rate = (now - self._before) / seconds if now > self._before and seconds > 0 else self._rate_before
        left = f", about {duration((self._work - now) / rate)} left" if rate > 0 else ""
        return f"{100 * now / self._work:.0f} % of all{left}"

    def so_far(self) -> str:
        """The same between two stages."""
        self.begins({})
        return self.at_step(0)


_WORDS = {"finished": "finished", "cut": "to go on with", "missing": "to do", "diverged": "given up (diverged)"}


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _known(root: Path) -> dict[str, Path]:
    """Run folders under `root` by the digest of what they compute; of several, the one that is furthest."""
    found: dict[str, tuple[int, Path]] = {}
    ranks = {"finished": 3, "diverged": 2, "cut": 1, "missing": 0}
    for path in folders_below(root):
        try:
            digest = RunDir.open(path).config().digest
        except FastresError:
            continue  # of another version, or damaged: it counts for nothing here
        rank = ranks[status(path)]
        if digest not in found or rank > found[digest][0]:
            found[digest] = rank, path
    return {digest: path for digest, (_, path) in found.items()}


def _work(config: RunConfig) -> float:
    """How much there is to do in a run: images times layers with weights, all of which cost about the same."""
    return config.recipe.steps * config.recipe.batch_size * (6.0 * num_blocks(config.model.depth) + 1)


def _rate_of_finished(folders: Mapping[Path, RunConfig]) -> float:
    """Work a second of the runs that have a result; 0 where there is none."""
    work = seconds = 0.0
    for path, config in folders.items():
        if status(path) == "finished":
            with contextlib.suppress(InputError):  # damaged: said where it is used
                result = result_of(RunDir(path))
                work += _work(config)
                seconds += sum(result.seconds.values()) / result.side_by_side
    return work / seconds if seconds else 0.0


def _share_done(path: Path, config: RunConfig) -> float:
    if status(path) in ("finished", "diverged"):
        return 1.0
    records = RunDir(path).metrics() if (path / METRICS).exists() else []
    return max((record["step"] for record in records), default=0) / config.recipe.steps


def runs_of(stages: Sequence[Need], *, finished: bool = False) -> list[RunDir]:
    """The run folders there are, each once; with `finished` only those that have a result."""
    paths = dict.fromkeys(path for stage in stages for path in stage.folders)
    return [RunDir(path) for path in paths if (path / (RESULT if finished else CONFIG)).exists()]
