"""Which runs a table or figure needs, which of them there are, and the training of the rest.

Runs are known by the digest of what they compute, so a run trained elsewhere under the same folder counts, and one of
another recipe does not.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from fastres.build import load_images
from fastres.config import RunConfig, make_config
from fastres.configtree import merge
from fastres.console import Console, duration
from fastres.data.imageset import short_digest
from fastres.errors import FastresError, InputError, OutOfTime
from fastres.files import move_aside
from fastres.guards import AGAIN, Interrupt
from fastres.models.depth import num_blocks
from fastres.reproduce.paper import STAGES
from fastres.result import result_of
from fastres.rundir import CONFIG, RunDir, folders_below
from fastres.sweep import train_all

WORDS = {"finished": "finished", "cut": "begun", "missing": "to do", "diverged": "abandoned (diverged)"}  # by status


@dataclass(frozen=True)
class Stage:
    """Runs of one network that belong together: one stage of the work."""

    name: str  # ResNet20
    folders: dict[Path, RunConfig]


def plan_stages(
    nets: Sequence[tuple[str, int, Sequence[int]]],
    root: Path,
    preset: str,
    changes: dict[str, Any],
    *,
    variant: str = "",
) -> list[Stage]:
    """The runs of each (architecture, depth, seeds), with the folders where they are or will be.

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
    stages: list[Stage] = []
    for arch, depth, seeds in nets:
        folders: dict[Path, RunConfig] = {}
        for seed in seeds:
            tree = merge(concerning(changes, arch, depth), {"model": {"arch": arch, "depth": depth}, "seed": seed})
            config = make_config(preset, **tree)
            place = root / variant / config.name.lower() / f"seed{seed}"
            path = known.get(config.digest, place)
            if path == place and (path / CONFIG).exists():
                _check_same(path, config)
            folders[path] = dataclasses.replace(config, output=dataclasses.replace(config.output, out=str(path)))
        stages.append(Stage(config.name, folders))
    return stages


def _check_same(path: Path, config: RunConfig) -> None:
    """Raise InputError where the run in a folder is another one than what is needed there, or cannot be read."""
    try:
        stored = RunDir.open(path).config()
    except InputError as error:
        raise InputError(f"{error}. To train that run again: {move_aside(path)}, then the same command") from error
    if changed := stored.differs_from(config):
        raise InputError(f"{path} is a run of another config ({'; '.join(changed)}); give another --runs")


def concerning(changes: dict[str, Any], arch: str, depth: int) -> dict[str, Any]:
    """Changes of a config's tree, without those that do nothing to this network."""
    unheard = set[tuple[str, str]]()
    if arch == "plain":
        unheard |= {("model", "shortcut"), ("model", "pad")}
    if make_config("paper", model={"arch": arch, "depth": depth}).recipe.warmup == "none":
        unheard.add(("recipe", "warmup"))
    return {
        section: {key: value for key, value in tree.items() if (section, key) not in unheard}
        for section, tree in changes.items()
    }


def in_order_of_work(
    nets: Sequence[tuple[str, int]], seeds: Sequence[int], plain_seeds: Sequence[int]
) -> list[tuple[str, int, Sequence[int]]]:
    """(architecture, depth, seeds) of the networks asked for, in the order of `paper.STAGES`; then others, as asked."""
    of = {"resnet": seeds, "plain": plain_seeds}
    staged = [
        (arch, depth, of[arch] if few is None or arch == "plain" else of[arch][:few])
        for arch, depth, few in STAGES
        if (arch, depth) in nets
    ]
    known = {(arch, depth) for arch, depth, _ in STAGES}
    return staged + [(arch, depth, of[arch]) for arch, depth in nets if (arch, depth) not in known]


def train_missing(
    stages: Sequence[Stage], *, console: Console, deadline: float = math.inf, side_by_side: int = 0
) -> bool:
    """Train what is missing and go on with what was cut, stage by stage; says how far it is and how long it may take.

    Several processes may share the runs, on a GPU each: what one trains, the others leave to it.

    Returns:
        Whether all is done; False where the deadline came first (all saved), or other processes are not done yet.
    """
    folders = {path: config for stage in stages for path, config in stage.folders.items()}
    statuses = [RunDir(path).status for path in folders]
    said = [f"{statuses.count(kind)} {word}" for kind, word in WORDS.items() if kind in statuses]
    console.say(f"{_plural(len(folders), 'run')}: {', '.join(said)}")
    for path in folders:
        run = RunDir(path)
        if run.status == "finished":
            try:
                result_of(run)
            except InputError as error:
                console.say(str(error))
    if "missing" in statuses or "cut" in statuses:
        _check_images(folders, console)
    whole, interrupt, announced = OverallProgress(folders), Interrupt(AGAIN, deadline), set[str]()

    def begin(head: str, paths: Sequence[Path]) -> None:
        if head not in announced:
            announced.add(head)
            console.say(f"{head}; {whole.between_stages()}")
        whole.begins(paths)

    console.overall = whole.at_step
    try:
        trained, again = True, False
        while trained:  # once more, for what another process began and left since; the last time there is nothing
            trained = False
            for number, stage in enumerate(stages, 1):
                head = f"[{number}/{len(stages)}] {stage.name}, {_plural(len(stage.folders), 'run')}"
                on_begin = functools.partial(begin, head)
                trained |= train_all(
                    stage.folders,
                    interrupt,
                    side_by_side=side_by_side,
                    console=console,
                    shared=True,
                    again=again,
                    on_begin=on_begin,
                )
                again |= trained
    except OutOfTime as cut:
        console.say(str(cut))
        return False
    finally:
        console.overall = None
    if left := sum(not RunDir(path).ended for path in folders):
        console.say(f"{_plural(left, 'run')} left to other processes; they make table and figures anew when they end")
    return not left


def _check_images(folders: Mapping[Path, RunConfig], console: Console) -> None:
    """Raise InputError, before hours are spent, where runs that are there had other images than those at hand."""
    recorded = {path: RunDir(path).data().get("digest") for path in folders if (path / CONFIG).exists()}
    if not any(recorded.values()):
        return
    config = next(iter(folders.values()))
    images = load_images(config.data, config.execution, say=lambda _: None, progress=console.download)
    for path, digest in recorded.items():
        if digest not in (None, images.digest):
            raise InputError(
                f"{path} had images with digest {short_digest(str(digest))}, {images.source} has "
                f"{short_digest(images.digest)}: a table of both would be of neither; give the same --data-dir, or "
                "another --runs"
            )


class OverallProgress:
    """How much of all the runs is done, and how long the rest may take.

    The rate is that of this process while it trains, set-up and compilation left out; before it has one, that of the
    finished runs, wherever they were trained. How far other processes are is seen when a group of runs begins.

    Args:
        folders: Configs of all the runs, by run folder.
        clock: Seconds.
    """

    def __init__(self, folders: Mapping[Path, RunConfig], clock: Callable[[], float] = perf_counter) -> None:
        self._folders, self._clock = folders, clock
        self._work = sum(map(_work, folders.values()))
        self._rate_before = _rate_of_finished(folders)
        self._group: dict[Path, RunConfig] = {}  # what is being trained
        self._others = 0.0  # work done in all other runs
        self._first: tuple[float, float] | None = None  # work done in the group, and the time, when first asked
        self._last = (0.0, 0.0)  # when last asked
        self._trained = (0.0, 0.0)  # work and seconds of the groups before
        self.begins([])

    def begins(self, paths: Sequence[Path]) -> None:
        """Runs are about to be trained, side by side."""
        self._trained = self._so_far()
        self._group, self._first = {path: self._folders[path] for path in paths}, None
        self._others = sum(
            _work(config) * _share_done(path, config) for path, config in self._folders.items() if path not in paths
        )

    def at_step(self, step: int) -> str:
        """Where all stands when the runs that are being trained have done `step` steps: "12 % of all, 1:10:00 left"."""
        now = sum(_work(config) * step / config.recipe.steps for config in self._group.values())
        self._last = (now, self._clock())
        self._first = self._first or self._last
        work, seconds = self._so_far()
        rate = work / seconds if work > 0 and seconds > 0 else self._rate_before
        remaining = self._work - self._others - now
        left = f", about {duration(remaining / rate)} left" if rate > 0 and remaining > 0 else ""
        return f"{100 * (self._others + now) / self._work:.0f} % of all{left}"

    def between_stages(self) -> str:
        """Where all stands while nothing is being trained."""
        self.begins([])
        return self.at_step(0)

    def _so_far(self) -> tuple[float, float]:
        """Work and seconds of training in this process."""
        work, seconds = self._trained
        if self._first is None:
            return work, seconds
        return work + self._last[0] - self._first[0], seconds + self._last[1] - self._first[1]


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _known(root: Path) -> dict[str, Path]:
    """Run folders under `root` by the digest of what they compute; of several, the one that is furthest."""
    found: dict[str, tuple[int, Path]] = {}
    ranks = {"finished": 3, "diverged": 2, "cut": 1, "missing": 0}
    for path in folders_below(root):
        run = RunDir(path)
        try:
            digest = run.config().digest
        except FastresError:
            continue  # of another version, or damaged: it counts for nothing here
        rank = ranks[run.status]
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
        run = RunDir(path)
        if run.status == "finished":
            with contextlib.suppress(InputError):  # damaged: said where it is used
                result = result_of(run)
                work += _work(config)
                seconds += sum(result.seconds.values()) / result.side_by_side
    return work / seconds if seconds else 0.0


def _share_done(path: Path, config: RunConfig) -> float:
    run = RunDir(path)
    if run.ended:
        return 1.0
    return max((record["step"] for record in run.metrics()), default=0) / config.recipe.steps


def runs_of(stages: Sequence[Stage]) -> list[RunDir]:
    """The run folders there are, each once."""
    paths = dict.fromkeys(path for stage in stages for path in stage.folders)
    return [RunDir(path) for path in paths if (path / CONFIG).exists()]
