"""Builds and loads the C++ beside it: kernels for training on a CPU."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # before the library is loaded, which then shares torch's OpenMP and its threads

from fastres.errors import MachineError
from fastres.machine.host import cpu_info, default_cache_dir, kernel_cache_dir

FOLDER = Path(__file__).parent
COMPILER = "g++"  # since torch's OpenMP on Linux is GCC's
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
LANES, COLUMNS = 16, 64  # as in conv.cpp and norm.cpp
DIGEST_BYTES = hashlib.sha256().digest_size
DTYPES = {torch.float32: "float", torch.bfloat16: "bf16"}  # of maps, as norm.cpp names them

Kernel = Callable[..., None]
POINTER, FLOAT, INT64, INT = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64, ctypes.c_int


class Kernels:
    """What the C++ has; arguments as there.

    Attributes:
        norm_forward, norm_backward: By dtype of the maps.
        conv_weight_grad: None where the CPU has no AVX-512 for bf16, or AMX, by which torch is quicker.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        def kernel(name: str, *types: type) -> Kernel:
            function = library[name]
            function.argtypes, function.restype, function.errcheck = types, INT, _check
            return function

        self.norm_forward = {
            dtype: kernel(f"norm_forward_{name}", *[POINTER] * 8, INT64, INT64, FLOAT, FLOAT, INT)
            for dtype, name in DTYPES.items()
        }
        self.norm_backward = {
            dtype: kernel(f"norm_backward_{name}", *[POINTER] * 8, INT64, INT64, INT) for dtype, name in DTYPES.items()
        }
        self.conv_weight_grad: Kernel | None = None
        if hasattr(library, "conv_weight_grad") and "amx_bf16" not in cpu_info("flags").split():
            self.conv_weight_grad = kernel("conv_weight_grad", *[POINTER] * 3, *[INT64] * 5, INT)


def kernels() -> Kernels:
    """The kernels, built on first use (two seconds) and kept in the cache for the next process.

    Raises:
        MachineError: This is not Linux, there is no g++, it does not build, or the cache cannot be used.
    """
    if isinstance(built := _built(), MachineError):
        raise MachineError(str(built))
    return built


@functools.cache
def _built() -> Kernels | MachineError:
    """The kernels, or why there are none: once a process, since a compiler that fails takes its seconds too."""
    try:
        return _build()
    except MachineError as error:
        return error


def _build() -> Kernels:
    if platform.system() != "Linux":
        raise MachineError(f"they are for Linux, and this is {platform.system()}")
    if (compiler := shutil.which(COMPILER)) is None:
        raise MachineError("there is no g++; apt-get install g++")
    sources = sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h"))
    # By all that the result depends on: the compiler and, by -march=native, this very CPU. A home may be on several.
    macros = _run([compiler, *FLAGS, "-dM", "-E", "-x", "c++", "/dev/null"])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + repr((FLAGS, macros)).encode()).hexdigest()
    name = f"native-{key[:16]}.so"
    with contextlib.suppress(MachineError, OSError):  # there may be one that this user may only read
        if _is_whole(shared := default_cache_dir() / name):
            return Kernels(ctypes.CDLL(str(shared)))
    path = kernel_cache_dir() / name
    try:
        if not _is_whole(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # moved when whole: others may build it too
                built = Path(folder) / path.name
                _run(
                    [
                        compiler,
                        *FLAGS,
                        *(str(source) for source in sources if source.suffix == ".cpp"),
                        "-o",
                        str(built),
                    ]
                )
                code = built.read_bytes()
                built.write_bytes(code + hashlib.sha256(code).digest())
                built.chmod(0o755)  # others may share the cache
                built.replace(path)
        return Kernels(ctypes.CDLL(str(path)))
    except OSError as error:
        raise MachineError(f"{path.parent}: {error}; set FASTRES_CACHE to another folder") from error


def _is_whole(path: Path) -> bool:
    """Whether a library is there and ends in its own digest: to load one that is cut off would end the process."""
    content = path.read_bytes() if path.exists() else b""
    return len(content) > DIGEST_BYTES and hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _check(result: Any, *_: Any) -> Any:
    """Of ctypes: a kernel gives 0, or 1 where memory ran out."""
    if result:
        raise RuntimeError("fastres' kernels can't allocate memory")
    return result


def _run(command: list[str]) -> str:
    """What a command prints.

    Raises:
        MachineError: It cannot be run, or fails.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, "LC_ALL": "C"}
        )
    except OSError as error:
        raise MachineError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise MachineError(f"{command[0]} cannot build them: {said}")
    return done.stdout
