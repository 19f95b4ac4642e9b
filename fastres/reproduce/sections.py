"""What a report says of one run, section by section, as HTML. What comes out of a run folder is text, never markup."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastres.config import RunConfig
from fastres.configtree import is_number, leaves, show_key, show_value
from fastres.console import duration, percent
from fastres.plots.curves import changes_of_lr, time_unit
from fastres.plots.runs import Run
from fastres.plots.series import Curve, Line, held_out_names
from fastres.reproduce.answers import Answers, Mistake
from fastres.reproduce.charts import bars, line_chart, matrix, stacked
from fastres.reproduce.markup import DASH, keys, mark, note, number, section, stats, text
from fastres.reproduce.networks import on_images, sentence
from fastres.reproduce.paper import Difference, differences
from fastres.result import LEAST_SECONDS, PHASES, RunResult

WHERE_TIME_WENT = ("train", "evaluate", "compile", "data", "checkpoint", "import", "other")
DATASETS = {"cifar10": "CIFAR-10", "synthetic": "the built-in synthetic set"}


@dataclass(frozen=True)
class Subject:
    """A run with all that a report says of it. Its records are JSON out of the run folder: anything may be in them."""

    run: Run
    result: RunResult | None  # None: not finished, or damaged
    answers: Answers | str  # why there is none

    @property
    def held_out(self) -> str:
        """What the tested images are called."""
        return self.run.config.data.held_out

    @property
    def last_test(self) -> Mapping[str, Any]:
        """Its newest test record; {} before the first."""
        return next((r for r in reversed(self.run.records) if r.get("kind") == "test"), {})

    @property
    def test_error(self) -> object:
        """Of the last step, or so far; a fraction, or None."""
        return self.result.test_error if self.result else self.last_test.get("error")

    @property
    def best(self) -> tuple[object, object]:
        """The lowest test error over the steps, and its step; so far. (None, None) before the first."""
        if self.result:
            return self.result.best_test_error, self.result.best_step
        tests = [r for r in self.run.records if r.get("kind") == "test" and is_number(r.get("error"))]
        lowest = min(tests, key=lambda record: record["error"], default={})
        return lowest.get("error"), lowest.get("step")


def as_percent(value: object) -> str:
    """A fraction out of a JSON file as "8.75 %", or a dash."""
    return percent(float(value)) if is_number(value) else DASH


def warnings(subject: Subject) -> list[str]:
    """What nobody may overlook: what the numbers are not."""
    found = caveats(subject)
    if subject.run.finished and not subject.result:
        found.append("result.json is damaged: it lacks numbers that every result has.")
    if subject.run.standing:
        found.append(f"No result yet: {subject.run.standing}. Numbers are of the last evaluation so far.")
    return found


def caveats(subject: Subject) -> list[str]:
    """Of these, what is so of the images that were used."""
    return list(map(sentence, on_images(subject.run.config, subject.run.folder)))


def summary(subject: Subject) -> str:
    """The numbers that count; the last step's test error first."""
    run, result, held_out = subject.run, subject.result, subject.held_out
    best, best_step = subject.best
    at = number(subject.last_test.get("step"))
    recipe = run.config.recipe
    of_test = "last step: the number to report" if result else f"at step {at}, so far"
    of_best = f"step {number(best_step)}; chosen on the {held_out} set, so not the result"
    errors = [
        (f"{held_out} error".capitalize(), as_percent(subject.test_error), of_test),
        ("Best over steps", as_percent(best), of_best),
    ]
    steps = ("Steps", number(recipe.steps), f"of {recipe.batch_size}; {run.config.epochs:.1f} epochs")
    if result is None:
        return stats(value for value in (*errors, steps) if value[1] != DASH)
    step, together = result.step_milliseconds, result.side_by_side
    return stats(
        [
            *errors,
            ("Training error", percent(result.train_error), "running, augmented images"),
            ("Parameters", number(result.num_parameters), run.config.name),
            steps,
            ("Training time", training_time(result), "training clock alone"),
            (
                "Images per second",
                number(result.images_per_second),
                f"one of {together} runs side by side" if together != 1 else "training clock alone",
            ),
            (
                "Step time",
                number(step.get("p50"), ".3g", " ms"),
                f"p99: {number(step.get('p99'), '.3g', ' ms')}",
            ),
            ("Peak memory", f"{result.peak_memory / 1e9:.2f} GB", "held at once"),
        ]
    )


def training_time(result: RunResult) -> str:
    """Of the training clock, as 3:07; a dash where that was not recorded."""
    return duration(result.seconds["train"]) if "train" in result.seconds else DASH


def error_chart(curves: list[Curve], what: str, points: int = 300) -> str:
    """Training and test error over steps."""
    smoothed = any(line.smoothed and line.low is None for curve in curves for line in curve.lines)
    key = [
        ("thin", "training error, running over augmented images"),
        ("bold", f"{held_out_names(curve.held_out for curve in curves)} error"),
    ]
    if smoothed:
        key.append(("pale", "as logged, where a smoothed line stands in front of it"))
    if any(line.low is not None for curve in curves for line in curve.lines):
        key.append(("box band", "band: one standard deviation over the seeds"))
    if len(curves) == 1 and (changes := changes_of_lr(curves[0])):
        key.append(("aside", changes))
    return line_chart(
        curves, x_label="steps", y_label="error, %", describe=f"Error over steps: {what}", key=key, points=points
    )


def curves(subject: Subject, points: int) -> str:
    """Error over steps, or why there is nothing to draw."""
    chart = error_chart([subject.run.curve()], subject.run.label, points)
    return section("Curves", chart or note("Nothing was logged yet."))


def classes(subject: Subject) -> str:
    """Error by class, and which class was taken for which."""
    answers = subject.answers
    if isinstance(answers, str):
        return section("By class", note(f"Not tested again: {answers}"))
    evaluation = answers.evaluation
    marks = banners(map(sentence, answers.caveats))
    again = f"Tested again for this report, from the checkpoint of step {number(answers.step)}: "
    found = f"{percent(evaluation.error)} of {evaluation.num_images:,} images wrong, loss {evaluation.loss:.4f}."
    by_class = zip(answers.class_names, evaluation.class_errors, strict=True)
    rows = [(name, error, percent(error)) for name, error in by_class if error is not None]
    left = f"<div><h3>Error by class</h3>{bars(rows)}</div>"
    shown = matrix(evaluation.confusion, answers.class_names)
    right = f"<div><h3>Confusion matrix: true class (rows), prediction (columns)</h3>{shown}</div>"
    return section("By class", f'{marks}{note(again + found)}<div class="pair uneven">{left}{right}</div>')


def mistakes(subject: Subject) -> str:
    """The most confident mistakes, as pictures."""
    if isinstance(subject.answers, str):
        return ""
    sheet = "".join(map(_mistake, subject.answers.mistakes))
    said = note("The wrong answers that the network was surest of, and the probability that it gave them.")
    return section("Most confident mistakes", f'{said}<div class="sheet">{sheet}</div>' if sheet else "")


def _mistake(one: Mistake) -> str:
    sure = percent(one.probability).replace(" ", "&nbsp;")
    return (
        f'<figure><img src="{one.image}" width="32" height="32" alt="test image {one.index}, {text(one.true)}">'
        f"<figcaption><b>{text(one.answer)}</b> {sure}<br>is {text(one.true)}</figcaption>"
        "</figure>\n"
    )


def responses(subject: Subject) -> str:
    """The spread of each layer's output, as in the paper's Figure 7."""
    if isinstance(subject.answers, str):
        return ""
    stds = subject.answers.responses
    said = note(
        "Standard deviation of the output of each 3x3 layer, after batch norm and before ReLU or addition, "
        f"over the {subject.held_out} images (the paper's Figure 7)."
    )
    charts = [
        f"<div><h3>{title}</h3>{_response_chart(values, label)}</div>"
        for title, label, values in (
            ("In the order of the layers", "layer", stds),
            ("Sorted", "rank", sorted(stds, reverse=True)),
        )
    ]
    marks = banners(map(sentence, subject.answers.caveats))
    return section("Layer responses", f'{marks}{said}<div class="pair">{"".join(charts)}</div>')


def _response_chart(stds: list[float], label: str) -> str:
    x, y = np.arange(1, len(stds) + 1, dtype=np.float64), np.array(stds, np.float64)
    curve = Curve("", None, Line(x, x, y, y))
    return line_chart([curve], x_label=label, y_label="std", describe=f"Layer responses by {label}", small=True)


def clocks(subject: Subject) -> str:
    """Where the seconds went."""
    seconds = subject.result.seconds if subject.result else {}
    order = [name for name in WHERE_TIME_WENT if name in seconds] + [n for n in seconds if n not in WHERE_TIME_WENT]
    shown = [name for name in order if seconds[name] >= LEAST_SECONDS]
    rows = [(PHASES.get(name, name), seconds[name], duration(seconds[name])) for name in shown]
    if not rows:
        trained = [r["clock"].get("train") for r in subject.run.records if isinstance(r.get("clock"), dict)]
        so_far = max((float(t) for t in trained if is_number(t)), default=0.0)
        unit, size = time_unit(so_far)
        return section("Where the time went", note(f"No result yet; {so_far / size:.1f} {unit} of training so far."))
    total = note(f"{duration(sum(seconds.values()))} in all, of every process that worked on the run.")
    return section("Where the time went", total + stacked(rows))


def configuration(subject: Subject) -> str:
    """What was computed, with the paper's value where it differs, and how it ran."""
    config = subject.run.config
    others = {difference.path: _remark(difference) for difference in differences(config)}
    others |= dict.fromkeys(config.idle_keys(), "without effect here")
    tree = config.to_dict()
    what = _shown(leaves(config.experiment()), others)
    how = _shown(leaves(tree["execution"]) | leaves(tree["output"]))
    left = f"<div><h3>What is computed</h3>{keys([*what, ('digest', config.digest, 'of all this')])}</div>"
    return section(
        "Configuration", f'<div class="pair">{left}<div><h3>How it runs, what is kept</h3>{keys(how)}</div></div>'
    )


def _shown(values: Mapping[str, Any], remarks: Mapping[str, str] | None = None) -> list[tuple[str, str, str]]:
    """Lines for `keys`; remarks by path."""
    return [(show_key(path), show_value(path, value), (remarks or {}).get(path, "")) for path, value in values.items()]


def _remark(difference: Difference) -> str:
    default = show_value(difference.path, difference.default)
    if difference.is_open:
        return f"our default: {default}; the paper leaves it open"
    return f"the paper's recipe: {default}"


def environment(subject: Subject) -> str:
    """The data, the machine, the versions."""
    folder = subject.run.folder
    first, *resumed = folder.environments() or [{}]
    if not first:
        return section("Data and environment", note("environment.json is missing or cannot be read."))
    yes_no = {True: "yes", False: "no"}  # of facts, where switches are on or off
    data = _shown({key: yes_no[v] if isinstance(v, bool) else v for key, v in folder.data().items() if v is not None})
    machine = _shown(_of_machine(first))
    for one in resumed:
        changed = {key: value for key, value in _of_machine(one).items() if value != first.get(key)}
        said = ", ".join(f"{name} {value}" for name, value, _ in _shown(changed))
        machine.append(("resumed", f"at step {number(one.get('step'))}", said))
    left = f"<div><h3>Data</h3>{keys(data) if data else note('Not recorded.')}</div>"
    return section(
        "Data and environment", f'<div class="pair">{left}<div><h3>Environment</h3>{keys(machine)}</div></div>'
    )


def _of_machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What an environment has beside the data set, as far as it is known."""
    return {k: v for k, v in environment.items() if k not in ("data", "resumed", "step") and v is not None}


AFTER_MISTAKES: tuple[Callable[[Subject], str], ...] = (responses, clocks, configuration, environment)


def headline(config: RunConfig) -> str:
    """ "ResNet20 on CIFAR-10, seed 0"."""
    return f"{config.name} on {DATASETS[config.data.dataset]}, seed {config.seed}"


def banners(messages: Iterable[str]) -> str:
    """Each once."""
    return "".join(map(mark, dict.fromkeys(messages)))
