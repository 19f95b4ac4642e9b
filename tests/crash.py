"""Kill training at random moments, go on, and compare with a run that was never killed.

    python -m tests.crash --kills 25 --steps 200

SIGKILL leaves no time to save: what counts is what was on the disk at that moment, half-written files included.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fastres.checkpoint import NEWEST, load
from tests.runs import assert_same_run

FLAGS = ["--threads", "1", "--log-every", "5", "--eval-every", "60", "--checkpoint-every", "3", "--no-amp", "--quiet"]


def crash(kills: int, flags: list[str], folder: Path, *, seed: int, say: Callable[[str], None] = print) -> None:
    """Kill training processes until `kills` of them died, and compare every run they belonged to.

    Args:
        kills: SIGKILLs in all. A run is killed up to three times, then left to end and compared.
        flags: Of `fastres train`.
        folder: Where the runs go.
        seed: Of the moments.
        say: Takes a line for each kill and each comparison.

    Raises:
        AssertionError: A resumed run differs from the uninterrupted one, or failed.
    """
    chance = random.Random(seed)
    whole = folder / "whole"
    began = time.perf_counter()
    _finish(flags, whole)
    seconds = time.perf_counter() - began
    say(f"uninterrupted: {seconds:.1f} s")
    killed, runs = 0, 0
    while killed < kills:
        run, runs = folder / f"run{runs}", runs + 1
        for _ in range(min(3, kills - killed)):
            process = _start(flags, run)
            try:
                process.wait(timeout=chance.uniform(0.2, 1.0) * seconds)
                break  # it was faster than its killer
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                assert process.wait() == -signal.SIGKILL
            killed += 1
            step = load(run / NEWEST).meta["step"] if (run / NEWEST).exists() else None
            left = sorted(p.name for p in run.iterdir() if p.suffix == ".tmp") if run.exists() else []
            say(f"kill {killed}: newest checkpoint at step {step}{', left behind ' + ', '.join(left) if left else ''}")
        if not (run / "result.json").exists():
            _finish(flags, run)
        assert_same_run(whole, run)
        assert not [p for p in run.iterdir() if p.suffix == ".tmp"], "a temporary file was left behind"
        say(f"{run.name}: bit-identical after {killed} kills in all")


def _start(flags: list[str], run: Path) -> subprocess.Popen[bytes]:
    """A training process in a group of its own; it goes on with `run` where there is one."""
    where = ["--resume", str(run)] if (run / "config.json").exists() else ["--out", str(run), "--overwrite", *flags]
    command = [sys.executable, "-m", "fastres", "train", *where, *(["--quiet"] if where[0] == "--resume" else [])]
    return subprocess.Popen(command, start_new_session=True)


def _finish(flags: list[str], run: Path) -> None:
    process = _start(flags, run)
    assert process.wait() == 0, f"exit code {process.returncode}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Kill training at random moments and compare.")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--data-dir", help="CIFAR-10; default: the built-in data")
    parser.add_argument("--loader", default="resident")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    flags = [*FLAGS, "--steps", str(args.steps), "--depth", str(args.depth), "--batch-size", str(args.batch_size)]
    flags += [
        "--loader",
        args.loader,
        *(["--data-dir", args.data_dir] if args.data_dir else ["--dataset", "synthetic"]),
    ]
    with tempfile.TemporaryDirectory() as folder:
        crash(args.kills, flags, Path(folder), seed=args.seed)
    print(f"all {args.kills} killed runs ended bit-identical")


if __name__ == "__main__":
    main()
