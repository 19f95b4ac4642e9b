"""sweep.py: several seeds come out as each alone, side by side or in turn, cut or whole, and nothing is done twice."""

import contextlib
import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastres
from fastres import checkpoint, member, pace, sweep
from fastres.build import load_images
from fastres.cli import run
from fastres.cli.flags import parse_seeds
from fastres.clock import Clocks
from fastres.console import Console
from fastres.data.dali import dali_available
from fastres.errors import Diverged, InputError, Interrupted, InUse, MachineError, OutOfTime
from fastres.guards import Interrupt
from fastres.member import Member
from fastres.result import RunResult
from fastres.rundir import CONFIG, RunDir
from fastres.runfolders import find_runs
from fastres.step import Replica, TrainStep
from fastres.sweep import train_all, train_seeds
from fastres.sweepdir import read_sweep, write_sweep
from tests.runs import assert_same_run, tiny
from tests.test_loop import interrupt_at, train_until

SEEDS = (0, 1, 2)
needs_dali = pytest.mark.skipif(not dali_available(), reason="DALI is not installed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny runs of three seeds, each trained alone."""
    folder = tmp_path_factory.mktemp("alone")
    for seed in SEEDS:
        fastres.train(tiny(folder / f"seed{seed}", seed=seed), verbosity="quiet")
    return folder


def assert_same_runs(alone: Path, folder: Path, seeds: tuple[int, ...] = SEEDS) -> None:
    for seed in seeds:
        assert_same_run(alone / f"seed{seed}", folder / f"seed{seed}")


def written(folder: Path) -> dict[str, int]:
    """When each run's result was written."""
    return {run.path.name: (run.path / "result.json").stat().st_mtime_ns for run in find_runs([folder])}


@pytest.mark.parametrize("loader", ["resident", pytest.param("dali", marks=needs_dali)])
@pytest.mark.parametrize("side_by_side", [0, 2, 3])  # 0: on a CPU one after the other
def test_each_run_is_what_it_would_be_alone(alone: Path, tmp_path: Path, loader: str, side_by_side: int) -> None:
    config = tiny(tmp_path / "sweep", execution={"loader": loader})
    outcomes = train_seeds(config, SEEDS, side_by_side=side_by_side, verbosity="quiet")
    assert_same_runs(alone, tmp_path / "sweep")
    assert [o.side_by_side for o in outcomes if isinstance(o, RunResult)] == {0: [1] * 3, 2: [2, 2, 1], 3: [3] * 3}[
        side_by_side
    ]
    assert json.loads((tmp_path / "sweep/sweep.json").read_text())["seeds"] == [0, 1, 2]
    for seed in SEEDS:
        stored = RunDir(tmp_path / f"sweep/seed{seed}").config()
        assert (stored.seed, stored.output.out) == (seed, str(tmp_path / f"sweep/seed{seed}"))
        assert (tmp_path / f"sweep/seed{seed}/curves.png").exists()


@pytest.mark.parametrize("side_by_side", [1, 3])
def test_cut_and_called_again_is_uninterrupted_and_repeats_nothing(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side_by_side: int
) -> None:
    folder = tmp_path / "sweep"
    train_seeds(tiny(folder), (2,), verbosity="quiet")
    before = written(folder)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9)
        with pytest.raises(Interrupted, match=f"all saved; resume with: fastres train --resume {folder}$"):
            train_seeds(tiny(folder), SEEDS, side_by_side=side_by_side, verbosity="quiet")
    assert checkpoint.steps(folder / "seed0") == {10, 7}
    train_seeds(resume=folder, side_by_side=side_by_side, verbosity="quiet")
    assert_same_runs(alone, folder)
    assert written(folder)["seed2"] == before["seed2"]
    everything = written(folder)
    train_seeds(resume=folder, verbosity="quiet")
    assert written(folder) == everything


def test_a_signal_that_comes_when_no_step_is_left_stops_the_sweep(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        finish = Member.finish

        def late(self: Member, *args: Any) -> RunResult | Diverged:
            os.kill(os.getpid(), signal.SIGTERM)
            return finish(self, *args)

        patch.setattr(Member, "finish", late)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM before .*seed1, all saved") as caught:
            train_seeds(tiny(folder), SEEDS, verbosity="quiet")
    assert caught.value.exit_code == 143
    assert list(written(folder)) == ["seed0"]
    train_seeds(resume=folder, verbosity="quiet")
    assert_same_runs(alone, folder)


def test_a_crash_between_two_saves_goes_on_from_what_all_have(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 15)
        with pytest.raises(Interrupted):
            train_seeds(tiny(folder), SEEDS, side_by_side=3, verbosity="quiet")
    # seed 1 had not been saved at step 16 when the power went
    late = folder / "seed1"
    (late / checkpoint.PREVIOUS).replace(late / checkpoint.NEWEST)
    train_seeds(resume=folder, side_by_side=3, verbosity="quiet")
    for seed in SEEDS:
        assert "resuming from step 14" in (folder / f"seed{seed}/console.log").read_text()
    assert_same_runs(alone, folder)


def test_runs_at_different_steps_do_not_wait_for_each_other(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 15)
        with pytest.raises(Interrupted):
            train_seeds(tiny(folder), (0,), verbosity="quiet")
    train_seeds(tiny(folder), SEEDS, side_by_side=3, verbosity="quiet")
    assert "resuming from step 16" in (folder / "seed0/console.log").read_text()
    assert_same_runs(alone, folder)


def break_seed(monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """The `number`th replica's loss is NaN at 0-based step `step`."""
    forward = Replica.forward
    seen: list[Replica] = []

    def broken(self: Replica, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, errors = forward(self, images, labels)
        if self not in seen:
            seen.append(self)
        if seen.index(self) == number and int(self.counter) == step:
            loss = loss * math.nan
        return loss, errors

    monkeypatch.setattr(Replica, "forward", broken)


def test_a_run_that_diverges_is_given_up_and_the_others_go_on(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        break_seed(patch, 1, 11)
        outcomes = train_seeds(tiny(folder), SEEDS, side_by_side=3, verbosity="quiet")
    assert isinstance(outcomes[1], Diverged)
    assert "the loss became nan at step 12" in str(outcomes[1])
    assert_same_runs(alone, folder, (0, 2))
    assert "1 abandoned" in sweep.spread(fastres.make_config(), outcomes)
    # not tried again, and told again
    again = train_seeds(resume=folder, verbosity="quiet")
    assert str(again[1]) == str(outcomes[1])
    # ... unless it is asked for: from its last good checkpoint it ends as if nothing had been
    fastres.train(resume=folder / "seed1", verbosity="quiet")
    assert_same_runs(alone, folder)
    assert RunDir(folder / "seed1").status == "finished"


def test_all_diverged_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_seed(monkeypatch, 0, 3)
    with pytest.raises(Diverged, match="became nan at step 4"):
        sweep.raise_if_all_diverged(train_seeds(tiny(tmp_path / "sweep"), (0,), verbosity="quiet"))


def test_out_of_time_saves_and_goes_on(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    with pytest.raises(OutOfTime, match="stopped after step") as caught:
        train_seeds(tiny(folder), SEEDS, side_by_side=3, verbosity="quiet", deadline=perf_counter())
    assert caught.value.exit_code == 0
    train_seeds(resume=folder, side_by_side=3, verbosity="quiet")
    assert_same_runs(alone, folder)


def test_out_of_time_between_two_runs_begins_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OutAfterOne(Member):
        def finish(self, *args: Any) -> Any:
            monkeypatch.setattr(sweep, "perf_counter", lambda: math.inf)
            return super().finish(*args)

    monkeypatch.setattr(member, "Member", OutAfterOne)
    with pytest.raises(OutOfTime, match=r"stopped before .*seed1, all saved; resume with: fastres train --resume .*p$"):
        train_seeds(
            tiny(tmp_path / "sweep", recipe={"steps": 2}), 2, verbosity="quiet", deadline=perf_counter() + 3_600
        )
    assert [RunDir(tmp_path / "sweep" / f"seed{k}").status for k in (0, 1)] == ["finished", "missing"]


def test_a_sweep_whose_folder_was_moved_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, take = tmp_path / "sweep", TrainStep.__call__

    def moved(self: TrainStep, step: int, stop: int | None = None) -> int:
        if step == 5:
            folder.rename(tmp_path / "elsewhere")
        return take(self, step, stop)

    monkeypatch.setattr(TrainStep, "__call__", moved)
    with pytest.raises(MachineError, match="was moved, replaced or deleted"):
        train_seeds(tiny(folder), 2, verbosity="quiet")


def test_a_seeds_folder_that_is_in_the_way_can_be_moved(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    (folder / "seed0").mkdir(parents=True)
    (folder / "seed0/thesis.txt").write_text("mine")
    config = tiny(folder, recipe={"steps": 2, "batch_size": 8})
    with pytest.raises(InputError, match=r"to train this run: mv (.*), then the same command") as caught:
        train_seeds(config, 2, verbosity="quiet")
    source, target = str(caught.value).partition(": mv ")[2].partition(",")[0].split()
    Path(source).rename(target)
    assert len(train_seeds(config, 2, verbosity="quiet")) == 2


def test_a_long_sweep_says_how_to_resume_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "LONG_RUN_SECONDS", 0)
    train_seeds(tiny(tmp_path / "sweep"), [0], verbosity="quiet")
    log = (tmp_path / "sweep" / "seed0" / "console.log").read_text()
    assert f"Ctrl-C saves; resume with: fastres train --resume {tmp_path / 'sweep'}\n" in log


def test_a_sweep_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (str(tmp_path / "sweep"), None):
        with pytest.raises(MachineError):
            train_seeds(tiny(Path("sweep"), execution={"device": "cuda:0"}, output={"out": out}), 2, verbosity="quiet")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "runs").exists()
    write_sweep(tmp_path / "old", tiny(tmp_path), [0, 1])  # as one is left that was killed at once
    train_seeds(tiny(tmp_path / "old", recipe={"steps": 2, "lr": 0.2}), [5], verbosity="quiet")
    assert json.loads((tmp_path / "old" / "sweep.json").read_text())["seeds"] == [5]


def test_clean_training_error_is_recorded_and_changes_nothing(alone: Path, tmp_path: Path) -> None:
    fastres.train(tiny(tmp_path / "run", output={"clean_train_error": True}), verbosity="quiet")
    records = RunDir(tmp_path / "run").metrics()
    clean = [r for r in records if r["kind"] == "train_clean"]
    assert [r["step"] for r in clean] == [12, 24]
    assert all(0 < r["error"] < 1 and r["loss"] > 0 for r in clean)
    one, other = (checkpoint.load(path / checkpoint.NEWEST) for path in (alone / "seed0", tmp_path / "run"))
    assert all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())


def test_another_sweep_or_config_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    train_seeds(tiny(folder, recipe={"steps": 2}), (0,), verbosity="quiet")
    with pytest.raises(InputError, match=r"another config \(recipe\.steps: 2 -> 3\)"):
        train_seeds(tiny(folder, recipe={"steps": 3}), (0,), verbosity="quiet")
    with pytest.raises(InputError, match=r"seed0 was started with another config.*recipe\.steps: 2 -> 3"):
        train_all({folder / "seed0": tiny(folder, recipe={"steps": 3})}, Interrupt(""), console=Console("quiet"))
    stored = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**stored, "schema": 99}))
    with pytest.raises(InputError, match="schema 99"):
        train_seeds(resume=folder, verbosity="quiet")
    damages: list[dict[str, Any]] = [
        {"seeds": "0-4"}, {"seeds": [0, "1"]}, {"seeds": None}, {"config": 1}, {"config": {"modle": {}}},
    ]  # fmt: skip
    for damage in damages:
        (folder / "sweep.json").write_text(json.dumps({**stored, **damage}))
        with pytest.raises(InputError, match=r"sweep\.json is damaged.*Remove that file and train"):
            train_seeds(resume=folder, verbosity="quiet")
    (folder / "sweep.json").write_text("{")
    with pytest.raises(InputError, match=r"sweep\.json cannot be read.*Remove that file and train"):
        train_seeds(resume=folder, verbosity="quiet")
    with pytest.raises(InputError, match="seed0 is one run, not a sweep; leave out --seeds"):
        train_seeds(resume=folder / "seed0", seeds=(0,), verbosity="quiet")
    (folder / "sweep.json").unlink()
    before = written(folder)
    train_seeds(tiny(folder, recipe={"steps": 2}), (0,), verbosity="quiet")  # as the message says
    assert (json.loads((folder / "sweep.json").read_text())["seeds"], written(folder)) == ([0], before)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        train_seeds(tiny(tmp_path / "mine"), (0,), verbosity="quiet")
    for seeds in ((), (1, 1)):
        with pytest.raises(InputError, match="give each of them once"):
            train_seeds(tiny(tmp_path / "none"), seeds, verbosity="quiet")
    for wrong in ("0-3", [0.5], None, True, ["1"]):
        with pytest.raises(InputError, match=r"seeds are .*; give how many, or a list"):
            train_seeds(tiny(tmp_path / "none"), wrong, verbosity="quiet")  # type: ignore[arg-type]
    assert sweep._listed(2) == sweep._listed(np.arange(2)) == sweep._listed([np.int64(0), 1]) == [0, 1]


def test_find_runs(alone: Path, tmp_path: Path) -> None:
    names = [run.path.name for run in find_runs([alone / "seed1", alone])]
    assert names == ["seed1", "seed0", "seed2"]
    with pytest.raises(InputError, match="not a run folder, and holds none"):
        find_runs([tmp_path])
    shutil.copytree(alone, tmp_path / "reproduce/shortcut-B/resnet8")  # `reproduce` with an ablation is this deep
    shutil.copytree(alone / "seed0", tmp_path / "reproduce/a/b/c/too-deep")
    assert len(find_runs([tmp_path / "reproduce"])) == 3


def test_what_a_kill_left_before_a_config_is_no_run(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for name in ("seed0", "seed1"):
        (folder / name).mkdir(parents=True)
    for name in ("console.log", ".lock", ".config.json.tmp"):
        (folder / "seed0" / name).touch()
    (folder / ".sweep.json.tmp").write_text("{")
    train_seeds(tiny(folder), SEEDS, verbosity="quiet")
    assert_same_runs(alone, folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/console.log.txt").touch()  # somebody's
    with pytest.raises(InputError, match="not empty"):
        fastres.train(tiny(tmp_path / "other"), verbosity="quiet")


def test_a_damaged_result_is_named_and_its_remedy_works(alone: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(alone / "seed0", tmp_path / "run"))
    stored = json.loads((run / "result.json").read_text())
    bad = {
        "test_error": "0.2", "best_test_error": 1.5, "seconds": {"train": None}, "class_errors": [2], "side_by_side": 0,
        "images_per_second": float("nan"), "warmup_end": "no", "peak_memory": True,
    }  # fmt: skip
    for key, value in bad.items():
        (run / "result.json").write_text(json.dumps({**stored, key: value}))
        with pytest.raises(InputError, match=f"result.json is damaged: {key} is .*Remove that file"):
            sweep.outcome_of(run)
    (run / "result.json").write_text(json.dumps({**stored, "steps": 23}))  # of a shorter run, copied here
    with pytest.raises(InputError, match=r"result\.json is of 23 steps, and the run has 24\. Remove that file"):
        sweep.outcome_of(run)
    (run / "result.json").unlink()
    fastres.train(resume=run, verbosity="quiet")
    assert json.loads((run / "result.json").read_text())["test_error"] == stored["test_error"]


def test_spread(alone: Path) -> None:
    outcomes = [sweep.outcome_of(alone / f"seed{seed}") for seed in SEEDS]
    results = [outcome for outcome in outcomes if isinstance(outcome, RunResult)]
    made = [replace(result, test_error=error) for result, error in zip(results, (0.08, 0.09, 0.1), strict=True)]
    config = fastres.make_config()
    about = "test error 9.00 \N{PLUS-MINUS SIGN} 1.00 % (8.00 % to 10.00 %)"
    assert sweep.spread(config, made) == f"ResNet20, 3 runs: {about}"
    assert sweep.spread(config, made[:1]) == "ResNet20, 1 run: test error 8.00 %"
    split = fastres.make_config(data={"val_split": True})
    assert sweep.spread(split, made[:1]) == "ResNet20, 1 run: validation error 8.00 %"
    assert sweep.spread(config, [Diverged("nan")]) == "ResNet20: no run finished, 1 abandoned (diverged)"


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("5", [0, 1, 2, 3, 4]), ("0-4", [0, 1, 2, 3, 4]), ("2-3", [2, 3]), ("1,3-4", [1, 3, 4]), ("7-7", [7])],
)
def test_seeds_in_words(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text",
    ["", "0", "a", "1,,2", "3-1", "5-2,3", "1,1", "-1", "1-99999", "99999999999999999", "0-99999999999", "1" * 30],
)
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="write 5"):
        parse_seeds(text)


def test_a_copied_folder_counts_as_what_it_says(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep/seed2")
    folders = sweep.seed_folders(tmp_path / "sweep", tiny(tmp_path), SEEDS)
    train_all(folders, Interrupt(""), console=Console("quiet"))
    assert_same_runs(alone, tmp_path / "sweep")


def test_what_another_process_finished_meanwhile_is_left_alone(alone: Path, tmp_path: Path) -> None:
    folders = sweep.seed_folders(tmp_path / "sweep", tiny(tmp_path), SEEDS)

    def meanwhile(paths: Sequence[Path]) -> None:
        if not (tmp_path / "sweep/seed1").exists():
            shutil.copytree(alone / "seed1", tmp_path / "sweep/seed1")
        begun.extend(paths)

    begun: list[Path] = []
    train_all(folders, Interrupt(""), console=Console("quiet"), on_begin=meanwhile)
    assert begun == [path for path in folders if path.name != "seed1"]
    assert (tmp_path / "sweep/seed1/result.json").read_bytes() == (alone / "seed1/result.json").read_bytes()


def test_a_sweep_belongs_to_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one would write sweep.json anew for its own runs, or remove it when it is stopped."""
    config = tiny(tmp_path / "sweep", recipe={"steps": 2})

    def meanwhile(*args: Any, **options: Any) -> Any:
        before = (tmp_path / "sweep/sweep.json").read_bytes()
        for seeds, other in ([2, 3], config), ([0], tiny(tmp_path / "sweep", recipe={"steps": 2, "lr": 0.1})):
            with pytest.raises(InUse, match="sweep is being trained by another process"):
                train_seeds(other, seeds, verbosity="quiet")
        assert (tmp_path / "sweep/sweep.json").read_bytes() == before
        return load_images(*args, **options)

    monkeypatch.setattr("fastres.loop.load_images", meanwhile)
    train_seeds(config, [0], verbosity="quiet")
    monkeypatch.setattr("fastres.loop.load_images", load_images)
    with pytest.raises(InputError, match="seed0 is not empty; give another --out") as no:
        train_seeds(tiny(tmp_path / "sweep/seed0", recipe={"steps": 2}), [0], verbosity="quiet")
    assert "--overwrite" not in str(no.value)  # which --seeds does not go with
    assert not (tmp_path / "sweep/seed0/sweep.json").exists()


def test_the_lock_of_another_process_stays(tmp_path: Path) -> None:
    """Also before there is anything else in the folder: else a third process would get in."""
    with RunDir.create(tmp_path / "sweep").locked():
        (tmp_path / "sweep/console.log").unlink()
        with pytest.raises(InUse):
            train_seeds(tiny(tmp_path / "sweep"), [0], verbosity="quiet")
        assert [path.name for path in (tmp_path / "sweep").iterdir()] == [".lock"]


def test_runs_that_another_process_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = sweep.seed_folders(tmp_path, tiny(tmp_path, recipe={"steps": 2}), SEEDS)
    with RunDir.create(tmp_path / "seed1").locked():
        with pytest.raises(InUse, match="seed1 is being trained by another process"):
            train_all(folders, Interrupt(""), console=Console("lines"), side_by_side=3)
        assert not list(tmp_path.glob("*/config.json"))  # none of them was begun
        train_all(folders, Interrupt(""), console=Console("lines"), side_by_side=3, shared=True)
        assert [RunDir(path).status for path in folders] == ["finished", "missing", "finished"]
        assert "seed1 is trained by another process: left to it" in capsys.readouterr().out
        assert not train_all(folders, Interrupt(""), console=Console("lines"), shared=True)  # no other is left
        assert RunDir(tmp_path / "seed1").status == "missing"
        other = tiny(tmp_path, recipe={"steps": 3}, seed=1)
        RunDir(tmp_path / "seed1").write_json(CONFIG, other.to_dict())  # as it turns out, another experiment
        with pytest.raises(InputError, match=r"seed1 was started with another config \(recipe.steps: 3 -> 2"):
            train_all(folders, Interrupt(""), console=Console("lines"), shared=True)


def test_a_run_that_diverged_elsewhere_meanwhile_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = sweep.seed_folders(tmp_path, tiny(tmp_path, recipe={"steps": 2}), [0])

    def meanwhile(*args: Any, **options: Any) -> Any:
        run = RunDir.create(tmp_path / "seed0")
        run.write_json(CONFIG, folders[run.path].to_dict())
        run.write_json("diverged.json", {"why": "NaN"})
        return load_images(*args, **options)

    monkeypatch.setattr("fastres.loop.load_images", meanwhile)
    assert not train_all(folders, Interrupt(""), console=Console("quiet"), shared=True)
    assert RunDir(tmp_path / "seed0").status == "diverged"


def test_groups_are_made_anew_when_the_one_before_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what another process brought to a later step meanwhile would begin anew, beside one at step 0."""
    folders = sweep.seed_folders(tmp_path / "sweep", tiny(tmp_path), range(4))
    with monkeypatch.context() as patch:
        train_until(patch, 9, tiny(tmp_path / "seed2", seed=2))

    def meanwhile(paths: Sequence[Path]) -> None:
        begun.append([path.name for path in paths])
        if len(begun) == 1:
            (tmp_path / "seed2").rename(tmp_path / "sweep/seed2")

    begun: list[list[str]] = []
    train_all(folders, Interrupt(""), console=Console("quiet"), side_by_side=2, on_begin=meanwhile)
    assert begun == [["seed0", "seed1"], ["seed2"], ["seed3"]]
    assert "resuming from step 10 of" in (tmp_path / "sweep/seed2/console.log").read_text()


def test_a_run_that_began_elsewhere_a_moment_ago_is_no_occupied_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, recipe={"steps": 2})
    folders = sweep.seed_folders(tmp_path, config, [0])

    def meanwhile(*args: Any, **options: Any) -> Any:
        RunDir.create(tmp_path / "seed0").write_json(CONFIG, folders[tmp_path / "seed0"].to_dict())
        stack.enter_context(RunDir(tmp_path / "seed0").locked())
        return load_images(*args, **options)

    monkeypatch.setattr("fastres.loop.load_images", meanwhile)
    with contextlib.ExitStack() as stack, pytest.raises(InUse, match="is being trained by another process"):
        train_all(folders, Interrupt(""), console=Console("quiet"))


def test_one_seed_of_a_sweep_is_asked_for_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_seeds(tiny(tmp_path / "sweep", recipe={"steps": 1}), 1, verbosity="quiet")
    for more in ([], ["--dry-run"]):
        assert run(["train", "--resume", str(tmp_path / "sweep"), "--seed", "7", *more]) == 2
        assert "--seed 7: a sweep has several; --seeds 7-7 trains that one too" in capsys.readouterr().err


def test_runs_side_by_side_have_one_step_in_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of these has one, but not all three."""
    saved = {"seed0": {10, 20}, "seed1": {20, 30}, "seed2": {10, 30}, "seed3": {20}}
    monkeypatch.setattr(checkpoint, "steps", lambda path: saved[path.name])
    folders = sweep.seed_folders(tmp_path, tiny(tmp_path), range(4))
    group = sweep._next_group(folders, 4)
    assert [path.name for path in group] == ["seed0", "seed1", "seed3"]


def test_only_the_first_group_counts_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the seconds of importing and of the first runs would be in every later run's result too."""
    taken: list[Clocks | None] = []

    def take(folders: Any, *_: Any, clocks: Clocks | None, **__: Any) -> Sequence[Path]:
        taken.append(clocks)
        return list(folders)

    monkeypatch.setattr(sweep, "train_together", take)
    clocks = Clocks()
    folders = sweep.seed_folders(tmp_path, tiny(tmp_path), range(3))
    assert train_all(folders, Interrupt(""), console=Console("quiet"), clocks=clocks)
    assert taken == [clocks, None, None]


def test_seeds_that_are_added_come_last(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    write_sweep(tmp_path, config, [3, 1])
    (tmp_path / "seed3").mkdir(exist_ok=True)
    (tmp_path / "seed3" / CONFIG).write_text("{}")
    write_sweep(tmp_path, config, [0, 1])
    assert read_sweep(tmp_path)["seeds"] == [3, 1, 0]


def test_a_run_is_found_once_by_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunDir.create(tmp_path / "runs/one").write_json(CONFIG, tiny(tmp_path).to_dict())
    (tmp_path / "link").symlink_to(tmp_path / "runs/one")
    monkeypatch.chdir(tmp_path)
    assert len(find_runs([Path("runs/one"), tmp_path / "runs/one", Path("link")])) == 1


def test_too_many_seeds_in_all() -> None:
    assert len(parse_seeds("0-499,500-999")) == 1_000
    for text in ("1001", "0-1000", "0-999,1000"):
        with pytest.raises(InputError, match="at most 1,000 in all"):
            parse_seeds(text)
