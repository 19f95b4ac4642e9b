"""What a task of `scripts/gpu-check` is, and what is kept of it: a JSON file each, and one tar of everything."""

import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fastres.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent

TAR = "gpu-check.tar.gz"
PACKED = {".json", ".jsonl", ".png", ".svg", ".log", ".csv", ".md", ".html", ".gz"}  # endings of what goes into it
REPORTS = ("bench", "scaling", "seeds")  # sections whose reports are one table
CHECKPOINT, RESULT = "checkpoint.safetensors", "result.json"  # of a run folder

# What is changed where only the code is tried out
TINY: dict[str, Any] = {
    "model": {"depth": 8},
    "data": {"dataset": "synthetic"},
    "recipe": {"batch_size": 8, "steps": 20, "milestones": [10, 15]},
    "execution": {"precision": "fp32", "threads": 1},
}

Result = dict[str, Any]
State = Literal["done", "failed", "open"]


class TaskFailed(Exception):
    """What was to be proven is not so; `result` has what was seen."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Setting:
    """Where a task runs, and with what.

    Attributes:
        out: The folder for what it makes.
        data_dir: Where CIFAR-10 lies.
        device: "cuda"; "cpu" tries the code out, with tiny sizes on built-in data.
        seconds: How long it may take.
        peers: Clones of other people's trainers that `benchmarks/peers.py` knows.
    """

    out: Path
    data_dir: Path | None = None
    device: str = "cuda"
    seconds: float = math.inf
    peers: tuple[Path, ...] = ()

    @property
    def tiny(self) -> bool:
        """Whether only the code is tried out."""
        return self.device == "cpu"

    def config(self, depth: int, **changes: Any) -> "RunConfig":
        """The paper's run, every switch as it is by default; speed hardly depends on the data, but its size counts."""
        from fastres.config import make_config
        from fastres.configtree import merge

        base: Result = {
            "model": {"depth": depth},
            "data": {"dataset": "cifar10" if self.data_dir else "synthetic"},
            "execution": {"device": self.device},
        }
        if self.data_dir:
            base["execution"]["data_dir"] = str(self.data_dir)
        return make_config(**merge(merge(base, changes), TINY if self.tiny else {}))


@dataclass(frozen=True)
class Task:
    """One piece of work, started only where enough time is left.

    Attributes:
        name: "section/what": also the file that it leaves.
        seconds: Allowed for it, generously; of a task that goes on the least that makes it worth starting.
        run: Does it.
        goes_on: Whether it saves when it is stopped, and goes on from there the next time.
        needs_gpu: Whether nothing of it can be tried without one.
        needs_data: Whether it is about CIFAR-10 itself.
    """

    name: str
    seconds: float
    run: Callable[[Setting], Result]
    goes_on: bool = False
    needs_gpu: bool = False
    needs_data: bool = False

    @property
    def section(self) -> str:
        """The first half of its name."""
        return self.name.partition("/")[0]


class Files:
    """The folder of a check.

    OUT/environment.json           the machine, as the newest call found it
    OUT/<section>/<task>.json      what a task that is done returned, with "task" and "environment" beside it
    OUT/<section>/<task>.failed.json, .log
    OUT/<section>.json             all reports of a section in one, as `fastres bench --json` writes them
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def state(self, task: Task) -> State:
        """What became of a task so far."""
        return "done" if self._path(task).exists() else "failed" if self._path(task, ".failed").exists() else "open"

    def log(self, task: Task) -> Path:
        """What its process prints."""
        return self.out / f"{task.name}.log"

    def done(self, task: Task, result: Result, how: Mapping[str, Any]) -> None:
        """Keep what a task returned. It is readable as what it is: a report stays one."""
        write_json(self._path(task), {"task": {"name": task.name, **how}, **result})
        self._path(task, ".failed").unlink(missing_ok=True)

    def failed(self, task: Task, what: Mapping[str, Any]) -> None:
        """Keep why a task failed: its "error", and what else was seen."""
        write_json(self._path(task, ".failed"), {"task": {"name": task.name}, **what})

    def environment(self, found: Mapping[str, Any]) -> None:
        """Keep what the machine is."""
        write_json(self.out / "environment.json", found)

    def why(self, task: Task) -> str:
        """The error of a task that failed, in one line."""
        lines = str(_read(self._path(task, ".failed")).get("error", "no reason given")).splitlines()
        return lines[0] if lines else "no reason given"

    def line(self, task: Task) -> str:
        """A task and what became of it."""
        state = self.state(task)
        if state == "done":
            said = f"{_read(self._path(task))['task']['seconds']:.0f} s"
        else:
            said = self.why(task) if state == "failed" else f"allowed {task.seconds:.0f} s"
        return f"{state:<6}  {task.name:<60}  {said}"

    def pack(self, weights_mb: float) -> Path:
        """Join the reports and put everything into one tar: all text and figures, and checkpoints up to a size in all.

        Of the checkpoints those of unfinished runs come first, with which they go on; then the smallest.
        """
        for section in REPORTS:
            self._join(section)
        kept = [path for path in sorted(self.out.rglob("*")) if path.suffix in PACKED and path.name != TAR]
        kept += _fitting(self.out.rglob(CHECKPOINT), 1e6 * weights_mb)
        packed, temporary = self.out / TAR, self.out / f".{TAR}.{os.getpid()}.tmp"
        with tarfile.open(temporary, "w:gz") as tar:
            for path in kept:
                tar.add(path, arcname=path.relative_to(self.out))
        temporary.replace(packed)
        return packed

    def _join(self, section: str) -> None:
        """One report of all of a section's, so that they are one table."""
        reports = [
            _read(path) for path in sorted((self.out / section).glob("*.json"), key=lambda path: path.stat().st_mtime)
        ]
        reports = [report for report in reports if "cells" in report]
        if reports:
            cells = [cell for report in reports for cell in report["cells"]]
            write_json(self.out / f"{section}.json", {**reports[0], "cells": cells})

    def _path(self, task: Task, kind: str = "") -> Path:
        return self.out / f"{task.name}{kind}.json"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # several checks may share a folder
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read(path: Path) -> Result:
    content: Result = json.loads(path.read_text(encoding="utf-8"))
    return content


def _fitting(checkpoints: Iterable[Path], most: float) -> list[Path]:
    """As many as fit into so many bytes: of unfinished runs first, then the smallest."""
    fitting, size = list[Path](), 0.0
    for path in sorted(checkpoints, key=lambda path: ((path.parent / RESULT).exists(), path.stat().st_size)):
        if size + path.stat().st_size <= most:
            fitting.append(path)
            size += path.stat().st_size
    return fitting
