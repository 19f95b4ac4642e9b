"""Errors that a user can cause or meet, each with its exit code.

A message is one or two lines: what is wrong, the value, what to type next. `cli` prints it without a traceback
(unless `--debug`) and exits with `exit_code`. Any other exception is a bug and exits with 1.
"""

# How messages of the CPU allocator, CUDA, cuDNN, cuBLAS and DALI say it; torch.OutOfMemoryError says it by its type.
OUT_OF_MEMORY = (
    "can't allocate memory", "out of memory", "_ALLOC_FAILED", "_ALLOCATION_FAILED", "bad_alloc", "_OUT_OF_MEMORY",
    "Can't allocate ", "CUDA allocation failed",
)  # fmt: skip


def says_out_of_memory(error: BaseException) -> bool:
    """Whether a library's error says that memory ran out, or came of one that does.

    A CUDA graph's capture that memory ends raises one more error, of streams that have not joined.
    """
    seen = set[int]()  # two errors may be each other's cause
    cause: BaseException | None = error
    while cause and id(cause) not in seen:
        if any(sign in str(cause) for sign in OUT_OF_MEMORY):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


def first_line(error: BaseException) -> str:
    """An exception in one line: its type, and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class FastresError(Exception):
    """Base of all errors with a user-facing message."""

    exit_code = 1


class InputError(FastresError):
    """Bad input or usage: a flag, a config file, a data file, a run folder."""

    exit_code = 2


class InUse(InputError):
    """A run folder that another process trains in, or has just trained in to the end."""


class MachineError(FastresError):
    """The machine lacks something: data, network, GPU, DALI, compiler, disk."""

    exit_code = 3


class DiskFull(MachineError):
    """A disk has no room for what is to be written."""


class OutOfMemory(FastresError):
    """Device or host memory ran out."""

    exit_code = 4


class Diverged(FastresError):
    """The loss became NaN or Inf, or a warm-up that must end never did."""

    exit_code = 5


class OutsideTolerance(FastresError):
    """A check that `--assert` or `--fail-if-slower` asked for failed."""

    exit_code = 6


class OutOfTime(FastresError):
    """The time that was given is used up; the state was saved before this was raised."""

    exit_code = 0


class Interrupted(FastresError):
    """A signal arrived (`guards.SIGNALS`); the state was saved before this was raised."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Stop(BaseException):
    """Raised by a signal's handler. No Exception, so that nothing takes it for an error of the work it interrupts."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
