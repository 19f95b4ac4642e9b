"""What training needs of a machine, looked at one thing at a time; `doctor.py` puts it together.

Nothing is downloaded or trained. torch is imported only inside, since it may be what is broken.
"""

import importlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastres.errors import FastresError, MachineError, first_line
from fastres.machine import driver, host

MIN_TORCH = (2, 11)
PACKAGES = {  # by module
    "numpy": "numpy", "safetensors.torch": "safetensors", "filelock": "filelock", "matplotlib.figure": "matplotlib",
    "torchvision": "torchvision", "PIL.Image": "pillow", "tomli_w": "tomli-w",
}  # fmt: skip
DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
DALI_PYTHON = (3, 15)  # the first Python that DALI has no build for
RUN_BYTES, ROOM_BYTES = 200_000_000, 2_000_000_000  # on the disk: without it no run; with less a note

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


def system() -> Iterable[Finding]:
    """Operating system and Python."""
    yield Finding("ok", "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")


def torch_build() -> Iterable[Finding]:
    """torch: whether it can be imported, is new enough, and for which CUDA it was built."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries cannot be loaded
        yield Finding(
            "error",
            "torch",
            f"cannot be imported: {first_line(error)}",
            f"{_pip()} install --force-reinstall torch",
            stops=True,
        )
        return
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and (int(found[1]), int(found[2])) < MIN_TORCH:
        needed = ".".join(map(str, MIN_TORCH))
        value = f"{torch.__version__}, {build}; fastres needs {needed} or newer"
        yield Finding("error", "torch", value, f"{_pip()} install -U 'torch>={needed}'", stops=True)
        return
    if not torch.version.cuda and driver.newest_cuda():
        remedy = f"{_pip()} install --force-reinstall torch"
        yield Finding("note", "torch", f"{torch.__version__}, {build}, but there is an NVIDIA driver", remedy)
        return
    yield Finding("ok", "torch", f"{torch.__version__}, {build}")


def bytecode() -> Iterable[Finding]:
    """Whether Python keeps what it makes of torch's source. Nothing is said where it does."""
    import torch

    if sys.dont_write_bytecode and not Path(importlib.util.cache_from_source(torch.__file__)).exists():
        value = "torch's is not kept, as containers often have it: every command takes seconds to make it anew"
        packages = shlex.quote(str(Path(torch.__file__).parent.parent))  # -qq: some are for other Pythons
        yield Finding("note", "bytecode", value, f"{shlex.quote(sys.executable)} -m compileall -qq -j 0 {packages}")


def packages() -> Iterable[Finding]:
    """What else fastres needs: whether it can be imported. Nothing is said where all can."""
    for module, name in PACKAGES.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: torchvision beside another torch
            remedy = f"{_pip()} install --force-reinstall {name}"
            yield Finding("error", name, f"cannot be imported: {first_line(error)}", remedy, stops=True)


def gpus() -> Iterable[Finding]:
    """Every GPU: memory, and what its generation lacks."""
    import torch

    from fastres.machine import gpu

    if not gpu.available():
        why = gpu.why_none()
        remedy = "unset CUDA_VISIBLE_DEVICES" if why.startswith("hidden") else ""
        value = f"none that torch can use{f': {why}' if why else ''}; training will be on the CPU"
        yield Finding("note", "GPU", value, remedy)
        return
    for k in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(k)
        capability, what = (seen.major, seen.minor), f"GPU cuda:{k}"
        value = f"{seen.name}, {_memory_of(k)}, compute capability {seen.major}.{seen.minor}"
        if not gpu.has_kernels(capability):
            mark: Mark = "error" if k == 0 else "note"  # the one that --device auto takes
            remedy = f"fastres train --device cpu, or {gpu.other_torch(capability)}"
            yield Finding(mark, what, f"{value}; this torch has no kernels for it", remedy)
        elif capability < gpu.COMPILED:
            yield Finding("note", what, f"{value}: too old for torch.compile, so training is slower")
        elif capability < gpu.BF16:
            yield Finding("note", what, f"{value}: no bf16 (Ampere and later have it), so fp16")
        else:
            yield Finding("ok", what, f"{value}, bf16")


def _memory_of(index: int) -> str:
    """A GPU's memory; one that is full, or another process' alone, does not even tell."""
    import torch

    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return f"memory not known ({first_line(error)})"
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def nvidia_driver() -> Iterable[Finding]:
    """Whether the driver is new enough for torch's CUDA."""
    import torch

    from fastres.machine import gpu

    supported, wanted = driver.newest_cuda(), torch.version.cuda
    if not supported:
        if driver.has_gpu():
            yield Finding("note", "driver", "none, though there is an NVIDIA GPU", "install NVIDIA's driver")
        else:
            yield Finding("ok", "driver", "none needed: no NVIDIA GPU")
        return
    value = f"NVIDIA {driver.version() or 'of unknown version'}, up to CUDA {supported[0]}.{supported[1]}"
    if gpu.driver_too_old():
        remedy = f"update the driver, or {gpu.OLDER_TORCH}"
        yield Finding("note", "driver", f"{value}: too old for torch's CUDA {wanted}, so the GPU is not used", remedy)
    else:
        yield Finding("ok", "driver", value)


def cpu() -> Iterable[Finding]:
    """Model, cores, and what `--precision auto` looks at."""
    features = ", ".join(sorted(host.bf16_features()))
    cores = f"{host.num_cores()} core{'s' if host.num_cores() > 1 else ''} for as many threads"
    yield Finding("ok", "CPU", f"{host.cpu_name()}, {cores}; {features or 'no bf16 units'}")


def memory() -> Iterable[Finding]:
    """Host memory."""
    import torch

    from fastres.machine.memory import usable_memory

    usable = usable_memory(torch.device("cpu"))
    if usable is None:
        yield Finding("note", "memory", "not known")
    else:
        yield Finding("ok" if usable > 4e9 else "note", "memory", f"{usable / 1e9:.1f} GB for this process")


def compiler() -> Iterable[Finding]:
    """What torch.compile and fastres build with, on a GPU Triton; Python's headers."""
    import torch

    from fastres.native.kernels import COMPILER

    gpu = torch.cuda.is_available()
    without = "or --no-compile --no-native" if gpu else "or --no-compile"
    found = host.c_compiler() if gpu else host.cpp_compiler()
    if found is None:
        why = "none; kernels for a GPU need one" if gpu else "none; torch.compile and fastres' own CPU kernels need one"
        install = f"apt-get install {'gcc' if gpu else 'g++'}" if sys.platform == "linux" else "install one"
        remedy = f"{install} ({without})"
        yield Finding("error" if gpu else "note", "compiler", why, remedy, stops=gpu)
    elif not host.python_header():
        remedy = f"apt-get install python3.{sys.version_info.minor}-dev ({without})"
        value = f"{found}, but Python.h is missing, which torch.compile needs"
        yield Finding("error" if gpu else "note", "compiler", value, remedy, stops=gpu)
    elif not gpu and sys.platform == "linux" and not shutil.which(COMPILER):
        remedy = f"apt-get install {COMPILER}"
        yield Finding("note", "compiler", f"{found}, but fastres' own CPU kernels need {COMPILER}", remedy)
    else:
        yield Finding("ok", "compiler", found)


def triton() -> Iterable[Finding]:
    """What torch.compile's kernels for a GPU are written in."""
    import torch

    found, gpu = host.version_of("triton"), torch.cuda.is_available()
    if found or not gpu:
        value = f"{found}; nvcc is not needed" if found else "not installed; only a GPU needs it"
        yield Finding("ok", "Triton", value)
    else:
        remedy = f"{_pip()} install triton (or --no-compile)"
        yield Finding("error", "Triton", "not installed; torch.compile needs it on a GPU", remedy, stops=True)


def dali() -> Iterable[Finding]:
    """Which DALI there is; both builds together break each other."""
    import torch

    from fastres.data.dali import check_starts, dali_available

    gpu = torch.cuda.is_available()
    found = {name: version for name in DALI if (version := host.version_of(name))}
    said = " and ".join(f"{name} {version}" for name, version in found.items())
    if len(found) > 1:
        remedy = f"{_pip()} uninstall {' '.join(found)} && {_pip()} install {DALI[0]}"
        yield Finding("error", "DALI", f"{said} share one folder: never both", remedy, stops=gpu)
    elif found and not dali_available():
        remedy = f"{_pip()} install --force-reinstall {next(iter(found))}"
        yield Finding("error", "DALI", f"{said} is listed, but its files are gone", remedy)
    elif found:
        try:
            check_starts(torch.device("cuda", 0) if gpu else torch.device("cpu"))
        except MachineError as error:
            yield Finding("error" if gpu else "note", "DALI", f"{said}, but {error}")
        else:
            yield Finding("ok", "DALI", said)
    elif sys.version_info >= DALI_PYTHON or sys.platform != "linux":
        where = f"Python {platform.python_version()}" if sys.platform == "linux" else platform.system()
        yield Finding("note" if gpu else "ok", "DALI", f"has no build for {where}; the resident loader does without")
    else:
        value = "not installed; the resident loader does without"
        yield Finding("note" if gpu else "ok", "DALI", value, f"{_pip()} install {DALI[0]}" if gpu else "")


def data(data_dir: Path | None) -> Iterable[Finding]:
    """CIFAR-10, wherever `fastres train` would find it without a network."""
    from fastres.data.cifar import REMOTE, load_cifar10
    from fastres.data.imageset import short_digest

    named = data_dir is not None or bool(os.environ.get("FASTRES_DATA"))
    if not named:
        otherwise = "give its folder with --data-dir, or fastres train --dataset synthetic"
        try:
            data_dir = host.default_cache_dir() / REMOTE.name
        except MachineError as error:
            yield Finding("error", "CIFAR-10", f"not here, and {error}", otherwise, stops=True)
            return
        cache = data_dir.parent
        if not data_dir.exists() and not host.writable(cache):
            value = f"not here, and {cache}, where it would be downloaded to, cannot be written"
            yield Finding("error", "CIFAR-10", value, f"set FASTRES_CACHE, {otherwise}", stops=True)
            return
        if not data_dir.exists():
            value = f"not here; fastres train downloads it ({REMOTE.num_bytes / 1e6:.0f} MB) into {cache}"
            yield Finding("note", "CIFAR-10", value, "without a network: fastres train --dataset synthetic")
            return
    try:
        images = load_cifar10(data_dir, say=lambda _: None)
    except FastresError as error:
        remedy = "give its folder: fastres doctor --data-dir FOLDER" if named else f"rm {data_dir}"
        yield Finding("error", "CIFAR-10", str(error), remedy, stops=named)
        return
    if images.official:
        yield Finding("ok", "CIFAR-10", f"{images.source}, the official files")
    else:
        value = f"{images.source}, not the official files ({short_digest(images.digest)}); results will say so"
        yield Finding("note", "CIFAR-10", value)


def run_disk() -> Iterable[Finding]:
    """Room for run folders, without which there is no training."""
    yield _room_in("disk, runs", Path.cwd() / "runs", "fastres train --out elsewhere", stops=True)


def cache_disk() -> Iterable[Finding]:
    """Room for the data cache."""
    yield _room_in("disk, data cache", host.default_cache_dir(), "set FASTRES_CACHE to another folder", stops=False)


def _room_in(what: str, folder: Path, remedy: str, *, stops: bool) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free, lacking = shutil.disk_usage(there).free, Finding("error" if stops else "note", what, "", remedy, stops)
    if not os.access(there, os.W_OK):
        return replace(lacking, value=f"{folder} cannot be written")
    value = f"{free / 1e9:.1f} GB free in {folder}"
    if free < RUN_BYTES:
        return replace(lacking, value=value)
    return Finding("ok" if free > ROOM_BYTES else "note", what, value)


def compile_cache() -> Iterable[Finding]:
    """Where compiled code is kept between runs: torch's, and on a GPU Triton's."""
    import torch

    yield _cache("compile cache", host.inductor_cache_dir(), "TORCHINDUCTOR_CACHE_DIR")
    if torch.cuda.is_available():
        yield _cache("Triton cache", host.triton_cache_dir(), "TRITON_CACHE_DIR")


def _cache(what: str, folder: Path, variable: str) -> Finding:
    if not host.writable(folder):
        return Finding("error", what, f"{folder} cannot be written", f"export {variable}=FOLDER")
    lasts = ", until that folder is emptied" if folder.is_relative_to(tempfile.gettempdir()) else ""
    return Finding("ok", what, f"{folder}{lasts}")


def _pip() -> str:
    """How packages are put into this environment: by the clone's own uv, as the README has it, by pip, or by any uv."""
    clone = Path(sys.prefix).parent
    if (clone / ".uv" / "bin" / "uv").exists():
        return f"{shlex.quote(os.path.relpath(clone / '.uv' / 'bin' / 'uv'))} pip"
    if importlib.util.find_spec("pip"):
        return f"{shlex.quote(sys.executable)} -m pip"
    return f"VIRTUAL_ENV={shlex.quote(sys.prefix)} uv pip"
