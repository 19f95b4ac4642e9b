"""The training loop, one function read from top to bottom."""

import contextlib
import functools
import math
import signal
from pathlib import Path
from time import perf_counter
from typing import Any

from fastres import optim
from fastres.build import build_evaluator, build_loader, build_net, build_optimizer, load_images, lr_schedule
from fastres.checkpoint import Checkpoint
from fastres.clock import Clocks
from fastres.config import Output, Recipe, RunConfig, differences
from fastres.console import Console, Progress, Verbosity
from fastres.cudagraph import CapturedGraph
from fastres.curves import draw_curves
from fastres.data.imageset import ImageSet
from fastres.errors import Diverged, InputError, Interrupted
from fastres.guards import Interrupt, explained_memory_errors, interrupts
from fastres.models.cifar import num_parameters
from fastres.result import RunResult, result_of, summary
from fastres.rundir import CONFIG, ENVIRONMENT, RESULT, RunDir, default_path
from fastres.runstate import RunState, data_note, load_state
from fastres.runtime import Runtime, environment, peak_memory, prepare, synchronize
from fastres.step import Replica, TrainStep, Window
from fastres.steptimer import StepTimer, milliseconds

LOOK_AHEAD_STEPS = 20  # after so many steps the whole run's time is known well enough to warn
LONG_RUN_SECONDS = 3_600


def train(
    config: RunConfig | None = None,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    verbosity: Verbosity = "auto",
    console: Console | None = None,
    clocks: Clocks | None = None,
) -> RunResult:
    """Train one network and test it; everything about it is kept in its run folder.

    Args:
        config: What to train and how; `fastres.make_config` builds it. Default: the paper's ResNet-20 on CIFAR-10.
        resume: A run folder to go on with, from its newest whole checkpoint. Then `config` may be left out; where it is
            given it must compute the same thing.
        overwrite: Move a non-empty `config.output.out` aside instead of refusing it.
        verbosity: "live", "lines", "quiet", or "auto": live on a terminal, lines elsewhere.
        console, clocks: The command line's own, which began before this call.

    Returns:
        The result; `result.test_error` is the last step's, a fraction.

    Raises:
        InputError: Bad data, run folder or checkpoint, or a `resume` of something else.
        MachineError: No data and no network, no GPU where one was asked for, a full disk.
        OutOfMemory: The batch does not fit.
        Diverged: The loss became NaN or Inf; the last good checkpoint is kept.
        Interrupted: SIGINT or SIGTERM (main thread only); the state was saved.
    """
    console, clocks = console or Console(verbosity), clocks or Clocks()
    with clocks("other"), contextlib.closing(console):
        run = None
        if resume is not None:
            run, config = _reopen(Path(resume), config)
            if (run.path / RESULT).exists():
                console.say(f"{run.path} is finished: nothing to resume")
                return result_of(run)
        config = config or RunConfig()
        path = run.path if run else Path(config.output.out) if config.output.out else default_path(config)
        if run is None:
            RunDir.check_free(path, overwrite=overwrite)  # before minutes are spent on a download
        runtime = prepare(config.execution, depth=config.model.depth)
        for note in runtime.notes:
            console.say(note)
        with clocks("data"):
            images = load_images(config.data, config.execution, say=console.say, progress=console.download)
        run = run or RunDir.create(path, overwrite=overwrite)
        with run.locked(), interrupts() as interrupt, explained_memory_errors(config):
            console.attach(run)
            saved = load_state(run, images, console.say) if resume is not None else None
            if saved is None:
                run.write_json(CONFIG, config.to_dict())
            _record_environment(run, runtime, images, saved)
            return _run(config, run, runtime, images, saved, console, clocks, interrupt)


def _run(
    config: RunConfig,
    run: RunDir,
    runtime: Runtime,
    images: ImageSet,
    saved: Checkpoint | None,
    console: Console,
    clocks: Clocks,
    interrupt: Interrupt,
) -> RunResult:
    """Build, train, test, save. A step counts as done after its update; all records name the number of steps done."""
    recipe, output = config.recipe, config.output
    schedule = lr_schedule(recipe)

    # Build. Chance is a function of the seed: weights here, samples in the epoch plan.
    mean = images.mean_image()
    net = build_net(config, runtime, num_classes=len(images.class_names))
    optimizer = build_optimizer(net, recipe)
    with clocks("data"):
        loader = build_loader(config, images, mean, runtime)
    with contextlib.closing(loader):
        replica = Replica(net, optimizer, loader, runtime, num_steps=recipe.steps)
        train_step = TrainStep([replica])
        test = build_evaluator(net, config, images, mean, runtime)
        if runtime.compile_scope != "none" or runtime.cuda_graph:
            console.say("compiling (later runs of the same model find the result in the compiler's cache)")
            with clocks("compile"):
                capture = CapturedGraph if runtime.cuda_graph else None
                train_step.warm_up(capture, graph_steps=config.execution.graph_steps)

        # Resume, or begin.
        state = RunState.restored(saved, replica) if saved else RunState()
        train_step.seek(state.step)
        replica.set_lrs(functools.partial(schedule.at, warmup_end=state.warmup_end))
        clocks.add(state.seconds)
        first = state.step
        if saved:
            console.say(f"going on from step {first:,} of {run.path}")
        began = perf_counter()
        console.say(
            f"{config.name}, {num_parameters(net):,} parameters; {images.name}, {loader.name} loader; "
            f"{runtime.device}, {runtime.precision}; {recipe.steps:,} steps of {recipe.batch_size} "
            f"({config.epochs:.1f} epochs); {run.path}"
        )
        progress = Progress(first, recipe.steps, first * recipe.batch_size / config.data.num_train)
        console.show(progress)
        logged_at = clocks.read("train")
        saved_at, epoch_shown = perf_counter(), int(progress.epochs)
        timer, step_seconds = StepTimer(runtime.device), list[float]()

        with clocks("train"):
            timer.begin()
            while state.step < recipe.steps:
                launched = train_step(state.step, _next_stop(config, state, first))
                timer.mark(launched)
                state.step += launched
                done, lr = state.step, schedule.at(state.step - 1, state.warmup_end)
                last = done == recipe.steps
                console.tick(done)

                if done == first + LOOK_AHEAD_STEPS:
                    synchronize(runtime.device)  # host sync: once a run, to know how long it will take
                    _warn_if_long(console, run, perf_counter() - began, done - first, recipe.steps - done)

                if state.warmup_end is None and _warmup_is_over(recipe, replica, done):
                    state.warmup_end = done
                    replica.set_lrs(functools.partial(schedule.at, warmup_end=done), done)
                    run.append_metrics({"kind": "warmup_end", "step": done, "lr": schedule.at(done, done)})
                    console.say(f"step {done:,}: warm-up ends, lr {lr:.4g} -> {schedule.at(done, done):.4g}")

                signum = interrupt.signum
                saves = last or signum is not None or _is_due(output, done, saved_at)
                logs, tests = last or done % output.log_every == 0, last or done % output.eval_every == 0
                if logs or tests or saves:
                    window = replica.window(state.logged, done)  # host sync: losses and errors since the last log
                    _stop_if_diverged(window, lr, runtime, run)
                    step_seconds += timer.collect()
                if logs:
                    record = _train_record(window, config, state, lr, clocks, logged_at)
                    logged_at = record["clock"]["train"]
                    run.append_metrics(record)
                    state.logged = done
                    progress.loss, progress.train_error, progress.lr = record["loss"], record["error"], lr
                    progress.images_per_second = record["clock"]["images_per_second"]
                if tests:
                    with clocks("evaluate"):
                        result = test()
                    state.saw(result, done)
                    progress.test_error = result.error
                    run.append_metrics(
                        {
                            "kind": "test",
                            "step": done,
                            "loss": result.loss,
                            "error": result.error,
                            "clock": {"evaluate": clocks.read("evaluate")},
                        }
                    )
                if logs or tests:
                    progress.step, progress.epochs = done, done * recipe.batch_size / config.data.num_train
                    progress.elapsed = clocks.total()
                    progress.remaining = (perf_counter() - began) / (done - first) * (recipe.steps - done)
                    console.show(progress, line=last or tests or int(progress.epochs) > epoch_shown)
                    epoch_shown = int(progress.epochs)
                if saves:
                    with clocks("checkpoint"):
                        state.save(run, replica, config, images, mean, clocks.totals())
                    saved_at = perf_counter()
                if logs or tests or saves:
                    timer.begin()
                if signum is not None and not last:
                    raise Interrupted(
                        f"stopped by {signal.Signals(signum).name} after step {done}, all saved; "
                        f"to go on: fastres train --resume {run.path}",
                        signum,
                    )

        # The result: the last step's test error.
        if first == recipe.steps:  # cut between the last checkpoint and the result
            with clocks("evaluate"):
                result = test()
        records = run.metrics()
        draw_curves(records, f"{config.name}, {images.name}, seed {config.seed}", run.path)
        outcome = RunResult(
            run=run.path,
            test_error=result.error,
            test_loss=result.loss,
            best_test_error=state.best_error,
            best_step=state.best_step,
            train_error=next(record["error"] for record in reversed(records) if record["kind"] == "train"),
            class_errors=result.class_errors,
            steps=recipe.steps,
            warmup_end=state.warmup_end,
            num_parameters=num_parameters(net),
            images_per_second=recipe.steps * recipe.batch_size / clocks.read("train"),
            step_milliseconds=milliseconds(step_seconds),
            peak_memory=peak_memory(runtime.device),
            seconds=clocks.totals(),
        )
        if recipe.warmup == "error" and state.warmup_end is None:
            raise Diverged(
                f"warm-up never ended: the training error stayed at or above 80 % for all {recipe.steps} steps at lr "
                f"{recipe.warmup_lr}; the run is kept in {run.path}. More --steps, or --warmup constant"
            )
        run.write_json(RESULT, {**outcome.to_dict(), "data": data_note(images)})
        console.close()
        for line in summary(outcome, config, images):
            console.say(line)
        return outcome


def _reopen(path: Path, asked: RunConfig | None) -> tuple[RunDir, RunConfig]:
    """The folder of a run to resume and the config to go on with: as stored, execution and output as asked."""
    run = RunDir.open(path)
    stored = run.config()
    if asked is None:
        return run, stored
    if changed := differences(stored.what(), asked.what()):
        raise InputError(f"{path} was started with another config ({'; '.join(changed)}); leave these out to resume it")
    return run, asked


def _record_environment(run: RunDir, runtime: Runtime, images: ImageSet, saved: Checkpoint | None) -> None:
    """Write environment.json; a resumed run keeps the first process's and lists its own under "resumed"."""
    now = {**environment(runtime), "data": data_note(images)}
    if saved is None or not (run.path / ENVIRONMENT).exists():
        run.write_json(ENVIRONMENT, now)
        return
    first = run.read_json(ENVIRONMENT)
    resumed = [*first.get("resumed", []), {"step": saved.meta["step"], **now}]
    run.write_json(ENVIRONMENT, {**first, "resumed": resumed})


def _train_record(
    window: Window, config: RunConfig, state: RunState, lr: float, clocks: Clocks, since: float
) -> dict[str, Any]:
    """The metrics of the steps since the last log."""
    num_images = len(window.errors) * config.recipe.batch_size
    seconds = clocks.read("train")
    return {
        "kind": "train",
        "step": state.step,
        "epoch": state.step * config.recipe.batch_size / config.data.num_train,
        "loss": math.fsum(window.losses) / len(window.losses),
        "error": sum(window.errors) / num_images,
        "lr": lr,
        "clock": {"train": seconds, "images_per_second": num_images / (seconds - since)},
    }


def _stop_if_diverged(window: Window, lr: float, runtime: Runtime, run: RunDir) -> None:
    """Raise Diverged on the first loss that is NaN or Inf."""
    for offset, loss in enumerate(window.losses):
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss became {loss} at step {window.start + offset + 1:,} (lr {lr:.4g}, {runtime.precision}); "
                f"the last good checkpoint is kept in {run.path}. Try a lower --lr, a --warmup, or --precision fp32"
            )


def _warmup_is_over(recipe: Recipe, replica: Replica, done: int) -> bool:
    if recipe.warmup != "error":
        return recipe.warmup != "none" and done >= recipe.warmup_steps
    if done % optim.WARMUP_LOOK_EVERY != 0 or done < optim.WARMUP_WINDOW:
        return False
    # host sync: every 100 steps of the warm-up only
    window = replica.window(done - optim.WARMUP_WINDOW, done)
    return optim.warmup_over(window.errors, recipe.batch_size)


def _next_stop(config: RunConfig, state: RunState, first: int) -> int:
    """The next number of steps done at which the loop has something to do; no launch may go beyond it."""
    done, recipe, output = state.step, config.recipe, config.output
    stops = [recipe.steps, *(done + every - done % every for every in (output.log_every, output.eval_every))]
    if output.checkpoint_steps:
        stops.append(done + output.checkpoint_steps - done % output.checkpoint_steps)
    if done < first + LOOK_AHEAD_STEPS:
        stops.append(first + LOOK_AHEAD_STEPS)
    if state.warmup_end is None and recipe.warmup == "error":
        stops.append(done + optim.WARMUP_LOOK_EVERY - done % optim.WARMUP_LOOK_EVERY)
    elif state.warmup_end is None and recipe.warmup != "none":
        stops.append(max(recipe.warmup_steps, done + 1))
    return min(stops)


def _is_due(output: Output, done: int, saved_at: float) -> bool:
    """Whether it is time for a checkpoint, by steps or by the clock."""
    if output.checkpoint_steps:
        return done % output.checkpoint_steps == 0
    return perf_counter() - saved_at >= (output.checkpoint_seconds or math.inf)


def _warn_if_long(console: Console, run: RunDir, seconds: float, taken: int, left: int) -> None:
    """Say so where the rest of the run takes hours, with the ways out."""
    remaining = seconds / taken * left
    if remaining > LONG_RUN_SECONDS:
        console.say(
            f"at {seconds / taken:.2g} s a step the remaining {left:,} steps take about {remaining / 3600:.1f} hours. "
            "Shorter: a GPU, --preset fast, fewer --steps or a smaller --depth. "
            f"Ctrl-C saves; fastres train --resume {run.path} goes on"
        )
