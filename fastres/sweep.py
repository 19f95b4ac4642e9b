"""Several runs of which some may be done: finds out which, and trains the rest, side by side where that pays."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

from fastres import checkpoint
from fastres.build import check_loader
from fastres.clock import Clocks
from fastres.config import RunConfig
from fastres.configtree import is_int
from fastres.console import Console, Verbosity, percent
from fastres.errors import Diverged, InputError, InUse
from fastres.files import given_path, make_folder, move_aside
from fastres.guards import Interrupt, stopped
from fastres.loop import check_config, train_together
from fastres.machine import gpu
from fastres.result import RunResult, result_of
from fastres.rundir import CONFIG, DIVERGED, RunDir
from fastres.runfolders import found_again, remove_empty, remove_lone_lock, resume_with
from fastres.sweepdir import (
    SWEEP,
    any_begun,
    holds_only_seeds,
    is_sweep,
    new_sweep_folder,
    read_sweep,
    write_sweep,
)

SIDE_BY_SIDE = 8  # runs at once on a GPU, at most

Outcome = RunResult | Diverged


def train_seeds(
    config: RunConfig | None = None,
    seeds: Sequence[int] | int = (),
    *,
    resume: str | Path | None = None,
    side_by_side: int = 0,
    verbosity: Verbosity = "auto",
    console: Console | None = None,
    clocks: Clocks | None = None,
    deadline: float = math.inf,
) -> list[Outcome]:
    """Train one config with several seeds; on a GPU side by side, on a CPU one after the other.

    Each run comes out as `train` would have it alone (on a GPU to the bit under `execution.deterministic`). Called
    again with the same folder it goes on where it was cut, and repeats nothing that is finished.

    Args:
        config: What to train; `config.output.out` is the sweep's folder (default: a new one under runs/). Its seed does
            not count. May be left out with `resume`.
        seeds: Which; a number stands for so many, 0 and up. With `resume` default to those of the sweep.
        resume: A sweep's folder to resume.
        side_by_side: Runs at once; 0: up to eight on a GPU, one on a CPU.
        verbosity, console, clocks, deadline: As `fastres.train`.

    Returns:
        A result for each seed in order, or why it was abandoned (`fastres.errors.Diverged`).

    Raises:
        As `fastres.train`, but for Diverged; InputError where the folder belongs to another sweep.
    """
    check_config(config)
    seeds = _listed(seeds)
    if not is_int(side_by_side) or side_by_side < 0:
        raise InputError(f"side_by_side is {side_by_side!r}; 0 chooses, else how many")
    here = Path() if console else Path.cwd()  # as in `train`
    folder = here / given_path("resume", resume) if resume is not None else None
    if folder is not None:
        stored = read_sweep(folder)
        config, seeds = config or RunConfig.from_dict(found_again(stored["config"])), seeds or stored["seeds"]
    config = config or RunConfig()
    check_loader(config)
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds are {list(seeds)}; give each of them once, and at least one")
    console = console or Console(verbosity)
    seed_folders(Path(), config, seeds)  # a seed that cannot be, before a folder is made
    out = config.output.out
    folder = folder or here / (given_path("output.out", out) if out else new_sweep_folder(config, seeds))
    folders = seed_folders(folder, config, seeds)
    if not (is_sweep(folder) or holds_only_seeds(folder)):
        RunDir.check_free(folder, overwrite=False, way_out="give another --out")
    make_folder(folder)
    interrupt = Interrupt(resume_with(folder), deadline)
    try:
        with RunDir(folder).locked():  # else another process could write sweep.json anew, or remove it
            is_new = not is_sweep(folder)
            write_sweep(folder, config, seeds)
            try:
                train_all(folders, interrupt, side_by_side=side_by_side, console=console, clocks=clocks)
            except BaseException:
                if is_new and not any_begun(folders):  # nothing came of it: it would be in the way of the next
                    (folder / SWEEP).unlink(missing_ok=True)
                raise
    except BaseException as error:
        if not isinstance(error, InUse):  # else the lock is another process's
            remove_lone_lock(folder)
        if not out:
            remove_empty(folder)
        raise
    outcomes = [outcome_of(path) for path in folders]
    console.say(f"{spread(config, outcomes)}; {folder}")
    return outcomes


def _listed(seeds: Any) -> list[int]:
    """A number of seeds, or some seeds, as a list. Raises InputError."""
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds  # numpy's and torch's
    if is_int(seeds):
        return list(range(seeds))
    if isinstance(seeds, Iterable) and all(map(is_int, listed := [*seeds])):
        return [int(seed) for seed in listed]
    raise InputError(f"seeds are {seeds!r}; give how many, or a list of whole numbers, as range(2, 5)")


def seed_folders(folder: Path, config: RunConfig, seeds: Sequence[int]) -> dict[Path, RunConfig]:
    """The run folders of a sweep, and what is trained in each."""
    paths = {seed: folder / f"seed{seed}" for seed in seeds}
    return {
        path: dataclasses.replace(config, seed=seed, output=dataclasses.replace(config.output, out=str(path)))
        for seed, path in paths.items()
    }


def train_all(
    folders: Mapping[Path, RunConfig],
    interrupt: Interrupt,
    *,
    side_by_side: int = 0,
    console: Console,
    clocks: Clocks | None = None,
    shared: bool = False,
    again: bool = False,
    on_begin: Callable[[Sequence[Path]], None] = lambda _: None,
) -> bool:
    """Train those of the runs that are not finished; configs that differ in more than their seed go apart.

    Args:
        folders: Configs by run folder. A folder that is there must be a run of the same thing.
        interrupt: Its deadline is kept, and a signal that came too late to cut what was trained before is heeded.
        side_by_side, console, clocks: As `train_seeds`.
        shared: Leave runs that another process trains to it; else they are an error.
        again: The deadline counts from the first step on. Else a call trains a little even if it has passed.
        on_begin: Takes the folders of the runs that are trained next, side by side.

    Returns:
        Whether there was one to train.

    Raises:
        As `train_seeds`; InputError where a folder is another run's, also of one that came meanwhile.
    """
    trained, tried = False, set[Path]()
    while True:
        for path, config in folders.items():
            _check_place(path, config)
        # Planned anew each time: other processes may have finished runs since, or brought them to another step.
        todo = {path: config for path, config in folders.items() if path not in tried}
        group = _next_group(todo, side_by_side)
        if not group:
            return trained
        # It came when the group before had no step left to cut.
        if interrupt.signum is not None or ((tried or again) and perf_counter() >= interrupt.deadline):
            raise stopped(interrupt, f"before {', '.join(map(str, group))}")
        trained |= bool(
            train_together(
                group, interrupt, console=console, clocks=clocks, brief=True, shared=shared, on_begin=on_begin
            )
        )
        tried |= group.keys()
        clocks = None  # what came before the first group is its own


def _check_place(path: Path, config: RunConfig) -> None:
    """Raise InputError where a run of `config` can neither begin nor go on in a folder."""
    try:
        RunDir.check_free(
            path, overwrite=False, way_out=f"to train this run: {move_aside(path)}, then the same command"
        )
    except InputError:
        if not (path / CONFIG).exists():
            raise
        RunDir(path).check_same(config)


def outcome_of(path: Path) -> Outcome:
    """What a finished run gave, or why it was abandoned. Raises InputError where it is neither."""
    run = RunDir.open(path)
    return Diverged(str(run.read_json(DIVERGED).get("why"))) if run.status == "diverged" else result_of(run)


def spread(config: RunConfig, outcomes: Sequence[Outcome]) -> str:
    """Last-step errors of several runs in one line: mean, standard deviation, extremes."""
    errors = [outcome.test_error for outcome in outcomes if isinstance(outcome, RunResult)]
    num_abandoned = len(outcomes) - len(errors)
    lost = f", {num_abandoned} abandoned (diverged)" if num_abandoned else ""
    if not errors:
        return f"{config.name}: no run finished{lost}"
    found = percent(errors[0])
    if len(errors) > 1:
        about = f"{100 * fmean(errors):.2f} \N{PLUS-MINUS SIGN} {100 * stdev(errors):.2f} %"
        found = f"{about} ({percent(min(errors))} to {percent(max(errors))})"
    num_runs = f"{len(errors)} run{'s' if len(errors) > 1 else ''}"
    return f"{config.name}, {num_runs}: {config.data.held_out} error {found}{lost}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """JSON-ready: a result, or {"diverged": why}."""
    return outcome.to_dict() if isinstance(outcome, RunResult) else {"diverged": str(outcome)}


def raise_if_all_diverged(outcomes: Sequence[Outcome]) -> None:
    """Raise the first Diverged where no run gave a result."""
    lost = [outcome for outcome in outcomes if isinstance(outcome, Diverged)]
    if len(lost) == len(outcomes):
        raise lost[0]


def _next_group(folders: Mapping[Path, RunConfig], side_by_side: int) -> dict[Path, RunConfig]:
    """The first unfinished run, and those that can train beside it: but for the seed alike, and at one step."""
    group: dict[Path, RunConfig] = {}
    common: set[int] = set()  # steps that all its runs have saved
    for path, config in folders.items():
        if RunDir(path).ended:
            continue
        steps = checkpoint.steps(path) or {0}
        if not group:
            group, common, first = {path: config}, steps, config
            most = side_by_side or (SIDE_BY_SIDE if gpu.choose(config.execution.device)[0].type == "cuda" else 1)
        alike = dataclasses.replace(config, seed=first.seed, output=first.output) == first
        if alike and len(group) < most and common & steps:
            common &= steps
            group[path] = config
    return group
