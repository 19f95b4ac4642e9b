"""docs/fidelity.md says what is so: its flags and tests exist, its commands change what they say, no key is missing."""

import ast
import dataclasses
import functools
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import typer.main

from fastres.cli import app, run
from fastres.config import Data, Model, Recipe, RunConfig, make_config
from fastres.configtree import changed_keys
from fastres.models.cifar import CifarNet, init_he_
from fastres.optim import make_sgd
from fastres.runtime import Runtime
from fastres.step import Replica
from tests.test_step import CPU, Noise, compiles, one_thread  # noqa: F401 (a fixture for the whole file)

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs/fidelity.md").read_text(encoding="utf-8")
BLOCKS = [block.splitlines() for block in re.findall(r"^```sh\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)]


def resolved(capsys: pytest.CaptureFixture[str], line: str) -> RunConfig:
    """The config that a line of the document resolves to."""
    program, *argv = shlex.split(line)
    assert program == "fastres"
    assert run([*argv, "--dry-run"]) == 0
    return RunConfig.from_dict(tomllib.loads(capsys.readouterr().out))


def test_every_flag_named_exists() -> None:
    command = typer.main.get_command(app).get_command(None, "train")  # type: ignore[attr-defined]
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", DOCUMENT))
    assert len(named) > 20
    assert named - known - {"--help"} == set()


@pytest.mark.parametrize("section", [Model, Data, Recipe])
def test_every_key_is_named(section: type) -> None:
    keys = {f"{section.__name__.lower()}.{field.name}" for field in dataclasses.fields(section)} - {"data.dataset"}
    assert {key for key in keys if f"`{key}`" not in DOCUMENT} == set()


def test_every_test_named_is_there() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", DOCUMENT)
    assert len(named) > 10
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


def test_an_ablation_is_the_default_and_then_one_thing_changed(capsys: pytest.CaptureFixture[str]) -> None:
    changed = []
    for first, *others in BLOCKS[:-1]:
        default = resolved(capsys, first)
        assert default == make_config(model={"depth": default.model.depth})
        lines = [line for o in others for line in changed_keys(default.experiment(), resolved(capsys, o).experiment())]
        changed.append({line.partition(":")[0] for line in lines})
        assert len(lines) == len(others)
        assert len(changed[-1]) == 1
    assert set.union(*changed) == {
        "model.shortcut", "recipe.warmup", "recipe.weight_decay_on", "model.norm_batch", "data.val_split",
        "recipe.lr_in_velocity", "model.init", "model.pad",
    }  # fmt: skip
    nearest = resolved(capsys, *BLOCKS[-1])
    assert (nearest.model.norm_batch, nearest.recipe.lr_in_velocity, nearest.recipe.warmup) == (64, True, "error")


def test_clean_train_error_is_no_part_of_what_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(capsys, "fastres train --clean-train-error")
    assert config.output.clean_train_error
    assert not make_config().output.clean_train_error
    assert config.digest == make_config().digest


@compiles
@pytest.mark.parametrize("scope", ["blocks", "whole"])
def test_compiled_is_eager_with_the_switches_on(scope: Literal["blocks", "whole"]) -> None:
    """In fp64 over 20 steps, as `test_step.test_compiled_is_eager_in_fp64_over_50_steps` has it for the defaults."""

    def make(scope: Any = "none") -> Replica:
        net = CifarNet(8, pad="after", norm_batch=4)
        init_he_(net, mode="fan_out", generator=torch.Generator().manual_seed(0))
        how: dict[str, Any] = {"weight_decay_on": "weights", "lr_in_velocity": True}
        optimizer = make_sgd(net.double(), lr=0.1, momentum=0.9, weight_decay=1e-2, **how)
        replica = Replica(net, optimizer, Noise(torch.float64), Runtime(CPU, "fp32", scope), num_steps=20)
        replica.set_lrs(lambda step: 0.1 / (step // 3 + 1))
        return replica

    eager, compiled = make(), make(scope)
    for step in range(20):
        for one in (eager, compiled):
            one.step()
        assert float(compiled.losses[step]) == pytest.approx(float(eager.losses[step]), rel=1e-6)  # logged in fp32
    for (name, a), b in zip(eager.net.state_dict().items(), compiled.net.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10, msg=functools.partial("{1}: {0}".format, name))
