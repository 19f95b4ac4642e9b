"""benchmarks/: baselines do the work they are said to do, verdicts follow the noise, tables follow the files."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import peers, regressions, results_table, test_speed, throughput
from benchmarks.baselines import amp, plain, tuned
from fastres.config import RunConfig
from fastres.data.imageset import ImageSet
from fastres.data.synthetic import make_synthetic
from fastres.models.cifar import CifarNet, num_parameters
from fastres.step import Replica

ROOT = Path(__file__).resolve().parent.parent


# --- baselines


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_the_plain_scripts_network_is_the_papers(depth: int, parameters: int) -> None:
    """It computes what ours does: the same logits from the same weights."""
    theirs, ours = plain.resnet(depth), CifarNet(depth)
    assert sum(p.numel() for p in theirs.parameters()) == num_parameters(ours) == parameters
    values = [value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")]
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)


def test_the_tuned_script_augments_as_the_plain_one() -> None:
    """Every crop is a window of its padded image, mirrored half of the time, all 81 offsets alike."""
    image = torch.arange(40 * 40, dtype=torch.float32).view(1, 1, 40, 40).expand(4000, 3, 40, 40)
    crops = tuned._augmented(image)
    assert crops.shape == (4000, 3, 32, 32)
    first, step = crops[:, 0, 0, 0], crops[:, 0, 0, 1] - crops[:, 0, 0, 0]
    assert set(step.tolist()) == {1.0, -1.0}
    assert 0.45 < (step == 1).float().mean() < 0.55
    left = torch.where(step == 1, first, first - 31)
    windows = left[:, None, None] + torch.arange(32.0)[:, None] * 40 + torch.arange(32.0)
    expected = torch.where((step == 1)[:, None, None], windows, windows.flip(2))
    assert torch.equal(crops, expected[:, None].expand(4000, 3, 32, 32))
    counts = torch.bincount((left // 40 * 9 + left % 40).long(), minlength=81)
    assert counts.min() > 20  # 49 expected


class Reached(Exception):
    """As far as the test wants to go."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The depths of the networks that are asked for; none is trained. What the scripts set globally is put back."""
    depths: list[int] = []

    def resnet(depth: int) -> None:
        depths.append(depth)
        raise Reached

    def train(config: RunConfig, **_: object) -> None:
        resnet(config.model.depth)

    for module in (plain, amp, tuned):
        monkeypatch.setattr(module, "resnet", resnet)
    monkeypatch.setattr("fastres.train", train)
    for name in ("forward", "backward", "update"):
        monkeypatch.setattr(Replica, name, getattr(Replica, name))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    return depths


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # where the tests have one core
@pytest.mark.parametrize("side", [*throughput.BASELINES, "fastres"])
def test_all_sides_train_the_depth_that_was_asked_for(
    side: str, asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A race between networks of different depths would be the shallower one's."""
    inside = tmp_path / "cifar-10-batches-bin"
    inside.mkdir()
    for k in range(1, 6):
        (inside / f"data_batch_{k}.bin").write_bytes(bytes(plain.RECORD_BYTES))
    passed: list[str] = []

    def compare(arguments: list[str], *_: object) -> dict[str, Any]:
        passed.extend(arguments)
        return {}

    monkeypatch.setattr(throughput, "compare", compare)
    monkeypatch.setattr(throughput, "_environment", lambda _flags, depth: {"of": depth})
    race = ["throughput", "--data-dir", str(tmp_path), "--depth", "56", "--set", "threads=1"]
    monkeypatch.setattr(sys, "argv", race)
    throughput.main()
    assert passed[passed.index("--data-dir") + 1] == str(inside)  # its parent was given
    printed = json.loads(capsys.readouterr().out)
    assert (printed["depth"], printed["environment"]) == (56, {"of": 56})
    monkeypatch.setattr(sys, "argv", ["throughput", "--side", side, *passed])  # as `Side` calls it
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    with pytest.raises(Reached):
        throughput.main()
    assert asked == [56]


def test_a_folder_without_images(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["throughput", "--data-dir", "x"])
    with pytest.raises(SystemExit) as caught:
        throughput.main()
    assert caught.value.code == 2
    assert "--data-dir x: there is no data_batch_1.bin; give CIFAR-10's binary folder" in capsys.readouterr().err


def test_a_race_is_of_single_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["throughput", "--data-dir", str(tmp_path), "--set", "graph_steps=4"])
    with pytest.raises(SystemExit) as caught:
        throughput.main()
    assert caught.value.code == 2
    assert "--set graph_steps=4: chunks are timed step by step; leave it out" in capsys.readouterr().err


def test_a_depth_that_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["throughput", "--data-dir", "x", "--depth", "57"])
    with pytest.raises(SystemExit) as caught:
        throughput.main()
    assert caught.value.code == 2
    assert "--depth: depth 57 is not 6n+2; nearest: 56 and 62" in capsys.readouterr().err
    for depth in (2, 21):
        with pytest.raises(ValueError, match=f"depth {depth} is not 6n"):
            plain.resnet(depth)


# --- regressions


def rounds_of(base: list[float], here: list[float], again: list[float]) -> list[Any]:
    return [({"t": a}, {"t": b}, {"t": c}) for a, b, c in zip(base, here, again, strict=True)]


def test_slower_is_what_differs_by_more_than_equal_code() -> None:
    quiet = regressions.judge(rounds_of([1, 1, 1], [1.05, 1.06, 1.05], [1.005, 1, 0.998]))
    assert quiet["t"][0] == pytest.approx(0.005)
    assert quiet["t"][1].verdict == "slower"
    noisy = regressions.judge(rounds_of([1, 1, 1], [1.05, 1.06, 1.05], [1.005, 1.08, 0.998]))
    assert noisy["t"][1].verdict == "no difference"
    assert regressions.judge(rounds_of([1, 1, 1], [1.015] * 3, [1, 1, 1]))["t"][1].verdict == "no difference"
    assert regressions.judge(rounds_of([1, 1, 1], [0.9] * 3, [1, 1, 1]))["t"][1].verdict == "faster"


def test_a_round_of_the_whole_step_is_one_step() -> None:
    """`Bench.run` takes one more before its clock, but not before pytest-benchmark's."""

    class Counted:
        steps = 0

        def run(self, num_steps: int) -> None:
            self.steps += 1 + num_steps

        def timed(self, num_steps: int) -> None:
            self.steps += num_steps

    once = SimpleNamespace(pedantic=lambda function, **_: function(), stats=None)
    resident = Counted()
    test_speed.test_whole_step(cast("Any", once), cast("Any", resident))
    assert resident.steps == 1


def test_too_few_rounds_for_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench-compare", "main", "--rounds", "7"])
    with pytest.raises(SystemExit) as caught:
        regressions.main()
    assert caught.value.code == 2


def test_tests_that_one_commit_lacks_are_left_out() -> None:
    turn = ({"a": 1.0, "gone": 1.0}, {"a": 1.0, "new": 1.0}, {"a": 1.0, "gone": 1.0})
    assert list(regressions.judge([turn, turn])) == ["a"]


def test_the_table_shows_which_of_a_tests_parameters_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    turn = ({"test_loader[dali]": 1.0}, {"test_loader[dali]": 1.0}, {"test_loader[dali]": 1.0})
    Console(width=80).print(regressions.table(regressions.judge([turn] * 3)))
    assert "test_loader[dali]" in capsys.readouterr().out  # rich takes what is in brackets for a style


def test_an_unknown_commit_is_said() -> None:
    command = [sys.executable, "-m", "benchmarks.regressions", "no-such-commit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no-such-commit" in done.stderr
    assert "Traceback" not in done.stderr


# --- results


@pytest.mark.parametrize("page", results_table.PAGES, ids=lambda page: page.name)
def test_the_pages_show_the_results(page: Path) -> None:
    drawn = results_table.BLOCK.search(page.read_text())
    assert drawn is not None
    assert drawn[0] == results_table.render(results_table.results(), results_table.PAGES[page], page)
    assert drawn[0].count("\n| ") > 5


def test_results_are_whole_and_of_a_commit() -> None:
    for path in results_table.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        assert not result["environment"]["commit"].endswith("+"), path.name
        assert len(path.name.split("_")) == 3, f"{path.name}: date, machine, what"


def test_tables_follow_the_files(tmp_path: Path) -> None:
    env = {"gpu": None, "cpu": "Some CPU", "threads": 2, "torch": "2", "precision": "fp32", "commit": "abcdef0123"}
    ratio = {"median": 2.5, "min": 2.4, "max": 2.75}
    race = {"environment": env, "rounds": 8, "images_per_second": {"plain": 400.0, "fastres": 1000.0}}
    race |= {"ratios": {"plain": ratio}}
    (tmp_path / "2026-01-01_x_race.json").write_text(json.dumps(race))
    cell: dict[str, Any] = {"label": "ResNet20 dali", "images_per_second": 1234.5, "over_floor": 1.5}
    cell["config"] = {"execution": {"precision": "auto"}}
    cell |= {"step_seconds": {"median": 0.1, "p5": 0.09, "p95": 0.12, "n": 10}}
    newer = copy.deepcopy(env) | {"gpu": "NVIDIA H200", "driver": "570"}
    (tmp_path / "2026-01-02_y_bench.json").write_text(json.dumps({"environment": newer, "cells": [cell]}))
    other = cell | {"config": {"execution": {"precision": "bf16"}}}
    (tmp_path / "2026-01-03_y_bench.json").write_text(json.dumps({"environment": env, "cells": [cell, other]}))
    deeper = race | {"depth": 56}
    (tmp_path / "2026-01-04_x_race.json").write_text(json.dumps(deeper))
    gpus, text = (results_table.render(tmp_path.glob("*.json"), kind, tmp_path / "page.md") for kind in ("gpu", "cpu"))
    heads = [text.index(f"| training loop, ResNet-{depth}, batch 128 |") for depth in (56, 20)]
    assert heads == sorted(heads)  # files from before there was a choice are of 20
    assert "| plain | 400 | 2.50x (2.40 to 2.75) |\n| fastres | 1,000 |  |" in text
    assert "| ResNet20 dali | 1,234 | 100 | 90 to 120 | 1.50 |" in gpus
    assert text.index("2026-01-04, Some CPU") < text.index("2026-01-01, Some CPU")
    assert "2026-01-02, NVIDIA H200, driver 570, torch 2, fp32, commit" in gpus
    assert "Some CPU" not in gpus
    assert "H200" not in text
    assert "2026-01-03, Some CPU, 2 cores, torch 2, auto and bf16, commit" in text


@pytest.mark.parametrize("official", [False, True])
def test_a_table_6_is_drawn_with_its_machine(tmp_path: Path, official: bool) -> None:
    run = tmp_path / "2026-01-01_x_table6" / "resnet20" / "seed0"
    run.mkdir(parents=True)
    env = {"gpu": "NVIDIA H200", "torch": "2", "precision": "bf16", "commit": None, "data": {"official": official}}
    (run / "environment.json").write_text(json.dumps(env))
    with pytest.raises(SystemExit, match="2026-01-01_x_table6 is no result"):
        results_table.render([run.parent.parent], "gpu", tmp_path / "page.md")
    (run.parent.parent / "table6.md").write_text("**A note.**\n\n| network | n |\n| --- | ---: |\n| A | 3 |\n\nMore.\n")
    text = results_table.render([run.parent.parent], "gpu", tmp_path / "page.md")
    assert "2026-01-01, NVIDIA H200, torch 2, bf16 ([2026-01-01_x_table6](2026-01-01_x_table6))\n" in text
    assert "\n\n| network | n |\n| --- | ---: |\n| A | 3 |\n\n" in text
    assert ("not the official" in text) is not official


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"cells": [{}], "environment": {}}', '{"cells": 1}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "2026-01-01_x_bench.json").write_text(content)
    with pytest.raises(SystemExit, match=r"results-table: 2026-01-01_x_bench\.json is no result"):
        results_table.render(tmp_path.glob("*.json"), "cpu", tmp_path / "page.md")


# --- peers

AKAMASTER = """
# Propert ResNets for CIFAR10 in pytorch
import sys, time
from pathlib import Path
import torchvision
assert sys.argv[1:] == ["--arch=resnet20", "--epochs=1", "--print-freq=20"], sys.argv
assert __name__ == "__main__"
torchvision.datasets.CIFAR10(root="./data", train=True, download=True)
for i in range(0, 100, 20):
    time.sleep(0.1)
    print(f"Epoch: [0][{i}/391]\\tTime 0.1 (0.1)\\tLoss {2.3 - i / 100:.4f} (2.0)\\tPrec@1 9 (9)", flush=True)
"""
HIGHWAY = "# ResNet/Highway110 for CIFAR10 in pytorch\\n"


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return make_synthetic()


def test_a_peer_runs_in_its_own_words(tmp_path: Path, images: ImageSet) -> None:
    """A stand-in that reads its data through torchvision, as the real ones do."""
    checkout, scratch = tmp_path / "clone", tmp_path / "scratch"
    checkout.mkdir()
    (checkout / "trainer.py").write_text(AKAMASTER)
    peers.write_python_layout(images, scratch)
    peer = peers.peer_at(checkout)
    assert peer.name.startswith("akamaster")
    seen = peers.run_peer(peer, checkout, scratch, 20)
    assert seen.losses == pytest.approx([2.3, 2.1, 1.9, 1.7, 1.5])
    assert len(seen.rates) == 3
    assert all(20 * 128 / 0.5 < rate < 20 * 128 / 0.09 for rate in seen.rates)


def test_a_peer_that_says_its_seconds() -> None:
    peer = next(p for p in peers.PEERS if p.name.startswith("flukeskywalker"))
    lines = [
        f"epoch   {k} | train loss: {2 - k / 2} | test acc: 44.35 | train time: {time} | test time: 20.804\n"
        for k, time in enumerate(("46.2", "10.0", "5.0"))
    ]
    assert peers.read_lines(peer, iter(lines)) == peers.Seen([5_000, 10_000], [2.0, 1.5, 1.0])


def test_what_torchvision_reads_is_what_was_written(tmp_path: Path, images: ImageSet) -> None:
    from torchvision.datasets import CIFAR10

    peers.write_python_layout(images, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "_check_integrity", lambda _: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        read = CIFAR10(tmp_path / "data", train=True)
    assert np.array_equal(read.data, images.train_images)
    assert read.targets == images.train_labels.tolist()


def test_an_unknown_peer_and_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is no clone of akamaster"):
        peers.peer_at(tmp_path)
    (tmp_path / "trainer.py").write_text(HIGHWAY)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.peers", str(tmp_path), "--data-dir", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert "torch finds no GPU" in done.stderr
