"""docs/fidelity.md says what is so: its flags and tests exist, its commands change what they say, no key is missing."""

import ast
import dataclasses
import functools
import re
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import typer.main
from torch import nn

from fastres.build import build_loaders, build_net, build_optimizer, load_images
from fastres.cli import app, run
from fastres.config import Data, Model, Recipe, RunConfig, make_config
from fastres.configtree import changed_keys, merge
from fastres.models.cifar import CifarNet, init_he_
from fastres.optim import make_sgd
from fastres.runtime import Runtime
from fastres.step import Replica
from tests.test_config import SWITCHES
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


BUILT: dict[str, Any] = {  # what of a built run each switch changes; some take part in the loss alone
    "model.arch": lambda parts: [parts.net.residual, *(name for name, _ in parts.net.named_modules())],
    "model.depth": lambda parts: len(list(parts.net.modules())),
    "model.shortcut": lambda parts: sorted(name for name, _ in parts.net.named_parameters()),
    "model.pad": lambda parts: parts.answer,
    "model.init": lambda parts: parts.net.conv1.weight.tolist(),
    "model.norm_batch": lambda parts: parts.answer_in_training,
    "model.bn_eps": lambda parts: [norm.eps for norm in parts.norms],
    "model.bn_momentum": lambda parts: [norm.momentum for norm in parts.norms],
    "data.augment": lambda parts: parts.batch.tolist(),
    "recipe.batch_size": lambda parts: len(parts.batch),
    "recipe.momentum": lambda parts: [group["momentum"] for group in parts.groups],
    "recipe.weight_decay": lambda parts: [group["weight_decay"] for group in parts.groups],
    "recipe.weight_decay_on": lambda parts: [(group["weight_decay"], len(group["params"])) for group in parts.groups],
    "recipe.lr_in_velocity": lambda parts: [group["lr_in_velocity"] for group in parts.groups],
    "seed": lambda parts: (parts.net.fc.weight.tolist(), parts.batch.tolist()),
}
OF_SCHEDULE = {"steps", "lr", "schedule", "milestones", "lr_decay", "warmup", "warmup_steps", "warmup_lr"}  # test_optim


def built(config: RunConfig) -> SimpleNamespace:
    """A run's parts, built as training builds them, and what they answer to the first batch."""
    runtime, images = Runtime(CPU, "fp32"), load_images(config.data, config.execution, say=print)
    net = build_net(config, runtime, num_classes=10)
    (loader,) = build_loaders([config], images, images.mean_image(), runtime)
    loader.prepare(0)
    batch, _ = loader.load(torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        in_training = net.train()(batch).tolist()
        answer = net.eval()(batch).tolist()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    groups = build_optimizer(net, config.recipe).param_groups
    return SimpleNamespace(
        net=net, norms=norms, batch=batch, groups=groups, answer=answer, answer_in_training=in_training
    )


def test_every_switch_reaches_what_is_built() -> None:
    """Else a run would be called by what it is not: digest, name and table know only the config."""
    keys = {f"model.{field.name}" for field in dataclasses.fields(Model)}
    keys |= {f"recipe.{field.name}" for field in dataclasses.fields(Recipe) if field.name not in OF_SCHEDULE}
    assert keys == BUILT.keys() - {"data.augment", "seed"}
    base = make_config(data={"dataset": "synthetic"}, model={"depth": 8}, execution={"device": "cpu"})
    usual, again = built(base), built(base)
    for path, part in BUILT.items():
        section, _, key = path.rpartition(".")
        own = {key: {"data.augment": False, "seed": 1, "model.depth": 14}.get(path, SWITCHES.get(section, {}).get(key))}
        other = built(make_config(**merge(base.to_dict(), {section: own} if section else own)))
        assert part(other) != part(usual), path
        assert part(again) == part(usual), path  # not by chance


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
