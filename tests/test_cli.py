"""cli: flags become the config they say, errors become exit codes and one line."""

import json
import os
import re
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fastres.cli import run
from fastres.cli.flags import parse_model
from fastres.config import RunConfig, make_config
from fastres.errors import InputError

TINY = shlex.split(
    "--dataset synthetic --depth 8 --batch-size 16 --device cpu --precision fp32 --threads 1 --log-every 5"
)


def resolved(capsys: pytest.CaptureFixture[str], *argv: str) -> RunConfig:
    """The config that a command line resolves to."""
    assert run(["train", *argv, "--dry-run"]) == 0
    return RunConfig.from_dict(tomllib.loads(capsys.readouterr().out))


def test_no_option_is_the_papers_resnet20(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolved(capsys) == RunConfig()


def test_the_help_has_the_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["train", "--help"]) == 0
    help_ = capsys.readouterr().out
    assert "FASTRES_DATA" in help_  # brackets would be taken for markup
    tree = RunConfig().to_dict()
    values = {"seed": tree["seed"], **tree["model"], **tree["recipe"], **tree["execution"], **tree["output"]}
    said = re.findall(r"--([a-z-]+) .*?(?:(\d+) \(default\)|[Dd]efault ([\d.e,-]+\d|\d)|\(([\d,]+)\)\.)", help_)
    assert len(said) == 11
    for flag, *texts in said:
        assert float("".join(texts).replace(",", "")) == values[flag.replace("-", "_")], flag


CASES: list[tuple[str, dict[str, Any]]] = [
    ("--depth 110 --compile", {"model": {"depth": 110}, "execution": {"compile": True}}),
    ("--model PlainNet56", {"model": {"arch": "plain", "depth": 56}}),
    ("--arch plain --depth 44 --seed 7", {"model": {"arch": "plain", "depth": 44}, "seed": 7}),
    ("--epochs 4", {"recipe": {"steps": 1563}}),
    ("--epochs 1 --val-split --batch-size 100",
     {"recipe": {"steps": 450, "batch_size": 100}, "data": {"val_split": True}}),
    ("--warmup-steps 50", {"recipe": {"warmup": "constant", "warmup_steps": 50}}),
    ("--warmup-epochs 2", {"recipe": {"warmup": "constant", "warmup_steps": 782}}),
    ("--depth 110 --warmup error", {"model": {"depth": 110}, "recipe": {"warmup": "error"}}),
    ("--milestones 10,20 --lr 0.2", {"recipe": {"milestones": [10, 20], "lr": 0.2}}),
    ("--no-amp", {"execution": {"precision": "fp32"}}),
    ("--amp", {"execution": {"precision": "auto"}}),
    ("--checkpoint-every 500 --out x", {"output": {"checkpoint_every": "500", "out": "x"}}),
    ("--data-url http://a/b --data-url http://c/d", {"execution": {"data_urls": ["http://a/b", "http://c/d"]}}),
    ("--no-augment --shortcut B --weight-decay-on weights",
     {"data": {"augment": False}, "model": {"shortcut": "B"}, "recipe": {"weight_decay_on": "weights"}}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "changes"), CASES)
def test_flags(capsys: pytest.CaptureFixture[str], line: str, changes: dict[str, Any]) -> None:
    assert resolved(capsys, *line.split()) == make_config(**changes)


def test_preset_and_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(capsys, "--preset", "fast", "--epochs", "4")
    assert (config.recipe.schedule, config.recipe.steps, config.recipe.warmup_steps) == ("linear", 1563, 156)


def test_toml_then_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "fast"\nseed = 5\n[recipe]\nlr = 0.3\n')
    config = resolved(capsys, "--config", str(file), "--seed", "6")
    assert (config.seed, config.recipe.lr, config.recipe.schedule) == (6, 0.3, "linear")
    file.write_text(config.to_toml())
    assert resolved(capsys, "--config", str(file)) == config


BAD = [
    ("--depth 21", "20 and 26"),
    ("--depth twenty", "depth"),
    ("--dpeth 20", "did you mean --depth?"),
    ("--batch-size 0", "batch_size is 0"),
    ("--lr nan", "lr is nan"),
    ("--milestones 48000,32000", "must rise"),
    ("--milestones abc", "32000,48000"),
    ("--preset papr", "'paper'"),
    ("--amp --no-amp", "contradict"),
    ("--amp --precision fp32", "contradict"),
    ("--steps 5 --epochs 1", "contradict"),
    ("--model ResNet20 --depth 20", "contradict"),
    ("--model VGG16", "ResNet20 or PlainNet56"),
    ("--model ResNet18", "nearest: 14 and 20; of the ImageNet networks: ImageNetResNet18"),
    ("--arch resnet50", "a network with its depth is a --model: ResNet20, ImageNetResNet50"),
    ("--config a.toml --config b.toml", "--config is given 2 times; give one file"),
    ("--depth 110 --lr 0.001", "warmup_lr is 0.01; a warm-up's must not be above lr, 0.001; --warmup none"),
    ("--warmup none --warmup-steps 5", "contradict"),
    ("--warmup error --warmup-steps 5", "leave that out"),
    ("--preset fast --milestones 100,200", "--milestones does nothing with a linear schedule"),
    ("--steps 99999999999", "at most 10,000,000"),
    ("--epochs nan", "above 0"),
    ("--epochs 0", "above 0"),
    ("--precision fp8", "fp32"),
    ("--loader dalli", "'dali'"),
    ("--config nowhere.toml", "cannot be read"),
    ("--resume nowhere", "not a run folder"),
    ("--resume a --out b", "contradict"),
    ("--preset smoke --data-dir .", "--data-dir does nothing with built-in data"),
    ("--side-by-side 2", "does nothing without --seeds"),
    ("extra", "extra"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_usage_exits_2_with_the_way_out(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert run(["train", *line.split(), "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_no_command_and_half_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert capsys.readouterr().err == "fastres: no command given (see fastres --help)\n"
    assert run(["bench", "--compare", "a.toml"]) == 2
    assert "'--compare' requires 2 arguments" in capsys.readouterr().err


def test_ctrl_c_before_there_is_a_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """During a download, say."""

    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastres.loop.load_images", pressed)
    assert run(["train", *TINY]) == 130
    assert capsys.readouterr().err.endswith("fastres: stopped\n")


def test_a_reader_that_leaves_gets_no_traceback() -> None:
    script = f"{shlex.quote(sys.executable)} -m fastres train --dry-run | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode in (0, 141), done.stderr) == (True, "")


def test_toml_with_an_unknown_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[recipe]\nlearning_rat = 0.3\n")
    assert run(["train", "--config", str(file)]) == 2
    assert "unknown key recipe.learning_rat" in capsys.readouterr().err
    file.write_text("[recipe\n")
    assert run(["train", "--config", str(file)]) == 2
    assert "not TOML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("recipe = 3", "recipe is 3; it must be a table"),
        ('preset = ["a"]', "unknown preset ['a']"),
        ('[recipe]\nbatch_size = "a"', "batch_size is 'a'"),
        ("[recipe]\nbatch_size = 0", "batch_size is 0"),
    ],
)
def test_toml_with_values_of_another_kind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, said: str
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content)
    for flag in ("--epochs", "--steps"):
        assert run(["train", "--config", str(file), flag, "4"]) == 2
        assert said in capsys.readouterr().err


def test_train_eval_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(["train", *TINY, "--steps", "10", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    trained = json.loads(captured.out.splitlines()[-1])
    assert trained["run"] == str(out)
    assert "test error" in captured.err
    assert run(["eval", str(out), "--json", "--device", "cpu"]) == 0
    tested = json.loads(capsys.readouterr().out)
    assert tested["test_error"] == trained["test_error"]
    assert tested["test_loss"] == pytest.approx(trained["test_loss"], rel=1e-6)
    assert run(["eval", str(out / "checkpoint.safetensors")]) == 0
    assert "test error" in capsys.readouterr().out
    assert run(["train", *TINY, "--steps", "10", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(["train", "--resume", str(out), "--lr", "0.7"]) == 2
    assert "recipe.lr: 0.1 -> 0.7" in capsys.readouterr().err
    assert run(["train", "--resume", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x80\x02cos\nsystem\n"])
def test_eval_of_rubbish(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes) -> None:
    for name in ("a.safetensors", "a.th"):
        (tmp_path / name).write_bytes(content)
        assert run(["eval", str(tmp_path / name), "--dataset", "synthetic"]) == 2
    assert run(["eval", str(tmp_path / "nowhere")]) == 2
    assert run(["eval", str(tmp_path)]) == 2


def test_no_data_and_no_network_exits_3(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", refused)
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run(["train", "--steps", "1"]) == 3
    error = capsys.readouterr().err
    assert "--data-dir" in error
    assert "--dataset synthetic" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_a_full_disk_under_stdout_loses_no_run(tmp_path: Path) -> None:
    def told(words: list[str], to: str) -> tuple[int, str]:
        command = ["sh", "-c", f"{shlex.join([sys.executable, '-m', 'fastres', *words])} {to}"]
        done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=120)
        return done.returncode, done.stderr

    assert told(["train", *TINY, "--steps", "3", "--out", "run"], ">/dev/full") == (0, "")
    assert (tmp_path / "run" / "result.json").exists()
    assert told(["eval", "run"], ">&-") == (0, "")
    assert told(["eval", "run"], ">/dev/full") == (
        3,
        "fastres: no room on the disk for what is printed; free some, or print elsewhere\n",
    )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_save_and_exit(tmp_path: Path, signum: signal.Signals) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastres", "train", *TINY, "--steps", "100000", "--out", str(out)]
    before = signal.signal(signum, signal.SIG_DFL)  # under nohup the child would ignore SIGHUP, as it should
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    signal.signal(signum, before)
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signum
    assert f"--resume {out}" in error
    assert (out / "checkpoint.safetensors").exists()


def test_sigterm_before_there_is_anything_to_save() -> None:
    code = (
        "import sys, time; import fastres.loop as loop; from fastres.cli import main\n"
        "loop.load_images = lambda *_, **__: (print('fetching', flush=True), time.sleep(60))\n"
        "sys.argv[1:] = ['train']; main()"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes, text=True)  # type: ignore[call-overload]
    try:
        assert any(line == "fetching\n" for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert error == "fastres: stopped by SIGTERM\n"


def test_parse_model() -> None:
    assert parse_model("resnet-110") == ("resnet", 110)
    assert parse_model("Plain20") == ("plain", 20)
    with pytest.raises(InputError):
        parse_model("20")


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = "import sys; from fastres.cli import run; run(['--help']); sys.exit('torch' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # as a user has it
    command = [sys.executable, "-c", code]
    subprocess.run(command, capture_output=True, env=environment, check=True)  # warms the cache
    seconds = []  # of a processor: what a wall clock says beside others' work is not the command's
    for _ in range(9):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        assert "train" in done.stdout
    assert statistics.median(seconds) <= 0.3, f"fastres --help took {seconds}"
