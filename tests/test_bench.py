"""bench/: what is timed is the training step, what is counted is right, verdicts are seldom wrong."""

import contextlib
import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastres.bench import measure as bench
from fastres.bench import roofline
from fastres.bench.cells import Cell, matrix
from fastres.bench.measure import Bench, _alive, _Chunks, measure
from fastres.bench.parts import PARTS
from fastres.bench.report import compare
from fastres.bench.roofline import Ceilings, Work, measure_ceilings, work_of
from fastres.cli.bench import COMPARED_ROUNDS
from fastres.data.dali import DaliLoader, dali_available
from fastres.data.synthetic import make_synthetic
from fastres.data.table import TableLoader
from fastres.models.cifar import CifarNet
from fastres.runtime import Runtime
from fastres.step import Replica, TrainStep
from tests.runs import tiny
from tests.test_step import one_thread  # noqa: F401 (a fixture for the whole file)

CPU = torch.device("cpu")


# --- roofline


def test_work_of_resnet20_counted_by_hand() -> None:
    """Section 4.2's ResNet-20: 3->16 at 32x32, then 6, 1+5 and 1+5 convolutions at 32x32, 16x16 and 8x8."""
    stem, fc = 1024 * 16 * 3 * 9, 640
    rest = 6 * 1024 * 16 * 16 * 9
    rest += 256 * 32 * 16 * 9 + 5 * 256 * 32 * 32 * 9
    rest += 64 * 64 * 32 * 9 + 5 * 64 * 64 * 64 * 9
    outputs = 7 * 1024 * 16 + 6 * 256 * 32 + 6 * 64 * 64
    work = work_of(CifarNet(20), 128, 2)
    assert round((stem + rest + fc) / 1e6, 1) == 40.6
    assert work.multiply_adds == 128 * (2 * stem + 3 * rest + 3 * fc)
    assert work.bytes_moved == 128 * 2 * (5 * outputs + 2 * 3072) + 32 * 269_722


@pytest.mark.parametrize("depth", [20, 110])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_work_is_what_torch_counts(depth: int, shortcut: str) -> None:
    with torch.device("meta"):
        net = CifarNet(depth, shortcut="A" if shortcut == "A" else "B")
        images = torch.zeros(2, 3, 32, 32)
        with FlopCounterMode(display=False) as counter:
            net(images).sum().backward()
    assert 2 * work_of(net, 2, 4).multiply_adds == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    ceilings = Ceilings(multiply_adds_per_second=100.0, bytes_per_second=10.0)
    assert ceilings.floor(Work(200, 10)) == 2
    assert ceilings.floor(Work(200, 50)) == 5


def test_ceilings_are_measured() -> None:
    found = measure_ceilings(CPU, torch.float32)
    assert 1e9 < found.multiply_adds_per_second < 1e14
    assert 1e8 < found.bytes_per_second < 1e14


# --- timing


def cell(path: Path, label: str = "tiny", *, frozen: bool = False) -> Cell:
    return Cell(label, tiny(path, recipe={"steps": 24}), frozen=frozen)


def test_what_is_timed_is_the_training_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    step = Replica.step

    def counted(self: Replica) -> None:
        taken.append(int(self.counter))
        step(self)

    monkeypatch.setattr(Replica, "step", counted)
    one = Bench(cell(tmp_path), make_synthetic(), num_steps=100)
    assert one.run(7) > 0
    parts = one.parts(5)
    assert taken == list(range(bench.FIRST_STEPS + 12 + 4 * bench.COLD_STEPS))
    assert set(parts) == {*PARTS, "gaps"}
    assert min(parts.values()) > 0
    assert one.run(3) > 0  # the stopwatches are gone
    assert "forward" not in vars(one.replica)
    one.close()


def test_parts_and_gaps_make_up_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the parts move, so that every second has its place."""
    now = 0.0
    takes: dict[str, float] = {"forward": 3, "backward": 6, "update": 1, "log": 0.5, "load": 2, "prepare": 0.25}

    def moving(owner: type, name: str, seconds: float) -> None:
        method = getattr(owner, name)

        def moved(*args: Any) -> Any:
            nonlocal now
            result = method(*args)
            now += seconds
            return result

        monkeypatch.setattr(owner, name, moved)

    for name, seconds in takes.items():
        moving(TableLoader if name in ("load", "prepare") else Replica, name, seconds)
    moving(TrainStep, "__call__", 0.125)  # the host, between two steps
    monkeypatch.setattr("fastres.bench.parts.perf_counter", lambda: now)
    one = Bench(cell(tmp_path), make_synthetic(), num_steps=100)
    assert one.run(4) == 12.875
    parts = one.parts(4)
    assert parts == {"load": 2.25, "forward": 3, "backward": 6, "update": 1, "log": 0.5, "gaps": 0.125}
    assert one.run(4) == sum(parts.values())
    one.close()


def test_cells_take_turns_and_the_report_is_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    timed = Bench.timed

    def noted(self: Bench, num_steps: int) -> float:
        order.append(self.cell.label)
        return timed(self, num_steps)

    monkeypatch.setattr(Bench, "timed", noted)
    cells = [cell(tmp_path, "a"), cell(tmp_path, "b", frozen=True)]
    report = measure(cells, rounds=3, chunk_seconds=0.01, say=lambda _: None)
    assert "".join(order[4:]) == "abbaab"
    assert json.loads(json.dumps(report)) == report
    assert report["schema"] == bench.SCHEMA
    assert [c["label"] for c in report["cells"]] == ["a", "b"]
    for found in report["cells"]:
        assert found["step_seconds"]["n"] == len(found["chunks"]) == 3
        assert found["step_seconds"]["median"] == sorted(found["chunks"])[1]
        assert found["images_per_second"] == 16 / found["step_seconds"]["median"] > 0
        assert found["over_floor"] > 1  # nothing is faster than the machine
        assert found["step_seconds"]["p5"] <= found["step_seconds"]["median"] <= found["step_seconds"]["p95"]


def test_each_cell_runs_with_its_own_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a switch of the whole process, which the last cell that was built would set for all."""
    seen: dict[str, set[int]] = {"1": set(), "2": set()}
    update = Replica.update

    def noted(self: Replica) -> None:
        seen[str(running[-1])].add(torch.get_num_threads())
        update(self)

    running: list[str] = []
    for name in ("warm", "parts"):
        method = getattr(Bench, name)

        def watched(self: Bench, num_steps: int, method: Any = method) -> Any:
            running.append(self.cell.label)
            return method(self, num_steps)

        monkeypatch.setattr(Bench, name, watched)
    monkeypatch.setattr(Replica, "update", noted)
    ceilings = Ceilings(1e9, 1e9)

    def measured(*_: object) -> Ceilings:
        of.append(torch.get_num_threads())
        return ceilings

    of: list[int] = []
    monkeypatch.setattr("fastres.bench.measure.measure_ceilings", measured)
    cells = [Cell(label, tiny(tmp_path, execution={"threads": int(label)})) for label in seen]
    report = measure(cells, rounds=2, chunk_seconds=0.01, say=lambda _: None)
    assert seen == {"1": {1}, "2": {2}}
    assert of == [1, 2]
    assert list(report["ceilings"]) == ["fp32, threads 1", "fp32, threads 2"]


def test_a_cell_takes_more_steps_than_its_logs_have_places(tmp_path: Path) -> None:
    one = Bench(cell(tmp_path), make_synthetic(), num_steps=30)
    for _ in range(4):
        one.run(12)
        one.parts(2)
        assert int(one.replica.counter) == one.done <= 30
    one.close()


def test_batches_made_in_anothers_turn_are_used_up_before_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that the steps alone move, of which those after a pause are quick, as many as there are batches."""
    one = Bench(cell(tmp_path), make_synthetic(), num_steps=100)
    now, rested = 0.0, 3
    step = TrainStep.__call__

    def moved(self: TrainStep, *args: Any) -> int:
        nonlocal now, rested
        now, rested = now + (rested <= 0), rested - 1
        return step(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", moved)
    monkeypatch.setattr("fastres.bench.parts.perf_counter", lambda: now)
    assert one.run(4) == 0.5
    rested = 3
    monkeypatch.setattr(one.replica.loader, "prefetched", 3, raising=False)
    assert one.run(4) == 1
    one.close()


def test_chunks_are_whole_periods_of_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI makes 4,096 images at a time: a chunk of fewer steps would have all of that work in it, or none."""
    one = Bench(cell(tmp_path), make_synthetic(), num_steps=100)
    assert [one.whole_periods(steps) for steps in (0.1, 1, 2.4)] == [1, 1, 2]
    monkeypatch.setattr(one.replica.loader, "period", 32, raising=False)
    assert [one.whole_periods(steps) for steps in (0.1, 40, 50)] == [32, 32, 64]
    one.close()


def test_fewer_rounds_where_they_would_take_too_long(tmp_path: Path) -> None:
    def rounds(max_seconds: float) -> int:
        report = measure([cell(tmp_path)], rounds=5, chunk_seconds=0.01, max_seconds=max_seconds, say=lambda _: None)
        return len(report["cells"][0]["chunks"])

    assert (rounds(60), rounds(0)) == (5, bench.LEAST_ROUNDS)


def test_several_replicas_are_networks_of_their_own(tmp_path: Path) -> None:
    one = Bench(dataclasses.replace(cell(tmp_path), num_replicas=2), make_synthetic(), num_steps=100)
    first, second = (replica.net.state_dict()["conv1.weight"] for replica in one.replicas)
    assert not torch.equal(first, second)
    one.run(3)
    assert [int(replica.counter) for replica in one.replicas] == [bench.FIRST_STEPS + 3 + 2 * bench.COLD_STEPS] * 2
    assert one.images == 2 * 16
    one.close()


def test_matrix_is_all_combinations(tmp_path: Path) -> None:
    cells = list(matrix(tiny(tmp_path), {"depth": [8, 20], "loader": ["resident", "none"]}))
    assert [c.label for c in cells] == [
        "ResNet8 resident",
        "ResNet8 frozen batch",
        "ResNet20 resident",
        "ResNet20 frozen batch",
    ]
    assert [c.config.model.depth for c in cells] == [8, 8, 20, 20]
    assert [c.frozen for c in cells] == [False, True, False, True]
    assert all(c.config.execution.loader == "resident" for c in cells)
    both = matrix(tiny(tmp_path), {"compile": [True, False], "batch_size": [16, 32], "precision": ["fp32"]})
    assert [c.label for c in both][:2] == ["ResNet8 compile batch 16", "ResNet8 compile batch 32"]
    own, torchs = matrix(tiny(tmp_path), {"native": [True, False]})
    assert (own.label, torchs.label) == ("ResNet8 native", "ResNet8 no native")
    assert (own.config.execution.native, torchs.config.execution.native) == (True, False)


# --- comparison: 200 resamplings of recorded timings


RECORDED = json.loads(Path(__file__).with_name("recorded_timings.json").read_text())
STEPS = {"idle": 3, "busy": 4}  # in a chunk, as `--compare` takes by default of such cells


def resampled(chance: random.Random, machine: str, factor: float) -> tuple[list[float], list[float]]:
    """As many rounds as `--compare` takes, of chunks of recorded steps; which of the two equal cells is A is chance."""
    steps, sides = STEPS[machine], (RECORDED[machine]["a"], RECORDED[machine]["b"])
    found: tuple[list[float], list[float]] = [], []
    for _ in range(COMPARED_ROUNDS):
        start = chance.randrange(len(sides[0]) - steps + 1)
        one, other = (sum(side[start : start + steps]) / steps for side in chance.sample(sides, 2))
        found[0].append(one)
        found[1].append(factor * other)
    return found


@pytest.mark.parametrize("machine", ["idle", "busy"])
@pytest.mark.parametrize(
    ("factor", "verdicts"), [(1.0, {"no difference", "undecided"}), (1.05, {"slower"}), (1 / 1.05, {"faster"})]
)
def test_verdicts(machine: str, factor: float, verdicts: set[str]) -> None:
    chance = random.Random(1)
    found = [compare(*resampled(chance, machine, factor), paired=True).verdict for _ in range(200)]
    assert sum(verdict in verdicts for verdict in found) >= 0.97 * 200
    if (machine, factor) == ("idle", 1.0):  # a busy one's interval is wider than one per cent
        assert found.count("no difference") >= 0.9 * 200


def test_a_comparison_says_how_sure_it_is() -> None:
    same = compare([1.0] * 10, [1.1] * 10, paired=True)
    assert (same.ratio, same.low, same.high, same.verdict) == (1.1, 1.1, 1.1, "slower")
    assert compare([1.0] * 10, [1.009] * 10, paired=True).verdict == "no difference"  # sure, and too little to matter
    noisy = compare([1.0, 1.0, 1.0, 1.0], [0.5, 2.0, 1.0, 1.2], paired=True)
    assert noisy.low < 1 < noisy.high
    assert noisy.verdict == "undecided"


@pytest.mark.skipif(not dali_available(), reason="DALI is not installed")
def test_replicas_on_frozen_batches_of_one_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[DaliLoader] = []

    def close(loader: DaliLoader) -> None:
        closed.append(loader)

    monkeypatch.setattr(DaliLoader, "close", close)
    base = tiny(tmp_path, recipe={"steps": 24}, execution={"loader": "dali"})
    alive = Bench(Cell("two", base, frozen=True, num_replicas=2), make_synthetic(), num_steps=24)
    batches = [replica.loader.load(replica.counter)[0] for replica in alive.replicas]
    assert not torch.equal(*batches)
    assert closed  # its threads would go on beside what is timed
    alive.close()


def test_the_floor_of_a_launch() -> None:
    assert Ceilings(100.0, 10.0, launch_seconds=3.0).floor(Work(200, 10)) == 3
    assert Ceilings(100.0, 10.0, launch_seconds=3.0).floor(Work(400, 10)) == 4


def test_ceilings_count_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: a product of 2048 x 2048, a convolution of 16 maps, a copy of 256 MB read and written."""
    for of_product, best in ((1.0, 2048**3), (1e3, 16 * 1024 * 64 * 64 * 9)):
        seconds = iter([of_product, 1.0, 0.5])
        monkeypatch.setattr(roofline, "_best", lambda *_, seconds=seconds: next(seconds))
        assert measure_ceilings(torch.device("cpu"), torch.float32) == Ceilings(best, 2 * 4 * 2**26 / 0.5)


def test_the_best_of_some_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two are thrown away, as is the slower half of the rest."""
    times = [0.0]
    for seconds in (0.1, 0.2, 9.0, 3.0, 8.0, 4.0, 7.0, 5.0, 6.0):
        times += [times[-1] + seconds, times[-1] + seconds]
    clock = iter(times)
    monkeypatch.setattr(roofline, "perf_counter", lambda: next(clock))
    assert roofline._best(lambda: None, CPU) == pytest.approx(4.5)  # of 3, 4, 5, 6


def test_what_a_report_makes_of_its_chunks(tmp_path: Path) -> None:
    one: Any = SimpleNamespace(
        cell=cell(tmp_path), runtime=Runtime(CPU, "fp32"), work=Work(200, 10), images=32, compile_seconds=1.0,
        peak_memory=None,
    )  # fmt: skip
    parts = [dict.fromkeys((*PARTS, "gaps"), 0.5) for _ in range(3)]
    found = _Chunks(one, 10, [2.0, 4.0, 2.5], parts, joules=96.0).report(Ceilings(100.0, 10.0))
    assert (found["images_per_second"], found["over_floor"]) == (32 / 2.5, 2.5 / 2)
    assert found["joules_per_image"] == pytest.approx(96 / (3 * 10 * 32))
    assert found["joules_per_paper_run"] == pytest.approx(96 / (3 * 10 * 32) * 64_000 * 128)
    assert found["profiled_over_step"] == pytest.approx(1.2)  # of 1.5, 0.75, 1.2
    assert _Chunks(one, 10, [2.0], parts[:1]).report(Ceilings(1.0, 1.0))["joules_per_image"] is None


def test_cells_of_equal_data_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str | None] = []

    def load(_: object, execution: Any, **__: object) -> object:
        loaded.append(execution.data_dir)
        return execution.data_dir

    class Alive:
        def __init__(self, _: Cell, images: object, **__: object) -> None:
            self.images = images

        def close(self) -> None:
            pass

    for name, double in (("load_images", load), ("Bench", Alive), ("prepare_unchecked", lambda _: None)):
        monkeypatch.setattr(bench, name, double)
    cells = [
        Cell(str(k), tiny(tmp_path, data={"dataset": "cifar10"}, execution={"data_dir": folder}))
        for k, folder in enumerate(("a", "a", "b"))
    ]

    with contextlib.ExitStack() as stack:
        assert [bench.images for bench in _alive(cells, stack, lambda _: None)] == ["a", "a", "b"]  # type: ignore[comparison-overlap]
    assert loaded == ["a", "b"]
