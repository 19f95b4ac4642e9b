"""Atomic save and load of a run's state: one safetensors file, its metadata and a digest in the header.

It does not decide when. Tensors of the network have their common names (`conv1.weight`), so the file is also a plain
weights file; what else a run needs is named with a slash (`momentum/conv1.weight`, `log/losses`, `data/mean`).
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastres import files
from fastres.errors import InputError

NEWEST = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
FORMAT = 1  # of the file; a reader refuses what it does not know


@dataclass(frozen=True)
class Checkpoint:
    """Tensors on the CPU, and metadata as JSON values."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path

    @property
    def weights(self) -> dict[str, Tensor]:
        """The network's own state dict."""
        return {name: t for name, t in self.tensors.items() if "/" not in name}


def save(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint so that a crash at any moment leaves a whole one; the one before is kept as `PREVIOUS`.

    Raises:
        MachineError: The disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    full = {"format": FORMAT, **meta}
    header = {"fastres": json.dumps(full, sort_keys=True), "digest": _digest(on_cpu, full)}
    content = safetensors.torch.save(on_cpu, metadata=header)
    newest = folder / NEWEST
    files.write_bytes(newest, content, keep=folder / PREVIOUS)
    return newest


def load(path: Path) -> Checkpoint:
    """Read one checkpoint file and prove it whole.

    Raises:
        InputError: The file is missing, truncated, altered, or of another format.
    """
    try:
        content = path.read_bytes()  # all at once: a save may put another file in its place
        header, tensors = _metadata(io.BytesIO(content)), safetensors.torch.load(content)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, safetensors.SafetensorError) as error:  # KeyError: a dtype that torch lacks
        raise InputError(f"{path} is not a readable checkpoint: {error}") from error
    if "fastres" not in header:
        raise InputError(f"{path} is a safetensors file, but not a checkpoint of a run: it has no metadata of fastres")
    try:
        meta = json.loads(header["fastres"])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: its metadata is not JSON") from error
    if not isinstance(meta, dict):
        raise InputError(f"{path} is damaged: its metadata is no object of JSON")
    if meta.get("format") != FORMAT:
        raise InputError(f"{path} has checkpoint format {meta.get('format')}; this version reads format {FORMAT}")
    if header.get("digest") != _digest(tensors, meta):
        raise InputError(f"{path} is damaged: its content does not match its digest")
    return Checkpoint(tensors, meta, path)


def is_checkpoint(path: Path) -> bool:
    """Whether a file is safetensors and says that it is a checkpoint of a run."""
    try:
        with path.open("rb") as file:
            return "fastres" in _metadata(file)
    except (OSError, ValueError):
        return False


def _metadata(file: BinaryIO) -> dict[str, str]:
    """A safetensors file's own. safetensors' `safe_open` takes only paths in UTF-8, and misreports permissions.

    Raises:
        OSError: It cannot be read.
        ValueError: It is none.
    """
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > num_bytes:
        raise ValueError("its header is cut off")
    try:
        header = json.loads(file.read(length))
    except RecursionError as error:
        raise ValueError("its header is nested without end") from error
    found = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(found, dict):
        raise ValueError("its header is none of safetensors")
    return found


def load_all(folder: Path, *, most: int = 2) -> tuple[list[Checkpoint], list[str]]:
    """The whole checkpoints of a run folder, newest first, at most `most`; and a line for each that is not whole.

    Raises:
        InputError: Checkpoints exist, but none of them is whole, or one may not be read.
    """
    whole: list[Checkpoint] = []
    problems: list[str] = []
    for path in (folder / NEWEST, folder / PREVIOUS):
        if path.exists() and len(whole) < most:
            try:
                whole.append(load(path))
            except InputError as error:
                if isinstance(error.__cause__, PermissionError):  # it may be whole, and then it is the newest
                    raise
                problems.append(str(error))
    if problems and not whole:
        raise InputError(
            f"no whole checkpoint is left: {'; '.join(problems)}; to begin anew: {files.move_aside(folder)}"
        )
    return whole, problems


def steps(folder: Path) -> set[int]:
    """The steps at which a run folder's checkpoints were saved, as they say; unreadable ones are left out."""
    found = set()
    for path in (folder / NEWEST, folder / PREVIOUS):
        unreadable = (OSError, ValueError, KeyError, TypeError, RecursionError)
        with contextlib.suppress(*unreadable), path.open("rb") as file:
            found.add(int(json.loads(_metadata(file)["fastres"])["step"]))
    return found


def move_newer_aside(folder: Path, used: Path | None) -> None:
    """Rename the checkpoints newer than `used`, from which a run goes on; all where that is None.

    The next save must not push out the one that is used, nor a later resume take up what was passed over.
    """
    for path in (folder / NEWEST, folder / PREVIOUS):
        if path == used:
            return
        if path.exists():
            try:
                path.replace(path.with_suffix(".unused.safetensors"))
            except OSError as error:
                raise files.disk_error(error, folder) from error


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every floating-point tensor holds neither NaN nor Inf. Waits for the device."""
    return all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())


def _digest(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return "sha256:" + digest.hexdigest()
