"""What a finished run gave: the value, its file, and how it is told to a person."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastres.config import RunConfig
from fastres.configtree import is_number
from fastres.console import duration, percent
from fastres.data.imageset import ImageSet, short_digest
from fastres.errors import InputError
from fastres.files import typed
from fastres.rundir import RESULT, RunDir

# How a person is told of the clocks besides training's.
PHASES = {
    "import": "importing", "data": "loading data", "compile": "compiling", "evaluate": "testing",
    "checkpoint": "checkpoints", "other": "setup",
}  # fmt: skip
LEAST_SECONDS = 0.05  # of a clock that is told


@dataclass(frozen=True)
class RunResult:
    """What a finished run gave. Errors are fractions of the evaluated images, 0 to 1."""

    run: Path
    test_error: float  # of the last step: the number to report
    test_loss: float  # mean cross-entropy, last step
    best_test_error: float  # over all evaluations; chosen on the test set, so never the result
    best_step: int
    train_error: float  # running error over the last epoch (at most a tenth of the run) or a little more
    class_errors: list[float | None]  # test error by class, last step
    steps: int
    warmup_end: int | None  # step at which warm-up ended; None without one
    num_parameters: int
    images_per_second: float  # training clock alone
    step_milliseconds: dict[str, float]  # "p50" and "p99", of this process's steps; empty if it took none
    peak_memory: int  # bytes: of the GPU's memory where there is one, else of the process
    side_by_side: int  # runs that were trained at once, and share its clocks, peak memory and step time
    seconds: dict[str, float]  # by clock: import, data, compile, train, evaluate, checkpoint, other

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "run": str(self.run)}


def result_of(run: RunDir) -> RunResult:
    """The result of a finished run. Raises InputError where it is not finished or its file is damaged."""
    remedy = f"Remove that file, and resuming the run makes it again: fastres train --resume {typed(run.path)}"
    try:
        values = run.read_json(RESULT)
    except InputError as error:
        raise InputError(f"{error}. {remedy}" if run.status == "finished" else str(error)) from error
    found = {key: values.get(key) for key in RunResult.__dataclass_fields__ if key != "run"}
    for key, value in found.items():
        if not _fits(key, value):
            raise InputError(f"{run.path / RESULT} is damaged: {key} is {value!r}. {remedy}")
    if found["steps"] != (wanted := run.config().recipe.steps):
        raise InputError(f"{run.path / RESULT} is of {found['steps']:,} steps, and the run has {wanted:,}. {remedy}")
    return RunResult(run=run.path, **found)  # type: ignore[arg-type]  # checked above


def _fits(key: str, value: object) -> bool:
    """Whether a value out of a JSON file can be that field of a `RunResult`."""
    if key in ("seconds", "step_milliseconds"):
        return isinstance(value, dict) and all(map(is_number, value.values()))
    if key == "class_errors":
        return isinstance(value, list) and all(error is None or _is_share(error) for error in value)
    if key.endswith("_error"):
        return _is_share(value)
    if key == "warmup_end":
        return value is None or is_number(value)
    return is_number(value) and (key != "side_by_side" or value >= 1)


def _is_share(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1


def summary(result: RunResult, config: RunConfig, images: ImageSet) -> list[str]:
    """What a person wants to know at the end, line by line."""
    held_out = config.data.held_out
    seconds, step = result.seconds, result.step_milliseconds
    labelled = "" if images.official else f"  (data set not the official one: {short_digest(images.digest)})"
    together = f", one of {result.side_by_side} runs side by side" if result.side_by_side > 1 else ""
    best = (
        f"{percent(result.best_test_error)} at step {result.best_step:,} (chosen on the {held_out} images: no result)"
    )
    name = f"{config.name}, seed {config.seed}, after {result.steps:,} steps"
    lines = [
        f"{name}: {held_out} error {percent(result.test_error)}{labelled}",
        *([f"  best over steps   {best}"] if result.best_step < result.steps else []),
        f"  training error    {percent(result.train_error)} (running, augmented)",
        f"  training clock    {duration(seconds.get('train', 0.0))}, {result.images_per_second:,.0f} img/s{together}",
    ]
    if step:
        lines.append(
            f"  step time         {_short(step['p50'])} ms (median), {_short(step['p99'])} ms (99th percentile)"
        )
    lines.append(f"  peak memory       {result.peak_memory / 1e9:.2f} GB")
    for name, value in seconds.items():
        if name != "train" and value >= LEAST_SECONDS:
            lines.append(f"  {PHASES.get(name, name):<17} {duration(value)}")
    return [
        *lines,
        f"  run folder        {result.run}",
        f"  curves            {result.run / 'curves.png'}",
        f"  evaluate          fastres eval {typed(result.run)}",
        f"  more plots        fastres plot {typed(result.run)}",
    ]


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1_000 else f"{number:.3g}"
