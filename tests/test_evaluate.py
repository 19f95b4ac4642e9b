"""evaluate.py: a run, its checkpoint and foreign weights are tested as they were trained to see images."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import fastres
from fastres import checkpoint
from fastres.cli import run as run_command
from fastres.config import NUM_TRAIN, Data, Execution
from fastres.data import synthetic
from fastres.data.cifar import BATCHES
from fastres.data.imageset import ImageSet
from fastres.errors import InputError
from fastres.evaluate import Outcome, load_trained, report, score
from fastres.models.cifar import CifarNet, init_he_
from fastres.rundir import RunDir
from tests.runs import tiny

CPU = {"device": "cpu", "precision": "fp32", "threads": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "run"
    fastres.train(tiny(out, recipe={"steps": 16}), verbosity="quiet")
    return out


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return synthetic.make_synthetic()


def evaluate_target(target: Path, execution: dict[str, Any], **how: Any) -> Outcome:
    return score(load_trained(target, execution, **how), target)


def outcome_of(target: Path, **how: Any) -> Outcome:
    return evaluate_target(target, CPU, say=lambda _: None, **how)


def test_a_run_and_its_checkpoint_give_what_training_said(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    for target in (run, run / checkpoint.NEWEST):
        outcome = outcome_of(target)
        assert (outcome.trained.name, outcome.trained.step) == ("ResNet8", 16)
        assert outcome.evaluation.error == result["test_error"]
        assert outcome.evaluation.loss == result["test_loss"]
        assert list(outcome.to_dict()["class_errors"].values()) == result["class_errors"]


def test_the_mean_image_comes_from_the_checkpoint(run: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageSet, "mean_image", lambda _: pytest.fail("asked for the training images' mean"))
    assert outcome_of(run).evaluation.num_images == len(images.test_images)


def test_foreign_weights_see_the_per_pixel_mean(run: Path, tmp_path: Path) -> None:
    """The run's own tensors, as another project would publish them."""
    saved = checkpoint.load(run / checkpoint.NEWEST)
    torch.save({"state_dict": {f"module.{k}": t for k, t in saved.weights.items()}}, tmp_path / "w.th")
    outcome = outcome_of(tmp_path / "w.th", dataset="synthetic")
    assert outcome.trained.step is None
    assert outcome.evaluation == outcome_of(run).evaluation


def test_foreign_weights_with_their_own_normalisation(tmp_path: Path, images: ImageSet) -> None:
    net = CifarNet(8, residual=False)
    init_he_(net, mode="fan_in", generator=torch.Generator().manual_seed(3))
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    outcome = outcome_of(tmp_path / "w.safetensors", dataset="synthetic", arch="plain", mean=mean, std=std)
    assert outcome.trained.name == "PlainNet8"
    pixels = torch.from_numpy(images.test_images).double().permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        logits = torch.cat([net.eval()(part) for part in pixels.float().split(500)])
    loss = F.cross_entropy(logits, torch.from_numpy(images.test_labels).long())
    assert outcome.evaluation.loss == pytest.approx(float(loss), rel=1e-4)
    as_resnet = outcome_of(tmp_path / "w.safetensors", dataset="synthetic", mean=mean, std=std)
    assert as_resnet.evaluation.loss != outcome.evaluation.loss


def test_a_damaged_checkpoint_falls_back_and_says_so(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", checkpoint.NEWEST, checkpoint.PREVIOUS):
        (copy / name).write_bytes((run / name).read_bytes())
    content = bytearray((copy / checkpoint.NEWEST).read_bytes())
    content[-9] ^= 4
    (copy / checkpoint.NEWEST).write_bytes(content)
    said: list[str] = []
    outcome = evaluate_target(copy, CPU, say=said.append)
    assert outcome.trained.step == 14
    assert "does not match its digest; taking the one before" in said[0]


@pytest.mark.parametrize(
    ("left", "says"),
    [("result.json", " any more; its result is in result.json"), ("diverged.json", ": it diverged"), ("", " yet")],
)
def test_a_run_without_a_checkpoint(run: Path, tmp_path: Path, left: str, says: str) -> None:
    copy = RunDir.create(tmp_path / "copy")
    copy.write_json("config.json", RunDir(run).config().to_dict())
    if left:
        copy.write_json(left, {})
    with pytest.raises(InputError, match=f"copy has no checkpoint{says}"):
        outcome_of(copy.path)


def test_pixels_of_another_scale_are_refused(run: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(run / checkpoint.NEWEST)
    checkpoint.save(tmp_path, saved.tensors, {**saved.meta, "data": {**saved.meta["data"], "scale": 1 / 32}})
    for ask in (outcome_of, fastres.load):
        with pytest.raises(InputError, match=r"was trained with pixels scaled by 0\.03125, not"):
            ask(tmp_path / checkpoint.NEWEST)


def test_contradictions_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="says of itself that it is resnet"):
        outcome_of(run, arch="plain")
    for how in ({"mean": (0.5, 0.5, 0.5)}, {"std": (0.5, 0.5, 0.5)}):
        with pytest.raises(InputError, match="brings its own mean image; leave out --mean and --std"):
            outcome_of(run, **how)
    weights = checkpoint.load(run / checkpoint.NEWEST).weights
    torch.save(weights, tmp_path / "fine.pt")
    with pytest.raises(InputError, match=r"--arch imagenet: the tensors of .* are those of --arch resnet or plain"):
        outcome_of(tmp_path / "fine.pt", dataset="synthetic", arch="imagenet")
    weights["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(weights, tmp_path / "nan.pt")
    with pytest.raises(InputError, match="holds weights that are NaN or Inf"):
        outcome_of(tmp_path / "nan.pt", dataset="synthetic")
    with pytest.raises(InputError, match="does not exist"):
        outcome_of(tmp_path / "nothing")
    with pytest.raises(InputError, match="not a run folder"):
        outcome_of(tmp_path)


def test_report_names_the_classes_and_the_worst_has_the_longest_bar(run: Path) -> None:
    outcome = outcome_of(run)
    text = report(outcome).splitlines()
    assert text[0].startswith("ResNet8 at step 16: test error ")
    errors = outcome.evaluation.class_errors
    for line, name in zip(text[2:], outcome.trained.images.class_names, strict=True):
        assert line.startswith(f"  {name} ")
    worst = max(range(10), key=lambda k: errors[k] or 0)
    assert text[2 + worst].endswith(" " + "#" * 24)


def test_execution_is_validated(run: Path) -> None:
    with pytest.raises(InputError, match="unknown key execution"):
        evaluate_target(run, {"devise": "cpu"}, say=lambda _: None)
    assert Execution().device == "auto"


def test_what_is_wrong_is_said_before_data_is_looked_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastres.evaluate.load_images", lambda *_, **__: pytest.fail("looked for data"))
    with pytest.raises(InputError, match="says of itself that it is resnet"):
        outcome_of(run, arch="plain")
    weights = checkpoint.load(run / checkpoint.NEWEST).weights
    weights["fc.bias"][0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="holds weights that are NaN or Inf"):
        outcome_of(tmp_path / "nan.safetensors")
    (tmp_path / "weights.pth").write_bytes(b"rubbish")
    with pytest.raises(InputError, match=r"weights\.pth"):
        evaluate_target(tmp_path / "weights.pth", CPU, say=lambda _: None)


def test_no_training_set_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10's test batch alone, beside a run that was trained on all of it."""
    monkeypatch.setattr("fastres.data.cifar.IMAGES_PER_BATCH", 16)
    monkeypatch.setitem(NUM_TRAIN, "cifar10", 128)
    data, chance = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    for name in BATCHES:
        records = chance.integers(0, 256, (16, 3073), np.uint8)
        records[:, 0] %= 10
        (data / f"{name}.bin").write_bytes(records.tobytes())
    where = {"execution": {"data_dir": str(data)}, "data": {"dataset": "cifar10"}}
    result = fastres.train(tiny(tmp_path / "run", recipe={"steps": 3}, **where), verbosity="quiet")
    for name in BATCHES[:5]:
        (data / f"{name}.bin").unlink()
    said: list[str] = []
    outcome = evaluate_target(tmp_path / "run", {**CPU, "data_dir": str(data)}, say=said.append)
    assert outcome.evaluation.loss == result.test_loss
    assert not [line for line in said if "other images" in line]
    (data / "test_batch.bin").write_bytes(bytes(16 * 3073))
    evaluate_target(tmp_path / "run", {**CPU, "data_dir": str(data)}, say=said.append)
    assert [line for line in said if "other images" in line]
    weights = tmp_path / "w.safetensors"
    save_file(checkpoint.load(tmp_path / "run" / checkpoint.NEWEST).weights, weights)
    with pytest.raises(InputError, match=r"lacks data_batch_1\.bin"):  # foreign weights need the mean
        evaluate_target(weights, {**CPU, "data_dir": str(data)}, say=said.append)


def test_load_trained_gives_what_was_trained_and_batches_as_often_as_asked(run: Path, tmp_path: Path) -> None:
    trained = load_trained(run, CPU, say=lambda _: None)
    assert (trained.name, trained.step, str(trained.runtime.device)) == ("ResNet8", 16, "cpu")
    for _ in range(2):
        labels = torch.cat([labels for _, labels in trained.batches()])
        assert labels.tolist() == trained.images.test_labels.tolist()
    save_file(checkpoint.load(run / checkpoint.NEWEST).weights, tmp_path / "w.safetensors")
    foreign = load_trained(tmp_path / "w.safetensors", CPU, arch="plain", dataset="synthetic", say=lambda _: None)
    assert (foreign.name, foreign.step) == ("PlainNet8", None)
    assert not foreign.net.residual


def test_a_run_that_had_a_gpu_is_tested_without_one(run: Path, tmp_path: Path) -> None:
    """Graph, shadow weights and device are of the machine that trained, not of the one that tests."""
    saved = checkpoint.load(run / checkpoint.NEWEST)
    config = saved.meta["config"]
    config["execution"] |= {"device": "cuda:0", "cuda_graph": True, "shadow_weights": True, "precision": "auto"}
    checkpoint.save(tmp_path, saved.tensors, {**saved.meta, "config": config})
    outcome = evaluate_target(tmp_path / checkpoint.NEWEST, {"device": "cpu", "precision": "fp32"}, say=lambda _: None)
    assert outcome.evaluation == outcome_of(run).evaluation


def test_a_run_of_another_machine_is_tested_by_this_ones_means(run: Path, tmp_path: Path) -> None:
    """More threads than there are here, TF32 without a GPU, a data folder that was left behind."""
    saved = checkpoint.load(run / checkpoint.NEWEST)
    config = saved.meta["config"]
    config["execution"] |= {"threads": 100_000, "precision": "tf32", "data_dir": str(tmp_path / "gone")}
    checkpoint.save(tmp_path, saved.tensors, {**saved.meta, "config": config})
    outcome = evaluate_target(tmp_path / checkpoint.NEWEST, {"device": "cpu"}, say=lambda _: None)
    assert outcome.evaluation.confusion == outcome_of(run).evaluation.confusion


def test_validation_images_are_called_that(run: Path) -> None:
    outcome = outcome_of(run)
    outcome = replace(outcome, trained=replace(outcome.trained, held_out="validation"))
    assert "at step 16: validation error " in report(outcome)
    assert outcome.to_dict()["held_out"] == "validation"


def test_the_test_set_of_a_run_that_was_validated(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"kept no images for validation.*leave out --test-set"):
        outcome_of(run, test_set=True)
    saved = checkpoint.load(run / checkpoint.NEWEST)
    config = saved.meta["config"]
    config["data"] |= {"dataset": "cifar10", "val_split": True}
    checkpoint.save(tmp_path, saved.tensors, {**saved.meta, "config": config})
    asked: list[bool] = []

    def images(data: Data, *_: object, **__: object) -> ImageSet:
        asked.append(data.val_split)
        return synthetic.make_synthetic()

    monkeypatch.setattr("fastres.evaluate.load_images", images)
    for test_set, held_out in ((False, "validation"), (True, "test")):
        outcome = evaluate_target(tmp_path / checkpoint.NEWEST, CPU, test_set=test_set, say=lambda _: None)
        assert outcome.trained.held_out == held_out
    outcome_of(tmp_path / checkpoint.NEWEST, dataset="cifar10", test_set=True)  # which is the run's own
    assert asked == [True, False, False]
    with pytest.raises(InputError, match="--dataset synthetic has no other test images; leave out --test-set"):
        outcome_of(tmp_path / checkpoint.NEWEST, dataset="synthetic", test_set=True)
    said: list[str] = []
    monkeypatch.undo()  # other images, which have no such split
    outcome = evaluate_target(tmp_path / checkpoint.NEWEST, CPU, dataset="synthetic", say=said.append)
    assert outcome.trained.held_out == "test"


def test_answers_that_are_nan_are_no_test_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = CifarNet(8).state_dict()
    state["bn1.running_var"] -= 2  # below 0
    save_file(state, tmp_path / "w.safetensors")
    for command in ("eval", "responses"):
        assert run_command([command, str(tmp_path / "w.safetensors"), "--dataset", "synthetic", "--threads", "1"]) == 2
        assert "NaN or Inf" in capsys.readouterr().err


def test_what_is_assumed_of_foreign_weights_is_told(tmp_path: Path) -> None:
    save_file(CifarNet(8).state_dict(), tmp_path / "w.safetensors")
    said: list[str] = []

    def ask(**how: object) -> str:
        said.clear()
        evaluate_target(tmp_path / "w.safetensors", CPU, dataset="synthetic", say=said.append, **how)
        return next(line for line in said if "taken for" in line).partition("taken for ")[2]

    assert ask() == (
        "ResNet8, shortcut A (--arch plain if not); pixels less the training images' mean image, times 0.015625 "
        "(--mean and --std if not)"
    )
    half = (0.5, 0.5, 0.5)
    assert ask(arch="plain", mean=half, std=half) == f"PlainNet8, shortcut A; pixels of 0 to 1 less {half}, over {half}"
    with pytest.raises(InputError, match="--std goes with --mean"):
        ask(std=half)
