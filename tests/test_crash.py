"""A run killed at random moments ends as if it had not been. `scripts/crash-test` does it 25 times."""

import os
from pathlib import Path

import pytest

from tests.crash import FLAGS, crash


@pytest.mark.timeout(300)
def test_killed_runs_end_bit_identical(tmp_path: Path) -> None:
    size = ["--dataset", "synthetic", "--depth", "8", "--batch-size", "16", "--steps", "60"]
    crash(2, [*FLAGS, *size], tmp_path, seed=int.from_bytes(os.urandom(4)), program="tests.few")
