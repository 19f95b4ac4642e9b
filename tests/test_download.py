"""download.py against servers on this machine that cut, stall, lie, redirect and refuse."""

import contextlib
import errno
import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import filelock
import pytest

from fastres.data import download
from fastres.data.download import Remote, cached
from fastres.errors import InputError, MachineError

CONTENT = bytes(range(256)) * 1200  # 307 kB: several pieces
NAME = "cifar-10-binary.tar.gz"
Answer = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each request with the server's next answer; the last one is kept."""

    server: "Server"

    def do_GET(self) -> None:
        ours = self.server
        ours.asked.append(self.headers.get("Range", ""))
        answer = ours.answers.pop(0) if len(ours.answers) > 1 else ours.answers[0]
        with contextlib.suppress(ConnectionError):
            answer(self)

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 (its name in the base class)

    def start(self) -> int:
        """The first byte that is asked for."""
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *answers: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = list(answers), list[str]()
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{NAME}"


def gives(content: bytes = CONTENT, *, upto: int | None = None, ranges: bool = True, length: bool = True) -> Answer:
    """Sends `content` from the byte that is asked for; closes the connection at byte `upto`."""

    def answer(handler: Handler) -> None:
        start = handler.start() if ranges else 0
        body = content[start:]
        size = len(body) if length else None
        if start:
            handler.head(206, size, Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            handler.head(200, size)
        handler.wfile.write(body if upto is None else content[start:upto])

    return answer


def status(code: int, **headers: str) -> Answer:
    return lambda handler: handler.head(code, 0, **headers)


def stalls(handler: Handler) -> None:
    handler.head(200, len(CONTENT))
    handler.wfile.write(CONTENT[:1000])
    handler.wfile.flush()
    handler.server.ended.wait(5)


def drips(handler: Handler) -> None:
    """Never silent for long, and would take an hour."""
    handler.head(200, len(CONTENT))
    for _ in range(500):
        handler.wfile.write(b"drip")
        time.sleep(0.01)


def endless(handler: Handler) -> None:
    handler.head(200, None)
    while True:
        handler.wfile.write(CONTENT)


def says(raw: bytes) -> Answer:
    def answer(handler: Handler) -> None:
        handler.wfile.write(raw)

    return answer


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def start(*answers: Answer) -> Server:
            server = stack.enter_context(Server(*answers))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            stack.callback(server.ended.set)
            return server

        yield start


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 10.0)  # no busy machine takes that long to answer itself
    monkeypatch.setattr(download, "PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "*")


def official(server: Server, content: bytes = CONTENT) -> Remote:
    return Remote(server.url, len(content), hashlib.sha256(content).hexdigest())


def fetched(remote: Remote, folder: Path, *urls: str) -> list[str]:
    """Fetch, compare, and return what was said."""
    said: list[str] = []
    path = cached(remote, folder, urls, say=said.append)
    assert path == folder / NAME
    assert path.read_bytes() == CONTENT
    assert sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock")) == [NAME]
    return said


def failure(remote: Remote, folder: Path, *urls: str) -> str:
    with pytest.raises(MachineError) as caught:
        cached(remote, folder, urls, say=lambda _: None)
    assert not (folder / NAME).exists()
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "--data-dir FOLDER" in message
    assert "--dataset synthetic" in message
    assert len(message.splitlines()) == 2
    assert len(message) < 1000
    return message


def test_fetched_once_with_progress(serve: Callable[..., Server], tmp_path: Path) -> None:
    server, seen, folder = serve(gives()), list[int](), tmp_path / "new" / "cache"

    def progress(done: int, in_all: int) -> None:
        assert in_all == len(CONTENT)
        assert not (folder / NAME).exists()  # it gets its name when it is whole and proven
        seen.append(done)

    cached(official(server), folder, progress=progress, say=lambda _: None)
    assert seen == sorted(set(seen))
    assert len(seen) > 3
    assert seen[-1] == len(CONTENT)
    assert fetched(official(server), folder) == []
    assert server.asked == [""]


@pytest.mark.parametrize("length", [True, False])
def test_a_cut_transfer_goes_on_where_it_was_cut(serve: Callable[..., Server], tmp_path: Path, length: bool) -> None:
    server = serve(gives(upto=100_000, length=length), gives(upto=200_000, length=length), gives())
    assert "from byte 100,000 on" in " ".join(fetched(official(server), tmp_path))
    assert server.asked == ["", "bytes=100000-", "bytes=200000-"]


def test_a_killed_download_goes_on_in_the_next_process(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:5000])
    server = serve(gives())
    fetched(official(server), tmp_path)
    assert server.asked == ["bytes=5000-"]


def test_a_server_that_does_not_resume_starts_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(gives(upto=100_000, ranges=False), gives(ranges=False))
    fetched(official(server), tmp_path)
    assert server.asked == ["", "bytes=100000-"]


def test_progress_counts_what_was_kept(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:300_000])
    seen: list[int] = []
    cached(official(serve(gives())), tmp_path, progress=lambda done, _: seen.append(done), say=lambda _: None)
    assert min(seen) > 300_000
    assert max(seen) == len(CONTENT)


def test_a_server_with_less_than_was_kept_is_asked_anew(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:5000])
    server = serve(status(416), gives())
    fetched(official(server), tmp_path)
    assert server.asked == ["bytes=5000-", ""]


def test_a_cut_every_megabyte_is_no_reason_to_give_up(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MIN_GAIN", 50_000)
    server = serve(*(gives(upto=k * 50_000) for k in range(1, 7)), gives())
    fetched(official(server), tmp_path)
    assert len(server.asked) == 7


def test_a_server_that_always_cuts_at_one_byte_is_given_up(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it gave once is no gain when it gives it again."""
    monkeypatch.setattr(download, "MIN_GAIN", 50_000)
    mirror, home = serve(*[gives(upto=100_000)] * 10), serve(gives())
    fetched(official(home), tmp_path, mirror.url)
    assert len(mirror.asked) == 1 + download.TRIES
    assert len(home.asked) == 1


def test_a_mirror_that_resumes_with_other_content_gets_one_clean_start(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    """The next address starts at byte 0, and none goes round for ever."""
    wrong = CONTENT[:-1] + b"?"
    cut, rest = gives(upto=100_000), gives(wrong)
    mirror, home = serve(cut, rest, cut, rest, cut, rest, status(404)), serve(gives())
    said = fetched(official(home), tmp_path, mirror.url)
    assert mirror.asked == ["", "bytes=100000-"] * 2
    assert home.asked == [""]
    assert sum("does not fit" in line for line in said) == 1


@pytest.mark.parametrize("kept", [b"x" * 5000, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 9)])
def test_rubbish_kept_from_before_gets_one_clean_start(
    serve: Callable[..., Server], tmp_path: Path, kept: bytes
) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(kept)
    said = fetched(official(serve(gives())), tmp_path)
    assert "does not fit" in " ".join(said)


def test_a_server_with_another_range_is_asked_anew(serve: Callable[..., Server], tmp_path: Path) -> None:
    def other_part(handler: Handler) -> None:
        handler.head(206, 10, Content_Range=f"bytes 7-16/{len(CONTENT)}")
        handler.wfile.write(CONTENT[7:17])

    server = serve(gives(upto=100_000), other_part, gives())
    fetched(official(server), tmp_path)
    assert server.asked[-1] == ""


def test_mirrors_come_first_and_the_official_address_last(serve: Callable[..., Server], tmp_path: Path) -> None:
    wrong = CONTENT[:-1] + b"?"
    lost, lying, home = serve(status(404)), serve(gives(wrong)), serve(gives())
    said = "\n".join(fetched(official(home), tmp_path, lost.url, lying.url))
    assert said.index("404") < said.index("does not have the official SHA-256") < said.index(home.url)
    assert (lost.asked, lying.asked, home.asked) == ([""], [""], [""])


def test_a_mirror_that_has_it_spares_the_official_address(serve: Callable[..., Server], tmp_path: Path) -> None:
    mirror, home = serve(gives()), serve(gives())
    fetched(official(home), tmp_path, mirror.url)
    assert home.asked == []


def test_every_address_that_was_tried_is_named(serve: Callable[..., Server], tmp_path: Path) -> None:
    mirror, home = serve(status(404)), serve(status(403))
    message = failure(official(home), tmp_path, mirror.url)
    assert f"{mirror.url} (HTTP 404 Not Found); {home.url} (HTTP 403 Forbidden)" in message
    assert str(tmp_path) in message


def test_what_a_mirror_cut_goes_on_at_the_next(serve: Callable[..., Server], tmp_path: Path) -> None:
    mirror, home = serve(gives(upto=50_000), status(404)), serve(gives())
    fetched(official(home), tmp_path, mirror.url)
    assert home.asked == ["bytes=50000-"]


BAD: dict[str, tuple[tuple[Answer, ...], str]] = {
    "wrong digest": ((gives(CONTENT[:-1] + b"?"),), "does not have the official SHA-256"),
    "too long, said": ((gives(CONTENT + b"?"),), "offers 307,201 bytes, the official file has 307,200"),
    "too long, not said": ((endless,), "more than the 307,200 bytes"),
    "too short, said": ((gives(CONTENT[:-1]),), "offers 307,199 bytes"),
    "nothing": ((gives(upto=0),), "cut after 0 of 307,200 bytes"),
    "404": ((status(404),), "HTTP 404"),
    "500 for good": ((status(500),), "HTTP 500"),
    "416 for good": ((status(416),), "HTTP 416"),
    "to a file": ((status(302, Location="file:///etc/passwd"),), "file"),
    "to ftp": ((status(302, Location="ftp://127.0.0.1/x"),), "ftp"),
    "to nowhere": ((status(302, Location="http://["),), "Invalid IPv6 URL"),
    "round and round": ((status(302, Location=f"/{NAME}"),), "redirect"),
    "no http": ((says(b"\0\1\2\3rubbish\r\n\r\n"),), "rubbish"),
    "a long reason": ((says(b"HTTP/1.1 404 " + b"\x1b[31m" * 9000 + b"\r\n\r\n"),), "HTTP 404"),
    "a long length": ((says(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"1" * 5000 + b"\r\n\r\n"),), "cut after 0"),
    "a piece without end": ((says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz"),), "IncompleteRead"),
}


@pytest.mark.parametrize("kind", BAD)
def test_addresses_that_do_not_give_it(serve: Callable[..., Server], tmp_path: Path, kind: str) -> None:
    answers, reason = BAD[kind]
    server = serve(*answers)
    message = failure(official(server), tmp_path)
    assert reason in message
    assert server.url in message
    assert len(server.asked) <= 12
    left = tmp_path / f"{NAME}.part"
    assert not left.exists() or left.stat().st_size < len(CONTENT)


@pytest.mark.parametrize("answer", [stalls, drips])
def test_a_stalled_transfer_is_given_up(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server = serve(answer)
    message = failure(official(server), tmp_path)
    assert "timed out" in message or "stalled after" in message
    assert len(server.asked) <= download.TRIES


def test_a_passing_error_is_tried_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(status(503), status(429), gives())
    fetched(official(server), tmp_path)
    assert len(server.asked) == 3


def test_nobody_there(serve: Callable[..., Server], tmp_path: Path) -> None:
    nowhere = Remote(f"http://127.0.0.1:1/{NAME}", 10, "0" * 64)
    assert "Connection refused" in failure(nowhere, tmp_path)
    home = serve(gives())
    assert "Connection refused" in " ".join(fetched(official(home), tmp_path, nowhere.url))


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT + b"?", b"", b"?" + CONTENT[1:]])
def test_a_corrupt_cached_archive_is_said_removed_and_fetched(
    serve: Callable[..., Server], tmp_path: Path, damage: bytes
) -> None:
    (tmp_path / NAME).write_bytes(damage)
    said = fetched(official(serve(gives())), tmp_path)
    assert f"{tmp_path / NAME} is corrupt" in said[0]
    assert "removed, fetching it again" in said[0]


def test_a_corrupt_cached_archive_is_removed_though_nobody_has_another(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    (tmp_path / NAME).write_bytes(CONTENT[:-1])
    failure(official(serve(status(404))), tmp_path)


def test_several_at_once_fetch_it_once(serve: Callable[..., Server], tmp_path: Path) -> None:
    said, all_wait = list[str](), threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if sum("another process is fetching" in line for line in said) == 3:
            all_wait.set()

    def slow(handler: Handler) -> None:
        all_wait.wait(20)
        gives()(handler)

    server = serve(slow)
    with ThreadPoolExecutor(4) as pool:  # each has its own lock file handle, as processes have
        jobs = [pool.submit(cached, official(server), tmp_path, say=say) for _ in range(4)]
        assert {job.result() for job in jobs} == {tmp_path / NAME}
    assert all_wait.is_set()
    assert server.asked == [""]


def test_another_process_waits(serve: Callable[..., Server], tmp_path: Path) -> None:
    """And takes what is there then, though the one before died without it."""
    code = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held'); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / f".{NAME}.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        server, said = serve(gives()), list[str]()

        def say(line: str) -> None:
            said.append(line)
            other.kill()

        cached(official(server), tmp_path, say=say)
    assert "another process is fetching" in said[0]
    assert server.asked == [""]


@pytest.mark.parametrize(
    "url", ["ftp://a/b", "file:///etc/passwd", "a/b", "", "http://", "http://[", "http://a:x/", "https://a:99999/"]
)
def test_mirrors_that_are_no_addresses(serve: Callable[..., Server], tmp_path: Path, url: str) -> None:
    server = serve(gives())
    with pytest.raises(InputError, match="no http or https address"):
        cached(official(server), tmp_path, [url], say=lambda _: None)
    assert server.asked == []


def test_what_is_kept_needs_no_room_again(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:100_000])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(CONTENT) - 100_001))
    with pytest.raises(MachineError, match=rf"{len(CONTENT) - 100_000:,} bytes needed"):
        cached(official(serve(gives())), tmp_path, say=lambda _: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(CONTENT) - 100_000))
    assert cached(official(serve(gives())), tmp_path, say=lambda _: None).read_bytes() == CONTENT


def test_no_room(serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(gives())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(MachineError, match=r"307,200 bytes needed, 1,000 free\)\nFree some"):
        cached(official(server), tmp_path, say=lambda _: None)
    assert server.asked == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_the_disk_fills_up_on_the_way(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").symlink_to("/dev/full")
    with pytest.raises(MachineError, match=r"No space left on device .*\nFree some, or set FASTRES_CACHE"):
        cached(official(serve(gives())), tmp_path, say=lambda _: None)
    assert not (tmp_path / NAME).exists()


def test_a_cache_that_cannot_be_written(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "dir" / NAME).mkdir(parents=True)
    for folder in (tmp_path / "file" / "cache", tmp_path / "dir"):
        with pytest.raises(MachineError, match="set FASTRES_CACHE to another"):
            cached(official(serve(gives())), folder, say=lambda _: None)


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), NotImplementedError("no locks")])
def test_a_read_only_cache_is_enough_where_it_has_the_file(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(filelock.FileLock, "acquire", Mock(side_effect=error))
    server = serve(gives())
    with pytest.raises(MachineError, match=rf"cannot use the cache folder .*{error.args[-1]}"):
        cached(official(server), tmp_path, say=lambda _: None)
    (tmp_path / NAME).write_bytes(CONTENT)
    assert cached(official(server), tmp_path, say=lambda _: None) == tmp_path / NAME
    assert server.asked == []
