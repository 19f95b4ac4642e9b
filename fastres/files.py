"""Files that are written whole or not at all, and what to tell a user whose disk refuses."""

import contextlib
import errno
import io
import json
import os
import re
import shlex
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.errors import DiskFull, InputError, MachineError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_bytes(path: Path, content: bytes, *, keep: Path | None = None) -> None:
    """Write a file, whole or not at all, also across a power cut; with its folder if need be.

    A temporary file in the same folder is written, fsynced and renamed, then the folder is fsynced.

    Args:
        path: The file. It has one writer: what a crash leaves of its temporary file is overwritten by the next.
        content: All of it.
        keep: Another name in the same folder, for the file that was there before.

    Raises:
        MachineError: The disk is full or the folder cannot be written; what was there is there yet, at worst as `keep`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise disk_error(error, path.parent) from error


def given_path(name: str, path: object) -> Path:
    """A path from a caller, with `~` as the shell has it. Raises InputError where it is none."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise InputError(f"{name} is {path!r}; give a path")
    return Path(os.path.expanduser(text))  # noqa: PTH111 (it leaves what it cannot expand)


def typed(path: Path) -> str:
    """A path as an argument that can be typed, whatever is in its name."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def aside(path: Path) -> Path:
    """Where to move a folder that is in the way. Under such a name it is found by no command that is not given it."""
    count = 1
    while (there := path.with_name(f"{path.name}.old-{count}")).exists():
        count += 1
    return there


def is_aside(name: str) -> bool:
    """Whether a folder's name is one of `aside`."""
    return re.fullmatch(r".*\.old-\d+", name, re.DOTALL) is not None


def by_numbers(path: Path) -> list[tuple[int, str]]:
    """A key by which PlainNet8 comes before PlainNet20."""
    return [(int(word), "") if word.isdecimal() else (0, word) for word in re.split(r"(\d+)", str(path))]


def move_aside(path: Path) -> str:
    """The command that does."""
    return f"mv {typed(path)} {typed(aside(path))}"


def printable(text: str) -> str:
    """A text as UTF-8 can have it: of a file's name, bytes that are none stand as backslash escapes."""
    return text.encode(errors="backslashreplace").decode()


def write_text(path: Path, text: str) -> None:
    """Write a text, in UTF-8, whole or not at all."""
    write_bytes(path, printable(text).encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_figure(figure: "Figure", path: Path, *, dpi: int) -> None:
    """Write a figure as PNG or SVG, by the path's ending. Equal figures give equal bytes: no date, no random ids.

    Raises:
        MachineError: The file cannot be written.
    """
    from matplotlib import rc_context  # half a second; only where something is drawn

    drawn, kind = io.BytesIO(), path.suffix.removeprefix(".")
    with rc_context({"svg.hashsalt": "fastres"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a folder's name: a box stands there
        figure.savefig(drawn, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    write_bytes(path, drawn.getvalue())


def check_figure(path: Path, flag: str = "--out") -> None:
    """Raise InputError where the name that a flag gave to a figure ends in neither .png nor .svg."""
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"{flag} is {path}; give a name that ends in .png or .svg")


def make_folder(path: Path) -> None:
    """Make a folder for files, where there is none. Raises MachineError where it cannot be made or written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise disk_error(error, path) from error


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. Only POSIX can; elsewhere nothing is done."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # some file systems do so for files alone
            raise
    finally:
        os.close(handle)


def disk_error(error: OSError, folder: Path) -> MachineError:
    """What to tell a user whose disk refused a write in `folder`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"no room on the disk in {folder}; free some")
    return MachineError(f"cannot write in {folder}: {error.strerror or error}")
