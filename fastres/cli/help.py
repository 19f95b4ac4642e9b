"""How `--help` is laid out: plain text that fits the terminal, options under headings, commands before options."""

import re
import shutil
from collections.abc import Mapping
from functools import partial
from textwrap import wrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

WIDEST, NARROWEST = 120, 30  # columns
NARROW = 60  # columns; below, an option's help stands under it
Rows = list[tuple[str, str]]  # what to type, and what it does

EXAMPLES: dict[str, Rows] = {
    "fastres": [
        ("fastres doctor", "what works on this machine"),
        ("fastres train --preset smoke", "a first run: a minute, no data needed"),
        ("fastres train", "the paper's ResNet-20 on CIFAR-10"),
        ("fastres reproduce table6", "the paper's Table 6"),
    ],
    "train": [
        ("fastres train --preset smoke", "a minute, no data needed"),
        ("fastres train --preset fast --data-dir DIR", "ten epochs on the CIFAR-10 in DIR"),
        ("fastres train --depth 56 --seeds 5", "five runs of ResNet-56"),
        ("fastres train --resume RUN", "go on with a run that was stopped"),
    ],
    "reproduce": [
        ("fastres reproduce table6 --dry-run", "which runs it needs, and which are there"),
        ("fastres reproduce table6 --budget 60", "train for an hour; repeat to go on"),
        ("fastres reproduce fig6 --nets ResNet20,PlainNet20", "two networks alone"),
        ("fastres reproduce all --preset smoke", "everything in minutes, on built-in data"),
    ],
    "bench": [
        ("fastres bench", "a table in under three minutes"),
        ("fastres bench --depth 20,56 --compile both", "with and without torch.compile"),
        ("fastres bench --compare a.toml b.toml", "which of two configs is faster"),
        ("fastres bench --profile --depth 20", "the kernels that cost most"),
    ],
}


def panel(title: str) -> "partial[Any]":
    """`typer.Option` for the options under one heading."""
    return partial(typer.Option, rich_help_panel=title)


def width() -> int:
    """Columns of help text: those of the terminal less a margin. Of a pipe COLUMNS says how many, else they are 80."""
    return max(NARROWEST, min(shutil.get_terminal_size().columns, WIDEST)) - 2


class Command(TyperCommand):
    """A command whose options stand under the headings of their panels; without one, under "Options"."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write them."""
        _write(formatter, _options(self, ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 (typer's signature)
        """Write examples, where the command has some."""
        if examples := EXAMPLES.get(self.name or ""):
            _write(formatter, {"Examples": examples})


class Group(TyperGroup):
    """The command without a subcommand."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, each with its first sentence, then the options."""
        commands = [(name, command.get_short_help_str(1_000)) for name, command in self.commands.items()]
        _write(formatter, {"Commands": commands, **_options(self, ctx)})

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 (typer's signature)
        """Write examples, and where to read on."""
        _write(formatter, {"Examples": EXAMPLES["fastres"]})
        formatter.write("\nDocs: README.md, docs/fidelity.md\n")


def _options(command: TyperCommand | TyperGroup, ctx: Any) -> dict[str, Rows]:
    sections = dict[str, Rows]()
    for param in command.get_params(ctx):
        if record := param.get_help_record(ctx):
            heading = getattr(param, "rich_help_panel", None) or f"{param.param_type_name.title()}s"
            names = re.sub(r"--([\w-]+) / --no-\1", r"--[no-]\1", record[0])
            if heading == "Arguments":
                names = names.partition(" <")[0]  # without its type
            sections.setdefault(heading, []).append((names, record[1].replace("  [", " [")))
    return sections


def _write(formatter: Any, sections: Mapping[str, Rows]) -> None:
    """Write the sections in columns that line up; no line ends inside a flag."""
    longest = max(len(names) for rows in sections.values() for names, _ in rows)
    hanging = 6 if formatter.width < NARROW else longest + 4
    for heading, rows in sections.items():
        with formatter.section(heading):
            for names, text in rows:
                head = f"  {names}\n{'':6}" if formatter.width < NARROW else f"  {names:<{longest}}  "
                held = re.sub(r"\[(default|paper): ", "[\\1:\0", text)  # together with what the default is
                lines = wrap(held, formatter.width - hanging, break_on_hyphens=False, break_long_words=False)
                formatter.write(head + f"\n{'':{hanging}}".join(lines).replace("\0", " ") + "\n")
