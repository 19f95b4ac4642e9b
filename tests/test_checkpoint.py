"""checkpoint.py: whole or not at all, the one before kept, damage found."""

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fastres import checkpoint
from fastres.errors import InputError, MachineError


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    """A net's weights in two dtypes and layouts, and a momentum."""
    return {
        "conv1.weight": torch.full((4, 3, 3, 3), value).to(memory_format=torch.channels_last),
        "fc.bias": torch.arange(10.0) * value,
        "momentum/fc.bias": torch.zeros(0),
        "log/errors": torch.tensor([1, 2, 3], dtype=torch.int32),
    }


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, tensors(0.1), {"step": 7, "nested": {"a": [1, None]}})
    saved = checkpoint.load(path)
    assert saved.meta == {"format": checkpoint.FORMAT, "step": 7, "nested": {"a": [1, None]}}
    assert saved.tensors.keys() == tensors().keys()
    for name, tensor in tensors(0.1).items():
        assert torch.equal(saved.tensors[name], tensor)
        assert saved.tensors[name].dtype == tensor.dtype
    assert saved.weights.keys() == {"conv1.weight", "fc.bias"}


def test_the_one_before_is_kept_and_nothing_else(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, tensors(), {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([checkpoint.NEWEST, checkpoint.PREVIOUS])
    assert checkpoint.load(tmp_path / checkpoint.NEWEST).meta["step"] == 3
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS).meta["step"] == 2


def test_any_single_flipped_bit_is_found(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, tensors(), {"step": 1})
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged|not a readable|no metadata|format"):
            checkpoint.load(path)


def test_any_truncation_is_found(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, tensors(), {"step": 1})
    whole = path.read_bytes()
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            checkpoint.load(path)


def test_damage_falls_back_to_the_one_before_and_says_so(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, tensors(), {"step": 1})
    newest = checkpoint.save(tmp_path, tensors(), {"step": 2})
    newest.write_bytes(newest.read_bytes()[:-5])
    (saved,), problems = checkpoint.load_all(tmp_path, most=1)
    assert saved.meta["step"] == 1
    assert len(problems) == 1
    assert checkpoint.NEWEST in problems[0]
    # ... and the next save must not push the good one out
    checkpoint.move_newer_aside(tmp_path, saved.path)
    checkpoint.save(tmp_path, tensors(), {"step": 3})
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS).meta["step"] == 1


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert checkpoint.load_all(tmp_path) == ([], [])
    (tmp_path / checkpoint.NEWEST).write_bytes(b"rubbish")
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"")
    with pytest.raises(InputError, match=r"no whole checkpoint.*to begin anew: mv (\S+) \1\.old-1"):
        checkpoint.load_all(tmp_path)


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "bad\udcff"
    folder.mkdir()
    path = checkpoint.save(folder, tensors(), {"step": 3})
    assert checkpoint.is_checkpoint(path)
    assert checkpoint.steps(folder) == {3}
    assert checkpoint.load(path).meta["step"] == 3


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, tensors(), {"step": step})
    opened = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == checkpoint.NEWEST:
            raise PermissionError(13, os.strerror(13), str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=rf"{checkpoint.NEWEST} cannot be read: Permission denied$"):
        checkpoint.load_all(tmp_path)  # the one before would be taken, and the newest moved aside


NESTED = (200_000).to_bytes(8, "little") + b"[" * 200_000


@pytest.mark.parametrize(
    "content", [b"", NESTED, b"\xff" * 20, b"\x02" + bytes(7) + b"[]", b"\x08" + bytes(7) + b'{"a": 1']
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / checkpoint.NEWEST).write_bytes(content)
    assert not checkpoint.is_checkpoint(tmp_path / checkpoint.NEWEST)
    assert checkpoint.steps(tmp_path) == set()
    with pytest.raises(InputError, match="is not a readable checkpoint"):
        checkpoint.load(tmp_path / checkpoint.NEWEST)


def test_foreign_safetensors_and_future_formats_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, foreign)
    assert not checkpoint.is_checkpoint(foreign)
    with pytest.raises(InputError, match="no metadata of fastres"):
        checkpoint.load(foreign)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        future = checkpoint.save(tmp_path, tensors(), {"step": 1})
    with pytest.raises(InputError, match="format 99"):
        checkpoint.load(future)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    checkpoint.save(tmp_path, tensors(), {"step": 1})

    def no_room(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync", no_room) if fails == "fsync" else (Path, "replace", no_room)))
        with pytest.raises(MachineError, match=r"no room on the disk in"):
            checkpoint.save(tmp_path, tensors(), {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.NEWEST]
    assert checkpoint.load(tmp_path / checkpoint.NEWEST).meta["step"] == 1


def test_order_of_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content is on the disk before it gets its name, and the folder is synced last."""
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(handle: int) -> None:
        calls.append("fsync folder" if Path(f"/proc/self/fd/{handle}").is_dir() else "fsync file")
        fsync(handle)

    def spy_replace(self: Path, target: Path) -> Path:
        calls.append(f"rename to {Path(target).name}")
        return replace(self, target)

    checkpoint.save(tmp_path, tensors(), {"step": 1})
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    checkpoint.save(tmp_path, tensors(), {"step": 2})
    expected = ["fsync file", f"rename to {checkpoint.PREVIOUS}", f"rename to {checkpoint.NEWEST}", "fsync folder"]
    assert calls == expected


def test_all_finite() -> None:
    assert checkpoint.all_finite({"a": torch.ones(2), "b": torch.tensor([1])})
    assert not checkpoint.all_finite({"a": torch.tensor([1.0, float("nan")])})
    assert not checkpoint.all_finite({"a": torch.tensor([float("-inf")])})
