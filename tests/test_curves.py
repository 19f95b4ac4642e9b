"""plots/ and `fastres plot`: which points are drawn, how, under which name; what is refused."""

import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.legend import Legend

from fastres.cli import run as command
from fastres.config import RunConfig, make_config
from fastres.configtree import merge
from fastres.errors import InputError
from fastres.plots.curves import COLOURS, NUM_STYLES, figure_of
from fastres.plots.runs import Run, plot_runs, read_runs, tell_apart
from fastres.plots.series import Curve, curve_of, mean_curve
from fastres.reproduce import markup as report_page
from fastres.rundir import DIVERGED, RESULT, RunDir

STEPS = range(10, 401, 10)


def record(kind: str, step: int, error: object, **more: object) -> dict[str, Any]:
    return {"kind": kind, "step": step, "error": error, "loss": 1.0, **more}


def falling(offset: float = 0.0, upto: int = 400) -> list[dict[str, Any]]:
    """Forty log steps and four tests; a step takes half a second."""
    found = []
    for step in (s for s in STEPS if s <= upto):
        noise = 0.05 * (step // 10 % 2)
        found.append(record("train", step, 50 / (step + 50) + noise, lr=0.1, clock={"train": step / 2}))
        if step % 100 == 0:
            found.append(record("test", step, 40 / (step + 50) + offset))
    return found


def made_run(
    path: Path, *, finished: bool = True, records: Sequence[dict[str, Any]] | None = None, **changes: Any
) -> Path:
    """A run folder as a run leaves it, without the run."""
    base: dict[str, Any] = {"data": {"dataset": "synthetic"}, "recipe": {"steps": 400}}
    config = make_config("paper", **merge(base, changes))
    folder = RunDir.create(path)
    folder.write_json("config.json", config.to_dict())
    for one in falling(config.seed / 100) if records is None else records:
        folder.append_metrics(one)
    if finished:
        folder.write_json(RESULT, {"test_error": 0.1})
    return path


def plotted(tmp_path: Path, *paths: Path, **how: Any) -> Path:
    return plot_runs(paths, how.pop("out", tmp_path / "out.png"), say=lambda _: None, **how)


# --- points


def test_smoothing_averages_a_centred_window_and_leaves_the_last_value() -> None:
    records = [record("train", step, value) for step, value in zip(STEPS, np.arange(40) ** 2 / 1600, strict=True)]
    line = curve_of(records, "", smooth=5).train
    assert line is not None
    raw = 100 * np.arange(40) ** 2 / 1600
    np.testing.assert_allclose(line.y, raw)
    assert line.smooth[20] == pytest.approx(raw[18:23].mean())
    assert line.smooth[1] == pytest.approx(raw[0:3].mean())  # shrunk on both sides
    assert line.smooth[[0, -1]] == pytest.approx(raw[[0, -1]])


def test_smoothing_does_not_cross_a_jump_of_the_learning_rate() -> None:
    """The paper's cliffs stay cliffs, and a linear schedule has none."""
    steps = range(10, 410, 10)
    rates = [0.01 if step <= 50 else 0.1 if step <= 200 else 0.01 for step in steps]
    errors = [0.9 if step <= 50 else 0.5 if step <= 200 else 0.1 for step in steps]
    records = [record("train", s, error, lr=lr) for s, error, lr in zip(steps, errors, rates, strict=True)]
    curve = curve_of(records, "", smooth=9)
    assert curve.train is not None
    np.testing.assert_allclose(curve.train.smooth, curve.train.y)
    assert curve.lr_falls == (200.0,)
    linear = [record("train", s, error, lr=0.1 * (400 - s) / 400) for s, error in zip(steps, errors, strict=True)]
    curve = curve_of(linear, "", smooth=9)
    assert curve.lr_falls == ()
    straight = [record("train", step, 0.5, lr=0.1 * (30 - step) / 30) for step in (10, 20, 30)]
    assert curve_of(straight, "").lr_falls == ()  # it halves between two points, and no step of it is a cliff
    assert curve.train is not None
    assert curve.train.smoothed


def test_tests_are_averaged_over_as_many_steps_as_training() -> None:
    curve = curve_of(falling(), "", smooth=21)
    assert curve.test is not None
    assert curve.test.smoothed  # 100 steps to each side: three tests
    assert curve.test.smooth[1] == pytest.approx(curve.test.y[:3].mean())
    few = curve_of(falling(), "", smooth=5)
    assert few.test is not None
    assert not few.test.smoothed


def test_smoothing_by_default_and_without() -> None:
    long = [record("train", step, 0.5 + 0.1 * (step % 2)) for step in range(1, 641)]
    assert all(line.smoothed for line in curve_of(long, "").lines)
    assert not any(line.smoothed for line in curve_of(long, "", smooth=1).lines)
    assert not any(line.smoothed for line in curve_of(long[:24], "").lines)  # a short run is shown as it is


def test_the_x_axes() -> None:
    unfinished = [*falling(upto=200), record("test", 250, 0.2)]
    by_time = curve_of(unfinished, "", x="time").test
    by_epoch = curve_of(unfinished, "", x="epoch", epochs_per_step=0.01).test
    assert by_time is not None
    assert by_epoch is not None
    assert by_time.x.tolist() == [50, 100, 125]  # the last lies beyond the last log step
    assert by_epoch.x == pytest.approx([1, 2, 2.5])


def test_values_and_the_warm_ups_end_as_logged() -> None:
    records = [
        {"kind": "train", "step": 10, "loss": 2.25, "error": 0.8, "lr": 0.01},
        {"kind": "warmup_end", "step": 14, "lr": 0.1},
        {"kind": "train", "step": 20, "loss": 1.5, "error": 0.75, "lr": 0.1},
    ]
    found = {what: curve_of(records, "", what=what) for what in ("error", "loss", "lr")}
    drawn = {what: curve.train.y.tolist() for what, curve in found.items() if curve.train}
    assert drawn == {"error": [80, 75], "loss": [2.25, 1.5], "lr": [0.01, 0.1]}
    assert {curve.warmup_end for curve in found.values()} == {14}
    assert curve_of(records, "", x="epoch", epochs_per_step=0.5).warmup_end == 7
    assert curve_of(records[:1], "").warmup_end is None


@pytest.mark.parametrize("value", ["nan", None, True, "<b>", [], float("inf")])
def test_what_is_no_number_is_left_out(value: object) -> None:
    curve = curve_of([*falling(), record("train", 410, value)], "")
    assert curve.train is not None
    assert curve.train.steps[-1] == 400


def test_mean_and_deviation_over_runs() -> None:
    one, two, short = (
        curve_of(records, "", smooth=1) for records in (falling(0.0), falling(0.02), falling(0.04, upto=300))
    )
    found = mean_curve([one, two], "both").test
    assert found is not None
    assert one.test is not None
    assert found.low is not None
    np.testing.assert_allclose(found.smooth, one.test.y + 1)
    np.testing.assert_allclose(found.smooth - found.low, np.sqrt(2))  # n - 1
    three = mean_curve([one, two, short], "all").test
    assert three is not None
    assert three.steps.tolist() == [100, 200, 300]
    assert mean_curve([one], "alone") is one


def test_steps_have_ticks_of_their_own() -> None:
    """No "2" at 2.5."""
    short = [record("train", step, 1 / step) for step in range(1, 9)]
    for x in ("step", "epoch"):
        figure = drawn([curve_of(short, "", x="step" if x == "step" else "epoch", epochs_per_step=0.01)], x=x)
        figure.canvas.draw()
        axes = figure.axes[0]
        for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
            assert float(label.get_text()) == pytest.approx(tick)


def test_a_band_of_one_point_is_not_in_the_legend() -> None:
    for upto, there in ((10, False), (20, True)):
        both = mean_curve([curve_of(falling(upto=upto), ""), curve_of(falling(0.02, upto=upto), "")], "both")
        texts = [text.get_text() for legend in drawn([both]).findobj(Legend) for text in legend.get_texts()]
        assert ("one standard deviation" in texts) == there


# --- names


def config(**changes: Any) -> RunConfig:
    return make_config("paper", **changes)


@pytest.mark.parametrize(
    ("configs", "common", "labels"),
    [
        ([config()], "ResNet20, cifar10, seed 0", ["ResNet20"]),
        ([config(), config(seed=3)], "ResNet20, cifar10", ["seed 0", "seed 3"]),
        ([config(), config(model={"arch": "plain"})], "cifar10, seed 0", ["ResNet20", "PlainNet20"]),
        ([config(), config(recipe={"lr": 0.05})], "ResNet20, cifar10, seed 0", ["lr 0.1", "lr 0.05"]),
        (
            [config(), config(data={"augment": False}, seed=1)],
            "ResNet20, cifar10",
            ["augment on, seed 0", "augment off, seed 1"],
        ),
        (
            [config(), config(execution={"precision": "bf16"})],
            "ResNet20, cifar10, seed 0",
            ["precision auto", "precision bf16"],
        ),
        (
            [config(), config(recipe={"warmup": "ramp"})],
            "ResNet20, cifar10, seed 0",
            ["warmup none", "warmup ramp"],  # whose 6,400 steps follow from 64,000
        ),
        (
            [config(), config(recipe={"warmup": "ramp", "warmup_steps": 5})],
            "ResNet20, cifar10, seed 0",
            ["warmup none", "warmup ramp, warmup steps 5"],
        ),
        ([config(), config()], "ResNet20, cifar10, seed 0", ["a", "b"]),
        ([config(), config(), config(seed=1)], "ResNet20, cifar10", ["seed 0, a", "seed 0, b", "seed 1"]),
    ],
)
def test_labels_say_what_differs(configs: list[RunConfig], common: str, labels: list[str]) -> None:
    assert tell_apart(configs, ["a", "b", "c"][: len(configs)]) == (common, labels)


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("old/seed0", "new/seed0", "new/seed1"):
        made = RunDir.create(tmp_path / name)
        made.write_json("config.json", config(seed=int(name[-1])).to_dict())
    _, runs = read_runs([tmp_path])
    assert [run.label for run in runs] == ["seed 0, new/seed0", "seed 1", "seed 0, old/seed0"]
    _, runs = read_runs([tmp_path / "old/seed0", tmp_path / "old"])
    assert [run.label for run in runs] == ["ResNet20"]


def test_how_it_ran_is_named_only_where_nothing_else_tells_runs_apart() -> None:
    _, labels = tell_apart([config(), config(seed=1, execution={"threads": 2})], ["a", "b"])
    assert labels == ["seed 0", "seed 1"]


# --- the picture


def luminance(color: str) -> float:
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot([0.2126, 0.7152, 0.0722], channels))


def seen_as(color: str, matrix: Sequence[Sequence[float]]) -> np.ndarray:
    """A colour in OKLab as a reader with a colour-vision deficiency sees it (https://bottosson.github.io/posts/oklab)."""
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)])
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    ) @ np.clip(np.array(matrix) @ linear, 0, 1)
    return np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    ) @ np.cbrt(cones)


# Machado, Oliveira, Fernandes 2009 (https://doi.org/10.1109/TVCG.2009.113), severity 1
SIGHT = {
    "normal": np.eye(3).tolist(),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_are_told_apart(sight: str) -> None:
    """Distances in OKLab, of the figures' colours and of the report's, which has others in the dark."""
    css = Path(report_page.__file__).with_name("report.css").read_text()
    light, dark = (re.findall(r"--s\d: (#\w{6})", half) for half in css.split("prefers-color-scheme: dark"))
    assert light == list(COLOURS)
    for colors in (light, dark):
        seen = {color: seen_as(color, SIGHT[sight]) for color in colors}
        assert len(seen) == 7
        assert [(a, b) for a, b in combinations(seen, 2) if np.linalg.norm(seen[a] - seen[b]) < 0.07] == []


def test_colours_stand_out_from_white() -> None:
    assert min(1.05 / (luminance(color) + 0.05) for color in COLOURS) >= 3


def drawn(curves: Sequence[Curve], **how: Any) -> Any:
    figure = figure_of(curves, "title", **how)
    figure.draw_without_rendering()
    return figure


def test_training_is_thin_test_bold_and_both_have_the_runs_colour() -> None:
    axes, _ = drawn([curve_of(falling(), "a", smooth=5), curve_of(falling(0.1), "b", smooth=5)]).axes
    for color in COLOURS[:2]:
        widths = [line.get_linewidth() for line in axes.lines if line.get_color() == color and not line.get_alpha()]
        assert len(widths) == 2
        assert widths[1] >= 2 * widths[0]
        pale = [line for line in axes.lines if line.get_color() == color and line.get_alpha()]
        assert pale
        assert all(line.get_zorder() < 3 for line in pale)
    assert {line.get_color() for line in axes.lines} == set(COLOURS[:2])


@pytest.mark.parametrize(
    "label", ["s", "ResNet110, lr 0.05, weight decay 0.0005, norm batch 64, seed", 9 * "momentum 0.85, " + "seed"]
)
@pytest.mark.parametrize("count", [1, 2, 9, 30])
def test_the_legend_lies_outside_the_axes_and_inside_the_figure(count: int, label: str) -> None:
    records = [*falling(), {"kind": "warmup_end", "step": 40}]
    figure = drawn([curve_of(records, f"{label} {n}", smooth=3, unfinished=True) for n in range(count)])
    axes = figure.axes[0]
    legends = figure.findobj(Legend)
    assert len(legends) == 2
    boxes = [legend.get_window_extent() for legend in legends]
    assert not boxes[0].overlaps(boxes[1])
    for box in boxes:
        assert not box.overlaps(axes.get_tightbbox())
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
    assert axes.get_window_extent().height / figure.dpi == pytest.approx(3.7, abs=0.25)  # inches
    texts = {text.get_text().replace("\n", " ") for legend in legends for text in legend.get_texts()}
    assert texts >= {f"{label} 0", "test error", "as logged", "unfinished"}
    assert ("warm-up ends" in texts) == (count == 1)


def test_after_the_last_colour_comes_another_dash() -> None:
    axes, _ = drawn([curve_of(falling(), str(n), smooth=1) for n in range(9)]).axes
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in axes.lines}
    assert len(looks) == 9


def test_an_unfinished_run_ends_in_a_ring() -> None:
    for unfinished in (True, False):
        axes, _ = drawn([curve_of(falling(), "a", unfinished=unfinished)]).axes
        rings = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
        assert [line.get_xdata()[0] for line in rings] == ([400, 400] if unfinished else [])


def test_names_are_no_formulas() -> None:
    drawn([curve_of(falling(), "_$\\frac$"), curve_of(falling(), "$x")])


# --- which runs


def test_runs_of_a_sweep_and_its_bands(tmp_path: Path) -> None:
    for depth in (8, 14):
        for seed in range(2):
            made_run(tmp_path / "sweep" / f"{depth}-{seed}", model={"depth": depth}, seed=seed)
    common, runs = read_runs([tmp_path / "sweep"])
    assert common == "synthetic"
    assert [run.label for run in runs][:3] == ["ResNet8, seed 0", "ResNet8, seed 1", "ResNet14, seed 0"]
    plain = plotted(tmp_path, tmp_path / "sweep", out=tmp_path / "plain.svg")
    bands = plotted(tmp_path, tmp_path / "sweep", out=tmp_path / "bands.svg", band=True)
    assert plain.read_bytes() != bands.read_bytes()


def test_bands_join_what_differs_in_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Curve] = []
    monkeypatch.setattr("fastres.plots.runs.draw", lambda curves, *_, **__: seen.extend(curves))
    paths = [made_run(tmp_path / f"a{seed}", seed=seed) for seed in range(3)]
    paths.append(made_run(tmp_path / "b", recipe={"lr": 0.2}, seed=7))
    plotted(tmp_path, *paths, band=True)
    assert [curve.label for curve in seen] == ["lr 0.1, mean of 3", "lr 0.2, seed 7"]
    assert [curve.lines[0].low is not None for curve in seen] == [True, False]
    seen.clear()
    copy, said = made_run(tmp_path / "0", seed=1, finished=False), list[str]()
    plot_runs([copy, *paths], tmp_path / "out.svg", band=True, say=said.append)
    assert [curve.label for curve in seen] == ["lr 0.1, mean of 3", "lr 0.2, seed 7"]  # not of the unfinished one
    assert said == [f"{copy} has the seed of another run of its config: left out of the mean"]
    plot_runs([*paths, copy], tmp_path / "out.svg", say=said.append)
    assert len(seen) == 2 + 5  # each alone


def test_epochs_are_of_the_runs_own_images(tmp_path: Path) -> None:
    _, (run,) = read_runs([made_run(tmp_path / "run", recipe={"batch_size": 16})])
    steps, epochs = (run.curve(x=x).lines[0].x for x in ("step", "epoch"))
    assert epochs.tolist() == pytest.approx((steps * 16 / 10_000).tolist())


def test_one_run_gets_its_figure_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made_run(tmp_path / "run")
    assert command(["plot", str(path)]) == 0
    assert capsys.readouterr().out == f"{path / 'curves.png'}\n"
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = (path / "curves.png").read_bytes()
    for flags, name in (("--what lr", "lr"), ("--x time", "error-by-time"), ("--log-y", "error"), ("--band", "error")):
        assert command(["plot", str(path), *flags.split()]) == 0
        assert capsys.readouterr().out == f"{path / name}.png\n"
    assert (path / "curves.png").read_bytes() == before  # the run's own


def test_images_that_are_not_the_official_ones_are_marked(tmp_path: Path) -> None:
    cifar: dict[str, Any] = {"data": {"dataset": "cifar10"}}
    runs = [made_run(tmp_path / "a", **cifar), made_run(tmp_path / "b", seed=1, **cifar)]
    for run, official in zip(runs, (True, False), strict=True):
        RunDir(run).write_json("environment.json", {"data": {"official": official}})
    svg = plotted(tmp_path, *runs, out=tmp_path / "out.svg").read_text()
    assert "<!-- the data set is not the official CIFAR-10 files (seed 1) -->" in svg
    RunDir(runs[1]).write_json("environment.json", {"data": {"official": True}})
    assert "official" not in plotted(tmp_path, *runs, out=tmp_path / "out.svg").read_text()


def test_validation_error_is_not_called_test_error(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a", data={"dataset": "cifar10", "val_split": True})
    svg = plotted(tmp_path, run, out=tmp_path / "new/folder/out.svg").read_text()
    assert "<!-- validation error -->" in svg
    assert "test error" not in svg


def test_more_curves_than_styles_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    records = [record("train", 10, 0.5), record("train", 20, 0.4)]
    runs = [made_run(tmp_path / str(seed), seed=seed, records=records) for seed in range(NUM_STYLES + 1)]
    plot_runs(runs[:-1], tmp_path / "out.png", say=said.append)
    assert not said
    plot_runs(runs, tmp_path / "out.png", say=said.append)
    assert said == ["29 curves have only 28 colours and dashes between them; --band draws means over seeds"]


def test_several_runs_get_theirs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made_run(tmp_path / "a")
    made_run(tmp_path / "b", seed=1)
    assert command(["plot", "a", "b", "--x", "time", "--what", "loss", "--log-y", "--ylim", "0.5,2"]) == 0
    assert capsys.readouterr().out == "loss-by-time.png\n"
    assert (tmp_path / "loss-by-time.png").exists()
    assert command(["plot", "a", "b"]) == 0
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("what", ["error", "loss", "lr"])
@pytest.mark.parametrize("x", ["step", "epoch", "time"])
def test_equal_runs_give_equal_files(tmp_path: Path, what: str, x: str) -> None:
    path = made_run(tmp_path / "run")
    first, second = (plotted(tmp_path, path, out=tmp_path / f"{n}.svg", what=what, x=x) for n in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_runs_that_got_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    cut = made_run(tmp_path / "cut", finished=False, records=falling(upto=200))
    empty = made_run(tmp_path / "empty", finished=False, records=[], seed=1)
    lost = made_run(tmp_path / "lost", finished=False, records=falling(upto=50), seed=2)
    (lost / DIVERGED).write_text(json.dumps({"step": 57, "why": "NaN"}))
    _, runs = read_runs([cut, empty, lost])
    labels = [run.curve().label for run in runs]
    assert labels == ["seed 0 (step 200 of 400)", "seed 1 (step 0 of 400)", "seed 2 (diverged at step 57)"]
    plot_runs([cut, empty, lost], tmp_path / "x.png", say=said.append)
    assert said == [f"{empty} has logged no error yet: left out"]
    drawn: list[Curve] = []
    with monkeypatch.context() as patch:
        patch.setattr("fastres.plots.runs.draw", lambda curves, *_, **__: drawn.extend(curves))
        wide = made_run(tmp_path / "wide", finished=False, records=[], recipe={"lr": 0.2})
        plot_runs([cut, lost, wide], tmp_path / "x.png", say=said.append)
    assert [curve.label for curve in drawn] == labels[::2]  # nothing of the lr of one that is not drawn
    with pytest.raises(InputError, match="has logged no error yet"):
        plotted(tmp_path, empty)
    (empty / DIVERGED).write_text(json.dumps({"step": 6, "why": "NaN"}))
    with pytest.raises(InputError, match=r"empty diverged before it logged any error \(diverged.json says how\)"):
        plotted(tmp_path, empty)


def test_a_run_that_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        made_run(tmp_path / "all" / name, seed=ord(name))
    (tmp_path / "all" / "b" / "config.json").write_text("rubbish")
    said: list[str] = []
    _, runs = read_runs([tmp_path / "all"], said.append)
    assert [run.label for run in runs] == ["seed 97", "seed 99"]
    (line,) = said
    assert "b/config.json cannot be read" in line
    assert line.endswith("; left out")


def test_standing_of_a_finished_run(tmp_path: Path) -> None:
    _, (run,) = read_runs([made_run(tmp_path / "run")])
    assert isinstance(run, Run)
    assert (run.standing, run.curve().unfinished, run.curve().label) == ("", False, "ResNet20")


BAD = {
    "": "Missing argument",
    "nowhere": "nowhere is not a run folder, and holds none",
    "run --out x.pdf": "x.pdf; give a name that ends in .png or .svg",
    "run --out x": ".png or .svg",
    "run --x steps": "'steps'; it must be one of step, epoch, time",
    "run --what accuracy": "'accuracy'; it must be one of error, loss, lr",
    "run --smooth 0": "--smooth is 0",
    "run --ylim 20": "write two rising numbers as 0,20",
    "run --ylim 20,0": "write two rising numbers",
    "run --ylim 0,inf": "write two rising numbers",
    "run --ylim 0,1e308": "write two rising numbers",
    "run --ylim 0,20 --log-y": "both must be above 0",
    "empty": "has logged no error yet",
    "broken": "config.json: unknown key model.width",
    "torn": "cannot be read",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made_run(Path("run"))
    made_run(Path("empty"), records=[])
    for name, content in (("broken", '{"model": {"width": 3}}'), ("torn", '{"model": ')):
        (made_run(Path(name)) / "config.json").write_text(content)
    assert command(["plot", *line.split()]) == 2
    err = capsys.readouterr().err
    assert BAD[line] in err
    assert err.count("\n") <= 2


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert command(["plot", str(made_run(tmp_path / "run")), "--out", str(tmp_path / "file" / "x.png")]) == 3
