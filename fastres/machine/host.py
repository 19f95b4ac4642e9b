"""The host: cores, CPU, compilers, packages, and folders for what outlives a run. Nothing here needs torch."""

import contextlib
import functools
import getpass
import os
import platform
import re
import shutil
import stat
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from fastres.errors import MachineError, first_line


def num_cores() -> int:
    """CPU cores this process may use (a container may own fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cpu_info(key: str) -> str:
    """The first value of a key in Linux's /proc/cpuinfo, or ""."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def cpu_name() -> str:
    """The CPU's model."""
    return cpu_info("model name") or platform.processor() or platform.machine()


def cpu_id() -> str:
    """Family, model and stepping, which tell CPUs apart that a virtual machine gives one name; "" where unknown."""
    return "/".join(filter(None, map(cpu_info, ("cpu family", "model", "stepping"))))


def bf16_features() -> set[str]:
    """What the CPU has for bf16, as Linux names it: amx_bf16, avx512_bf16."""
    return {"amx_bf16", "avx512_bf16"} & set(cpu_info("flags").split())


def multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 faster than fp32.

    With AMX many times as fast; with AVX512-BF16 twice as fast on AMD's Zen 4, but at half of fp32's speed on an
    Emerald Rapids whose AMX was hidden (docs/LOG.md).
    """
    features = bf16_features()
    return "amx_bf16" in features or ("avx512_bf16" in features and cpu_info("vendor_id") == "AuthenticAMD")


def version_of(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile will find, or None."""
    names = [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]
    return next((found for name in names if (found := shutil.which(name))), None)


def c_compiler() -> str | None:
    """The C compiler by which Triton builds what launches its kernels, or None."""
    if found := os.environ.get("CC"):
        return shutil.which(found)
    return shutil.which("gcc") or shutil.which("clang")


def python_header() -> bool:
    """Whether Python.h is where Triton looks for it; Debian and its like have it in a package of its own."""
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    return (Path(folder) / "Python.h").exists()


def default_cache_dir() -> Path:
    """A downloaded archive and built kernels: `$FASTRES_CACHE`, `$XDG_CACHE_HOME/fastres` or `~/.cache/fastres`.

    Raises:
        MachineError: `~` stands for no folder.
    """
    try:
        if folder := os.environ.get("FASTRES_CACHE"):
            return Path(folder).expanduser()
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "fastres"
    except RuntimeError as error:
        raise MachineError(f"no cache folder: {error}; set FASTRES_CACHE to one") from error


def writable(folder: Path) -> bool:
    """Whether a folder that need not be there yet can be written."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 (False where it may not look)
    return there.is_dir() and os.access(there, os.W_OK)


def user_name() -> str:
    """The user's, or a stand-in where there is none, as of a number that a container was given for its user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"


def inductor_cache_dir() -> Path:
    """Where torch keeps what it compiled: `$TORCHINDUCTOR_CACHE_DIR`, or its default in the temporary folder."""
    if asked := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(asked)
    return Path(tempfile.gettempdir()) / ("torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user_name()))


def make_inductor_cache() -> Path:
    """Make it; torch needs the folder even where nothing is compiled. Raises MachineError."""
    try:
        folder = inductor_cache_dir().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        wanted = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
        raise MachineError(f"torch's cache cannot be made: {first_line(error)}; {wanted}") from error
    return folder


def triton_cache_dir() -> Path:
    """Where the kernels that Triton compiled are kept: `$TRITON_CACHE_DIR`, or beside fastres' own."""
    if asked := os.environ.get("TRITON_CACHE_DIR"):
        return Path(asked)
    return kernel_cache_dir("triton")


def kernel_cache_dir(name: str = "") -> Path:
    """Where kernels are kept: `default_cache_dir`; a temporary folder of this user's own where that cannot be written.

    Args:
        name: Of a folder in it.

    Raises:
        MachineError: That one is another user's, or open to others, whose code would be run.
    """
    with contextlib.suppress(MachineError):
        if writable(folder := default_cache_dir() / name):
            return folder
    user = os.getuid() if hasattr(os, "getuid") else ""
    folder = Path(tempfile.gettempdir()) / f"fastres_{user}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and user in ("", found.st_uid) and not found.st_mode & 0o022:
            return folder / name
    raise MachineError(f"no cache folder: {folder} cannot be used; set FASTRES_CACHE to one")
