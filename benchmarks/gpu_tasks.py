"""The tasks of `scripts/gpu-check`: each proves or measures one thing on a GPU, by what the project has for it.

Their list, and those that prove or train; what times is in `gpu_timing.py`.

torch is imported only inside, so that the list of tasks is there at once.
"""

import ast
import dataclasses
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks import gpu_timing as timing
from benchmarks.gpu_files import ROOT, Result, Setting, Task, TaskFailed

GPU_TESTS = ROOT / "tests" / "test_gpu.py"
DEPTHS = (20, 32, 44, 56, 110)
BATCH_SIZES = ((32, 64, 128), (256, 512, 1024), (2048, 4096, 8192))  # of `scaling`, a task each
RACES = (  # depth, baselines, seconds: a deep network takes minutes to compile with max-autotune
    (20, "plain,amp", 180),
    *((depth, baseline, 240) for depth in (20, 56, 110) for baseline in ("tuned", "tuned_graphs")),
)
CHAIN = 1_000  # kernels in the graph that tells what one costs
SAVE_SECONDS = 15.0  # before its time is up a training begins to save
SIGNALLED = (130, 143, -signal.SIGTERM)  # exit codes of a command that was stopped
UNFINISHED = "not all runs are finished"  # what `fastres reproduce` says where its budget ended first


# `execution` of each A/B, ResNet-20: what all of a group have, and each switch; they take turns in one process
TORCHS, LAYERS = {"native": False}, {"layer_kernels": True}
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "kernels": (
        {},
        {
            "resident": {"loader": "resident"},
            "no-native": TORCHS,
            "graph-steps-4": {"graph_steps": 4},
            "graph-steps-16": {"graph_steps": 16},
            "deterministic": {"deterministic": True},
        },
    ),
    "layer-kernels": (
        {},
        {
            "layer-kernels": LAYERS,
            "layer-kernels, resident": {**LAYERS, "loader": "resident"},
            "layer-kernels, graph-steps-4": {**LAYERS, "graph_steps": 4},
            "layer-kernels, deterministic": {**LAYERS, "deterministic": True},
        },
    ),
    "torch-kernels": (
        TORCHS,
        {
            "no-shadow-weights": {"shadow_weights": False},
            "no-combo-kernels": {"compile_mode": "plain"},
            "compile-blocks": {"compile_scope": "blocks"},
            "no-channels-last": {"channels_last": False},
        },
    ),
    "path": (
        {},
        {
            "eager": {"compile": False, "cuda_graph": False},
            "no-compile": {"compile": False},
            "no-graph": {"cuda_graph": False},
        },
    ),
    "precision": (
        TORCHS,
        {"fp32": {"precision": "fp32"}, "tf32": {"precision": "tf32"}, "fp16": {"precision": "fp16"}},
    ),
    "max-autotune": (TORCHS, {"max-autotune": {"compile_mode": "max-autotune"}}),
}
SWITCHES_OF_A_GPU = ("layer-kernels", "precision")  # without a GPU not there, or a minute a step

# What a first half hour on a GPU is for: whether the fast path is right, how fast it is, and what to fix.
FIRST = (
    "ceilings/all",
    "parity/test_a_launch_a_layer_is_as_exact_as_autocast_and_the_same_each_time_1of4",
    "parity/test_graph_equals_no_graph_in_every_bit_1of10",  # resident, then DALI; the default, then layer kernels
    "parity/test_graph_equals_no_graph_in_every_bit_2of10",
    "parity/test_graph_equals_no_graph_in_every_bit_3of10",
    "parity/test_batches_are_right_while_the_host_runs_ahead_2of2",
    "bench/resnet20",
    "profile/resnet20",
    "host/resnet20",
    "switches/layer-kernels",
    "switches/kernels",
    "seeds/resnet20",
    "bench/resnet110",
)


def all_tasks(setting: Setting) -> list[Task]:
    """The tasks in the order in which they are of use, but for those that cannot run in this setting."""
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    return [
        task
        for task in sorted(_tasks(setting), key=lambda task: ranks.get(task.name, len(ranks)))
        if not setting.tiny or not (task.needs_gpu or (task.needs_data and not setting.data_dir))
    ]


def _tasks(setting: Setting) -> Iterator[Task]:
    yield Task("ceilings/all", 60, ceilings)
    for test, num_cases in gpu_tests().items():
        for case in range(num_cases):
            number = f"_{case + 1}of{num_cases}" if num_cases > 1 else ""
            yield Task(f"parity/{test}{number}", 75, partial(parity, test=test, case=case, num_cases=num_cases))
    for depth in DEPTHS:
        yield Task(f"bench/resnet{depth}", 60 + depth, partial(timing.bench, depth=depth))
    for depth, baseline, seconds in RACES:
        name = f"bench/race_resnet{depth}_{baseline.replace(',', '_')}"
        yield Task(name, seconds, partial(timing.race, depth=depth, against=baseline), needs_data=True)
    for depth in (20, 56, 110):
        yield Task(f"host/resnet{depth}", 90 + depth, partial(timing.host, depth=depth))
    for depth in (20, 110):
        yield Task(f"evaluation/resnet{depth}", 60 + depth, partial(timing.evaluation, depth=depth))
    yield Task("start/resnet110", 180, partial(timing.start, depth=110))
    for checkout in setting.peers:
        from benchmarks.peers import peer_at  # numpy, and most calls have no peers

        owner = peer_at(checkout).name.partition("/")[0]
        for depth in (20, 56, 110):
            name = f"peers/{owner}_resnet{depth}"
            yield Task(name, 130 + depth, partial(timing.peer, depth=depth, checkout=checkout), needs_gpu=True)
    for group, (base, switches) in SWITCHES.items():
        seconds = 240 if group == "max-autotune" else 60 + 15 * len(switches)
        run = partial(timing.switched, base=base, switches=switches)
        yield Task(f"switches/{group}", seconds, run, needs_gpu=group in SWITCHES_OF_A_GPU)
    for depth in (20, 110):
        yield Task(f"profile/resnet{depth}", 60 + depth, partial(timing.profile, depth=depth))
    for depth in (20, 110):
        for sizes in BATCH_SIZES:
            name = f"scaling/resnet{depth}_from_{sizes[0]}"
            yield Task(name, 90 + depth, partial(timing.scaling, depth=depth, batch_sizes=sizes))
    for depth in (20, 56, 110):
        yield Task(f"seeds/resnet{depth}", 90 + depth, partial(timing.seeds, depth=depth))
    for depth in (20, 56, 110, 1202):
        yield Task(f"memory/resnet{depth}", 120, partial(memory, depth=depth))
    for depth in (20, 110):
        yield Task(f"train/resnet{depth}", 120, partial(train, depth=depth), goes_on=True)
    yield Task("table6/all", 120, table6, goes_on=True)


def gpu_tests() -> dict[str, int]:
    """The tests in tests/test_gpu.py and how many cases each has, read and not run: collecting takes seconds."""
    tree = ast.parse(GPU_TESTS.read_text(encoding="utf-8"))
    lists = {
        target.id: len(node.value.elts)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def num_cases(decorator: ast.expr) -> int:
        if not isinstance(decorator, ast.Call) or not ast.unparse(decorator.func).endswith("parametrize"):
            return 1
        values = decorator.args[1]
        if isinstance(values, ast.Name):
            return lists[values.id]
        assert isinstance(values, ast.List)
        return len(values.elts)

    return {
        node.name: math.prod(map(num_cases, node.decorator_list))
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def machine(setting: Setting) -> Result:
    """The machine that the default run would have. Raises MachineError where there is no GPU."""
    from fastres.machine import nvml
    from fastres.machine.environment import environment
    from fastres.runtime import prepare

    runtime = prepare(setting.config(20).execution)
    return environment(runtime) | nvml.clocks(runtime.device)


def ceilings(setting: Setting) -> Result:
    """What the machine can do at best: copy, matrix product, a node of a graph, a replay."""
    from fastres.bench.roofline import measure_ceilings, replay_seconds
    from fastres.runtime import DTYPES, prepare

    device = prepare(setting.config(20).execution).device
    precisions = ("fp32",) if setting.tiny else ("bf16", "fp32")
    found: Result = {
        "ceilings": {name: dataclasses.asdict(measure_ceilings(device, DTYPES[name])) for name in precisions}
    }
    if device.type == "cuda":
        replay, chain = replay_seconds(device), replay_seconds(device, nodes=CHAIN, launches=100)
        found["graph"] = {"nodes": CHAIN, "replay_seconds": replay, "node_seconds": (chain - replay) / (CHAIN - 1)}
    return found


class _Outcomes:
    """Picks one case of a test, and collects what pytest says of it."""

    def __init__(self, case: int, num_cases: int) -> None:
        self.case, self.num_cases = case, num_cases
        self.tests: list[Result] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """pytest's hook: tests are found."""
        assert len(items) == self.num_cases, f"{len(items)} cases and not {self.num_cases}"
        items[:] = [items[self.case]]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """pytest's hook: a phase of a test has ended."""
        if report.when == "call" or report.outcome != "passed":
            words = "" if report.outcome == "passed" else str(report.longrepr)[-4_000:]
            seen = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "words": words}
            self.tests.append(seen)


def parity(setting: Setting, test: str, case: int, num_cases: int) -> Result:
    """One case of a test in tests/test_gpu.py.

    Raises:
        TaskFailed: It failed, was skipped, or is not there.
    """
    import pytest

    outcomes = _Outcomes(case, num_cases)
    options = ["-m", "gpu", "-p", "no:cacheprovider", "-q", "--rootdir", str(ROOT), f"{GPU_TESTS}::{test}"]
    code = pytest.main(options, plugins=[outcomes])
    result: Result = {"tests": outcomes.tests}
    if code != pytest.ExitCode.OK:
        bad = [seen["test"].rpartition("::")[2] for seen in outcomes.tests if seen["outcome"] == "failed"]
        raise TaskFailed(f"pytest ended with {int(code)}: {', '.join(bad) or 'no test ran'}", result)
    if not setting.tiny and all(seen["outcome"] == "skipped" for seen in outcomes.tests):
        raise TaskFailed("every test was skipped", result)
    return result


def memory(setting: Setting, depth: int) -> Result:
    """The most that a step holds, by batch size, beside what the out-of-memory message would say of it."""
    import gc

    import torch

    from fastres.bench.cells import Cell
    from fastres.bench.measure import Bench
    from fastres.build import load_images
    from fastres.errors import OutOfMemory
    from fastres.guards import memory_of_a_step

    config = setting.config(depth)
    images = load_images(config.data, config.execution, say=print)
    rows = list[Result]()
    for batch_size in (8,) if setting.tiny else (128, 1024, 8192):
        one = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, batch_size=batch_size))
        fixed, image = memory_of_a_step(one, bytes_each=4 if setting.tiny else 2)
        row: Result = {"label": config.name, "batch_size": batch_size, "estimate": fixed + batch_size * image}
        try:
            alive = Bench(Cell(config.name, one), images)
            row |= {"peak_memory": alive.peak_memory, "compile_seconds": alive.compile_seconds}
            alive.close()
            del alive
        except OutOfMemory as error:
            row["error"] = str(error)
        rows.append(row)
        gc.collect()
        if not setting.tiny:
            torch.cuda.empty_cache()
    return {"memory": rows}


def train(setting: Setting, depth: int) -> Result:
    """The paper's run to its end, 64k steps, tested; goes on where it was cut.

    Raises:
        OutOfTime: Not yet at its end; saved.
        Interrupted: Likewise, by a signal.
    """
    import fastres
    from fastres.rundir import CONFIG

    folder = setting.out / "train" / f"resnet{depth}"
    data, output = {"dataset": "cifar10"}, {"out": str(folder), "checkpoint_every": "2min"}
    config = setting.config(depth, data=data, output=output)
    deadline = perf_counter() + setting.seconds - SAVE_SECONDS
    if (folder / CONFIG).exists():
        result = fastres.train(config, resume=folder, verbosity="lines", deadline=deadline)
    else:
        result = fastres.train(config, overwrite=True, verbosity="lines", deadline=deadline)
    return {**result.to_dict(), "run": str(folder.relative_to(setting.out)), "digest": config.digest}


def table6(setting: Setting) -> Result:
    """The paper's Table 6, by the project's own command; goes on where it was cut.

    Raises:
        OutOfTime: Runs are missing yet.
        TaskFailed: The command ended otherwise than with a table.
    """
    from fastres.errors import OutOfTime

    command = [sys.executable, "-m", "fastres", "reproduce", "table6", "--runs", str(setting.out / "table6")]
    command += ["--device", setting.device]
    if math.isfinite(setting.seconds):
        command += ["--budget", f"{max(1.0, setting.seconds - SAVE_SECONDS) / 60:.3f}"]
    if setting.tiny:
        command += ["--preset", "smoke", "--nets", "ResNet8", "--seeds", "2", "--steps", "4"]
        command += ["--threads", "1", "--precision", "fp32"]
    elif setting.data_dir:
        command += ["--data-dir", str(setting.data_dir)]
    # A signal to the group is the command's to answer, which saves; this process outlives it to say how it ended.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode in SIGNALLED or (process.returncode == 0 and any(UNFINISHED in line for line in lines)):
        raise OutOfTime("Table 6: runs are missing yet")
    if process.returncode != 0:
        raise TaskFailed(f"fastres reproduce table6 ended with {process.returncode}", {})
    return {"printed": "".join(lines)}
