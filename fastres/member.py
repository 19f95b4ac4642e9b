"""One run among those that a loop trains: what it has of its own, and what it writes into its folder."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastres import optim
from fastres.build import build_evaluators, build_loaders, build_net, build_optimizer
from fastres.clock import Clocks
from fastres.config import RunConfig
from fastres.configtree import is_number
from fastres.data.imageset import Float32Array, ImageSet
from fastres.errors import Diverged, InputError
from fastres.evaluator import Evaluation, Evaluator
from fastres.files import typed
from fastres.models.cifar import num_parameters
from fastres.models.depth import IMAGENET_BLOCKS
from fastres.optim import LrSchedule
from fastres.plots.curves import draw_curves
from fastres.result import RunResult
from fastres.rundir import DIVERGED, METRICS, RESULT, RunDir
from fastres.runstate import RunState, calmer, data_note, last_good
from fastres.runtime import Runtime
from fastres.step import Replica, Window

# Steps that the training error at a run's end is over: an epoch of 50,000 images in batches of 128, but no more than a
# tenth of the run.
LAST_STEPS = 391


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

    def lr_at(self, step: int) -> float:
        """The learning rate of 0-based step `step`, as far as one knows now."""
        return LrSchedule(self.config.recipe).at(step, self.state.warmup_end)

    def set_lrs(self, start: int = 0) -> None:
        """The learning rates of 0-based step `start` and all after it."""
        self.replica.set_lrs(self.lr_at, start)

    def warm_up_tests(self) -> None:
        """Compile and capture what tests the network."""
        self.test.warm_up()
        if self.clean:
            self.clean.warm_up()

    def end_warm_up_if_due(self, done: int) -> bool:
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
        self.set_lrs(done)
        self.run.append_metrics({"kind": "warmup_end", "step": done, "lr": self.lr_at(done)})
        return True

    def read(self, done: int, precision: str) -> None:
        """Take the losses and errors since the last log from the device (a host sync). NaN or Inf: `diverged`."""
        self.state.step, self.lr = done, self.lr_at(done - 1)
        self._window = self.replica.window(self.state.logged, done)
        for offset, loss in enumerate(self._window.losses):
            if not math.isfinite(loss):
                step = self._window.start + offset + 1
                how = f"lr {self.lr_at(step - 1):.4g}, {precision}"
                self._give_up(
                    step,
                    f"the loss became {loss} at step {step:,} ({how}); {last_good(self.run)}. "
                    f"{calmer(self.replica.dtype)}",
                )
                return

    def log(self, clock: Mapping[str, Any]) -> None:
        """Write the metrics since the last log.

        Args:
            clock: What was measured: `train`, the seconds of training so far, and since the last log of this process
                `images_per_second` and `step_milliseconds`; `peak_memory` so far.
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
            "clock": dict(clock),
        }
        self.run.append_metrics(self.train)
        self.state.logged = done

    def evaluate(self, clocks: Clocks, *, record: bool = True) -> None:
        """Test the network, and write what came out."""
        done = self.state.step
        with clocks("evaluate"):
            self.tested = self.test()
            clean = self.clean() if self.clean and record else None
        if not math.isfinite(self.tested.loss):
            self._give_up(
                done,
                f"the test loss is {self.tested.loss} at step {done:,}; {last_good(self.run)}. "
                f"{calmer(self.replica.dtype)}",
            )
            return
        if not record:
            return
        self.state.record_evaluation(self.tested, done)
        for kind, result in (("test", self.tested), ("train_clean", clean)):
            if result is not None:
                numbers = {"kind": kind, "step": done, "loss": result.loss, "error": result.error}
                self.run.append_metrics({**numbers, "clock": {"evaluate": clocks.read("evaluate")}})

    def save(self, images: ImageSet, mean: Float32Array, clocks: Clocks) -> None:
        """Write a checkpoint, but not of weights with NaN or Inf: `diverged`. Raises MachineError."""
        with clocks("checkpoint"):
            try:
                self.state.save(self.run, self.replica, self.config, images, mean, clocks.totals())
            except Diverged as error:
                self._give_up(self.state.step, str(error))

    def finish(self, images: ImageSet, clocks: Clocks, measured: Mapping[str, Any]) -> RunResult | Diverged:
        """The result of the run, all its steps done; it and the curves go into its folder.

        Args:
            images: It was trained and tested on.
            clocks: Of the loop.
            measured: `step_milliseconds`, `peak_memory` and `side_by_side` of `RunResult`.

        Returns:
            Diverged where a warm-up that must end never did.
        """
        config, state, net = self.config, self.state, self.replica.net
        assert self.tested is not None
        if config.recipe.warmup == "error" and state.warmup_end is None:
            return self._give_up(
                state.step,
                f"warm-up never ended: the training error was not seen below 80 % in {config.recipe.steps} "
                f"steps at lr {config.recipe.warmup_lr}; the run is kept in {self.run.path}. "
                "More --steps, or --warmup constant",
            )
        records = self.run.metrics()
        if not any(_is_training(record) for record in records):
            path = self.run.path
            raise InputError(
                f"{path / METRICS} has no record of the training, which the result needs. The weights are whole: "
                f"fastres eval {typed(path)}; for a result train anew, with another --out"
            )
        result = RunResult(
            run=self.run.path,
            test_error=self.tested.error,
            test_loss=self.tested.loss,
            best_test_error=state.best_error,
            best_step=state.best_step,
            train_error=_last_train_error(records, min(LAST_STEPS, math.ceil(config.recipe.steps / 10))),
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
        self.run.write_json(RESULT, {**result.to_dict(), "data": data_note(images)})
        title = f"{config.name}, {images.name}, seed {config.seed}"
        held_out = config.data.held_out
        draw_curves(records, title, self.run.path, note=images.caveat, held_out=held_out)
        return result

    def _give_up(self, step: int, why: str) -> Diverged:
        """Set `diverged`, and note it in the run folder, so that a sweep does not try the same thing again."""
        self.diverged = Diverged(why)
        self.run.write_json(DIVERGED, {"step": step, "why": why})
        return self.diverged


def _is_training(record: Mapping[str, Any]) -> bool:
    return record["kind"] == "train" and is_number(record.get("error"))


def _last_train_error(records: Sequence[Mapping[str, Any]], num_steps: int) -> float:
    """Over the last log windows that have so many steps together, or over all."""
    train = [record for record in records if _is_training(record)]
    wrong, steps, end = 0.0, 0, train[-1]["step"]
    for k in range(len(train) - 1, -1, -1):
        begin = train[k - 1]["step"] if k else 0
        wrong, steps = wrong + train[k]["error"] * (train[k]["step"] - begin), end - begin
        if steps >= num_steps:
            break
    return wrong / steps


def make_members(
    configs: Sequence[RunConfig],
    runs: Sequence[RunDir],
    images: ImageSet,
    mean: Float32Array,
    runtime: Runtime,
    clocks: Clocks,
    stack: contextlib.ExitStack,
    say: Callable[[str], None],
) -> list[Member]:
    """What is trained, with initial weights, at step 0; its loaders are closed with the stack. `say` takes notices."""
    config = configs[0]
    nets = [build_net(own, runtime, num_classes=len(images.class_names)) for own in configs]
    clean: Sequence[Evaluator | None] = [None] * len(runs)
    with clocks("data"):
        loaders = build_loaders(configs, images, mean, runtime, say)
        for loader in loaders:
            stack.enter_context(contextlib.closing(loader))
        tests = build_evaluators(nets, config, images, mean, runtime)
        if config.output.clean_train_error:
            clean = build_evaluators(nets, config, images, mean, runtime, train=True)
    replicas = [
        Replica(net, build_optimizer(net, config.recipe), loader, runtime, num_steps=config.recipe.steps)
        for net, loader in zip(nets, loaders, strict=True)
    ]
    return [Member(*parts) for parts in zip(configs, runs, replicas, tests, clean, strict=True)]


def introduction(members: Sequence[Member], images: ImageSet, runtime: Runtime) -> Iterator[str]:
    """What is about to be trained, and what may not be meant so."""
    config, replica = members[0].config, members[0].replica
    recipe, where = config.recipe, ", ".join(str(member.run.path) for member in members)
    together = f"{len(members)} runs side by side; " if len(members) > 1 else ""
    yield (
        f"{config.name}, {num_parameters(replica.net):,} parameters; {images.name}, {replica.loader.name} loader; "
        f"{runtime.device}, {runtime.precision}; {recipe.steps:,} steps of {recipe.batch_size} "
        f"({config.epochs:.1f} epochs); {together}{where}"
    )
    if config.model.arch == "resnet" and config.model.depth in IMAGENET_BLOCKS:
        yield f"this is a CIFAR network; ImageNet's of that depth is --model ImageNet{config.name}"
    if recipe.schedule == "step" and recipe.milestones and recipe.milestones[0] >= recipe.steps:
        yield (
            f"the learning rate never falls: the first of --milestones, {recipe.milestones[0]:,}, does not come "
            f"within {recipe.steps:,} steps"
        )
