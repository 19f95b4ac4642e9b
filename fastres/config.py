"""What a run is: one frozen tree of values, its presets, its validation, and its round trip through TOML and JSON.

The tree has two halves. `model`, `data`, `recipe` and `seed` say what is computed; two runs that agree in them compute
the same thing, and `RunConfig.digest` covers exactly them. `execution` and `output` say how it runs and what is kept;
no switch there may change a result. No torch and no I/O here, so that the command line starts at once.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from fastres.configtree import build, changed_keys, coerced, is_int, merge, nearest
from fastres.errors import InputError
from fastres.models.depth import check_depth

NUM_TRAIN = {"cifar10": 50_000, "synthetic": 10_000}  # images before any validation split
TINY, HUGE = 1e-30, 1e30  # of rates, well within fp32's range
MAX_STEPS = 10_000_000  # rates, losses and errors of each step are kept on the device: 160 MB
MAX_GRAPH_STEPS = 64  # a graph holds every kernel of its steps, a few hundred each
FIRST_LOOK = 400  # steps: where a warm-up by the training error may end (`optim.WARMUP_WINDOW`)
NUM_VALIDATION = 5_000  # the paper's 45k/5k split (section 4.2)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network (paper, section 4.2). What the paper leaves open is in docs/fidelity.md, with the reasons."""

    arch: Literal["resnet", "plain", "imagenet"] = "resnet"  # imagenet: Table 1's, their first layer for 32x32 images
    depth: int = 20  # 6n+2 layers; imagenet: 18, 34, 50, 101 or 152
    shortcut: Literal["A", "B"] = "A"  # A: identity, zero-padded channels; B: 1x1 projection where the shape changes
    pad: Literal["both", "after"] = "both"  # option A's zero channels: half before and half after the old, or all after
    init: Literal["fan_in", "fan_out"] = "fan_in"  # which fan He initialisation uses
    norm_batch: int = 0  # images that batch norm takes its statistics over; 0: the whole batch
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1  # weight of the new batch in the running statistics


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images, and what is done to them."""

    dataset: Literal["cifar10", "synthetic"] = "cifar10"
    val_split: bool = False  # train on 45k, evaluate on the other 5k training images; the test set stays unused
    augment: bool = True  # pad 4, random crop, random flip (section 4.2)

    @property
    def held_out(self) -> str:
        """What the images are called that errors are of: "test", or "validation"."""
        return "validation" if self.val_split else "test"

    @property
    def num_train(self) -> int:
        """Training images in an epoch."""
        return NUM_TRAIN[self.dataset] - (NUM_VALIDATION if self.val_split else 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Optimisation (paper, sections 3.4 and 4.2). A step is one update on one batch."""

    steps: int = 64_000
    batch_size: int = 128
    lr: float = 0.1
    schedule: Literal["step", "linear"] = "step"  # step: lr falls at each milestone; linear: to zero at the last step
    milestones: tuple[int, ...] = (32_000, 48_000)  # steps
    lr_decay: float = 0.1  # factor at each milestone
    # constant: warmup_lr for warmup_steps; error: warmup_lr until the training error is below 80 % (the paper's words);
    # ramp: a straight line from zero to lr over warmup_steps
    warmup: Literal["none", "constant", "error", "ramp"] = "none"
    warmup_steps: int = 400
    warmup_lr: float = 0.01
    momentum: float = 0.9
    # false: v <- m v + g, w <- w - lr v, as in PyTorch; true: v <- m v + lr g, w <- w - v, as in Caffe
    lr_in_velocity: bool = False
    weight_decay: float = 1e-4
    weight_decay_on: Literal["all", "weights"] = "all"  # weights: conv and fc weights only, not BN and biases


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How it runs. Nothing here may change what is computed, rounding of the chosen precision apart."""

    device: str = "auto"  # auto, cpu, cuda, cuda:<i>
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"  # tf32: fp32, multiplied with TF32's 10 bits
    loader: Literal["auto", "resident", "dali", "torchvision"] = "auto"
    compile: bool | None = None  # None: on a GPU yes, on a CPU no
    # whole: the network at once, fewest kernels; blocks: one by one, quickest start; auto: whole, but blocks for 110
    compile_scope: Literal["auto", "whole", "blocks"] = "auto"
    # plain: Inductor's own defaults; default: on a GPU with kernels joined (combo_kernels) where they depend on nothing
    # of each other; max-autotune: kernels chosen by timing them, which takes minutes
    compile_mode: Literal["default", "plain", "max-autotune"] = "default"
    cuda_graph: bool | None = None  # the whole step as one captured graph; None: on a GPU yes
    graph_steps: int = 1  # steps in a graph, where the log leaves room for so many
    deterministic: bool = False  # the same bits each time on a GPU too; on a CPU they are anyway
    # bf16 copies of the convolutions' weights, kept by the update instead of cast in each step; None: in bf16 on a GPU
    shadow_weights: bool | None = None
    native: bool | None = None  # fastres' own kernels; None: in bf16 on a GPU, and on a CPU where they can be built
    # on a GPU the kernels in CUDA C++, a launch a layer, instead of those in Triton; None: off
    layer_kernels: bool | None = None
    channels_last: bool = True
    threads: int = 0  # CPU threads of torch and DALI; 0: one a core
    data_dir: str | None = None
    data_urls: tuple[str, ...] = ()  # mirrors of cifar-10-binary.tar.gz, tried before the official address


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is kept, and how often (steps)."""

    out: str | None = None  # the run folder; None: runs/<model>-seed<seed>-<date>-<time>
    log_every: int = 100
    eval_every: int = 2_000
    clean_train_error: bool = False  # at each evaluation also the error on the training images, not augmented
    checkpoint_every: str = "10min"  # steps ("500") or minutes ("10min")

    @property
    def checkpoint_steps(self) -> int | None:
        """Steps between checkpoints, or None where they go by the clock."""
        return int(self.checkpoint_every) if self.checkpoint_every.isdigit() else None

    @property
    def checkpoint_seconds(self) -> float | None:
        """Seconds between checkpoints, or None where they go by steps."""
        text = self.checkpoint_every
        return None if text.isdigit() else 60 * float(text.removesuffix("min").removesuffix("m"))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run.

    The default is the paper's ResNet-20 on CIFAR-10. Build one with `fastres.make_config`, which applies presets and
    fills in what depends on other values, as ResNet-110's warm-up. `RunConfig(...)` and `dataclasses.replace` check
    types and values, and fill in nothing.

    Raises:
        InputError: A value is out of range; the message names the key, the value and what is allowed.
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    execution: Execution = field(default_factory=Execution)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        for key, value in coerced(self).items():
            object.__setattr__(self, key, value)  # frozen for all others
        _validate(self)

    @property
    def name(self) -> str:
        """The model in one word: ResNet20, PlainNet56, ImageNetResNet18."""
        kinds = {"resnet": "ResNet", "plain": "PlainNet", "imagenet": "ImageNetResNet"}
        return f"{kinds[self.model.arch]}{self.model.depth}"

    @property
    def epochs(self) -> float:
        """Passes over the training images; the last may be partial."""
        return self.recipe.steps * self.recipe.batch_size / self.data.num_train

    def experiment(self) -> dict[str, Any]:
        """The half that says what is computed, JSON-ready; values without effect are replaced by the defaults."""
        tree, defaults = self.to_dict(), RunConfig().to_dict()
        for section, key in (path.split(".") for path in self.idle_keys()):
            tree[section][key] = defaults[section][key]
        return {key: tree[key] for key in ("model", "data", "recipe", "seed")}

    def idle_keys(self) -> set[str]:
        """Keys of the experiment that do nothing beside the others, by their whole path."""
        model, recipe, linear = self.model, self.recipe, self.recipe.schedule == "linear"
        falls = any(milestone < recipe.steps for milestone in recipe.milestones)
        idle = {
            "model.shortcut": model.arch == "plain",
            "model.pad": model.arch == "plain" or model.shortcut == "B",
            "model.norm_batch": model.norm_batch == recipe.batch_size,
            "recipe.milestones": linear or (recipe.lr_decay == 1 if falls else recipe.steps <= Recipe.milestones[0]),
            "recipe.lr_decay": linear or not falls,
            "recipe.warmup_steps": recipe.warmup in ("none", "error"),
            "recipe.warmup_lr": recipe.warmup in ("none", "ramp"),
            "recipe.weight_decay_on": recipe.weight_decay == 0,
            "recipe.lr_in_velocity": recipe.momentum == 0,
        }
        return {key for key, is_idle in idle.items() if is_idle}

    @property
    def digest(self) -> str:
        """Sixteen hex digits over `experiment()`: equal digests, equal experiments."""
        text = json.dumps(self.experiment(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differs_from(self, other: "RunConfig", *, but_seed: bool = False) -> list[str]:
        """In what `other` computes another thing, as lines "recipe.lr: 0.1 -> 0.2"; `but_seed`: beside the seed."""
        theirs = other.experiment()
        return changed_keys(self.experiment(), theirs | {"seed": self.seed} if but_seed else theirs)

    def to_dict(self) -> dict[str, Any]:
        """The tree as JSON-ready values: tuples as lists, None where nothing was chosen."""
        tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return tree

    def to_toml(self) -> str:
        """The tree as TOML; `fastres train --config` reads it back to an equal value. Unset keys are left out."""
        import tomli_w

        def drop_none(value: Any) -> Any:
            return {k: drop_none(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value

        return tomli_w.dumps(drop_none(self.to_dict()))

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> "RunConfig":
        """Build from nested mappings, as `to_dict`, TOML or JSON give them.

        Raises:
            InputError: An unknown key (with the nearest known one), a value of the wrong type or out of range.
        """
        config = build(RunConfig, tree)
        assert isinstance(config, RunConfig)
        return config


# What a preset changes from the defaults, as the nested mappings that `RunConfig.from_dict` takes.
PRESETS: dict[str, dict[str, Any]] = {
    # The paper's recipe: the defaults above. ResNet-110's warm-up is added by `make_config`.
    "paper": {},
    # A quick look: few epochs, ramp and straight-line decay.
    "fast": {
        "recipe": {"steps": 3_910, "schedule": "linear", "warmup": "ramp"},
        "output": {"log_every": 50, "eval_every": 391},
    },
    # Needs no data and no GPU; about a minute on two CPU cores.
    "smoke": {
        "data": {"dataset": "synthetic"},
        "recipe": {"steps": 250, "schedule": "linear", "warmup": "ramp"},
        "output": {"log_every": 10, "eval_every": 79},
    },
}


def make_config(preset: str = "paper", **changes: Any) -> RunConfig:
    """A validated config: a preset, changed.

    Args:
        preset: "paper" (64k steps as in the paper), "fast" (ten epochs, linear decay) or "smoke" (built-in data).
        **changes: `section={"key": value}` or `seed=...`, for example `model={"depth": 56}`, `recipe={"steps": 1000}`.

    Returns:
        The config, with ResNet-110's (and deeper ResNets') warm-up filled in unless `recipe.warmup` was given.

    Raises:
        InputError: An unknown preset or key, or a value out of range.
    """
    for key, value in changes.items():
        if dataclasses.is_dataclass(value):
            raise InputError(f"{key} is {value}; give a dict of what differs from the preset, as model={{'depth': 56}}")
    tree = merge(preset_tree(preset), changes)
    config = RunConfig.from_dict(with_dependent_defaults(tree))
    check_sense(config)
    return config


def check_sense(config: RunConfig) -> None:
    """Raise InputError where a new run would hardly be what was meant; stored ones are read as they are."""
    recipe = config.recipe
    if recipe.warmup in ("constant", "error") and recipe.warmup_lr > recipe.lr:
        rule = f"a warm-up's must not be above lr, {recipe.lr}; --warmup none turns it off"
        raise InputError(f"warmup_lr is {recipe.warmup_lr}; {rule}")
    if recipe.warmup == "error" and recipe.steps < FIRST_LOOK:
        rule = f"a warm-up by the training error lasts {FIRST_LOOK} steps at least; --warmup constant may be shorter"
        raise InputError(f"steps is {recipe.steps}; {rule}")


def preset_tree(name: object) -> dict[str, Any]:
    """The nested mappings of a preset. Raises InputError where there is none of that name."""
    if not isinstance(name, str) or name not in PRESETS:  # from a file it may be anything
        raise InputError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}{nearest(str(name), PRESETS)}")
    return json.loads(json.dumps(PRESETS[name]))  # type: ignore[no-any-return]


def with_dependent_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """Fill in what depends on something else; what the caller set is left alone.

    ResNet-110 alone warms up (section 4.2), over 400 steps; deeper ResNets are treated likewise. A ramp takes a tenth
    of the steps, and so does the other where 400 are too many. A warm-up of a length is constant. The ImageNet networks
    project where the shape changes, as the paper's bottlenecks do (section 4.1); the first of them has 18 layers.
    """
    model, recipe = tree.get("model", {}), tree.get("recipe", {})
    if not isinstance(model, Mapping) or not isinstance(recipe, Mapping):
        return tree  # refused when the config is built
    if model.get("arch") == "imagenet":
        tree = merge({"model": {"depth": 18, "shortcut": "B"}}, tree)
    deep_resnet = model.get("arch", "resnet") == "resnet" and is_int(model.get("depth")) and model["depth"] >= 110
    warms_up = "warmup_steps" in recipe or (deep_resnet and recipe.get("schedule", "step") == "step")
    kind, steps = recipe.get("warmup", "constant" if warms_up else "none"), recipe.get("steps", Recipe.steps)
    filled = {"warmup": kind} if kind != "none" else {}
    if is_int(steps) and (kind == "ramp" or (kind == "constant" and steps < Recipe.warmup_steps)):
        filled["warmup_steps"] = max(1, steps // 10)
    return merge(tree, {"recipe": {**filled, **recipe}}) if filled else tree


def _validate(config: RunConfig) -> None:
    """Raise InputError on the first value that cannot be trained with."""
    model, recipe, output = config.model, config.recipe, config.output

    def need(holds: bool, key: str, value: object, rule: str) -> None:
        if not holds:
            raise InputError(f"{key} is {value}; {rule}")

    check_depth(model.depth, imagenet=model.arch == "imagenet")
    need(0 <= config.seed < 2**63, "seed", config.seed, "it must be between 0 and 2**63 - 1")
    need(1 <= recipe.steps <= MAX_STEPS, "steps", recipe.steps, f"it must be at least 1, and at most {MAX_STEPS:,}")
    rule = f"it must be between 1 and {config.data.num_train:,}, the training images"
    need(1 <= recipe.batch_size <= config.data.num_train, "batch_size", recipe.batch_size, rule)
    rule = f"it must divide batch_size, {recipe.batch_size}, or be 0 for the whole batch"
    fits = model.norm_batch >= 0 and recipe.batch_size % (model.norm_batch or 1) == 0
    need(fits, "norm_batch", model.norm_batch, rule)
    need(math.isfinite(model.bn_eps) and model.bn_eps > 0, "bn_eps", model.bn_eps, "it must be a finite number above 0")
    need(0 < model.bn_momentum <= 1, "bn_momentum", model.bn_momentum, "it must be above 0 and at most 1")
    for key, low_ok in (("lr", False), ("warmup_lr", False), ("weight_decay", True)):
        value = getattr(recipe, key)
        rule = f"it must be {'0 or ' if low_ok else ''}{TINY:g} to {HUGE:g}, for which fp32 has room"
        need(TINY <= value <= HUGE or (low_ok and value == 0), key, value, rule)
    need(1e-6 <= recipe.lr_decay <= 1, "lr_decay", recipe.lr_decay, "it must be 1e-6 to 1")
    need(0 <= recipe.momentum < 1, "momentum", recipe.momentum, "it must be at least 0 and below 1")
    rises = all(a < b for a, b in pairwise((0, *recipe.milestones)))
    need(rises, "milestones", list(recipe.milestones), "they must rise, from above 0")
    need(recipe.warmup_steps >= 1, "warmup_steps", recipe.warmup_steps, "it must be at least 1, or --warmup none")
    if recipe.warmup in ("ramp", "constant"):
        rule = f"it must end within the {recipe.steps} steps: give fewer --warmup-steps, or --warmup none turns it off"
        need(recipe.warmup_steps <= recipe.steps, "warmup_steps", recipe.warmup_steps, rule)
    if config.data.val_split:
        need(config.data.dataset == "cifar10", "val_split", "true", "only CIFAR-10 has the paper's 45k/5k split")
    graph_steps, device = config.execution.graph_steps, config.execution.device
    need(1 <= graph_steps <= MAX_GRAPH_STEPS, "graph_steps", graph_steps, f"it must be 1 to {MAX_GRAPH_STEPS}")
    need(bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", device)), "device", repr(device), "use auto, cpu, cuda or cuda:0")
    need(config.execution.threads >= 0, "threads", config.execution.threads, "0 means one a core")
    for key in ("log_every", "eval_every"):
        need(getattr(output, key) >= 1, key, getattr(output, key), "it must be at least 1 step")
    every = output.checkpoint_every
    rule = "give steps (500) or minutes (10min), above 0"
    fits = re.fullmatch(r"\d+|\d+(\.\d+)?m(in)?", every) is not None
    need(fits and float(re.sub(r"m(in)?$", "", every)) > 0, "checkpoint_every", repr(every), rule)
