"""One run among those that a loop trains: what it has of its own, and what it writes into its folder."""

import functools
import math
from collections.abc import Mapping
from typing import Any

from fastres import optim
from fastres.build import Mean
from fastres.clock import Clocks
from fastres.config import RunConfig
from fastres.curves import draw_curves
from fastres.data.imageset import ImageSet
from fastres.errors import Diverged
from fastres.evaluator import Evaluation, Evaluator
from fastres.models.cifar import num_parameters
from fastres.optim import LrSchedule
from fastres.result import RunResult
from fastres.rundir import DIVERGED, RESULT, RunDir
from fastres.runstate import RunState, data_note, last_good
from fastres.step import Replica, Window


class Member:
    """A run in training.

    Args:
        config: Of the run; the members of a loop differ in their seed alone.
        run: Its folder.
        replica: Its network, optimizer and samples.
        test: Tests the network on the test images.
        clean: Tests it on the plain training images, where `output.clean_train_error` asks for it.

    Attributes:
        state: Where it stands.
        diverged: Why it is not trained any further.
        lr: Of the step taken last.
        train: Its last record of training, {} before the first.
        tested: Its last test.
    """

    def __init__(
        self, config: RunConfig, run: RunDir, replica: Replica, test: Evaluator, clean: Evaluator | None = None
    ) -> None:
        self.config, self.run, self.replica = config, run, replica
        self.test, self.clean = test, clean
        self.state = RunState()
        self.diverged: Diverged | None = None
        self.lr = 0.0
        self.train: dict[str, Any] = {}
        self.tested: Evaluation | None = None
        self._window = Window(0, [], [])

    def set_lrs(self, schedule: LrSchedule, start: int = 0) -> None:
        """The learning rates of 0-based step `start` and all after it."""
        self.replica.set_lrs(functools.partial(schedule.at, warmup_end=self.state.warmup_end), start)

    def ends_warm_up(self, schedule: LrSchedule, done: int) -> bool:
        """Whether the warm-up ends with `done` steps done; then the rates after it are set, and it is noted."""
        recipe, state = self.config.recipe, self.state
        if state.warmup_end is not None or recipe.warmup == "none":
            return False
        if recipe.warmup == "error":
            if done % optim.WARMUP_LOOK_EVERY != 0 or done < optim.WARMUP_WINDOW:
                return False
            # host sync: every 100 steps of the warm-up only
            window = self.replica.window(done - optim.WARMUP_WINDOW, done)
            if not optim.warmup_over(window.errors, recipe.batch_size):
                return False
        elif done < recipe.warmup_steps:
            return False
        state.warmup_end = done
        self.set_lrs(schedule, done)
        self.run.append_metrics({"kind": "warmup_end", "step": done, "lr": schedule.at(done, done)})
        return True

    def read(self, done: int, schedule: LrSchedule, precision: str) -> None:
        """Take the losses and errors since the last log from the device (a host sync).

        Raises:
            Diverged: A loss is NaN or Inf. It is noted in the run folder too.
        """
        self.state.step, self.lr = done, schedule.at(done - 1, self.state.warmup_end)
        self._window = self.replica.window(self.state.logged, done)
        for offset, loss in enumerate(self._window.losses):
            if not math.isfinite(loss):
                step = self._window.start + offset + 1
                raise self._note(
                    Diverged(
                        f"the loss became {loss} at step {step:,} (lr {self.lr:.4g}, {precision}); "
                        f"{last_good(self.run)}. "
                        "Try a lower --lr, a --warmup, or --precision fp32"
                    )
                )

    def log(self, seconds: float, since: float, measured: Mapping[str, Any]) -> None:
        """Write the metrics since the last log.

        Args:
            seconds, since: The training clock now, and at the last log.
            measured: `step_milliseconds` since then and `peak_memory` so far, as in `RunResult`.
        """
        config, done, window = self.config, self.state.step, self._window
        num_images = len(window.errors) * config.recipe.batch_size
        self.train = {
            "kind": "train",
            "step": done,
            "epoch": done * config.recipe.batch_size / config.data.num_train,
            "loss": math.fsum(window.losses) / len(window.losses),
            "error": sum(window.errors) / num_images,
            "lr": self.lr,
            "clock": {"train": seconds, "images_per_second": num_images / (seconds - since), **measured},
        }
        self.run.append_metrics(self.train)
        self.state.logged = done

    def evaluate(self, clocks: Clocks, *, record: bool = True) -> None:
        """Test the network, and write what came out."""
        done = self.state.step
        with clocks("evaluate"):
            self.tested = self.test()
            clean = self.clean() if self.clean and record else None
        if not record:
            return
        self.state.saw(self.tested, done)
        for kind, result in (("test", self.tested), ("train_clean", clean)):
            if result is not None:
                numbers = {"kind": kind, "step": done, "loss": result.loss, "error": result.error}
                self.run.append_metrics({**numbers, "clock": {"evaluate": clocks.read("evaluate")}})

    def save(self, images: ImageSet, mean: Mean, clocks: Clocks) -> None:
        """Write a checkpoint. Raises Diverged (noted) and MachineError, as `RunState.save`."""
        with clocks("checkpoint"):
            try:
                self.state.save(self.run, self.replica, self.config, images, mean, clocks.totals())
            except Diverged as error:
                raise self._note(error) from None

    def finish(self, images: ImageSet, clocks: Clocks, measured: Mapping[str, Any]) -> RunResult:
        """The result of the run, all its steps done; curves and result go into its folder.

        Args:
            images: It was trained and tested on.
            clocks: Of the loop.
            measured: `step_milliseconds`, `peak_memory` and `side_by_side` of `RunResult`.

        Raises:
            Diverged: A warm-up that must end never did.
        """
        config, state, net = self.config, self.state, self.replica.net
        assert self.tested is not None
        if config.recipe.warmup == "error" and state.warmup_end is None:
            raise self._note(
                Diverged(
                    f"warm-up never ended: the training error stayed at or above 80 % for all {config.recipe.steps} "
                    f"steps at lr {config.recipe.warmup_lr}; the run is kept in {self.run.path}. "
                    "More --steps, or --warmup constant"
                )
            )
        records = self.run.metrics()
        result = RunResult(
            run=self.run.path,
            test_error=self.tested.error,
            test_loss=self.tested.loss,
            best_test_error=state.best_error,
            best_step=state.best_step,
            train_error=next(record["error"] for record in reversed(records) if record["kind"] == "train"),
            class_errors=self.tested.class_errors,
            steps=config.recipe.steps,
            warmup_end=state.warmup_end,
            num_parameters=num_parameters(net),
            images_per_second=config.recipe.steps * config.recipe.batch_size / clocks.read("train"),
            seconds=clocks.totals(),
            **measured,
        )
        clock = {"seconds": result.seconds, "images_per_second": result.images_per_second, **measured}
        self.run.append_metrics({"kind": "end", "step": state.step, "clock": clock})
        title = f"{config.name}, {images.name}, seed {config.seed}"
        held_out = config.data.held_out
        draw_curves(records, title, self.run.path, note=images.caveat, held_out=held_out)
        self.run.write_json(RESULT, {**result.to_dict(), "data": data_note(images)})
        return result

    def _note(self, error: Diverged) -> Diverged:
        """The error, written into the run folder, so that a sweep does not try the same thing again."""
        self.diverged = error
        self.run.write_json(DIVERGED, {"step": self.state.step, "why": str(error)})
        return error
