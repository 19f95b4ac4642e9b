"""The training loop: `_run`, read from top to bottom, and what leads to it."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from time import perf_counter

from fastres import pace
from fastres.build import check_loader, load_images
from fastres.checkpoint import Checkpoint
from fastres.clock import Clocks
from fastres.config import RunConfig
from fastres.console import Console, Progress, Verbosity
from fastres.cudagraph import CapturedGraph
from fastres.data.imageset import ImageSet
from fastres.errors import Diverged, InputError
from fastres.files import given_path
from fastres.guards import (
    Interrupt,
    check_memory,
    explained_compilation,
    explained_full_disk,
    explained_memory_errors,
    interrupts,
    stopped,
)
from fastres.machine.memory import peak_memory, reset_peak_memory
from fastres.member import Member, introduction, make_members
from fastres.resolve import prepare_for
from fastres.result import RunResult, result_of, summary
from fastres.rundir import CONFIG, DIVERGED, RunDir
from fastres.runfolders import found_again, new_run_folder, remove_empty, resume_with
from fastres.runstate import RunState, load_states, record_environment, take_folders
from fastres.runtime import Runtime, synchronize, usual_torch
from fastres.step import TrainStep
from fastres.steptimer import StepTimer, milliseconds


def train(
    config: RunConfig | None = None,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    verbosity: Verbosity = "auto",
    console: Console | None = None,
    clocks: Clocks | None = None,
    deadline: float = math.inf,
) -> RunResult:
    """Train one network and test it; everything about it is kept in its run folder.

    torch's switches for the precision of products, for cuDNN and determinism stay as the run had them.

    Args:
        config: What to train and how; `fastres.make_config` builds it. Default: the paper's ResNet-20 on CIFAR-10.
        resume: A run folder to resume, from its newest whole checkpoint. Then `config` may be left out; where it is
            given it must compute the same thing.
        overwrite: Move a run or sweep that is in `config.output.out` aside instead of refusing it.
        verbosity: "live", "lines", "quiet", or "auto": live on a terminal, lines elsewhere.
        console, clocks: The command line's own, which began before this call.
        deadline: When to save and stop, on the clock of `time.perf_counter`, in seconds.

    Returns:
        The result; `result.test_error` is the last step's, a fraction.

    Raises:
        InputError: Bad data, run folder or checkpoint, or a `resume` of something else.
        MachineError: No data and no network, no GPU where one was asked for, a full disk.
        OutOfMemory: The batch does not fit.
        Diverged: The loss became NaN or Inf; the last good checkpoint is kept.
        Interrupted: SIGINT, SIGTERM, SIGHUP or SIGUSR1 (main thread only); the state was saved.
        OutOfTime: The deadline has come; the state was saved.
    """
    check_config(config)
    if resume is not None and overwrite:
        raise InputError(f"resume={str(resume)!r} goes on with that run, and overwrite moves it aside; leave one out")
    here = Path() if console else Path.cwd()  # a program may go elsewhere while this trains, a command does not
    console = console or Console(verbosity)
    run = None
    if resume is not None:
        run, config = _reopen(here / given_path("resume", resume), config)
        if run.status == "finished":
            console.say(f"{run.path} is finished: nothing to resume")
            return result_of(run)
    config = config or RunConfig()
    out = config.output.out
    path = run.path if run else here / (given_path("output.out", out) if out else new_run_folder(config))
    if run is None:
        RunDir.check_free(path, overwrite=overwrite)  # before minutes are spent on a download
    folders = {path: config}
    interrupt = Interrupt(resume_with(path), deadline)
    try:
        (outcome,) = train_together(folders, interrupt, overwrite=overwrite, console=console, clocks=clocks)
    except BaseException:
        if run is None and not out:
            remove_empty(path)  # nothing came of it
        raise
    if isinstance(outcome, Diverged):
        raise outcome
    return outcome


def train_together(
    folders: Mapping[Path, RunConfig],
    interrupt: Interrupt,
    *,
    overwrite: bool = False,
    console: Console,
    clocks: Clocks | None = None,
    brief: bool = False,
    shared: bool = False,
    on_begin: Callable[[Sequence[Path]], None] = lambda _: None,
) -> list[RunResult | Diverged]:
    """Train runs side by side, a step of each in turn; on a GPU the turns are parallel branches of one graph.

    Each comes out as it would alone. They share the images, the clock, and the step at which they are: runs that were
    cut go on from the newest step that all of them have saved.

    Args:
        folders: Configs that differ in their seed alone, by run folder. A folder that is a run's goes on with it.
        interrupt: Its deadline is kept. Signals are noted in it, also one that comes too late to cut these runs.
        overwrite, console, clocks: As `train`.
        brief: Print one line of each result; the rest is in its console.log.
        shared: Leave out runs that another process trains; else they are an error.
        on_begin: Takes the folders of those that are trained.

    Returns:
        A result for each that was trained, or why it was abandoned. The others go on without it.

    Raises:
        As `train`, but for Diverged.
    """
    clocks, config = clocks or Clocks(), next(iter(folders.values()))
    check_loader(config)
    with usual_torch(), clocks("other"), contextlib.closing(console), contextlib.ExitStack() as stack:
        with clocks("compile"):
            runtime = prepare_for(config, console.say)
        check_memory(config, runtime, num_replicas=len(folders))
        for note in runtime.notes:
            console.say_once(note)
        with clocks("data"):
            images = load_images(config.data, config.execution, say=console.say_once, progress=console.download)
        taken = take_folders(folders, stack, overwrite=overwrite, shared=shared, say=console.say_once)
        if not taken:
            return []
        runs, configs = list(taken), list(taken.values())
        interrupt.folders = [run.path for run in runs]
        on_begin(interrupt.folders)
        stack.enter_context(interrupts(interrupt))
        stack.enter_context(explained_memory_errors(config, runtime, num_replicas=len(runs)))
        stack.enter_context(explained_full_disk(interrupt))
        console.attach(*runs)
        stack.callback(console.attach)  # what is said afterwards is about something else
        begun = any((run.path / CONFIG).exists() for run in runs)
        saved = load_states(runs, images, console.say) if begun else [None] * len(runs)
        for run, own, checkpoint in zip(runs, configs, saved, strict=True):
            if checkpoint is None:
                run.write_json(CONFIG, own.to_dict())
            run.remove(DIVERGED)
        return _run(configs, runs, runtime, images, saved, console, clocks, interrupt, brief=brief)


def _run(
    configs: Sequence[RunConfig],
    runs: Sequence[RunDir],
    runtime: Runtime,
    images: ImageSet,
    saved: Sequence[Checkpoint | None],
    console: Console,
    clocks: Clocks,
    interrupt: Interrupt,
    *,
    brief: bool,
) -> list[RunResult | Diverged]:
    """Build, train, test, save. A step counts as done after its update; all records name the number of steps done."""
    config = configs[0]  # the others have another seed, and all else in common
    recipe, output = config.recipe, config.output

    with contextlib.ExitStack() as stack:
        # Build. Chance is a function of the seed: weights here, samples in the epoch plan.
        reset_peak_memory(runtime.device)
        mean = images.mean_image()
        members = make_members(configs, runs, images, mean, runtime, clocks, stack, console.say)
        for member, checkpoint in zip(members, saved, strict=True):
            record_environment(member.run, runtime, images, member.replica.loader.name, checkpoint, console.say)
        train_step = TrainStep([member.replica for member in members])
        if runtime.needs_warm_up:
            _warm_up(train_step, members, runtime, clocks, console)

        # Resume, or begin.
        done = first = _restore(train_step, members, saved, clocks)
        if first:
            console.say(f"resuming from step {first:,} of {', '.join(str(run.path) for run in runs)}")
        first_line, *notes = introduction(members, images, runtime)
        console.say(first_line)
        for note in notes:
            console.say_once(note)
        progress = Progress(first, recipe.steps, config.data.num_train / recipe.batch_size, runs=len(runs))
        progress.elapsed, progress.held_out = clocks.total(), config.data.held_out
        console.show(progress)
        logged, logged_at = done, clocks.read("train")  # or, at first, where this process began
        epoch_shown = int(progress.epochs)
        began = saved_at = perf_counter()
        timer, step_seconds, since_log = StepTimer(runtime.device), list[float](), list[float]()
        alive, interrupt.training = members, True

        with clocks("train"):
            timer.begin()
            while done < recipe.steps:
                stop = pace.next_stop(config, [member.state.warmup_end for member in alive], first, done)
                wake = min(pace.save_time(config, saved_at), interrupt.deadline)
                while True:
                    launched = train_step(done, stop)
                    timer.mark(launched)
                    done += launched
                    console.tick(done)
                    if done == stop or interrupt.signum is not None or perf_counter() >= wake:
                        break
                last = done == recipe.steps

                if done == first + pace.LOOK_AHEAD_STEPS:
                    synchronize(runtime.device)  # host sync: once a run, to know how long it will take
                    if warning := pace.long_run(perf_counter() - began, done - first, recipe.steps - done):
                        console.say(f"{warning} Ctrl-C saves; {interrupt.way_on}")

                if ended := [member for member in alive if member.end_warm_up_if_due(done)]:
                    rates = f"lr {ended[0].lr_at(done - 1):.4g} -> {ended[0].lr_at(done):.4g}"
                    console.say(f"step {done:,}: warm-up ends, {rates}", *(member.run for member in ended))

                cut = interrupt.signum is not None or perf_counter() >= interrupt.deadline
                saves = last or cut or pace.is_due(config, done, saved_at)
                logs, tests_now = last or done % output.log_every == 0, last or done % output.eval_every == 0
                if not (logs or tests_now or saves):
                    continue
                for member in alive:
                    member.read(done, runtime.precision)  # host sync
                seconds = clocks.read("train")  # after it: else it would be the seconds of launching
                if saves:
                    train_step.check()  # else a graph may read freed memory
                since_log += timer.collect()
                measured = {
                    "train": seconds,
                    "images_per_second": (done - logged) * recipe.batch_size / (seconds - logged_at),
                    "step_milliseconds": milliseconds(since_log),
                    "peak_memory": peak_memory(runtime.device),
                }
                for member in [member for member in alive if not member.diverged]:
                    if logs:
                        member.log(measured)
                    if tests_now:
                        member.evaluate(clocks)
                    if saves and not member.diverged:
                        member.save(images, mean, clocks)
                for member in alive:
                    if member.diverged and len(members) > 1:
                        console.say(f"{member.run.path} is abandoned: {member.diverged}")
                alive = [member for member in alive if not member.diverged]
                if not alive:
                    break
                if logs:
                    logged, logged_at = done, seconds
                    step_seconds += since_log
                    since_log = []
                if saves:
                    saved_at = perf_counter()
                if logs or tests_now:
                    _update(progress, alive, done)
                    progress.elapsed = clocks.total()
                    progress.remaining = (perf_counter() - began) / (done - first) * (recipe.steps - done)
                    console.show(progress, line=last or tests_now or int(progress.epochs) > epoch_shown)
                    epoch_shown = int(progress.epochs)
                timer.begin()
                if cut and not last:
                    raise stopped(interrupt, f"after step {done}")

        # The result: the last step's test error.
        if first == recipe.steps:  # cut between the last checkpoint and the result
            for member in members:
                member.evaluate(clocks, record=False)
        of_run = {
            "step_milliseconds": milliseconds(step_seconds),
            "peak_memory": peak_memory(runtime.device),
            "side_by_side": len(members),
        }
        outcomes = [member.diverged or member.finish(images, clocks, of_run) for member in members]
        console.close()
        for member, outcome in zip(members, outcomes, strict=True):
            if isinstance(outcome, RunResult):
                first_line, *lines = summary(outcome, member.config, images)
                console.say(first_line, member.run)
                for line in lines:
                    member.run.say(line) if brief else console.say(line, member.run)
        return outcomes


def _warm_up(
    train_step: TrainStep, members: Sequence[Member], runtime: Runtime, clocks: Clocks, console: Console
) -> None:
    """Compile and capture what trains and what tests, before the clock of training runs."""
    console.say("compiling (later runs of the same model find the result in the compiler's cache)")
    with clocks("compile"), explained_compilation(runtime):
        capture = CapturedGraph if runtime.cuda_graph else None
        train_step.warm_up(capture, graph_steps=members[0].config.execution.graph_steps)
        for member in members:
            member.warm_up_tests()


def _restore(
    train_step: TrainStep, members: Sequence[Member], saved: Sequence[Checkpoint | None], clocks: Clocks
) -> int:
    """Have the members stand where their checkpoints are, or at their beginning; the number of steps done there."""
    for member, checkpoint in zip(members, saved, strict=True):
        if checkpoint:
            member.state = RunState.restored(checkpoint, member.replica)
        member.set_lrs()
    clocks.add(members[0].state.seconds)
    done = members[0].state.step
    train_step.seek(done)
    return done


def _reopen(path: Path, asked: RunConfig | None) -> tuple[RunDir, RunConfig]:
    """The folder of a run to resume and its config: as stored, execution and output as asked."""
    run = RunDir.open(path)
    stored = run.config()
    run.check_same(stored if asked is None else asked)
    out = asked.output.out if asked else None
    if out and out != stored.output.out and given_path("output.out", out).resolve() != path.resolve():
        raise InputError(f"output.out is {out}, and the run to resume {path}; leave one out")
    return run, asked or RunConfig.from_dict(found_again(stored.to_dict()))


def check_config(config: object) -> None:
    """Raise InputError for what a user might take for a config: a preset's name, a dict."""
    if config is not None and not isinstance(config, RunConfig):
        raise InputError(f"config is {config!r}; build one with fastres.make_config, as make_config('smoke')")


def _update(progress: Progress, members: Sequence[Member], done: int) -> None:
    """What a person is shown: of several runs the mean."""
    progress.step, progress.lr = done, members[0].lr
    if all(member.train for member in members):
        progress.loss = fmean(member.train["loss"] for member in members)
        progress.train_error = fmean(member.train["error"] for member in members)
        progress.images_per_second = sum(member.train["clock"]["images_per_second"] for member in members)
    tests = [member.tested.error for member in members if member.tested]
    progress.test_error = fmean(tests) if tests else None
