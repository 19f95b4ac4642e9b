"""fig6.py and figure.py: what is drawn is what the run folders say, and a reader is not misled."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastres.config import make_config
from fastres.configtree import merge
from fastres.errors import InputError
from fastres.reproduce import fig6, figure
from fastres.reproduce.networks import by_network
from fastres.rundir import CONFIG, ENVIRONMENT, RESULT, RunDir

NOTE = "made up: not a result"
PANELS = {"plain": 0, "resnet": 1, "deep": 2}


def made_run(
    folder: Path,
    model: str,
    *,
    seed: int = 0,
    steps: int = 64_000,
    until: int | None = None,
    level: float = 0.08,
    every: int = 2_000,
    kinds: tuple[str, ...] = ("train", "test"),
    **changes: Any,
) -> RunDir:
    """A run folder with errors that fall from 0.9 to `level`, as far as step `until`."""
    arch, depth = model.split("-")
    tree = merge({"model": {"arch": arch, "depth": int(depth)}, "recipe": {"steps": steps}, "seed": seed}, changes)
    run = RunDir.create(folder / f"{model}-{seed}")
    run.write_json(CONFIG, make_config(**tree).to_dict())
    for step in range(every, (until or steps) + 1, every):
        for kind in kinds:
            offset = {"train": -0.01, "test": 0.0, "train_clean": -0.02}[kind]
            error = level + offset + (0.9 - level) * math.exp(-step / steps * 12) + 0.001 * seed
            run.append_metrics({"kind": kind, "step": step, "error": error, "loss": 1.0})
    if until is None:
        run.write_json(RESULT, {})
    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved; nothing is written but the CSV."""
    figures: list[Figure] = []

    def save(drawn: Figure, paths: list[Path]) -> list[Path]:
        figures.append(drawn)
        return paths

    monkeypatch.setattr(fig6, "save", save)
    return figures


def labels(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def texts(drawn: Figure) -> str:
    """All that is written outside the panels."""
    return " | ".join(text.get_text() for text in drawn.texts)


def curves(axes: Axes) -> list[Any]:
    return [line for line in axes.lines if line.get_gid() != figure.ASIDE]


def test_panels_axes_and_names_are_the_papers(tmp_path: Path, drawn: list[Figure]) -> None:
    models = ("plain-20", "plain-56", "resnet-20", "resnet-110", "resnet-1202")
    fig6.draw([made_run(tmp_path, model) for model in reversed(models)], tmp_path, note="")
    left, middle, right = drawn[0].axes
    assert labels(left) == ["plain-20", "plain-56"]
    assert labels(middle) == ["ResNet-20", "ResNet-110"]
    assert labels(right) == ["ResNet-110", "ResNet-1202"]
    for axes in (left, middle, right):
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 6.5), (0, 20))
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("iter. (1e4)", "error (%)")
        drops = {line.get_xdata()[0] for line in axes.lines if line.get_gid() == figure.ASIDE}  # type: ignore[index]
        assert drops == {3.2, 4.8}


def test_training_is_thin_and_test_is_bold_at_the_recorded_places(tmp_path: Path, drawn: list[Figure]) -> None:
    run = made_run(tmp_path, "plain-20")
    fig6.draw([run], tmp_path, note="")
    train, test = curves(drawn[0].axes[0])
    assert train.get_linewidth() < 1 < test.get_linewidth()
    for line, kind in ((train, "train"), (test, "test")):
        there = [r for r in run.metrics() if r["kind"] == kind]
        assert list(line.get_xdata()) == pytest.approx([r["step"] / 1e4 for r in there])
        assert list(line.get_ydata()) == pytest.approx([100 * r["error"] for r in there])
    assert "running over the augmented stream" in texts(drawn[0])


def test_seeds_are_a_mean_and_a_band(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [made_run(tmp_path, "resnet-20", seed=seed) for seed in (0, 1, 5)]
    fig6.draw(runs, tmp_path, note="")
    axes = drawn[0].axes[1]
    assert labels(axes) == ["ResNet-20 (n = 3)"]
    test = curves(axes)[1]
    last = [100 * run.metrics()[-1]["error"] for run in runs]
    assert test.get_ydata()[-1] == pytest.approx(sum(last) / 3)
    band = np.asarray(axes.collections[1].get_paths()[0].vertices)
    ends = sorted(band[band[:, 0] == 6.4, 1])
    assert (ends[0], ends[-1]) == pytest.approx((min(last), max(last)))
    assert "bands" in texts(drawn[0])


def test_seeds_logged_at_other_steps_do_not_make_a_saw(tmp_path: Path) -> None:
    """A mean over whoever has a record at a step would jump between the seeds' levels."""
    steps, mean, low, high = fig6._over_seeds([[(10, 4.0), (30, 4.0)], [(10, 2.0), (20, 2.0), (30, 2.0), (40, 2.0)]])
    assert (steps, mean) == ([10, 20, 30], [3.0, 3.0, 3.0])
    assert (low, high) == ([2.0] * 3, [4.0] * 3)


def test_where_a_seed_ends_the_mean_ends_and_the_others_go_on_alone(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [made_run(tmp_path, "resnet-20", seed=seed, level=0.08) for seed in (0, 1)]
    runs.append(made_run(tmp_path, "resnet-20", seed=2, level=0.12, until=46_000))
    fig6.draw(runs, tmp_path, note="")
    axes = drawn[0].axes[1]
    mean = next(line for line in axes.lines if str(line.get_label()).startswith("ResNet-20"))
    assert np.max(mean.get_xdata()) == 4.6
    alone = [line for line in curves(axes) if line.get_xdata()[0] == 4.6]
    assert len(alone) == 2 * 2  # training and test of the two that got to the end
    errors = {round(float(line.get_ydata()[-1]), 3) for line in alone}
    recorded = {round(100 * run.metrics()[-k]["error"], 3) for run in runs[:2] for k in (1, 2)}
    assert errors == recorded
    assert labels(axes) == ["ResNet-20 (n = 3, 1 unfinished)"]


def test_n_is_of_the_runs_that_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [made_run(tmp_path, "resnet-20", seed=seed) for seed in (0, 1, 2)]
    (runs[1].path / "metrics.jsonl").unlink()
    fig6.draw(runs, tmp_path, note="")
    assert labels(drawn[0].axes[1]) == ["ResNet-20 (n = 2 of 3)"]


def test_a_damaged_line_costs_one_record(tmp_path: Path) -> None:
    run = made_run(tmp_path, "resnet-20")
    lines = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.path / "metrics.jsonl").write_text("".join([lines[0], "garbage\n", *lines[2:], '{"step": 1']))
    assert len(run.metrics()) == len(lines) - 1


def test_a_panel_without_runs_says_so(tmp_path: Path, drawn: list[Figure]) -> None:
    fig6.draw([made_run(tmp_path, "resnet-20"), made_run(tmp_path, "plain-20", until=1)], tmp_path, note="")
    left, middle, right = drawn[0].axes
    for axes in (left, right):
        assert [text.get_text() for text in axes.texts] == ["no run"]
        assert not axes.get_legend()
    assert not middle.texts


def test_unfinished_and_diverged_runs_are_marked(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [
        made_run(tmp_path, "plain-20", until=40_000),
        made_run(tmp_path, "plain-56", until=20_000),
        made_run(tmp_path, "resnet-20", seed=0),
        made_run(tmp_path, "resnet-20", seed=1, until=12_000),
    ]
    runs[1].write_json("diverged.json", {"step": 20_001})
    fig6.draw(runs, tmp_path, note="")
    left, middle, _ = drawn[0].axes
    assert labels(left) == ["plain-20 (unfinished, at 40,000)", "plain-56 (diverged after 20,000)"]
    assert labels(middle) == ["ResNet-20 (n = 2, 1 unfinished)"]
    assert curves(left)[1].get_xdata()[-1] == 4.0


def test_a_curve_above_the_axis_is_named_and_a_widened_axis_too(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [made_run(tmp_path, "plain-110", level=0.65), made_run(tmp_path, "plain-20")]
    fig6.draw(runs, tmp_path, note="")
    assert labels(drawn[0].axes[0]) == ["plain-20", "plain-110 (above 20 %)"]
    assert "y axis" not in texts(drawn[0])
    fig6.draw(runs, tmp_path, note="", ylim=0.8)
    assert labels(drawn[1].axes[0]) == ["plain-20", "plain-110"]
    assert drawn[1].axes[0].get_ylim() == (0, 80)
    assert "y axis to 80 %, the paper's to 20 %" in texts(drawn[1])


def test_short_runs_count_single_iterations(tmp_path: Path, drawn: list[Figure]) -> None:
    fig6.draw([made_run(tmp_path, "resnet-20", steps=64, every=8)], tmp_path, note="")
    assert (drawn[0].axes[1].get_xlabel(), drawn[0].axes[1].get_xlim()) == ("iter.", (0, 65))
    assert curves(drawn[0].axes[1])[0].get_marker() == "o"  # eight points would hardly be seen as a line


def test_validation_error_is_not_called_test_error(tmp_path: Path, drawn: list[Figure]) -> None:
    fig6.draw([made_run(tmp_path, "resnet-20", data={"val_split": True})], tmp_path, note="")
    assert "bold: validation error" in texts(drawn[0])


def test_clean_training_error(tmp_path: Path, drawn: list[Figure]) -> None:
    run = made_run(tmp_path / "clean", "resnet-20", kinds=("train", "test", "train_clean"))
    fig6.draw([run, made_run(tmp_path, "plain-20")], tmp_path, note="", clean=True)
    errors = [100 * r["error"] for r in run.metrics() if r["kind"] == "train_clean"]
    assert list(curves(drawn[0].axes[1])[0].get_ydata()) == pytest.approx(errors)
    assert "without augmentation" in texts(drawn[0])
    with pytest.raises(InputError, match="none of the 1 runs recorded its error on the plain training images"):
        fig6.draw([made_run(tmp_path / "other", "plain-20")], tmp_path, note="", clean=True)


def test_the_table_holds_every_record(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [made_run(tmp_path, "resnet-20", seed=seed, kinds=("train", "test", "train_clean")) for seed in (1, 0)]
    runs[0].append_metrics({"kind": "warmup_end", "step": 64_000, "lr": 0.1})
    *_, table = fig6.draw(runs, tmp_path, note="")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["network", "seed", "step", "kind", "error", "images"]
    assert {r["images"] for r in rows} == {"other"}  # nothing was recorded of them
    assert len(rows) == 2 * 3 * 32
    assert [(r["network"], r["seed"], r["step"], r["kind"]) for r in rows[:2]] == [
        ("ResNet-20", "0", "2000", "train"),
        ("ResNet-20", "0", "2000", "test"),
    ]
    recorded = [r["error"] for run in reversed(runs) for r in run.metrics() if r["kind"] != "warmup_end"]
    assert [float(r["error"]) for r in rows] == recorded


def test_the_table_names_the_images(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [made_run(tmp_path, "plain-20", data={"dataset": "synthetic"}), made_run(tmp_path, "resnet-20")]
    runs[1].write_json(ENVIRONMENT, {"data": {"official": True}})
    *_, table = fig6.draw(runs, tmp_path, note="")
    with table.open(newline="") as file:
        named = {(row["network"], row["images"]) for row in csv.DictReader(file)}
    assert named == {("plain-20", "synthetic"), ("ResNet-20", "official")}


def test_a_record_without_its_error_is_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    run = made_run(tmp_path, "resnet-20")
    for error in ("NaN", None, True):
        run.append_metrics({"kind": "test", "step": 64_000, "error": error})
    *_, table = fig6.draw([run], tmp_path, note="")
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 32


def test_other_configs_under_one_name_are_refused(tmp_path: Path) -> None:
    runs = [made_run(tmp_path, "resnet-20"), made_run(tmp_path, "resnet-20", seed=1, recipe={"lr": 0.2})]
    with pytest.raises(InputError, match=r"ResNet-20 .* differ in recipe\.lr: 0\.1 -> 0\.2"):
        fig6.draw(runs, tmp_path, note="")
    twin = made_run(tmp_path / "twin", "resnet-20")
    with pytest.raises(InputError, match="are both ResNet-20 with seed 0"):
        fig6.draw([runs[0], twin], tmp_path, note="")
    others = [made_run(tmp_path / str(n), "resnet-20", seed=1) for n in range(2)]
    with pytest.raises(InputError, match="are both ResNet-20 with seed 1"):
        fig6.draw([runs[0], *others], tmp_path, note="")
    how: dict[str, Any] = {"execution": {"device": "cpu"}, "output": {"log_every": 10}}  # how it runs may differ
    assert len(by_network([runs[0], made_run(tmp_path / "how", "resnet-20", seed=3, **how)])[0].runs) == 2


def test_equal_runs_give_equal_bytes_and_the_note_is_on_the_face(tmp_path: Path) -> None:
    runs = [made_run(tmp_path, model) for model in ("plain-20", "resnet-20")]
    one = fig6.draw(runs, tmp_path / "one", note=NOTE)
    other = fig6.draw(list(reversed(runs)), tmp_path / "other", note=NOTE)
    assert [path.name for path in one] == ["fig6.png", "fig6.svg", "fig6.csv"]
    for a, b in zip(one, other, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert f"<!-- {NOTE} -->" in one[1].read_text()
    assert "<dc:date>" not in one[1].read_text()


@pytest.mark.parametrize("ys", [[19.0] * 20 + [4.0] * 20, [3.0] * 40, [17.0] * 40, [10.0] * 40])
def test_a_legend_covers_no_curve(ys: list[float]) -> None:
    drawn = Figure(figsize=(3, 3), layout="constrained")
    axes = drawn.add_subplot()
    axes.set(xlim=(0, 40), ylim=(0, 20))
    axes.plot(range(40), ys, label="ResNet-20 (n = 5)")
    axes.axvline(30, gid=figure.ASIDE)
    figure.place_legend(axes)
    drawn.draw_without_rendering()
    legend = axes.get_legend()
    assert legend is not None
    box = legend.get_window_extent()
    assert not any(box.contains(*axes.transData.transform((x, y))) for x, y in enumerate(ys))
    assert axes.get_window_extent().contains(box.x0, box.y0)


def test_a_legend_may_cover_a_dotted_line() -> None:
    drawn = Figure(figsize=(3, 3), layout="constrained")
    axes = drawn.add_subplot()
    axes.set(xlim=(0, 40), ylim=(0, 20))
    axes.plot([0, 40], [3, 3], label="ResNet-20")
    axes.axvline(35, gid=figure.ASIDE)
    axes.axvline(5, gid=figure.ASIDE)
    figure.place_legend(axes)
    drawn.draw_without_rendering()
    legend = axes.get_legend()
    assert legend is not None
    box, panel = legend.get_window_extent(), axes.get_window_extent()
    assert box.x0 > (panel.x0 + panel.x1) / 2
    assert box.y0 > (panel.y0 + panel.y1) / 2


def test_a_legend_that_fits_nowhere_goes_below() -> None:
    drawn = Figure(figsize=(3, 3), layout="constrained")
    axes = drawn.add_subplot()
    axes.fill_between([0, 1], [0, 0], [20, 20])
    axes.plot([0, 1], [0, 20], label="ResNet-20")
    figure.place_legend(axes)
    drawn.draw_without_rendering()
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_window_extent().y1 < axes.get_window_extent().y0
