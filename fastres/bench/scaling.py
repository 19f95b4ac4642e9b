"""Cost against work: img/s over batch sizes and depths, each cell alone on the machine."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastres.bench.cells import Cell
from fastres.bench.measure import measure
from fastres.bench.report import Report
from fastres.bench.roofline import Ceilings
from fastres.config import RunConfig
from fastres.errors import OutOfMemory
from fastres.files import save_figure
from fastres.plots.curves import plain_log_ticks, style

DEPTHS = (8, 20, 32, 44, 56, 110)
BATCH_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MAX_STEP_SECONDS = 2.0


def measure_scaling(
    base: RunConfig,
    depths: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    step_seconds: float,
    rounds: int = 3,
    frozen: bool = False,
    say: Callable[[str], None],
) -> Report:
    """Time every depth at every batch size that fits.

    Args:
        base: What all have in common.
        depths, batch_sizes: Taken in rising order.
        step_seconds: A depth's larger batches are left out once a step would take longer than this, as foreseen from
            the batch before. Out of memory ends a depth likewise.
        rounds: Chunks of each.
        frozen: The same batch every step instead of a loader.
        say: Takes one-line notices.

    Returns:
        A report as `bench.measure` makes it, cells in the order measured.

    Raises:
        InputError: A depth or batch size that cannot be, before anything is measured.
        OutOfMemory: Nothing fits at all.
    """
    sizes = sorted(batch_sizes)
    grid = [[_config(base, depth, size) for size in sizes] for depth in sorted(depths)]  # a wrong one before minutes
    whole, ceilings = Report(), dict[str, Ceilings]()
    for configs in grid:
        for report in _one_depth(configs, step_seconds, rounds, frozen, ceilings, say):
            whole = whole or {**report, "cells": []}
            whole["cells"] += report["cells"]
    if not whole:
        raise OutOfMemory(f"not even batches of {sizes[0]} fit; try a smaller --batch-size or --depth")
    return whole


def _config(base: RunConfig, depth: int, batch_size: int) -> RunConfig:
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, depth=depth),
        recipe=dataclasses.replace(base.recipe, batch_size=batch_size),
    )


def _one_depth(
    configs: Sequence[RunConfig],
    step_seconds: float,
    rounds: int,
    frozen: bool,
    ceilings: dict[str, Ceilings],
    say: Callable[[str], None],
) -> Iterator[Report]:
    expected = 0.0  # seconds of a step, for each image of the batch
    for config in configs:
        batch_size = config.recipe.batch_size
        if expected * batch_size > step_seconds:
            say(f"{config.name}: batches from {batch_size} on left out, a step would take over {step_seconds:g} s")
            return
        cell = Cell(f"{config.name} batch {batch_size}", config, frozen=frozen)
        try:
            report = measure([cell], rounds=rounds, chunk_seconds=0.3, say=lambda _: None, ceilings=ceilings)
        except OutOfMemory as error:
            say(f"{config.name}: batches from {batch_size} on left out, {error}")
            return
        (found,) = report["cells"]
        expected = found["step_seconds"]["median"] / batch_size
        say(f"{config.name} batch {batch_size}: {found['images_per_second']:,.0f} img/s")
        yield report


def draw_scaling(report: Report, path: Path) -> None:
    """Images a second over the batch size, a line a depth; PNG or SVG. Raises MachineError where it cannot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    names: dict[str, list[dict[str, Any]]] = {}
    for cell in report["cells"]:
        names.setdefault(cell["label"].split()[0], []).append(cell)
    for number, (name, cells) in enumerate(names.items()):
        colour, _ = style(number)
        sizes = [cell["config"]["recipe"]["batch_size"] for cell in cells]
        rates = [cell["images_per_second"] for cell in cells]
        axes.plot(sizes, rates, color=colour, marker="o", markersize=4)
        floors = [size / cell["floor_seconds"] for size, cell in zip(sizes, cells, strict=True)]
        axes.plot(sizes, floors, color=colour, linewidth=0.8, linestyle=":")
        axes.annotate(f" {name}", (sizes[-1], rates[-1]), color=colour, va="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    ticks = sorted({cell["config"]["recipe"]["batch_size"] for cell in report["cells"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.9)  # room for the names
    axes.set(xlabel="batch size", ylabel="images a second (dotted: the machine's limit)")
    env = report["environment"]
    axes.set_title(f"{env['gpu'] or env['cpu']}, torch {env['torch']}, {env['precision']}", fontsize=9, loc="left")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=150)
