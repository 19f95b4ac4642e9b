"""What a run must remember to go on as if it had never stopped, and how that becomes a checkpoint and back."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres import checkpoint
from fastres.checkpoint import Checkpoint
from fastres.config import RunConfig
from fastres.data.imageset import Float32Array, ImageSet
from fastres.data.pixels import SCALE
from fastres.errors import Diverged, InputError, InUse
from fastres.evaluator import Evaluation
from fastres.machine.environment import environment
from fastres.optim import WARMUP_WINDOW, momentum_buffers
from fastres.rundir import CONFIG, ENVIRONMENT, RunDir
from fastres.runtime import Runtime
from fastres.step import Replica


@dataclass
class RunState:
    """Where a run is, beside the tensors that its `TrainStep` holds."""

    step: int = 0  # steps done
    logged: int = 0  # steps that the metrics cover
    warmup_end: int | None = None  # steps done when warm-up ended
    best_error: float = 1.0  # fraction, over the evaluations so far
    best_step: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by clock, of the processes before this one

    def record_evaluation(self, result: Evaluation, step: int) -> None:
        """Take note of an evaluation."""
        if self.best_step == 0 or result.error < self.best_error:
            self.best_error, self.best_step = result.error, step

    def save(
        self,
        run: RunDir,
        replica: Replica,
        config: RunConfig,
        images: ImageSet,
        mean: Float32Array,
        seconds: Mapping[str, float],
    ) -> None:
        """Write a checkpoint. Waits for the device.

        Mean image and class names travel in it, so that `fastres eval` needs no training set.

        Raises:
            Diverged: A weight is NaN or Inf; nothing is written, the last good checkpoint stays.
            MachineError: The disk is full.
        """
        start = min(self.logged, max(0, self.step - WARMUP_WINDOW))  # what the log and the warm-up rule will still need
        tensors: dict[str, Tensor] = {
            **replica.net.state_dict(),
            **{f"momentum/{k}": v for k, v in momentum_buffers(replica.net, replica.optimizer).items()},
            "log/losses": replica.losses[start : self.step],
            "log/errors": replica.errors[start : self.step],
            "data/mean": torch.from_numpy(mean),
        }
        if not checkpoint.all_finite(tensors):
            raise Diverged(
                f"a weight or momentum is NaN or Inf at step {self.step:,}; {last_good(run)}. {calmer(replica.dtype)}"
            )
        meta = {
            "step": self.step,
            "logged": self.logged,
            "log_start": start,
            "warmup_end": self.warmup_end,
            "best_error": self.best_error,
            "best_step": self.best_step,
            "scaler": replica.scaler.state_dict(),
            "config": config.to_dict(),
            "data": {
                **images.facts(),
                "test_digest": images.test_digest,
                "class_names": list(images.class_names),
                "scale": SCALE,  # with the mean, all of the normalisation
            },
            "clock": dict(seconds),
        }
        run.sync_metrics()
        run.check_held()
        checkpoint.save(run.path, tensors, meta)

    @staticmethod
    def restored(saved: Checkpoint, replica: Replica) -> "RunState":
        """Put a checkpoint's tensors back in place and return the rest."""
        meta = saved.meta
        copies = {**replica.net.state_dict()}
        copies |= {f"momentum/{k}": v for k, v in momentum_buffers(replica.net, replica.optimizer).items()}
        window = slice(meta["log_start"], meta["step"])
        copies |= {"log/losses": replica.losses[window], "log/errors": replica.errors[window]}
        with torch.no_grad():
            for name, tensor in copies.items():
                if name not in saved.tensors or saved.tensors[name].shape != tensor.shape:
                    raise InputError(
                        f"{saved.path} does not fit the run's network: {name} is missing or has another shape"
                    )
                tensor.copy_(saved.tensors[name])
        if meta["scaler"]:  # else it was saved in another precision
            replica.scaler.load_state_dict(meta["scaler"])
        return RunState(
            meta["step"],
            meta["logged"],
            meta["warmup_end"],
            meta["best_error"],
            meta["best_step"],
            dict(meta["clock"]),
        )


def last_good(run: RunDir) -> str:
    """What is left of a run whose numbers became NaN or Inf, in words."""
    if checkpoint.steps(run.path):
        return f"the last good checkpoint is kept in {run.path}"
    return f"nothing had been saved yet in {run.path}"


def calmer(dtype: torch.dtype) -> str:
    """What to try where numbers became NaN or Inf."""
    return "Try a lower --lr, or a --warmup" + ("" if dtype == torch.float32 else ", or --precision fp32")


def take_folders(
    folders: Mapping[Path, RunConfig],
    stack: ExitStack,
    *,
    overwrite: bool,
    shared: bool,
    say: Callable[[str], None],
) -> dict[RunDir, RunConfig]:
    """Lock the folders of runs for this process, and make those that are missing.

    Args:
        folders: Configs by run folder; a run that is there must have been started with the same.
        stack: Holds the locks.
        overwrite: Move what is there aside.
        shared: Leave out a run that another process has, and `say` so.

    Returns:
        The runs that this process has now, with their configs.

    Raises:
        InUse: Another process has a run, and they are not shared.
        InputError: A folder holds another run, or something else.
        MachineError: It cannot be made or written.
    """
    taken: dict[RunDir, RunConfig] = {}
    for path, config in folders.items():
        try:
            run = RunDir.create(path, overwrite=overwrite)
        except InputError:
            if overwrite or not (path / CONFIG).exists():
                raise
            run = RunDir(path)  # a run to resume; also one of a process that began since the caller looked
        try:
            stack.enter_context(run.locked())
            if (path / CONFIG).exists():
                run.check_same(config)
            if run.status == "finished" or (shared and run.ended):
                raise InUse(f"{path} was finished by another process just now; nothing is left to train")
        except InUse:
            if not shared:
                raise
            say(f"{path} is trained by another process: left to it")
            continue
        taken[run] = config
    return taken


def load_states(runs: Sequence[RunDir], images: ImageSet, say: Callable[[str], None]) -> list[Checkpoint | None]:
    """The checkpoints from which runs go on together, their metrics cut back to them; None for all is step 0.

    Runs that train side by side are saved one after the other, so a crash in between leaves some of them a checkpoint
    ahead: they go on from the newest step that all have.

    Raises:
        InputError: Of a run no checkpoint is whole, or the data is not what it was trained on.
    """
    choices = [_choices(run, say) for run in runs]
    common = max(set.intersection(*({saved.meta["step"] for saved in own} | {0} for own in choices)))
    chosen: list[Checkpoint | None] = []
    for run, own in zip(runs, choices, strict=True):
        saved = next((saved for saved in own if saved.meta["step"] == common), None)
        if saved is None:
            newest = (
                f"has saved step {own[0].meta['step']:,}, which the runs beside it have not"
                if own
                else "has no checkpoint yet"
            )
            say(f"{run.path} {newest}: starting at step 0")
        else:
            if changed := RunConfig.from_dict(saved.meta["config"]).differs_from(run.config()):
                raise InputError(
                    f"{run.path / CONFIG} was changed since {saved.path.name} was saved ({'; '.join(changed)}); "
                    "change it back, or start anew with another --out"
                )
            theirs = saved.meta["data"]["digest"]
            if theirs != images.digest:
                raise InputError(
                    f"{run.path} was trained on data with digest {theirs}, but {images.source} has {images.digest}; "
                    "give the same data with --data-dir"
                )
        chosen.append(saved)
    for run, saved in zip(runs, chosen, strict=True):
        checkpoint.move_newer_aside(run.path, saved.path if saved else None)
        run.cut_back(saved.meta["step"] if saved else 0)
    return chosen


def _choices(run: RunDir, say: Callable[[str], None]) -> list[Checkpoint]:
    """The whole checkpoints of a run, newest first."""
    whole, problems = checkpoint.load_all(run.path)
    for problem in problems:
        say(f"{problem}; passed over")
    return whole


# Of environment.json: where one differs, sums are taken in another order or rounded otherwise.
ROUNDING = (
    "gpu", "cpu", "threads", "precision", "native", "layer_kernels", "channels_last", "compile", "compile_mode",
    "torch",
)  # fmt: skip


def data_note(images: ImageSet) -> dict[str, Any]:
    """The data set, as environment.json and result.json record it."""
    return {
        **images.facts(),
        "source": images.source,
        "num_train": len(images.train_images),
        "num_test": len(images.test_images),
    }


def record_environment(
    run: RunDir,
    runtime: Runtime,
    images: ImageSet,
    loader: str,
    saved: Checkpoint | None,
    say: Callable[[str], None],
) -> None:
    """Write environment.json; a resumed run keeps the first process's and lists its own under "resumed".

    `say` is told where the two do not compute to the same bit.
    """
    now = {**environment(runtime), "loader": loader, "data": data_note(images)}
    if saved is None or not (run.path / ENVIRONMENT).exists():
        run.write_json(ENVIRONMENT, now)
        return
    try:
        first = run.read_json(ENVIRONMENT)
    except InputError as error:
        say(f"{error}; written anew, as of this process")
        run.write_json(ENVIRONMENT, now)
        return
    before = first.get("resumed")
    resumed = [*(before if isinstance(before, list) else []), {"step": saved.meta["step"], **now}]
    run.write_json(ENVIRONMENT, {**first, "resumed": resumed})
    others = [f"{key} {first.get(key)} -> {now[key]}" for key in ROUNDING if first.get(key, now[key]) != now[key]]
    if others:
        say(f"begun with other arithmetic ({'; '.join(others)}): from here on numbers may differ in rounding")
