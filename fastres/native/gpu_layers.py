"""Builds, loads and launches the kernels of `cuda/`."""

import ctypes
import functools
import itertools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.errors import MachineError

SOURCE = Path(__file__).parent / "cuda" / "layers.cu"
NAMES = (
    "forward_layer", "backward_layer", "weight_grads", "norm_forward",
    "norm_backward", "head", "sum_weight_shares", "head_grads",
)  # fmt: skip
MAX_CLASSES, LANES = 128, 32  # of `head`; of a warp
EARLY = False  # whether a launch may begin before the one ahead of it has ended (not measured yet)
MAX_LAYERS = 48  # of one launch of `weight_grads`
SUM_THREADS = 256  # of a program of `sum_weight_shares`, each of which has one weight


class Kind(NamedTuple):
    """Of layers, for which the kernels are compiled."""

    side: int  # of the target's maps, pixels
    stride: int
    channels: int
    num: int  # channels of the target
    first: int = 0  # 1: the source are images


class Layers(ctypes.Structure):
    """What `weight_grads` takes: addresses."""

    _fields_ = (
        ("grad", ctypes.c_void_p * MAX_LAYERS),
        ("source", ctypes.c_void_p * MAX_LAYERS),
        ("shares", ctypes.c_void_p * MAX_LAYERS),
    )


class Kernel(NamedTuple):
    """A function on a GPU."""

    function: Any
    threads: int  # of a program
    shared: int  # bytes of memory that they share


def defines(kind: Kind) -> list[str]:
    """The compiler's flags."""
    values = dict(zip(("SIDE", "STRIDE", "K", "N", "FIRST"), kind, strict=True))
    values |= {"LAYERS": MAX_LAYERS, "CLASSES": MAX_CLASSES, "SUM_THREADS": SUM_THREADS}
    return [f"-D{name}={value}" for name, value in values.items()]


def cubin(kind: Kind, capability: tuple[int, int]) -> bytes:
    """The machine code for a GPU of a compute capability, (9, 0) of an H200, by NVRTC, which torch brings.

    Raises:
        MachineError: It does not compile.
    """
    from cuda.bindings import nvrtc

    headers = sorted(SOURCE.parent.glob("*.h"))
    texts, names = [path.read_bytes() for path in headers], [path.name.encode() for path in headers]
    source = SOURCE.read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, SOURCE.name.encode(), len(headers), texts, names))
    flags = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17", "-lineinfo", *defines(kind)]
    failed = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])[0].value
    if failed:
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        words = log.decode(errors="replace").rstrip("\0")
        raise MachineError(f"--layer-kernels do not compile; use --no-layer-kernels: {words}")
    code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return bytes(code)


_cubin = functools.cache(cubin)


def compile_for(kinds: Iterable[Kind], device: torch.device) -> None:
    """Have the kernels of some kinds of layers compiled for a GPU, all at once; else each waits for the one before."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        with ThreadPoolExecutor() as pool:
            for code in pool.map(_cubin, kinds, itertools.repeat(capability)):
                assert code


@functools.cache
def kernels(kind: Kind, device: int) -> dict[str, Kernel]:
    """Those of a kind of layer, by name, loaded on a GPU."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        module = _checked(driver.cuModuleLoadData(_cubin(kind, torch.cuda.get_device_capability(device))))
        reported = torch.zeros(2 * len(NAMES), dtype=torch.int32, device=torch.device("cuda", device))
        report = Kernel(_checked(driver.cuModuleGetFunction(module, b"report_sizes")), 1, 0)
        _launch(report, (1, 1), (reported,), torch.cuda.current_stream().cuda_stream, early=False)
        sizes = reported.tolist()
        loaded = {}
        for k, name in enumerate(NAMES):
            function = _checked(driver.cuModuleGetFunction(module, name.encode()))
            threads, shared = sizes[2 * k : 2 * k + 2]
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, most, shared))
            loaded[name] = Kernel(function, threads, shared)
        return loaded


def launch(kernel: str, kind: Kind, programs: int | tuple[int, int], *args: Any) -> None:
    """Launch a kernel on the current stream.

    Args:
        kernel: Its name.
        kind: Of layer.
        programs: The grid: thread blocks, or (thread blocks, layers).
        args: Tensors, None, int and float, as the kernel has them; for its `Layers` three lists of tensors.
    """
    stream, grid = torch.cuda.current_stream(), programs if isinstance(programs, tuple) else (programs, 1)
    device = stream.device.index
    # The first layer waits in full: what updates the weights comes before it, and all layers fetch theirs before they
    # wait for the launch ahead of them, whose end alone makes what was written visible.
    early = EARLY and not kind.first and torch.cuda.get_device_capability(device) >= (9, 0)
    _launch(kernels(kind, device)[kernel], grid, args, stream.cuda_stream, early=early)


def _launch(kernel: Kernel, grid: tuple[int, int], args: tuple[Any, ...], stream: int, *, early: bool) -> None:
    from cuda.bindings import driver

    params, _alive = parameters(args)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY = grid
    config.blockDimX, config.gridDimZ, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1, 1
    config.sharedMemBytes, config.hStream = kernel.shared, stream
    if early:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    _checked(driver.cuLaunchKernelEx(config, kernel.function, ctypes.addressof(params), 0))


def parameters(args: tuple[Any, ...]) -> tuple[ctypes.Array[ctypes.c_void_p], list[Any]]:
    """Addresses of arguments as a driver takes them, and what must live as long."""
    values = [_as_c(arg) for arg in args]
    return (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values)), values


def _as_c(arg: Any) -> Any:
    if arg is None or isinstance(arg, Tensor):
        return ctypes.c_void_p(None if arg is None else arg.data_ptr())
    if isinstance(arg, int):
        return ctypes.c_int(arg)
    if isinstance(arg, float):
        return ctypes.c_float(arg)
    layers = Layers()
    for (name, _), tensors in zip(Layers._fields_, arg, strict=True):
        getattr(layers, name)[: len(tensors)] = [tensor.data_ptr() for tensor in tensors]
    return layers


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call gave beside its status.

    Raises:
        MachineError: It failed.
    """
    status, *values = result
    if status.value:
        raise MachineError(f"--layer-kernels: {status.name}; use --no-layer-kernels")
    return values[0] if len(values) == 1 else values
