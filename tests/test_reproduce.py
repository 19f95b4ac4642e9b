"""`fastres reproduce`: one line makes table and figures; cut anywhere, the same line ends with the same table."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from fastres.cli import run
from fastres.cli.reproduce import _lengths
from fastres.console import Console, Progress
from fastres.errors import Interrupted
from fastres.files import aside
from fastres.member import Member
from fastres.reproduce import fig7
from fastres.reproduce.plan import OverallProgress, plan_stages, train_missing
from fastres.rundir import RunDir
from fastres.runfolders import find_runs
from tests.crash import REPRODUCE, crash_reproduce, timeless_table
from tests.test_table6 import RESULT_VALUES

FILES = {f"fig{k}.{suffix}" for k in (6, 7) for suffix in ("png", "svg", "csv")}
FILES |= {f"table6.{suffix}" for suffix in ("md", "csv", "json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, made without a break."""
    folder = tmp_path_factory.mktemp("reproduce")
    assert run([*REPRODUCE, "--runs", str(folder)]) == 0
    return folder


def test_one_line_makes_everything_and_says_what_it_is(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} >= FILES
    rows = json.loads((whole / "table6.json").read_text())["rows"]
    assert [(row["network"], row["n"]) for row in rows] == [("ResNet-8", 2), ("plain-8", 1)]
    assert len(find_runs([whole / "resnet8", whole / "plainnet8"])) == 3
    note = "synthetic data: not a result of the paper"
    assert note in (whole / "table6.md").read_text().lower()
    for figure in ("fig6.svg", "fig7.svg", "resnet8/seed1/curves.svg"):
        assert "synthetic data" in (whole / figure).read_text().replace("\n", " ")


SHORT = {"recipe": {"steps": 2, "batch_size": 16, "warmup_steps": 1}, "execution": {"device": "cpu", "threads": 1}}


def test_again_nothing_is_trained(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*/*/metrics.jsonl")}
    assert run([*REPRODUCE, "--runs", str(whole)]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "3 runs: 3 finished" in capsys.readouterr().out


def test_two_processes_share_the_work(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.few", *REPRODUCE, "--runs", str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert timeless_table(tmp_path / "table6.json") == timeless_table(whole / "table6.json")
    for found in find_runs([tmp_path]):
        assert "resumed" not in found.read_json("environment.json")  # each was trained once, by one of them
        assert len(found.metrics()) == len(RunDir(whole / found.path.relative_to(tmp_path)).metrics())
    assert sum(text.count("parameters;") for text in said) == 3, said


def test_what_is_in_training_elsewhere_is_left_out(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run_folder in ("resnet8/seed0", "plainnet8/seed0"):
        shutil.copytree(whole / run_folder, tmp_path / run_folder)
    with RunDir.create(tmp_path / "resnet8/seed1").locked():
        assert run([*REPRODUCE, "--runs", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert "1 run left to other processes; they make table and figures anew when they end" in said
        assert "not all runs are finished" in said
        table = json.loads((tmp_path / "table6.json").read_text())
        assert [row["n"] for row in table["rows"]] == [1, 1]
        assert "1 of the runs asked for not begun" in table["note"]
        assert run([*REPRODUCE, "--runs", str(tmp_path), "--assert"]) == 6
        capsys.readouterr()
        with RunDir.create(tmp_path / "none/plainnet8/seed0").locked():
            line = ["reproduce", "table6", "--preset", "smoke", "--nets", "PlainNet8", "--runs", str(tmp_path / "none")]
            assert run(line) == 2
        assert "holds no run of these networks yet; wait for the processes" in capsys.readouterr().err


def test_without_weights_yet_the_rest_is_drawn(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where another process trains all there is, and has not saved yet."""
    shutil.copytree(whole / "plainnet8/seed0", tmp_path / "plainnet8/seed0")
    for name in ("result.json", "checkpoint.safetensors", "checkpoint.previous.safetensors"):
        (tmp_path / "plainnet8/seed0" / name).unlink(missing_ok=True)
    line = [*REPRODUCE, "--nets", "PlainNet8", "--runs", str(tmp_path)]
    with RunDir(tmp_path / "plainnet8/seed0").locked():
        assert run(line) == 0
    said = capsys.readouterr().out
    assert "Figure 7 is left out: no run has saved weights yet" in said
    assert "fig6.png" in said
    assert not (tmp_path / "fig7.png").exists()


def test_what_another_process_began_and_left_is_taken_up(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a third left while that was trained."""
    others = {k: RunDir.create(tmp_path / f"resnet8/seed{k}").locked() for k in (0, 1)}
    for other in others.values():
        other.__enter__()
    finish, finished = Member.finish, list[str]()

    def leaves(member: Member, *args: Any) -> Any:
        finished.append(str(member.run.path.relative_to(tmp_path)))
        if len(finished) <= 2:
            others[2 - len(finished)].__exit__(None, None, None)
        return finish(member, *args)

    monkeypatch.setattr(Member, "finish", leaves)
    assert run([*REPRODUCE, "--runs", str(tmp_path)]) == 0
    assert finished == ["plainnet8/seed0", "resnet8/seed1", "resnet8/seed0"]
    assert timeless_table(tmp_path / "table6.json") == timeless_table(whole / "table6.json")


def test_who_draws_last_sees_all(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that end together: the one that waits for the other looks at the runs after it."""
    for run_folder in ("resnet8/seed0", "plainnet8/seed0"):
        shutil.copytree(whole / run_folder, tmp_path / run_folder)
    waits, locked = threading.Event(), RunDir.locked

    def noted(folder: RunDir, *, wait: bool = False) -> Any:
        if wait:
            waits.set()
        return locked(folder, wait=wait)

    line = ["reproduce", "table6", *REPRODUCE[2:], "--runs", str(tmp_path), "--no-train"]
    with locked(RunDir(tmp_path)):
        monkeypatch.setattr(RunDir, "locked", noted)
        thread = threading.Thread(target=run, args=[line])
        thread.start()
        assert waits.wait(60)
        shutil.copytree(whole / "resnet8/seed1", tmp_path / "resnet8/seed1")
    thread.join()
    assert timeless_table(tmp_path / "table6.json") == timeless_table(whole / "table6.json")


def test_dry_run_lists_what_is_needed_and_does_nothing(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(whole.rglob("*"))
    assert run([*REPRODUCE, "--runs", str(whole), "--seeds", "3", "--dry-run"]) == 0
    *lines, total = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert total == ["4", "runs,", "3", "of", "them", "finished"]
    assert [(name, state) for name, state, _ in lines] == [
        ("ResNet8", "finished"), ("ResNet8", "finished"), ("ResNet8", "missing"), ("PlainNet8", "finished"),
    ]  # fmt: skip
    assert sorted(whole.rglob("*")) == before


def test_where_there_is_nothing_to_draw_nothing_is_left(tmp_path: Path) -> None:
    assert run([*REPRODUCE, "--runs", str(tmp_path / "none"), "--no-train"]) == 2
    assert not (tmp_path / "none").exists()


def test_seeds_by_number(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = ["--seeds", "1,3-4", "--plain-seeds", "5-5"]  # as one of several machines would have them
    assert run([*REPRODUCE, "--runs", str(whole), *seeds, "--dry-run"]) == 0
    *lines, _ = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(name, state, Path(path).name) for name, state, path in lines] == [
        ("ResNet8", "finished", "seed1"), ("ResNet8", "missing", "seed3"), ("ResNet8", "missing", "seed4"),
        ("PlainNet8", "missing", "seed5"),
    ]  # fmt: skip


def test_more_seeds_reuse_what_is_there(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*REPRODUCE, "--runs", str(whole), "--out", str(whole / "three"), "--seeds", "3", "--no-train"]) == 0
    rows = json.loads((whole / "three/table6.json").read_text())["rows"]
    assert [(row["network"], row["n"]) for row in rows] == [("ResNet-8", 2), ("plain-8", 1)]


@pytest.mark.timeout(900)
def test_killed_at_random_moments_it_ends_with_the_same_table(whole: Path, tmp_path: Path) -> None:
    crash_reproduce(2, whole, tmp_path, seed=int.from_bytes(os.urandom(4)), program="tests.few")


def test_a_budget_stops_in_time_and_goes_on(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*REPRODUCE, "--runs", str(tmp_path)]
    assert run([*line, "--budget", "0.00001"]) == 0
    out = capsys.readouterr().out
    assert "run the same command again to resume" in out
    (row,) = json.loads((tmp_path / "table6.json").read_text())["rows"]
    assert (row["n"], row["unfinished"], row["verdict"]) == (0, 1, "no finished run")
    assert run(line) == 0
    assert timeless_table(tmp_path / "table6.json") == timeless_table(whole / "table6.json")


def test_how_far_all_is_and_how_long_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stage,) = plan_stages([("resnet", 8, range(4))], tmp_path, "smoke", {"recipe": {"steps": 100}})
    paths, now = list(stage.folders), 0.0
    for path in paths[:2]:
        run = RunDir.create(path)
        run.write_json("config.json", stage.folders[path].to_dict())
    RunDir(paths[0]).write_json(
        "result.json", RESULT_VALUES | {"steps": 100, "seconds": {"train": 60.0, "evaluate": 40.0}}
    )
    RunDir(paths[1]).append_metrics({"kind": "train", "step": 50, "error": 0.5})
    whole = OverallProgress(stage.folders, clock=lambda: now)
    # one run of four and half of another; the finished one took 100 s, so the other two and a half take 250
    assert whole.between_stages() == "38 % of all, about 4:10 left"
    whole.begins([paths[1]])
    now = 1_000.0  # set-up and compilation, which the rate leaves out
    assert whole.at_step(50) == "38 % of all, about 4:10 left"
    now += 30
    assert whole.at_step(75) == "44 % of all, about 4:30 left"  # 25 steps in 30 s, and 225 to go
    whole.begins(paths[2:])  # of the group before the metrics say step 50
    now += 500
    assert whole.at_step(0) == "38 % of all, about 5:00 left"  # still 25 steps in 30 s
    now += 15
    assert whole.at_step(50) == "62 % of all, about 54.0 s left"  # 125 steps in 45 s, and 150 to go
    console = Console("lines")
    console.overall = whole.at_step
    console.show(Progress(50, 100, 1.0), line=True)
    assert "62 % of all, about 54.0 s left" in capsys.readouterr().out


def test_the_time_left_counts_layers_and_runs_side_by_side(tmp_path: Path) -> None:
    nets = [("resnet", 8, range(2)), ("resnet", 14, range(1))]
    shallow, deep = plan_stages(nets, tmp_path, "smoke", {"recipe": {"steps": 100}})
    path = next(iter(shallow.folders))
    run = RunDir.create(path)
    run.write_json("config.json", shallow.folders[path].to_dict())
    run.write_json("result.json", RESULT_VALUES | {"steps": 100, "seconds": {"train": 140.0}, "side_by_side": 2})
    # Of 7 + 7 + 13 layers 7 are trained, in 70 s of the machine's time; 20 are left.
    assert OverallProgress({**shallow.folders, **deep.folders}).between_stages() == "26 % of all, about 3:20 left"


def test_an_ablation_has_a_folder_of_its_own(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*REPRODUCE, "--runs", str(whole), "--dry-run"]
    flags = ["--shortcut", "B", "--norm-batch", "64", "--lr-in-velocity", "--init", "fan_in"]
    assert run([*line, *flags]) == 0
    folder = whole / "shortcut-B-norm-batch-64-lr-in-velocity"
    places = [text.split()[-1] for text in capsys.readouterr().out.splitlines()[:-1]]
    assert places == [str(folder / name) for name in ("resnet8/seed0", "resnet8/seed1", "plainnet8/seed0")]
    assert run([*line, "--shortcut", "B"]) == 0  # plain nets have none: theirs are the runs that are there
    assert capsys.readouterr().out.splitlines()[-2].split()[-1] == str(whole / "plainnet8/seed0")
    assert run([*line, "--warmup", "error"]) == 2  # of ResNet-110 and deeper
    assert "--warmup does nothing for these networks" in capsys.readouterr().err


def test_an_ablation_makes_its_own_table(whole: Path) -> None:
    before = (whole / "table6.md").read_bytes()
    line = ["reproduce", "table6", *REPRODUCE[2:], "--nets", "ResNet8", "--seeds", "1", "--runs", str(whole)]
    line.remove("ResNet8,PlainNet8")
    line.remove("--nets")
    assert run([*line, "--weight-decay-on", "weights"]) == 0
    assert (whole / "table6.md").read_bytes() == before
    text = (whole / "weight-decay-on-weights/table6.md").read_text()
    assert "where the paper leaves it open: weight decay on all -> weights" in text
    assert "](resnet8/seed0)" in text


@pytest.mark.parametrize(
    ("depths", "nets"),
    [
        ("20,110", ["ResNet20", "ResNet110", "PlainNet20"]),
        ("1202", ["ResNet1202"]),
        ("8,56,62", ["ResNet56", "PlainNet56", "ResNet8", "PlainNet8", "ResNet62"]),
    ],
)
def test_depths_bring_plain_nets_as_deep_as_the_papers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], depths: str, nets: list[str]
) -> None:
    assert run(["reproduce", "all", "--depths", depths, "--runs", str(tmp_path), "--dry-run", "--seeds", "2"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(nets)
    assert len({line.split()[-1] for line in lines}) == len(lines) == int(total.split()[0])  # each run once


def test_its_folder_can_be_plotted_and_reported(whole: Path, tmp_path: Path) -> None:
    assert run(["plot", str(whole), "--out", str(tmp_path / "curves.svg")]) == 0
    assert "<!-- synthetic data: not a result of the paper -->" in (tmp_path / "curves.svg").read_text()
    assert run(["report", str(whole), "--no-eval", "--out", str(tmp_path / "report.html")]) == 0
    assert "ResNet-8" in (tmp_path / "report.html").read_text()


def test_assert_exits_with_6(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["reproduce", "table6", "--preset", "smoke", "--nets", "ResNet20", "--seeds", "1", "--steps", "1"]
    assert run([*line, "--threads", "1", "--runs", str(whole / "assert"), "--assert"]) == 6
    assert "ResNet-20: not the paper's experiment" in capsys.readouterr().err
    assert (
        run([*line, "--threads", "1", "--runs", str(whole / "assert"), "--assert", "--no-train", "--seeds", "3"]) == 6
    )
    assert "2 of the runs not begun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["table7"], 2, "choose from table6, fig6, fig7, all"),
        (["all", "--nets", "ResNet8", "--depths", "20"], 2, "contradict"),
        (["all", "--nets", "ResNet9"], 2, "6n+2"),
        (["all", "--nets", "VGG16"], 2, "ResNet20 or PlainNet56"),
        (["all", "--seeds", "0"], 2, "--seeds is '0'; write 5 (seeds 0 to 4)"),
        (["all", "--plain-seeds", "1,1"], 2, "--plain-seeds is '1,1', which has one of them twice"),
        (["all", "--budget", "-1"], 2, "--budget is -1"),
        (["all", "--preset", "smok"], 2, "did you mean 'smoke'"),
        (["fig6", "--assert"], 2, "type table6 or all"),
        (["all", "--shortcut", "C"], 2, "shortcut is 'C'"),
        (["all", "--nets", "ResNet8", "--warmup", "slow"], 2, "warmup is 'slow'"),
        (["all", "--nets", "ResNet8", "--warmup", "ramp"], 2, "must be one of constant, error, none"),
        (["table6", "--nets", "VGG"], 2, "--nets is 'VGG'"),
        (
            ["table6", "--preset", "smoke", "--data-dir", "."],
            2,
            "--data-dir does nothing with built-in data; --preset",
        ),
        (
            ["table6", "--preset", "smoke", "--data-url", "u"],
            2,
            "--data-url does nothing with built-in data; --preset",
        ),
        (["table6", "--nets", "PlainNet8", "--shortcut", "B"], 2, "--shortcut does nothing for these networks"),
        (["table6", "--nets", "ResNet20", "--warmup", "none"], 2, "--warmup does nothing for these networks"),
        (["fig6", "--ylim", "nan"], 2, "--ylim is nan"),
        (["fig6", "--ylim", "0"], 2, "--ylim is 0"),
        (["table6", "--ylim", "30"], 2, "--ylim is of Figure 6"),
        (["table6", "--clean"], 2, "--clean applies to Figure 6"),
        (["table6", "--preset", "smoke", "--out", "/proc/nope"], 3, "/proc"),
        (["all", "--no-train"], 2, "holds no run of these networks yet"),
        (["all", "--device", "cuda:7"], 3, "--device cuda:7 was asked for"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    assert run(["reproduce", *arguments, "--runs", str(tmp_path)]) == code
    assert said in capsys.readouterr().err
    assert list(tmp_path.glob("*/*/checkpoint.safetensors")) == []


def test_other_images_are_found_before_the_training(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "resnet8", tmp_path / "resnet8")
    other = RunDir(tmp_path / "resnet8/seed0")
    stored = other.read_json("environment.json")
    other.write_json("environment.json", {**stored, "data": {**stored["data"], "digest": "sha256:0"}})
    assert run([*REPRODUCE, "--runs", str(tmp_path)]) == 2
    assert "a table of both would be of neither" in capsys.readouterr().err
    assert not (tmp_path / "plainnet8").exists()


def test_without_runs_each_length_has_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for flags, folder in (
        ([], "reproduce"),
        (["--preset", "smoke"], "reproduce-smoke"),
        (["--preset", "fast", "--epochs", "4"], "reproduce-fast-4epochs"),
        (["--steps", "100"], "reproduce-100steps"),
    ):
        assert run(["reproduce", "all", "--nets", "ResNet8", "--seeds", "1", "--dry-run", *flags]) == 0
        assert capsys.readouterr().out.splitlines()[0].split()[-1] == f"runs/{folder}/resnet8/seed0"


def test_a_run_of_another_recipe_in_the_way(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*REPRODUCE, "--runs", str(whole)]
    line[line.index("12")] = "13"
    assert run(line) == 2
    assert "recipe.steps: 12 -> 13" in capsys.readouterr().err


def test_fig7_failing_does_not_lose_the_table(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: Any, **_options: Any) -> list[Path]:
        raise RuntimeError("no figure")

    monkeypatch.setattr(fig7, "draw", fails)
    with pytest.raises(RuntimeError, match="no figure"):
        run([*REPRODUCE, "--runs", str(whole), "--out", str(tmp_path)])
    assert (tmp_path / "table6.md").exists()


def test_a_signal_that_comes_too_late_for_one_network_stops_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = plan_stages([("resnet", 8, [0]), ("plain", 8, [0])], tmp_path, "smoke", SHORT)
    finish = Member.finish

    def late(*args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return finish(*args)

    monkeypatch.setattr(Member, "finish", late)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM before .*plainnet8/seed0, all saved"):
        train_missing(stages, console=Console("quiet"))
    assert [RunDir(path).status for stage in stages for path in stage.folders] == ["finished", "missing"]


def test_a_budget_that_ends_with_one_network_begins_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, deadline = (
        plan_stages([("resnet", 8, [0]), ("plain", 8, [0])], tmp_path, "smoke", SHORT),
        perf_counter() + 3_600,
    )
    finish = Member.finish

    def last(*args: Any) -> Any:
        monkeypatch.setattr("fastres.sweep.perf_counter", lambda: deadline)
        return finish(*args)

    monkeypatch.setattr(Member, "finish", last)
    assert not train_missing(stages, console=Console("quiet"), deadline=deadline)
    assert [RunDir(path).status for stage in stages for path in stage.folders] == ["finished", "missing"]


def test_a_run_that_is_moved_aside_is_trained_again(tmp_path: Path) -> None:
    (stage,) = plan_stages([("resnet", 8, [0])], tmp_path, "smoke", SHORT)
    (path, config), *_ = stage.folders.items()
    RunDir.create(path).write_json("config.json", config.to_dict())
    path.rename(aside(path))
    (again,) = plan_stages([("resnet", 8, [0])], tmp_path, "smoke", SHORT)
    assert list(again.folders) == [path]


def test_a_damaged_result_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = plan_stages([("resnet", 8, range(2)), ("plain", 8, [0])], tmp_path, "smoke", SHORT)
    (first, config), *_ = stages[0].folders.items()
    RunDir.create(first).write_json("config.json", config.to_dict())
    (first / "result.json").write_text("{}")
    assert train_missing(stages, console=Console("lines"))
    assert [RunDir(path).status for stage in stages for path in stage.folders] == 3 * ["finished"]
    assert "result.json is damaged" in capsys.readouterr().out


def test_an_epoch_of_the_validation_split_is_shorter() -> None:
    assert _lengths("paper", None, 10.0, {})["recipe"] == {"steps": 3_907}
    assert _lengths("paper", None, 10.0, {"data": {"val_split": True}})["recipe"] == {"steps": 3_516}  # as of train
