"""The pieces of a self-contained HTML page: escaped text, tables, the shell around them, and how it looks."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fastres.configtree import is_number
from fastres.files import printable

# Nothing may be loaded and nothing may run, whatever a run folder holds: images are data URIs, styles are in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
DASH = "\N{EN DASH}"  # in the place of a number that there is not


def page(title: str, body: str) -> str:
    """A whole document. `body` is HTML, `title` is text."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Text as HTML: nothing in it is markup."""
    return escape(printable(str(value)))


def section(title: str, body: str) -> str:
    """A heading and what is under it; nothing where there is nothing."""
    return f"<section>\n<h2>{text(title)}</h2>\n{body}\n</section>\n" if body else ""


def mark(message: str) -> str:
    """A line that nobody may overlook."""
    return f'<p class="mark" role="note">{text(message)}</p>\n'


def note(message: str) -> str:
    """A line of small print."""
    return f'<p class="note">{text(message)}</p>\n'


def stats(values: Iterable[tuple[str, str, str]]) -> str:
    """Numbers that count, the first of them largest: (name, value, what it is of)."""
    cells = []
    for n, (name, value, of) in enumerate(values):
        small = f'<span class="of">{text(of)}</span>' if of else ""
        first = ' class="first"' if n == 0 else ""
        cells.append(f"<div{first}><dt>{text(name)}</dt><dd>{text(value)}</dd>{small}</div>")
    return f'<dl class="stats">{"".join(cells)}</dl>\n'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int], means: Iterable[int] = ()) -> str:
    """A table in a box that scrolls sideways by itself.

    Args:
        head: Texts.
        rows: Cells, HTML.
        numbers: Columns that hold numbers, set right.
        means: Rows that sum up those before them.
    """
    right, bold = set(numbers), set(means)

    def line(cells: Iterable[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if i in right else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))

    body = "\n".join(f"<tr{' class=mean' if n in bold else ''}>{line(row, 'td')}</tr>" for n, row in enumerate(rows))
    return (
        f'<div class="scroll"><table class="wide"><thead><tr>{line(map(text, head), "th")}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def keys(values: Iterable[tuple[str, object, str]]) -> str:
    """Names and values: (name, value, a remark on it)."""
    rows = "".join(
        f"<tr><th scope=row>{text(name)}</th><td>{text(value)}"
        + (f'<span class="of">{text(remark)}</span>' if remark else "")
        + "</td></tr>\n"
        for name, value, remark in values
    )
    return f'<table class="keys wide"><tbody>{rows}</tbody></table>\n'


def number(value: object, form: str = ",.0f", unit: str = "") -> str:
    """A number out of a JSON file, or a dash where it is none."""
    return f"{value:{form}}{unit}" if is_number(value) else DASH
