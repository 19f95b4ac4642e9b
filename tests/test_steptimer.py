"""steptimer.py: seconds between marks, shared among steps; pauses are nobody's."""

import time

import pytest
import torch

from fastres.steptimer import StepTimer, milliseconds


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


def test_percentiles() -> None:
    found = milliseconds([k / 1e3 for k in range(1, 101)])
    assert found["p50"] == pytest.approx(50.5, abs=1)
    assert found["p99"] == pytest.approx(99, abs=1)
    assert milliseconds([0.5]) == {"p50": 500, "p99": 500}
    assert milliseconds([]) == {}
