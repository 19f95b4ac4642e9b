"""fastres against the scripts of `baselines/`, on one machine, in one run, chunk by chunk.

    python -m benchmarks.throughput --data-dir path/to/cifar-10-batches-bin
    python -m benchmarks.throughput --data-dir path/to/cifar-10-batches-bin --against plain,amp,tuned --depth 56

Each side is a process that lives through the whole comparison and is idle while the other one runs; the order turns
round every time (A B, B A, ...), so that a machine that slows down slows both. A chunk begins with untimed steps, which
use up what loader workers prefetched while they were idle. fastres' side is `fastres.train` itself: the loop is held at
the end of each chunk from its console's `tick`, which it calls after every step, so loader, schedule, logs and metrics
are all in the time.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from fastres.errors import FastresError, InputError
from fastres.models.depth import check_depth

BASELINES = ("plain", "amp", "tuned", "tuned_graphs")
BATCH_SIZE = 128
UNTIMED_STEPS = 5  # a chunk's first: two workers with two batches each, prefetched
FIRST_STEPS = 5  # before the first chunk, on top: allocator, caches, compilation


def baseline_chunks(name: str, data_dir: Path, depth: int, timed_steps: int) -> Iterator[dict[str, float]]:
    """One timed chunk of a baseline for every value taken."""
    training = importlib.import_module(f"benchmarks.baselines.{name}").train(data_dir, depth)
    for _ in range(FIRST_STEPS):
        next(training)
    while True:
        for _ in range(UNTIMED_STEPS):
            next(training)
        _synchronize()
        start = perf_counter()
        for _ in range(timed_steps):
            next(training)
        _synchronize()
        yield {"seconds": perf_counter() - start}


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fastres_chunks(
    data_dir: Path, depth: int, timed_steps: int, flags: dict[str, Any], hold: Callable[[dict[str, float]], None]
) -> None:
    """Run `fastres.train`, and call `hold` with each timed chunk; does not return before the run's last step.

    `hold` gets the chunk's seconds and, on a CPU, those of them that were not forward, backward or update.
    """
    import torch

    import fastres
    from fastres.console import Console
    from fastres.step import Replica

    work = _Stopwatch()
    for name in ("forward", "backward", "update"):
        setattr(Replica, name, work.timed(getattr(Replica, name)))
    chunk = UNTIMED_STEPS + timed_steps

    class Held(Console):
        start = 0.0

        def tick(self, step: int) -> None:
            super().tick(step)
            position = (step - FIRST_STEPS) % chunk if step > FIRST_STEPS else -1
            if position not in (0, UNTIMED_STEPS):
                return
            _synchronize()
            if position == UNTIMED_STEPS:
                self.start, work.seconds = perf_counter(), 0.0
            else:
                seconds = perf_counter() - self.start
                hold(
                    {"seconds": seconds}
                    if torch.cuda.is_available()
                    else {"seconds": seconds, "other": seconds - work.seconds}
                )

    with tempfile.TemporaryDirectory() as folder:
        config = fastres.make_config(
            model={"depth": depth},
            execution={"data_dir": str(data_dir), **flags},
            recipe={"batch_size": BATCH_SIZE},
            output={"out": f"{folder}/run", "eval_every": 10**9, "checkpoint_every": str(10**9)},
        )
        fastres.train(config, console=Held("quiet"))


class _Stopwatch:
    """Seconds spent in the functions it wraps."""

    seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += perf_counter() - start

        return wrapped


def serve(side: str, data_dir: Path, depth: int, timed_steps: int, flags: dict[str, Any]) -> None:
    """A side's process: one chunk and one JSON line on stdout for each line on stdin, until stdin ends."""

    def wait() -> None:
        if not sys.stdin.readline():
            raise SystemExit

    wait()
    if side != "fastres":
        for chunk in baseline_chunks(side, data_dir, depth, timed_steps):
            print(json.dumps(chunk), flush=True)
            wait()
        return

    def hold(chunk: dict[str, float]) -> None:
        print(json.dumps(chunk), flush=True)
        wait()

    fastres_chunks(data_dir, depth, timed_steps, flags, hold)


class Side:
    """A side's process, seen from the comparison."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.throughput", "--side", name, *arguments]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def chunk(self) -> dict[str, float]:
        """Let it run one chunk."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"throughput: the {self.name} side stopped with exit code {self.process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it: closing stdin is the signal."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def compare(arguments: list[str], against: list[str], rounds: int, timed_steps: int) -> dict[str, Any]:
    """Take turns for `rounds` rounds; rates in images a second, `ratios` are fastres over each baseline."""
    images = timed_steps * BATCH_SIZE
    rates: dict[str, list[float]] = {name: [] for name in (*against, "fastres")}
    other = []
    with ExitStack() as stack:
        sides = [Side(name, arguments) for name in rates]
        for side in sides:
            stack.callback(side.close)
            side.chunk()  # the first chunk of each is thrown away
        for turn in range(rounds):
            for side in sides if turn % 2 == 0 else reversed(sides):
                chunk = side.chunk()
                rates[side.name].append(images / chunk["seconds"])
                if "other" in chunk:
                    other.append(chunk["other"] / chunk["seconds"])
    ratios = {}
    for name in against:
        each = [fast / slow for fast, slow in zip(rates["fastres"], rates[name], strict=True)]
        ratios[name] = {"median": median(each), "min": min(each), "max": max(each)}
    return {
        "images_per_second": {name: median(values) for name, values in rates.items()},
        "ratios": ratios,
        "overhead": median(other) if other else None,  # share of fastres' time outside forward, backward, update
        "rounds": rounds,
        "timed_steps": timed_steps,
        "rates": rates,
    }


def main() -> None:
    """Compare, and print one JSON object."""
    parser = argparse.ArgumentParser(description="fastres against other scripts: a ResNet, batch 128, CIFAR-10")
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of data_batch_1.bin, or its parent")
    parser.add_argument("--depth", type=int, default=20, help="6n+2 layers, default 20")
    parser.add_argument("--rounds", type=int, default=10, help="chunks of each side")
    parser.add_argument("--steps", type=int, default=15, help="timed steps in a chunk")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of fastres' execution: loader=dali"
    )
    parser.add_argument("--against", default="plain", help=f"any of {','.join(BASELINES)}, default plain")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # a side's own process
    args = parser.parse_args()
    if (inside := args.data_dir / "cifar-10-batches-bin").is_dir():  # its parent, as fastres takes it too
        args.data_dir = inside
    flags = {key: _value(text) for key, _, text in (item.partition("=") for item in args.set)}
    if args.side:
        serve(args.side, args.data_dir, args.depth, args.steps, flags)
        return
    against = args.against.split(",")
    if unknown := set(against) - set(BASELINES):
        parser.error(f"--against: there is no {unknown.pop()!r}; there are {', '.join(BASELINES)}")
    for flag, number in (("--rounds", args.rounds), ("--steps", args.steps)):
        if number < 1:
            parser.error(f"{flag} is {number}; it must be 1 or more")
    if flags.get("graph_steps", 1) != 1:  # a chunk begins and ends with any step
        parser.error(f"--set graph_steps={flags['graph_steps']}: chunks are timed step by step; leave it out")
    try:
        check_depth(args.depth)
    except InputError as error:
        parser.error(f"--depth: {error}")
    try:
        environment = _environment(flags, args.depth)
    except FastresError as error:
        parser.error(f"--set: {error}")
    if not (args.data_dir / "data_batch_1.bin").exists():
        parser.error(f"--data-dir {args.data_dir}: there is no data_batch_1.bin; give CIFAR-10's binary folder")
    passed = ["--data-dir", str(args.data_dir), "--depth", str(args.depth), "--steps", str(args.steps)]
    passed += [f"--set={item}" for item in args.set]
    race = compare(passed, against, args.rounds, args.steps)
    kept = {**race, "depth": args.depth, "execution": flags, "environment": environment}
    print(json.dumps(kept, indent=1))


def _environment(flags: dict[str, Any], depth: int) -> dict[str, Any]:
    """Of fastres' side."""
    from fastres.config import make_config
    from fastres.machine.environment import environment
    from fastres.resolve import prepare_for

    return environment(prepare_for(make_config(model={"depth": depth}, execution=flags)))


def _value(text: str) -> Any:
    """true, 2 and the like as JSON; anything else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
