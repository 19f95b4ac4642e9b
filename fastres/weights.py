"""Reads the weights that other projects published: safetensors, or torch's pickles without running their code.

The only module that opens a pickle of weights, and it does so with torch's weights-only unpickler.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastres.errors import InputError
from fastres.models.cifar import CifarNet
from fastres.models.depth import check_depth
from fastres.models.imagenet import ImageNetNet, Network

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts save the state dict
PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")  # left by DataParallel and torch.compile
RENAMED = (
    (re.compile(r"^linear\."), "fc."),
    (re.compile(r"^(layer\d\.\d+)\.shortcut\."), r"\1.downsample."),  # option B in the family of kuangliu's models
)


@dataclass(frozen=True)
class ForeignWeights:
    """A state dict that the network of these values takes as it is.

    Attributes:
        state: fp32 tensors on the CPU, by the names of `fastres.models`.
        depth: Layers, from the names.
        shortcut: "B" where there are projections, else "A".
        arch: "imagenet" where there is a fourth stage, "resnet" where there are projections. None otherwise: a ResNet
            with option A and a PlainNet have the same tensors, and only who trained them knows.
    """

    state: dict[str, Tensor]
    depth: int
    shortcut: Literal["A", "B"]
    arch: Literal["resnet", "imagenet"] | None


def read_weights(path: Path) -> ForeignWeights:
    """Read a weights file: `.safetensors`, or what `torch.save` wrote of a state dict (`.th`, `.pt`, `.pth`, ...).

    Unwraps {"state_dict": ...}, strips `module.` and `_orig_mod.`, drops batch norm's counters, and knows `linear.` for
    `fc.` and `shortcut.` for `downsample.`.

    Raises:
        InputError: The file cannot be read, its pickle asks for more than tensors (it was not run), or its tensors
            are not those of a network for 32x32 images with ten classes; the message names the first that differ.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = _common_names(_unwrapped(content, path), path)
    stages = _blocks_by_stage(state)
    if not stages:
        found = ", ".join(list(state)[:3]) or "none"
        raise InputError(f"{path} holds no CIFAR ResNet: it has no layer1.0.conv1.weight; its tensors: {found}")
    projects = any(".downsample." in name for name in state)
    shortcut: Literal["A", "B"] = "B" if projects else "A"
    arch: Literal["resnet", "imagenet"] | None = "resnet" if projects else None
    depth = 6 * stages[0] + 2
    if len(stages) == 4:
        layers = 3 if "layer1.0.conv3.weight" in state else 2  # of a block
        arch, depth = "imagenet", layers * sum(stages) + 2
        check_depth(depth, imagenet=True)
    with torch.device("meta"):
        net = ImageNetNet(depth, shortcut=shortcut) if arch == "imagenet" else CifarNet(depth, shortcut=shortcut)
    _check_fit(state, net, path)
    return ForeignWeights(state, depth, shortcut, arch)


def _blocks_by_stage(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Of layer1, layer2, ...: how many blocks each has."""
    found = {match[1] for name in state if (match := re.match(r"(layer[1-4]\.\d+)\.conv1\.weight$", name))}
    stages = [block.partition(".")[0] for block in found]
    return tuple(stages.count(stage) for stage in sorted(set(stages)))


def _read_safetensors(path: Path) -> object:
    try:
        return safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, safetensors.SafetensorError) as error:  # KeyError: a dtype that torch lacks
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            for notice in ("Detected pickle protocol", "Validating sparse", "Sparse invariant"):
                warnings.filterwarnings("ignore", notice)  # what comes of it is an error, told below
            return torch.load(path, weights_only=True, map_location="cpu")  # a restricted unpickler: it runs no code
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged or hostile pickle can make the unpickler raise anything
        refused = re.search(r"(?:GLOBAL|global|function|class) ([\w.]+\.\w+)", str(error))
        if refused:
            raise InputError(
                f"{path} is refused: to read it would run code ({refused[1]}). "
                f"Save only the tensors: torch.save(net.state_dict(), file)"
            ) from error
        why = " (it is empty)" if path.stat().st_size == 0 else ""
        raise InputError(
            f"{path} was not written by torch.save, or is damaged{why}; fastres reads state dicts saved by it, and "
            ".safetensors"
        ) from error


def _unwrapped(content: object, path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors, wherever the file keeps it."""
    for _ in range(3):  # a bound, since a pickle can hold itself
        if isinstance(content, Mapping):
            content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict (names and tensors)")
    return {str(name): t for name, t in content.items() if isinstance(t, Tensor)}


def _common_names(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = PREFIX.sub("", name)
        for pattern, replacement in RENAMED:
            plain = pattern.sub(replacement, plain)
        if not plain.endswith("num_batches_tracked"):
            if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
                kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
                raise InputError(f"{path}: {name} is {tensor.dtype} ({kind}); weights are dense floating-point numbers")
            renamed[plain] = tensor.detach().float()
    return renamed


def _check_fit(state: Mapping[str, Tensor], net: Network, path: Path) -> None:
    """Raise InputError unless names and shapes are exactly those of the network that the names say."""
    wanted: dict[str, Any] = net.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in wanted]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"{path} does not fit a ResNet of {net.depth} layers for 32x32 images: {'; '.join(problems[:3])}{more}"
        )
