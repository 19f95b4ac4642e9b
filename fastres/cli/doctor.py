"""`fastres doctor`: what works on this machine, what does not, and what to type."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fastres.cli.flags import DataDir
from fastres.errors import MachineError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fastres.machine.doctor import Examination

COLOURS = {"ok": "green", "note": "yellow", "error": "bold red"}


def doctor(
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> int:
    """Check what works on this machine.

    GPU, driver, torch, compiler, DALI, data and disk; with what to do about what does not work.
    """
    from rich.console import Console

    from fastres.machine.doctor import examine

    found = examine(data_dir)
    if as_json:
        print(json.dumps(found.to_dict()))
    elif sys.stdout is not None and sys.stdout.isatty():
        Console(highlight=False).print(table(found))
    else:
        print(plain(found))
    return 0 if found.possible else MachineError.exit_code


def table(found: "Examination") -> "RenderableType":
    """For a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    rows.add_column(no_wrap=True)
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    for finding in found.findings:
        value = Text(finding.value)
        if finding.remedy:
            value.append(f"\n{finding.remedy}", style="cyan")
        rows.add_row(Text(finding.mark, style=COLOURS[finding.mark]), finding.what, value)
    verdict = Text(found.verdict, style="bold" if found.possible else COLOURS["error"])
    return Group(rows, "", verdict)


def plain(found: "Examination") -> str:
    """A line a finding, for files and pipes."""
    width = max(len(finding.what) for finding in found.findings)
    lines = []
    for finding in found.findings:
        lines.append(f"{finding.mark:<5}  {finding.what:<{width}}  {finding.value}")
        if finding.remedy:
            lines.append(f"{'':<5}  {'':<{width}}  -> {finding.remedy}")
    return "\n".join([*lines, found.verdict])
