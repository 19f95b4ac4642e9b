"""What a person sees of a run: notices, one live display on a terminal or plain lines elsewhere, and the summary."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, TextIO, get_args

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import SegmentLines
from rich.table import Table
from rich.text import Text

from fastres.errors import InputError
from fastres.rundir import RunDir

Verbosity = Literal["auto", "live", "lines", "quiet"]
REFRESHES_PER_SECOND = 4
NO_TERMINAL_WIDTH = 120  # columns of a table that goes to a file or a pipe
LEAST_TABLE_WIDTH = 80  # columns that a table's numbers need


@dataclass
class Progress:
    """Where a run stands. Errors are fractions; `None` is not known yet."""

    step: int
    steps: int
    steps_per_epoch: float  # training images over batch size
    loss: float | None = None
    train_error: float | None = None
    test_error: float | None = None
    lr: float | None = None
    images_per_second: float | None = None
    elapsed: float = 0.0  # seconds
    remaining: float | None = None  # seconds
    runs: int = 1  # side by side; loss and errors are means over them, images a second their sum
    held_out: str = "test"  # what the network is tested on: "test" or "validation" images

    @property
    def epochs(self) -> float:
        """Passes over the training images so far."""
        return self.step / self.steps_per_epoch

    def fields(self) -> list[str]:
        """What is known, as short texts in a fixed order."""
        known: list[tuple[str, float | None, Callable[[float], str]]] = [
            ("loss", self.loss, lambda v: f"{v:.4f}"),
            ("train err", self.train_error, percent),
            (f"{self.held_out} err", self.test_error, percent),
            ("lr", self.lr, lambda v: f"{v:.4g}"),
            ("img/s", self.images_per_second, lambda v: f"{v:,.0f}"),
        ]
        together = [f"{self.runs} runs, mean:"] if self.runs > 1 else []
        return [*together, *(f"{name} {show(value)}" for name, value, show in known if value is not None)]

    def line(self) -> str:
        """All of it in one line."""
        left = f", {duration(self.remaining)} left" if self.remaining else ""
        head = f"epoch {self.epochs:6.2f}  step {self.step:{len(str(self.steps))}d}/{self.steps}"
        return "  ".join([head, *self.fields(), f"{duration(self.elapsed)}{left}"])


class _Stream(RichConsole):
    """Falls silent where nobody reads any more (`fastres train | head`) or nothing more fits (`> file` on a full disk).

    That is no reason to lose a run, whose console.log goes on.
    """

    def __exit__(self, *how: object) -> None:
        """Here rich writes what a call has printed."""
        try:
            super().__exit__(*how)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Rich's own ends the program here."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Console:
    """Prints to a stream, and to the run folder's console.log once `attach`ed to it.

    Args:
        verbosity: "live" redraws one display, "lines" prints a line an epoch, "quiet" prints nothing but the log file's
            copy; "auto" is live on a terminal and lines elsewhere.
        stderr: Print there instead of stdout, which `--json` keeps for itself.
    """

    def __init__(self, verbosity: Verbosity = "auto", *, stderr: bool = False) -> None:
        if verbosity not in get_args(Verbosity):
            raise InputError(f"verbosity is {verbosity!r}; use {', '.join(get_args(Verbosity))}")
        live = _interactive(sys.stderr if stderr else sys.stdout)
        self.verbosity = verbosity if verbosity != "auto" else "live" if live else "lines"
        self._rich: RichConsole = _Stream(file=sys.stderr if stderr else None, highlight=False, soft_wrap=True)
        self._runs: tuple[RunDir, ...] = ()
        self._early: list[str] = []  # said before there was a run folder
        self._once: set[str] = set()
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._shown_at = 0.0  # on the clock of perf_counter
        self._download: tuple[int, int] | None = None  # bytes done, bytes in all
        self._counted: tuple[int, int] | None = None
        self.overall: Callable[[int], str] | None = None  # of several runs: where all stands at a step of this one

    def attach(self, *runs: RunDir) -> None:
        """Copy every line to the runs' console.log from now on, what was said before included."""
        self._runs = runs
        for text in self._early:
            self._log(text)
        self._early.clear()

    def say(self, text: str, *of: RunDir) -> None:
        """A line that stays. With runs it is of them alone, and stands in no other's log."""
        for run in of:
            run.say(text)
        if not of:
            self._keep(text)
        if self.verbosity != "quiet":
            self._rich.print(Text(text))

    def say_once(self, text: str) -> None:
        """A line that is the same for every run of several: it is printed once, and stands in each one's log."""
        if text in self._once:
            if self._runs or text not in self._early:
                self._keep(text)
        else:
            self._once.add(text)
            self.say(text)

    def print(self, renderable: RenderableType) -> None:
        """A table or the like. A narrow terminal folds its lines itself: rich would cut the numbers instead."""
        self.close()
        width = max(self._rich.width, LEAST_TABLE_WIDTH) if self._rich.is_terminal else NO_TERMINAL_WIDTH
        if self.verbosity != "quiet":
            lines = self._rich.render_lines(renderable, self._rich.options.update_width(width), pad=False)
            self._rich.print(SegmentLines(lines, new_lines=True), soft_wrap=False, crop=False, end="")

    def count(self, done: int, total: int) -> None:
        """How much of something is done: a bar on a terminal, nothing elsewhere."""
        if self.verbosity == "live":
            self._counted = (done, total)
            self._start_live()

    def show(self, progress: Progress, *, line: bool = False) -> None:
        """Where the run stands now. With `line` (an epoch ended) it is logged, and printed unless live."""
        self._progress, self._shown_at = progress, perf_counter()
        if line:
            self._log(progress.line())
        if self.verbosity == "live":
            self._start_live()
        elif line and self.verbosity == "lines":
            self._rich.print(Text("  ".join([progress.line(), *self._overall(progress.step)])))

    def tick(self, step: int) -> None:
        """The host is at `step`. A plain assignment: the live display's own thread draws it."""
        if self._progress:
            self._progress.step = step

    def download(self, done: int, total: int) -> None:
        """Bytes of the data set that have arrived."""
        tenth = 10 * done // max(total, 1)
        before = 10 * self._download[0] // max(total, 1) if self._download else -1
        self._download = (done, total)
        if self.verbosity == "live":
            self._start_live()
        elif self.verbosity == "lines" and tenth != before:
            self._rich.print(f"downloaded {done / 1e6:.0f} of {total / 1e6:.0f} MB")
        if done >= total:
            self.close()
            self._download = None

    def close(self) -> None:
        """Take the live display down, so that what follows is printed below it."""
        if self._live:
            self._live.stop()
            self._live = None

    def _keep(self, text: str) -> None:
        """In the log, also of runs that are yet to come."""
        if self._runs:
            self._log(text)
        else:
            self._early.append(text)

    def _log(self, text: str) -> None:
        for run in self._runs:
            run.say(text)

    def _start_live(self) -> None:
        if self._live is None:
            self._live = Live(
                console=self._rich,
                get_renderable=self._render,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
            )
            self._live.start()

    def _render(self) -> RenderableType:
        if self._download:
            done, total = self._download
            return _bar(done, total, f"downloading CIFAR-10  {done / 1e6:.0f} of {total / 1e6:.0f} MB")
        if self._counted:
            return _bar(*self._counted, f"round {self._counted[0] + 1} of {self._counted[1]}")
        if not self._progress:
            return Text("")
        p, since = self._progress, perf_counter() - self._shown_at
        left = "" if p.remaining is None else f"  {duration(max(p.remaining - since, 0.0))} left"
        head = f"step {p.step}/{p.steps}  epoch {p.epochs:.2f}  {duration(p.elapsed + since)}{left}"
        fields = Text("  ".join(p.fields()), style="cyan", overflow="fold")
        return Group(_bar(p.step, p.steps, head), fields, *map(Text, self._overall(p.step)))

    def _overall(self, step: int) -> list[str]:
        return [self.overall(step)] if self.overall else []


def _bar(done: int, total: int, text: str) -> Table:
    row = Table.grid(padding=(0, 1), expand=False)
    row.add_row(ProgressBar(total=max(total, 1), completed=done, width=24), Text(text, overflow="fold"))
    return row


def percent(fraction: float) -> str:
    """0.0875 as "8.75 %"."""
    return f"{100 * fraction:.2f} %"


def duration(seconds: float) -> str:
    """Seconds as 4.2 s, 3:07 or 19:05:00."""
    if seconds < 59.95:  # else it would be 60.0 s
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _interactive(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that a live display can be drawn on."""
    isatty = getattr(stream, "isatty", None)  # a program's own stream may have only `write`
    return isatty is not None and isatty() and os.environ.get("TERM") != "dumb"
