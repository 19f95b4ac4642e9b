"""Options that several commands share, and what their values mean: parsing, contradictions, epochs. No torch."""

import contextlib
import json
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fastres.config import RunConfig, preset_tree, with_dependent_defaults
from fastres.configtree import leaves, merge
from fastres.errors import InputError

T = TypeVar("T")
Word = TypeVar("Word", bound=str)
MAX_SEEDS = 1_000  # more is a slip of the hand

# Help texts.
DATA_DIR = "Folder or archive of CIFAR-10. [default: FASTRES_DATA, else the cache, else a download]"
MIRROR = "Mirror of cifar-10-binary.tar.gz, tried before the official address; repeatable."
DEVICES = "cpu, cuda, cuda:0, or auto: a GPU if there is one."
PRECISIONS = "fp32, tf32, bf16, fp16, or auto: bf16; fp16 on a GPU older than Ampere; fp32 on a CPU without bf16."
THREADS = "CPU threads; 0: one per core."

DataDir = Annotated[Path | None, typer.Option(help=DATA_DIR)]
DataUrls = Annotated[list[str] | None, typer.Option(metavar="URL", help=MIRROR)]
Device = Annotated[str, typer.Option(help=DEVICES)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]

# Of the commands that take a trained network.
Target = Annotated[Path, typer.Argument(metavar="RUN|FILE", help="Run folder, checkpoint or weights file.")]
Arch = Annotated[
    str | None,
    typer.Option(help="resnet, plain or imagenet, for a weights file that does not tell. [default: resnet]"),
]
Dataset = Annotated[
    str | None, typer.Option(help="cifar10 or synthetic. [default: as in training; of a weights file cifar10]")
]
ChannelMean = Annotated[
    str | None,
    typer.Option(
        help="Mean of each colour, 0 to 1, that a weights file was trained with: 0.485,0.456,0.406. "
        "[default: the training images' mean image]"
    ),
]
ChannelStd = Annotated[
    str | None, typer.Option(help="Standard deviation of each colour that goes with --mean: 0.229,0.224,0.225.")
]
IDLE = {  # flags that may do nothing beside others, and why
    "model.shortcut": "a plain net has none",
    "model.pad": "only option A's shortcuts have zero channels",
    "recipe.weight_decay_on": "the weight decay is 0",
    "recipe.lr_in_velocity": "the momentum is 0",
}


def parse_model(text: str, flag: str = "--model") -> tuple[str, int]:
    """ "ResNet20" as ("resnet", 20); case and a hyphen do not matter. Raises InputError."""
    match = re.fullmatch(r"(resnet|plain(?:net)?|imagenet-?resnet)-?(\d{1,9})", text.strip().lower())
    if not match:
        raise InputError(f"{flag} is {text!r}; write it as ResNet20 or PlainNet56 (or ImageNetResNet18)")
    kind = next(arch for arch in ("plain", "imagenet", "resnet") if match[1].startswith(arch))
    return kind, int(match[2])


def parse_milestones(text: str) -> list[int]:
    """ "32000,48000" as a list; "none" as an empty one. Raises InputError."""
    if text.strip().lower() == "none":
        return []
    try:
        return [int(part) for part in text.replace("_", "").split(",") if part.strip()]
    except ValueError:
        raise InputError(f"--milestones is {text!r}; write steps as 32000,48000, or none") from None


def parse_list(flag: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """ "20,56" as a list without doubles. Raises InputError."""
    try:
        values = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{flag} is {text!r}; write numbers as 20,56") from None
    if not values:
        raise InputError(f"{flag} is {text!r}; it must name at least one")
    return list(dict.fromkeys(values))


def parse_seeds(text: str, flag: str = "--seeds") -> list[int]:
    """ "5" as the five seeds 0 to 4, "2-4" as 2, 3, 4, "1,3" as 1, 3. Raises InputError."""
    wrong = InputError(f"{flag} is {text!r}; write 5 (seeds 0 to 4), 2-4, or 1,3,8, at most {MAX_SEEDS:,} in all")
    parts = [re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part.strip()) for part in text.split(",")]
    seeds: list[int] = []
    for part in parts:
        if part is None:
            raise wrong
        first, last = int(part[1]), int(part[2] or part[1])
        if len(parts) == 1 and part[2] is None:
            first, last = 0, last - 1
        if not 0 <= last - first < MAX_SEEDS:
            raise wrong
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{flag} is {text!r}, which has one of them twice; write 5 (seeds 0 to 4), 2-4, or 1,3,8")
    if len(seeds) > MAX_SEEDS:
        raise wrong
    return seeds


def parse_percent(flag: str, text: str) -> float:
    """ "5%" or "5" as 5.0. Raises InputError."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise InputError(f"{flag} is {text!r}; write a percentage as 5%")
    return value


def parse_channels(flag: str, text: str | None) -> tuple[float, float, float] | None:
    """Three numbers of 0 to 1, comma-separated; a standard deviation is not 0. None stays None. Raises InputError."""
    if text is None:
        return None
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{flag} is {text!r}; write three numbers as 0.485,0.456,0.406") from None
    for value in (red, green, blue):
        if not 0 <= value <= 1 or (flag == "--std" and value == 0):  # nor nan
            raise InputError(f"{flag} is {text!r}; pixels are 0 to 1 here, so {value:g} cannot be")
    return red, green, blue


def given(**values: Any) -> dict[str, Any]:
    """Only what was given, neither None nor an empty table; paths as text, as a config has them."""
    kept = {key: value for key, value in values.items() if value is not None and value != {}}
    return {key: str(value) if isinstance(value, Path) else value for key, value in kept.items()}


def one_of(flag: str, value: str, allowed: Sequence[Word]) -> Word:
    """The value of a flag. Raises InputError where it is none of those allowed."""
    for word in allowed:
        if word == value:
            return word
    raise InputError(f"{flag} is {value!r}; it must be one of {', '.join(allowed)}")


def refuse_both(one: str, first: object, other: str, second: object) -> None:
    """Raise InputError where both flags were given, neither None nor False."""
    if not any(value is None or value is False for value in (first, second)):
        raise InputError(f"{one} and {other} contradict each other; give one of them")


def refuse_data_flags(
    dataset: str, data_dir: Path | None, data_urls: list[str] | None = None, other: str = "add --dataset cifar10, or "
) -> None:
    """Raise InputError where a flag says where data is that is not looked for."""
    for flag, value in (("--data-dir", data_dir), ("--data-url", data_urls)):
        if value is not None and dataset == "synthetic":
            raise InputError(f"{flag} does nothing with built-in data; {other}leave it out")


def read_file(path: Path, flag: str = "--config") -> dict[str, Any]:
    """What the file that a flag names says: TOML; or a run's config.json, or its folder.

    Of a run's, not where it went, nor where its data was if that is gone.

    Raises:
        InputError: It cannot be read, or is neither.
    """
    if path.is_dir() and not (path / "config.json").exists():
        raise InputError(f"{flag} {path} is no run's folder: it has no config.json")
    path = path / "config.json" if path.is_dir() else path
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin with a mark
        tree = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{flag} {path} is not {kind}: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{flag} {path} holds no object of JSON, as a run's config.json does")
    if kind == "JSON" and isinstance(tree.get("output"), dict):
        tree["output"].pop("out", None)
    if kind == "JSON" and isinstance(tree.get("execution"), dict):
        from fastres.runfolders import found_again

        tree = found_again(tree)
    return tree


def read_config(path: Path, flag: str) -> RunConfig:
    """The run that the file which a flag names describes alone. Raises InputError."""
    return RunConfig.from_dict(with_dependent_defaults(based_on_preset(read_file(path, flag))))


def based_on_preset(tree: dict[str, Any], preset: str | None = None) -> dict[str, Any]:
    """A `--config` file's tree laid over the preset that it names, or that is given, else over "paper".

    Of one that sets everything, as `--dry-run` prints it, what follows from the rest is left out, to follow from what
    the flags make of it: with --depth 110 the warm-up, with --epochs its length.
    """
    rest = {key: value for key, value in tree.items() if key != "preset"}
    for section in ("model", "data", "recipe", "execution", "output"):
        if not isinstance(rest.get(section, {}), dict):
            raise InputError(f"{section} is {rest[section]!r}; it must be a table of keys: [{section}]")
    computed = {key for key in leaves(RunConfig().to_dict()) if key.startswith(("model.", "data.", "recipe."))}
    is_whole = computed <= {*leaves(rest)}
    if preset is not None and is_whole:
        raise InputError(f"--preset {preset} changes nothing: the config sets all that a preset would; leave it out")
    whole = merge(preset_tree(preset or tree.get("preset", "paper")), rest)
    return _without_dependent(whole) if is_whole else whole


def _without_dependent(tree: dict[str, Any]) -> dict[str, Any]:
    """A whole config's tree but for what `with_dependent_defaults` would fill in alike."""
    try:
        whole = RunConfig.from_dict(tree)
    except InputError:
        return tree  # the flags may make it one that can be; else it is refused when they are laid over it
    for section, key in (("recipe", "warmup_steps"), ("recipe", "warmup"), ("model", "shortcut")):
        fewer = {**tree, section: {name: value for name, value in tree[section].items() if name != key}}
        with contextlib.suppress(InputError):
            if RunConfig.from_dict(with_dependent_defaults(fewer)) == whole:
                tree = fewer
    return tree


def in_steps(
    flags: dict[str, Any], base: dict[str, Any], epochs: float | None, warmup_epochs: float | None
) -> dict[str, Any]:
    """The flags, with epochs turned into steps (rounded up), and a warm-up that was given a length but no kind."""
    if epochs is None and warmup_epochs is None and "warmup_steps" not in flags.get("recipe", {}):
        return flags
    tree, recipe = merge(base, flags), dict(flags.get("recipe", {}))
    # Only what the number of steps depends on: the rest is complete when that is known.
    batch = {key: value for key, value in tree.get("recipe", {}).items() if key == "batch_size"}
    draft = RunConfig.from_dict({"data": tree.get("data", {}), "recipe": batch})
    for key, value in (("steps", epochs), ("warmup_steps", warmup_epochs)):
        if value is not None:
            if not 0 < value < 1e9:
                flag = f"--{key.replace('steps', 'epochs').replace('_', '-')}"
                raise InputError(f"{flag} is {value}; it must be above 0 and below a billion")
            recipe[key] = max(1, -int(-value * draft.data.num_train // draft.recipe.batch_size))
    kind = recipe.get("warmup") or base.get("recipe", {}).get("warmup", "none")
    if "warmup_steps" in recipe and kind == "none":
        recipe["warmup"] = "constant"
    return merge(flags, {"recipe": recipe})


def check_idle(chosen: dict[str, Any], resolved: RunConfig) -> None:
    """Raise InputError where a flag does nothing beside the others."""
    defaults = RunConfig().to_dict()
    for path in IDLE.keys() & resolved.idle_keys():
        section, key = path.split(".")
        value = chosen.get(section, {}).get(key)
        if value not in (None, defaults[section][key]):
            raise InputError(f"--{key.replace('_', '-')} does nothing here: {IDLE[path]}; leave it out")
