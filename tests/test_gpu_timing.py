"""The tasks of scripts/gpu-check that time: tiny, on the CPU, or with seconds and commands that are made up."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_files, gpu_timing
from benchmarks.gpu_files import Result, Setting, TaskFailed
from fastres.bench.cells import Cell
from fastres.bench.measure import Bench
from fastres.bench.profiling import Profile
from fastres.data.synthetic import make_synthetic
from fastres.evaluator import Evaluation, Evaluator
from fastres.rundir import RunDir
from fastres.runtime import Runtime
from fastres.steptimer import StepTimer
from tests.few import NUM_TEST

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path: Path) -> Setting:
    return Setting(tmp_path, device="cpu")


# --- host


def test_host_loaders_and_idle_time(tiny: Setting) -> None:
    rows = {row["label"]: row for row in gpu_timing.host(tiny, depth=20)["host"]}
    assert [label for label in rows if "dali" not in label] == ["ResNet8 resident", "ResNet8 frozen batch"]
    for row in rows.values():
        assert row["host_share"] == pytest.approx(1, abs=0.2)  # a CPU's launches are its steps
        assert row["step_seconds"] > 0
        assert ("loader_share" in row) == (row["label"] != "ResNet8 frozen batch")


def test_the_hosts_numbers_are_of_all_rounds(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """With seconds that are made up: a loader's share is of its own round, the host's time is the mean of all."""

    class Stub:
        def __init__(self, cell: Cell, _: object) -> None:
            self.cell, self.runtime = cell, Runtime(torch.device("cpu"), "fp32")
            self.turn = 0

        def whole_periods(self, steps: float) -> int:
            return int(steps)

        def close(self) -> None: ...

    def launched(bench: Stub, _timer: StepTimer, num_steps: int) -> tuple[float, float, float]:
        bench.turn += 1
        slow = 2 if bench.turn > 5 else 1  # the machine gets slower
        assert num_steps == gpu_timing.STEPS
        return slow * (0.75 if bench.cell.frozen else 1.0), 14e-6 if bench.turn == 1 else 4e-6, 1e-3

    monkeypatch.setattr("fastres.bench.measure.Bench", Stub)
    monkeypatch.setattr(gpu_timing, "_launched", launched)
    taken = Profile("x", 1.0, 1.0, [], idle=0.5, idle_between_steps=0.25)
    monkeypatch.setattr("fastres.bench.profiling.take_profile", lambda *_, **__: taken)
    row = gpu_timing.host(Setting(tiny.out), depth=20)["host"][-2]
    assert (row["label"], row["rounds"], row["loader_share"]) == ("ResNet20 resident", 10, pytest.approx(0.25))
    mean = pytest.approx(5e-6)
    assert row["host_seconds"] == {"found": mean, "target": 10e-6, "met": True, "median": 4e-6, "max": 14e-6}
    assert row["host_share"] == pytest.approx(5e-3)
    assert (row["idle"], row["idle_between_steps"]) == (0.5, 0.25)


def test_steps_are_launched_as_the_loop_does(tiny: Setting) -> None:
    one = Bench(Cell("x", tiny.config(20)), make_synthetic(), num_steps=100)
    timer = StepTimer(CPU)
    for _ in range(2):
        began = perf_counter()
        seconds = gpu_timing._launched(one, timer, 6)  # of a step; that many are taken twice, and one before
        assert all(0 < 6 * each <= perf_counter() - began for each in seconds)
        assert int(one.replica.counter) == one.done
    gpu_timing.launch_seconds(one.step, timer, one.done, one.done + 3)
    assert int(one.replica.counter) == one.done + 3
    assert len(timer.collect()) == 3  # each marked
    one.close()


def test_a_launch_that_waits_for_the_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Waits:
        replicas = (SimpleNamespace(device=torch.device("cuda", 0)),)

        def __call__(self, _step: int, _stop: int) -> int:
            assert modes == ["error"]
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        gpu_timing.launch_seconds(Waits(), StepTimer(CPU), 0, 1)  # type: ignore[arg-type]
    assert modes == ["error", "default"]


# --- evaluation


def test_evaluations_share(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    class FirstIsSlow(Evaluator):
        """As on a GPU, where it compiles and captures before."""

        calls = 0

        def warm_up(self) -> None:
            sleep(0.3 if self.calls == 0 else 0.0)

        def __call__(self) -> Evaluation:
            self.calls += 1
            sleep(1.0 if self.calls == 1 else 0.0)
            return super().__call__()

    monkeypatch.setattr("fastres.build.Evaluator", FirstIsSlow)
    monkeypatch.setitem(gpu_files.TINY, "output", {"eval_every": 6})
    found = gpu_timing.evaluation(tiny, depth=110)
    each, first, training = found["seconds"]["median"], found["seconds"]["first"], 20 * found["step_seconds"]
    assert (found["label"], found["images"], found["evaluations"]) == ("ResNet8", NUM_TEST, 4)
    assert each < first - 0.75
    assert found["share"]["found"] == pytest.approx((first + 3 * each) / training)
    assert found["seconds"]["warm_up"] >= 0.3


# --- start


STARTS = """#!/bin/sh
echo "$@" >> {folder}/argv
echo $TORCHINDUCTOR_CACHE_DIR $TRITON_CACHE_DIR $(ls $TORCHINDUCTOR_CACHE_DIR | wc -l) $$ >> {folder}/caches
while [ "$1" != --out ]; do shift; done
mkdir "$2"
{does}
"""


@pytest.fixture
def starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Result]:
    """Measure the starts of a shell script instead of `fastres train`."""

    def run(does: str) -> Result:
        command = tmp_path / "python"
        command.write_text(STARTS.format(folder=tmp_path, does=does))
        command.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(command))
        return gpu_timing.start(Setting(tmp_path, data_dir=tmp_path / "data"), depth=110)["starts"]

    return run


STEPS = "sleep 0.5; printf {} > $2/metrics.jsonl; sleep 0.5; echo >> $2/metrics.jsonl"  # written in two pieces


def test_a_cold_start_has_empty_caches_and_a_warm_one_its(starting: Callable[[str], Result], tmp_path: Path) -> None:
    starts = starting(f"touch $TORCHINDUCTOR_CACHE_DIR/kernel; {STEPS}; exec sleep 60")
    for kind, target in (("cold", 90), ("warm", 15)):
        assert 1 <= starts[kind]["found"] < 60
        assert (starts[kind]["target"], starts[kind]["cache_files"]) == (target, 1)
    cold, warm = (line.split() for line in (tmp_path / "caches").read_text().splitlines())
    assert cold[:2] == warm[:2]
    assert cold[0] != cold[1]
    assert (cold[2], warm[2]) == ("0", "1")
    assert not Path(cold[0]).exists()
    assert not any((Path("/proc") / line[3]).exists() for line in (cold, warm))  # stopped, not left running
    argv = [line.split() for line in (tmp_path / "argv").read_text().splitlines()]
    runs = [words.pop(words.index("--out") + 1) for words in argv]
    assert runs[0] != runs[1]
    expected = "-m fastres train --depth 110 --out --log-every 1 --device cuda --dataset cifar10 --data-dir"
    assert argv == [[*expected.split(), str(tmp_path / "data")]] * 2


def test_starts_that_prove_nothing(starting: Callable[[str], Result]) -> None:
    with pytest.raises(TaskFailed, match="ended with 7 before its first step"):
        starting("exit 7")
    with pytest.raises(TaskFailed, match="left nothing in the caches"):
        starting(f"{STEPS}; exec sleep 60")


def test_a_start_that_cannot_be_stopped_is_killed(
    starting: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_timing, "STOP_SECONDS", 0.2)
    began = perf_counter()
    with pytest.raises(subprocess.TimeoutExpired):
        starting(f"trap '' TERM; {STEPS}; exec sleep 60")
    assert perf_counter() - began < 50


def test_the_first_step_of_the_real_command(tiny: Setting) -> None:
    seconds = gpu_timing._first_step(tiny, 110, tiny.out / "run", dict(os.environ))
    first = RunDir(tiny.out / "run").metrics()[0]
    assert (first["kind"], first["step"]) == ("train", 1)
    assert first["clock"]["train"] < seconds < 120
    left = {path.name for path in (tiny.out / "run").iterdir()}
    assert "result.json" not in left  # stopped on its way, but not killed, which might leave half of a cache
    assert "checkpoint.safetensors" in left


# --- other trainers


SAYS = """#!/bin/sh
echo "$@" > {folder}/argv
echo '{says}'
exit {code}
"""


@pytest.fixture
def saying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Have the modules of benchmarks/ say something; gives what they were called with."""

    def run(task: Callable[[Setting], Result], says: str, code: int = 0) -> list[str]:
        command = tmp_path / "python"
        command.write_text(SAYS.format(folder=tmp_path, says=says, code=code))
        command.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(command))
        assert task(Setting(tmp_path, data_dir=tmp_path / "data")) == json.loads(says)
        return (tmp_path / "argv").read_text().split()

    return run


def test_races_and_peers_are_the_projects_own_commands(saying: Callable[..., list[str]], tmp_path: Path) -> None:
    data = ["--data-dir", str(tmp_path / "data")]
    race = "-m benchmarks.throughput --against tuned --depth 56 --steps 300 --rounds 10 --set device=cuda"
    assert saying(partial(gpu_timing.race, depth=56, against="tuned"), '{"ratios": {}}') == [*race.split(), *data]
    peer = partial(gpu_timing.peer, depth=110, checkout=Path("clone"))
    learned = '{"peer": "akamaster", "loss_falls": true}'
    assert saying(peer, learned) == ["-m", "benchmarks.peers", "clone", "--depth", "110", *data]
    with pytest.raises(TaskFailed, match="the loss of akamaster does not fall") as caught:
        saying(peer, learned.replace("true", "false"))
    assert caught.value.result["peer"] == "akamaster"
    with pytest.raises(TaskFailed, match=r"benchmarks\.peers ended with 3"):
        saying(peer, learned, 3)
    with pytest.raises(TaskFailed, match="give --data-dir"):
        gpu_timing.race(Setting(tmp_path), depth=20, against="tuned")
