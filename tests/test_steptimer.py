"""steptimer.py: seconds between marks, shared among steps; pauses are nobody's."""

import time

import pytest
import torch

from fastres.steptimer import StepTimer, milliseconds
from tests.fakecuda import FakeCuda


def test_steps_are_timed_and_pauses_are_not() -> None:
    timer = StepTimer(torch.device("cpu"))
    timer.begin()
    time.sleep(0.02)
    timer.mark(1)
    time.sleep(0.04)
    timer.mark(4)
    time.sleep(0.3)
    timer.begin()
    time.sleep(0.02)
    timer.mark(1)
    seconds = timer.collect()
    assert len(seconds) == 6
    assert seconds[0] == pytest.approx(0.02, abs=0.015)
    assert seconds[1:5] == [seconds[1]] * 4
    assert seconds[1] == pytest.approx(0.01, abs=0.008)
    assert max(seconds) < 0.2
    assert timer.collect() == []


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def launch_and_mark(cuda: FakeCuda, timer: StepTimer) -> None:
    """Six steps in three launches, and a pause of 0.3 s in which something else runs."""
    timer.begin()
    cuda.launch("step", 0.02)
    timer.mark(1)
    cuda.launch("four steps", 0.04)
    timer.mark(4)
    cuda.launch("evaluation", 0.3)
    timer.begin()
    cuda.launch("step", 0.03)
    timer.mark(1)


def test_on_a_gpu_the_stream_is_timed_and_not_the_host(cuda: FakeCuda) -> None:
    timer = StepTimer(torch.device("cuda"))
    for _ in range(4):  # from log step to log step
        launch_and_mark(cuda, timer)
        assert timer.collect() == pytest.approx([0.02, 0.01, 0.01, 0.01, 0.01, 0.03])
        cuda.launch("save", 1.0)
    assert timer.collect() == []
    assert len(cuda.events) == 5  # of the first time: a run of 64,000 steps needs no more


def test_on_a_gpu_steps_are_timed_where_they_run(cuda: FakeCuda) -> None:
    timer = StepTimer(torch.device("cuda"))
    cuda.launch("something else", 7.0)
    with torch.cuda.stream(torch.cuda.Stream()):
        launch_and_mark(cuda, timer)
    assert sum(timer.collect()) == pytest.approx(0.09)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_a_beginning_a_step_has_no_time(cuda: FakeCuda, device: str) -> None:
    timer = StepTimer(torch.device(device))
    timer.mark(3)
    assert timer.collect() == []
    timer.mark(3)
    timer.mark(1)
    assert len(timer.collect()) == 1
    timer.begin()
    timer.begin()
    assert timer.collect() == []


def test_percentiles() -> None:
    found = milliseconds([k / 1e3 for k in range(1, 101)])
    assert found["p50"] == pytest.approx(50.5, abs=1)
    assert found["p99"] == pytest.approx(99, abs=1)
    assert milliseconds([0.5]) == {"p50": 500, "p99": 500}
    assert milliseconds([]) == {}
