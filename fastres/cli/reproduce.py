"""`fastres reproduce`: the paper's Table 6, Figure 6 and Figure 7, the runs that they need included."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastres.cli.flags import (
    DATA_DIR,
    DEVICES,
    MIRROR,
    PRECISIONS,
    THREADS,
    given,
    parse_list,
    parse_model,
    parse_seeds,
    refuse_both,
    refuse_data_flags,
)
from fastres.cli.help import panel
from fastres.config import make_config, preset_tree
from fastres.configtree import leaves, merge
from fastres.errors import InputError, InUse

if TYPE_CHECKING:
    from fastres.console import Console
    from fastres.rundir import RunDir

WHAT = ("table6", "fig6", "fig7", "all")
SMOKE = {"recipe": {"steps": 40}, "output": {"log_every": 5, "eval_every": 10}}  # many networks, so few steps each
SEEDS = {"paper": "5", "fast": "2", "smoke": "2"}
Networks, Runs = panel("Which networks"), panel("Options")
Ablations, Execution = panel("Ablations (docs/fidelity.md)"), panel("How they run")


def reproduce(
    what: Annotated[str, typer.Argument(metavar="table6|fig6|fig7|all", help="What to make; all: the three.")],
    depths: Annotated[
        str | None,
        Networks(
            help="ResNets of these depths, and plain nets beside them up to 56; 1202 only if named. "
            "[default: 20,32,44,56,110; fig7: 20,56,110]"
        ),
    ] = None,
    nets: Annotated[
        str | None,
        Networks(help="Networks by name, instead of --depths: ResNet20,PlainNet110,ResNet1202."),
    ] = None,
    seeds: Annotated[
        str | None,
        Networks(help="Seeds of each ResNet: 5 (seeds 0 to 4), 2-4, or 1,3. [paper: 5; fast, smoke: 2]"),
    ] = None,
    plain_seeds: Annotated[str, Networks(help="Seeds of each plain net, likewise.")] = "1",
    preset: Annotated[
        str,
        Runs(help="paper: its recipe; fast: ten epochs; smoke: built-in data, a few minutes."),
    ] = "paper",
    steps: Annotated[
        int | None,
        Runs(help="Training steps per run. [paper: 64,000; fast: 3,910; smoke: 40]"),
    ] = None,
    epochs: Annotated[float | None, Runs(help="Training epochs per run, instead of --steps.")] = None,
    data_dir: Annotated[Path | None, Runs(help=DATA_DIR)] = None,
    data_url: Annotated[list[str] | None, Runs(metavar="URL", help=MIRROR)] = None,
    runs: Annotated[
        Path | None,
        Runs(
            help="Folder in which runs are looked for, and new ones go. "
            "[default: runs/reproduce; other lengths: runs/reproduce-fast and so on]"
        ),
    ] = None,
    out: Annotated[Path | None, Runs(help="Folder for tables and figures. [default: --runs]")] = None,
    train: Annotated[
        bool,
        Runs("--train/--no-train", help="Train the runs that are missing."),
    ] = True,
    dry_run: Annotated[
        bool,
        Runs("--dry-run", help="List the runs that are needed, say which are there, and stop."),
    ] = False,
    budget: Annotated[
        float | None,
        Runs(help="Minutes, after which to save, write what there is, and stop. [default: no limit]"),
    ] = None,
    clean: Annotated[
        bool,
        Runs("--clean", help="Draw in fig6 the error on training images without augmentation."),
    ] = False,
    ylim: Annotated[
        float | None,
        Runs(help="Upper end of fig6's y axis in %. [paper: 20; other recipes: 100]"),
    ] = None,
    assert_: Annotated[bool, Runs("--assert", help="Exit with code 6 unless Table 6 is reproduced.")] = False,
    shortcut: Annotated[str | None, Ablations(help="A or B. [default: A]")] = None,
    warmup: Annotated[
        str | None,
        Ablations(help="Warm-up of ResNet-110 and deeper: constant, error or none. [default: constant]"),
    ] = None,
    weight_decay_on: Annotated[str | None, Ablations(help="What decays: all or weights. [default: all]")] = None,
    norm_batch: Annotated[
        int | None,
        Ablations(help="Images per batch-norm statistic, as 64; 0: all 128. [default: 0]"),
    ] = None,
    val_split: Annotated[
        bool | None,
        Ablations("--val-split/--no-val-split", help="Train on 45,000 images, test on the other 5,000. [default: off]"),
    ] = None,
    lr_in_velocity: Annotated[
        bool | None,
        Ablations(
            "--lr-in-velocity/--no-lr-in-velocity",
            help="Multiply by lr inside the velocity, as in Caffe. [default: off]",
        ),
    ] = None,
    init: Annotated[
        str | None,
        Ablations(help="He initialisation by fan_in or fan_out. [default: fan_in]"),
    ] = None,
    pad: Annotated[
        str | None,
        Ablations(help="Option A's zero channels: both or after. [default: both]"),
    ] = None,
    device: Annotated[str, Execution(help=DEVICES)] = "auto",
    precision: Annotated[str, Execution(help=PRECISIONS)] = "auto",
    loader: Annotated[
        str,
        Execution(help="resident, dali, or auto: dali on a GPU where it is installed, else resident."),
    ] = "auto",
    side_by_side: Annotated[int, Execution(help="Seeds to train at once; 0: up to 8 on a GPU, 1 on a CPU.")] = 0,
    threads: Annotated[int, Execution(help=THREADS)] = 0,
    quiet: Annotated[bool, Execution("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Make the paper's Table 6, Figure 6 or Figure 7. Missing runs are trained, interrupted ones resumed."""
    _check_target(what, clean=clean, ylim=ylim, assert_=assert_)
    refuse_both("--nets", nets, "--depths", depths)
    refuse_both("--steps", steps, "--epochs", epochs)
    if budget is not None and not 0 < budget < math.inf:
        raise InputError(f"--budget is {budget}; it must be minutes above 0")
    if side_by_side < 0:
        raise InputError(f"--side-by-side is {side_by_side}; 0 chooses, else how many")
    if warmup not in (None, "constant", "error", "none"):
        raise InputError(f"--warmup is {warmup!r}; it must be one of constant, error, none")
    refuse_data_flags(
        "synthetic" if preset == "smoke" else "cifar10", data_dir, data_url, other="--preset smoke has that: "
    )
    deadline = math.inf if budget is None else perf_counter() + 60 * budget
    ablations = {
        "model": given(shortcut=shortcut, norm_batch=norm_batch, init=init, pad=pad),
        "data": given(val_split=val_split),
        "recipe": given(warmup=warmup, weight_decay_on=weight_decay_on, lr_in_velocity=lr_in_velocity),
    }
    changes = {
        **merge(_lengths(preset, steps, epochs, ablations), ablations),
        "execution": given(
            device=device,
            precision=precision,
            loader=loader,
            threads=threads,
            data_dir=None if data_dir is None else str(data_dir.absolute()),
            data_urls=data_url,
        ),
    }
    if clean:
        changes["output"] = {**changes.get("output", {}), "clean_train_error": True}
    wanted = _networks(what, nets, depths, SEEDS.get(preset, "1") if seeds is None else seeds, plain_seeds)

    from fastres.console import Console
    from fastres.files import make_folder
    from fastres.reproduce import table6
    from fastres.reproduce.plan import concerning, plan_stages, runs_of, train_missing
    from fastres.rundir import RunDir

    if runs is None:  # runs of another length would be in the way of the paper's
        runs = Path("-".join(["runs/reproduce", *_lengths_in_words(preset, steps, epochs)]))
    heeded = {path for arch, depth, _ in wanted for path in leaves(concerning(ablations, arch, depth))}
    variant = _variant(ablations, heeded)
    stages = plan_stages(wanted, runs, preset, changes, variant=variant)
    if dry_run:
        listed = {path: stage.name for stage in stages for path in stage.folders}  # a figure's runs are also a table's
        for path, name in listed.items():
            print(f"{name:<12} {RunDir(path).status:<9} {path}")
        num_finished = sum(RunDir(path).status == "finished" for path in listed)
        print(f"{len(listed)} runs, {num_finished} of them finished")
        return
    folder = out or runs / variant
    console, whole = Console("quiet" if quiet else "auto"), True
    if train:
        make_folder(folder)  # before hours are spent
        whole = train_missing(stages, console=console, deadline=deadline, side_by_side=side_by_side)
    if not runs_of(stages):
        way_on = "wait for the processes that train them" if train else "leave out --no-train to train them"
        raise InputError(f"{runs} holds no run of these networks yet; {way_on}")
    make_folder(folder)
    with _alone_in(folder, console):  # several processes may end at one time; the last one to draw sees all
        found = runs_of(stages)
        num_missing = len({path for stage in stages for path in stage.folders}) - len(found)
        _make(
            what,
            found,
            folder,
            changes["execution"],
            console,
            clean=clean,
            ylim=ylim,
            num_missing=num_missing,
            named=nets is not None or depths is not None,
        )
    if not whole:
        console.say("not all runs are finished: run the same command again to resume")
    if assert_:
        table6.check(table6.rows_of(found), num_missing=num_missing)


def _check_target(what: str, *, clean: bool, ylim: float | None, assert_: bool) -> None:
    """Raise InputError for an unknown target, and for flags that are not of it."""
    if what not in WHAT:
        raise InputError(f"unknown target {what!r}; choose from {', '.join(WHAT)}")
    if ylim is not None and what not in ("fig6", "all"):
        raise InputError(f"--ylim is of Figure 6, which {what} does not make; type fig6 or all")
    if ylim is not None and not 0 < ylim <= 100:
        raise InputError(f"--ylim is {ylim}; it must be per cent above 0, and at most 100")
    if clean and what == "table6":
        raise InputError("--clean applies to Figure 6; use fig6 or all")
    if assert_ and what not in ("table6", "all"):
        raise InputError(f"--assert judges Table 6, which {what} does not make; type table6 or all")


def _lengths_in_words(preset: str, steps: int | None, epochs: float | None) -> list[str]:
    """What of a run's length is not the paper's: ["fast", "4epochs"]."""
    words = [] if preset == "paper" else [preset]
    words += [] if steps is None else [f"{steps}steps"]
    return words + ([] if epochs is None else [f"{epochs:g}epochs"])


def _variant(ablations: dict[str, dict[str, Any]], heeded: set[str]) -> str:
    """A folder's name for what departs from the defaults: "shortcut-B"; "" where nothing does.

    Raises InputError where that is of none of the networks, whose keys are `heeded`.
    """
    plain, words = leaves(make_config().to_dict()), []
    for path, value in leaves(ablations).items():
        name = path.rpartition(".")[2].replace("_", "-")
        if value != plain[path] or name == "warmup":  # of which each depth has its own default
            if path not in heeded:
                raise InputError(f"--{name} does nothing for these networks; leave it out, or name others")
            words.append(name + ("" if isinstance(value, bool) else f"-{value}"))
    return "-".join(words)


def _lengths(preset: str, steps: int | None, epochs: float | None, ablations: dict[str, Any]) -> dict[str, Any]:
    """What is changed of a preset: the length of a run; `ablations` say how many images an epoch has."""
    from fastres.cli.flags import in_steps

    changes: dict[str, Any] = {key: dict(value) for key, value in SMOKE.items()} if preset == "smoke" else {}
    if steps is not None:
        changes["recipe"] = {"steps": steps}
    if epochs is not None:
        changes["recipe"] = in_steps({}, merge(preset_tree(preset), ablations), epochs, None)["recipe"]
    return changes


def _networks(
    what: str, nets: str | None, depths: str | None, seeds: str, plain_seeds: str
) -> list[tuple[str, int, Sequence[int]]]:
    """(architecture, depth, seeds) in the order of the work."""
    from fastres.reproduce.paper import FIGURE_7, STAGES
    from fastres.reproduce.plan import in_order_of_work

    if nets is not None:
        chosen = [parse_model(word, "--nets") for word in parse_list("--nets", nets, str)]
    elif depths is not None:
        deepest = max(depth for arch, depth, _ in STAGES if arch == "plain")  # deeper ones only by name
        chosen = [("resnet", depth) for depth in parse_list("--depths", depths, int)]
        chosen += [("plain", depth) for _, depth in chosen if depth <= deepest]
    else:
        chosen = list(dict.fromkeys(FIGURE_7 if what == "fig7" else [(arch, depth) for arch, depth, _ in STAGES]))
    for arch, depth in chosen:
        if arch == "imagenet":
            raise InputError(
                f"--nets: the paper has no ImageNet-style network of {depth} layers on CIFAR-10; leave it out"
            )
        make_config(model={"arch": arch, "depth": depth})  # refuses a depth that is none
    return in_order_of_work(chosen, parse_seeds(seeds), parse_seeds(plain_seeds, "--plain-seeds"))


@contextlib.contextmanager
def _alone_in(folder: Path, console: "Console") -> Iterator[None]:
    """Hold a folder, and say so where that takes waiting for another process."""
    from fastres.rundir import RunDir

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(RunDir(folder).locked())
        except InUse:
            console.say(f"waiting for the process that writes into {folder}")
            stack.enter_context(RunDir(folder).locked(wait=True))
        yield


def _make(
    what: str,
    found: "list[RunDir]",
    folder: Path,
    execution: dict[str, Any],
    console: "Console",
    *,
    clean: bool,
    ylim: float | None,
    num_missing: int,
    named: bool,
) -> None:
    """Write what was asked for, from the runs there are. `named`: their networks were."""
    from fastres.reproduce import fig6, fig7, table6
    from fastres.reproduce.networks import note_of
    from fastres.reproduce.paper import departures

    missing = f"{num_missing} of the runs asked for not begun" if num_missing else ""
    note = "; ".join(filter(None, [note_of(found), missing]))

    def tell(paths: Iterable[Path]) -> None:
        for path in paths:
            console.say(f"wrote {path}")

    if note:
        console.say(f"note: {note}")
    if what in ("table6", "all"):
        rows = table6.rows_of(found)
        paths = table6.write(rows, folder, note=note)
        console.print(table6.terminal(rows))
        tell(paths)
    if what in ("fig6", "all"):
        # The paper's axis, but for runs that are not the paper's: most of their curves would lie above it.
        usual = 1.0 if any(departures(run.config()) for run in found) else fig6.PAPER_YLIM
        upper = usual if ylim is None else ylim / 100
        tell(fig6.draw(found, folder, note=note, clean=clean, ylim=upper))
    if what in ("fig7", "all"):
        if all(run.ended for run in found) or any(fig7.has_weights(run) for run in found):
            tell(fig7.draw(found, folder, execution, note=note, named=named, say=console.say))
        else:
            console.say("Figure 7 is left out: no run has saved weights yet")
