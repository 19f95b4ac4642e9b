"""`fastres plot`: curves of runs."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastres.cli.flags import one_of
from fastres.errors import InputError

if TYPE_CHECKING:
    from fastres.plots.series import What, XAxis

MOST = 1e9  # of an axis

X_AXES: tuple["XAxis", ...] = ("step", "epoch", "time")
QUANTITIES: tuple["What", ...] = ("error", "loss", "lr")


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, or folders of run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File, .png or .svg. [default: curves.png, or by what is drawn instead, as loss.png; in the folder "
            "given, or here where several are]"
        ),
    ] = None,
    what: Annotated[str, typer.Option(help="What to draw: error, loss or lr.")] = "error",
    x: Annotated[str, typer.Option(help="x axis: step, epoch, or time (spent on training).")] = "step",
    smooth: Annotated[
        int | None,
        typer.Option(
            help="Logged points to average; 1: none. What was logged stays, pale. [default: a fortieth of the run]"
        ),
    ] = None,
    log_y: Annotated[bool, typer.Option("--log-y", help="Make the y axis logarithmic.")] = False,
    ylim: Annotated[str | None, typer.Option(help="Ends of the y axis: 0,20 as in the paper's Figure 6.")] = None,
    band: Annotated[
        bool, typer.Option("--band", help="Draw runs that differ only in the seed as mean and standard deviation.")
    ] = False,
) -> None:
    """Draw the curves of runs in one figure. Training error is thin, test error bold."""
    quantity, axis = one_of("--what", what, QUANTITIES), one_of("--x", x, X_AXES)
    if smooth is not None and smooth < 1:
        raise InputError(f"--smooth is {smooth}; it must be at least 1, the number of points to average")
    limits = None if ylim is None else parse_limits(ylim, log_y=log_y)
    from fastres.console import Console
    from fastres.plots.runs import plot_runs

    say = Console("lines", stderr=True).say
    print(plot_runs(runs, out, what=quantity, x=axis, smooth=smooth, log_y=log_y, ylim=limits, band=band, say=say))


def parse_limits(text: str, *, log_y: bool) -> tuple[float, float]:
    """ "0,20" as two numbers. Raises InputError."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not (-MOST < low < high < MOST):
        raise InputError(f"--ylim is {text!r}; write two rising numbers as 0,20")
    if log_y and low <= 0:
        raise InputError(f"--ylim is {text!r}; with --log-y both must be above 0, as 1,100")
    return low, high
