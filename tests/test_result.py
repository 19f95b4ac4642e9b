"""result.py: what a run tells when it is done."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastres.config import RunConfig
from fastres.result import RunResult, summary

RESULT = RunResult(
    run=Path("runs/x"), test_error=0.0875, test_loss=0.5, best_test_error=0.0825, best_step=62_000, train_error=0.001,
    class_errors=[0.1, None], steps=64_000, warmup_end=None, num_parameters=269_722, images_per_second=98_765.4,
    step_milliseconds={"p50": 1.2345, "p99": 2_345.6}, peak_memory=1_230_000_000, side_by_side=3,
    seconds={"train": 187.4, "evaluate": 2.0, "import": 0.049},
)  # fmt: skip


def lines(**changes: Any) -> str:
    official: Any = SimpleNamespace(official=True, digest="sha256:0123456789abcdef0123")
    return "\n".join(summary(replace(RESULT, **changes), RunConfig(), official))


def test_the_summary_tells_the_last_steps_error_first() -> None:
    text = lines()
    assert text.startswith("ResNet20, seed 0, after 64,000 steps: test error 8.75 %\n")
    for line in (
        "  best over steps   8.25 % at step 62,000 (chosen on the test images: no result)",
        "  training error    0.10 % (running, augmented)",
        "  training clock    3:07, 98,765 img/s, one of 3 runs side by side",
        "  step time         1.23 ms (median), 2,346 ms (99th percentile)",
        "  peak memory       1.23 GB",
        "  testing           2.0 s",
    ):
        assert f"\n{line}\n" in text
    assert "importing" not in text
    alone = lines(side_by_side=1, best_step=64_000, step_milliseconds={})
    assert "98,765 img/s\n" in alone
    assert "best over steps" not in alone
    assert "step time" not in alone
    other: Any = SimpleNamespace(official=False, digest="sha256:0123456789abcdef0123")
    assert "(data set not the official one: " in summary(RESULT, RunConfig(), other)[0]
