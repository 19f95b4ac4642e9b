"""`tuned.py` with Inductor's own CUDA graphs; on a CPU, which has none, the same thing."""

from collections.abc import Generator
from pathlib import Path

from benchmarks.baselines import tuned


def train(data_dir: Path, depth: int = 20) -> Generator[float, None, None]:
    """Train without end; yields the mean loss as last read from the device."""
    return tuned.train(data_dir, depth, mode="max-autotune")
