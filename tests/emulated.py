"""The kernels of `fastres/native/cuda` on a CPU: built with `emulated.h`, launched as on a GPU."""

import ctypes
import functools
import subprocess
from pathlib import Path
from typing import Any

from fastres.native import gpu_layers
from fastres.native.gpu_layers import Kind

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def library(kind: Kind, folder: Path) -> ctypes.CDLL:
    """The kernels of a kind of layer."""
    path = folder / f"{'_'.join(map(str, kind))}.so"
    command = ["g++", "-std=c++20", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command += ["-U_FORTIFY_SOURCE"]  # which takes jumps between stacks for mistakes
    command += [*gpu_layers.defines(kind), f"-I{gpu_layers.SOURCE.parent}", str(ROOT / "tests/emulated.cpp")]
    command += [f"-I{ROOT / 'tests'}"]  # for the .cu
    subprocess.run([*command, "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def launch(
    folder: Path, kernel: str, kind: Kind, programs: int | tuple[int, int], *args: Any, last_first: bool = False
) -> None:
    """As `gpu_layers.launch`. last_first: the last warp runs first."""
    params, _alive = gpu_layers.parameters(args)
    grid = programs if isinstance(programs, tuple) else (programs, 1)
    library(kind, folder).emulate(gpu_layers.NAMES.index(kernel), *grid, params, last_first)


def sizes(kind: Kind, folder: Path) -> list[int]:
    """Threads and bytes of shared memory of each kernel."""
    told = (ctypes.c_int * (2 * len(gpu_layers.NAMES)))()
    library(kind, folder).tell(told)
    return list(told)


def turns(kind: Kind, folder: Path) -> tuple[int, int]:
    """In how many turns shared memory gave rows of matrices in the last launch, and how many there had to be."""
    found = library(kind, folder)
    return found.turns(0), found.turns(1)
