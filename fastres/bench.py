"""Measures the TrainStep and the loaders that `train` uses: no loop body of its own.

A cell is one configuration, warmed up (compiled, captured, first steps taken) before anything is timed. All cells are
alive at once and take turns, a chunk of steps each, in an order that turns round every time: what slows the machine
down slows them all.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastres.build import build_loader, build_net, build_optimizer, load_images
from fastres.config import RunConfig
from fastres.cudagraph import CapturedGraph
from fastres.data.imageset import ImageSet
from fastres.roofline import Ceilings, measure_ceilings, work_of
from fastres.runtime import DTYPES, environment, peak_memory, prepare, synchronize
from fastres.step import Loader, Replica, TrainStep

SCHEMA = 1  # of the JSON; a reader refuses what it does not know
FIRST_STEPS = 5  # after compilation, before the first timed chunk: allocator, cuDNN, caches
PARTS = ("load", "forward", "backward", "update")


@dataclass(frozen=True)
class Cell:
    """One configuration to be timed.

    Attributes:
        label: Names it in tables.
        config: What `train` would run; its number of steps does not matter.
        frozen: The same batch every step instead of a loader: what is left is the step itself.
    """

    label: str
    config: RunConfig
    frozen: bool = False


@dataclass(frozen=True)
class Timing:
    """What was measured of a cell. Seconds are of one step."""

    label: str
    seconds: list[float]  # one value a chunk: its mean step
    batch_size: int
    compile_seconds: float  # compilation and capture
    peak_memory: int  # bytes
    floor: float  # seconds: the roofline's
    parts: dict[str, float]  # seconds of load, forward, backward, update: another pass, with waits between

    @property
    def images_per_second(self) -> float:
        """At the median chunk."""
        return self.batch_size / median(self.seconds)

    def spread(self) -> tuple[float, float]:
        """The 5th and 95th percentile of the chunks, in seconds a step."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        cuts = quantiles(self.seconds, n=20, method="inclusive")
        return cuts[0], cuts[-1]


class FrozenLoader:
    """Gives another loader's first batch every time."""

    name = "none"

    def __init__(self, loader: Loader, device: torch.device) -> None:
        loader.prepare(0)
        images, labels = loader.load(torch.zeros(1, dtype=torch.int64, device=device))
        self._batch = images.clone(memory_format=torch.preserve_format), labels.clone()
        loader.close()

    def prepare(self, step: int) -> None:
        """Nothing to do ahead."""

    def load(self, counter: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """The batch, whatever `counter` says."""
        return self._batch

    def close(self) -> None:
        """Nothing to release."""


class Bench:
    """A cell that is alive: `train`'s own step, warmed up."""

    def __init__(self, cell: Cell, images: ImageSet, num_steps: int) -> None:
        self.cell, config = cell, cell.config
        self.runtime = prepare(config.execution, depth=config.model.depth)
        mean = images.mean_image()
        net = build_net(config, self.runtime, num_classes=len(images.class_names))
        loader = build_loader(config, images, mean, self.runtime)
        if cell.frozen:
            loader = FrozenLoader(loader, self.runtime.device)
        self.replica = Replica(net, build_optimizer(net, config.recipe), loader, self.runtime, num_steps=num_steps)
        self.replica.lrs.fill_(config.recipe.lr)
        self.step = TrainStep([self.replica])
        start = perf_counter()
        if self.runtime.compile_scope != "none" or self.runtime.cuda_graph:
            capture = CapturedGraph if self.runtime.cuda_graph else None
            self.step.warm_up(capture, graph_steps=config.execution.graph_steps)
            synchronize(self.runtime.device)
        self.compile_seconds = perf_counter() - start
        self.work = work_of(net, config.recipe.batch_size, DTYPES[self.runtime.precision].itemsize)
        self.done = 0

    def run(self, num_steps: int) -> float:
        """Take steps; the mean seconds of one. The device is waited for before and after, not between."""
        synchronize(self.runtime.device)
        start, stop = perf_counter(), self.done + num_steps
        while self.done < stop:
            self.done += self.step(self.done, stop)
        synchronize(self.runtime.device)
        return (perf_counter() - start) / num_steps

    def parts(self, num_steps: int) -> dict[str, float]:
        """Seconds of each part of a step, launched alone and waited for: not what it costs in a captured graph."""
        seconds = dict.fromkeys(PARTS, 0.0)
        replica, device = self.replica, self.runtime.device

        def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any) -> Any:
                synchronize(device)
                start = perf_counter()
                result = function(*args)
                synchronize(device)
                seconds[part] += perf_counter() - start
                return result

            return wrapped

        plain = {part: getattr(replica, part) for part in PARTS[1:]}
        load = replica.loader.load
        for part, function in plain.items():
            setattr(replica, part, timed(part, function))
        replica.loader.load = timed("load", load)  # type: ignore[method-assign]
        try:
            for _ in range(num_steps):
                timed("load", replica.loader.prepare)(self.done)
                replica.step()
                self.done += 1
        finally:
            for part in plain:
                delattr(replica, part)
            del replica.loader.load
        return {part: value / num_steps for part, value in seconds.items()}

    def close(self) -> None:
        """Release threads and buffers."""
        self.replica.loader.close()


def measure(
    cells: Sequence[Cell],
    *,
    rounds: int = 10,
    chunk_seconds: float = 0.5,
    say: Callable[[str], None],
) -> tuple[list[Timing], dict[str, Any]]:
    """Time cells, interleaved.

    Args:
        cells: With labels that differ.
        rounds: Chunks of each cell.
        chunk_seconds: About how long a chunk takes; its number of steps is chosen from the first ones.
        say: Takes one-line notices.

    Returns:
        The timings, and the report as JSON values: schema, environment, ceilings, cells.
    """
    images: dict[Any, ImageSet] = {}
    with contextlib.ExitStack() as stack:
        benches = []
        for cell in cells:
            config = cell.config
            key = (config.data, config.execution.data_dir)
            if key not in images:
                images[key] = load_images(config.data, config.execution, say=say)
            say(f"warming up {cell.label}")
            bench = Bench(cell, images[key], num_steps=1_000_000)
            stack.callback(bench.close)
            bench.run(FIRST_STEPS)
            benches.append(bench)
        lengths = [max(1, round(chunk_seconds / bench.run(FIRST_STEPS))) for bench in benches]
        seconds: list[list[float]] = [[] for _ in benches]
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            order = list(range(len(benches)))
            for k in order if turn % 2 == 0 else reversed(order):
                seconds[k].append(benches[k].run(lengths[k]))
        timings, ceilings = [], dict[str, Ceilings]()
        for bench, length, values in zip(benches, lengths, seconds, strict=True):
            runtime = bench.runtime
            if runtime.precision not in ceilings:
                ceilings[runtime.precision] = measure_ceilings(runtime.device, runtime.dtype)
            timings.append(
                Timing(
                    bench.cell.label,
                    values,
                    bench.cell.config.recipe.batch_size,
                    bench.compile_seconds,
                    peak_memory(runtime.device),
                    ceilings[runtime.precision].floor(bench.work),
                    bench.parts(max(2, length // 2)),
                )
            )
        report = {
            "schema": SCHEMA,
            "environment": environment(benches[0].runtime),
            "ceilings": {precision: dataclasses.asdict(value) for precision, value in ceilings.items()},
            "cells": [_as_json(timing, cell) for timing, cell in zip(timings, cells, strict=True)],
        }
    return timings, report


def _as_json(timing: Timing, cell: Cell) -> dict[str, Any]:
    low, high = timing.spread()
    return {
        "label": timing.label,
        "config": cell.config.to_dict(),
        "digest": cell.config.digest,
        "frozen": cell.frozen,
        "images_per_second": timing.images_per_second,
        "step_seconds": {"median": median(timing.seconds), "p5": low, "p95": high, "n": len(timing.seconds)},
        "chunks": timing.seconds,
        "compile_seconds": timing.compile_seconds,
        "peak_memory": timing.peak_memory,
        "floor_seconds": timing.floor,
        "over_floor": median(timing.seconds) / timing.floor,
        "parts_seconds": timing.parts,
    }


@dataclass(frozen=True)
class Comparison:
    """How much longer B's steps take than A's."""

    ratio: float  # median of B's over A's seconds, chunk by chunk
    low: float
    high: float  # of the 99 % bootstrap interval
    verdict: str  # "faster", "slower" or "no difference": of B


def compare(a: Sequence[float], b: Sequence[float], *, dead_band: float = 0.01, seed: int = 0) -> Comparison:
    """Compare two cells' chunks, which were measured in turns.

    The interval is a percentile bootstrap over the rounds (Efron 1979), both cells' chunks of a round drawn together.

    Args:
        a, b: Seconds a step, one value a round, of the same rounds.
        dead_band: Differences within it are none.
        seed: Of the resampling.
    """
    ratios = [y / x for x, y in zip(a, b, strict=True)]
    chance = random.Random(seed)  # noqa: S311 (no secret)
    medians = sorted(median(chance.choices(ratios, k=len(ratios))) for _ in range(2_000))
    low, high = medians[10], medians[-11]
    verdict = "slower" if low > 1 + dead_band else "faster" if high < 1 - dead_band else "no difference"
    return Comparison(median(ratios), low, high, verdict)


def matrix(base: RunConfig, switches: dict[str, Sequence[Any]]) -> Iterator[Cell]:
    """All combinations of switches as cells.

    Args:
        base: What all have in common.
        switches: Values by "depth", "batch_size", "loader" ("none": a frozen batch), "precision", "compile", "graph".
    """
    places = {
        "depth": ("model", "depth"),
        "batch_size": ("recipe", "batch_size"),
        "loader": ("execution", "loader"),
        "precision": ("execution", "precision"),
        "compile": ("execution", "compile"),
        "graph": ("execution", "cuda_graph"),
    }
    combinations: list[dict[str, Any]] = [{}]
    for name, values in switches.items():
        combinations = [{**chosen, name: value} for chosen in combinations for value in values]
    for chosen in combinations:
        tree = base.to_dict()
        words = []
        for name, value in chosen.items():
            section, key = places[name]
            frozen_loader = name == "loader" and value == "none"
            tree[section][key] = "resident" if frozen_loader else value
            words.append(f"{name}={value}" if isinstance(value, bool | int) else str(value))
        yield Cell(" ".join(words) or base.name, RunConfig.from_dict(tree), frozen=chosen.get("loader") == "none")
