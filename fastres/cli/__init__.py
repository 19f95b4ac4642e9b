"""The command line: one module a command, one call, an exit code. torch is imported only inside commands."""

import contextlib
import difflib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, NoReturn

import typer

from fastres import __version__
from fastres.cli.bench import bench
from fastres.cli.doctor import doctor
from fastres.cli.evaluate import evaluate
from fastres.cli.help import Command, Group, width
from fastres.cli.plot import plot
from fastres.cli.report import report
from fastres.cli.reproduce import reproduce
from fastres.cli.responses import responses
from fastres.cli.train import train
from fastres.errors import FastresError, InputError, MachineError, OutOfMemory, Stop, first_line, says_out_of_memory

app = typer.Typer(
    name="fastres",
    cls=Group,
    help="Train the CIFAR-10 ResNets and PlainNets of He et al. (CVPR 2016), fast and faithfully.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut flags at 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., int | None]] = {
    "train": train, "reproduce": reproduce, "eval": evaluate, "plot": plot, "report": report, "bench": bench,
    "doctor": doctor, "responses": responses,
}  # fmt: skip
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)
CLOSED_PIPE = 128 + 13  # SIGPIPE's, which Python ignores


def main() -> None:
    """Run the command line and exit with its code (`fastres.errors` lists them)."""
    for signum in (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):  # until a training loop puts its own
        if signal.getsignal(signum) == signal.SIG_DFL:  # else it is ignored
            signal.signal(signum, _stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the encoding of the terminal lacks
    try:
        code = run(sys.argv[1:])
        if sys.stdout is not None:  # as `>&-` leaves it
            sys.stdout.flush()
    except BrokenPipeError:  # as `fastres eval ... | head` ends
        code = CLOSED_PIPE
        _silence_stdout()
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _tell("fastres: no room on the disk for what is printed; free some, or print elsewhere")
        code = MachineError.exit_code
        _silence_stdout()
    sys.exit(code)


def _silence_stdout() -> None:
    """Point stdout, which takes nothing more, at nothing: Python flushes it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(text: str) -> None:
    """Say something on stderr, where somebody still reads it: a terminal may be closed, a disk full."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _stop(signum: int, _frame: FrameType | None) -> NoReturn:
    # Else a second one would find this process at its exit. Not SIG_IGN, which a training loop would heed.
    signal.signal(signum, lambda *_: None)
    raise Stop(f"stopped by {signal.Signals(signum).name}", signum)


def run(argv: list[str]) -> int:
    """Run one command and return its exit code. A bug's traceback is left to propagate."""
    debug, rest = "--debug" in argv, [_at_home(arg) for arg in argv if arg != "--debug"]
    try:
        for arg in argv:
            if not arg or re.fullmatch("--[^=]+=", arg):
                what = f" ({arg})" if arg else ""
                raise InputError(f"an argument is empty{what}; is a variable of the shell not set?")
        code = app(args=rest or ["--help"], prog_name="fastres", standalone_mode=False, terminal_width=width())
        if not rest:
            raise InputError("no command given (see fastres --help)")
    except (FastresError, typer.TyperException, RuntimeError, MemoryError, ImportError, OSError) as error:
        told = _told(error, rest)
        if told is None or (debug and not isinstance(error, typer.TyperException)):
            raise
        message, code = told
        _tell(f"fastres: {message}")
        return code
    except Stop as stop:
        _tell(f"fastres: {stop}")
        return 128 + stop.signum
    except SystemExit:  # typer's own end after EPIPE, for which it puts a wrapper around stdout
        if type(sys.stdout).__name__ != "PacifyFlushWrapper":
            raise
        code = CLOSED_PIPE
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:  # so typer returns where Ctrl-C came before there was a state to save
        _tell("fastres: stopped")
    return code if isinstance(code, int) else 0


def _told(error: Exception, rest: list[str]) -> tuple[str, int] | None:
    """What to say of an error of the command line `rest`, and its exit code; None: it is a bug."""
    if isinstance(error, FastresError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):  # usage: an unknown flag, a value of the wrong type
        command = " ".join(["fastres", *(word for word in rest[:1] if word in COMMANDS)])
        return f"{_usage(error)} (see {command} --help)", error.exit_code
    memory = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and says_out_of_memory(error))
    if memory:  # where no other batch size would help: a test, a benchmark's products
        return f"out of memory: {first_line(error)}; free some, or use another --device", OutOfMemory.exit_code
    is_broken = isinstance(error, ImportError) and (error.name or "").partition(".")[0] != "fastres"
    if is_broken or (isinstance(error, OSError) and "shared object file" in str(error)):  # which torch loads itself
        return f"a package does not work: {first_line(error)}; see fastres doctor", MachineError.exit_code
    # A path of the user's that may not be looked at, or is too long to be one.
    if isinstance(error, OSError) and error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
        return f"{str(error.filename)[:200]}: {error.strerror}", InputError.exit_code
    return None


def _at_home(arg: str) -> str:
    """A flag and its value in one word, as --data-dir=~/cifar: there bash leaves the ~ as it is."""
    flag, equals, value = arg.partition("=")
    if flag.startswith("--") and (value == "~" or value.startswith("~/")):
        return flag + equals + os.path.expanduser(value)  # noqa: PTH111 (it leaves what it cannot expand)
    return arg


def _usage(error: typer.TyperException) -> str:
    """A usage error in one line, with the nearest flag where one was misspelt."""
    message = error.format_message()
    possibilities = getattr(error, "possibilities", ())  # of an option that is none; other errors lack it
    if possibilities != () and (option := getattr(error, "option_name", None)):
        nearest = difflib.get_close_matches(option, possibilities or [], n=1, cutoff=0.7)
        message = f"no such option: {option}" + (f"; did you mean {nearest[0]}?" if nearest else "")
    return message.rstrip(".")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastres {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere on the line.")
    ] = False,
) -> None:
    """Options of every command. `--debug` is taken off the line by `run`; it stands here to be listed."""
