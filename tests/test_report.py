"""reproduce/report.py and its parts: one file that needs nothing, says what run folders hold, and trusts none of it."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastres
from fastres.cli import run as command
from fastres.data import synthetic
from fastres.errors import MachineError
from fastres.evaluator import Evaluation
from fastres.plots.runs import read_runs
from fastres.plots.series import Curve, Line, curve_of
from fastres.reproduce import markup, report, sections
from fastres.reproduce.answers import NUM_MISTAKES, Answers, Mistake, answers_of, png
from fastres.reproduce.charts import line_chart, ticks
from fastres.reproduce.report import MAX_BYTES, render, write_report
from fastres.reproduce.sections import Subject
from fastres.result import result_of
from fastres.rundir import ENVIRONMENT, RESULT, RunDir
from tests.runs import tiny

CPU = {"device": "cpu", "threads": 1}
VOID = {"meta", "br", "img"}
EVIL = '<script>alert("1")</script><img src=x onerror=alert(1)>'


class Document(HTMLParser):
    """What a browser would make of a page: tags that do not nest, ids, addresses, text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def check(document: Document) -> Document:
    """What holds of every report."""
    assert document.wrong == []
    assert document.open == []
    assert len(document.source.encode()) < MAX_BYTES
    ids = document.all("id")
    assert len(ids) == len(set(ids))
    for address in document.all("href"):
        assert address.startswith("#")
        assert address[1:] in ids
    assert all(address.startswith("data:image/png;base64,") for address in document.all("src"))
    assert not {tag for tag, _ in document.tags} & {"script", "link", "iframe", "object", "form"}
    assert not [name for _, attrs in document.tags for name in attrs if name.startswith("on")]
    assert "url(" not in document.source
    assert "@import" not in document.source
    (policy,) = [attrs["content"] for _, attrs in document.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    return document


def reported(*paths: Path, evaluate: bool = False) -> Document:
    out = paths[0] / "out.html"
    write_report(paths, out, evaluate=evaluate, execution=CPU, say=lambda _: None)
    return check(Document(out.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "run"
    fastres.train(tiny(out), verbosity="quiet")
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def tested(trained: Path) -> Answers:
    return answers_of(trained, CPU, lambda _: None)


def changed(run: Path, name: str, **values: Any) -> None:
    tree = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps(tree | values))


def as_cifar10(run: Path, **data: Any) -> None:
    """The run says of itself that it was trained on CIFAR-10."""
    tree = json.loads((run / "config.json").read_text())
    tree["data"]["dataset"] = "cifar10"
    tree["data"] |= data
    (run / "config.json").write_text(json.dumps(tree))


# --- one run


def test_a_run_with_everything(run: Path) -> None:
    document = reported(run, evaluate=True)
    result = json.loads((run / RESULT).read_text())
    text = document.text
    assert "ResNet8 on the built-in synthetic set, seed 0" in text
    assert text.index(f"{100 * result['test_error']:.2f} %") < text.index("chosen on the test set")
    assert f"{result['num_parameters']:,}" in text
    for title in ("Curves", "By class", "Most confident", "Layer responses", "Where the time", "Configuration", "Data"):
        assert title in text
    assert document.count("img") == NUM_MISTAKES
    assert document.count("svg") == 3
    assert "Synthetic data: not a result of the paper." in text
    assert "Not the paper's recipe: depth" not in text  # any depth is the paper's, if its recipe is
    assert re.search(r"Not the paper's recipe: [^.]*steps 64,000 -> 24", text)


def test_what_the_network_says_is_what_training_said(run: Path, tested: Answers) -> None:
    result = json.loads((run / RESULT).read_text())
    assert tested.evaluation.error == result["test_error"]
    assert tested.evaluation.loss == pytest.approx(result["test_loss"], rel=1e-6)
    assert tested.evaluation.class_errors == result["class_errors"]
    assert tested.step == 24
    assert len(tested.responses) == 7


def test_the_sheet_shows_the_surest_wrong_answers(tested: Answers) -> None:
    images = synthetic.make_synthetic()
    shown = tested.mistakes
    assert len(shown) == NUM_MISTAKES
    assert [one.probability for one in shown] == sorted((one.probability for one in shown), reverse=True)
    for one in shown:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(one.image.partition(",")[2]))))
        np.testing.assert_array_equal(pixels, images.test_images[one.index])
        assert one.true == images.class_names[images.test_labels[one.index]] != one.answer
        assert 0.1 <= one.probability <= 1


def test_png_is_read_as_it_was_written() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(image)))), image)


def test_equal_runs_give_equal_bytes(run: Path) -> None:
    assert reported(run, evaluate=True).source == reported(run, evaluate=True).source


def test_a_run_whose_name_is_no_utf8(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "bad\udcff")
    assert command(["report", str(tmp_path / "bad\udcff"), "--no-eval", "--out", str(tmp_path / "report.html")]) == 0
    assert r"bad\udcff" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_without_evaluation_nothing_is_tested(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "answers_of", lambda *_: pytest.fail("tested"))
    document = reported(run)
    assert "Not tested again: --no-eval was given." in document.text
    assert document.count("img") == 0


def test_without_checkpoint_or_data_the_rest_is_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_data(*_: object, **__: object) -> None:
        raise MachineError("CIFAR-10 is nowhere & no network")

    with monkeypatch.context() as patch:
        patch.setattr("fastres.evaluate.load_images", no_data)
        document = reported(run, evaluate=True)
    assert "Not tested again: CIFAR-10 is nowhere & no network." in document.text
    for path in run.glob("checkpoint*"):
        path.unlink()
    document = reported(run, evaluate=True)
    assert re.search(r"Not tested again: \S+ has no checkpoint any more; its result is in", document.text)
    for title in ("Curves", "Where the time went", "Configuration"):
        assert title in document.text


def test_what_the_data_were_is_on_the_face(run: Path) -> None:
    official = "The data set is not the official CIFAR-10 files."
    as_cifar10(run)
    changed(run, ENVIRONMENT, data={"name": "cifar10", "digest": "sha256:123abc", "official": False})
    text = reported(run).text
    assert official in text
    assert "digest sha256:123abc" in text
    assert "Synthetic" not in text
    changed(run, ENVIRONMENT, data={"name": "cifar10", "digest": "sha256:123abc", "official": True})
    assert official not in reported(run).text
    as_cifar10(run, val_split=True)
    text = reported(run).text
    assert "Trained on 45k images, tested on the other 5k, not on the test set." in text
    assert "Validation error" in text
    (run / ENVIRONMENT).unlink()
    text = reported(run).text
    assert "Which images were used was not recorded." in text
    assert "environment.json is missing" in text


def test_an_unfinished_run_says_so(run: Path) -> None:
    (run / RESULT).unlink()
    RunDir(run).cut_back(15)
    text = reported(run).text
    assert "No result yet: step 15 of 24." in text
    assert "at step 12, so far" in text
    assert "the number to report" not in text


def test_the_configuration_stands_beside_the_papers(run: Path) -> None:
    text = reported(run).text
    assert "batch size 16 the paper's recipe: 128" in text
    assert "warmup steps 2 without effect here" not in text
    assert re.search(r"warmup lr [\d.]+ without effect here", text)
    assert "weight decay 0.0001 momentum" not in text
    assert re.search(r"weight decay 0\.0001 (?!the paper)", text)


# --- nothing out of a run folder is trusted


def test_markup_in_a_run_folder_is_text(run: Path) -> None:
    evil_run = run.with_name(EVIL.replace("/", "\N{FRACTION SLASH}"))
    run.rename(evil_run)
    tree = json.loads((evil_run / "config.json").read_text())
    tree["execution"]["data_dir"] = tree["output"]["out"] = EVIL
    tree["execution"]["data_urls"] = [EVIL]
    (evil_run / "config.json").write_text(json.dumps(tree))
    changed(evil_run, ENVIRONMENT, cpu=EVIL, gpu=[EVIL], data={EVIL: EVIL, "digest": EVIL}, **{EVIL: {EVIL: EVIL}})
    changed(evil_run, RESULT, seconds={EVIL: 3.0, "train": 2.0}, step_milliseconds=EVIL, peak_memory=EVIL)
    document = reported(evil_run)  # `check` finds scripts and handlers
    assert EVIL in document.text
    second = Path(shutil.copytree(evil_run, run.with_name("second")))
    check(reported(evil_run, second))


@pytest.mark.parametrize("name", ["test_error", "num_parameters", "seconds"])
@pytest.mark.parametrize("value", ["nan", EVIL, None, [1]])
def test_a_damaged_result_is_named(run: Path, name: str, value: object) -> None:
    changed(run, RESULT, **{name: value})
    assert "result.json is damaged" in reported(run).text


def test_damaged_metrics(run: Path) -> None:
    folder = RunDir(run)
    for record in ({"kind": EVIL}, {"kind": "train", "error": EVIL, "clock": EVIL}, {"kind": "test", "error": [1]}):
        folder.append_metrics({"step": 3, **record})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "test", "st')
    (run / RESULT).unlink()
    reported(run)


# --- several runs


@pytest.fixture
def sweep(run: Path, tmp_path: Path) -> Path:
    """Three seeds with known errors, and another network that is not finished."""
    folder = tmp_path / "sweep"
    for seed, error in enumerate((0.10, 0.11, 0.15)):
        one = Path(shutil.copytree(run, folder / f"seed{seed}"))
        changed(one, "config.json", seed=seed)
        changed(one, RESULT, test_error=error)
    cut = Path(shutil.copytree(run, folder / "cut"))
    tree = json.loads((cut / "config.json").read_text())
    tree["model"]["arch"] = "plain"
    (cut / "config.json").write_text(json.dumps(tree))
    (cut / RESULT).unlink()
    return folder


def test_several_runs_are_a_table_with_a_section_each(sweep: Path) -> None:
    document = reported(sweep)
    text = document.text
    assert "4 runs: synthetic" in text
    assert document.count("details") == 4
    assert text.index("PlainNet8, seed 0 step 24 of 24") < text.index("ResNet8, seed 0")  # by folder
    assert "ResNet8, mean of 3 12.00 \N{PLUS-MINUS SIGN} 2.65 %" in text  # n - 1
    assert "10.00 %" in text
    assert len([a for a in document.all("href") if a.startswith("#run-")]) == 4
    assert text.count("Synthetic data: not a result of the paper.") == 1 + 4  # on top, and in each section
    unfinished = reported(sweep / "cut", Path(shutil.copytree(sweep / "cut", sweep / "again"))).text
    assert unfinished.index("Synthetic data") < unfinished.index("Results")


def test_a_mean_is_of_all_finished_runs_or_not_given(sweep: Path) -> None:
    changed(sweep / "seed1", RESULT, test_error="nan")
    text = reported(sweep).text
    assert "ResNet8, mean of 3 \N{EN DASH} \N{EN DASH} \N{EN DASH}" in text
    assert "result.json is damaged" in text


def test_hundreds_of_runs_have_a_row_each_and_sections_as_far_as_they_fit(sweep: Path) -> None:
    common, runs = read_runs([sweep / "seed0"])
    subjects = [Subject(runs[0], result_of(runs[0].folder), "--no-eval was given.")] * 700
    document = check(Document(render(common, subjects)))
    shown = document.count("details")
    assert 100 < shown < 700
    assert document.text.count("ResNet8 ") > 700
    assert f"{700 - shown} more are left out" in document.text


def table6_of(document: Document) -> str:
    text = document.text
    return text[text.index("Table 6 of the paper") : text.index("Run by run")]


def test_variants_of_a_network_have_a_row_each(sweep: Path) -> None:
    assert "ResNet-8 " in table6_of(reported(sweep))
    tree = json.loads((sweep / "seed1" / "config.json").read_text())
    tree["recipe"]["weight_decay_on"] = "weights"
    (sweep / "seed1" / "config.json").write_text(json.dumps(tree))
    table = table6_of(reported(sweep))
    assert re.search(r"ResNet-8, weight decay on all [\d,]+ 2 .* ResNet-8, weight decay on weights [\d,]+ 1 ", table)
    changed = "weight decay on all -> weights (ResNet-8, weight decay on weights)"
    assert f"Where the paper leaves it open: {changed}." in table


def test_a_row_that_cannot_be_made_says_why_and_the_others_stand(sweep: Path) -> None:
    shutil.copytree(sweep / "seed1", sweep / "twin")
    table = table6_of(reported(sweep))
    assert "No row: " in table
    assert "both ResNet-8 with seed" in table
    assert "plain-8" in table


def test_images_that_were_not_the_runs_are_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = synthetic.make_synthetic()
    others = replace(images, test_images=images.test_images[::-1], official=False, name="cifar10")
    monkeypatch.setattr(synthetic, "make_synthetic", lambda: others)
    text = reported(run, evaluate=True).text
    for part in ("By class", "Layer responses"):
        section = text[text.index(part) :]
        assert section.index("The data set is not the official CIFAR-10 files.") < 300
        assert section.index("Measured on other images than those of the run.") < 300


def test_many_runs_stay_below_a_megabyte(sweep: Path) -> None:
    """Forty-five runs of the paper's length, with sheets of noise, which does not compress."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    uri = "data:image/png;base64," + base64.b64encode(png(noise)).decode()
    mistakes = [Mistake(i, uri, "automobile", "automobile", 0.99) for i in range(NUM_MISTAKES)]
    evaluation = Evaluation(0.3, (np.eye(10, dtype=int) * 900 + 11).tolist())
    tested = Answers(64_000, evaluation, tuple(["automobile"] * 10), mistakes, np.linspace(0.1, 3, 109).tolist(), ())
    kinds = [*(("train", 100 * k) for k in range(1, 641)), *(("test", 2_000 * k) for k in range(1, 33))]
    chance = np.random.default_rng(1)
    records = [
        {"kind": kind, "step": step, "error": chance.random()} for kind, step in sorted(kinds, key=lambda k: k[1])
    ]
    common, runs = read_runs([sweep / "seed0"])
    runs[0].records[:] = records
    subjects = [Subject(runs[0], result_of(runs[0].folder), tested)] * 45
    document = check(Document(render(common, subjects)))
    left_out = document.text.count("Left out to keep this file below 1 MB")
    assert 0 < left_out < 45
    assert document.count("img") == NUM_MISTAKES * (45 - left_out)
    many = check(Document(render(common, subjects * 4)))
    assert many.count("img") == 0
    assert 0 < many.text.count("Layer responses") < 180
    assert many.text.count("Details Left out") == 180 - many.text.count("Layer responses")


# --- the look


def variables(css: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", css))


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_in_light_and_in_dark() -> None:
    css = (Path(markup.__file__).with_name("report.css")).read_text()
    light, dark = css.split("prefers-color-scheme: dark")
    for theme in (variables(light), variables(dark)):
        assert set(theme) >= {"page", "ink", "soft", "s0", "s6"}
        assert min(contrast(theme[name], theme["page"]) for name in ("ink", "soft")) >= 4.5
        assert contrast(theme["mark"], theme["marked"]) >= 4.5
        assert min(contrast(theme[f"s{n}"], theme["page"]) for n in range(7)) >= 3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 20, [0, 5, 10, 15, 20]),
        (0, 64_000, [0, 20_000, 40_000, 60_000, 80_000]),
        (0, 0.9, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 7, [2, 4, 6, 8]),
        (0, 0, [0]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def points(path: str) -> list[tuple[int, int]]:
    return [(int(x), int(y)) for x, y in re.findall(r"(-?\d+) (-?\d+)", path)]


def chart(curves: list[Curve], **how: Any) -> tuple[str, dict[str, str]]:
    """A chart and its paths by class."""
    found = line_chart(curves, x_label="steps", y_label="error", describe="d", **how)
    return found, dict(re.findall(r'<path class="([^"]+)" d="([^"]*)"', found))


def series(y: list[float]) -> Line:
    x, values = np.arange(1, len(y) + 1, dtype=float), np.array(y, float)
    return Line(x, x, values, values)


def test_points_lie_where_the_ticks_say() -> None:
    found, paths = chart([Curve("", None, series([20, 10, 5, 0]))])
    assert points(paths["s0 bold"]) == [(250, 0), (500, 500), (750, 750), (1000, 1000)]
    assert '<span class="y" style="bottom:50%">10</span>' in found
    assert "axis ends" not in found


@pytest.mark.parametrize("early", [0.0, 20.0])
def test_a_network_without_errors_is_drawn(early: float) -> None:
    _, paths = chart([Curve("", None, series([early] + [0.0] * 99))])
    assert points(paths["s0 bold"])[-1] == (1000, 1000)


def test_a_cut_axis_says_so() -> None:
    found, paths = chart([Curve("", None, series([90.0] * 5 + [10.0] * 95))])
    assert "The axis ends at " in found
    assert points(paths["s0 bold"])[0][1] < 0  # above the edge
    assert 0 <= points(paths["s0 bold"])[-1][1] < 500


def test_long_lines_are_thinned_but_end_where_they_end() -> None:
    line = series([float(k % 7) for k in range(1_000)])
    _, paths = chart([Curve("", line, None)], points=100)
    assert len(points(paths["s0 thin"])) <= 101
    assert points(paths["s0 thin"])[-1] == (1000, points(paths["s0 thin"])[-1][1])


def test_smoothed_lines_stand_before_what_was_logged() -> None:
    records = [{"kind": "train", "step": k, "error": 0.5 + 0.1 * (k % 2)} for k in range(1, 100)]
    found, paths = chart([curve_of(records, "", smooth=9)])
    assert list(paths)[-2:] == ["s0 pale", "s0 thin"]
    assert found.count("<svg") == 1


# --- the command


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["report", str(run), "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{run / 'report.html'}\n"
    assert "testing" in err
    assert command(["report", str(run), "--no-eval", "--out", str(tmp_path / "new" / "x.html")]) == 0
    assert (tmp_path / "new" / "x.html").exists()


BAD = {
    "": "Missing argument",
    "nowhere": "nowhere is not a run folder",
    "run --out x.pdf": "x.pdf; give a name that ends in .html",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input(line: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(run.parent)
    assert command(["report", *line.split(), "--no-eval"]) == 2
    err = capsys.readouterr().err
    assert BAD[line] in err
    assert err.count("\n") <= 2


def test_no_room(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert command(["report", str(run), "--no-eval", "--out", str(tmp_path / "file" / "x.html")]) == 3


def test_the_newest_test_and_the_best_one() -> None:
    records = [
        {"kind": "test", "step": 12, "error": 0.4},
        {"kind": "train", "step": 20, "error": 0.1},
        {"kind": "test", "step": 24, "error": 0.5},
    ]
    run: Any = SimpleNamespace(records=records)
    subject = Subject(run, None, "not tested")
    assert (subject.last_test["step"], subject.test_error, subject.best) == (24, 0.5, (0.4, 12))


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_where_the_time_went() -> None:
    """In a fixed order, unknown clocks behind, and none that is too short to tell."""
    run: Any = SimpleNamespace(records=[])
    result: Any = SimpleNamespace(seconds={"strange": 2.0, "import": 0.04, "compile": 7.0, "train": 60.0})
    text = text_of(sections.clocks(Subject(run, result, "")))
    assert "importing" not in text
    assert text.index("train") < text.index("compiling") < text.index("strange")


def test_only_what_changed_is_told_of_a_resumed_run() -> None:
    first = {"torch": "2.15.0", "gpu": "NVIDIA A"}
    folder = SimpleNamespace(
        environments=lambda: [first, {**first, "gpu": "NVIDIA B", "resumed": True, "step": 7}], data=dict
    )
    run: Any = SimpleNamespace(folder=folder)
    text = text_of(sections.environment(Subject(run, None, "")))
    assert "at step 7 gpu NVIDIA B" in text
    assert text.count("2.15.0") == 1
