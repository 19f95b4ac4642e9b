"""Small runs for tests: eight layers on the built-in data, and how two runs are compared."""

from pathlib import Path
from typing import Any

import torch

from fastres import checkpoint
from fastres.config import RunConfig, make_config
from fastres.configtree import merge
from fastres.rundir import RunDir


def tiny(out: Path, **changes: Any) -> RunConfig:
    """A run of two dozen steps that takes a few seconds on one core."""
    base: dict[str, Any] = {
        "model": {"depth": 8},
        "recipe": {"steps": 24, "batch_size": 16, "lr": 0.05, "milestones": [12, 18]},
        "execution": {"device": "cpu", "precision": "fp32", "threads": 1},
        "output": {"out": str(out), "log_every": 5, "eval_every": 12, "checkpoint_every": "7"},
        "data": {"dataset": "synthetic"},
    }
    return make_config("paper", **merge(base, changes))


def timeless_metrics(path: Path) -> list[dict[str, Any]]:
    """A run's metrics without measured times."""
    return [{k: v for k, v in record.items() if k != "clock"} for record in RunDir(path).metrics()]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, momentum, BN buffers, logs and metrics are equal bit for bit."""
    a, b = (checkpoint.load(path / checkpoint.NEWEST) for path in (one, other))
    assert a.tensors.keys() == b.tensors.keys()
    different = [name for name in a.tensors if not torch.equal(a.tensors[name], b.tensors[name])]
    assert not different
    keys = ("step", "logged", "warmup_end", "best_error", "best_step", "scaler", "data")
    assert {k: a.meta[k] for k in keys} == {k: b.meta[k] for k in keys}
    assert timeless_metrics(one) == timeless_metrics(other)
