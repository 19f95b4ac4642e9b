"""When the loop looks up from its steps: to log, test, save, end a warm-up, or say that it will take long."""

import math
from collections.abc import Sequence
from time import perf_counter

from fastres import optim
from fastres.config import RunConfig

LOOK_AHEAD_STEPS = 20  # after so many steps the whole run's time is known well enough to warn
LONG_RUN_SECONDS = 3_600


def next_stop(config: RunConfig, warmup_ends: Sequence[int | None], first: int, done: int) -> int:
    """The next number of steps done at which the loop has something to do; no launch may go beyond it.

    Args:
        config: Of the runs.
        warmup_ends: Of each run, None while its warm-up goes on.
        first: Steps done when this process began.
        done: Steps done now.
    """
    recipe, output = config.recipe, config.output
    stops = [recipe.steps, *(done + every - done % every for every in (output.log_every, output.eval_every))]
    if output.checkpoint_steps:
        stops.append(done + output.checkpoint_steps - done % output.checkpoint_steps)
    if done < first + LOOK_AHEAD_STEPS:
        stops.append(first + LOOK_AHEAD_STEPS)
    if None in warmup_ends:
        if recipe.warmup == "error":
            stops.append(done + optim.WARMUP_LOOK_EVERY - done % optim.WARMUP_LOOK_EVERY)
        elif recipe.warmup != "none":
            stops.append(max(recipe.warmup_steps, done + 1))
    return min(stops)


def save_time(config: RunConfig, saved_at: float) -> float:
    """When the next checkpoint is due by the clock."""
    return saved_at + (config.output.checkpoint_seconds or math.inf)


def is_due(config: RunConfig, done: int, saved_at: float) -> bool:
    """Whether it is time for a checkpoint, by steps or by the clock."""
    if config.output.checkpoint_steps:
        return done % config.output.checkpoint_steps == 0
    return perf_counter() >= save_time(config, saved_at)


def long_run(seconds: float, taken: int, left: int) -> str | None:
    """What to say where the rest of a run takes hours; None where it does not.

    Args:
        seconds: Since the first step.
        taken, left: Steps.
    """
    remaining = seconds / taken * left
    if remaining <= LONG_RUN_SECONDS:
        return None
    return (
        f"at {seconds / taken:.2g} s a step the remaining {left:,} steps take about {remaining / 3600:.1f} hours. "
        f"Shorter: a GPU, --preset fast, fewer --steps or a smaller --depth."
    )
