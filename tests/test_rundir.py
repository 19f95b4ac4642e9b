"""rundir.py: a run folder refuses what would lose something, and survives what a crash leaves."""

import contextlib
import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from fastres import checkpoint
from fastres.config import make_config
from fastres.errors import InputError, MachineError
from fastres.files import given_path, typed, write_text
from fastres.rundir import CONFIG, DIVERGED, METRICS, RESULT, RunDir, folders_below, is_run
from fastres.runfolders import find_runs, found_again, new_run_folder, remove_empty


def test_non_empty_folders_are_refused_or_moved_aside(tmp_path: Path) -> None:
    out = tmp_path / "run"
    RunDir.create(out).write_json("config.json", make_config().to_dict())
    with pytest.raises(InputError, match=r"not empty.*--overwrite.*--resume"):
        RunDir.create(out)
    RunDir.create(out, overwrite=True).write_json("config.json", make_config().to_dict())
    RunDir.create(out, overwrite=True)
    RunDir.create(out)  # a run that came to nothing is in nobody's way
    assert (tmp_path / "run.old-1" / "config.json").exists()
    assert (tmp_path / "run.old-2").exists()
    assert not (out / "config.json").exists()
    assert folders_below(tmp_path) == []  # not counted as runs of what is below
    RunDir.create(out).write_json("config.json", make_config().to_dict())
    assert folders_below(tmp_path) == [out]
    (tmp_path / "inside").mkdir()
    shutil.copytree(out, tmp_path / "run.old-1" / "seed0")
    assert folders_below(tmp_path / "run.old-1") == [tmp_path / "run.old-1" / "seed0"]  # where it is asked for


def test_an_empty_folder_is_fine_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunDir.create(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"file is a file; give another --out$"):
        RunDir.create(tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"mine is not empty; give another --out$"):  # --overwrite would not help
        RunDir.create(tmp_path / "mine")
    RunDir.create(tmp_path / "run").write_json(CONFIG, {})
    with pytest.raises(InputError, match="run is not empty; give another --out, or --overwrite moves it aside; to res"):
        RunDir.create(tmp_path / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_file_is_written_into_a_folder_that_took_the_place(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    with run.locked():
        run.path.rename(tmp_path / "elsewhere")
        RunDir.create(run.path)
        with pytest.raises(MachineError, match="was moved, replaced or deleted"):
            run.write_json(DIVERGED, {})
    assert not (run.path / DIVERGED).exists()


def test_a_config_of_another_program_is_no_run(tmp_path: Path) -> None:
    mine = tmp_path / "bert"
    mine.mkdir()
    (mine / CONFIG).write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="bert holds no run, and --overwrite moves only runs aside"):
        RunDir.create(mine, overwrite=True)
    with pytest.raises(InputError, match=r"bert is not empty; give another --out$"):
        RunDir.create(mine)
    with pytest.raises(InputError, match="is not a run folder, and holds none"):
        find_runs([tmp_path])
    with pytest.raises(InputError, match=r"bert is not a run folder: its config\.json is of something else$"):
        RunDir.open(mine)
    for damaged in ("", '{"mod'):  # of a run whose disk lost it
        (mine / CONFIG).write_text(damaged)
        assert is_run(mine)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EIO])
def test_file_systems_that_sync_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fsync = os.fsync

    def refuses_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    with pytest.raises(MachineError) if number == errno.EIO else contextlib.nullcontext():
        write_text(tmp_path / "a", "b")
    assert (tmp_path / "a").read_text() == "b"


def test_only_runs_are_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(InputError, match="moves only runs aside"):
            RunDir.create(path, overwrite=True)
    RunDir.create(tmp_path / "run").write_json("config.json", make_config().to_dict())
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(InputError, match="cannot be moved aside"):
        RunDir.create(Path(), overwrite=True)


@pytest.mark.parametrize("name", [300 * "x", "bad\udcff"])
def test_names_that_no_folder_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be a folder's name here"):
        RunDir.create(tmp_path / name)


class SomePath:
    def __fspath__(self) -> str:
        return "~/x"


def test_paths_from_a_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for given in ("~/x", Path("~/x"), SomePath()):
        assert given_path("run", given) == Path("/home/me/x")
    for bad in (None, 5, b"x", ""):
        with pytest.raises(InputError, match=r"run is .*; give a path"):
            given_path("run", bad)


def test_a_path_to_type() -> None:
    assert [typed(Path(name)) for name in ("runs/a", "my run", "-dash", "--x y")] == [
        "runs/a", "'my run'", "./-dash", "'./--x y'",
    ]  # fmt: skip


def test_a_default_folder_that_stayed_empty_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = new_run_folder(make_config()), new_run_folder(make_config())
    (second / "config.json").touch()
    for path in (first, second):
        remove_empty(path)
    assert [path.name for path in Path("runs").iterdir()] == [second.name]


def test_links(tmp_path: Path) -> None:
    link, disk = tmp_path / "link", tmp_path / "disk"
    link.symlink_to(disk / "run")
    with pytest.raises(InputError, match=r"link is a link to .*disk/run, which is not there"):
        RunDir.create(link)
    (disk / "run").mkdir(parents=True)
    RunDir.create(link).write_json("config.json", make_config().to_dict())
    RunDir.create(link, overwrite=True)
    assert link.is_symlink()  # what it leads to was moved, on its own disk
    assert (disk / "run.old-1" / "config.json").exists()
    assert [path.name for path in (disk / "run").iterdir()] == ["console.log"]


def test_unwritable_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot write in"):
        RunDir.create(tmp_path / "file" / "below")
    if os.access("/proc", os.F_OK):
        with pytest.raises(MachineError, match="cannot write in /proc"):
            RunDir.create(Path("/proc/fastres-run"))


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.create(tmp_path / "run")
    run.write_json("config.json", {"a": 1})

    def no_room(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(MachineError, match="no room on the disk"):
        run.write_json("config.json", {"a": 2})
    assert run.read_json("config.json") == {"a": 1}


def test_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.create(tmp_path / "run")
    run.append_metrics({"kind": "train", "step": 1})
    (run.path / "checkpoint.safetensors").touch()

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for owner, name in ((filelock.FileLock, "acquire"), (os, "fsync"), (Path, "unlink"), (Path, "replace")):
        monkeypatch.setattr(owner, name, refused)
    for touch in (
        lambda: run.locked().__enter__(),
        run.sync_metrics,
        lambda: run.remove("diverged.json"),
        lambda: checkpoint.move_newer_aside(run.path, None),
        lambda: checkpoint.save(run.path, {"a": torch.zeros(1)}, {"step": 1}),
    ):
        with pytest.raises(MachineError, match=r"cannot write in .*: Read-only file system"):
            touch()


def test_metrics_survive_a_torn_last_line_and_are_cut_back(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    for step in (10, 20, 30):
        run.append_metrics({"kind": "train", "step": step, "loss": step / 3})
    with (run.path / METRICS).open("a") as file:
        file.write('{"kind": "train", "st')
    assert [r["step"] for r in run.metrics()] == [10, 20, 30]
    run.cut_back(20)
    assert run.metrics() == [{"kind": "train", "step": s, "loss": s / 3} for s in (10, 20)]
    run.append_metrics({"kind": "train", "step": 30, "loss": float("nan")})
    assert run.metrics()[-1]["loss"] == "nan"
    for line in (run.path / METRICS).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    with run.locked(), pytest.raises(InputError, match="another process"), RunDir(run.path).locked():
        pass
    with run.locked():
        pass


@pytest.mark.parametrize("inside", ["run", "."])
def test_a_folder_in_training_is_not_moved_from_under_it(tmp_path: Path, inside: str) -> None:
    out = tmp_path / "sweep"
    run = RunDir.create(out / inside)
    run.write_json("config.json", make_config().to_dict())
    with run.locked():
        with pytest.raises(InputError, match="is being trained by another process"):
            RunDir.create(out, overwrite=True)
        run.append_metrics({"kind": "train", "step": 1})
    assert len(RunDir.open(out / inside).metrics()) == 1
    RunDir.create(out, overwrite=True)
    assert not (out / inside / "metrics.jsonl").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_damaged_json_is_an_input_error(tmp_path: Path, content: str) -> None:
    run = RunDir.create(tmp_path / "run")
    (run.path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        RunDir.open(run.path).config()


def test_open_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a run folder: it has no config\.json$"):
        RunDir.open(tmp_path)
    RunDir.create(tmp_path / "sweep" / "seed0").write_json("config.json", {})
    with pytest.raises(InputError, match=r"it holds 1: give one of them, as .*seed0"):
        RunDir.open(tmp_path / "sweep")


def test_the_status_says_what_there_is_of_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert (run.status, run.ended) == ("missing", False)
    run = RunDir.create(run.path)
    for name, status, ended in ((CONFIG, "cut", False), (DIVERGED, "diverged", True), (RESULT, "finished", True)):
        run.write_json(name, {})
        assert (run.status, run.ended) == (status, ended)


def test_default_paths_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(model={"depth": 56, "arch": "plain"}, seed=4)
    paths = set()
    for _ in range(3):
        path = new_run_folder(config)
        assert path.is_dir()
        paths.add(path)
    assert len(paths) == 3
    assert all(p.name.startswith("plainnet56-seed4-") for p in paths)


def test_a_data_folder_that_is_gone_is_looked_for_elsewhere(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"execution": {"data_dir": str(tmp_path), "threads": 1}, "seed": 3}
    assert found_again(tree) == tree
    tree["execution"] = {"data_dir": str(tmp_path / "gone"), "threads": 1}
    assert found_again(tree) == {"execution": {"data_dir": None, "threads": 1}, "seed": 3}
    tree["execution"]["data_dir"] = 300 * "x"  # no name that a file could have
    assert found_again(tree)["execution"]["data_dir"] is None
    assert found_again({"seed": 3}) == {"seed": 3, "execution": {}}
