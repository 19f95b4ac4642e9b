"""What can end a run from outside, signals and memory, turned into something the loop and the user can deal with."""

import contextlib
import dataclasses
import math
import re
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from fastres import checkpoint
from fastres.build import empty_net
from fastres.config import RunConfig
from fastres.data.imageset import IMAGE_SIZE
from fastres.errors import (
    DiskFull,
    InputError,
    Interrupted,
    MachineError,
    OutOfMemory,
    OutOfTime,
    Stop,
    first_line,
    says_out_of_memory,
)
from fastres.machine.memory import usable_memory
from fastres.models.cifar import num_parameters
from fastres.rundir import CONFIG
from fastres.runtime import Runtime

USABLE_SHARE = 0.8  # of what is free; the rest goes to fragments and workspaces
# A step's peak over what its forward keeps: 1.2 from batch 256 to 512 and 1.4 from 1,024 to 2,880, on a CPU (ResNet-20,
# fp32, torch 2.15)
BACKWARD = 1.4
DOUBT = 1.2  # what is estimated at so much more than there is may fit yet
DEEP = 38  # layers from which on a step's memory is extrapolated
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # as far as there are any; the last by batch systems, in time
AGAIN = "run the same command again to resume"
UNITS = {"bytes": 1e-9, "KiB": 2**10 / 1e9, "MiB": 2**20 / 1e9, "GiB": 2**30 / 1e9}  # in GB
WEIGHT_BYTES = 4 * 4  # a parameter: weight, gradient, momentum, and copies in other precisions
LOADER_BYTES = 10  # a value of the training images: two padded fp32 tables on a CPU; less for DALI or on a GPU


@dataclass
class Interrupt:
    """What ends a run early: the first signal that arrived, None while there was none, or a time."""

    way_on: str  # how to resume
    deadline: float = math.inf  # on the clock of `time.perf_counter`
    signum: int | None = None
    folders: Sequence[Path] = ()  # of the runs in training
    training: bool = False  # else there is nothing to save: the first signal stops at once, a minute's compiling too

    def __post_init__(self) -> None:
        if math.isnan(self.deadline):
            raise InputError("deadline is nan; give seconds on the clock of time.perf_counter")


@contextlib.contextmanager
def interrupts(interrupt: Interrupt) -> Iterator[None]:
    """Turn `SIGNALS` into a flag that the loop reads after each step; a second signal stops at once.

    So does the first one before `interrupt.training`, which is false until somebody sets it inside the block.

    One that is ignored stays so, SIGHUP under nohup, SIGINT in a script's background; or that another program around
    Python handles. SIGUSR1 is heeded where Python handles it already, as under the command line.
    Only the main thread may set handlers; elsewhere the flag stays unset.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(signum: int, _frame: FrameType | None) -> None:
        first, interrupt.signum = interrupt.signum is None, signum
        if first and interrupt.training:
            return
        raise Stop(f"stopped by {signal.Signals(signum).name}", signum)

    interrupt.training = False

    known = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    heeded = [signum for signum in known if signal.getsignal(signum) not in (signal.SIG_IGN, None)]
    if getattr(signal, "SIGUSR1", None) in heeded and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        heeded.remove(signal.SIGUSR1)  # no command line is around this; it may be faulthandler's, which looks so too
    before = {signum: signal.signal(signum, note) for signum in heeded}
    try:
        yield
    except (Stop, RuntimeError) as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, Stop):
            behind = behind.__context__  # a capture that is left by Stop raises an error of its own on the way
        if behind is None:
            raise
        where = f"at once; {_left(interrupt.folders)}" if interrupt.training else "before the first step"
        raise Interrupted(f"{behind} {where}; {interrupt.way_on}", behind.signum) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _left(folders: Sequence[Path]) -> str:
    """What is on the disk of runs that were stopped at once."""
    newest = min((max(checkpoint.steps(folder), default=0) for folder in folders), default=0)
    return f"the newest checkpoint is of step {newest:,}" if newest else "nothing was saved, so it begins anew"


def stopped(interrupt: Interrupt, where: str) -> Interrupted | OutOfTime:
    """The error that says where training was stopped, and how to go on."""
    if interrupt.signum is None:
        return OutOfTime(f"the time is used up; stopped {where}, all saved; {interrupt.way_on}")
    name = signal.Signals(interrupt.signum).name
    return Interrupted(f"stopped by {name} {where}, all saved; {interrupt.way_on}", interrupt.signum)


@contextlib.contextmanager
def explained_full_disk(interrupt: Interrupt) -> Iterator[None]:
    """Have DiskFull say what is saved, and how to go on when there is room."""
    try:
        yield
    except DiskFull as error:
        if not all((folder / CONFIG).exists() for folder in interrupt.folders):
            raise  # there is nothing yet to go on with
        raise DiskFull(f"{error}; {_left(interrupt.folders)}; {interrupt.way_on}") from error


@contextlib.contextmanager
def explained_memory_errors(config: RunConfig, runtime: Runtime, *, num_replicas: int = 1) -> Iterator[None]:
    """Turn what torch, CUDA's libraries and numpy raise where memory ran out into OutOfMemory with a way out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # their variables hold what the step had got so far
        raise OutOfMemory(_way_out(config, runtime, num_replicas, str(error))) from error


@contextlib.contextmanager
def explained_compilation(runtime: Runtime) -> Iterator[None]:
    """Turn what is raised where a compiler or its cache does not work into MachineError with a way out."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        of_torch = any(part in type(error).__module__ for part in ("torch._dynamo", "torch._inductor", "triton"))
        ways = ["--no-compile"] if runtime.compile_scope != "none" else []
        ways += ["--no-native"] if runtime.native and runtime.device.type == "cuda" else []
        if not ways or not (of_torch or isinstance(error, OSError)) or _is_out_of_memory(error):
            raise
        said = f"compiling does not work here: {first_line(error)}"
        raise MachineError(f"{said}; use {' '.join(ways)} (--debug shows all)") from error


def _is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError is a RuntimeError; the CPU allocator, cuDNN and cuBLAS raise bare ones."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or says_out_of_memory(error)


def _way_out(config: RunConfig, runtime: Runtime, num_replicas: int, said: str) -> str:
    """What was needed, what there is, and what to try."""
    batch_size, where = config.recipe.batch_size, "GPU" if runtime.device.type == "cuda" else "CPU"
    try:
        fixed, image = memory_of_a_step(config, bytes_each=runtime.dtype.itemsize, num_replicas=num_replicas)
        usable = usable_memory(runtime.device)
    except (RuntimeError, MemoryError):  # not even for that
        return (
            f"out of memory with {config.name} at batch size {batch_size:,}; try --batch-size {max(1, batch_size // 2)}"
        )
    need, have = fixed + batch_size * image, "an unknown amount is" if usable is None else f"{usable / 1e9:.1f} GB are"
    asked = re.search(r"ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", said)
    at = f", {float(asked[1]) * UNITS[asked[2]]:.1f} GB of them at once" if asked else ""
    head = (
        f"out of memory: a step of {config.name} on {batch_size:,} images needs about {need / 1e9:.1f} GB{at}; "
        f"{have} free for it on the {where}\n"
    )
    if num_replicas > 1:  # another batch size would be another experiment
        return head + f"fewer runs at once need less: --side-by-side {num_replicas // 2}"
    fits = batch_size // 2  # where the estimate is no help: it says that the batch fits
    if usable is not None and need > USABLE_SHARE * usable:
        fits = int((USABLE_SHARE * usable - fixed) / image)
    if batch_size == 1 or fits < 1:
        return head + f"no smaller batch would fit; try a smaller --depth than {config.model.depth}"
    return head + f"a batch of about {_rounded(fits):,} fits: --batch-size {_rounded(fits)}"


def check_memory(config: RunConfig, runtime: Runtime, *, num_replicas: int = 1) -> None:
    """Raise OutOfMemory where a CPU's memory cannot hold a step: Linux would grant it, and kill the process in time."""
    usable = usable_memory(runtime.device) if runtime.device.type == "cpu" else None
    if usable is None:
        return
    fixed, image = memory_of_a_step(config, bytes_each=runtime.dtype.itemsize, num_replicas=num_replicas)
    if fixed + config.recipe.batch_size * image > DOUBT * usable:
        raise OutOfMemory(_way_out(config, runtime, num_replicas, ""))


def memory_of_a_step(config: RunConfig, *, bytes_each: int, num_replicas: int = 1) -> tuple[int, int]:
    """About how many bytes a training step holds: whatever the batch, and on top for each image of it.

    What the forward keeps for the backward is measured, on a step of two images on the CPU; compiled or not, it is
    nearly all of a step's memory. The rest is counted: weights, gradients and momentum in fp32 and copies of the
    weights; the images as the loaders keep them.

    Args:
        config: The network, its data.
        bytes_each: Of an activation: 2 in bf16 and fp16, 4 in fp32.
        num_replicas: Networks that are trained side by side.
    """
    if config.model.arch != "imagenet" and config.model.depth > DEEP:  # it grows by the same with each six layers
        depths = (DEEP - 6, DEEP)
        models = [dataclasses.replace(config.model, depth=depth) for depth in depths]
        two = [
            memory_of_a_step(dataclasses.replace(config, model=model), bytes_each=bytes_each, num_replicas=num_replicas)
            for model in models
        ]
        more = (config.model.depth - DEEP) // 6
        fixed, image = (b + more * (b - a) for a, b in zip(*two, strict=True))
        return fixed, image
    net = empty_net(dataclasses.replace(config.model, norm_batch=0), num_classes=10)  # two images are no group of 64
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = net(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    del logits  # until here it held what was kept, so that no address came twice
    image = sum(size for address, size in kept.items() if address not in weights) // 2  # of fp32
    data = config.data.num_train * 3 * IMAGE_SIZE * IMAGE_SIZE * LOADER_BYTES
    return data + num_replicas * num_parameters(net) * WEIGHT_BYTES, int(
        num_replicas * image * bytes_each / 4 * BACKWARD
    )


def _rounded(batch_size: int) -> int:
    """Down to a multiple of 64, 32, 16 or 8 that changes it little."""
    unit = next((unit for unit in (64, 32, 16, 8) if batch_size >= 4 * unit), 1)
    return batch_size - batch_size % unit
