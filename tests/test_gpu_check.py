"""scripts/gpu-check without a GPU: time, going on, failures and tar with made-up tasks; and the real tasks, tiny."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, gpu_tasks
from benchmarks.gpu_check import Ending, Stopped, go_through, in_its_own_process, inside, main, summary
from benchmarks.gpu_files import Files, Result, Setting, Task, TaskFailed, write_json
from benchmarks.gpu_tasks import all_tasks, gpu_tests
from benchmarks.peers import PEERS
from fastres.bench import measure as bench
from fastres.bench.report import read_json
from fastres.bench.roofline import Ceilings
from fastres.errors import Interrupted, OutOfTime

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def things_put_back() -> Iterator[None]:
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def made_up(
    name: str, seconds: float = 60, *, goes_on: bool = False, run: Callable[..., Result] = lambda _: {}
) -> Task:
    return Task(f"made/{name}", seconds, run, goes_on=goes_on)


# --- time and order


class Workshop:
    """Tasks that take made-up seconds on a made-up clock."""

    def __init__(self, files: Files, **seconds: float) -> None:
        self.files, self.seconds, self.now = files, seconds, 1_000.0
        self.tried: list[tuple[str, float]] = []
        self.endings: dict[str, Ending] = {}

    def attempt(self, task: Task, left: float) -> Ending:
        name = task.name.partition("/")[2]
        self.tried.append((name, left))
        self.now += min(self.seconds.get(name, task.seconds), left)
        ending = self.endings.get(name, "done")
        if ending == "done":
            self.files.done(task, {}, {"seconds": 1.0})
        if ending == "failed":
            self.files.failed(task, {"error": "no luck\nat all"})
        return ending

    def go(self, tasks: list[Task], seconds: float) -> tuple[gpu_check.Tally, list[str]]:
        said: list[str] = []
        tally = go_through(tasks, self.files, self.attempt, seconds=seconds, clock=lambda: self.now, say=said.append)
        return tally, said


def test_no_task_is_begun_without_time_for_it(tmp_path: Path) -> None:
    shop = Workshop(Files(tmp_path), long=100)
    tasks = [made_up("long", 200), made_up("larger", 250), made_up("short", 50), made_up("next", 170)]
    tally, _ = shop.go(tasks, 310)
    assert [name for name, _ in shop.tried] == [
        "long",
        "short",
    ]  # after 100 s 200 are left, 10 of them kept for the tar
    assert shop.tried[0][1] == 300
    assert (tally.done, tally.left) == (["made/long", "made/short"], ["made/larger", "made/next"])
    text = "\n".join(summary(tasks, Files(tmp_path), tally, tmp_path / "x", stopped=False))
    assert "2 tasks are left: go on with the same line" in text
    assert "2 done, 2 open" in text


def test_what_is_done_is_not_repeated_and_what_failed_comes_last(tmp_path: Path) -> None:
    files = Files(tmp_path)
    shop = Workshop(files)
    shop.endings = {"bad": "failed", "cut": "cut"}
    tasks = [made_up("good"), made_up("bad"), made_up("cut"), made_up("late")]
    tally, said = shop.go(tasks, 200)
    assert tally.failed == ["made/bad"]
    assert tally.left == ["made/cut", "made/late"]
    assert any("failed" in line and "no luck" in line and "at all" not in line for line in said)
    shop.tried.clear()
    shop.endings = {}
    tally, _ = shop.go(tasks, 1_000)
    assert [name for name, _ in shop.tried] == ["cut", "late", "bad"]
    assert [files.state(task) for task in tasks] == ["done"] * 4
    assert not list(tmp_path.rglob("*.failed.json"))
    shop.tried.clear()
    shop.go(tasks, 1_000)
    assert shop.tried == []


def test_too_little_time_for_any_task_says_how_much_it_takes(tmp_path: Path) -> None:
    shop = Workshop(Files(tmp_path))
    tasks = [made_up("a", 300), made_up("b", 150)]
    tally, _ = shop.go(tasks, 60)
    assert "needs --minutes 4 or more" in summary(tasks, Files(tmp_path), tally, tmp_path, stopped=False)[-1]


# --- a task's process


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Ending, Files, Task]]:
    """Run some Python as a task's process."""
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 1.0)

    def run(code: str, *, left: float = 20, allowed: float = 20, goes_on: bool = False) -> tuple[Ending, Files, Task]:
        monkeypatch.setattr(gpu_check, "_command", lambda *_: [sys.executable, "-u", "-c", code])
        files, task = Files(tmp_path), made_up("task", allowed, goes_on=goes_on)
        return in_its_own_process(task, left, setting=Setting(tmp_path), files=files), files, task

    return run


Scripted = Callable[..., tuple[Ending, Files, Task]]
SAVES = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print(1); time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def test_a_process_that_crashes_or_says_nothing_is_a_failure(scripted: Scripted) -> None:
    ending, files, task = scripted("import os, signal; print('last words'); os.kill(os.getpid(), signal.SIGSEGV)")
    assert (ending, files.state(task)) == ("failed", "failed")
    assert "exit code -11" in files.why(task)
    assert files.log(task).read_text() == "last words\n"
    assert scripted("pass")[0] == "failed"  # no record, so not done


def test_a_process_that_hangs_has_failed_but_one_cut_by_the_whole_time_has_not(scripted: Scripted) -> None:
    ending, files, task = scripted("import time; time.sleep(60)", left=20, allowed=0.5)
    assert ending == "failed"
    assert "took longer than 1 s" in files.why(task)
    ending, files, task = scripted("import time; time.sleep(60)", left=1, allowed=0.9)
    assert ending == "cut"


def test_what_goes_on_is_stopped_with_time_to_save(scripted: Scripted) -> None:
    start = monotonic()
    ending, files, task = scripted(SAVES, left=2.5, allowed=0.1, goes_on=True)
    assert (ending, files.state(task)) == ("cut", "open")
    assert 1.5 <= monotonic() - start < 2.4
    ending, files, task = scripted(DEAF, left=1.5, allowed=0.1, goes_on=True)
    assert (ending, files.state(task)) == ("failed", "failed")


def test_a_saved_end_before_time_is_up_is_a_cut(scripted: Scripted) -> None:
    assert scripted("import sys; sys.exit(75)", goes_on=True)[0] == "cut"


def test_nothing_is_left_running(scripted: Scripted, tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid)"
    _, files, task = scripted(code)
    stat = Path("/proc") / files.log(task).read_text().strip() / "stat"
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        threading.Event().wait(0.05)
    raise AssertionError("the grandchild lives on")


def test_sigterm_reaches_the_task_which_saves(scripted: Scripted, tmp_path: Path) -> None:
    """The machine's keeper stops the whole check; what trains must not lose its work."""
    marker = tmp_path / "saved"
    code = SAVES.replace("sys.exit(75)", f"(open({str(marker)!r}, 'w').close(), sys.exit(75))")
    signal.signal(signal.SIGTERM, gpu_check._raise_stopped)

    def stop() -> None:
        log = tmp_path / "made" / "task.log"
        while not (log.exists() and log.read_text()):  # until the process has set its handler
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped):
        scripted(code, left=30, goes_on=True)
    thread.join()
    assert marker.exists()


# --- what a task's process keeps


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[..., Result]], tuple[int, Files, Task]]:
    """Run one made-up task as its own process would."""
    monkeypatch.setattr(gpu_check, "machine", lambda _: {"gpu": "none"})

    def run(work: Callable[..., Result]) -> tuple[int, Files, Task]:
        task, files = made_up("task", run=work), Files(tmp_path)
        monkeypatch.setattr(gpu_check, "all_tasks", lambda _: [task])
        return inside(task.name, Setting(tmp_path, device="cpu"), files), files, task

    return run


def raising(error: Exception) -> Callable[..., Result]:
    def work(_: Setting) -> Result:
        raise error

    return work


def test_results_and_failures_are_kept(only: Any, tmp_path: Path) -> None:
    code, files, task = only(raising(TaskFailed("2 of 3 differ", {"tests": [1, 2, 3]})))
    kept = json.loads((tmp_path / "made" / "task.failed.json").read_text())
    assert (code, files.state(task), kept["error"]) == (1, "failed", "TaskFailed: 2 of 3 differ")
    assert kept["tests"] == [1, 2, 3]
    assert "in work" in kept["traceback"]
    code, files, task = only(lambda _: {"cells": []})
    kept = json.loads((tmp_path / "made" / "task.json").read_text())
    assert (code, files.state(task)) == (0, "done")
    assert kept.keys() == {"task", "environment", "cells"}
    assert not (tmp_path / "made" / "task.failed.json").exists()


@pytest.mark.parametrize("error", [OutOfTime("saved"), Interrupted("saved", signal.SIGTERM)])
def test_a_saved_end_is_no_failure(only: Any, error: Exception) -> None:
    code, files, task = only(raising(error))
    assert (code, files.state(task)) == (gpu_check.CUT, "open")


def test_a_bug_of_any_kind_fails_its_task_alone(only: Any) -> None:
    assert only(raising(torch.OutOfMemoryError("CUDA out of memory")))[0] == 1
    assert only(raising(NotImplementedError()))[0] == 1


# --- the tar


def test_the_tar_has_all_text_and_few_weights(tmp_path: Path) -> None:
    files = Files(tmp_path)
    for name, size, finished in (
        ("a", 400_000, True),
        ("b", 500_000, False),
        ("c", 300_000, True),
        ("d", 200_000, True),
    ):
        run = tmp_path / "train" / name
        run.mkdir(parents=True)
        (run / "checkpoint.safetensors").write_bytes(bytes(size))
        (run / "checkpoint.previous.safetensors").write_bytes(bytes(10))
        (run / "metrics.jsonl").write_text("{}\n")
        (run / "curves.png").write_bytes(b"")
        (run / ".x.json.tmp").touch()
        if finished:
            (run / "result.json").write_text("{}")
    write_json(tmp_path / "environment.json", {})
    for _ in range(2):  # the second time it does not pack the first tar
        packed = files.pack(1.0)
    with tarfile.open(packed) as tar:
        names = set(tar.getnames())
    weights = {name for name in names if name.endswith(".safetensors")}
    # first the unfinished run's, with which it goes on; then the smallest, while they fit
    assert weights == {f"train/{name}/checkpoint.safetensors" for name in "bcd"}
    assert names - weights == {
        "environment.json",
        *(f"train/{name}/{file}" for name in "abcd" for file in ("metrics.jsonl", "curves.png")),
        *(f"train/{name}/result.json" for name in "acd"),
    }


def test_a_sections_reports_become_one(tmp_path: Path) -> None:
    files = Files(tmp_path)
    for k, name in enumerate(("resnet20", "resnet110", "race")):
        config = {"model": {}, "recipe": {"batch_size": 8}}
        cell = {"label": name, "config": config, "chunks": [0.1], "step_seconds": {"median": 0.1}}
        report = {"schema": 1, "environment": {"gpu": "x"}, "cells": [cell]}
        files.done(
            Task(f"bench/{name}", 1, lambda _: {}), report if name != "race" else {"ratios": {}}, {"seconds": 1.0}
        )
        os.utime(tmp_path / "bench" / f"{name}.json", (k, k))
    files.failed(Task("bench/bad", 1, lambda _: {}), {"error": "x"})
    files.pack(0)
    joined = read_json(tmp_path / "bench.json")
    assert [cell["label"] for cell in joined["cells"]] == ["resnet20", "resnet110"]


# --- the command


def test_sections_in_the_order_of_use_and_a_task_for_every_gpu_test() -> None:
    tasks = all_tasks(Setting(Path("x")))
    sections = list(dict.fromkeys(task.section for task in tasks))
    assert sections == [
        "ceilings", "parity", "bench", "profile", "host", "switches", "seeds", "evaluation", "start", "scaling",
        "memory", "train", "table6",
    ]  # fmt: skip
    assert len({task.name for task in tasks}) == len(tasks)
    assert [task.name for task in tasks[: len(gpu_tasks.FIRST)]] == list(gpu_tasks.FIRST)
    # the start of a machine and three calls of nine minutes
    assert sum(task.seconds for task in tasks[: len(gpu_tasks.FIRST)]) < 30 * 60
    assert sum(task.section == "parity" for task in tasks) == sum(gpu_tests().values())
    names = {task.name for task in tasks}
    assert {f"bench/race_resnet{depth}_{side}" for depth in (20, 56, 110) for side in ("tuned", "tuned_graphs")} < names
    longest = max(task.seconds for task in tasks)
    # the first task of a call can be told from one that hangs, the start of the call included
    assert gpu_check.PATIENCE * longest + gpu_check.RESERVE_SECONDS + 30 < 9 * 60


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What looks like a trainer that is known."""
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "trainer.py").write_text(f"# {PEERS[0].mark}\n")
    return tmp_path / "clone"


def test_peers_are_timed_where_their_clone_is_given(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list", "--out", str(clone), "--peer", str(clone)])
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert [name for name in names if name.startswith("peers/")] == [
        f"peers/akamaster_resnet{depth}" for depth in (20, 56, 110)
    ]
    assert names.index("peers/akamaster_resnet20") > names.index("bench/race_resnet110_tuned_graphs")
    with pytest.raises(SystemExit, match="is no clone of akamaster"):
        main(["--list", "--peer", str(clone.parent)])
    assert not [task for task in all_tasks(Setting(clone, device="cpu", peers=(clone,))) if task.section == "peers"]


def test_a_tasks_process_has_the_whole_setting(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out of its command line it would take from the defaults."""
    seen: list[tuple[str, Setting]] = []
    monkeypatch.setattr(gpu_check, "inside", lambda name, setting, _: seen.append((name, setting)))
    setting = Setting(clone.parent / "out", clone.parent / "data", "cpu", 12.5, (clone, clone))
    command = gpu_check._command("bench/resnet20", setting, setting.seconds)
    main(command[command.index("benchmarks.gpu_check") + 1 :])
    assert seen == [("bench/resnet20", setting)]


def test_list_is_there_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from benchmarks.gpu_check import main; main(['--list', 'bench', 'train/resnet20']); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "False"
    assert [line.split()[:2] for line in lines[:2]] == [["open", "bench/resnet20"], ["open", "bench/resnet110"]]
    assert lines[-2].split()[1] == "train/resnet20"


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["speed"])
    assert caught.value.code == 2
    assert "there is no 'speed'; sections are ceilings, parity, bench" in (said := capsys.readouterr().err)
    assert "--peer" not in said.rpartition("error:")[2]
    with pytest.raises(SystemExit):
        main(["peers"])
    assert "for peers give --peer CHECKOUT" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "VIRTUAL_ENV": str(Path(sys.executable).parent.parent)}
    command = ["scripts/gpu-check", "ceilings", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stderr == "gpu-check: torch finds no GPU here; fastres doctor says what is missing\n"


@pytest.mark.parametrize("fails", [False, True])
def test_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
    monkeypatch.setattr(gpu_check, "_run", lambda *_: (0, False))
    task = made_up("task")

    def attempt(task: Task, left: float, *, setting: Setting, files: Files) -> Ending:
        if fails:
            files.failed(task, {"error": "x"})
            return "failed"
        files.done(task, {}, {"seconds": 1.0})
        return "done"

    monkeypatch.setattr(gpu_check, "in_its_own_process", attempt)
    assert gpu_check._go([task], Setting(tmp_path), Files(tmp_path), 500, 10) == int(fails)
    assert (tmp_path / "gpu-check.tar.gz").exists()


@pytest.mark.parametrize(("signalled", "code"), [(KeyboardInterrupt, 130), (Stopped, 143)])
def test_a_signal_packs_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signalled: type[BaseException], code: int
) -> None:
    monkeypatch.setattr(gpu_check, "_run", lambda *_: (0, False))

    def attempt(*_: object, **__: object) -> Ending:
        raise signalled

    monkeypatch.setattr(gpu_check, "in_its_own_process", attempt)
    assert gpu_check._go([made_up("task")], Setting(tmp_path), Files(tmp_path), 500, 10) == code
    assert (tmp_path / "gpu-check.tar.gz").exists()


# --- the tasks themselves, tiny, on the CPU


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Ceilings are made up: measuring them takes seconds, and tests/test_bench.py does it."""
    fake = Ceilings(1e9, 1e9)
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: fake)
    monkeypatch.setattr("fastres.bench.roofline.measure_ceilings", lambda *_: fake)
    return Setting(tmp_path, device="cpu")


def task_named(name: str, setting: Setting) -> Task:
    return next(task for task in all_tasks(setting) if task.name == name)


REPORTED = {
    "bench/resnet20": ["ResNet8 resident", "ResNet8 frozen batch"],
    "switches/path": ["default", "eager", "no-compile", "no-graph"],
    "scaling/resnet20_from_32": ["ResNet8 batch 32"],
    "seeds/resnet20": ["ResNet8 x1", "ResNet8 x2"],
}


@pytest.mark.timeout(600)  # real measurements, a machine's ceilings among them: long where the cores are shared
@pytest.mark.parametrize("name", REPORTED)
def test_tasks_that_report(name: str, tiny: Setting) -> None:
    found = json.loads(json.dumps(task_named(name, tiny).run(tiny)))
    cells = {cell["label"]: cell for cell in found["cells"]}
    assert [label for label in cells if "dali" not in label] == REPORTED[name]
    if name == "seeds/resnet20":
        step = cells["ResNet8 x2"]["step_seconds"]["median"]
        assert cells["ResNet8 x2"]["images_per_second"] == pytest.approx(2 * 8 / step)
        ratio = cells["ResNet8 x2"]["floor_seconds"] / cells["ResNet8 x1"]["floor_seconds"]
        assert ratio == pytest.approx(2)
    if name == "switches/path":
        assert [line.partition(": ")[0] for line in found["words"]] == REPORTED[name][1:]
        rounds = zip(cells["default"]["chunks"], cells["no-graph"]["chunks"], strict=True)
        ratio = median(other / default for default, other in rounds)
        assert found["comparisons"]["no-graph"]["ratio"] == pytest.approx(ratio)


def test_ceilings_profile_and_memory(tiny: Setting) -> None:
    assert task_named("ceilings/all", tiny).run(tiny)["ceilings"]["fp32"]["bytes_per_second"] == 1e9
    taken = task_named("profile/resnet20", tiny).run(tiny)
    assert (tiny.out / "profile" / "resnet20.trace.json.gz").stat().st_size > 1_000
    assert taken["busy_seconds"] == pytest.approx(sum(kernel["seconds"] for kernel in taken["kernels"]))
    assert {kernel["name"]: kernel["calls"] for kernel in taken["kernels"]}["aten::mkldnn_convolution"] == 7
    (row,) = task_named("memory/resnet20", tiny).run(tiny)["memory"]
    assert row["estimate"] > 1_000_000


def test_training_goes_on_where_its_time_was_up(tiny: Setting) -> None:
    task = task_named("train/resnet20", tiny)
    for _ in range(2):  # begun, and gone on with
        with pytest.raises(OutOfTime):
            task.run(Setting(tiny.out, device="cpu", seconds=0))
    folder = tiny.out / "train" / "resnet20"
    assert (folder / "checkpoint.safetensors").exists()
    result = task.run(tiny)
    assert (result["run"], result["steps"]) == ("train/resnet20", 20)
    assert "resuming from step" in (folder / "console.log").read_text()


def test_real_training_is_on_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --data-dir the other sections take built-in data; the paper's run must not."""
    seen: list[Any] = []

    def train(config: Any, **_: Any) -> None:
        seen.append(config)
        raise OutOfTime("seen enough")

    monkeypatch.setattr("fastres.train", train)
    with pytest.raises(OutOfTime):
        gpu_tasks.train(Setting(Path("x")), depth=110)
    (config,) = seen
    assert (config.data.dataset, config.recipe.steps, config.recipe.warmup) == ("cifar10", 64_000, "constant")


def test_cases_are_counted_as_pytest_counts_them() -> None:
    options = ["--collect-only", "-qq", "-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"tests/test_gpu.py: {sum(gpu_tests().values())}\n" in done.stdout
    per_test = [*gpu_tests().values()]
    assert max(per_test) == 10
    assert min(per_test) == 1


def test_parity_needs_tests_that_passed(tmp_path: Path) -> None:
    """Skipped on this machine is no proof; a test that is not there is none either."""
    code = (
        "from pathlib import Path; from benchmarks.gpu_tasks import *\n"
        "cases = ('cpu', 'test_compiled_is_eager_in_fp64_over_50_steps', 2), ('cuda', 'test_no_such', 1)\n"
        "for device, test, n in cases:\n"
        "    try: print(*(seen.values() for seen in parity(Setting(Path('x'), device=device), test, 1, n)['tests']))\n"
        "    except TaskFailed as error: print(error)\n"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "over_50_steps[whole]', 'skipped'" in done.stdout
    assert "pytest ended with 4: no test ran" in done.stdout


@pytest.mark.parametrize(
    ("says", "code", "ending"),
    [("wrote table6.md", 0, None), (gpu_tasks.UNFINISHED, 0, OutOfTime), ("", 143, OutOfTime), ("", 1, TaskFailed)],
)
def test_table6_is_the_projects_own_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, code: int, ending: type[Exception] | None
) -> None:
    command = tmp_path / "python"
    command.write_text(
        f"#!/bin/sh\necho \"$@\" > {tmp_path}/argv\necho '{says}: run the same command again to resume'\nexit {code}\n"
    )
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))
    setting = Setting(tmp_path, data_dir=tmp_path / "data", seconds=315)
    if ending:
        with pytest.raises(ending):
            gpu_tasks.table6(setting)
    else:
        assert says in gpu_tasks.table6(setting)["printed"]
    argv = (tmp_path / "argv").read_text()
    expected = (
        f"-m fastres reproduce table6 --runs {tmp_path}/table6 --device cuda --budget 5.000 --data-dir {tmp_path}/data"
    )
    assert argv.strip() == expected


def test_the_words_for_unfinished_runs_are_the_commands() -> None:
    assert gpu_tasks.UNFINISHED in (ROOT / "fastres" / "cli" / "reproduce.py").read_text()
