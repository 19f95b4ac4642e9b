"""Measures the TrainStep and the loaders that `train` uses: no loop body of its own.

A cell is one configuration, warmed up (compiled, captured, first steps taken) before anything is timed. All cells are
alive at once and take turns, a chunk of steps each, in an order that turns round every time: what slows the machine
down slows them all.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from fastres.bench.cells import Cell
from fastres.bench.parts import PARTS, Marks, marked
from fastres.bench.roofline import Ceilings, Work, measure_ceilings, work_of
from fastres.build import build_loaders, build_net, build_optimizer, load_images
from fastres.cudagraph import CapturedGraph
from fastres.data.frozen import FrozenLoader
from fastres.data.imageset import ImageSet
from fastres.guards import explained_compilation, explained_memory_errors
from fastres.machine import nvml
from fastres.machine.environment import environment
from fastres.machine.memory import reset_peak_memory
from fastres.resolve import prepare_for, prepare_unchecked
from fastres.runtime import DTYPES, synchronize
from fastres.step import Loader, Replica, TrainStep

SCHEMA = 1  # of the JSON; a reader refuses what it does not know
FIRST_STEPS = 5  # after compilation, before the first timed chunk: allocator, cuDNN, caches
COLD_STEPS = 1  # of a turn: the first is 5 to 10 % slower on a CPU, after another network's
PROFILED = 0.25  # steps of the profiled pass for each unmodified one
LEAST_ROUNDS = 3
MAX_STEPS = 1_000_000  # places in a cell's logs; then they are filled anew


class Bench:
    """A cell that is alive: `train`'s own step, warmed up. `say` is told where another loader takes DALI's place.

    Raises:
        OutOfMemory: The batch does not fit.
        MachineError: GPU, DALI or compiler are not there.
    """

    def __init__(
        self, cell: Cell, images: ImageSet, num_steps: int = MAX_STEPS, say: Callable[[str], None] | None = None
    ) -> None:
        self.cell, self._num_steps, config = cell, num_steps, cell.config
        start = perf_counter()
        self.runtime = prepare_for(config)
        resolve_seconds = perf_counter() - start
        device = self.runtime.device
        gpu = device.type == "cuda"
        held = torch.cuda.memory_allocated(device) if gpu else 0
        reset_peak_memory(device)
        memory = explained_memory_errors(config, self.runtime, num_replicas=cell.num_replicas)
        with memory, contextlib.ExitStack() as failed:
            configs = [dataclasses.replace(config, seed=config.seed + k) for k in range(cell.num_replicas)]
            loaders = build_loaders(configs, images, images.mean_image(), self.runtime, say)
            for loader in loaders:
                failed.callback(loader.close)
            if cell.frozen:
                frozen: list[Loader] = [_frozen(each, device) for each in loaders]
                for loader in loaders:  # after the last is read: they may share a pipeline
                    loader.close()
                loaders = frozen
            self.replicas: list[Replica] = []
            for one, loader in zip(configs, loaders, strict=True):
                net = build_net(one, self.runtime, num_classes=len(images.class_names))
                replica = Replica(net, build_optimizer(net, one.recipe), loader, self.runtime, num_steps=num_steps)
                replica.lrs.fill_(one.recipe.lr)
                self.replicas.append(replica)
            self.replica = self.replicas[0]
            self.step, self.done = TrainStep(self.replicas), 0
            start = perf_counter()
            if self.runtime.needs_warm_up:
                with explained_compilation(self.runtime):
                    self.step.warm_up(self._capture, graph_steps=config.execution.graph_steps)
                synchronize(device)
            self.compile_seconds = resolve_seconds + perf_counter() - start
            self.run(FIRST_STEPS)
            failed.pop_all()
        self.peak_memory = torch.cuda.max_memory_allocated(device) - held if gpu else None
        self.images = cell.num_replicas * config.recipe.batch_size
        work = work_of(net, config.recipe.batch_size, DTYPES[self.runtime.precision].itemsize)
        self.work = Work(cell.num_replicas * work.multiply_adds, cell.num_replicas * work.bytes_moved)

    @property
    def _capture(self) -> type[CapturedGraph] | None:
        return CapturedGraph if self.runtime.cuda_graph else None

    def run(self, num_steps: int) -> float:
        """Take `num_steps` unmodified steps after those of `warm`; return the mean seconds of one."""
        self.warm(num_steps)
        return self.timed(num_steps)

    def warm(self, num_steps: int) -> None:
        """Get ready for so many steps: set the process up as this cell has it, since another may have had its turn.

        A step or more warms what was left cold, and uses up the batches that the loader's workers made meanwhile.
        """
        prepare_for(self.cell.config)
        ahead = max(COLD_STEPS, self.replica.loader.prefetched)
        if self.done + ahead + num_steps > self._num_steps:
            self.done = 0
            self.step.seek(0)
        self._advance(ahead)

    def timed(self, num_steps: int) -> float:
        """Take `num_steps` steps and return the mean seconds of one. Nothing is waited for in between."""
        device = self.runtime.device
        synchronize(device)
        clock = Marks(device)
        clock.mark("start")
        self._advance(num_steps)
        clock.mark("stop")
        return clock.seconds()["stop"] / num_steps

    def whole_periods(self, num_steps: float) -> int:
        """About so many steps, in whole periods of the loader: each chunk then has its share of the loader's work."""
        period = self.replica.loader.period
        return period * max(1, round(num_steps / period))

    def _advance(self, num_steps: int) -> None:
        stop = self.done + num_steps
        while self.done < stop:
            self.done += self.step(self.done, stop)

    def parts(self, num_steps: int) -> dict[str, float]:
        """Seconds of each part of a step and of the gaps between them, in a pass of its own, with marks.

        With a captured step the marks are nodes of a second graph: the parts are the graph's, not eager launches'. Of
        several replicas they are the first one's, with the others beside it.
        """
        self.warm(COLD_STEPS + 2 * num_steps)
        replica, graphs, device = self.replica, dict(self.step.graphs), self.runtime.device
        marks, series = Marks(device), Marks(device)
        seconds = dict.fromkeys(PARTS, 0.0)

        def take(*, read: bool) -> None:
            for _ in range(num_steps):
                self.done += self.step(self.done)
                if read:
                    for part, value in marks.seconds().items():
                        seconds[part] += value / num_steps

        with marked(replica, marks):
            if graphs:
                self.step.graphs.clear()
                self.step.warm_up(self._capture)
                self.step.seek(self.done)
            apart = device.type == "cuda"  # there reading the marks waits for the device
            self._advance(COLD_STEPS)  # a loader that the warm-up took to step 0 has come back
            marks.seconds()  # discard those of these steps
            series.mark("start")
            take(read=not apart)
            series.mark("stop")
            whole = series.seconds()["stop"] / num_steps
            if apart:
                take(read=True)
        self.step.graphs.update(graphs)
        return {**seconds, "gaps": whole - sum(seconds.values())}

    def close(self) -> None:
        """Release threads and buffers."""
        for replica in self.replicas:
            replica.loader.close()


def measure(
    cells: Sequence[Cell],
    *,
    rounds: int = 10,
    chunk_seconds: float = 0.5,
    max_seconds: float = math.inf,
    say: Callable[[str], None],
    tick: Callable[[int, int], None] = lambda _done, _rounds: None,
    ceilings: dict[str, Ceilings] | None = None,
) -> dict[str, Any]:
    """Time cells, interleaved.

    Args:
        cells: With labels that differ.
        rounds: Chunks of each cell.
        chunk_seconds: About how long a chunk takes; its number of steps is chosen from the first ones.
        max_seconds: Fewer rounds, but `LEAST_ROUNDS`, where that many would take longer: a chunk is a step at least,
            and with DALI no less than the steps whose batches are made together.
        say: Takes one-line notices.
        tick: Takes the rounds done and the rounds in all.
        ceilings: The machine's, as earlier calls found them; what is missing is measured and added.

    Returns:
        The report as JSON values: schema, environment, ceilings, cells.
    """
    with contextlib.ExitStack() as stack:
        benches = list(_alive(cells, stack, say))
        for note in dict.fromkeys(note for bench in benches for note in bench.runtime.notes):  # each once
            say(note)
        first = [bench.run(FIRST_STEPS) for bench in benches]
        wanted = [min(chunk_seconds / step, MAX_STEPS / 4) for step in first]
        lengths = [bench.whole_periods(num_steps) for bench, num_steps in zip(benches, wanted, strict=True)]
        round_seconds = (1 + PROFILED) * sum(length * step for length, step in zip(lengths, first, strict=True))
        if rounds * round_seconds > max_seconds:
            rounds = min(rounds, max(LEAST_ROUNDS, int(max_seconds / round_seconds)))
        chunks = [_Chunks(bench, length) for bench, length in zip(benches, lengths, strict=True)]
        for turn in range(rounds):
            tick(turn, rounds)
            for each in chunks if turn % 2 == 0 else reversed(chunks):
                each.take()
            for each in chunks:
                each.take_parts()
        ceilings = {} if ceilings is None else ceilings
        names = _measure_ceilings(benches, ceilings)
        return {
            "schema": SCHEMA,
            "environment": environment(benches[0].runtime) | nvml.clocks(benches[0].runtime.device),
            "ceilings": {name: dataclasses.asdict(value) for name, value in ceilings.items()},
            "cells": [each.report(ceilings[name]) for each, name in zip(chunks, names, strict=True)],
        }


@dataclass
class _Chunks:
    """What is measured of one cell."""

    bench: Bench
    length: int  # steps
    seconds: list[float] = field(default_factory=list)  # a step, of each chunk
    parts: list[dict[str, float]] = field(default_factory=list)
    joules: float = 0.0

    def take(self) -> None:
        """Time a chunk."""
        self.bench.warm(self.length)
        before = nvml.joules(self.bench.runtime.device)
        self.seconds.append(self.bench.timed(self.length))
        self.joules += nvml.joules(self.bench.runtime.device) - before

    def take_parts(self) -> None:
        """Time the parts of a step, in a shorter chunk."""
        self.parts.append(self.bench.parts(max(1, round(PROFILED * self.length))))

    def report(self, ceilings: Ceilings) -> dict[str, Any]:
        """The cell's part of the report. Seconds are of one step, at the median chunk if they are one number."""
        bench, cell = self.bench, self.bench.cell
        low, step_seconds, high = np.percentile(self.seconds, (5, 50, 95)).tolist()
        floor, num_images = ceilings.floor(bench.work), len(self.seconds) * self.length * bench.images
        joules = self.joules / num_images if self.joules else None  # None where NVML does not count
        over = [sum(chunk.values()) / step for chunk, step in zip(self.parts, self.seconds, strict=True)]
        return {
            "label": cell.label,
            "config": cell.config.to_dict(),
            "digest": cell.config.digest,
            "frozen": cell.frozen,
            "num_replicas": cell.num_replicas,
            "resolved": bench.runtime.to_dict(),  # what "auto" came to
            "images_per_second": bench.images / step_seconds,
            "step_seconds": {"median": step_seconds, "p5": low, "p95": high, "n": len(self.seconds)},
            "chunks": self.seconds,
            "compile_seconds": bench.compile_seconds,  # cells whose networks are equal share it, the first one pays
            "peak_memory": bench.peak_memory,  # bytes of GPU memory that this cell added; None on a CPU
            "floor_seconds": floor,  # the roofline's
            "over_floor": step_seconds / floor,
            "profiled_pass": {part: median(chunk[part] for chunk in self.parts) for part in (*PARTS, "gaps")},
            "profiled_over_step": median(over),  # of the same round
            "joules_per_image": joules,
            "joules_per_paper_run": None if joules is None else joules * 64_000 * 128,
        }


def _measure_ceilings(benches: Sequence[Bench], ceilings: dict[str, Ceilings]) -> list[str]:
    """Add the machine's at each precision, and at each number of threads where the cells differ in it.

    Returns:
        The name of each bench's.
    """
    alike = len({bench.runtime.threads for bench in benches}) == 1
    names = [b.runtime.precision + ("" if alike else f", threads {b.runtime.threads}") for b in benches]
    for name, bench in zip(names, benches, strict=True):
        if name not in ceilings:
            bench.warm(0)  # threads, and whether a product of fp32 is one of TF32
            ceilings[name] = measure_ceilings(bench.runtime.device, bench.runtime.dtype)
    return names


def _alive(cells: Sequence[Cell], stack: contextlib.ExitStack, say: Callable[[str], None]) -> Iterator[Bench]:
    """Each cell, warmed up; closed with the stack. Equal data sets are loaded once."""
    images: dict[Any, ImageSet] = {}
    for cell in cells:
        prepare_unchecked(cell.config)  # what is not there is told before minutes are spent on the cells ahead
    for cell in cells:
        key = (cell.config.data, cell.config.execution.data_dir)
        if key not in images:
            images[key] = load_images(cell.config.data, cell.config.execution, say=say)
        say(f"warming up {cell.label}")
        yield stack.enter_context(contextlib.closing(Bench(cell, images[key], say=say)))


def _frozen(loader: Loader, device: torch.device) -> FrozenLoader:
    """Another loader's first batch, every time."""
    loader.prepare(0)
    images, labels = loader.load(torch.zeros(1, dtype=torch.int64, device=device))
    return FrozenLoader(images.clone(memory_format=torch.preserve_format), labels.clone())
