"""fig7.py: the figure and its table hold what `layer_responses` measures at each run's checkpoint."""

import csv
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import fastres
from fastres import checkpoint
from fastres.config import make_config
from fastres.data import synthetic
from fastres.errors import InputError
from fastres.evaluate import Trained, load_trained
from fastres.reproduce import fig7
from fastres.responses import layer_responses
from fastres.rundir import CONFIG, RESULT, RunDir
from tests.runs import tiny

CPU = {"device": "cpu", "threads": 1}
QUIET: Callable[[str], None] = lambda _: None  # noqa: E731


@pytest.fixture(scope="module", autouse=True)
def few_test_images() -> Iterator[None]:
    """200 instead of 2,000: every test measures several networks."""
    images = synthetic.make_synthetic()
    few = dataclasses.replace(images, test_images=images.test_images[:200], test_labels=images.test_labels[:200])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "make_synthetic", lambda: few)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """ResNet-8 twice, plain-8 once."""
    folder = tmp_path_factory.mktemp("fig7")
    for name, seed, model in (("a", 0, {}), ("b", 1, {}), ("c", 0, {"arch": "plain", "depth": 8})):
        config = tiny(folder / name, model=model, seed=seed, recipe={"steps": 3})
        fastres.train(config, verbosity="quiet")
    return [RunDir.open(folder / name) for name in "abc"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved; nothing is written but the CSV."""
    figures: list[Figure] = []

    def save(drawn: Figure, paths: list[Path]) -> list[Path]:
        figures.append(drawn)
        return paths

    monkeypatch.setattr(fig7, "save", save)
    return figures


@functools.cache
def stds_of(run: RunDir) -> list[float]:
    trained = load_trained(run.path, {**CPU, "precision": "fp32"}, say=QUIET)
    return [r.std for r in layer_responses(trained.net, trained.batches(), trained.runtime.dtype)]


def copy_of(run: RunDir, path: Path, *names: str) -> RunDir:
    path.mkdir()
    for name in names:
        shutil.copy(run.path / name, path / name)
    return RunDir.open(path)


def test_lines_are_means_over_seeds_in_order_and_sorted(
    runs: list[RunDir], tmp_path: Path, drawn: list[Figure]
) -> None:
    *_, table = fig7.draw(runs, tmp_path, CPU, note="", say=QUIET)
    top, bottom = drawn[0].axes
    mean = [(a + b) / 2 for a, b in zip(stds_of(runs[0]), stds_of(runs[1]), strict=True)]
    plain, resnet = top.lines
    assert list(resnet.get_ydata()) == pytest.approx(mean)  # type: ignore[arg-type]
    assert list(resnet.get_xdata()) == list(range(1, 8))  # type: ignore[arg-type]
    assert (plain.get_label(), resnet.get_label()) == ("plain-8", "ResNet-8 (n = 2)")
    assert (plain.get_linestyle(), resnet.get_linestyle()) == ("--", "-")
    assert list(bottom.lines[1].get_ydata()) == pytest.approx(sorted(mean, reverse=True))  # type: ignore[arg-type]
    assert [axes.get_xlabel() for axes in (top, bottom)] == [
        "layer index (original order)",
        "layer index (sorted by magnitude)",
    ]
    assert {axes.get_ylabel() for axes in (top, bottom)} == {"std"}
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["network", "seed", "layer_index", "layer_name", "std", "images"]
    assert {r["images"] for r in rows} == {"synthetic"}
    assert [float(r["std"]) for r in rows] == pytest.approx([*stds_of(runs[2]), *stds_of(runs[0]), *stds_of(runs[1])])
    assert list(rows[-1].values())[:4] == ["ResNet-8", "1", "7", "layer3.0.conv2"]


def test_equal_runs_give_equal_bytes_and_the_note_is_on_the_face(runs: list[RunDir], tmp_path: Path) -> None:
    note = "synthetic data: not a result of the paper"
    one = fig7.draw(runs[:2], tmp_path / "one", CPU, note=note, say=QUIET)
    other = fig7.draw(runs[1::-1], tmp_path / "other", CPU, note=note, say=QUIET)
    assert [path.name for path in one] == ["fig7.png", "fig7.svg", "fig7.csv"]
    for a, b in zip(one, other, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert f"<!-- {note} -->" in one[1].read_text()


def test_the_images_that_were_measured_on_are_named(
    runs: list[RunDir], tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = synthetic.make_synthetic()
    others = dataclasses.replace(images, test_images=images.test_images[::-1], official=False, name="cifar10")
    monkeypatch.setattr(synthetic, "make_synthetic", lambda: others)
    *_, table = fig7.draw(runs[:1], tmp_path, CPU, note="made up", say=QUIET)
    (words,) = [text.get_text().replace("\n", " ") for text in drawn[0].texts]
    for part in (
        "made up; ",
        "synthetic data",
        "not the official CIFAR-10 files",
        "other images than those of",
    ):
        assert part in words
    with table.open(newline="") as file:
        assert {row["images"] for row in csv.DictReader(file)} == {"other"}


def test_runs_without_weights_are_left_out_and_unfinished_ones_marked(
    runs: list[RunDir], tmp_path: Path, drawn: list[Figure]
) -> None:
    bare = copy_of(runs[2], tmp_path / "bare", CONFIG, RESULT)
    cut = copy_of(runs[0], tmp_path / "cut", CONFIG, checkpoint.NEWEST)
    said: list[str] = []
    fig7.draw([bare, cut], tmp_path, CPU, note="", say=said.append)
    assert [line.get_label() for line in drawn[0].axes[0].lines] == ["ResNet-8 (unfinished, at 3)"]
    assert f"{bare.path} has no checkpoint: left out of Figure 7" in said
    with pytest.raises(InputError, match="none of the runs has a checkpoint"):
        fig7.draw([bare], tmp_path, CPU, note="", say=QUIET)


def test_a_mean_is_over_finished_runs(runs: list[RunDir], tmp_path: Path, drawn: list[Figure]) -> None:
    cut = copy_of(runs[1], tmp_path / "cut", CONFIG, checkpoint.NEWEST)
    fig7.draw([runs[0], cut], tmp_path, CPU, note="", say=QUIET)
    (line,) = drawn[0].axes[0].lines
    assert list(line.get_ydata()) == pytest.approx(stds_of(runs[0]))  # type: ignore[arg-type]
    assert line.get_label() == "ResNet-8 (n = 1 of 2, 1 unfinished)"


def test_the_papers_five_alone_where_there_are_some() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            arch, _, depth = name.lower().partition("-")
            self.name, self.config = name, make_config(model={"arch": arch, "depth": int(depth)})

    def chosen(*names: str) -> list[str]:
        return [n.name for n in fig7._as_in_the_paper([Named(n) for n in names], QUIET)]  # type: ignore[misc]

    assert chosen("plain-20", "plain-32", "ResNet-44", "ResNet-110") == ["plain-20", "ResNet-110"]
    assert chosen("plain-8", "ResNet-32") == ["plain-8", "ResNet-32"]


def test_auto_precision_is_fp32_on_every_machine(
    runs: list[RunDir], tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(path: Path, execution: dict[str, Any], **rest: Any) -> Trained:
        asked.append(execution["precision"])
        return load_trained(path, execution, **rest)

    monkeypatch.setattr(fig7, "load_trained", load)
    fig7.draw(runs[2:], tmp_path, {**CPU, "precision": "auto"}, note="", say=QUIET)
    fig7.draw(runs[2:], tmp_path, {**CPU, "precision": "bf16"}, note="", say=QUIET)
    assert asked == ["fp32", "bf16"]
