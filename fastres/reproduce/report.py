"""The report on runs: one HTML file that needs nothing else and asks nothing of the network.

It says of each run what its folder holds, and what its network answers on the test images where checkpoint and data
are at hand. Equal inputs give equal bytes: there is no date in it, and no chance.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fastres import __version__
from fastres.config import RunConfig
from fastres.console import percent
from fastres.errors import FastresError, InputError
from fastres.files import write_text
from fastres.plots.runs import Run, group_labels, grouped, mean_labels, once_a_seed, read_runs
from fastres.plots.series import mean_curve
from fastres.reproduce import sections, table6
from fastres.reproduce.answers import Answers, answers_of
from fastres.reproduce.markup import DASH, mark, note, number, page, section, table, text
from fastres.reproduce.networks import paper_name, recipe_notes, sentence
from fastres.reproduce.sections import Subject, as_percent, banners, training_time
from fastres.result import RunResult, result_of

MAX_BYTES = 1_000_000
TABLE_6, DETAILS, MISTAKES = "Table 6 of the paper", "Details", "Most confident mistakes"
MANY_RUNS = 8  # from here on, lines have fewer points
POINTS, FEWER_POINTS = 300, 100  # of a line at most
LEFT_OUT_BYTES = 1_000  # of what is said where runs have no section
MOST_SEEDS_APART = 7  # curves in one chart; of more, the means are drawn


def write_report(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    evaluate: bool = True,
    execution: dict[str, Any] | None = None,
    say: Callable[[str], None],
) -> Path:
    """Write the report on runs.

    Args:
        paths: Run folders, or folders of run folders.
        out: The file. Default: report.html, in the folder that was given, if it was one.
        evaluate: Test each run's newest checkpoint again, for what only the network knows: confusion, mistakes,
            layer responses.
        execution: Changes to `fastres.config.Execution` for that: device, where the data is.
        say: Takes one-line notices.

    Returns:
        The file that was written. It stays below 1 MB (up to some thousand runs): of many it leaves out sheets of
        mistakes first, then details, then sections, and says so.

    Raises:
        InputError: No run folder, or a config that cannot be read.
        MachineError: The file cannot be written.
    """
    if out is not None and out.suffix not in (".html", ".htm"):
        raise InputError(f"--out is {out}; give a name that ends in .html or .htm")
    common, runs = read_runs(paths, say)
    subjects = []
    for count, run in enumerate(runs, 1):
        if evaluate:
            say(f"testing {run.folder.path} ({count} of {len(runs)})")
        answers = _answers(run, execution or {}, say) if evaluate else "--no-eval was given."
        subjects.append(Subject(run, _result(run), answers))
    out = out or (paths[0] if len(paths) == 1 else Path()) / "report.html"
    write_text(out, render(common, subjects))
    return out


def _result(run: Run) -> RunResult | None:
    """None where there is none, or it is damaged: the report says so in that place."""
    try:
        return result_of(run.folder)
    except InputError:
        return None


def _answers(run: Run, execution: dict[str, Any], say: Callable[[str], None]) -> Answers | str:
    """The network's answers, or why there are none."""
    try:
        return answers_of(run.folder.path, execution, say)
    except FastresError as error:
        say(f"not tested again: {error}")
        return f"{error}."


def render(common: str, subjects: Sequence[Subject]) -> str:
    """The document. `common` is what the runs have in common, in words."""
    points = POINTS if len(subjects) < MANY_RUNS else FEWER_POINTS
    of_run = {id(subject.run): subject for subject in subjects}
    subjects = [of_run[id(run)] for group in grouped(subject.run for subject in subjects) for run in group]
    several = len(subjects) > 1

    def around(count: int, body: str) -> str:
        return _folded(subjects[count], count, body) if several else body

    # What must be there, then what is said of the runs, and pictures last.
    shells = [around(i, _left_out(DETAILS, s) + _left_out(MISTAKES, s)) for i, s in enumerate(subjects)]
    title, top = _top(common, subjects, points, len(subjects))
    bottom = f"<footer>fastres {text(__version__)}</footer>"
    sizes = list(accumulate(len(shell.encode()) for shell in shells))
    space = MAX_BYTES - len(page(title, top + bottom).encode())
    if sizes[-1] >= space:
        fitting = sum(size < space - LEFT_OUT_BYTES for size in sizes)
        title, top = _top(common, subjects, points, fitting)
        subjects, sizes = subjects[:fitting], [0, *sizes][: fitting + 1]
        space = MAX_BYTES - len(page(title, top + bottom).encode())
    room = space - sizes[-1]
    details: list[tuple[str, str]] = []
    for subject in subjects:
        before = sections.curves(subject, points) + sections.classes(subject)
        after = "".join(part(subject) for part in sections.AFTER_MISTAKES)
        fits, room = _take(before + after, room)
        details.append((before, after) if fits else (_left_out(DETAILS, subject), ""))
    bodies = []
    for i, (subject, (before, after)) in enumerate(zip(subjects, details, strict=True)):
        sheet = sections.mistakes(subject)
        fits, room = _take(sheet, room)
        bodies.append(around(i, before + (sheet if fits else _left_out(MISTAKES, subject)) + after))
    return page(title, top + "".join(bodies) + bottom)


def _top(common: str, subjects: Sequence[Subject], points: int, num_shown: int) -> tuple[str, str]:
    """Title, and what comes before the runs; `num_shown` of them have a section."""
    if len(subjects) == 1:
        title = sections.headline(subjects[0].run.config)
        top = _header(title, str(subjects[0].run.folder.path)) + banners(sections.warnings(subjects[0]))
        return title, top + sections.summary(subjects[0]) + _table6(subjects)
    title = f"{len(subjects)} runs" + (f": {common}" if common else "")
    everything = [warning for subject in subjects for warning in sections.caveats(subject)]
    top = _header(title, "") + banners(everything) + _overview(subjects, points, num_shown) + _table6(subjects)
    rest = len(subjects) - num_shown
    left = note(f"{rest} more are left out to keep this file below 1 MB: fastres report RUN for one") if rest else ""
    return title, f"{top}<h2>Run by run</h2>\n{left}"


def _take(part: str, room: int) -> tuple[bool, int]:
    """Whether a part fits, and the bytes left after it."""
    size = len(part.encode())
    return (True, room - size) if size < room else (False, room)


def _left_out(title: str, subject: Subject) -> str:
    words = f"Left out to keep this file below 1 MB; it is in: fastres report {subject.run.folder.path}"
    return section(title, note(words))


def _header(title: str, path: str) -> str:
    where = f'<p class="soft"><code>{text(path)}</code></p>' if path else ""
    return f"<header><h1>{text(title)}</h1>{where}</header>\n"


def _folded(subject: Subject, number_of: int, body: str) -> str:
    """A run among others: a line that opens."""
    run = subject.run
    said = run.standing or f"{subject.held_out} error {as_percent(subject.test_error)}"
    head = f'<summary><b>{text(run.label)}</b> <span class="soft">{text(said)}</span></summary>\n'
    path = f'<p class="soft"><code>{text(run.folder.path)}</code></p>'
    marks = banners(sections.warnings(subject))
    return f'<details id="run-{number_of}">{head}{path}{marks}{sections.summary(subject)}{body}</details>\n'


def _overview(subjects: Sequence[Subject], points: int, num_shown: int) -> str:
    """A table of the runs, the first `num_shown` linked to their sections; means over seeds; curves in one chart."""
    by_run = {id(subject.run): (i, subject) for i, subject in enumerate(subjects)}
    groups = grouped(subject.run for subject in subjects)
    rows: list[list[str]] = []
    means: list[int] = []
    for group, label in zip(groups, group_labels(groups), strict=True):
        rows += [_row(*by_run[id(run)], num_shown) for run in group]
        finished = [by_run[id(run)][1].result for run in once_a_seed(group) if run.finished]
        if len(finished) > 1:
            means.append(len(rows))
            rows.append(_mean_row(finished, f"{label}, mean of {len(finished)}"))
    head = ("run", "test error", "best (no result)", "training error", "parameters", "steps", "training", "img/s")
    if any(subject.held_out == "validation" for subject in subjects):
        head = (head[0], "test or validation error", *head[2:])
    shown = table(head, rows, range(1, len(head)), means)
    said = note(
        "Test error is the last step's; \N{PLUS-MINUS SIGN} is the standard deviation (n - 1) over finished seeds."
    )
    curves = [run.curve() for group in groups for run in group]
    if len(curves) > MOST_SEEDS_APART:
        groups = [once_a_seed(group) for group in groups]
        named = zip(groups, mean_labels(groups), strict=True)
        curves = [mean_curve([run.curve() for run in group], label) for group, label in named]
    chart = sections.error_chart([curve for curve in curves if curve.lines], f"{len(curves)} curves", points)
    return section("Results", shown + said) + section("Curves", chart)


def _table6(subjects: Sequence[Subject]) -> str:
    """The paper's Table 6 as far as these runs go, with what they did otherwise than the paper."""
    rows, notes, configs = list[table6.Row](), list[str](), list[tuple[str, RunConfig]]()
    runs = [subject.run for subject in subjects]
    for name, group in _by_variant(runs):
        try:
            (row,) = table6.rows_of([run.folder for run in group])
        except FastresError as error:
            notes.append(f"No row: {error}.")
            continue
        rows.append(replace(row, network=name))
        configs.append((name, group[0].config))
    notes += map(sentence, recipe_notes(configs))
    shown = [[text(cell) for cell in table6.cells(row)] for row in rows]
    body = table(table6.heads(rows), shown, (1, 2, 3, 4, 5, 6, 7, 9, 10)) + note(table6.LEGEND) if rows else ""
    return section(TABLE_6, "".join(map(mark, notes)) + body)


def _by_variant(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs of one config, with the network's name, plain nets last; of several configs of a network what differs."""
    networks: dict[tuple[str, int], list[list[Run]]] = {}
    for group in grouped(runs):
        model = group[0].config.model
        networks.setdefault((model.arch, model.depth), []).append(group)
    found = []
    for (arch, depth), groups in sorted(networks.items(), key=lambda item: (item[0][0] == "plain", item[0][1])):
        name = paper_name(arch, depth)
        labels = group_labels(groups) if len(groups) > 1 else [""]
        found += [(", ".join(filter(None, (name, label))), group) for label, group in zip(labels, groups, strict=True)]
    return found


def _row(count: int, subject: Subject, num_shown: int) -> list[str]:
    run, result = subject.run, subject.result
    name = f'<a href="#run-{count}">{text(run.label)}</a>' if count < num_shown else text(run.label)
    if run.standing:
        name += f' <span class="soft">{text(run.standing)}</span>'
    error = as_percent(subject.test_error)
    steps = number(run.config.recipe.steps)
    if result is None:
        so_far = error if error == DASH else f'<span class="soft">so far {text(error)}</span>'
        return [name, so_far, as_percent(subject.best[0]), DASH, DASH, steps, DASH, DASH]
    return [
        name,
        error,
        percent(result.best_test_error),
        percent(result.train_error),
        number(result.num_parameters),
        steps,
        training_time(result),
        number(result.images_per_second),
    ]


def _mean_row(results: Sequence[RunResult | None], label: str) -> list[str]:
    """Dashes where one of the results is damaged."""
    whole = [result for result in results if result]
    errors = zip(*((one.test_error, one.best_test_error, one.train_error) for one in whole), strict=True)
    shown = [DASH] * 3 if len(whole) < len(results) else map(_mean, errors)
    return [text(label), *shown, "", "", "", ""]


def _mean(errors: Sequence[float]) -> str:
    """Mean and standard deviation of fractions, in per cent."""
    return f"{100 * fmean(errors):.2f} \N{PLUS-MINUS SIGN} {100 * stdev(errors):.2f} %"
