"""The folder of a sweep: a run folder for each seed, and `sweep.json`, which says what they have in common."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastres.config import RunConfig
from fastres.configtree import is_int
from fastres.errors import Diverged, InputError
from fastres.files import is_aside, typed, write_json
from fastres.rundir import CONFIG, DIVERGED, RunDir, is_left_behind, is_run
from fastres.runfolders import found_again, new_folder

SWEEP = "sweep.json"
SCHEMA = 1  # of sweep.json; a reader refuses what it does not know


def new_sweep_folder(config: RunConfig, seeds: Sequence[int]) -> Path:
    """The default folder of a sweep, made: `runs/resnet20-5seeds-<date>-<time>`."""
    return new_folder(f"{config.name.lower()}-{len(seeds)}seeds")


def read_sweep(folder: Path) -> dict[str, Any]:
    """A sweep's own file. Raises InputError where it is missing, damaged, or of another version."""
    if (folder / CONFIG).is_file():
        raise InputError(f"{folder} is one run, not a sweep; leave out --seeds to resume it")
    remedy = (
        f"Remove that file and train with the same flags, --seeds and --out {folder}: what is finished is not repeated"
    )
    try:
        stored = RunDir(folder).read_json(SWEEP)
    except InputError as error:
        raise InputError(f"{error}. {remedy}" if is_sweep(folder) else str(error)) from error
    if stored.get("schema") != SCHEMA:
        raise InputError(
            f"{folder / SWEEP} has schema {stored.get('schema')}; this version reads {SCHEMA}. Its run folders can be "
            "used one by one"
        )
    seeds, config = stored.get("seeds"), stored.get("config")
    try:
        if not (isinstance(seeds, list) and seeds and all(map(is_int, seeds))):
            raise InputError("its seeds are no list of numbers")
        if not isinstance(config, dict):
            raise InputError("it has no config")
        RunConfig.from_dict({**config, "seed": 0})
    except InputError as error:
        raise InputError(f"{folder / SWEEP} is damaged: {error}. {remedy}") from error
    return stored


def stored_config(path: Path) -> dict[str, Any]:
    """The config, as a tree, of a run or a sweep that is to go on. Raises InputError where `path` is neither."""
    return found_again(read_sweep(path)["config"] if is_sweep(path) else RunDir.open(path).config().to_dict())


def to_go_on_with(path: Path, config: RunConfig) -> Path | None:
    """The run folder that a command which begins a run or goes on with it goes on with; None: it begins it.

    Raises:
        InputError: There is a sweep, or a run of another config.
        Diverged: The run has, and would again.
    """
    if is_sweep(path):
        raise InputError(
            f"{path} is a sweep; to go on with it add its --seeds, or: fastres train --resume {typed(path)}"
        )
    if not is_run(path):
        return None
    run = RunDir.open(path)
    if changed := run.config().differs_from(config):
        raise InputError(
            f"{path} was begun with another config ({'; '.join(changed)}); give the flags that it was begun with, or: "
            f"fastres train --resume {typed(path)}"
        )
    if run.status == "diverged":
        raise Diverged(f"{path} has diverged: {run.read_json(DIVERGED).get('why')}")
    return path


def is_sweep(path: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (path / SWEEP).is_file()


def write_sweep(folder: Path, config: RunConfig, seeds: Sequence[int]) -> None:
    """Create a sweep, or add seeds to one of the same config."""
    own = {key: value for key, value in config.to_dict().items() if key != "seed"}
    known: list[int] = []
    if is_sweep(folder):
        stored = read_sweep(folder)
        if not any_begun(folder / f"seed{seed}" for seed in stored["seeds"]):
            stored |= {"config": own, "seeds": []}
        theirs, known = RunConfig.from_dict({**stored["config"], "seed": 0}), stored["seeds"]
        if changed := theirs.differs_from(config, but_seed=True):
            raise InputError(f"{folder} is a sweep of another config ({'; '.join(changed)}); give another --out")
    write_json(folder / SWEEP, {"schema": SCHEMA, "config": own, "seeds": list(dict.fromkeys([*known, *seeds]))})


def any_begun(paths: Iterable[Path]) -> bool:
    """Whether there is anything of any of these runs."""
    return any(RunDir(path).status != "missing" for path in paths)


def holds_only_seeds(folder: Path) -> bool:
    """Whether a folder is a sweep's that has lost its sweep.json."""
    inside = [path for path in folder.iterdir() if not is_left_behind(path)] if folder.is_dir() else []
    inside = [path for path in inside if not is_aside(path.name)]
    return all(re.fullmatch(r"seed\d+", path.name) for path in inside)
