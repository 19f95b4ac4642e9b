"""What works on this machine, what does not, and what to type: the checks behind `fastres doctor`.

Each check stands alone: an exception in one becomes its line, and the others go on. Nothing is downloaded, trained or
written, and torch is imported only inside, since it may be what is broken.
"""

import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from fastres import driver
from fastres.errors import FastresError

MIN_TORCH = (2, 11)
DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
DALI_PYTHON = (3, 15)  # the first Python that DALI has no build for
BF16_CAPABILITY, TRITON_CAPABILITY = (8, 0), (7, 0)  # of a GPU: Ampere, Volta
RUN_BYTES, ROOM_BYTES = 200_000_000, 2_000_000_000  # on the disk: without it no run; with less a note
REINSTALL = "python3 -m pip install -q --upgrade --target .uv uv && .uv/bin/uv sync"

Mark = Literal["ok", "note", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        mark: "ok"; "note": works, but not as well as it could; "error": broken.
        what: What was looked at.
        value: What was found.
        remedy: What to type or do about it; "" where nothing is to be done.
        stops: Whether no training is possible with it.
    """

    mark: Mark
    what: str
    value: str
    remedy: str = ""
    stops: bool = False


@dataclass(frozen=True)
class Examination:
    """What was found, and what `fastres train` will do; `possible` is whether it can."""

    findings: list[Finding]
    verdict: str
    possible: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def examine(data_dir: Path | None = None) -> Examination:
    """Look at everything that training needs.

    Args:
        data_dir: Where CIFAR-10 lies; default: as `fastres train` looks for it, but for the network.
    """
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("system", _system),
        ("torch", _torch),
        ("GPU", _gpus),
        ("driver", _driver),
        ("CPU", _cpu),
        ("memory", _memory),
        ("compiler", _compiler),
        ("Triton", _triton),
        ("DALI", _dali),
        ("CIFAR-10", lambda: _data(data_dir)),
        ("disk", _disk),
        ("compile cache", _compile_cache),
    ]
    findings = [finding for what, check in checks for finding in _isolated(what, check)]
    if any(finding.stops for finding in findings):
        stopping = ", ".join(dict.fromkeys(finding.what for finding in findings if finding.stops))
        return Examination(findings, f"fastres train cannot run here yet; see {stopping} above", possible=False)
    try:
        return Examination(findings, f"fastres train will use: {_plan()}", possible=True)
    except FastresError as error:
        return Examination(findings, f"fastres train cannot run here yet: {error}", possible=False)
    except Exception as error:  # noqa: BLE001 (the report never fails itself)
        return Examination(findings, f"fastres train: what it will do is not known ({_words(error)})", possible=False)


def _isolated(what: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """A check's findings; torch's warnings, which say what a finding says better, are not shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(check())
    except Exception as error:  # noqa: BLE001 (the other checks go on)
        return [Finding("note", what, f"cannot be checked: {_words(error)}")]


def _words(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _system() -> Iterable[Finding]:
    yield Finding("ok", "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")


def _torch() -> Iterable[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries cannot be loaded
        yield Finding("error", "torch", f"cannot be imported: {_words(error)}", REINSTALL, stops=True)
        return
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and (int(found[1]), int(found[2])) < MIN_TORCH:
        needed = ".".join(map(str, MIN_TORCH))
        value = f"{torch.__version__}, {build}; fastres needs {needed} or newer"
        yield Finding("error", "torch", value, f"python -m pip install -U 'torch>={needed}'", stops=True)
        return
    if not torch.version.cuda and driver.newest_cuda():
        remedy = "python -m pip install --force-reinstall torch"
        yield Finding("note", "torch", f"{torch.__version__}, {build}, but there is an NVIDIA driver", remedy)
        return
    yield Finding("ok", "torch", f"{torch.__version__}, {build}")


def _gpus() -> Iterable[Finding]:
    import torch

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if driver.newest_cuda() and hidden is not None and hidden.strip() in ("", "-1"):
            yield Finding("note", "GPU", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "unset CUDA_VISIBLE_DEVICES")
        else:
            yield Finding("note", "GPU", "none that torch can use; training will be on the CPU")
        return
    built_for = [
        tuple(divmod(int(arch[3:].rstrip("af")), 10)) for arch in torch.cuda.get_arch_list() if arch[:3] == "sm_"
    ]
    for k in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(k)
        free, total = torch.cuda.mem_get_info(k)
        capability = (seen.major, seen.minor)
        what = f"GPU cuda:{k}"
        value = (
            f"{seen.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, compute capability {seen.major}.{seen.minor}"
        )
        if built_for and capability < min(built_for):
            oldest = ".".join(map(str, min(built_for)))
            yield Finding(
                "error",
                what,
                f"{value}; this torch has kernels from {oldest} on",
                "fastres train --device cpu",
                stops=True,
            )
        elif capability < TRITON_CAPABILITY:
            yield Finding("note", what, f"{value}: too old for torch.compile", "fastres train --no-compile")
        elif capability < BF16_CAPABILITY:
            yield Finding("note", what, f"{value}: no bf16 (Ampere and later have it), so fp16")
        else:
            yield Finding("ok", what, f"{value}, bf16")


def _driver() -> Iterable[Finding]:
    import torch

    supported, wanted = driver.newest_cuda(), torch.version.cuda
    if not supported:
        yield Finding("ok" if not wanted or not driver.has_gpu() else "note", "driver", "no NVIDIA driver")
        return
    value = f"NVIDIA {driver.version() or 'of unknown version'}, up to CUDA {supported[0]}.{supported[1]}"
    if wanted and supported[0] < int(wanted.partition(".")[0]):  # minor versions are compatible, major ones are not
        index = "https://download.pytorch.org/whl/cu126"
        remedy = f"update the driver, or in an environment of your own: pip install torch --index-url {index}"
        yield Finding("note", "driver", f"{value}: too old for torch's CUDA {wanted}, so the GPU is not used", remedy)
    else:
        yield Finding("ok", "driver", value)


def _cpu() -> Iterable[Finding]:
    from fastres.runtime import bf16_features, cpu_name, num_cores

    features = ", ".join(sorted(bf16_features()))
    cores = f"{num_cores()} core{'s' if num_cores() > 1 else ''}, as many threads"
    yield Finding("ok", "CPU", f"{cpu_name()}, {cores}; {features or 'no bf16 units'}")


def _memory() -> Iterable[Finding]:
    import torch

    from fastres.runtime import usable_memory

    usable = usable_memory(torch.device("cpu"))
    if usable is None:
        yield Finding("note", "memory", "not known")
    else:
        yield Finding("ok" if usable > 4e9 else "note", "memory", f"{usable / 1e9:.1f} GB for this process")


def _compiler() -> Iterable[Finding]:
    import torch

    from fastres.runtime import cpp_compiler

    gpu, found = torch.cuda.is_available(), cpp_compiler()
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if found is None:
        why = "none; torch.compile needs one"
        remedy = "apt-get install g++ (or --no-compile)" if sys.platform == "linux" else "install one, or --no-compile"
        yield Finding("error" if gpu else "note", "compiler", why, remedy, stops=gpu)
    elif not header.exists():
        remedy = f"apt-get install python3.{sys.version_info.minor}-dev (or --no-compile)"
        value = f"{found}, but Python.h is missing, which torch.compile needs"
        yield Finding("error" if gpu else "note", "compiler", value, remedy)
    else:
        yield Finding("ok", "compiler", found)


def _triton() -> Iterable[Finding]:
    import torch

    found, gpu = _version("triton"), torch.cuda.is_available()
    if found or not gpu:
        value = f"{found}; nvcc is not needed" if found else "not installed; only a GPU needs it"
        yield Finding("ok", "Triton", value)
    else:
        remedy = "python -m pip install triton (or --no-compile)"
        yield Finding("error", "Triton", "not installed; torch.compile needs it on a GPU", remedy, stops=True)


def _dali() -> Iterable[Finding]:
    import torch

    from fastres.data.dali import dali_available

    gpu = torch.cuda.is_available()
    found = {name: version for name in DALI if (version := _version(name))}
    said = " and ".join(f"{name} {version}" for name, version in found.items())
    if len(found) > 1:
        remedy = f"pip uninstall -y {' '.join(found)} && pip install {DALI[0]}"
        yield Finding("error", "DALI", f"{said} share one folder: never both", remedy, stops=gpu)
    elif found and not dali_available():
        remedy = f"pip install --force-reinstall --no-deps {next(iter(found))}"
        yield Finding("error", "DALI", f"{said} is listed, but its files are gone", remedy)
    elif found:
        yield Finding("ok", "DALI", said)
    elif sys.version_info >= DALI_PYTHON or sys.platform != "linux":
        where = f"Python {platform.python_version()}" if sys.platform == "linux" else platform.system()
        yield Finding("note" if gpu else "ok", "DALI", f"has no build for {where}; the resident loader does without")
    else:
        value = "not installed; the resident loader does without"
        yield Finding("note" if gpu else "ok", "DALI", value, f"pip install {DALI[0]}" if gpu else "")


def _data(data_dir: Path | None) -> Iterable[Finding]:
    from fastres.data.cifar import REMOTE, default_cache_dir, load_cifar10

    source = data_dir or (Path(os.environ["FASTRES_DATA"]) if os.environ.get("FASTRES_DATA") else None)
    cached = default_cache_dir() / REMOTE.name
    if source is None and not cached.exists():
        value = f"not here; fastres train downloads it ({REMOTE.num_bytes / 1e6:.0f} MB) into {cached.parent}"
        yield Finding("note", "CIFAR-10", value, "without a network: fastres train --dataset synthetic")
        return
    try:
        images = load_cifar10(source or cached, say=lambda _: None)
    except FastresError as error:
        remedy = f"rm {cached}" if source is None else "give its folder: fastres doctor --data-dir FOLDER"
        yield Finding("error", "CIFAR-10", str(error), remedy, stops=source is not None)
        return
    if images.official:
        yield Finding("ok", "CIFAR-10", f"{images.source}, the official files")
    else:
        value = f"{images.source}, not the official files ({images.digest[:23]}...); results will say so"
        yield Finding("note", "CIFAR-10", value)


def _disk() -> Iterable[Finding]:
    from fastres.data.cifar import default_cache_dir

    for what, folder in (("disk, runs", Path.cwd() / "runs"), ("disk, data cache", default_cache_dir())):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        value, runs = f"{free / 1e9:.1f} GB free in {folder}", what == "disk, runs"
        elsewhere = "fastres train --out elsewhere" if runs else "set FASTRES_CACHE to another folder"
        if not os.access(there, os.W_OK):
            yield Finding("error" if runs else "note", what, f"{folder} cannot be written", elsewhere, stops=runs)
        elif free < RUN_BYTES:
            yield Finding("error" if runs else "note", what, value, elsewhere, stops=runs)
        else:
            yield Finding("ok" if free > ROOM_BYTES else "note", what, value)


def _compile_cache() -> Iterable[Finding]:
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _default_compile_cache())
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        yield Finding("error", "compile cache", f"{folder} cannot be written", "export TORCHINDUCTOR_CACHE_DIR=FOLDER")
    elif folder.is_relative_to(tempfile.gettempdir()):
        keep = "export TORCHINDUCTOR_CACHE_DIR=~/.cache/torchinductor keeps it"
        yield Finding("ok", "compile cache", f"{folder}, which a restart may empty; {keep}")
    else:
        yield Finding("ok", "compile cache", str(folder))


def _plan() -> str:
    """What `fastres train` resolves to here."""
    from fastres.build import loader_kind
    from fastres.config import RunConfig
    from fastres.runtime import prepare

    config = RunConfig()
    runtime = prepare(config.execution, depth=config.model.depth)
    compiled = "eager" if runtime.compile_scope == "none" else f"compiled ({runtime.compile_scope})"
    parts = [str(runtime.device), runtime.precision, f"{loader_kind(config.execution, runtime)} loader", compiled]
    if runtime.cuda_graph:
        parts.append("a step as one CUDA graph")
    if runtime.device.type == "cpu":
        parts.append(f"{runtime.threads} threads")
    return ", ".join(parts)


def _default_compile_cache() -> str:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return default_cache_dir()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
