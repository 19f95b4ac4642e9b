"""config.py: what is accepted, what is refused and how, and that values survive their round trips."""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastres.config import PRESETS, Model, Recipe, RunConfig, make_config
from fastres.configtree import changed_keys, merge, show_key, show_value
from fastres.errors import InputError
from fastres.optim import LrSchedule


def test_default_is_the_papers_recipe() -> None:
    config = make_config()
    assert config == RunConfig()
    assert config.name == "ResNet20"
    recipe = config.recipe
    assert (recipe.steps, recipe.batch_size, recipe.lr, recipe.momentum, recipe.weight_decay) == (
        64_000,
        128,
        0.1,
        0.9,
        1e-4,
    )
    assert (recipe.milestones, recipe.lr_decay, recipe.warmup) == ((32_000, 48_000), 0.1, "none")
    assert (recipe.weight_decay_on, recipe.lr_in_velocity) == ("all", False)
    model = config.model
    assert (model.shortcut, model.pad, model.init, model.norm_batch) == ("A", "both", "fan_in", 0)
    assert (model.bn_eps, model.bn_momentum) == (1e-5, 0.1)


@pytest.mark.parametrize(
    ("arch", "depth", "warmup"),
    [("resnet", 56, "none"), ("resnet", 110, "constant"), ("resnet", 1202, "constant"), ("plain", 110, "none")],
)
def test_resnet_110_alone_warms_up(arch: str, depth: int, warmup: str) -> None:
    config = make_config(model={"arch": arch, "depth": depth})
    assert (config.recipe.warmup, config.recipe.warmup_steps, config.recipe.warmup_lr) == (warmup, 400, 0.01)
    assert make_config(model={"depth": 110}, recipe={"warmup": "none"}).recipe.warmup == "none"


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trips(preset: str) -> None:
    config = make_config(preset, seed=3, output={"checkpoint_every": 500}, execution={"compile": True})
    assert RunConfig.from_dict(tomllib.loads(config.to_toml())) == config
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_digest_covers_what_is_computed_and_nothing_else() -> None:
    base = make_config()
    same = make_config(execution={"device": "cpu", "precision": "fp32", "loader": "dali"}, output={"log_every": 7})
    assert same.digest == base.digest
    others = [
        make_config(seed=1),
        make_config(model={"depth": 56}),
        make_config(data={"augment": False}),
        make_config(recipe={"weight_decay_on": "weights"}),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5


SWITCHES: dict[str, dict[str, Any]] = {
    "model": {
        "arch": "plain",
        "depth": 56,
        "shortcut": "B",
        "pad": "after",
        "init": "fan_out",
        "norm_batch": 64,
        "bn_eps": 1e-3,
        "bn_momentum": 0.01,
    },
    "recipe": {
        "steps": 100,
        "batch_size": 64,
        "lr": 0.2,
        "schedule": "linear",
        "milestones": [1],
        "lr_decay": 0.2,
        "warmup": "error",
        "warmup_steps": 7,
        "warmup_lr": 0.02,
        "momentum": 0.8,
        "lr_in_velocity": True,
        "weight_decay": 1e-3,
        "weight_decay_on": "weights",
    },
}


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in SWITCHES.items() for key in keys])
def test_every_switch_of_the_first_half_is_in_the_digest_and_named_where_it_differs(section: str, key: str) -> None:
    fields = dataclasses.fields({"model": Model, "recipe": Recipe}[section])
    assert {field.name for field in fields} == SWITCHES[section].keys()
    base = make_config(recipe={"warmup": "constant"} if key in ("warmup_steps", "warmup_lr") else {})
    tree = base.to_dict()
    tree[section][key] = SWITCHES[section][key]
    other = RunConfig.from_dict(tree)
    assert other.digest != base.digest
    (line,) = changed_keys(base.experiment(), other.experiment())
    assert line.startswith(f"{section}.{key}: ")


BAD: list[tuple[dict[str, object], str]] = [
    ({"model": {"depth": 21}}, "20.*26"),
    ({"model": {"depht": 20}}, "did you mean 'depth'"),
    ({"modle": {}}, "did you mean 'model'"),
    ({"model": {"arch": "resnett"}}, "did you mean 'resnet'"),
    ({"model": 20}, "must be a table"),
    ({"recipe": {"batch_size": 0}}, "batch_size is 0"),
    ({"recipe": {"batch_size": 50_001}}, "50,000"),
    ({"recipe": {"batch_size": 128.0}}, "must be an integer"),
    ({"recipe": {"batch_size": True}}, "must be an integer"),
    ({"recipe": {"lr": float("nan")}}, "lr is nan"),
    ({"recipe": {"lr": float("inf")}}, "lr is inf"),
    ({"recipe": {"lr": 0}}, "must be 1e-30 to"),
    ({"recipe": {"lr": "0.1"}}, "must be a number"),
    ({"recipe": {"steps": 0}}, "at least 1"),
    ({"recipe": {"lr": 10**400}}, "must be a number"),
    ({"recipe": {"lr_decay": 1e-300}}, "lr_decay is 1e-300; it must be 1e-6 to 1"),
    ({"recipe": {"lr": 0.001, "warmup": "constant"}}, "warmup_lr is 0.01; a warm-up's must not be above lr, 0.001"),
    ({"recipe": {"milestones": 5}}, "must be a list of integers"),
    ({"execution": {"data_urls": "http://x"}}, "must be a list of text"),
    ({"recipe": {"warmup": "error", "steps": 399}}, "steps is 399; a warm-up by the training error lasts 400 steps"),
    ({"recipe": {5: 1}}, "unknown key recipe.5; keys: "),
    ({"steps": 5}, "unknown key steps; it is one of recipe's: recipe.steps"),
    ({"model": Model(depth=110)}, "give a dict of what differs from the preset"),
    ({"recipe": {"momentum": 1.0}}, "below 1"),
    ({"recipe": {"lr_in_velocity": "yes"}}, "true or false"),
    ({"model": {"norm_batch": 48}}, "norm_batch is 48; it must divide batch_size, 128, or be 0 for the whole batch"),
    ({"model": {"norm_batch": 256}}, "must divide batch_size, 128"),
    ({"model": {"norm_batch": -64}}, "must divide batch_size, 128"),
    ({"model": {"norm_batch": 64}, "recipe": {"batch_size": 96}}, "must divide batch_size, 96"),
    ({"model": {"pad": "before"}}, "one of both, after"),
    ({"model": {"bn_eps": 0.0}}, "bn_eps is 0.0"),
    ({"model": {"bn_eps": float("inf")}}, "bn_eps is inf"),
    ({"model": {"bn_momentum": 0}}, "above 0 and at most 1"),
    ({"model": {"bn_momentum": 1.5}}, "above 0 and at most 1"),
    ({"recipe": {"weight_decay": -1e-4}}, "must be 0 or 1e-30 to 1e"),
    ({"recipe": {"lr": 1e-300}}, r"lr is 1e-300; it must be 1e-30 to 1e\+30, for which fp32 has room"),
    ({"recipe": {"lr": 1e39}}, "for which fp32 has room"),
    ({"recipe": {"milestones": [48_000, 32_000]}}, "must rise"),
    ({"recipe": {"milestones": [32_000, 32_000]}}, "must rise"),
    ({"recipe": {"milestones": [0, 5]}}, "must rise"),
    ({"recipe": {"milestones": ["a"]}}, r"milestones\[0\]"),
    ({"recipe": {"warmup": "ramp", "warmup_steps": 11, "steps": 10}}, "must end within the 10 steps"),
    ({"recipe": {"warmup": "constant", "warmup_steps": 11, "steps": 10}}, "must end within the 10 steps"),
    ({"recipe": {"steps": 300, "warmup_steps": 400}}, "warmup_steps is 400; it must end within the 300 steps"),
    ({"recipe": {"warmup_steps": 0}}, "warmup none"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "seed is"),
    ({"data": {"dataset": "cifar100"}}, "cifar10"),
    ({"data": {"dataset": "synthetic", "val_split": True}}, "45k/5k"),
    ({"execution": {"device": "gpu"}}, "cuda:0"),
    ({"execution": {"threads": -1}}, "threads is -1"),
    ({"output": {"log_every": 0}}, "log_every is 0"),
    ({"output": {"checkpoint_every": "soon"}}, "10min"),
    ({"output": {"checkpoint_every": "0"}}, "above 0"),
    ({"output": {"checkpoint_every": "0.0min"}}, "above 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_values_are_refused_with_the_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(**changes)


def test_values_given_in_python_are_held_to_the_same_rules() -> None:
    for bad, message in (
        (lambda: RunConfig(recipe=Recipe(schedule="cosine")), "must be one of step, linear"),  # type: ignore[arg-type]
        (lambda: RunConfig(recipe=Recipe(steps="10")), "recipe.steps is '10'; it must be an integer"),  # type: ignore[arg-type]
        (lambda: RunConfig(model=Model(arch="rezznet")), "did you mean 'resnet'"),  # type: ignore[arg-type]
        (lambda: RunConfig(seed=True), "seed is True; it must be an integer"),
    ):
        with pytest.raises(InputError, match=message):
            bad()
    assert RunConfig(recipe=Recipe(lr=1)).digest == make_config(recipe={"lr": 1}).digest


def test_numbers_of_numpy_and_paths_are_taken() -> None:
    ours = make_config(
        model={"depth": np.int64(110)},
        recipe={"lr": np.float64(0.1), "milestones": np.array([32_000, 48_000]), "warmup_steps": np.int32(400)},
        seed=np.uint8(3),
        output={"out": Path("runs/x")},
    )
    assert ours == make_config(model={"depth": 110}, seed=3, output={"out": "runs/x"})
    assert ours.recipe.warmup == "constant"
    assert json.loads(json.dumps(ours.to_dict()))["seed"] == 3


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ({"model": {"arch": "plain"}}, {"model": {"shortcut": "B", "pad": "after"}}),
        ({"model": {"shortcut": "B"}}, {"model": {"pad": "after"}}),
        ({"recipe": {"schedule": "linear"}}, {"recipe": {"milestones": [5], "lr_decay": 0.5}}),
        ({"recipe": {"warmup": "none"}}, {"recipe": {"warmup_steps": 7, "warmup_lr": 0.02}}),
        ({"recipe": {"warmup": "ramp", "warmup_steps": 9}}, {"recipe": {"warmup_lr": 0.02}}),
        ({"recipe": {"warmup": "error"}}, {"recipe": {"warmup_steps": 7}}),
        ({"recipe": {"momentum": 0.0}}, {"recipe": {"lr_in_velocity": True}}),
        ({"recipe": {"weight_decay": 0.0}}, {"recipe": {"weight_decay_on": "weights"}}),
        ({"recipe": {"lr_decay": 1.0}}, {"recipe": {"milestones": [5]}}),
        ({"recipe": {"steps": 100}}, {"recipe": {"milestones": [100, 200], "lr_decay": 0.5}}),
        ({"recipe": {"steps": 100}}, {"recipe": {"milestones": [], "lr_decay": 0.5}}),
        ({"recipe": {"milestones": []}}, {"recipe": {"lr_decay": 0.5}}),
        ({"recipe": {"batch_size": 32}}, {"model": {"norm_batch": 32}}),
    ],
    ids=str,
)
def test_what_has_no_effect_makes_no_other_experiment(base: dict[str, Any], changes: dict[str, Any]) -> None:
    ours, theirs = make_config(**base), make_config(**merge(base, changes))
    assert ours != theirs
    assert ours.digest == theirs.digest
    with_effect = make_config(**merge(base, {"recipe": {"batch_size": 96}}))
    assert with_effect.digest != ours.digest


def test_unknown_preset() -> None:
    with pytest.raises(InputError, match="did you mean 'smoke'"):
        make_config("smok")


def test_checkpoint_every_in_steps_or_minutes() -> None:
    by_step = make_config(output={"checkpoint_every": "500"}).output
    assert (by_step.checkpoint_steps, by_step.checkpoint_seconds) == (500, None)
    by_clock = make_config(output={"checkpoint_every": "2.5min"}).output
    assert (by_clock.checkpoint_steps, by_clock.checkpoint_seconds) == (None, 150.0)


def test_ramp_takes_a_tenth_of_the_steps_unless_told() -> None:
    assert make_config("fast", recipe={"steps": 500}).recipe.warmup_steps == 50
    assert make_config("fast", recipe={"steps": 1}).recipe.warmup_steps == 1
    assert make_config(recipe={"warmup": "ramp"}).recipe.warmup_steps == 6_400
    assert make_config("fast", recipe={"steps": 500, "warmup_steps": 7}).recipe.warmup_steps == 7


def test_milestones_that_come_are_an_experiment() -> None:
    digests = {make_config(recipe={"milestones": m, "steps": n}).digest for n, m in MILESTONES}
    assert len(digests) == len(MILESTONES)


@pytest.mark.parametrize("steps", [1, 31_999, 32_000, 32_001, 48_000, 48_001, 64_000, 100_000])
def test_equal_digests_are_equal_rates(steps: int) -> None:
    rates: dict[str, set[tuple[float, ...]]] = {}
    for milestones in ([], [32_000, 48_000], [32_000], [48_000], [31_999], [64_000], [100, 48_000], [100_000]):
        for decay in (0.1, 0.5, 1.0):
            config = make_config(recipe={"steps": steps, "milestones": milestones, "lr_decay": decay})
            at = LrSchedule(config.recipe).at
            looked = [s for s in (0, 99, 100, 31_998, 31_999, 32_000, 47_999, 48_000, 64_000) if s < steps]
            rates.setdefault(config.digest, set()).add(tuple(at(s, None) for s in looked))
    assert all(len(of_digest) == 1 for of_digest in rates.values())


MILESTONES: list[tuple[int, list[int]]] = [
    (100, [99]), (100, [50]), (100, []), (64_000, []), (64_000, [32_000, 48_000]), (64_000, [70_000, 80_000, 90_000])
]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "warmup"),
    [
        ({"recipe": {"warmup_steps": 50}}, ("constant", 50)),
        ({"recipe": {"warmup_steps": 50, "warmup": "ramp"}}, ("ramp", 50)),
        ({"recipe": {"warmup_steps": 50, "warmup": "none"}}, ("none", 50)),
        ({"model": {"depth": 110}}, ("constant", 400)),
        ({"model": {"depth": 110}, "recipe": {"steps": 400}}, ("constant", 400)),
        ({"model": {"depth": 110}, "recipe": {"steps": 399}}, ("constant", 39)),
        ({"model": {"depth": 110}, "recipe": {"steps": 3}}, ("constant", 1)),
        ({"model": {"depth": 110}, "recipe": {"steps": 300, "warmup": "none"}}, ("none", 400)),
        ({"model": {"depth": 110}, "recipe": {"schedule": "linear"}}, ("none", 400)),
        ({"recipe": {"warmup": "constant", "lr": 0.01}}, ("constant", 400)),  # no lower than the rate after it
    ],
    ids=str,
)
def test_warm_ups(how: dict[str, Any], warmup: tuple[str, int]) -> None:
    recipe = make_config(**how).recipe
    assert (recipe.warmup, recipe.warmup_steps) == warmup


def test_differences_name_the_keys() -> None:
    ours, theirs = make_config().experiment(), make_config(recipe={"lr": 0.2}, seed=1).experiment()
    assert changed_keys(ours, theirs) == ["recipe.lr: 0.1 -> 0.2", "seed: 0 -> 1"]


def test_configs_differ_in_what_they_compute_and_in_the_seed_where_it_counts() -> None:
    ours, theirs = make_config(), make_config(recipe={"lr": 0.2}, seed=1, execution={"threads": 3})
    assert ours.differs_from(theirs) == ["recipe.lr: 0.1 -> 0.2", "seed: 0 -> 1"]
    assert ours.differs_from(theirs, but_seed=True) == ["recipe.lr: 0.1 -> 0.2"]
    assert make_config(seed=1).differs_from(make_config(seed=2), but_seed=True) == []


@pytest.mark.parametrize(
    ("path", "value", "shown"),
    [
        ("data.augment", False, "off"),
        ("execution.compile", None, "auto"),
        ("recipe.milestones", [32_000, 48_000], "32000,48000"),
        ("execution.data_urls", (), "none"),
        ("recipe.steps", 64_000, "64,000"),
        ("seed", 12_345, "12345"),
        ("recipe.lr", 0.100000001, "0.100000001"),  # not the 0.1 beside it
        ("recipe.lr", 1.0, "1"),
        ("fastres", "2.0", "2.0"),
    ],
)
def test_a_value_is_shown_as_people_write_it(path: str, value: object, shown: str) -> None:
    assert show_value(path, value) == shown


def test_a_key_is_shown_without_its_section() -> None:
    assert show_key("recipe.weight_decay_on") == show_key("weight_decay_on") == "weight decay on"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "auto", "B", "5min", "error"])
VALUES = SCALARS | st.lists(SCALARS, max_size=3)
KEYS = st.sampled_from(["model", "data", "recipe", "seed", "execution", "output"])
SUBKEYS = st.sampled_from(
    ["depth", "arch", "norm_batch", "steps", "lr", "milestones", "dataset", "device", "out", "compile", "log_every"]
)


@settings(deadline=None)
@given(st.dictionaries(KEYS, st.dictionaries(SUBKEYS, VALUES, max_size=3) | VALUES, max_size=4))
def test_rubbish_is_refused_as_input_and_never_as_a_bug(tree: dict[str, Any]) -> None:
    try:
        config = make_config(**tree)
    except InputError:
        return
    assert RunConfig.from_dict(config.to_dict()) == config
