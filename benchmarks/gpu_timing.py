"""The tasks of `scripts/gpu-check` that time: how fast, against whom, and where the time goes.

torch is imported only inside, so that the list of tasks is there at once.
"""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_files import ROOT, Result, Setting, TaskFailed

if TYPE_CHECKING:
    from fastres.bench.cells import Cell
    from fastres.bench.measure import Bench
    from fastres.config import RunConfig
    from fastres.step import TrainStep
    from fastres.steptimer import StepTimer

REPLICAS = (1, 2, 4, 5, 8)
STEPS = 200  # about so many are timed at a time
BURST = 20  # launched without waiting for the device: the driver's queue holds some thirty graphs
POLL_SECONDS = 0.02  # how exactly a start is timed
STOP_SECONDS = 60.0  # that a training may take to save when it is told to stop

# What the project wants. A task says whether it is so; it does not fail where it is not.
HOST_TARGET = 10e-6  # seconds of the host a step
EVALUATION_TARGET = 0.01  # share of the training's time
START_TARGETS = {"cold": 90.0, "warm": 15.0}  # seconds to ResNet-110's first step


def bench(setting: Setting, depth: int) -> Result:
    """A depth at the defaults, with each loader and with a frozen batch."""
    return _measured(setting, _with_each_loader(setting.config(depth)))


def race(setting: Setting, depth: int, against: str) -> Result:
    """fastres against the scripts of `baselines/`."""
    steps, rounds = (1, 1) if setting.tiny else (300, 10)
    arguments = ["--against", against, "--depth", str(setting.config(depth).model.depth)]
    arguments += ["--steps", str(steps), "--rounds", str(rounds), "--set", f"device={setting.device}"]
    if setting.tiny:
        arguments += ["--set", "threads=1", "--set", "precision=fp32"]
    return _printed(setting, "throughput", arguments)


def peer(setting: Setting, depth: int, checkout: Path) -> Result:
    """Another project's trainer, unmodified, with fastres before and after.

    Raises:
        TaskFailed: It did not run, or learned nothing: then it does not do the same work.
    """
    result = _printed(setting, "peers", [str(checkout), "--depth", str(depth)])
    if not result["loss_falls"]:
        raise TaskFailed(f"the loss of {result['peer']} does not fall", result)
    return result


def _printed(setting: Setting, module: str, arguments: list[str]) -> Result:
    """What a module of benchmarks/ prints, which needs CIFAR-10's folder and has processes of its own.

    Raises:
        TaskFailed: No folder is given, or the module ended with an error.
    """
    if setting.data_dir is None:
        raise TaskFailed("it needs CIFAR-10: give --data-dir", {})
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--data-dir", str(setting.data_dir)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise TaskFailed(f"benchmarks.{module} ended with {done.returncode}", {})
    result: Result = json.loads(done.stdout)
    return result


def host(setting: Setting, depth: int) -> Result:
    """What the host does for a step, what the GPU waits for it, and what the loaders cost.

    Of each loader, and of a frozen batch: `host_seconds` of launching a step in bursts for which the driver's queue has
    room, and `host_share` of the step's time on the device; `loader_share`, by how much a
    step on a frozen batch is shorter; `idle`, the share of a profile's time in which the GPU ran nothing, and
    `idle_between_steps`, the part of it from step to step.
    """
    from fastres.bench.measure import Bench
    from fastres.bench.profiling import take_profile
    from fastres.build import load_images
    from fastres.steptimer import StepTimer

    config, rounds = setting.config(depth), 1 if setting.tiny else 10
    cells, images = _with_each_loader(config), load_images(config.data, config.execution, say=print)
    seen: dict[str, list[tuple[float, float, float]]] = {cell.label: [] for cell in cells}
    with contextlib.ExitStack() as stack:
        alive = list[tuple[Bench, StepTimer]]()
        for cell in cells:
            bench = Bench(cell, images)
            stack.callback(bench.close)
            alive.append((bench, StepTimer(bench.runtime.device)))
        for turn in range(rounds):
            for bench, timer in alive if turn % 2 == 0 else reversed(alive):
                steps = 4 if setting.tiny else bench.whole_periods(STEPS)
                seen[bench.cell.label].append(_launched(bench, timer, steps))
    rows = list[Result]()
    frozen = [step for step, _, _ in seen[cells[-1].label]]
    for cell in cells:
        step, launch, device = zip(*seen[cell.label], strict=True)
        row: Result = {
            "label": cell.label,
            "rounds": rounds,
            "step_seconds": median(step),
            "host_seconds": {**_held_to(fmean(launch), HOST_TARGET), "median": median(launch), "max": max(launch)},
            "host_share": sum(launch) / sum(device),
        }
        if not cell.frozen:
            row["loader_share"] = median((own - least) / own for own, least in zip(step, frozen, strict=True))
            with tempfile.TemporaryDirectory() as folder:
                taken = take_profile(cell, Path(folder) / "trace.json", say=print)
            row |= {"idle": taken.idle, "idle_between_steps": taken.idle_between_steps}
        rows.append(row)
    return {"host": rows}


def _launched(bench: "Bench", timer: "StepTimer", num_steps: int) -> tuple[float, float, float]:
    """Seconds of a step: as a benchmark times it, of the host that launches it, and of the device by the timer."""
    from fastres.runtime import synchronize

    step, stop = bench.run(num_steps), bench.done + num_steps
    launch = on_device = 0.0
    while bench.done < stop:
        until = min(stop, bench.done + BURST)
        launch += launch_seconds(bench.step, timer, bench.done, until)
        bench.done = until
        synchronize(bench.runtime.device)
        on_device += sum(timer.collect())
    return step, launch / num_steps, on_device / num_steps


def launch_seconds(step: "TrainStep", timer: "StepTimer", start: int, stop: int) -> float:
    """Launch 0-based steps `start` to `stop - 1` as the training loop does, each marked; the host's seconds for it.

    Raises:
        RuntimeError: Something waited for the GPU, by torch's sync-debug mode.
    """
    import torch

    gpu = step.replicas[0].device.type == "cuda"
    if gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        timer.begin()
        began, done = perf_counter(), start
        while done < stop:
            launched = step(done, stop)
            timer.mark(launched)
            done += launched
        return perf_counter() - began
    finally:
        if gpu:
            torch.cuda.set_sync_debug_mode("default")


def evaluation(setting: Setting, depth: int) -> Result:
    """Testing as the training loop does it, between steps: its seconds, and its share of the paper's run.

    `share` is that of all evaluations of a run at the default interval in the time of all its steps; `warm_up` is what
    compiling and capturing takes before.
    """
    from fastres.bench.cells import Cell
    from fastres.bench.measure import FIRST_STEPS, Bench
    from fastres.build import build_evaluators, load_images

    config, rounds = setting.config(depth, data={"dataset": "cifar10"}), 1 if setting.tiny else 10
    images = load_images(config.data, config.execution, say=print)
    bench = Bench(Cell(config.name, config), images)
    (test,) = build_evaluators([bench.replica.net], config, images, images.mean_image(), bench.runtime)
    began = perf_counter()
    test.warm_up()
    warm_up = perf_counter() - began
    step_seconds, seconds = list[float](), list[float]()
    for _ in range(rounds + 1):
        step_seconds.append(bench.run(4 if setting.tiny else bench.whole_periods(STEPS)))
        bench.run(FIRST_STEPS)
        began = perf_counter()
        tested = test()  # waits for the device
        seconds.append(perf_counter() - began)
    bench.close()
    each = median(seconds[1:])
    count = math.ceil(config.recipe.steps / config.output.eval_every)
    training = config.recipe.steps * median(step_seconds)
    return {
        "label": config.name,
        "images": tested.num_images,
        "seconds": {"warm_up": warm_up, "first": seconds[0], "median": each, "max": max(seconds[1:]), "n": rounds},
        "step_seconds": median(step_seconds),
        "evaluations": count,
        "share": _held_to((seconds[0] + (count - 1) * each) / training, EVALUATION_TARGET),
    }


def start(setting: Setting, depth: int) -> Result:
    """Seconds from the command line to the first step that is done: compiler's caches empty, then as that left them.

    Files that the command reads may be in the machine's memory already both times.

    Raises:
        TaskFailed: The command ended before its first step, or left nothing in the caches.
    """
    starts = Result()
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: Path(folder) / name for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        for cache in caches.values():
            cache.mkdir()
        for kind, target in START_TARGETS.items():
            environment = {**os.environ, **{name: str(path) for name, path in caches.items()}}
            seconds = _first_step(setting, depth, Path(folder) / kind, environment)
            left = [path.stat().st_size for cache in caches.values() for path in cache.rglob("*") if path.is_file()]
            starts[kind] = {**_held_to(seconds, target), "cache_files": len(left), "cache_bytes": sum(left)}
            if not (left or setting.tiny):  # on a CPU nothing is compiled
                raise TaskFailed("the compiler left nothing in the caches it was given", {"starts": starts})
    return {"label": setting.config(depth).name, "starts": starts}


def _first_step(setting: Setting, depth: int, run: Path, environment: dict[str, str]) -> float:
    """Seconds until `fastres train` has written the metrics of its first step; then it is stopped."""
    config = setting.config(depth)
    command = [sys.executable, "-m", "fastres", "train", "--depth", str(config.model.depth), "--out", str(run)]
    command += ["--log-every", "1", "--device", setting.device, "--dataset", config.data.dataset]
    if setting.data_dir:
        command += ["--data-dir", str(setting.data_dir)]
    if setting.tiny:
        command += ["--batch-size", str(config.recipe.batch_size), "--precision", "fp32", "--threads", "1"]
    metrics, began = run / "metrics.jsonl", perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            while not (metrics.exists() and metrics.read_text(encoding="utf-8").endswith("\n")):
                if process.poll() is not None:
                    raise TaskFailed(f"fastres train ended with {process.returncode} before its first step", {})
                sleep(POLL_SECONDS)
            seconds = perf_counter() - began
            process.terminate()
            process.wait(STOP_SECONDS)
        finally:
            process.kill()  # does nothing where it has ended
    return seconds


def switched(setting: Setting, base: dict[str, Any], switches: dict[str, dict[str, Any]]) -> Result:
    """Each switch, on top of a base, against the base, in turns, with the interval of `fastres bench --compare`."""
    from fastres.bench.cells import Cell
    from fastres.bench.report import compare

    cells = [Cell("default" if not base else "torch's kernels", setting.config(20, execution=base))]
    cells += [Cell(name, setting.config(20, execution={**base, **execution})) for name, execution in switches.items()]
    report = _measured(setting, cells, rounds=15, chunk_seconds=0.2)
    default, *others = report["cells"]
    found = {cell["label"]: compare(default["chunks"], cell["chunks"], paired=True) for cell in others}
    return report | {
        "comparisons": {name: dataclasses.asdict(comparison) for name, comparison in found.items()},
        "words": [comparison.line(name) for name, comparison in found.items()],
    }


def profile(setting: Setting, depth: int) -> Result:
    """A step kernel by kernel; the trace lies beside the result."""
    from fastres.bench.cells import Cell
    from fastres.bench.profiling import STEPS, take_profile

    config = setting.config(depth)
    trace = setting.out / "profile" / f"resnet{depth}.trace.json.gz"
    trace.parent.mkdir(parents=True, exist_ok=True)
    taken = take_profile(Cell(config.name, config), trace, say=print)
    return {**dataclasses.asdict(taken), "calls": taken.calls, "busy_seconds": taken.busy_seconds, "steps": STEPS}


def scaling(setting: Setting, depth: int, batch_sizes: tuple[int, ...]) -> Result:
    """Speed over the batch size."""
    from fastres.bench.scaling import MAX_STEP_SECONDS, measure_scaling

    sizes = batch_sizes[:1] if setting.tiny else batch_sizes
    config, rounds = setting.config(depth), 1 if setting.tiny else 3
    return measure_scaling(config, [config.model.depth], sizes, step_seconds=MAX_STEP_SECONDS, rounds=rounds, say=print)


def seeds(setting: Setting, depth: int) -> Result:
    """Networks with seeds of their own side by side in one graph; images a second in sum."""
    from fastres.bench.cells import Cell

    config = setting.config(depth)
    cells = [Cell(f"{config.name} x{n}", config, num_replicas=n) for n in REPLICAS[: 2 if setting.tiny else None]]
    return _measured(setting, cells, rounds=5, chunk_seconds=0.3)


def _with_each_loader(config: "RunConfig") -> "list[Cell]":
    """A configuration with every loader that batches can come from, and last with a frozen batch."""
    from fastres.bench.cells import matrix
    from fastres.data.dali import dali_available

    loaders = [*(["dali"] if dali_available() else []), "resident", "none"]
    return list(matrix(config, {"depth": [config.model.depth], "loader": loaders}))


def _held_to(found: float, target: float) -> Result:
    """A number beside the most that it should be."""
    return {"found": found, "target": target, "met": found <= target}


def _measured(setting: Setting, cells: "list[Cell]", *, rounds: int = 10, chunk_seconds: float = 0.5) -> Result:
    """The report of `bench.measure`."""
    from fastres.bench.measure import measure

    if setting.tiny:
        rounds, chunk_seconds = 2, 0.01
    return measure(cells, rounds=rounds, chunk_seconds=chunk_seconds, say=print)
