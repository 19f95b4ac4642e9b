"""The machine: device, precision, threads, global torch settings.

The only module that sets anything global.
"""

import ctypes
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastres.config import Execution
from fastres.errors import InputError, MachineError, OutOfMemory, first_line, says_out_of_memory
from fastres.machine import gpu, host
from fastres.native.kernels import kernels

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_COMPILATIONS = 128  # of one function
MAX_THREADS = 8  # per core; thousands take minutes to start, or crash the OpenMP runtime
DEEP = 110  # layers from which on the network is compiled block by block: as a whole it takes a minute or more


@dataclass(frozen=True)
class Runtime:
    """What `Execution` resolves to on this machine."""

    device: torch.device
    precision: str  # fp32, tf32, bf16 or fp16
    compile_scope: Literal["none", "blocks", "whole"] = "none"
    compile_mode: Literal["default", "plain", "max-autotune"] = "default"
    cuda_graph: bool = False
    deterministic: bool = False
    shadow_weights: bool = False
    native: bool = False
    layer_kernels: bool = False
    channels_last: bool = True
    threads: int = 1  # CPU threads
    notes: tuple[str, ...] = ()  # lines the user should see: a fall-back that was taken

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for records."""
        return {
            "device": str(self.device),
            "precision": self.precision,
            "compile": self.compile_scope,
            "compile_mode": None if self.compile_scope == "none" else self.compile_mode,
            "cuda_graph": self.cuda_graph,
            "deterministic": self.deterministic,
            "native": self.native,
            "layer_kernels": self.layer_kernels,
            "channels_last": self.channels_last,
        }

    @property
    def needs_warm_up(self) -> bool:
        """Whether the first step does more than a step: compiles, or is captured."""
        own_kernels = self.native and self.device.type == "cuda"
        return self.compile_scope != "none" or self.cuda_graph or own_kernels

    @property
    def dtype(self) -> torch.dtype:
        """Of images and activations; weights, BN statistics, loss and momentum stay in fp32."""
        return DTYPES[self.precision]


def prepare(execution: Execution, *, depth: int = 20) -> Runtime:
    """Choose device, precision, compilation and threads, and set torch's global switches for them.

    Args:
        execution: What was asked for.
        depth: Layers of the network that will be compiled.

    Raises:
        MachineError: A GPU, precision, graph or compiler was asked for by name and is not there.
        InputError: A GPU index that does not exist.
    """
    device, note = gpu.choose(execution.device)
    notes = [note] if note else []
    threads, cores = execution.threads or host.num_cores(), os.cpu_count() or 1
    if threads > MAX_THREADS * cores:
        raise InputError(f"--threads is {threads:,}, and this machine has {cores:,} cores; 0 means one per core")
    torch.set_num_threads(threads)
    os.environ["LOGNAME"] = host.user_name()  # torch 2.11 asks for it, and fails where the user has none
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(host.make_inductor_cache())
    torch.set_float32_matmul_precision("highest")  # on a CPU; a GPU's is set below
    scope, note = _compile_scope(execution, device, depth)
    notes += [note] if note else []
    if execution.cuda_graph and device.type != "cuda":
        raise MachineError("a CUDA graph needs a GPU; leave it out on the CPU")
    precision = _precision(execution.precision, device)
    shadows = execution.shadow_weights
    if shadows and precision != "bf16":
        raise InputError(f"--shadow-weights are bf16, and the precision here is {precision}; use --precision bf16")
    native, why_not = _native(execution, device, precision)
    notes += [why_not] if why_not else []
    if device.type == "cuda" and (scope != "none" or native):
        _check_launchers()
    if device.type == "cpu":
        _keep_freed_memory()
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler logs that there is no GPU
    if device.type == "cuda":
        _set_up_cuda(device, precision, deterministic=execution.deterministic)
    graph = device.type == "cuda" and execution.cuda_graph is not False
    if not graph and execution.graph_steps > 1:
        notes.append("--graph-steps does nothing without a CUDA graph")
    return Runtime(
        device=device,
        precision=precision,
        compile_scope=scope,
        compile_mode=execution.compile_mode,
        cuda_graph=graph,
        deterministic=execution.deterministic,
        shadow_weights=device.type == "cuda" and precision == "bf16" if shadows is None else shadows,
        native=native,
        channels_last=execution.channels_last,
        threads=threads,
        notes=tuple(notes),
    )


def _set_up_cuda(device: torch.device, precision: str, *, deterministic: bool) -> None:
    """Set what torch, cuDNN, cuBLAS and Inductor do on a GPU."""
    try:
        torch.cuda.set_device(device)  # makes a context there
    except RuntimeError as error:
        if says_out_of_memory(error):
            raise OutOfMemory(f"{device} is full: other processes hold its memory (nvidia-smi lists them)") from error
        raise MachineError(f"{device} cannot be used: {first_line(error)}; nvidia-smi may say more") from error
    os.environ.setdefault("TRITON_CACHE_DIR", str(host.triton_cache_dir()))  # else it depends on who comes first
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default so far; Triton 3.9 warns where nothing says so
    # Where these say something, cuDNN's switch below would mean "as they say", and could not be read any more.
    for backend in (torch.backends, torch.backends.cudnn):
        setattr(backend, "fp32_precision", "none")  # noqa: B010 (unknown to mypy)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    # One shape for the whole run, so the timed search for cuDNN's kernels pays; it may choose another one each time.
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(deterministic)  # off again, too: a benchmark has cells of both kinds
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (a kernel a tensor, to find bugs)
    if precision != "tf32":
        # Inductor warns of any fp32 product; the last layer's is one on purpose.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    if deterministic or "torch._inductor.config" in sys.modules:
        import torch._inductor.config as inductor  # seconds, so only where it is wanted

        inductor.deterministic = deterministic  # no choice by timing


def allow_recompilations() -> None:
    """Let torch compile one function for many networks: a process may hold several, of other depths and precisions.

    Past its limit, 8 by default, torch runs uncompiled without an error.
    """
    import torch._dynamo.config as dynamo  # a second, so only where something is compiled

    dynamo.recompile_limit = MAX_COMPILATIONS


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to `dtype`, or nothing at all in fp32. Weights stay in fp32 and are cast anew each step."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def usual_torch() -> Iterator[None]:
    """Torch as a process finds it, whatever the caller of the library has set: gradients, float32, the CPU by default.

    That, and the threads that `prepare` sets, are the caller's again afterwards.

    Raises:
        InputError: Inside `torch.autocast`, which keeps weights that it has cast until its outermost block ends.
    """
    if around := [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]:
        raise InputError(
            f"this was called inside torch.autocast({around[0]!r}), which changes what is computed; call it outside, "
            "and choose the precision in the config"
        )
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    if device.type != "cpu":
        torch.set_default_device(None)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        if device.type != "cpu":
            torch.set_default_device(device)


def eager() -> AbstractContextManager[object]:
    """Run compiled modules uncompiled inside the block (evaluation has other shapes; compiling it would not pay)."""
    if "torch._dynamo" not in sys.modules:  # seconds to import; nothing is compiled without it
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read after it counts finished work. Nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_launchers() -> None:
    """Raise MachineError where Triton could not build what launches its kernels, which it does in C."""
    without = "or use --no-compile --no-native"
    if not host.c_compiler():
        raise MachineError(f"kernels for a GPU need a C compiler to launch them: install gcc, {without}")
    if not host.python_header():
        package = f"python3.{sys.version_info.minor}-dev"
        raise MachineError(f"kernels for a GPU need Python.h to launch them: install {package}, {without}")


def _compile_scope(
    execution: Execution, device: torch.device, depth: int
) -> tuple[Literal["none", "blocks", "whole"], str | None]:
    """What torch.compile is given to compile, and what to tell the user where that is not what was asked for."""
    if execution.deterministic and execution.compile_mode == "max-autotune":
        raise InputError("--compile-mode max-autotune chooses kernels by timing, which --deterministic rules out")
    on_gpu = device.type == "cuda"
    too_old = on_gpu and torch.cuda.get_device_capability(device) < gpu.COMPILED
    why_not = "Triton has nothing for a GPU so old" if too_old else "torch came without Triton"
    possible = not too_old and importlib.util.find_spec("triton") is not None
    compiled = execution.compile if execution.compile is not None else on_gpu and possible
    if not compiled:
        if execution.compile is None and on_gpu and not possible:
            return "none", f"training without torch.compile, more slowly: {why_not}"
        if (execution.compile_mode, execution.compile_scope) != ("default", "auto"):
            return "none", "nothing is compiled here, so how to compile it makes no difference; --compile does"
        return "none", None
    if not on_gpu and not host.cpp_compiler():
        raise MachineError("--compile on a CPU needs a C++ compiler; install g++, or use --no-compile")
    if execution.compile_scope != "auto":
        return execution.compile_scope, None
    return "blocks" if on_gpu and depth >= DEEP else "whole", None


def _precision(name: str, device: torch.device) -> str:
    if device.type == "cuda":
        native_bf16 = torch.cuda.get_device_capability(device) >= gpu.BF16
        if name == "bf16" and not native_bf16:
            what = torch.cuda.get_device_name(device)
            raise MachineError(f"{what} has no bf16 (Ampere and later do); use --precision fp16 or fp32")
        return name if name != "auto" else "bf16" if native_bf16 else "fp16"
    if name == "tf32":
        raise MachineError("--precision tf32 needs a GPU; use fp32 on the CPU")
    if name != "auto":
        return name
    return "bf16" if host.multiplies_bf16() else "fp32"


def _native(execution: Execution, device: torch.device, precision: str) -> tuple[bool, str | None]:
    """Whether to use fastres' own kernels, and what to tell the user if they cannot be used."""
    wanted, on_gpu = execution.native, device.type == "cuda"
    others = {
        f"--precision {precision}": precision != "bf16" if on_gpu else precision not in ("fp32", "bf16"),
        "--no-shadow-weights": on_gpu and execution.shadow_weights is False,  # they read the shadows
        "--shadow-weights": bool(execution.shadow_weights) and not on_gpu,  # which are bf16
        "--no-channels-last": not execution.channels_last,
    }
    if against := [flag for flag, given in others.items() if given]:
        if wanted:
            raise InputError(f"--native kernels do not go with {against[0]}; use --no-native, or leave that out")
        why = f"do not go with {against[0]}"
        if execution.precision == "auto" and against[0].startswith("--precision"):
            why = f"are for bf16, and this GPU has {precision} alone"
        note = f"training without fastres' own kernels, more slowly: they {why}"
        return False, None if wanted is False else note
    if wanted is False:
        return False, None
    if on_gpu:
        return _triton(wanted)
    try:
        kernels()
    except MachineError as error:
        if wanted:
            raise MachineError(f"--native kernels: {error}") from error
        return False, f"training without fastres' own CPU kernels, more slowly: {error}"
    return True, None


def _triton(wanted: bool | None) -> tuple[bool, str | None]:
    """`_native` on a GPU, whose kernels need Triton; it comes with torch where it exists."""
    if importlib.util.find_spec("triton") is None:
        if wanted:
            raise MachineError("--native kernels need Triton, which this torch came without; use --no-native")
        return False, "training without fastres' own GPU kernels, more slowly: torch came without Triton"
    return True, None


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of returning it: half the page faults of a step.

    Activations are megabytes each, which glibc by default takes from the system and gives back every time.
    https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold, most = -1, -3, 2**31 - 1  # malloc.h's numbers; the largest int
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, most)
