"""console.py and plots/curves.py: what a person sees, on a terminal, in a log, and as a picture."""

import io
import shlex
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.table import Table

from fastres import console as module
from fastres.console import Console, Progress, Verbosity, duration, percent
from fastres.errors import MachineError
from fastres.plots.curves import draw_curves
from fastres.rundir import RunDir

HALF_WAY = Progress(1_000, 2_000, 390.625, 0.98765, 0.3141, 0.4, 0.1, 801.4, 160.0, 163.7)


def on(verbosity: Verbosity, *, terminal: bool = False, width: int = 100) -> tuple[Console, io.StringIO]:
    console, stream = Console(verbosity), io.StringIO()
    console._rich = RichConsole(
        file=stream, force_terminal=terminal, width=width, height=20, soft_wrap=True, highlight=False
    )
    return console, stream


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (187.4, "3:07"), (68_700, "19:05:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_percent() -> None:
    assert percent(0.0875) == "8.75 %"


def test_a_line_holds_all_that_is_known() -> None:
    line = HALF_WAY.line()
    for part in ("2.56", "1000/2000", "loss 0.9877", "train err 31.41 %", "test err 40.00 %", "lr 0.1", "img/s 801"):
        assert part in line
    assert line.endswith("2:40, 2:44 left")
    assert "None" not in Progress(0, 10, 1.0).line()


def test_a_line_names_what_was_tested_and_says_nothing_of_no_time_left() -> None:
    line = Progress(10, 10, 5.0, test_error=0.25, elapsed=3.0, remaining=0.0, held_out="validation").line()
    assert "validation err 25.00 %" in line
    assert line.endswith("3.0 s")


def test_lines_mode_prints_only_lines_that_end_an_epoch(tmp_path: Path) -> None:
    console, stream = on("lines")
    console.say("before")
    run = RunDir.create(tmp_path / "run")
    console.attach(run)
    console.show(HALF_WAY)
    console.show(HALF_WAY, line=True)
    console.tick(1_001)
    console.close()
    assert stream.getvalue() == f"before\n{Progress(*vars(HALF_WAY).values()).line().replace('1001', '1000')}\n"
    assert (tmp_path / "run" / "console.log").read_text() == stream.getvalue()


def test_what_all_runs_share_is_printed_once_and_stands_in_each_log(tmp_path: Path) -> None:
    console, stream = on("lines")
    runs = [RunDir.create(tmp_path / name) for name in ("first", "second")]
    for run in runs:
        console.say_once("before")
        console.attach(run)
        console.say_once("in it")
        console.attach()
    console.say_once("before")  # as before a run that another process takes meanwhile
    console.say_once("before")
    assert console._early == ["before"]
    assert stream.getvalue() == "before\nin it\n"
    assert [(run.path / "console.log").read_text() for run in runs] == 2 * [stream.getvalue()]


def test_a_programs_own_stdout_may_have_only_write(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tee:
        def __init__(self) -> None:
            self.written: list[str] = []

        def write(self, text: str) -> None:
            self.written.append(text)

        def flush(self) -> None:
            pass

    tee = Tee()
    monkeypatch.setattr(sys, "stdout", tee)
    console = Console("auto")
    console.say("something")
    assert (console.verbosity, "".join(tee.written)) == ("lines", "something\n")


def test_quiet_prints_nothing_and_logs_all(tmp_path: Path) -> None:
    console, stream = on("quiet")
    console.attach(RunDir.create(tmp_path / "run"))
    console.say("something")
    console.show(HALF_WAY, line=True)
    console.download(5, 10)
    assert stream.getvalue() == ""
    assert len((tmp_path / "run" / "console.log").read_text().splitlines()) == 2


def test_a_closed_pipe_ends_the_printing_and_not_the_run(tmp_path: Path) -> None:
    """`fastres train | head`: rich's own console would end the program."""
    code = f"""
import time
from pathlib import Path
from fastres.console import Console
from fastres.rundir import RunDir
console = Console("lines")
console.attach(RunDir.create(Path({str(tmp_path / "run")!r})))
for number in range(50):
    console.say(f"line {{number}}")
    time.sleep(0.01)
"""
    script = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "line 0\n", "")
    assert len((tmp_path / "run" / "console.log").read_text().splitlines()) == 50


def test_live_display_shows_the_step_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = on("live", terminal=True)
    console.show(Progress(*vars(HALF_WAY).values()))
    assert console._live is not None
    console.tick(1_234)
    monkeypatch.setattr(module, "perf_counter", lambda: console._shown_at + 40)  # its time goes on between two records
    console._live.refresh()
    shown = stream.getvalue()
    for part in ("1234/2000", "epoch 3.16", "3:20  2:04 left", "loss 0.9877", "801"):
        assert part in shown
    console.say("a notice stays")
    console.close()
    assert stream.getvalue().rstrip().endswith("\x1b[2K")  # the display's lines are erased
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(2)
            assert not thread.is_alive()


def test_live_display_refreshes_at_most_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = on("live", terminal=True)
    drawn: list[float] = []
    render = console._render

    def counted() -> RenderableType:
        drawn.append(time.monotonic())
        return render()

    monkeypatch.setattr(console, "_render", counted)
    start = time.monotonic()
    step = 0
    while time.monotonic() - start < 1.2:
        step += 1
        console.tick(step)
        console.show(Progress(step, 10**9, 1.0))
    taken = time.monotonic() - start
    console.close()
    assert step > 1_000
    assert 2 <= len(drawn) <= 10 * taken + 3  # rich draws once at the start and once at the end, whatever the rate
    assert stream.getvalue()


@pytest.mark.parametrize("width", [20, 40, 80])
def test_live_display_fits_narrow_terminals(width: int) -> None:
    console, _ = on("live", terminal=True, width=width)
    console._progress = HALF_WAY
    lines = console._rich.render_lines(console._render(), console._rich.options.update(width=width))
    assert max(sum(len(segment.text) for segment in line) for line in lines) <= width


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_tables_keep_their_numbers_on_narrow_terminals(width: int) -> None:
    console, stream = on("live", terminal=True, width=width)
    table = Table(box=None)
    for head in ("cell", *"abcdef"):
        table.add_column(head, no_wrap=True)
    table.add_row("a cell of a benchmark", *["12345.678"] * 4, "", "last")
    console.print(table)
    assert stream.getvalue().count("12345.678") == 4
    assert "last" in stream.getvalue()


def test_download_is_told_in_tenths() -> None:
    console, stream = on("lines")
    for done in range(0, 170_000_001, 1_000_000):
        console.download(done, 170_000_000)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[-1] == "downloaded 170 of 170 MB"


def test_download_bar() -> None:
    console, stream = on("live", terminal=True)
    console.download(17_000_000, 170_000_000)
    assert console._live is not None
    console._live.refresh()
    assert "17 of 170 MB" in stream.getvalue()
    console.download(170_000_000, 170_000_000)
    assert console._live is None


def test_auto_is_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for terminal, other in ((out, err), (err, out)):  # as with `2> log.txt`, and with `--json > result.json`
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr(other, "isatty", lambda: False)
        assert Console(stderr=terminal is err).verbosity == "live"
        assert Console(stderr=other is err).verbosity == "lines"
    monkeypatch.setenv("TERM", "dumb")
    assert Console(stderr=True).verbosity == "lines"


RECORDS: list[dict[str, Any]] = [
    {"kind": "train", "step": 100, "error": 0.8},
    {"kind": "warmup_end", "step": 150, "lr": 0.1},
    {"kind": "train", "step": 200, "error": 0.6},
    {"kind": "test", "step": 200, "error": 0.7},
]


def test_curves_are_drawn_in_both_formats(tmp_path: Path) -> None:
    paths = draw_curves(RECORDS, "ResNet20 <&> seed 0", tmp_path)
    assert {p.name for p in paths} == {"curves.png", "curves.svg"}
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = " ".join(ET.parse(tmp_path / "curves.svg").getroot().itertext())  # noqa: S314 (our own file)
    assert text
    before = (tmp_path / "curves.svg").read_bytes()
    draw_curves(RECORDS, "ResNet20 <&> seed 0", tmp_path)
    assert (tmp_path / "curves.svg").read_bytes() == before  # no dates, no random ids: equal runs, equal files


def test_curves_without_records_and_without_room(tmp_path: Path) -> None:
    draw_curves([], "empty", tmp_path)
    with pytest.raises(MachineError, match="cannot write"):
        draw_curves(RECORDS, "nowhere", tmp_path / "curves.png" / "below-a-file")


def test_time_left_never_falls_below_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = on("live", terminal=True)
    console.show(Progress(*vars(HALF_WAY).values()))
    monkeypatch.setattr("fastres.console.perf_counter", lambda: console._shown_at + 200)
    assert console._live is not None
    console._live.refresh()
    assert "6:00  0.0 s left" in stream.getvalue()
    console.close()


def test_a_notice_is_of_the_runs_it_came_before(tmp_path: Path) -> None:
    console, _ = on("lines")
    console.say("before the first")
    for name in ("first", "second"):
        console.attach(RunDir.create(tmp_path / name))
        console.attach()
    assert (tmp_path / "first/console.log").read_text() == "before the first\n"
    assert (tmp_path / "second/console.log").read_text() == ""


def test_training_is_shown_after_a_download() -> None:
    console, stream = on("live", terminal=True)
    console.download(170_000_000, 170_000_000)
    before = len(stream.getvalue())
    console.show(Progress(*vars(HALF_WAY).values()))
    assert console._live is not None
    console._live.refresh()
    console.close()
    assert "/2000" in stream.getvalue()[before:]
    assert "downloading" not in stream.getvalue()[before:]


def test_a_table_takes_the_display_down() -> None:
    console, _ = on("live", terminal=True)
    console.count(1, 3)
    assert console._live is not None
    console.print(Table())
    assert console._live is None
