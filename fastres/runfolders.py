"""Run folders among others: new ones, those below a folder, and how to go on with one."""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastres.config import RunConfig
from fastres.errors import InputError
from fastres.files import disk_error, typed
from fastres.rundir import CONFIG, DEEPEST, LOCK, RunDir, folders_below, is_run


def find_runs(paths: Iterable[Path]) -> list[RunDir]:
    """The run folders that paths name: a run folder itself, or all that are below a folder (`folders_below`).

    Raises:
        InputError: A path is neither, or holds no run folder.
    """
    found: dict[Path, RunDir] = {}
    for path in paths:
        inside = [path] if is_run(path) else folders_below(path)
        if not inside:
            raise InputError(
                f"{path} is not a run folder, and holds none: no {CONFIG} in it or up to {DEEPEST} levels below"
            )
        found |= {folder.resolve(): RunDir(folder) for folder in inside}
    return list(found.values())


def new_run_folder(config: RunConfig) -> Path:
    """The default folder of a run, made: `runs/resnet20-seed0-<date>-<time>`."""
    return new_folder(f"{config.name.lower()}-seed{config.seed}")


def new_folder(name: str) -> Path:
    """Make an empty folder `runs/<name>-<date>-<time>` that no other process has. Raises MachineError."""
    base = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = base, 2
    while True:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            path, count = base.with_name(f"{base.name}-{count}"), count + 1
        except OSError as error:
            raise disk_error(error, path) from error
        else:
            return path


def resume_with(path: Path) -> str:
    """How to resume a run or a sweep."""
    return f"resume with: fastres train --resume {typed(path)}"


def found_again(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config, without a data folder that is gone since (the run was moved): it is looked for as by default."""
    execution = dict(tree.get("execution", {}))
    folder = execution.get("data_dir")
    if folder and isinstance(folder, str) and not os.path.exists(folder):  # noqa: PTH110 (False where it may not look)
        execution["data_dir"] = None
    return {**tree, "execution": execution}


def remove_lone_lock(path: Path) -> None:
    """Remove the lock of a folder that holds nothing else."""
    with contextlib.suppress(OSError):  # the folder was moved
        if [inside.name for inside in path.iterdir()] == [LOCK]:
            (path / LOCK).unlink()


def remove_empty(path: Path) -> None:
    """Remove a folder that `new_folder` made and that stayed empty, and then runs/."""
    with contextlib.suppress(OSError):  # it is not empty
        path.rmdir()
        path.parent.rmdir()
