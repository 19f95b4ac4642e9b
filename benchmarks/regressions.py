"""Is this commit slower than another one? Both run `test_speed.py` on this machine, in turns.

    scripts/bench-compare main~5
    scripts/bench-compare main~5 --rounds 10 -k "step or loader"

A round is base, here, base again: the two runs of the base show how far equal code differs on this machine today, and a
test counts as slower only where it differs by more. Each commit runs its own `test_speed.py`; tests that only one of
them has are left out. Exit code 6 where a test is slower.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastres.bench.report import LEAST_COMPARED, Comparison, compare

ROOT = Path(__file__).resolve().parent.parent
LEAST = 0.02  # differences below it are never called slower: 99 % intervals of a few rounds miss now and then

Medians = dict[str, float]  # seconds by test


def run_tests(tree: Path, words: str | None) -> Medians:
    """The tests of one commit's tree, each with its median."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "--benchmark-json"]
        command += [str(result), *(["-k", words] if words else [])]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(
                f"bench-compare: the benchmarks of {tree} fail:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return {test["name"]: test["stats"]["median"] for test in json.loads(result.read_text())["benchmarks"]}


def judge(rounds: Sequence[tuple[Medians, Medians, Medians]]) -> dict[str, tuple[float, Comparison]]:
    """The noise and the comparison of each test that both commits have.

    Args:
        rounds: (base, here, base again), each round measured in this order.
    """
    names = [name for name in rounds[0][0] if all(name in medians for turn in rounds for medians in turn)]
    found = {}
    for name in names:
        noise = max(abs(again[name] / base[name] - 1) for base, _, again in rounds)
        bases = [(base[name] + again[name]) / 2 for base, _, again in rounds]
        here = [medians[name] for _, medians, _ in rounds]
        found[name] = noise, compare(bases, here, paired=True, dead_band=max(LEAST, noise))
    return found


def table(found: Mapping[str, tuple[float, Comparison]]) -> Table:
    """A row a test."""
    result = Table(box=None, pad_edge=False)
    result.add_column("test")
    for head in ("time", "99 % interval", "noise", ""):
        result.add_column(head, justify="right", no_wrap=True)
    for name, (noise, c) in found.items():
        low, high = (f"{100 * (value - 1):+.1f}" for value in (c.low, c.high))
        result.add_row(
            Text(name), f"{100 * (c.ratio - 1):+.1f} %", f"{low} to {high} %", f"{100 * noise:.1f} %", c.verdict
        )
    return result


def main() -> None:
    """Compare the working tree with a commit."""
    parser = argparse.ArgumentParser(description="Speed of this tree against another commit, in turns")
    parser.add_argument("base", help="a commit")
    parser.add_argument("--rounds", type=int, default=LEAST_COMPARED, help=f"default and least {LEAST_COMPARED}")
    parser.add_argument("-k", dest="words", help="which tests, as pytest's -k")
    args = parser.parse_args()
    if args.rounds < LEAST_COMPARED:
        parser.error(f"--rounds is {args.rounds}; a 99 % interval needs {LEAST_COMPARED}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        added = subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), args.base],
            capture_output=True,
            text=True,
        )
        if added.returncode != 0:
            parser.error(f"{args.base}: {added.stderr.strip().splitlines()[-1]}")
        try:
            rounds = []
            for turn in range(args.rounds):
                print(f"round {turn + 1} of {args.rounds}", file=sys.stderr)
                rounds.append((run_tests(tree, args.words), run_tests(ROOT, args.words), run_tests(tree, args.words)))
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    found = judge(rounds)
    Console().print(table(found))
    if any(c.verdict == "slower" for _, c in found.values()):
        raise SystemExit(6)


if __name__ == "__main__":
    main()
