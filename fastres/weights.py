"""Reads the weights that other projects published: safetensors, or torch's pickles without running their code.

The only module that opens a pickle of weights, and it does so with torch's weights-only unpickler.
"""

import re
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

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts save the state dict
PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")  # left by DataParallel and torch.compile
RENAMED = (
    (re.compile(r"^linear\."), "fc."),
    (re.compile(r"^(layer\d\.\d+)\.shortcut\."), r"\1.downsample."),  # option B in the family of kuangliu's models
)


@dataclass(frozen=True)
class ForeignWeights:
    """A state dict that `CifarNet(depth, residual=..., shortcut=shortcut)` takes as it is.

    Attributes:
        state: fp32 tensors on the CPU, by the names of `CifarNet`.
        depth: Layers, from the names.
        shortcut: "B" where there are projections, else "A".
        residual: True where there are projections. None otherwise: a ResNet with option A and a PlainNet have the same
            tensors, and only who trained them knows.
    """

    state: dict[str, Tensor]
    depth: int
    shortcut: Literal["A", "B"]
    residual: bool | None


def read_weights(path: Path) -> ForeignWeights:
    """Read a weights file: `.safetensors`, or what `torch.save` wrote of a state dict (`.th`, `.pt`, `.pth`, ...).

    Unwraps {"state_dict": ...}, strips `module.` and `_orig_mod.`, drops batch norm's counters, and knows `linear.` for
    `fc.` and `shortcut.` for `downsample.`.

    Raises:
        InputError: The file cannot be read, its pickle asks for more than tensors (it was not run), or its tensors
            are not those of a CIFAR network with ten classes; the message names the first that differ.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = _common_names(_unwrapped(content, path))
    blocks = {name.split(".")[1] for name in state if re.match(r"layer1\.\d+\.conv1\.weight$", name)}
    if not blocks:
        found = ", ".join(list(state)[:3]) or "none"
        raise InputError(f"{path} holds no CIFAR ResNet: it has no layer1.0.conv1.weight; its tensors: {found}")
    depth = 6 * len(blocks) + 2
    projects = any(".downsample." in name for name in state)
    shortcut: Literal["A", "B"] = "B" if projects else "A"
    _check_fit(state, depth, shortcut, path)
    return ForeignWeights(state, depth, shortcut, residual=True if projects else None)


def _read_safetensors(path: Path) -> object:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> object:
    try:
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
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
        raise InputError(f"{path} is not a weights file that torch.load can read: {reason}") from error


def _unwrapped(content: object, path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors, wherever the file keeps it."""
    for _ in range(3):  # a bound, since a pickle can hold itself
        if isinstance(content, Mapping):
            content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict (names and tensors)")
    return {str(name): t for name, t in content.items() if isinstance(t, Tensor)}


def _common_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = PREFIX.sub("", name)
        for pattern, replacement in RENAMED:
            plain = pattern.sub(replacement, plain)
        if not plain.endswith("num_batches_tracked"):
            renamed[plain] = tensor.detach().float()
    return renamed


def _check_fit(state: Mapping[str, Tensor], depth: int, shortcut: Literal["A", "B"], path: Path) -> None:
    """Raise InputError unless names and shapes are exactly those of the network that the names say."""
    with torch.device("meta"):
        wanted: dict[str, Any] = CifarNet(depth, shortcut=shortcut).state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in wanted]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{path} does not fit a {depth}-layer CIFAR ResNet: {'; '.join(problems[:3])}{more}")
