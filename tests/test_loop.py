"""loop.py: what a run leaves behind, when it stops, and that a resumed run is the run that never stopped."""

import errno
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastres
from fastres import build, checkpoint, loop, member, pace
from fastres.cli import run
from fastres.clock import Clocks
from fastres.config import RunConfig
from fastres.data import synthetic
from fastres.data.imageset import ImageSet
from fastres.errors import Diverged, InputError, Interrupted, MachineError, OutOfMemory
from fastres.evaluator import Evaluation, Evaluator
from fastres.files import disk_error
from fastres.models.depth import IMAGENET_BLOCKS
from fastres.rundir import RunDir
from fastres.runstate import RunState
from fastres.step import Replica, TrainStep
from fastres.steptimer import milliseconds
from fastres.sweep import train_seeds
from tests.runs import assert_same_run, timeless_metrics, tiny

FOUR = np.arange(4, dtype=np.uint8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted tiny run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    fastres.train(tiny(out), verbosity="quiet")
    return out


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, signum: int = signal.SIGTERM) -> None:
    """Send this process a signal while 0-based step `step` is computed."""
    take = TrainStep.__call__

    def stopped(self: TrainStep, now: int, stop: int | None = None) -> int:
        if now == step:
            os.kill(os.getpid(), signum)
        return take(self, now, stop)

    monkeypatch.setattr(TrainStep, "__call__", stopped)


def train_until(monkeypatch: pytest.MonkeyPatch, step: int, config: RunConfig) -> None:
    """Train a run that is cut while 0-based step `step` is computed."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Interrupted):
            fastres.train(config, verbosity="quiet")


def test_the_run_folder(whole: Path) -> None:
    names = {p.name for p in whole.iterdir()}
    assert names >= {"config.json", "environment.json", "metrics.jsonl", "console.log", "result.json"}
    assert names >= {"checkpoint.safetensors", "checkpoint.previous.safetensors", "curves.png", "curves.svg"}
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["data"]["digest"].startswith("sha256:")
    assert environment["torch"] == torch.__version__
    result = json.loads((whole / "result.json").read_text())
    records = timeless_metrics(whole)
    assert [r["step"] for r in records if r["kind"] == "train"] == [5, 10, 15, 20, 24]
    tests = [r for r in records if r["kind"] == "test"]
    assert [r["step"] for r in tests] == [12, 24]
    assert result["test_error"] == tests[-1]["error"]
    assert result["best_test_error"] == min(r["error"] for r in tests)
    assert [r["lr"] for r in records if r["kind"] == "train"] == pytest.approx([0.05, 0.05, 0.005, 0.0005, 0.0005])
    assert set(result["seconds"]) >= {"data", "train", "evaluate", "checkpoint", "other"}
    for record in (r for r in RunDir(whole).metrics() if r["kind"] == "train"):
        assert 0 < record["clock"]["step_milliseconds"]["p50"] <= record["clock"]["step_milliseconds"]["p99"]
        assert record["clock"]["peak_memory"] > 0


def test_metrics_say_what_the_steps_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record's loss and error are the means over its own window, taken here from the steps themselves."""
    seen: list[tuple[float, int]] = []
    take = TrainStep.__call__

    def watched(self: TrainStep, step: int, stop: int | None = None) -> int:
        take(self, step, stop)
        seen.append((float(self.replicas[0].losses[step]), int(self.replicas[0].errors[step])))
        return 1

    monkeypatch.setattr(TrainStep, "__call__", watched)
    fastres.train(tiny(tmp_path / "run"), verbosity="quiet")
    start = 0
    for record in (r for r in timeless_metrics(tmp_path / "run") if r["kind"] == "train"):
        window = seen[start : record["step"]]
        assert record["loss"] == pytest.approx(math.fsum(loss for loss, _ in window) / len(window), rel=1e-12)
        assert record["error"] == sum(wrong for _, wrong in window) / (16 * len(window))
        start = record["step"]
    assert start == 24


def test_equal_seeds_equal_runs_and_other_seeds_not(whole: Path, tmp_path: Path) -> None:
    fastres.train(tiny(tmp_path / "same"), verbosity="quiet")
    assert_same_run(whole, tmp_path / "same")
    fastres.train(tiny(tmp_path / "other", seed=1), verbosity="quiet")
    assert timeless_metrics(tmp_path / "other") != timeless_metrics(whole)


def test_what_the_caller_has_set_changes_nothing(whole: Path, tmp_path: Path) -> None:
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    usual_threads, threads = torch.get_num_threads(), 3
    try:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_float32_matmul_precision("medium")
        torch.manual_seed(5)
        chance = torch.rand(1, device="cpu")
        torch.manual_seed(5)
        with torch.inference_mode():
            fastres.train(tiny(tmp_path / "run"), verbosity="quiet")
            fastres.load(tmp_path / "run", device="cpu")(np.zeros((1, 32, 32, 3), np.uint8))
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_device().type == "meta"
        assert (torch.get_num_threads(), torch.rand(1, device="cpu")) == (threads, chance)
    finally:
        torch.set_num_threads(usual_threads)
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        torch.set_float32_matmul_precision(precision)
    assert_same_run(whole, tmp_path / "run")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match=r"inside torch\.autocast"):
        fastres.train(tiny(tmp_path / "cast"), verbosity="quiet")


def test_a_resume_with_other_arithmetic_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train_until(monkeypatch, 9, tiny(out))
    environment = json.loads((out / "environment.json").read_text())
    (out / "environment.json").write_text(json.dumps({**environment, "threads": 77, "resumed": 5}))
    fastres.train(resume=out, verbosity="quiet")
    said = (out / "console.log").read_text()
    assert f"begun with other arithmetic (threads 77 -> {environment['threads']}): from here on" in said


def test_a_run_goes_on_by_the_command_that_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a plain net, whose shortcuts do nothing."""
    out = tmp_path / "run"
    train_until(monkeypatch, 3, tiny(out, model={"arch": "plain"}, recipe={"steps": 5}))
    assert run(["train", "--resume", str(out), "-q"]) == 0
    assert (out / "result.json").exists()


def test_a_damaged_record_of_the_machine_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train_until(monkeypatch, 9, tiny(out))
    written = json.loads((out / "environment.json").read_text())
    (out / "environment.json").write_text('{"x": [')
    fastres.train(resume=out, verbosity="quiet")
    assert json.loads((out / "environment.json").read_text()).keys() == written.keys()
    assert "environment.json cannot be read" in (out / "console.log").read_text()


def test_a_result_needs_a_record_of_the_training(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    (tmp_path / "run/metrics.jsonl").write_text("rubbish\n")
    with pytest.raises(InputError, match=r"no record of the training.*fastres eval"):
        fastres.train(resume=tmp_path / "run", verbosity="quiet")


@pytest.mark.parametrize("then", ["deleted", "replaced"])
def test_a_run_whose_folder_was_moved_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    """It would write into the folder that has its name now."""
    out, take = tmp_path / "run", TrainStep.__call__

    def moved(self: TrainStep, step: int, stop: int | None = None) -> int:
        if step == 7:
            out.rename(tmp_path / "elsewhere")
            if then == "replaced":
                shutil.copytree(tmp_path / "elsewhere", out)
        return take(self, step, stop)

    monkeypatch.setattr(TrainStep, "__call__", moved)
    with pytest.raises(MachineError, match="was moved, replaced or deleted"):
        fastres.train(tiny(out), verbosity="quiet")
    assert out.exists() == (then == "replaced")
    if then == "replaced":
        assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "elsewhere/metrics.jsonl").read_bytes()


def test_a_checkpoint_is_not_written_into_anothers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write after the move is the checkpoint's, at step 7."""
    out, take = tmp_path / "run", TrainStep.__call__

    def replaced(self: TrainStep, step: int, stop: int | None = None) -> int:
        if step == 6:
            out.rename(tmp_path / "elsewhere")
            shutil.copytree(tmp_path / "elsewhere", out)
        return take(self, step, stop)

    monkeypatch.setattr(TrainStep, "__call__", replaced)
    with pytest.raises(MachineError, match="was moved, replaced or deleted"):
        fastres.train(tiny(out), verbosity="quiet")
    assert not (out / checkpoint.NEWEST).exists()


def test_the_best_step_is_the_first_of_equal_ones() -> None:
    state = RunState()
    for step in (12, 24):
        state.record_evaluation(Evaluation(0.5, [[1, 1], [1, 1]]), step)
    assert (state.best_error, state.best_step) == (0.5, 12)


def test_a_tensor_of_another_shape_does_not_fit(tmp_path: Path) -> None:
    """copy_ would spread a single number over all places."""
    out = tmp_path / "run"
    fastres.train(tiny(out), verbosity="quiet")
    saved = checkpoint.load(out / checkpoint.NEWEST)
    saved.tensors["fc.bias"] = torch.zeros(1)
    (out / "result.json").unlink()
    for _ in range(2):
        checkpoint.save(out, saved.tensors, saved.meta)
    with pytest.raises(InputError, match=r"fc\.bias is missing or has another shape"):
        fastres.train(resume=out, verbosity="quiet")


def test_a_test_loss_of_nan_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda self: replace(test(self), loss=math.nan))
    with pytest.raises(Diverged, match="the test loss is nan at step 12"):
        fastres.train(tiny(tmp_path / "run", output={"checkpoint_every": "6"}), verbosity="quiet")
    assert not (tmp_path / "run/result.json").exists()
    assert checkpoint.load(tmp_path / "run" / checkpoint.NEWEST).meta["step"] == 6  # none of what it said nan of


@pytest.mark.parametrize(
    ("step", "signum"), [(0, signal.SIGTERM), (9, signal.SIGINT), (11, signal.SIGTERM), (22, signal.SIGINT)]
)
def test_interrupted_and_resumed_is_uninterrupted(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, signum: signal.Signals
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, signum)
        with pytest.raises(Interrupted, match=f"--resume {out}") as caught:
            fastres.train(tiny(out), verbosity="quiet")
    assert caught.value.exit_code == 128 + signum
    saved = checkpoint.load(out / checkpoint.NEWEST).meta
    assert saved["step"] == step + 1
    fastres.train(resume=out, verbosity="quiet")
    assert_same_run(whole, out)
    first = next(r for r in RunDir(out).metrics() if r["kind"] == "train" and r["step"] > step + 1)
    taken = first["clock"]["images_per_second"] * (first["clock"]["train"] - saved["clock"]["train"]) / 16
    assert taken == pytest.approx(first["step"] - (step + 1))  # steps of this process


def test_stopped_while_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny(tmp_path / "run", execution={"compile": True})
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "warm_up", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted, match="before the first step; resume with: fastres train --resume"):
            fastres.train(run, verbosity="quiet")
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "warm_up", lambda *_, **__: Path("/dev/null/cache").mkdir())
        with pytest.raises(MachineError, match=r"compiling does not work here: NotADirectoryError.*--no-compile"):
            fastres.train(resume=tmp_path / "run", verbosity="quiet")


def test_a_folder_that_another_process_takes_while_the_images_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"steps": 2}

    def while_loading(other: RunConfig) -> None:
        def loading(*args: Any, **how: Any) -> ImageSet:
            monkeypatch.setattr("fastres.loop.load_images", build.load_images)
            fastres.train(other, verbosity="quiet")
            return build.load_images(*args, **how)

        monkeypatch.setattr("fastres.loop.load_images", loading)

    while_loading(tiny(tmp_path / "run", recipe=short, seed=5))
    with pytest.raises(InputError, match=r"run was started with another config \(.*seed: 5 -> 0"):
        fastres.train(tiny(tmp_path / "run"), verbosity="quiet")
    assert RunDir(tmp_path / "run").config().seed == 5
    while_loading(tiny(tmp_path / "same", recipe=short))
    with pytest.raises(InputError, match="same was finished by another process just now"):
        fastres.train(tiny(tmp_path / "same", recipe=short), verbosity="quiet")


def test_the_result_does_not_depend_on_a_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(member, "draw_curves", lambda *_, **__: pytest.fail("drawn"))
        with pytest.raises(pytest.fail.Exception):
            fastres.train(tiny(tmp_path / "run", recipe={"steps": 2}), verbosity="quiet")
    assert RunDir(tmp_path / "run").read_json("result.json")["steps"] == 2


def test_a_loader_with_dice_of_its_own_is_for_benchmarks(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", execution={"loader": "torchvision"})
    for train in (fastres.train, lambda config, **how: train_seeds(config, (0, 1), **how)):
        with pytest.raises(InputError, match=r"torchvision uses its own random crops and flips.*resident or dali"):
            train(config, verbosity="quiet")
    assert not list(tmp_path.iterdir())


def test_handlers_are_put_back(whole: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fastres.train(tiny(tmp_path / "run", recipe={"steps": 2}), verbosity="quiet")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_resume_from_the_previous_checkpoint_when_the_newest_is_damaged(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train_until(monkeypatch, 15, tiny(out))
    newest = out / checkpoint.NEWEST
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    fastres.train(resume=out, verbosity="quiet")
    assert "; passed over" in (out / "console.log").read_text()
    assert "resuming from step 14" in (out / "console.log").read_text()
    assert_same_run(whole, out)


def test_a_run_without_checkpoint_starts_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    RunDir.create(out).write_json("config.json", tiny(out).to_dict())
    (out / "metrics.jsonl").write_text('{"kind": "train", "step": 5}\n')
    fastres.train(resume=out, verbosity="quiet")
    assert_same_run(whole, out)


def test_a_run_that_diverges_before_its_first_checkpoint_does_not_promise_one(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="nothing had been saved yet"):
        fastres.train(tiny(tmp_path / "run", recipe={"lr": 1e30}, output={"log_every": 2}), verbosity="quiet")


def test_a_finished_run_is_not_trained_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainStep, "__call__", lambda *_: pytest.fail("trained"))
    result = fastres.train(resume=whole, verbosity="quiet")
    assert result.test_error == json.loads((whole / "result.json").read_text())["test_error"]
    assert result.run == whole


def test_a_run_cut_between_its_last_checkpoint_and_its_result_gets_the_result(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "result.json").unlink()
    result = fastres.train(resume=out, verbosity="quiet").to_dict()
    expected = json.loads((whole / "result.json").read_text())
    timed = ("run", "seconds", "images_per_second", "step_milliseconds", "peak_memory")
    assert {k: v for k, v in result.items() if k not in timed} == {k: expected[k] for k in result if k not in timed}
    assert_same_run(whole, out)


def test_resume_refuses_another_config_and_names_the_differences(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe\.lr: 0\.05 -> 0\.2.*seed: 0 -> 3"):
        fastres.train(tiny(tmp_path, recipe={"lr": 0.2}, seed=3), resume=whole, verbosity="quiet")


def test_resume_refuses_a_config_that_was_edited(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train_until(monkeypatch, 9, tiny(out))
    before = (out / "config.json").read_text()
    (out / "config.json").write_text(before.replace('"steps": 24', '"steps": 30'))
    with pytest.raises(InputError, match=r"config\.json was changed since checkpoint\.safetensors.*steps.*24.*30"):
        fastres.train(resume=out, verbosity="quiet")
    (out / "config.json").write_text(before)
    fastres.train(resume=out, verbosity="quiet")
    assert_same_run(whole, out)


def test_milestones_that_never_come_are_told(tmp_path: Path) -> None:
    for steps, told in ((2, True), (13, False)):
        out = tmp_path / str(steps)
        fastres.train(tiny(out, recipe={"steps": steps}), verbosity="quiet")
        assert ("the learning rate never falls" in (out / "console.log").read_text()) == told


def test_resume_refuses_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train_until(monkeypatch, 3, tiny(out))
    load = build.load_images

    def other_data(*args: Any, **kwargs: Any) -> Any:
        return replace(load(*args, **kwargs), digest="sha256:other")

    monkeypatch.setattr(loop, "load_images", other_data)
    with pytest.raises(InputError, match="sha256:other"):
        fastres.train(resume=out, verbosity="quiet")


def test_a_nan_loss_stops_at_the_next_log_step_and_keeps_the_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = TrainStep.__call__

    def poisoned(self: TrainStep, step: int, stop: int | None = None) -> int:
        take(self, step, stop)
        if step == 16:
            with torch.no_grad():
                self.replicas[0].net.get_parameter("fc.bias").fill_(float("nan"))
        return 1

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    config = tiny(tmp_path / "run", recipe={"schedule": "step", "milestones": [18, 19]})  # of the 18th step 0.05
    with pytest.raises(Diverged, match=r"nan at step 18 \(lr 0\.05, .*last good checkpoint"):
        fastres.train(config, verbosity="quiet")
    saved = checkpoint.load(tmp_path / "run" / checkpoint.NEWEST)
    assert saved.meta["step"] == 14
    assert checkpoint.all_finite(saved.tensors)
    assert not (tmp_path / "run" / "result.json").exists()
    assert RunDir(tmp_path / "run").read_json("diverged.json")["step"] == 18  # not that at which it was noticed


def test_nan_weights_are_never_saved_even_while_the_loss_is_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = TrainStep.__call__

    def poisoned(self: TrainStep, step: int, stop: int | None = None) -> int:
        take(self, step, stop)
        if step == 13:  # the step after which the second checkpoint is due
            with torch.no_grad():
                self.replicas[0].net.get_parameter("fc.bias").fill_(float("inf"))
        return 1

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    with pytest.raises(Diverged, match="weight or momentum"):
        fastres.train(tiny(tmp_path / "run"), verbosity="quiet")
    assert checkpoint.load(tmp_path / "run" / checkpoint.NEWEST).meta["step"] == 7


def test_constant_warmup_ends_is_logged_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    warm = {"warmup": "constant", "warmup_steps": 8, "warmup_lr": 0.001, "milestones": [12]}
    result = fastres.train(tiny(out, recipe=warm), verbosity="quiet")
    assert result.warmup_end == 8
    records = timeless_metrics(out)
    assert {"kind": "warmup_end", "step": 8, "lr": 0.05} in records
    assert [r["lr"] for r in records if r["kind"] == "train"] == pytest.approx([0.001, 0.05, 0.005, 0.005, 0.005])
    assert checkpoint.load(out / checkpoint.NEWEST).meta["warmup_end"] == 8


def answer_wrongly(monkeypatch: pytest.MonkeyPatch, *, until: int) -> None:
    """15 of 16 answers are wrong up to a step, above 80 %, then 4; the warm-up's window and pace are shrunk."""
    monkeypatch.setattr("fastres.optim.WARMUP_WINDOW", 8)
    monkeypatch.setattr("fastres.runstate.WARMUP_WINDOW", 8)
    monkeypatch.setattr("fastres.optim.WARMUP_LOOK_EVERY", 4)
    monkeypatch.setattr("fastres.config.FIRST_LOOK", 8)
    take = TrainStep.__call__

    def scripted(self: TrainStep, step: int, stop: int | None = None) -> int:
        take(self, step, stop)
        self.replicas[0].errors[step] = 15 if step < until else 4
        return 1

    monkeypatch.setattr(TrainStep, "__call__", scripted)


def test_warmup_by_error_waits_for_the_error_and_survives_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's rule, so that it fires within a tiny run, then resumed across it."""
    answer_wrongly(monkeypatch, until=10)
    recipe = {"warmup": "error", "warmup_lr": 0.001}
    # Steps 5..12 hold 6 x 15 + 2 x 4 = 98 of 128 wrong, below 80 %: it ends when step 12 is looked at, not at step 8.
    assert fastres.train(tiny(tmp_path / "whole", recipe=recipe), verbosity="quiet").warmup_end == 12
    train_until(monkeypatch, 10, tiny(tmp_path / "cut", recipe=recipe))
    fastres.train(resume=tmp_path / "cut", verbosity="quiet")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_warmup_by_error_looks_at_its_own_window_and_not_at_the_last_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_wrongly(monkeypatch, until=11)
    # At step 12 the eight steps before it hold 109 wrong of 128; the two since the last log only 19 of 32.
    recipe = {"warmup": "error", "warmup_lr": 0.001}
    assert fastres.train(tiny(tmp_path / "run", recipe=recipe), verbosity="quiet").warmup_end == 16


def test_a_warmup_that_never_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastres.config.FIRST_LOOK", 24)
    with pytest.raises(Diverged, match="warm-up never ended"):
        fastres.train(tiny(tmp_path / "run", recipe={"warmup": "error"}), verbosity="quiet")


def test_a_long_run_says_so_by_step_20(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "LONG_RUN_SECONDS", 0)
    fastres.train(tiny(tmp_path / "run"), verbosity="quiet")
    log = (tmp_path / "run" / "console.log").read_text()
    assert "remaining 4 steps take about" in log
    assert "--preset fast" in log


def test_a_resumed_run_says_so_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "LONG_RUN_SECONDS", 0)
    monkeypatch.setattr(pace, "LOOK_AHEAD_STEPS", 5)
    train_until(monkeypatch, 10, tiny(tmp_path / "run"))
    fastres.train(resume=tmp_path / "run", verbosity="quiet")
    log = (tmp_path / "run" / "console.log").read_text()
    assert "remaining 19 steps take about" in log  # the first process, after five steps
    assert re.search(r"remaining (8|9) steps take about", log)  # and the second


def test_steps_are_timed_without_what_is_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests, logs and checkpoints are not of a step; each record is of the steps since the one before."""
    test, take, now, seen = Evaluator.__call__, TrainStep.__call__, [0.0], list[int]()

    def slow(self: Evaluator) -> Evaluation:
        now[0] += 100.0
        return test(self)

    def timed(self: TrainStep, step: int, stop: int | None = None) -> int:
        now[0] += 0.25
        return take(self, step, stop)

    def counted(seconds: list[float]) -> dict[str, float]:
        seen.append(len(seconds))
        return milliseconds(seconds)

    monkeypatch.setattr(Evaluator, "__call__", slow)
    monkeypatch.setattr(TrainStep, "__call__", timed)
    monkeypatch.setattr("fastres.steptimer.perf_counter", lambda: now[0])
    monkeypatch.setattr(loop, "milliseconds", counted)
    output = {"log_every": 6, "eval_every": 6, "checkpoint_every": "60min"}
    fastres.train(tiny(tmp_path / "run", output=output), verbosity="quiet")
    assert seen == [6, 6, 6, 6, 24]
    records = [record for record in RunDir(tmp_path / "run").metrics() if record["kind"] == "train"]
    assert [record["clock"]["step_milliseconds"] for record in records] == [{"p50": 250.0, "p99": 250.0}] * 4


def test_checkpoints_by_the_clock_come_once_in_that_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, save, steps = [0.0], checkpoint.save, list[int]()

    def later() -> float:
        return now[0]

    take = TrainStep.__call__

    def step_of_a_minute(self: TrainStep, step: int, stop: int | None = None) -> int:
        now[0] += 61.0
        return take(self, step, stop)

    def noted(folder: Path, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        steps.append(meta["step"])
        save(folder, tensors, meta)

    monkeypatch.setattr(TrainStep, "__call__", step_of_a_minute)
    monkeypatch.setattr(checkpoint, "save", noted)
    for module in (loop, pace):
        monkeypatch.setattr(module, "perf_counter", later)
    fastres.train(tiny(tmp_path / "run", output={"checkpoint_every": "10min"}), verbosity="quiet")
    assert steps == [10, 20, 24]


def test_out_of_memory_names_a_batch_that_may_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(TrainStep, "__call__", full)
    with pytest.raises(OutOfMemory, match="--batch-size 8"):
        fastres.train(tiny(tmp_path / "run"), verbosity="quiet")


def test_no_gpu_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="--device cpu"):
        fastres.train(tiny(tmp_path / "run", execution={"device": "cuda"}), verbosity="quiet")
    assert not (tmp_path / "run").exists()


def test_a_program_may_go_elsewhere_while_it_trains(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    take = TrainStep.__call__

    def gone(self: TrainStep, step: int, stop: int | None = None) -> int:
        if step == 3:
            os.chdir(tmp_path / "elsewhere")
        return take(self, step, stop)

    monkeypatch.setattr(TrainStep, "__call__", gone)
    result = fastres.train(tiny(Path("run")), verbosity="quiet")
    assert result.run == tmp_path / "run"
    assert_same_run(whole, result.run)
    os.chdir(tmp_path)
    sweep = train_seeds(tiny(Path("sweep"), recipe={"steps": 5}), [3], verbosity="quiet")
    assert sweep[0].run == tmp_path / "sweep/seed3"  # type: ignore[union-attr]


def test_home_is_where_the_shell_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    short = {"recipe": {"steps": 2, "batch_size": 8}}
    assert fastres.train(tiny(Path("~/run"), **short), verbosity="quiet").run == tmp_path / "run"
    assert fastres.train(resume="~/run", verbosity="quiet").run == tmp_path / "run"
    assert fastres.load("~/run", device="cpu").step == 2
    train_seeds(tiny(Path("~/sweep"), **short), 1, verbosity="quiet")
    assert (tmp_path / "sweep/seed0/result.json").exists()


def test_a_full_disk_says_what_is_saved_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, append = tmp_path / "run", RunDir.append_metrics

    def full(self: RunDir, record: Mapping[str, Any]) -> None:
        if record["step"] > 7:
            raise disk_error(OSError(errno.ENOSPC, "No space left on device"), self.path)
        append(self, record)

    monkeypatch.setattr(RunDir, "append_metrics", full)
    with pytest.raises(MachineError) as caught:
        fastres.train(tiny(out), verbosity="quiet")
    assert str(caught.value) == (
        f"no room on the disk in {out}; free some; the newest checkpoint is of step 7; "
        f"resume with: fastres train --resume {out}"
    )


def test_works_outside_the_main_thread(whole: Path, tmp_path: Path) -> None:
    """A notebook server may run cells in any thread, where no signal handler can be set."""
    errors: list[BaseException] = []

    def target() -> None:
        try:
            fastres.train(tiny(tmp_path / "run"), verbosity="quiet")
        except BaseException as error:  # noqa: BLE001 (handed to the test)
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert not errors
    assert_same_run(whole, tmp_path / "run")


def test_fp16_scaler_survives_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(synthetic.make_synthetic(), test_images=np.zeros((4, 32, 32, 3), np.uint8), test_labels=FOUR)
    monkeypatch.setattr(synthetic, "make_synthetic", lambda: few)  # fp16 is slow on a CPU
    half = {"execution": {"precision": "fp16"}, "recipe": {"steps": 4, "batch_size": 4}}
    fastres.train(tiny(tmp_path / "whole", **half), verbosity="quiet")
    train_until(monkeypatch, 2, tiny(tmp_path / "cut", **half))
    fastres.train(resume=tmp_path / "cut", verbosity="quiet")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_goes_on_in_another_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(synthetic.make_synthetic(), test_images=np.zeros((4, 32, 32, 3), np.uint8), test_labels=FOUR)
    monkeypatch.setattr(synthetic, "make_synthetic", lambda: few)

    def config(precision: str) -> RunConfig:
        return tiny(tmp_path / "run", execution={"precision": precision}, recipe={"steps": 6, "batch_size": 4})

    train_until(monkeypatch, 1, config("fp32"))
    for step, precision in ((2, "fp16"), (3, "bf16")):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(Interrupted):
                fastres.train(config(precision), resume=tmp_path / "run", verbosity="quiet")
    assert math.isfinite(fastres.train(config("fp16"), resume=tmp_path / "run", verbosity="quiet").test_loss)


def test_loaders_give_the_same_run(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    fastres.train(tiny(tmp_path / "dali", execution={"loader": "dali"}), verbosity="quiet")
    assert_same_run(whole, tmp_path / "dali")


def test_clocks_count_every_second_once() -> None:
    clocks = Clocks()
    with clocks("outer"):
        with clocks("inner"):
            pass
        before = clocks.total()
    assert clocks.total() >= before
    assert set(clocks.totals()) == {"outer", "inner"}
    frozen = clocks.total()
    assert clocks.total() == frozen  # no phase runs: no time is counted


def test_the_training_clock_counts_finished_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a launch returns at once, and reading the log is what waits."""
    window = Replica.window

    def slow(self: Replica, start: int, stop: int) -> Any:
        time.sleep(0.1)
        return window(self, start, stop)

    monkeypatch.setattr(Replica, "window", slow)
    fastres.train(tiny(tmp_path / "run"), verbosity="quiet")
    records = [r for r in RunDir.open(tmp_path / "run").metrics() if r["kind"] == "train"]
    for number, record in enumerate(records, 1):
        assert record["clock"]["train"] > 0.1 * number
        assert record["clock"]["images_per_second"] < 16 * 5 / 0.1


def test_what_is_no_config_is_refused(tmp_path: Path, whole: Path) -> None:
    for wrong in ("smoke", {"seed": 1}, 5):
        with pytest.raises(InputError, match=r"build one with fastres.make_config"):
            fastres.train(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"build one with fastres.make_config"):
            train_seeds(wrong, 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="verbosity is 'loud'; use auto, live, lines, quiet"):
        fastres.train(tiny(tmp_path / "run"), verbosity="loud")  # type: ignore[arg-type]
    before = sorted(path.name for path in whole.parent.iterdir())
    with pytest.raises(InputError, match=r"output\.out is .*other, and the run to resume .*; leave one out"):
        fastres.train(tiny(tmp_path / "other"), resume=whole)
    with pytest.raises(InputError, match="resume is 5; give a path"):
        fastres.train(resume=5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="side_by_side is -3"):
        train_seeds(tiny(tmp_path / "x"), 2, side_by_side=-3)
    with pytest.raises(InputError, match="overwrite moves it aside; leave one out"):
        fastres.train(resume=whole, overwrite=True)
    assert sorted(path.name for path in whole.parent.iterdir()) == before


def test_the_training_error_is_over_an_epoch_or_a_tenth_of_the_run(whole: Path) -> None:
    records = [{"kind": "train", "step": step, "error": error} for step, error in ((5, 0.9), (10, 0.5), (14, 0.25))]
    records.insert(1, {"kind": "test", "step": 5, "error": 0.1})
    for last_steps, error in ((1, 0.25), (4, 0.25), (5, (4 * 0.25 + 5 * 0.5) / 9), (391, (1 + 2.5 + 4.5) / 14)):
        assert member._last_train_error(records, last_steps) == pytest.approx(error)
    (last,) = [r for r in timeless_metrics(whole) if (r["kind"], r["step"]) == ("train", 24)]  # a window of 4 steps
    assert json.loads((whole / "result.json").read_text())["train_error"] == last["error"]  # a tenth of 24 is 3


def test_a_cifar_network_of_an_imagenet_networks_depth_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    monkeypatch.setitem(IMAGENET_BLOCKS, 8, (1, 1, 1, 1))
    fastres.train(tiny(tmp_path / "run", recipe={"steps": 1}), verbosity="quiet")
    told = "this is a CIFAR network; ImageNet's of that depth is --model ImageNetResNet8\n"
    assert told in (tmp_path / "run" / "console.log").read_text()
    assert told not in (whole / "console.log").read_text()
