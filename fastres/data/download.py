"""Fetch a published file into a cache: resumed where it was cut, bounded, and proven before anything uses it."""

import contextlib
import errno
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from fastres.errors import InputError, MachineError
from fastres.files import fsync_folder

TIMEOUT = 30.0  # seconds: to connect, and between two pieces of data
MIN_RATE = 1024  # bytes a second over TIMEOUT, below which a transfer counts as stalled
PIECE = 1 << 16  # bytes
TRIES = 3  # cuts in a row at one address that bring less than MIN_GAIN
MIN_GAIN = 1 << 20  # bytes
PAUSE = 1.0  # seconds before the second try, twice that before the third

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Say = Callable[[str], None]


@dataclass(frozen=True)
class Remote:
    """A published file, and what proves it."""

    url: str  # the official address
    num_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rpartition("/")[2]

    def proves(self, path: Path) -> bool:
        """Whether the file at `path` is this one."""
        if path.stat().st_size != self.num_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


class _Refused(Exception):
    """This address will not give the file; the next one may."""


class _Cut(Exception):
    """The transfer broke off; another try at the same address goes on from there."""


class _Unreachable(_Cut):
    """No answer from there at all."""


def cached(
    remote: Remote, cache_dir: Path, urls: Sequence[str] = (), *, progress: Progress | None = None, say: Say = print
) -> Path:
    """The path of `remote` in the cache, fetched where it is not there or not whole.

    Args:
        remote: What to fetch.
        cache_dir: Made where it does not exist.
        urls: Mirrors, http or https, tried before the official address: whoever names one knows it to be nearer, and
            the digest decides whether it is as good.
        progress: Takes bytes done and bytes in all.
        say: Takes one-line notices.

    Raises:
        InputError: A mirror is not an http or https address.
        MachineError: No address gave the file, or the cache cannot be written, or the disk is full.
    """
    addresses = [*urls, remote.url]
    for url in urls:
        _check_url(url)
    path = cache_dir / remote.name
    try:
        if path.exists() and remote.proves(path):  # no lock needed: a file appears here whole or not at all
            return path
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path, say):
            if path.exists():
                if remote.proves(path):  # another process has just fetched it
                    return path
                say(f"{path} is corrupt (it does not have the official SHA-256): removed, fetching it again")
                path.unlink()
            part = path.with_name(f"{path.name}.part")
            _check_room(part, remote)
            _fetch(addresses, remote, part, progress, say)
            _move(part, path)
    except (OSError, NotImplementedError) as error:  # the latter from filelock, on a file system without locks
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _no_room(cache_dir, remote.num_bytes, os.strerror(error.errno)) from error
        why = getattr(error, "strerror", None) or error
        raise MachineError(f"cannot use the cache folder {cache_dir}: {why}; set FASTRES_CACHE to another") from error
    return path


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        fetchable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # no port: None
    except ValueError:
        fetchable = False
    if not fetchable:
        raise InputError(f"--data-url {url} is no http or https address; for a file on this machine use --data-dir")


@contextlib.contextmanager
def _one_at_a_time(path: Path, say: Say) -> Iterator[None]:
    """Processes that start at once fetch `path` once; the system lets go of the lock of one that dies."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"another process is fetching {path}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_room(part: Path, remote: Remote) -> None:
    missing = remote.num_bytes - _size(part)
    if shutil.disk_usage(part.parent).free < missing:
        raise _no_room(part.parent, missing, os.strerror(errno.ENOSPC))


def _no_room(cache_dir: Path, num_bytes: int, why: str) -> MachineError:
    free = shutil.disk_usage(cache_dir).free
    return MachineError(
        f"cannot fetch CIFAR-10 into {cache_dir}: {why} ({num_bytes:,} bytes needed, {free:,} free)\n"
        "Free some, or set FASTRES_CACHE to a folder on another disk"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _move(part: Path, path: Path) -> None:
    """Give a proven file its name, in a way that a crash leaves it whole or not there."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    fsync_folder(path.parent)


def _fetch(addresses: Sequence[str], remote: Remote, part: Path, progress: Progress | None, say: Say) -> None:
    """Make `part` the whole file from the first address that gives it."""
    failures = []
    for url in addresses:
        try:
            return _fetch_from(url, remote, part, progress, say)
        except _Refused as error:
            failures.append(f"{url} ({_printable(str(error))})")
            say(f"could not fetch CIFAR-10 from {failures[-1]}")
    raise MachineError(
        f"no CIFAR-10: no --data-dir or FASTRES_DATA given, none in {part.parent}, none from {'; '.join(failures)}\n"
        "Say where it is with --data-dir FOLDER, or do without: fastres train --dataset synthetic, "
        "fastres reproduce --preset smoke"
    )


def _fetch_from(url: str, remote: Remote, part: Path, progress: Progress | None, say: Say) -> None:
    """Receive from one address until `part` is whole and proven.

    Raises:
        _Refused: It will not come to that.
    """
    best, fruitless = _size(part), 0
    heard = resumed = restarted = False
    while True:
        have = _size(part)
        resumed |= have > 0
        try:
            if have < remote.num_bytes:
                say(f"fetching {remote.name} from {url}" + (f", from byte {have:,} on" if have else ""))
                _receive(url, remote, part, progress)
        except _Cut as error:
            fruitless = 0 if _size(part) >= best + MIN_GAIN else fruitless + 1
            best = max(best, _size(part))
            heard |= not isinstance(error, _Unreachable)
            if fruitless == TRIES or not heard:
                raise _Refused(str(error)) from error
            time.sleep(PAUSE * fruitless)
            continue
        if remote.proves(part):
            return
        part.unlink()
        if not resumed or restarted:
            raise _Refused("what it sends does not have the official SHA-256")
        # The kept bytes may have come from elsewhere, so this address gets one clean start.
        say(f"what was kept of an earlier download does not fit {remote.name}: starting again")
        best, fruitless, resumed, restarted = 0, 0, False, True


def _receive(url: str, remote: Remote, part: Path, progress: Progress | None) -> None:
    """One request: the rest of the file, or all of it, into `part`. Returns with `part` complete, unproven."""
    have = _size(part)
    headers = {"User-Agent": "fastres"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 (_opener knows http and https only)
        response = _opener().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"HTTP {error.code} {error.reason}"
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            part.unlink()  # it has less than we do: from the beginning
            raise _Cut(reason) from error
        transient = error.code in (408, 429) or error.code >= 500
        raise (_Cut if transient else _Refused)(reason) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and TLS errors are OSErrors
        raise _Unreachable(_reason(error)) from error
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # it does not resume, and sends all of it
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise _Cut("it sent another part than was asked for")
        if response.length is not None and have + response.length != remote.num_bytes:  # None: it does not say
            part.unlink(missing_ok=True)
            raise _Refused(f"it offers {have + response.length:,} bytes, the official file has {remote.num_bytes:,}")
        _copy(response, part, have, remote.num_bytes, progress)


def _copy(response: http.client.HTTPResponse, part: Path, done: int, num_bytes: int, progress: Progress | None) -> None:
    since, until_then = time.monotonic(), done
    with part.open("ab" if done else "wb") as file:
        while True:
            try:
                piece = response.read1(PIECE)  # what is there: read() would wait for all of it
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _Cut(f"{_reason(error)} after {done:,} bytes") from error
            if not piece:
                break
            done += len(piece)
            if done > num_bytes:
                file.truncate(0)
                raise _Refused(f"it sends more than the {num_bytes:,} bytes of the official file")
            file.write(piece)
            if progress:
                progress(done, num_bytes)
            if (now := time.monotonic()) - since > TIMEOUT:
                if done - until_then < MIN_RATE * TIMEOUT:
                    raise _Cut(f"stalled after {done:,} bytes")
                since, until_then = now, done
    if done < num_bytes:
        raise _Cut(f"cut after {done:,} of {num_bytes:,} bytes")


def _opener() -> urllib.request.OpenerDirector:
    """What urllib.request.urlopen uses, less ftp, file and data: a redirect does not lead there either."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _printable(text: str) -> str:
    """One short line: a part of `text` comes from the server, and may hold line ends and terminal codes."""
    return "".join(char if char.isprintable() else " " for char in text)[:160]


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)  # a URLError carries the socket's error
    return str(getattr(inner, "strerror", None) or inner or type(inner).__name__)
