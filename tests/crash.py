"""Kill training at random moments, go on, and compare with a run that was never killed.

    python -m tests.crash --kills 25 --steps 200
    python -m tests.crash --reproduce --kills 10

SIGKILL leaves no time to save: what counts is what was on the disk at that moment, half-written files included.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastres.checkpoint import NEWEST, load
from tests.runs import assert_same_run

FLAGS = ["--threads", "1", "--log-every", "5", "--eval-every", "60", "--checkpoint-every", "3", "--no-amp", "--quiet"]


def crash(
    kills: int,
    flags: list[str],
    folder: Path,
    *,
    seed: int,
    program: str = "fastres",
    say: Callable[[str], None] = print,
) -> None:
    """Kill training processes until `kills` of them died, and compare every run they belonged to.

    Args:
        kills: SIGKILLs in all. A run is killed up to three times, then left to end and compared.
        flags: Of `fastres train`.
        folder: Where the runs go.
        seed: Of the moments.
        program: The module that trains.
        say: Takes a line for each kill and each comparison.

    Raises:
        AssertionError: A resumed run differs from the uninterrupted one, or failed.
    """
    chance = random.Random(seed)
    whole = folder / "whole"
    began = time.perf_counter()
    _finish(flags, whole, program)
    seconds = time.perf_counter() - began
    say(f"uninterrupted: {seconds:.1f} s")
    killed, runs = 0, 0
    while killed < kills:
        run, runs = folder / f"run{runs}", runs + 1
        for _ in range(min(3, kills - killed)):
            process = _start(flags, run, program)
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
            _finish(flags, run, program)
        assert_same_run(whole, run)
        assert not [p for p in run.iterdir() if p.suffix == ".tmp"], "a temporary file was left behind"
        say(f"{run.name}: bit-identical after {killed} kills in all")


REPRODUCE = ["reproduce", "all", "--preset", "smoke", "--nets", "ResNet8,PlainNet8", "--steps", "12", "--threads", "1"]
REPRODUCE += ["--precision", "fp32"]


def crash_reproduce(
    kills: int,
    whole: Path,
    folder: Path,
    *,
    seed: int,
    program: str = "fastres",
    say: Callable[[str], None] = print,
) -> None:
    """Kill `fastres reproduce` at `kills` random moments, and compare the tables that it ends with.

    Args:
        kills: SIGKILLs in all; a folder's `reproduce` is killed up to five times, then left to end and compared.
        whole: A folder in which it was not killed.
        folder: Where the others go.
        seed: Of the moments.
        program: The module that trains.
        say: Takes a line for each kill and each comparison.

    Raises:
        AssertionError: A table differs, or the last run failed.
    """
    chance = random.Random(seed)
    killed, count = 0, 0
    while killed < kills:
        runs, count = folder / f"runs{count}", count + 1
        command = [sys.executable, "-m", program, *REPRODUCE, "--runs", str(runs), "--quiet"]
        for _ in range(min(5, kills - killed)):
            process, finished = subprocess.Popen(command, start_new_session=True), chance.randrange(4)
            while process.poll() is None and len(list(runs.glob("*/*/result.json"))) < finished:
                time.sleep(0.05)
            try:  # from when so many runs are finished; with none, from before torch is imported
                process.wait(timeout=chance.uniform(1, 8))
                break  # it was faster than its killer
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            killed += 1
            done = len(list(runs.glob("*/*/result.json")))
            say(f"kill {killed}: {done} of 3 runs finished, {'a' if (runs / 'table6.json').exists() else 'no'} table")
        assert subprocess.run(command).returncode == 0
        assert timeless_table(runs / "table6.json") == timeless_table(whole / "table6.json")
        say(f"{runs.name}: the same table after {killed} kills in all")


def timeless_table(path: Path) -> dict[str, Any]:
    """A table 6 without what was measured by the clock."""
    stored: dict[str, Any] = json.loads(path.read_text())
    for row in stored["rows"]:
        del row["seconds"], row["images_per_second"]
    return stored


def _start(flags: list[str], run: Path, program: str) -> subprocess.Popen[bytes]:
    """A training process in a group of its own; it goes on with `run` where there is one."""
    where = ["--resume", str(run)] if (run / "config.json").exists() else ["--out", str(run), "--overwrite", *flags]
    command = [sys.executable, "-m", program, "train", *where, *(["--quiet"] if where[0] == "--resume" else [])]
    return subprocess.Popen(command, start_new_session=True)


def _finish(flags: list[str], run: Path, program: str) -> None:
    process = _start(flags, run, program)
    assert process.wait() == 0, f"exit code {process.returncode}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Kill training at random moments and compare.")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument(
        "--reproduce", action="store_true", help="kill `fastres reproduce`; the flags below are train's"
    )
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
        if args.reproduce:
            whole = Path(folder, "whole")
            line = [sys.executable, "-m", "fastres", *REPRODUCE, "--runs", str(whole), "--quiet"]
            subprocess.run(line, check=True)
            crash_reproduce(args.kills, whole, Path(folder), seed=args.seed)
            return
        crash(args.kills, flags, Path(folder), seed=args.seed)
    print(f"all {args.kills} killed runs ended bit-identical")


if __name__ == "__main__":
    main()
