"""Tables of measured numbers, drawn from the files in `results/`: a GPU's in README.md, a CPU's in CPU.md beside them.

scripts/results-table           # write them
scripts/results-table --check   # say whether they are as the files have it; exit code 6 if not
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastres.bench.report import short

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {ROOT / "README.md": "gpu", ROOT / "benchmarks" / "CPU.md": "cpu"}
BLOCK = re.compile(r"(?<=<!-- results: drawn by scripts/results-table -->\n).*?(?=<!-- end of results -->)", re.DOTALL)

NARROWED = ("parameters", "best seed")  # columns that a page has no room for

Result = dict[str, Any]


def render(paths: Iterable[Path], kind: str, page: Path) -> str:
    """Results as Markdown, newest first: Table 6, throughput reports, and races against other scripts.

    Args:
        paths: Reports and races, and folders with a `table6.md` and the runs behind it.
        kind: "gpu" or "cpu": whose results.
        page: The file that they are for, which links to them.

    Raises:
        SystemExit: One is neither.
    """
    parts = []
    for path in sorted(paths, reverse=True):
        link = path.relative_to(page.parent).as_posix()
        try:
            env, drawn = _table6(path) if path.is_dir() else _file(path)
            if ("gpu" if env["gpu"] else "cpu") == kind:
                parts.append(f"{path.name[:10]}, {_machine(env)} ([{path.name}]({link}))\n\n{drawn}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise SystemExit(f"results-table: {link} is no result that can be drawn: {error!r}") from error
    return "\n" + "\n".join(parts) + "\n" if parts else "\nNothing is measured yet.\n\n"


def results() -> list[Path]:
    """What is drawn."""
    return [*RESULTS.glob("*.json"), *(table.parent for table in RESULTS.glob("*/table6.md"))]


def _table6(folder: Path) -> tuple[Result, str]:
    text = (folder / "table6.md").read_text(encoding="utf-8")
    env = json.loads(min(folder.glob("*/*/environment.json")).read_text(encoding="utf-8"))
    note = (
        "" if env["data"]["official"] else "Trained and tested on images that are not the official CIFAR-10 files:\n\n"
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    kept = [k for k, head in enumerate(rows[0]) if head not in NARROWED]
    return env, note + "".join(f"| {' | '.join(row[k] for k in kept)} |\n" for row in rows)


def _file(path: Path) -> tuple[Result, str]:
    result = json.loads(path.read_text(encoding="utf-8"))
    env = dict(result["environment"])
    if "cells" not in result:
        return env | {"compiled": env.get("compile", "none") != "none"}, _race(result)
    chosen = dict.fromkeys(cell["config"]["execution"]["precision"] for cell in result["cells"])  # as asked
    return env | ({"precision": " and ".join(chosen)} if len(chosen) > 1 else {}), _report(result)


def _machine(env: Result) -> str:
    driver = f", driver {env['driver']}" if env.get("driver") else ""
    commit = f", commit {short(env['commit'])}" if env.get("commit") else ""
    where = env["gpu"] or f"{env['cpu']}, {env['threads']} core{'s' * (env['threads'] > 1)}"
    compiled = ", compiled" if env.get("compiled") else ""  # of a race
    return f"{where}{driver}, torch {env['torch']}, {env['precision']}{compiled}{commit}"


def _report(report: Result) -> str:
    rows = [
        (
            cell["label"],
            f"{cell['images_per_second']:,.0f}",
            f"{1e3 * cell['step_seconds']['median']:.3g}",
            f"{1e3 * cell['step_seconds']['p5']:.3g} to {1e3 * cell['step_seconds']['p95']:.3g}",
            f"{cell['over_floor']:.2f}",
        )
        for cell in report["cells"]
    ]
    return _markdown(("cell", "img/s", "ms/step", "p5 to p95", "times the machine's floor"), rows)


def _race(race: Result) -> str:
    rows = []
    for name, rate in race["images_per_second"].items():
        ratio = race["ratios"].get(name)
        times = f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
        rows.append((name, f"{rate:,.0f}", times))
    depth = race.get("depth", 20)  # the first files had only one, and did not say it
    heads = (f"training loop, ResNet-{depth}, batch 128", "img/s", f"fastres against it ({race['rounds']} rounds)")
    return _markdown(heads, rows)


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description="Draw the tables of README.md and benchmarks/CPU.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 6 where they differ")
    check = parser.parse_args().check
    for page, kind in PAGES.items():
        before = page.read_text(encoding="utf-8")
        if not BLOCK.search(before):
            raise SystemExit(f"results-table: {page.name} has no place for the results")
        drawn = render(results(), kind, page)
        after = BLOCK.sub(lambda _, drawn=drawn: drawn, before)  # type: ignore[misc]
        if check and after != before:
            print(f"{page.name} does not show what is in benchmarks/results; type: scripts/results-table")
            raise SystemExit(6)
        if not check:
            page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
