"""What can end a run from outside, signals and memory, turned into something the loop and the user can deal with."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch

from fastres.config import RunConfig
from fastres.errors import OutOfMemory


@dataclass
class Interrupt:
    """The first signal that arrived; None while there was none."""

    signum: int | None = None


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Turn SIGINT and SIGTERM into a flag that the loop reads after each step; a second Ctrl-C stops at once.

    Only the main thread may set handlers; elsewhere the flag stays unset.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(signum: int, _frame: FrameType | None) -> None:
        if interrupt.signum is not None:
            raise KeyboardInterrupt
        interrupt.signum = signum

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def explained_memory_errors(config: RunConfig) -> Iterator[None]:
    """Turn torch's out-of-memory errors, GPU and CPU, into OutOfMemory with a way out."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a bare RuntimeError
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        batch_size = config.recipe.batch_size
        raise OutOfMemory(
            f"out of memory with {config.name} at batch size {batch_size}: {str(error).splitlines()[0]}; "
            f"try --batch-size {max(1, batch_size // 2)}"
        ) from error
