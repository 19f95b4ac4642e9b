"""`fastres report`: one HTML file about runs."""

from pathlib import Path
from typing import Annotated

import typer

from fastres.cli.flags import THREADS, DataDir, Device, given
from fastres.errors import InputError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, or folders of run folders.")],
    out: Annotated[
        Path | None, typer.Option(help="File. [default: report.html, in the folder given, or here where several are]")
    ] = None,
    no_eval: Annotated[
        bool,
        typer.Option("--no-eval", help="Test no network again; leave out classes, mistakes, responses."),
    ] = False,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(help=f"{THREADS} [default: 0]")] = None,
) -> None:
    """Write a self-contained HTML file about runs. Results, curves, classes, mistakes, clocks, config, environment."""
    from fastres.console import Console
    from fastres.reproduce.report import write_report

    execution = given(device=device, data_dir=data_dir, threads=threads)
    if no_eval and (device != "auto" or threads or data_dir):
        raise InputError("--device, --threads and --data-dir do nothing with --no-eval; leave them out")
    print(write_report(runs, out, evaluate=not no_eval, execution=execution, say=Console("lines", stderr=True).say))
