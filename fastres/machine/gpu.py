"""GPUs: whether torch can use one, why not, and what its generation can do."""

import os
import re
import warnings
from collections.abc import Iterator

import torch

from fastres.errors import InputError, MachineError
from fastres.machine import driver

_SAID: list[str] = []  # why CUDA did not start, as torch had it
Capability = tuple[int, int]  # CUDA's compute capability: (9, 0) of an H200
BF16: Capability = (8, 0)  # Ampere and later
COMPILED: Capability = (7, 0)  # Volta and later: what Triton makes kernels for, and so torch.compile
OLDER_TORCH = "in an environment of your own take a torch for an older CUDA, as cu126 (pytorch.org, Get Started)"


def choose(name: str) -> tuple[torch.device, str | None]:
    """The device that a name stands for, and what to tell the user where "auto" comes to the CPU.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:0".

    Raises:
        MachineError: A GPU was asked for by name, and torch cannot use it.
        InputError: A GPU index that does not exist.
    """
    if name == "cpu":
        return torch.device("cpu"), None
    if not available():
        why = why_none()
        if name == "auto":
            return torch.device("cpu"), f"no GPU {f'({why})' if why else 'found'}: using the CPU"
        because = f" ({why})" if why else ""
        raise MachineError(
            f"--device {name} was asked for, but torch finds no CUDA GPU{because}; use --device cpu or auto"
        )
    device = torch.device("cuda", 0) if name in ("auto", "cuda") else torch.device(name)
    if device.index >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s), counted from cuda:0")
    capability = torch.cuda.get_device_capability(device)
    if not has_kernels(capability):
        gpu = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
        if name == "auto":
            return torch.device("cpu"), f"this torch has no kernels for {gpu}: using the CPU; see fastres doctor"
        raise MachineError(f"this torch has no kernels for {gpu}; use --device cpu, or {other_torch(capability)}")
    return device, None


def available() -> bool:
    """Whether torch finds a GPU. Where CUDA cannot start it would warn in many lines; `why_none` says it in one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    for warning in caught:  # once a process: torch keeps what it found
        if error := re.search(r"CUDA initialization: .*(Error \d+: [^()\n]+)", str(warning.message), re.DOTALL):
            _SAID[:] = [f"CUDA does not start: {error[1].strip()}"]
    return found


def why_none() -> str:
    """Why torch finds no GPU; "" where there is nothing to say but that."""
    newest, built_for, hidden = driver.newest_cuda(), torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES")
    if not newest:
        return "there is an NVIDIA GPU, but no driver" if driver.has_gpu() else ""
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}"
    if not built_for:
        return "this torch was built for the CPU alone"
    if driver_too_old():
        return f"the driver knows CUDA up to {newest[0]}.{newest[1]}, and this torch needs {built_for}"
    seen = [f"CUDA_VISIBLE_DEVICES is {hidden!r}"] if hidden is not None else []
    return ", ".join([*_SAID, *seen])


def driver_too_old() -> bool:
    """Whether the driver is of an older CUDA than torch: minor versions are compatible, major ones are not."""
    newest, built_for = driver.newest_cuda(), torch.version.cuda
    return bool(newest and built_for and newest[0] < int(built_for.partition(".")[0]))


def has_kernels(capability: Capability) -> bool:
    """Whether this torch has code for a compute capability: of its major and no newer minor version, or older PTX."""
    built_for = list(_built_for())
    return not built_for or any(
        of <= capability if kind == "compute" else (of[0] == capability[0] and of[1] <= capability[1])
        for kind, of in built_for
    )


def other_torch(capability: Capability) -> str:
    """Which other torch may have kernels for a GPU."""
    newest = max((of for _, of in _built_for()), default=capability)
    return "install a newer torch" if capability > newest else OLDER_TORCH


def _built_for() -> Iterator[tuple[str, Capability]]:
    for arch in torch.cuda.get_arch_list():  # sm_90a, compute_120; other makers' have other names
        kind, _, number = arch.partition("_")
        if kind in ("sm", "compute"):
            yield kind, divmod(int(number.rstrip("af")), 10)
