"""reproduce/table6.py and plan.py: the numbers of a row, what stands on its face, which runs are needed and reused."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastres.config import RunConfig, make_config
from fastres.configtree import merge
from fastres.console import Console
from fastres.errors import InputError, OutsideTolerance
from fastres.reproduce import table6
from fastres.reproduce.networks import note_of
from fastres.reproduce.paper import TABLE_6, differences
from fastres.reproduce.plan import in_order_of_work, plan_stages, runs_of
from fastres.rundir import RunDir

ERRORS = (0.0860, 0.0880, 0.0870, 0.0850, 0.0890)  # mean 0.0870, std 0.00158

RESULT_VALUES: dict[str, Any] = {
    "test_error": 0.08, "test_loss": 0.3, "best_test_error": 0.075, "best_step": 60_000, "train_error": 0.01,
    "class_errors": [0.08] * 10, "warmup_end": None, "num_parameters": 269_722,
    "images_per_second": 100_000.0, "step_milliseconds": {}, "peak_memory": 1, "side_by_side": 1,
    "seconds": {"train": 80.0},
}  # fmt: skip


def make_run(
    path: Path, config: RunConfig, error: float | None, *, official: bool = True, diverged: bool = False, **result: Any
) -> RunDir:
    """A run folder that says it ended with a test error; None leaves it unfinished."""
    run = RunDir.create(path)
    run.write_json("config.json", config.to_dict())
    data = {"name": "cifar10", "digest": "sha256:0", "official": official}
    run.write_json("environment.json", {"gpu": "GPU X", "cpu": "CPU", "precision": "bf16", "data": data})
    run.append_metrics({"kind": "train", "step": 100, "loss": 1.0, "error": 0.5, "lr": 0.1})
    if diverged:
        run.write_json("diverged.json", {"step": 100, "why": "NaN"})
    if error is not None:
        own: dict[str, Any] = {"test_error": error, "best_test_error": error - 0.005, "class_errors": [error] * 10}
        own["steps"] = config.recipe.steps
        run.write_json("result.json", {**RESULT_VALUES, **own, **result})
    return run


def make_net(folder: Path, arch: str, depth: int, errors: tuple[float | None, ...], **how: Any) -> list[RunDir]:
    model = {"arch": arch, "depth": depth}
    return [
        make_run(folder / f"{arch}{depth}-{k}", make_config(model=model, seed=k), error, **how)
        for k, error in enumerate(errors)
    ]


def test_a_row_by_hand(tmp_path: Path) -> None:
    (row,) = table6.rows_of(make_net(tmp_path, "resnet", 20, ERRORS))
    assert (row.network, row.parameters, row.n) == ("ResNet-20", 269_722, 5)
    assert row.mean == pytest.approx(0.0870)
    assert row.std == pytest.approx(math.sqrt(2.5e-6))  # of a sample: squares of 1, 1, 0, 2, 2 in 1e-3, over 4
    half = 2.776 * math.sqrt(2.5e-6 / 5)
    assert row.interval == pytest.approx((0.0870 - half, 0.0870 + half))
    assert (row.best, row.best_seed) == (0.0850, 3)
    assert row.paper == 0.0875
    assert row.delta == pytest.approx(-0.0005)
    assert row.verdict == "within the paper's spread"
    assert (row.seconds, row.images_per_second, row.machines) == (80.0, 100_000.0, ("GPU X, bf16",))
    assert [Path(run).name for run in row.runs] == [f"resnet20-{k}" for k in range(5)]


def test_precisions_are_told_where_they_differ(tmp_path: Path) -> None:
    runs = make_net(tmp_path, "resnet", 20, ERRORS)
    assert "bf16" not in note_of(runs)
    first = runs[1].read_json("environment.json")
    runs[1].write_json("environment.json", {**first, "resumed": [{"step": 50, **first, "precision": "fp32"}]})
    runs += make_net(tmp_path, "plain", 20, ERRORS)
    assert "ResNet-20 in bf16 and fp32" in note_of(runs)
    row, _ = table6.rows_of(runs)
    assert row.machines == ("GPU X, bf16", "GPU X, fp32")
    assert "GPU X, fp32" in table6.markdown([row], note="")
    runs[0].write_json("environment.json", {**first, "gpu": None, "cpu": ["by hand"], "precision": 1.5})
    assert "['by hand'], 1.5" in table6.rows_of(runs)[0].machines


def test_a_row_as_a_reader_sees_it(tmp_path: Path) -> None:
    (row,) = table6.rows_of(make_net(tmp_path / "many", "resnet", 20, ERRORS))
    assert table6.cells(row) == [
        "ResNet-20", "269,722", "5", "8.70 ± 0.16", "8.50 to 8.90", "8.50 (seed 3)", "8.75", "-0.05",
        "within the paper's spread", "80", "100,000",
    ]  # fmt: skip
    (row,) = table6.rows_of(make_net(tmp_path / "two", "resnet", 20, (0.08, 0.09)))
    assert table6.cells(row)[3:5] == ["8.50 ± 0.71", ""]
    (row,) = table6.rows_of(make_net(tmp_path / "none", "plain", 20, (None,)))
    assert table6.cells(row) == ["plain-20", "", "0 (1 unfinished)", "", "", "", "", "", "no finished run", "", ""]


def test_the_last_step_is_the_result_not_the_best(tmp_path: Path) -> None:
    (row,) = table6.rows_of(make_net(tmp_path, "resnet", 56, (0.07,)))  # its best_test_error is lower
    assert (row.mean, row.best) == (0.07, 0.07)


SPREAD = (-0.0012, -0.0005, 0.0, 0.0006, 0.0011)  # about 0, with a 95 % interval of 0.12 points to each side


@pytest.mark.parametrize(
    ("errors", "paper", "said"),
    [
        ((), 0.0875, "no finished run"),
        ((0.08, 0.08), 0.0875, "too few runs to say"),
        ((0.0896, 0.0896, 0.0896), 0.0875, "worse"),
        ((0.0854, 0.0854, 0.0854), 0.0875, "better"),
        ((0.06, 0.07, 0.0897), 0.0697, "too few runs to say"),  # 0.35 points worse, give or take 3.8
        ((0.05, 0.0697, 0.0797), 0.0697, "too few runs to say"),  # 0.32 points better, give or take 3.8
        ((0.065, 0.0875, 0.1101), 0.0875, "too few runs to say"),  # equal, give or take 5.6
        ((0.0865, 0.0875, 0.0885), 0.0875, "within the paper's spread"),  # 0.25
        ((0.0858, 0.0875, 0.0892), 0.0875, "too few runs to say"),  # 0.42
        ((0.5, 0.5, 0.5), None, "the paper prints no number"),
    ],
)
def test_verdicts(errors: tuple[float, ...], paper: float | None, said: str) -> None:
    assert table6.verdict(errors, paper) == said


@pytest.mark.parametrize("paper", [published.error for published in TABLE_6.values()])
def test_a_verdict_allows_its_tolerance_to_the_last_digit(paper: float) -> None:
    for off, said in (
        (0.002, "within the paper's spread"),
        (-0.002, "within the paper's spread"),
        (0.0021, "no better, perhaps worse"),  # so little worse may be chance
        (-0.0021, "no worse, perhaps better"),
        (0.0033, "worse"),
        (-0.0033, "better"),
    ):
        assert table6.verdict([paper + off + each for each in SPREAD], paper) == said


def test_numbers_are_the_papers() -> None:
    """Table 6 of He et al., CVPR 2016, in per cent."""
    printed = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.61, 1202: 7.93}
    assert {depth: round(100 * row.error, 6) for (_, depth), row in TABLE_6.items()} == printed
    row = TABLE_6["resnet", 110]
    assert (row.best, row.std) == (0.0643, 0.0016)


def test_student_not_gauss() -> None:
    assert table6.interval([0.1, 0.2]) is None
    low, high = table6.interval([0.1, 0.2, 0.3]) or (0, 0)
    half = 4.303 * 0.1 / 3**0.5
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-4)
    for freedom in (*range(2, 41), 60, 120, 1_000):
        t = table6._student(freedom)
        assert within(t - 0.001, freedom) < 0.95 < within(t + 0.001, freedom)


def within(t: float, freedom: int) -> float:
    """How likely Student's t lies between -t and t: the integral of its density."""
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    x = np.linspace(0, t, 20_001)
    return float(2 * norm * np.trapezoid((1 + x**2 / freedom) ** (-(freedom + 1) / 2), x))


def test_side_by_side_shares_the_clock(tmp_path: Path) -> None:
    (row,) = table6.rows_of(make_net(tmp_path, "resnet", 20, (0.08, 0.08), side_by_side=2))
    assert (row.seconds, row.images_per_second) == (40.0, 200_000.0)


def test_unfinished_and_diverged_runs_are_counted_and_do_not_count(tmp_path: Path) -> None:
    runs = make_net(tmp_path, "resnet", 20, (0.08, None))
    runs.append(make_run(tmp_path / "nan", make_config(seed=7), None, diverged=True))
    (row,) = table6.rows_of(runs)
    assert (row.n, row.unfinished, row.diverged, row.mean) == (1, 1, 1, 0.08)
    assert "1 unfinished, 1 diverged" in table6.cells(row)[2]


def test_runs_of_different_configs_in_one_row_are_refused(tmp_path: Path) -> None:
    runs = make_net(tmp_path, "resnet", 20, (0.08,))
    runs.append(make_run(tmp_path / "other", make_config(seed=1, recipe={"lr": 0.2}), 0.08))
    with pytest.raises(InputError, match=r"not of one config.*recipe\.lr"):
        table6.rows_of(runs)


@pytest.mark.parametrize(
    "changes", [{"recipe": {"steps": 100}}, {"data": {"dataset": "synthetic"}}, {"data": {"val_split": True}}]
)
def test_another_experiment_is_not_judged(tmp_path: Path, changes: dict[str, Any]) -> None:
    runs = [make_run(tmp_path / f"{seed}", make_config(seed=seed, **changes), 0.0875) for seed in range(5)]
    (row,) = table6.rows_of(runs)
    assert (row.verdict, row.delta) == ("not the paper's experiment", None)
    with pytest.raises(OutsideTolerance):
        table6.check([row])


def remade(run: RunDir, **data: Any) -> RunDir:
    """The run with another record of its images."""
    stored = run.read_json("environment.json")
    run.write_json("environment.json", {**stored, "data": {**stored["data"], **data}})
    return run


def test_other_images_are_named_and_no_proof(tmp_path: Path) -> None:
    runs = make_net(tmp_path, "resnet", 20, ERRORS, official=False)
    (row,) = table6.rows_of(runs)
    assert (row.verdict, row.caveat) == (
        "within the paper's spread",
        "the data set is not the official CIFAR-10 files",
    )
    assert "; not on the official files" in table6.cells(row)[8]
    with pytest.raises(OutsideTolerance, match="ResNet-20: the data set is not the official"):
        table6.check([row])
    remade(runs[1], digest="sha256:1")
    with pytest.raises(InputError, match="ResNet-20 did not have the same images"):
        table6.rows_of(runs)


def test_a_run_that_did_not_record_its_images(tmp_path: Path) -> None:
    runs = make_net(tmp_path, "resnet", 20, ERRORS)
    (runs[2].path / "environment.json").unlink()
    remade(runs[3], official=None)
    (row,) = table6.rows_of(runs)
    assert (row.n, row.caveat, row.machines) == (
        5, "which images were used was not recorded", ("GPU X, bf16", "machine not recorded"),
    )  # fmt: skip
    assert "which images were used was not recorded" in note_of(runs)
    with pytest.raises(OutsideTolerance, match="not recorded"):
        table6.check([row])


def test_a_damaged_result_is_counted_and_the_rest_stands(tmp_path: Path) -> None:
    runs = make_net(tmp_path, "resnet", 20, ERRORS)
    runs[0].write_json("result.json", {"test_error": "0.2"})
    (row,) = table6.rows_of(runs)
    assert (row.n, row.damaged, row.unfinished) == (4, 1, 0)
    assert table6.cells(row)[2] == "4 (1 damaged)"
    with pytest.raises(OutsideTolerance, match="ResNet-20: 1 damaged"):
        table6.check([row])


@pytest.mark.parametrize(
    ("model", "is_open", "changes"),
    [
        ({"depth": 110}, True, {"recipe": {"warmup": "error"}}),
        ({"depth": 110}, False, {"recipe": {"warmup": "none"}}),
        ({"depth": 20}, False, {"recipe": {"warmup": "constant"}}),
        ({"depth": 20}, True, {"recipe": {"lr_in_velocity": True}}),
        ({"depth": 20}, True, {"recipe": {"weight_decay_on": "weights"}}),
        ({"depth": 20}, True, {"model": {"norm_batch": 64}}),
        ({"depth": 20}, True, {"model": {"init": "fan_out"}}),
        ({"depth": 20}, True, {"model": {"pad": "after"}}),
        ({"depth": 20}, False, {"model": {"shortcut": "B"}}),
        ({"depth": 20}, False, {"data": {"val_split": True}}),
        ({"depth": 20}, False, {"data": {"augment": False}}),
        ({"depth": 20}, False, {"recipe": {"momentum": 0.8}}),
    ],
)
def test_what_is_the_papers_experiment(
    tmp_path: Path, model: dict[str, Any], is_open: bool, changes: dict[str, Any]
) -> None:
    config = make_config(**merge({"model": model}, changes))
    (found,) = differences(config)
    ((section, values),) = changes.items()
    assert (found.path, found.value, found.is_open) == (f"{section}.{next(iter(values))}", *values.values(), is_open)
    run = make_run(tmp_path / "run", config, 0.08)
    (row,) = table6.rows_of([run])
    assert (row.verdict == "not the paper's experiment") is not is_open
    assert ("where the paper leaves it open: " in note_of([run])) is is_open
    assert (row.choices == str(found)) is is_open
    assert (row.experiment == str(found)) is not is_open
    word = "validation" if "data" in changes and "val_split" in changes["data"] else "test"
    assert table6.heads([row])[3] == f"{word} error, %"


def test_a_note_names_the_networks_where_not_all_are_meant(tmp_path: Path) -> None:
    runs = make_net(tmp_path, "resnet", 20, (0.08, 0.08)) + make_net(tmp_path, "plain", 20, (0.1,), official=False)
    runs.append(make_run(tmp_path / "b", make_config(model={"depth": 32}, recipe={"steps": 64}), 0.2))
    assert note_of(runs) == (
        "the data set is not the official CIFAR-10 files (plain-20); "
        "not the paper's recipe: steps 64,000 -> 64 (ResNet-32)"
    )


def test_files(tmp_path: Path) -> None:
    runs = [
        *make_net(tmp_path / "runs", "plain", 20, (0.09,)),
        *make_net(tmp_path / "runs", "resnet", 110, (0.066, 0.066, 0.066)),
    ]
    rows = table6.rows_of(runs)
    written = table6.write(rows, tmp_path / "out", note="the data set is not the official CIFAR-10 files")
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    text = (tmp_path / "out/table6.md").read_text()
    assert text.startswith("**The data set is not the official CIFAR-10 files.**\n")
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:] == [
        "---", "ResNet-110", "plain-20",
    ]  # fmt: skip
    assert "6.61 ± 0.16 (best 6.43)" in text
    assert "[resnet110-0](../runs/resnet110-0)" in text
    assert "no result" in text  # the best seed is named as what it is
    assert "[resnet110-1](../runs/resnet110-1)" in text
    (header, first, second) = csv.reader((tmp_path / "out/table6.csv").read_text().splitlines())
    assert dict(zip(header, first, strict=True))["mean"] == "0.066"
    assert dict(zip(header, first, strict=True))["runs"].split("; ")[1] == "../runs/resnet110-1"
    assert dict(zip(header, second, strict=True))["paper"] == ""
    stored = json.loads((tmp_path / "out/table6.json").read_text())
    assert (stored["schema"], stored["rows"][0]["n"], stored["note"][:3]) == (2, 3, "the")
    assert stored["rows"][0]["runs"][0] == "../runs/resnet110-0"  # table and runs can move together


def test_check(tmp_path: Path) -> None:
    good = table6.rows_of(make_net(tmp_path, "resnet", 20, ERRORS) + make_net(tmp_path, "plain", 20, (0.5,)))
    table6.check(good)
    bad = table6.rows_of(make_net(tmp_path, "resnet", 32, (0.08, 0.08, 0.08)))
    with pytest.raises(OutsideTolerance, match="ResNet-32: worse") as caught:
        table6.check([*good, *bad])
    assert caught.value.exit_code == 6
    with pytest.raises(OutsideTolerance, match="too few"):
        table6.check(table6.rows_of(make_net(tmp_path, "resnet", 44, (0.07,))))
    with pytest.raises(OutsideTolerance, match="too few"):  # equal, give or take 5.6 points
        table6.check(table6.rows_of(make_net(tmp_path / "wide", "resnet", 20, (0.065, 0.0875, 0.1101))))
    (row,) = table6.rows_of(make_net(tmp_path / "low", "resnet", 20, (0.0837, 0.0844, 0.0828)))
    assert row.verdict == table6.NO_WORSE
    table6.check([row])
    with pytest.raises(OutsideTolerance, match="no network among them of which the paper prints a number"):
        table6.check(table6.rows_of(make_net(tmp_path / "plain", "plain", 20, (0.5,))))
    with pytest.raises(OutsideTolerance, match="2 of the runs not begun"):
        table6.check(good, num_missing=2)
    lost = make_net(tmp_path / "lost", "resnet", 20, (*ERRORS, None))
    with pytest.raises(OutsideTolerance, match="ResNet-20: 1 unfinished"):
        table6.check(table6.rows_of(lost))
    make_run(tmp_path / "lost/nan", make_config(seed=9), None, diverged=True)
    with pytest.raises(OutsideTolerance, match="ResNet-20: 1 unfinished, 1 diverged"):
        table6.check(table6.rows_of([*lost, RunDir(tmp_path / "lost/nan")]))


def test_what_a_reader_must_be_told(tmp_path: Path) -> None:
    assert note_of(make_net(tmp_path, "resnet", 110, (0.07,))) == ""  # its warm-up is the paper's
    unofficial = make_run(tmp_path / "a", make_config(), 0.1, official=False)
    assert note_of([unofficial]) == "the data set is not the official CIFAR-10 files"
    short = make_run(tmp_path / "b", make_config("fast", data={"val_split": True}), 0.2)
    assert "not the paper's recipe: steps 64,000 -> 3,910" in note_of([short])
    assert "tested on the other 5k" in note_of([short])
    built_in = make_run(tmp_path / "c", make_config("smoke"), 0.2, official=True)
    assert note_of([built_in]).startswith("synthetic data: not a result of the paper")


def test_the_order_of_the_work() -> None:
    every = [(arch, depth) for depth in (20, 32, 44, 56, 110) for arch in ("resnet", "plain")]
    seeds, one = [3, 1, 4], [7]
    stages = in_order_of_work(every, seeds, one)
    assert stages[:6] == [
        ("resnet", 20, seeds), ("resnet", 110, [3]), ("plain", 20, one),
        ("plain", 56, one), ("resnet", 56, seeds), ("resnet", 110, seeds),
    ]  # fmt: skip
    assert stages[-1] == ("plain", 110, one)  # on request: after all others
    assert in_order_of_work([("resnet", 1202), ("resnet", 20)], seeds, one) == [
        ("resnet", 20, seeds),
        ("resnet", 1202, seeds),
    ]


def test_needs_finds_runs_by_what_they_compute(tmp_path: Path) -> None:
    elsewhere = tmp_path / "old/sweep/mine"
    make_run(elsewhere, make_config(seed=1, execution={"precision": "fp32"}), 0.09)
    make_run(tmp_path / "other", make_config(seed=0, recipe={"lr": 0.2}), 0.09)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    (need,) = plan_stages([("resnet", 20, range(2))], tmp_path, "paper", {})
    assert list(need.folders) == [tmp_path / "resnet20/seed0", elsewhere]
    assert [run.path for run in runs_of([need])] == [elsewhere]


def test_a_folder_in_the_way_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "resnet20/seed0", make_config(seed=0, recipe={"lr": 0.2}), 0.09)
    with pytest.raises(InputError, match=r"run of another config \(recipe\.lr: 0\.2 -> 0\.1\)"):
        plan_stages([("resnet", 20, [0])], tmp_path, "paper", {})
    (tmp_path / "resnet20" / "seed0" / "config.json").write_text("rubbish")
    with pytest.raises(
        InputError, match=r"config\.json cannot be read.*: mv .*seed0 .*seed0\.old-1, then the same command"
    ):
        plan_stages([("resnet", 20, [0])], tmp_path, "paper", {})


def test_the_terminal_shows_it_in_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table6.rows_of(make_net(tmp_path, "resnet", 110, ERRORS))
    Console("lines").print(table6.terminal(rows))
    assert "8.70 ± 0.16" in capsys.readouterr().out
