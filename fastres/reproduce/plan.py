"""Which runs a table or figure needs, which of them there are, and the training of the rest.

Runs are known by the digest of what they compute, so a run trained elsewhere under the same folder counts, and one of
another recipe does not.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from fastres.config import RunConfig, differences, make_config, merge
from fastres.console import Console, duration
from fastres.errors import FastresError, InputError, OutOfTime
from fastres.models.depth import num_blocks
from fastres.reproduce.paper import STAGES, departures
from fastres.rundir import CONFIG, METRICS, RESULT, RunDir
from fastres.sweep import status, train_all

DEEPEST = 3  # levels of folders below --runs in which a run is found


@dataclass(frozen=True)
class Need:
    """Runs of one network that belong together: one stage of the work."""

    name: str  # ResNet20
    folders: dict[Path, RunConfig]


def needs(
    nets: Sequence[tuple[str, int, int]], root: Path, preset: str, changes: dict[str, Any], *, first_seed: int = 0
) -> list[Need]:
    """The runs of each (architecture, depth, number of seeds), with the folders where they are or will be.

    Args:
        nets: In the order of the work; a network may come twice, with more seeds the second time.
        root: Where runs are looked for, three levels deep, and new ones go: `root/<network>/seed<k>`.
        preset: Of `make_config`.
        changes: Laid over it.
        first_seed: Seeds count from here.

    Raises:
        InputError: A run folder of another config stands where a new one would go.
    """
    known = _known(root)
    stages: list[Need] = []
    for arch, depth, num_seeds in nets:
        folders: dict[Path, RunConfig] = {}
        for seed in range(first_seed, first_seed + num_seeds):
            tree = merge(changes, {"model": {"arch": arch, "depth": depth}, "seed": seed})
            config = make_config(preset, **tree)
            place = root / config.name.lower() / f"seed{seed}"
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
    began, work_before = perf_counter(), _work_done(folders)
    whole = sum(map(_work, folders.values()))
    for number, stage in enumerate(stages, 1):
        if all(status(path) in ("finished", "diverged") for path in stage.folders):
            continue
        done = _work_done(folders)
        rate = (done - work_before) / (perf_counter() - began)
        left = f", about {duration((whole - done) / rate)} left" if rate > 0 else ""
        head = f"[{number}/{len(stages)}] {stage.name}, {_plural(len(stage.folders), 'run')}"
        console.say(f"{head}; {100 * done / whole:.0f} % done{left}")
        try:
            train_all(stage.folders, console=console, deadline=deadline, side_by_side=side_by_side)
        except OutOfTime as cut:
            console.say(str(cut))
            return False
    return True


_WORDS = {"finished": "finished", "cut": "to go on with", "missing": "to do", "diverged": "given up (diverged)"}


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def note_of(runs: Sequence[RunDir]) -> str:
    """What a reader must be told of the runs behind a table or figure, on its face; "" where there is nothing.

    Built-in data, data that is not the official archive's, and every difference from the paper's recipe.
    """
    notes: dict[str, None] = {}
    for run in runs:
        config, data = run.config(), _data_of(run)
        if config.data.dataset == "synthetic":
            notes["synthetic data: not a result of the paper"] = None
        elif data and not data["official"]:
            notes["the data set is not the official CIFAR-10 files"] = None
        if changes := departures(config):
            notes[f"not the paper's recipe: {', '.join(changes)}"] = None
        if config.data.val_split:
            notes["trained on 45k images, tested on the other 5k"] = None
    return "; ".join(notes)


def _data_of(run: RunDir) -> dict[str, Any] | None:
    try:
        data = run.read_json("environment.json").get("data")
    except InputError:
        return None
    return data if isinstance(data, dict) else None


def _known(root: Path) -> dict[str, Path]:
    """Run folders under `root` by the digest of what they compute; of several, the one that is furthest."""
    found: dict[str, tuple[int, Path]] = {}
    ranks = {"finished": 3, "diverged": 2, "cut": 1, "missing": 0}
    for level in range(DEEPEST + 1):
        for file in sorted(root.glob("/".join(["*"] * level + [CONFIG]))):
            try:
                digest = RunDir.open(file.parent).config().digest
            except FastresError:
                continue  # of another version, or damaged: it counts for nothing here
            rank = ranks[status(file.parent)]
            if digest not in found or rank > found[digest][0]:
                found[digest] = rank, file.parent
    return {digest: path for digest, (_, path) in found.items()}


def _work(config: RunConfig) -> float:
    """How much there is to do in a run: images times layers with weights, all of which cost about the same."""
    return config.recipe.steps * config.recipe.batch_size * (6.0 * num_blocks(config.model.depth) + 1)


def _work_done(folders: dict[Path, RunConfig]) -> float:
    return sum(_work(config) * _share_done(path, config) for path, config in folders.items())


def _share_done(path: Path, config: RunConfig) -> float:
    if status(path) in ("finished", "diverged"):
        return 1.0
    records = RunDir(path).metrics() if (path / METRICS).exists() else []
    return max((record["step"] for record in records), default=0) / config.recipe.steps


def runs_of(stages: Sequence[Need], *, finished: bool = False) -> list[RunDir]:
    """The run folders there are, each once; with `finished` only those that have a result."""
    paths = dict.fromkeys(path for stage in stages for path in stage.folders)
    return [RunDir(path) for path in paths if (path / (RESULT if finished else CONFIG)).exists()]
