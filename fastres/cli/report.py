"""`fastres report`: one HTML file about runs."""

from pathlib import Path
from typing import Annotated

import typer

from fastres.cli.flags import DataDir, given


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_OR_SWEEP...", help="Run folders, or folders of them.")],
    out: Annotated[
        Path | None, typer.Option(help="The file; default: report.html, in the folder given, if it is one.")
    ] = None,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Do not test the networks again: no classes, mistakes, responses.")
    ] = False,
    data_dir: DataDir = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0; to test the networks again.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads, likewise.")] = None,
) -> None:
    """Write one self-contained HTML file: results, curves, classes, mistakes, clocks, config, environment."""
    from fastres.console import Console
    from fastres.reproduce.report import write_report

    execution = given(device=device, data_dir=data_dir, threads=threads)
    print(write_report(runs, out, evaluate=not no_eval, execution=execution, say=Console("lines", stderr=True).say))
