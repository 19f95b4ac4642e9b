"""The run folder, the only truth about a run, and the only writer of its metrics and text.

config.json              the resolved config
environment.json         machine, versions, commit, digest of the data
metrics.jsonl            a record a line, append-only; measured times sit under "clock"
console.log              what the console said
checkpoint.safetensors   the newest state (fastres/checkpoint.py), the one before it beside it
curves.png, curves.svg   training and test error
result.json              written once, when the last step is done
diverged.json            instead, where the loss became NaN or Inf: at which step, and why
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import filelock

from fastres.config import RunConfig
from fastres.errors import InputError, InUse, MachineError
from fastres.files import aside, by_numbers, disk_error, is_aside, write_json, write_text

CONFIG, ENVIRONMENT, METRICS, RESULT, DIVERGED, CONSOLE = (
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "result.json",
    "diverged.json",
    "console.log",
)
LOCK = ".lock"  # held by the process that trains
DEEPEST = 3  # levels of folders below one that is given in which runs are found


class RunDir:
    """A run folder on disk. Use `create` or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: tuple[int, int] | None = None  # the lock that this process holds

    @staticmethod
    def create(path: Path, *, overwrite: bool = False) -> "RunDir":
        """Make an empty run folder.

        Raises:
            InputError: `path` holds something already; with `overwrite` that is moved aside instead, unless a run in
                it is in training.
            MachineError: The folder cannot be made or written.
        """
        RunDir.check_free(path, overwrite=overwrite)
        there = path.resolve() if path.is_symlink() else path
        try:
            if _occupied(path):
                for lock in [path / LOCK, *(folder / LOCK for folder in folders_below(path))]:
                    if lock.exists():  # else nobody trains there
                        with RunDir(lock.parent).locked():
                            pass
                there.rename(aside(there))
            there.mkdir(parents=True, exist_ok=True)
            (path / CONSOLE).touch()
        except OSError as error:
            raise disk_error(error, path) from error
        return RunDir(path)

    @staticmethod
    def check_free(path: Path, *, overwrite: bool, way_out: str | None = None) -> None:
        """Raise InputError where `create` would refuse `path`; `way_out` says what to do, where it is not --out."""
        try:
            str(path).encode()
            occupied, lost = _occupied(path), path.is_symlink() and not path.exists()
        except (OSError, ValueError) as error:
            shown = str(path).encode(errors="replace").decode()
            raise InputError(f"{shown[:100]} cannot be a folder's name here: {error}; give another --out") from error
        if lost:
            raise InputError(f"{path} is a link to {path.readlink()}, which is not there; make that, or remove it")
        if occupied and not overwrite:
            or_move = ", or --overwrite moves it aside" if is_run(path) or folders_below(path) else ""
            way_on = f"; to resume it: --resume {path}" if is_run(path) else ""
            what = "is not empty" if path.is_dir() else "is a file"
            raise InputError(f"{path} {what}; {way_out or f'give another --out{or_move}{way_on}'}")
        if occupied and not (is_run(path) or folders_below(path)):
            raise InputError(f"{path} holds no run, and --overwrite moves only runs aside; give another --out")
        if occupied and path.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise InputError(f"{path} is where this was started, and cannot be moved aside; give another --out")

    @staticmethod
    def open(path: Path) -> "RunDir":
        """An existing run folder. Raises InputError where `path` is none."""
        if not is_run(path):
            below = folders_below(path)
            way_on = f"; it holds {len(below)}: give one of them, as {below[0]}" if below else ""
            lacks = f"its {CONFIG} is of something else" if (path / CONFIG).exists() else f"it has no {CONFIG}"
            raise InputError(f"{path} is not a run folder: {lacks}{way_on}")
        return RunDir(path)

    @property
    def status(self) -> Literal["missing", "cut", "finished", "diverged"]:
        """What there is of the run; cut: begun, or in training. Whether its files are whole is not looked at."""
        if (self.path / RESULT).exists():
            return "finished"
        if (self.path / DIVERGED).exists():
            return "diverged"
        return "cut" if (self.path / CONFIG).exists() else "missing"

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to train: it is finished, or has diverged."""
        return self.status in ("finished", "diverged")

    @contextmanager
    def locked(self, *, wait: bool = False) -> Iterator[None]:
        """Hold the folder for one process.

        Raises:
            InUse: Another process holds it, and `wait` is false.
            MachineError: It cannot be written.
        """
        lock = filelock.FileLock(self.path / LOCK, timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise InUse(f"{self.path} is being trained by another process; wait for it, or stop it first") from error
        except OSError as error:
            raise disk_error(error, self.path) from error
        except NotImplementedError as error:  # from older versions of filelock
            raise MachineError(f"{self.path} is on a file system without locks; give another --out") from error
        self._held = _identity(self.path / LOCK)
        try:
            yield
        finally:
            self._held = None
            lock.release()

    def check_held(self) -> None:
        """Raise MachineError where the folder that this process has locked is another one now, or gone.

        Else a run whose folder was moved would go on in the folder of the same name that came after it.
        """
        if self._held is not None and _identity(self.path / LOCK) != self._held:
            raise MachineError(
                f"{self.path} was moved, replaced or deleted while its run was in training; the run stops here"
            )

    def config(self) -> RunConfig:
        """The config that the run was started with. Raises InputError where it cannot be read."""
        stored = self.read_json(CONFIG)
        try:
            return RunConfig.from_dict(stored)
        except InputError as error:
            raise InputError(f"{self.path / CONFIG}: {error}") from error

    def check_same(self, config: RunConfig) -> None:
        """Raise InputError, naming the differences, where the run was started with something else than `config`."""
        if changed := self.config().differs_from(config):
            raise InputError(
                f"{self.path} was started with another config ({'; '.join(changed)}); leave these out to resume it"
            )

    def read_json(self, name: str) -> dict[str, Any]:
        """One of the folder's JSON files. Raises InputError where it is missing or damaged."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{self.path / name} cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise InputError(f"{self.path / name} does not hold a JSON object")
        return value

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one of the folder's JSON files, whole or not at all."""
        self.check_held()
        write_json(self.path / name, value)

    def remove(self, name: str) -> None:
        """Remove one of the folder's files, where it is there. Raises MachineError."""
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def environments(self) -> list[dict[str, Any]]:
        """What environment.json has of the first process, then of those that resumed it; none where it is damaged."""
        try:
            first = self.read_json(ENVIRONMENT)
        except InputError:
            return []
        resumed = first.get("resumed")
        return [first, *(one for one in (resumed if isinstance(resumed, list) else []) if isinstance(one, dict))]

    def data(self) -> dict[str, Any]:
        """The images as recorded in environment.json: name, digest, official. {} where that is missing or damaged."""
        data = next((one.get("data") for one in self.environments()), None)
        return data if isinstance(data, dict) else {}

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a record to the metrics. NaN and Inf are written as text, since JSON has neither."""
        line = json.dumps({key: _jsonable(value) for key, value in record.items()}, allow_nan=False)
        self._append(METRICS, line + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All whole records so far; a line that a crash cut short or that was damaged is left out.

        Raises:
            InputError: They cannot be read.
        """
        records = []
        path = self.path / METRICS
        try:
            lines = path.read_bytes().splitlines() if path.exists() else []
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record:
                    records.append(record)
        return records

    def cut_back(self, step: int) -> None:
        """Drop the metrics beyond `step`, from which a resumed run goes on, and the record of an end."""
        kept = [record for record in self.metrics() if record["step"] <= step and record["kind"] != "end"]
        write_text(self.path / METRICS, "".join(json.dumps(record) + "\n" for record in kept))

    def sync_metrics(self) -> None:
        """Force the metrics to the disk, before a checkpoint that counts on them."""
        path = self.path / METRICS
        try:
            if path.exists():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error

    def say(self, text: str) -> None:
        """Add a line to console.log."""
        self._append(CONSOLE, text + "\n")

    def _append(self, name: str, text: str) -> None:
        self.check_held()
        try:
            with (self.path / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            raise disk_error(error, self.path) from error


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a path names: its device and inode; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, whole or damaged; other programs write a config.json too."""
    if not (folder / CONFIG).is_file():
        return False
    if any((folder / name).exists() for name in (ENVIRONMENT, METRICS, CONSOLE)):
        return True
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(stored, dict) and {"model", "recipe", "seed"} <= stored.keys()


def folders_below(root: Path) -> list[Path]:
    """Run folders up to `DEEPEST` levels below a folder, by name: a sweep's, or those of `fastres reproduce`.

    Those that were moved aside (`files.aside`) are left out.
    """
    levels = ("/".join(["*"] * level) for level in range(1, DEEPEST + 1))
    inside = {file.parent for level in levels for file in root.glob(f"{level}/{CONFIG}")}
    found = [path for path in inside if not any(map(is_aside, path.relative_to(root).parts))]
    return sorted(filter(is_run, found), key=by_numbers)


def _occupied(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or not all(map(is_left_behind, path.iterdir())))


def is_left_behind(path: Path) -> bool:
    """Whether a file says nothing: a folder of such files is one whose run was killed before it had a config."""
    return path.name in (CONSOLE, LOCK) or re.fullmatch(r"\..*\.tmp", path.name) is not None


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
