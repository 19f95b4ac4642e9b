"""predict.py: a run's network answers as it was tested, from its checkpoint alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastres
from fastres import checkpoint
from fastres.data import synthetic
from fastres.errors import InputError
from tests.runs import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predict") / "run"
    fastres.train(tiny(out, recipe={"steps": 16}), verbosity="quiet")
    return out


def test_it_answers_as_the_run_was_tested(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = synthetic.make_synthetic()
    monkeypatch.setattr("fastres.build.load_images", lambda *_, **__: pytest.fail("looked for data"))
    predictor = fastres.load(run, device="cpu")
    assert (predictor.step, predictor.class_names) == (16, images.class_names)
    assert not predictor.net.training
    logits = predictor(images.test_images)
    assert logits.dtype == np.float32
    error = float((logits.argmax(axis=1) != images.test_labels).mean())
    assert error == json.loads((run / "result.json").read_text())["test_error"]
    assert np.allclose(predictor(images.test_images[7]), logits[7:8], atol=1e-4)
    assert predictor(images.test_images[:0]).shape == (0, 10)
    # As the docstring has it.
    by_hand = torch.from_numpy((images.test_images[:3] - predictor.mean) / 64).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert np.allclose(predictor.net(by_hand).numpy(), logits[:3], atol=1e-4)


def test_it_answers_alike_whatever_mode_its_network_is_in(run: Path) -> None:
    """In training mode it would answer by the batch's own statistics, and keep them."""
    images, predictor = synthetic.make_synthetic().test_images[:4], fastres.load(run, device=torch.device("cpu"))
    before, mean = predictor(images), predictor.net.state_dict()["bn1.running_mean"].clone()
    predictor.net.train()
    predictor.net.layer1.eval()  # as one freezes a part
    assert np.array_equal(predictor(images), before)
    assert torch.equal(predictor.net.state_dict()["bn1.running_mean"], mean)
    assert (predictor.net.training, predictor.net.layer1.training) == (True, False)
    predictor.net.fc = torch.nn.Linear(64, 3)
    assert predictor(images).shape == (4, 3)


def test_it_takes_whatever_holds_pixels(run: Path) -> None:
    images, predictor = synthetic.make_synthetic().test_images[:2], fastres.load(run, device="cpu")
    expected = predictor(images)
    for same in (torch.from_numpy(images), list(images), [Image.fromarray(image) for image in images]):
        assert np.array_equal(predictor(same), expected)
    with pytest.raises(InputError, match="images are no array"):
        predictor([images[0], images[0][:5]])


def test_it_takes_the_threads_there_are_and_is_short_at_a_prompt(run: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        predictor = fastres.load(run, device="cpu")
        assert (predictor.runtime.threads, torch.get_num_threads()) == (3, 3)
    finally:
        torch.set_num_threads(before)
    assert len(repr(predictor).splitlines()) == 1
    for what in (None, b"x", ""):
        with pytest.raises(InputError, match=r"run is .*; give a path"):
            fastres.load(what)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="precision"):
        fastres.load(run, device="cpu", precision="")


def test_a_damaged_checkpoint_is_passed_over(run: Path, tmp_path: Path) -> None:
    for name in ("config.json", checkpoint.NEWEST, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    content = bytearray((tmp_path / checkpoint.NEWEST).read_bytes())
    content[-9] ^= 4
    (tmp_path / checkpoint.NEWEST).write_bytes(content)
    said: list[str] = []
    assert fastres.load(tmp_path, device="cpu", say=said.append).step == 14
    assert len(said) == 1


def test_what_it_does_not_take(run: Path, tmp_path: Path) -> None:
    predictor = fastres.load(str(run), device="cpu")
    for images in (np.zeros((1, 32, 32, 3)), np.zeros((1, 3, 32, 32), np.uint8), np.zeros((32, 32), np.uint8)):
        with pytest.raises(InputError, match=r"give uint8 \(num, 32, 32, 3\)"):
            predictor(images)
    with pytest.raises(InputError, match="does not exist; give a run folder"):
        fastres.load(tmp_path / "nowhere")
    torch.save({}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="is no checkpoint of fastres"):
        fastres.load(tmp_path / "w.pt")
    with pytest.raises(InputError, match="'fp8'"):
        fastres.load(run, precision="fp8")
