"""bench/report.py, profiling.py, scaling.py and `fastres bench`: what is printed, written, compared and refused."""

import contextlib
import copy
import errno
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastres.bench import measure as bench
from fastres.bench import scaling
from fastres.bench.cells import Cell
from fastres.bench.measure import SCHEMA, Bench
from fastres.bench.parts import PARTS
from fastres.bench.profiling import STEPS, Kernel, Name, idle_between, idle_share, kernel_table, profile_cell
from fastres.bench.report import (
    check_place,
    compare,
    compare_reports,
    draw,
    footnote,
    read_json,
    tables,
    write_json,
)  # fmt: skip
from fastres.bench.roofline import Ceilings
from fastres.cli import run
from fastres.config import make_config
from fastres.data.synthetic import make_synthetic
from fastres.errors import InputError, MachineError, OutOfMemory
from tests.runs import tiny

Report = dict[str, Any]
TINY = shlex.split("--device cpu --depth 8 --batch-size 8 --rounds 8 --seconds 0.1 --threads 1 --precision fp32")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of a real measurement, as the command writes it."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    assert run(["bench", *TINY, "--loader", "resident,none", "--json", str(path)]) == 0
    return read_json(path)


def rendered(report: Report) -> str:
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(tables(report))
    return capture.get()


def slower(report: Report, factor: float) -> Report:
    changed = copy.deepcopy(report)
    for cell in changed["cells"]:
        cell["chunks"] = [factor * value for value in cell["chunks"]]
    return changed


def saved(report: Report, path: Path) -> Path:
    write_json(report, path)
    return path


# --- one report


def test_the_report_has_what_readers_count_on(report: Report) -> None:
    assert report["schema"] == SCHEMA == 1
    assert {"cpu", "gpu", "driver", "torch", "commit", "threads"} <= report["environment"].keys()
    assert set(report["ceilings"]) == {"fp32"}
    for cell in report["cells"]:
        assert set(cell) == {
            "label", "config", "digest", "frozen", "images_per_second", "step_seconds", "chunks", "compile_seconds",
            "peak_memory", "floor_seconds", "over_floor", "profiled_pass", "profiled_over_step", "joules_per_image",
            "joules_per_paper_run", "num_replicas", "resolved",
        }  # fmt: skip
        assert cell["resolved"]["precision"] == "fp32"
        whole = cell["step_seconds"]["median"]
        assert set(cell["profiled_pass"]) == {*PARTS, "gaps"}
        assert cell["profiled_over_step"] > 0
        assert cell["images_per_second"] == pytest.approx(8 / whole)
        assert cell["over_floor"] == pytest.approx(whole / cell["floor_seconds"])
        assert cell["config"]["recipe"]["batch_size"] == 8


def test_tables_fit_a_terminal_and_show_the_numbers(report: Report) -> None:
    text = rendered(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in text and "\u2026" not in text  # noqa: PT018
    first = report["cells"][0]
    row = next(line for line in text.splitlines() if line.startswith("ResNet8 resident"))
    assert f"{first['images_per_second']:,.0f}" in row
    assert f"{first['over_floor']:.2f}" in row


def test_the_footnote_has_the_conditions(report: Report) -> None:
    assert "first steps; batch 8, fp32" in footnote(report)
    other = json.loads(json.dumps(report))
    for cell, precision, native in zip(other["cells"], ("bf16", "fp32"), (True, False), strict=False):
        cell["resolved"] |= {"precision": precision, "native": native}
    assert "; batch 8, bf16 or fp32, fastres' own kernels or torch's.\n" in footnote(other)
    for cell in other["cells"]:
        del cell["resolved"]
    assert "first steps; batch 8.\n" in footnote(other)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_chart(report: Report, tmp_path: Path, ending: str) -> None:
    draw(report, tmp_path / f"chart.{ending}")
    content = (tmp_path / f"chart.{ending}").read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_files_that_cannot_be_written(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError):
        draw(report, tmp_path / "file" / "chart.png")
    with pytest.raises(MachineError):
        write_json(report, tmp_path / "file" / "report.json")


def test_a_place_where_nothing_can_be_written_is_said_before_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("measured"))
    for flag, name, code in (("--json", "gone/x.json", 3), ("--plot", "gone/x.png", 3), ("--json", ".", 2)):
        assert run(["bench", *TINY, flag, str(tmp_path / name)]) == code
        assert str(tmp_path) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_report_that_does_not_fit_leaves_the_one_before(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(report, tmp_path / "a.json")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"no room on the disk in"):
        write_json({**report, "cells": []}, path)
    assert read_json(path) == report
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_tree_that_differs_from_its_commit_is_told_from_it(report: Report) -> None:
    report = copy.deepcopy(report)
    for commit, differs in (("0123456789abcdef", False), ("0123456789abcdef+", True)):
        report["environment"]["commit"] = commit
        assert "commit 012345678" in rendered(report)
        assert ("commit 012345678+" in rendered(report)) == differs


def test_links_and_devices_stay_what_they_are(report: Report, tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(target)
    os.mkfifo(pipe)
    check_place(link)
    check_place(pipe)
    write_json(report, link)
    assert link.is_symlink()
    assert read_json(target) == report
    with os.fdopen(os.open(pipe, os.O_RDWR), "rb", buffering=0) as end:
        write_json({"schema": 1}, pipe)
        assert json.loads(end.read(100)) == {"schema": 1}
    assert pipe.is_fifo()


def test_a_cell_of_which_the_profiled_pass_took_otherwise_is_marked(report: Report) -> None:
    report = copy.deepcopy(report)
    for off, marked in ((1.02, False), (0.96, True)):
        for cell in report["cells"]:
            cell["profiled_over_step"] = off
        assert (f"{off:.2f}*" in rendered(report)) == marked
        assert ("*: more than 3% off" in footnote(report)) == marked


def test_labels_of_a_wide_spread_are_in_the_chart(report: Report, tmp_path: Path) -> None:
    report = copy.deepcopy(report)
    for cell in report["cells"]:
        cell["step_seconds"]["p5"] = cell["step_seconds"]["median"] / 4
    draw(report, tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text().count("x the floor)") == len(report["cells"])


def test_json_on_stdout_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *TINY, "--loader", "none", "--json", "-"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["schema"] == SCHEMA
    assert len(out.splitlines()) == 1  # the tables are on stderr


# --- two of them


def test_reports_are_compared_cell_by_cell(report: Report) -> None:
    same = compare_reports(report, report)
    assert list(same) == ["ResNet8 resident", "ResNet8 frozen batch"]
    assert all(c.low <= 1 <= c.high and c.verdict in ("no difference", "undecided") for c in same.values())
    found = compare_reports(report, slower(report, 3))
    assert list(found) == ["ResNet8 resident", "ResNet8 frozen batch"]
    for comparison in found.values():
        assert comparison.ratio == pytest.approx(3)


def test_unpaired_rounds_are_drawn_apart() -> None:
    """Rounds that swing together say nothing where the two were measured at different times."""
    a = [1.0, 1.3, 0.8, 1.1, 0.9, 1.2]
    b = [1.05 * value for value in a]
    assert compare(a, b, paired=True).verdict == "slower"
    assert compare(a, b, paired=False).verdict == "undecided"


@pytest.mark.parametrize("key", ["gpu", "driver", "cpu", "cpu_id", "cores", "threads", "platform"])
def test_other_machines_are_refused(report: Report, key: str) -> None:
    other = copy.deepcopy(report)
    other["environment"][key] = "another"
    with pytest.raises(InputError, match=f"different machines \\({key}: .* and another\\)"):
        compare_reports(report, other)


def test_reports_without_a_common_cell(report: Report) -> None:
    other = copy.deepcopy(report)
    for cell in other["cells"]:
        cell["label"] += " x"
    with pytest.raises(InputError, match="no cell in common"):
        compare_reports(report, other)


def test_compare_files_and_fail(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steady = copy.deepcopy(report)
    for cell in steady["cells"]:
        cell["chunks"] = [0.01] * 8
    a, b = saved(steady, tmp_path / "a.json"), saved(slower(steady, 1.1), tmp_path / "b.json")
    assert run(["bench", "--compare", str(a), str(b)]) == 0
    assert "ResNet8 resident: slower (+10.0 % time a step" in capsys.readouterr().out
    assert run(["bench", "--compare", str(a), str(b), "--fail-if-slower", "12%"]) == 0
    assert run(["bench", "--compare", str(a), str(b), "--fail-if-slower", "5%"]) == 6
    assert "ResNet8 resident by 10.0 % or more" in capsys.readouterr().err
    assert run(["bench", "--compare", str(b), str(a), "--fail-if-slower", "0"]) == 0


def test_a_cell_that_only_one_report_has_is_named(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = copy.deepcopy(report)
    for cell in report["cells"]:
        cell["chunks"] = [0.01] * 8
    fewer = copy.deepcopy(report)
    lost = fewer["cells"].pop()["label"]
    fewer["cells"][0]["resolved"]["native"] = "no"
    del report["cells"][0]["resolved"]["layer_kernels"]  # as reports were before there were any
    fewer["cells"][0]["resolved"]["layer_kernels"] = True
    paths = [str(saved(report, tmp_path / "a.json")), str(saved(fewer, tmp_path / "b.json"))]
    assert run(["bench", "--compare", *paths]) == 0
    printed = capsys.readouterr().out
    assert f"only in the first report: {lost}" in printed
    assert "ran otherwise: layer_kernels False and True, native " in printed
    assert run(["bench", "--compare", *paths, "--fail-if-slower", "1%"]) == 2
    assert "--fail-if-slower needs the same cells" in capsys.readouterr().err


def test_configs_are_compared_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, batch_size in (("small", 2), ("large", 64)):
        path = tmp_path / f"{name}.toml"
        path.write_text(tiny(tmp_path, recipe={"batch_size": batch_size}).to_toml())
    names = [str(tmp_path / f"{name}.toml") for name in ("small", "large")]
    line = ["bench", "--compare", *names, "--rounds", "8", "--seconds", "0.3", "--fail-if-slower", "20"]
    assert run(line) == 6
    assert "large: slower" in capsys.readouterr().out
    assert run([*line[:-2], "--json", "-"]) == 0
    (json_line,) = capsys.readouterr().out.splitlines()  # all else is on stderr
    assert json.loads(json_line)["comparison"]["large"]["verdict"] == "slower"
    assert run([*line[:4], "--rounds", "7"]) == 2
    assert "7 rounds are too few" in capsys.readouterr().err


def test_other_work_and_too_few_rounds_are_refused(report: Report) -> None:
    """A label names only what varied in its own report: here both are "ResNet8 resident"."""
    other = copy.deepcopy(report)
    other["cells"][0]["config"]["recipe"]["batch_size"] = 16
    with pytest.raises(InputError, match=r"ResNet8 resident is other work in the second report \(batch_size: 8 -> 16"):
        compare_reports(report, other)
    other = copy.deepcopy(report)
    del other["cells"][1]["chunks"][7:]
    with pytest.raises(InputError, match="7 rounds are too few"):
        compare_reports(report, other)


# --- profile and scaling


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_profile_cuts_names_and_never_numbers(width: int) -> None:
    stem = "graph_0_cpp_fused__native_batch_norm_legit_functional_add_convolution_relu_threshold_backward_" * 3
    spent = [Kernel(f"{stem}{k}", 1_234, k / 1e3) for k in (3, 2, 1)] + [Kernel("aten::mm", 1, 5e-8)]
    console = Console(width=width, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(kernel_table(spent, "operator"))
    head, *rows = capture.get().splitlines()
    assert head.split() == ["ms/step", "share", "calls/step", "operator"]
    assert [row.split()[:4] for row in rows] == [
        ["3", "50.0", "%", "1,234"],
        ["2", "33.3", "%", "1,234"],
        ["1", "16.7", "%", "1,234"],
        ["5e-05", "0.0", "%", "1"],
    ]
    assert [row.rstrip()[-1] for row in rows] == ["3", "2", "1", "m"]  # by which kernels that begin alike are known
    assert all(len(row) <= width for row in rows)


def test_profile(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    title, table = profile_cell(Cell("tiny", tiny(tmp_path), frozen=True), trace, say=lambda _: None)
    assert capfd.readouterr() == ("", "")  # nor does the profiler's library speak
    assert "ms a step" in title
    assert table.row_count == 10
    names = [name.whole for name in table.columns[-1].cells if isinstance(name, Name)]
    calls = dict(zip(names, table.columns[2].cells, strict=True))
    assert calls["aten::mkldnn_convolution"] == "7"  # depth 8: that many 3x3 layers
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mkldnn_convolution" for event in events) == 7 * STEPS
    (tmp_path / "file").touch()
    with pytest.raises(MachineError):
        profile_cell(Cell("tiny", tiny(tmp_path), frozen=True), tmp_path / "file" / "x.json", say=lambda _: None)


def test_idle_is_what_no_kernel_of_any_stream_covers() -> None:
    assert idle_share([(0, 4), (6, 8), (1, 2), (7, 10)]) == pytest.approx(0.2)
    assert idle_share([(0, 1), (1, 3)]) == 0


def test_idle_between_steps_is_not_that_within_them() -> None:
    steps = [(0, 2, "a"), (3, 5, "b"), (3.5, 4, "c"), (7, 8, "a"), (8, 9, "b"), (8, 10, "c")]  # 2 of 10, from 5 to 7
    assert idle_between(reversed(steps), 2) == pytest.approx(0.2)
    assert idle_between([(0, 1, "a"), (1, 2, "a")], 2) == 0
    assert idle_between([*steps, (11, 12, "a")], 2) is None  # not the same number in each
    assert idle_between([*steps[:5], (8, 10, "dali")], 2) is None  # not the same ones


def test_scaling_takes_the_flags_that_say_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def noted(cells: list[Cell], **_: Any) -> Any:
        (cell,) = cells
        how = cell.config.execution
        seen.append((cell.config.recipe.batch_size, how.precision, how.loader, cell.frozen))
        raise OutOfMemory("enough")

    monkeypatch.setattr(scaling, "measure", noted)
    for wrong in ("--depth 8,21", "--depth 8 --batch-size 8,60000"):  # before minutes are spent on the first
        assert run(["bench", "--scaling", "--device", "cpu", "--loader", "resident", *wrong.split()]) == 2
    assert not seen
    line = "--scaling --depth 8 --batch-size 8,16 --precision bf16 --loader none --device cpu"
    assert run(["bench", *line.split()]) == 4  # nothing fits
    assert seen == [(8, "bf16", "resident", True)]
    assert run(["bench", "--scaling", "--arch", "imagenet", "--device", "cpu", "--loader", "resident"]) == 4


def test_scaling_stops_where_memory_or_patience_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    ceilings: list[object] = []

    def ceiling(*_: object) -> Ceilings:
        ceilings.append(_)
        return Ceilings(1e12, 1e12)

    monkeypatch.setattr("fastres.bench.measure.measure_ceilings", ceiling)

    def little_memory(cells: list[Cell], **how: Any) -> Any:
        if cells[0].config.recipe.batch_size > 16:
            raise OutOfMemory("out of memory")
        return bench.measure(cells, **how | {"chunk_seconds": 0.01})

    monkeypatch.setattr(scaling, "measure", little_memory)
    base = tiny(tmp_path)
    found = scaling.measure_scaling(base, [14, 8], [16, 8, 32], step_seconds=60, rounds=1, say=said.append)
    labels = [cell["label"] for cell in found["cells"]]
    assert labels == ["ResNet8 batch 8", "ResNet8 batch 16", "ResNet14 batch 8", "ResNet14 batch 16"]
    assert sum("from 32 on left out, out of memory" in line for line in said) == 2
    assert len(ceilings) == 1  # of the machine, not of each cell
    scaling.draw_scaling(found, tmp_path / "scaling.svg")
    assert "ResNet14" in (tmp_path / "scaling.svg").read_text()
    found = scaling.measure_scaling(base, [8], [8, 16], step_seconds=1e-6, rounds=1, say=said.append)
    assert [cell["label"] for cell in found["cells"]] == ["ResNet8 batch 8"]
    assert "would take over" in said[-1]


def test_what_deterministic_mode_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert run(["bench", *TINY, "--loader", "none", "--deterministic", "both", "--json", str(path)]) == 0
    cells = read_json(path)["cells"]
    assert [cell["config"]["execution"]["deterministic"] for cell in cells] == [False, True]
    out = capsys.readouterr().out
    assert "ResNet8 frozen batch deterministic: " in out
    assert "--deterministic changes nothing on a CPU" in out


# --- bad input

BAD = {
    "--loader tape": "'tape'; it must be one of dali, resident, torchvision, none",
    "--depth 21": "21",
    "--depth twenty": "write numbers as 20,56",
    "--depth ,": "must name at least one",
    "--loader ,": "must name at least one",
    "--batch-size 0": "batch_size is 0",
    "--precision fp8": "fp8",
    "--compile maybe": "auto, on, off, both",
    "--deterministic auto": "off, on, both",
    "--deterministic both --rounds 3": "too few",
    "--rounds 0": "--rounds is 0",
    "--seconds nan": "--seconds is nan",
    "--plot chart.pdf": ".png or .svg",
    "--fail-if-slower 5%": "needs --compare",
    "--profile --scaling": "contradict",
    "--dataset synthetic --data-dir x": "--data-dir does nothing with built-in data",
    "--dataset nonsense --data-dir x": "nonsense",
    "--profile --json x.json": "--json does nothing beside --profile",
    "--profile --depth 8,20": "--profile times one cell; give one --depth",
    "--scaling --precision fp32,bf16": "--scaling times one cell; give one --precision",
    "--scaling --rounds 3": "--rounds does nothing beside --scaling",
    "--trace x.json": "--trace does nothing beside a table; --profile writes a trace",
    "--compare a.toml b.toml --depth 56": "--depth does nothing beside --compare; the two configs say",
    "--compare a.json b.json --json c.json": "two reports are only compared",
    "--compare a.json b.json --rounds 9": "--rounds does nothing beside two reports",
    "--compare a.json b.toml": "two configs (.toml) or two reports (.json)",
    "--compare a.json b.json": "a.json cannot be read",
    "--compare a.toml b.toml": "a.toml cannot be read",
    "--compare a.json b.json --fail-if-slower much": "write a percentage",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", *shlex.split(line)]) == 2
    err = capsys.readouterr().err
    assert BAD[line] in err
    assert err.count("\n") <= 2


def test_no_gpu_asked_for_by_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(["bench", "--device", "cuda"]) == 3
    assert "finds no CUDA GPU" in capsys.readouterr().err


def test_a_dali_that_does_not_start_is_left_out_unless_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ImportError("libdali.so: undefined symbol")

    monkeypatch.setattr("fastres.data.dali.dali_available", lambda: True)
    monkeypatch.setattr("fastres.data.dali._pipeline", fails)
    assert run(["bench", *TINY, "--loader", "dali"]) == 3
    assert "DALI does not start: libdali.so: undefined symbol" in capsys.readouterr().err
    assert run(["bench", *TINY, "--json", str(tmp_path / "report.json")]) == 0
    assert "leaving out the dali loader: DALI does not start" in capsys.readouterr().out
    cells = json.loads((tmp_path / "report.json").read_text())["cells"]
    assert [cell["label"] for cell in cells] == ["ResNet8 resident", "ResNet8 frozen batch"]
    config = make_config(execution={"device": "cpu", "threads": 1}, model={"depth": 8})
    monkeypatch.setattr("fastres.build.loader_kind", lambda *_: "dali")  # as "auto" is on a GPU
    said: list[str] = []
    with contextlib.closing(Bench(Cell("a", config), make_synthetic(), num_steps=20, say=said.append)) as bench:
        assert bench.replica.loader.name == "resident"
    assert said[0].startswith("taking the resident loader: DALI does not start")


REPORT = '{"schema": 1, "environment": {}, "cells": %s}'
SOUND = '{"model": {}, "recipe": {"batch_size": 8}}'
CELL = '[{"label": %s, "config": %s, "step_seconds": {}, "chunks": %s}]'
CHUNKS = CELL % ('"a"', SOUND, "%s")
NO_REPORTS = ["", "[]", "{}", '{"schema": 99, "environment": {}, "cells": []}', "\x00", "[" * 100_000]
NO_REPORTS += [
    REPORT % cells
    for cells in ("1", "[1]", "[{}]", *(CHUNKS % c for c in ("1", "[]", "[null]", "[-1.0]", "[Infinity]")))
]
NO_REPORTS += [
    REPORT % (CELL % found) for found in (('["a"]', SOUND, "[0.1]"), ('"a"', "{}", "[0.1]"), ('"a"', "[]", "[0.1]"))
]
NO_REPORTS += ['{"schema": true, "environment": {}, "cells": []}']


@pytest.mark.parametrize("content", NO_REPORTS)
def test_files_that_are_no_reports(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(
        InputError, match=r"a\.json (cannot be read|is not a benchmark report|has schema (99|True)|is damaged)"
    ):
        read_json(path)


def test_a_larger_batch_is_foreseen_from_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of a batch of 8 makes two of 16, which are few enough, and four of 32."""

    def measured(cells: list[Cell], **_: Any) -> Any:
        size = cells[0].config.recipe.batch_size
        return {"cells": [{"label": cells[0].label, "step_seconds": {"median": size / 8}, "images_per_second": 8.0}]}

    monkeypatch.setattr(scaling, "measure", measured)
    found = scaling.measure_scaling(tiny(tmp_path), [8], [8, 16, 32], step_seconds=3, say=lambda _: None)
    assert [cell["label"] for cell in found["cells"]] == ["ResNet8 batch 8", "ResNet8 batch 16"]
