"""cli: flags become the config they say, errors become exit codes and one line."""

import contextlib
import dataclasses
import io
import json
import os
import pydoc
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
import typer.main

import fastres
from fastres import cli
from fastres.cli import app, run
from fastres.cli.flags import parse_model, parse_percent
from fastres.config import RunConfig, make_config
from fastres.errors import Diverged, InputError, MachineError, Stop
from fastres.reproduce.paper import FIGURE_7, STAGES
from fastres.rundir import RunDir

TINY = shlex.split(
    "--dataset synthetic --depth 8 --batch-size 16 --device cpu --precision fp32 --threads 1 --log-every 5"
)


def resolved(capsys: pytest.CaptureFixture[str], *argv: str) -> RunConfig:
    """The config that a command line resolves to."""
    assert run(["train", *argv, "--dry-run"]) == 0
    return RunConfig.from_dict(tomllib.loads(capsys.readouterr().out))


def test_no_option_is_the_papers_resnet20(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolved(capsys) == RunConfig()


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def help_of(*words: str, columns: int) -> str:
    """What `fastres ... --help` prints, to a pipe and under COLUMNS."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
        patch.setenv("COLUMNS", str(columns))
        assert run([*words, "--help"]) == 0
    return stdout.getvalue()


def entries(help_: str) -> dict[str, str]:
    """Help texts by option, each as one line."""
    found = re.findall(r"^  (?:-\w, )?(--\S+)(.*(?:\n {8,}.*)*)", help_, re.MULTILINE)
    return {flag.replace("[no-]", ""): re.sub(r"\s+", " ", text) for flag, text in found}


@pytest.mark.parametrize("columns", [30, 59, 80, 100, 120, 200])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_shows_every_flag_whole(name: str, columns: int) -> None:
    help_ = help_of(*filter(None, [name]), columns=columns)
    assert "..." not in help_.partition("\n\n")[2]  # but in the usage
    assert "\N{HORIZONTAL ELLIPSIS}" not in help_
    assert "  -h, --help" in help_
    for param in COMMANDS[name].params if name else ():
        for flag in param.opts if param.param_type_name == "option" else ():
            no = f"--no-{flag.removeprefix('--')}" in param.secondary_opts
            assert re.search(
                rf"(^  |, ){re.escape(flag.replace('--', '--[no-]') if no else flag)}\b", help_, re.MULTILINE
            )
    options = help_.partition("\nExamples:")[0]
    assert not re.search(
        r"[\w]-$", options.partition("\n\n")[2].replace("CIFAR-", ""), re.MULTILINE
    )  # torn at a hyphen
    if columns > 30:  # where a line of one word may be longer
        assert max(map(len, help_.splitlines())) <= min(columns, 120)
    if name:
        headings = re.findall(r"^(\S.*):$", help_, re.MULTILINE)
        panels = [getattr(param, "rich_help_panel", None) for param in COMMANDS[name].params]
        assert set(filter(None, panels)) <= set(headings)
        assert len(headings) == len(set(headings))


@pytest.mark.parametrize("name", ["train", "reproduce", "bench", ""])
def test_examples_of_the_help_are_right(name: str) -> None:
    examples = help_of(*filter(None, [name]), columns=120).partition("\nExamples:\n")[2]
    lines = re.findall(r"^  fastres (\w+)(.*?)  ", examples, re.MULTILINE)
    assert len(lines) == 4
    for command, rest in lines:
        COMMANDS[command].make_context(command, shlex.split(rest))  # refuses an unknown flag
        assert name in ("", command)


def test_commands_stand_in_the_order_of_use() -> None:
    assert [*COMMANDS] == ["train", "reproduce", "eval", "plot", "report", "bench", "doctor", "responses"]


# Defaults that a config leaves open, as None, and what they come to.
OPEN = {"compile": "on a GPU", "cuda_graph": "on a GPU", "shadow_weights": "in bf16 on a GPU",
        "native": "in bf16 on a GPU",
        "layer_kernels": "off", "out": "a new one in runs/", "data_dir": "FASTRES_DATA"}  # fmt: skip


def said(value: object) -> str:
    """A default as the help writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else "1e-4" if value == 1e-4 else str(value)


def test_help_of_train_has_the_defaults() -> None:
    texts, keys = entries(help_of("train", columns=80)), set[str]()
    tree = RunConfig().to_dict()
    values = {"seed": tree["seed"], "preset": "paper", "side_by_side": 0}
    for section in ("model", "data", "recipe", "execution", "output"):
        values |= tree[section]
    for flag, text in texts.items():
        if (key := flag.removeprefix("--").replace("-", "_")) in values:
            default = OPEN[key] if values[key] is None else said(values[key])
            assert re.search(rf"\[(default|paper|paper, fast): {re.escape(default)}[];,]", text + "]"), (flag, text)
            keys.add(key)
    assert values.keys() - keys == {"bn_eps", "bn_momentum", "lr_decay", "warmup_lr", "data_urls"}  # which have no flag
    for preset in ("paper", "fast", "smoke"):
        config = make_config(preset)
        for key in ("steps", "schedule", "dataset", "log_every", "eval_every", "warmup"):
            value = next(
                said(part[key]) for part in config.to_dict().values() if isinstance(part, dict) and key in part
            )
            text = texts[f"--{key.replace('_', '-')}"].rpartition("[")[2]
            assert re.search(rf"\b{preset}(, \w+)*: {re.escape(value)}[];,]", text), (preset, text)
    assert "none, constant for ResNets of 110 layers and deeper" in texts["--warmup"]
    assert make_config(model={"depth": 110}).recipe.warmup == "constant"
    assert "400; ramp: a tenth of all steps" in texts["--warmup-steps"]


NO_DEFAULT = {  # options without one, or whose default is to do nothing
    "reproduce": {"--nets", "--epochs", "--data-url"},
    "eval": {"--data-url", "--std"},
    "responses": {"--data-url", "--std", "--out"},
    "plot": {"--ylim"},
    "bench": {"--data-dir", "--compare", "--fail-if-slower", "--json", "--plot"},
    "train": {"--config", "--seeds", "--resume", "--model", "--epochs", "--warmup-epochs", "--data-url"},
}


@pytest.mark.parametrize("name", [*COMMANDS])
def test_help_says_every_default(name: str) -> None:
    texts = entries(help_of(name, columns=80))
    switches = {
        param.opts[0]
        for param in COMMANDS[name].params
        if getattr(param, "is_flag", False) and not param.secondary_opts
    }
    silent = {flag for flag, text in texts.items() if not re.search(r"\[(default|paper)", text)}
    assert silent - switches - {"--help"} == NO_DEFAULT.get(name, set())


def test_help_of_reproduce_names_the_depths_that_it_trains() -> None:
    text = entries(help_of("reproduce", columns=80))["--depths"]
    depths = {arch: sorted({depth for a, depth, _ in STAGES if a == arch}) for arch in ("resnet", "plain")}
    assert f"[default: {said(depths['resnet'])};" in text
    assert f"plain nets beside them up to {max(depths['plain'])}; 1202 only if named" in text
    assert f"fig7: {said([depth for arch, depth in FIGURE_7 if arch == 'resnet'])}]" in text


CASES: list[tuple[str, dict[str, Any]]] = [
    ("--depth 110 --compile", {"model": {"depth": 110}, "execution": {"compile": True}}),
    ("--model PlainNet56", {"model": {"arch": "plain", "depth": 56}}),
    ("--arch plain --depth 44 --seed 7", {"model": {"arch": "plain", "depth": 44}, "seed": 7}),
    ("--epochs 4", {"recipe": {"steps": 1563}}),
    ("--epochs 1 --val-split --batch-size 100",
     {"recipe": {"steps": 450, "batch_size": 100}, "data": {"val_split": True}}),
    ("--warmup-steps 50", {"recipe": {"warmup": "constant", "warmup_steps": 50}}),
    ("--warmup-epochs 2", {"recipe": {"warmup": "constant", "warmup_steps": 782}}),
    ("--warmup ramp --warmup-epochs 2", {"recipe": {"warmup": "ramp", "warmup_steps": 782}}),
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
    file.write_bytes(b"\xef\xbb\xbf" + config.to_toml().encode())  # as editors on Windows write it
    assert resolved(capsys, "--config", str(file)) == config
    assert run(["train", "--config", str(file), "--preset", "smoke", "--dry-run"]) == 2
    assert "--preset smoke changes nothing: the config sets all that a preset would" in capsys.readouterr().err
    file.write_text("[model]\ndepth = 8\n")
    assert resolved(capsys, "--config", str(file), "--preset", "smoke").recipe.steps == 250


@pytest.mark.parametrize(
    ("first", "then", "same_as"),
    [
        ("", "--depth 110", "--depth 110"),  # alone has a warm-up
        ("--depth 110", "--depth 20", "--depth 20"),
        ("--preset fast", "--epochs 4", "--preset fast --epochs 4"),  # a tenth of which is its ramp
        ("", "--model ImageNetResNet18", "--model ImageNetResNet18"),  # projects
        ("--model ImageNetResNet34", "--model ResNet32", "--model ResNet32"),
        ("--depth 110 --warmup none", "--depth 164", "--depth 164 --warmup none"),
        ("--depth 110 --warmup-steps 300", "--seed 1", "--depth 110 --warmup-steps 300 --seed 1"),
    ],
)
def test_flags_over_a_whole_config_are_flags_beside_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, first: str, then: str, same_as: str
) -> None:
    (tmp_path / "run.toml").write_text(resolved(capsys, *first.split()).to_toml())
    over = resolved(capsys, "--config", str(tmp_path / "run.toml"), *then.split())
    assert over == resolved(capsys, *same_as.split())


def test_a_whole_config_stands_whatever_preset_it_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('preset = "fast"\n' + make_config().to_toml())
    assert resolved(capsys, "--config", str(tmp_path / "run.toml")) == make_config()


def test_flags_may_mend_a_whole_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken = make_config(recipe={"batch_size": 96}).to_toml().replace("norm_batch = 0", "norm_batch = 64")
    (tmp_path / "run.toml").write_text(broken)
    assert run(["train", "--config", str(tmp_path / "run.toml"), "--dry-run"]) == 2
    assert resolved(capsys, "--config", str(tmp_path / "run.toml"), "--norm-batch", "32").model.norm_batch == 32


def test_what_a_part_of_a_config_says_stands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[recipe]\nwarmup = "none"\n')
    assert resolved(capsys, "--config", str(tmp_path / "run.toml"), "--depth", "110").recipe.warmup == "none"


def test_a_run_is_a_config_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """That of its folder, which is not trained into again."""
    config = make_config("smoke", model={"depth": 8}, seed=3, output={"out": str(tmp_path), "log_every": 7})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for given in (tmp_path, tmp_path / "config.json"):
        found = resolved(capsys, "--config", str(given), "--seed", "4")
        assert found == dataclasses.replace(config, seed=4, output=dataclasses.replace(config.output, out=None))
    moved = config.to_dict() | {"execution": {"data_dir": str(tmp_path / "gone")}}
    (tmp_path / "config.json").write_text(json.dumps(moved))
    assert resolved(capsys, "--config", str(tmp_path)).execution.data_dir is None  # looked for anew
    (tmp_path / "config.json").write_text(json.dumps({"execution": {"data_dir": ["x"]}}))
    assert run(["train", "--config", str(tmp_path), "--dry-run"]) == 2
    assert "data_dir is ['x']; it must be text" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("[1]")
    for text, says in (("[1]", "holds no object of JSON"), ("{", "is not JSON")):
        (tmp_path / "config.json").write_text(text)
        assert run(["train", "--config", str(tmp_path), "--dry-run"]) == 2
        assert says in capsys.readouterr().err


BAD = [
    ("--warmup none --warmup-epochs 1", "contradict"),
    ("--warmup error --warmup-epochs 1", "leave that out"),
    ("--seed 1 --seeds 2", "contradict"),
    ("--seeds 2 --overwrite", "--seeds and --overwrite contradict"),
    ("--resume a --config b", "--resume and --config contradict"),
    ("--resume a --preset smoke", "--resume and --preset contradict"),
    ("--resume a --overwrite", "contradict"),
    ("--continue --resume a", "contradict"),
    ("--continue --overwrite --out a", "contradict"),
    ("--depth 21", "20 and 26"),
    ("--depth twenty", "depth"),
    ("--dpeth 20", "did you mean --depth? (see fastres train --help)"),
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
    ("--preset smoke --data-url http://a/b", "--data-url does nothing with built-in data"),
    ("--seeds abc", "--seeds is 'abc'"),
    ("--arch plain --shortcut B", "--shortcut does nothing here: a plain net has none; leave it out"),
    ("--shortcut B --pad after", "--pad does nothing here"),
    ("--weight-decay 0 --weight-decay-on weights", "--weight-decay-on does nothing here"),
    ("--momentum 0 --lr-in-velocity", "--lr-in-velocity does nothing here"),
    ("--out=", "an argument is empty (--out=); is a variable of the shell not set?"),
    ("extra", "extra"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_usage_exits_2_with_the_way_out(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert run(["train", *line.split(), "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("flags", ["--arch plain", "--shortcut B", "--weight-decay 0", "--momentum 0"])
def test_a_whole_config_is_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: str) -> None:
    """Keys that do nothing beside others are no flags then."""
    config = resolved(capsys, *flags.split())
    (tmp_path / "c.toml").write_text(config.to_toml())
    assert resolved(capsys, "--config", str(tmp_path / "c.toml")) == config


def test_no_falls(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolved(capsys, "--milestones", "none").recipe.milestones == ()


def test_an_argument_that_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plot", ""]) == 2
    assert "an argument is empty; is a variable of the shell not set?" in capsys.readouterr().err


def test_a_second_signal_finds_nobody() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stop, match="stopped by SIGTERM"):
            cli._stop(signal.SIGTERM, None)
        signal.raise_signal(signal.SIGTERM)  # as one that comes while this process ends
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN  # which a training loop leaves as it is
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_home_in_the_middle_of_a_word(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert run(["train", "--data-dir=~/cifar", "--out=~x", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert 'data_dir = "/somewhere/cifar"' in shown
    assert 'out = "~x"' in shown


@pytest.mark.parametrize("line", ["eval {}", "responses {}", "plot {}", "report {}", "train --resume {}"])
def test_a_path_that_may_not_be_looked_at(capsys: pytest.CaptureFixture[str], line: str) -> None:
    """A name too long fails as a folder does that is closed to the user, which no test of root's could make."""
    assert run(line.format(300 * "x").split()) == 2
    assert capsys.readouterr().err == f"fastres: {200 * 'x'}: File name too long\n"


def test_a_flag_without_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--resume"]) == 2
    assert capsys.readouterr().err.endswith("requires an argument (see fastres train --help)\n")


def test_no_command_and_half_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("Usage: fastres [OPTIONS] COMMAND")
    assert captured.err == "fastres: no command given (see fastres --help)\n"
    assert run(["bench", "--compare", "a.toml"]) == 2
    assert "'--compare' requires 2 arguments" in capsys.readouterr().err


def test_an_unreadable_side_of_a_comparison_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[recipe")
    for file, why in (("none.toml", "cannot be read"), ("bad.toml", "is not TOML")):
        assert run(["bench", "--compare", str(tmp_path / file), "b.toml"]) == 2
        assert capsys.readouterr().err.startswith(f"fastres: --compare {tmp_path / file} {why}: ")


def test_completion_and_help_find_what_the_package_offers() -> None:
    assert dir(fastres) == sorted(fastres.__all__)
    text = pydoc.plain(pydoc.render_doc(fastres))
    for name in {*fastres.__all__} - {"__version__"}:
        assert name in text
    assert "A trained network" in text


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


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_save_and_exit(tmp_path: Path, signum: signal.Signals) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tests.few", "train", *TINY, "--steps", "100000", "--out", str(out)]
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


def test_one_command_begins_a_run_and_goes_on_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    line = ["train", *TINY, "--steps", "10", "--checkpoint-every", "3", "--out", str(out), "--continue"]
    assert run(line) == 0
    (out / "result.json").unlink()
    (out / "checkpoint.safetensors").unlink()  # as if it was cut before the last
    capsys.readouterr()
    assert run(line) == 0
    assert f"resuming from step 9 of {out}" in capsys.readouterr().out
    assert run(line) == 0
    assert "is finished: nothing to resume" in capsys.readouterr().out
    assert run([*line, "--lr", "0.7"]) == 2
    said = capsys.readouterr().err
    assert "was begun with another config (recipe.lr" in said
    assert f"give the flags that it was begun with, or: fastres train --resume {out}" in said
    RunDir(out).write_json("diverged.json", {"step": 9, "why": "the loss became nan"})
    (out / "result.json").unlink()
    assert run(line) == 5  # and not again and again
    assert "has diverged: the loss became nan" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert run([*line[:-2], str(tmp_path / "mine"), "--continue"]) == 2
    assert run(["train", *TINY, "--continue"]) == 2
    assert "add --out RUN" in capsys.readouterr().err
    sweep = ["train", *TINY, "--steps", "4", "--seeds", "2", "--out", str(tmp_path / "sweep"), "--continue"]
    assert run(sweep) == run(sweep) == 0
    assert run([part for part in sweep if part not in ("--seeds", "2")]) == 2
    assert "is a sweep; to go on with it add its --seeds" in capsys.readouterr().err


def test_continue_finds_a_home_that_a_config_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text('[output]\nout = "~/run"\n')
    line = ["train", *TINY, "--steps", "4", "--config", str(tmp_path / "c.toml"), "--continue"]
    assert run(line) == run(line) == 0


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
    with pytest.raises(InputError):
        parse_model(f"ResNet{'1' * 5_000}")


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


def test_a_name_that_the_terminals_encoding_lacks(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "fastres", "eval", str(tmp_path / "\u65e5\u672c")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert "\\u65e5\\u672c does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_architecture_that_is_none_is_not_taken_for_resnet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", str(tmp_path), "--arch", "plian"]) == 2
    assert "--arch is 'plian'; it must be one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 3),
        (OSError("libcudart.so.13: cannot open shared object file: No such file or directory"), 3),
    ],
)
def test_a_package_that_does_not_work(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fastres.loop.train", broken)
    assert run(["train", "--preset", "smoke"]) == code
    assert capsys.readouterr().err.strip().endswith(f"{type(error).__name__}: {error}; see fastres doctor")
    with pytest.raises(type(error)):
        run(["train", "--preset", "smoke", "--debug"])


def test_the_shell_completes_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("COMP_WORDS", "fastres train --de"), ("COMP_CWORD", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_FASTRES_COMPLETE", "complete_bash")
    with pytest.raises(SystemExit) as ended:
        run([])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == ["--depth", "--device", "--deterministic"]


def test_a_module_of_our_own_that_is_missing_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ImportError("cannot import name 'x' from 'fastres.loop'", name="fastres.loop")

    monkeypatch.setattr("fastres.loop.train", broken)
    with pytest.raises(ImportError):
        run(["train", "--preset", "smoke"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["reproduce", "table6", "--dry-run", "--seeds", "1000000000"], "--seeds is '1000000000'"),
        (["bench", "--rounds", "99999999999999999999"], "at most 100,000"),
    ],
)
def test_more_than_anybody_means_is_refused(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2
    assert words in capsys.readouterr().err


def test_a_folder_of_data_is_found_from_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolved(capsys, "--data-dir", "data").execution.data_dir == str(Path("data").absolute())


def test_a_preset_that_is_given_wins_over_the_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('preset = "smoke"\n[recipe]\nlr = 0.2\n')
    both = resolved(capsys, "--config", str(tmp_path / "a.toml"), "--preset", "fast")
    assert both == make_config("fast", recipe={"lr": 0.2})


def test_what_a_line_hands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}

    def take(*args: Any, **how: Any) -> Any:
        taken.update(how, args=args)
        raise MachineError("enough")

    monkeypatch.setattr("fastres.loop.train", take)
    monkeypatch.setattr("fastres.sweep.train_seeds", take)
    assert run(["train", "--preset", "smoke", "--out", "x", "--overwrite"]) == MachineError.exit_code
    assert taken["overwrite"] is True
    assert run(["train", "--preset", "smoke", "--out", "x"]) == MachineError.exit_code
    assert taken["overwrite"] is False
    assert run(["train", "--preset", "smoke", "--seeds", "2-3", "--side-by-side", "2"]) == MachineError.exit_code
    assert (taken["args"][1], taken["side_by_side"]) == ([2, 3], 2)


def test_seeds_that_all_diverge_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastres.sweep.train_seeds", lambda *_, **__: [Diverged("nan"), Diverged("nan")])
    assert run(["train", "--preset", "smoke", "--seeds", "2", "--json"]) == Diverged.exit_code
    assert capsys.readouterr().out == '[{"diverged": "nan"}, {"diverged": "nan"}]\n'


def test_per_cent() -> None:
    assert [parse_percent("--x", text) for text in ("0", "5%", "2.5")] == [0.0, 5.0, 2.5]
