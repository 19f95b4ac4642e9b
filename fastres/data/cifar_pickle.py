"""One pickled CIFAR-10 batch (the python layout) as bytes in the binary layout, without running what it says.

Three checks, one behind the other. Opcodes: only those that such a batch is written with, in about their number, so a
small file cannot make the unpickler ask for much memory or nest until the stack ends. Names: three, and each stands for
a class of this file that calls nothing and allocates nothing; numpy is never reached. Result: shapes and types.

The official batches were written by Python 2's cPickle, protocol 2; what Python 3 writes with protocol 3 or 4 is read
too. https://www.cs.toronto.edu/~kriz/cifar.html
"""

import io
import pickle
import pickletools
from collections import Counter
from typing import Any

import numpy as np

from fastres.data.imageset import IMAGE_SIZE

PIXEL_BYTES = 3 * IMAGE_SIZE * IMAGE_SIZE  # an image: planes R, G, B, row by row

# 10,000 labels, as many file names, and a memo entry for each name: about 30,000 opcodes.
MAX_OPCODES = 100_000
MANY = frozenset(
    "BININT BININT1 BININT2 SHORT_BINSTRING SHORT_BINBYTES BINBYTES SHORT_BINUNICODE BINUNICODE "  # noqa: SIM905
    "BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE".split()
)
# Lists grow by 1,000 items an APPENDS; the rest comes a handful of times.
MAX_FEW = 100
FEW = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BINSTRING EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND "  # noqa: SIM905
    "APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GLOBAL STACK_GLOBAL REDUCE BUILD".split()
)


def to_binary_layout(content: bytes, num_images: int) -> bytes:
    """The batch as `num_images` records of a label byte and 3,072 pixel bytes.

    Raises:
        ValueError: It is not a pickled CIFAR-10 batch; says why in a few words.
    """
    try:
        _check_opcodes(content)
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
    except MemoryError:
        raise
    except Exception as error:  # a pickle that is none can raise anything, says pickle's documentation
        raise ValueError(str(error) or type(error).__name__) from error
    if not isinstance(batch, dict):
        raise ValueError("it is not a dict")
    pixels, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    if not isinstance(pixels, _Array) or pixels.shape != (num_images, PIXEL_BYTES):
        raise ValueError(f"its 'data' is not a {num_images:,} x {PIXEL_BYTES:,} array of uint8")
    if not isinstance(labels, list) or len(labels) != num_images or not all(type(label) is int for label in labels):
        raise ValueError(f"its 'labels' are not a list of {num_images:,} integers")
    if not all(0 <= label < 256 for label in labels):
        raise ValueError("it has a label that is not from 0 to 9")
    records = np.empty((num_images, 1 + PIXEL_BYTES), np.uint8)
    records[:, 0] = labels
    records[:, 1:] = np.frombuffer(pixels.content, np.uint8).reshape(pixels.shape, order="F" if pixels.fortran else "C")
    return records.tobytes()


def _check_opcodes(content: bytes) -> None:
    """Look at the opcodes, one after the other, before anything acts on them."""
    counts: Counter[str] = Counter()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        counts[opcode.name] += 1
        if opcode.name not in MANY | FEW or (opcode.name in FEW and counts[opcode.name] > MAX_FEW):
            raise pickle.UnpicklingError(f"it uses the opcode {opcode.name} as no CIFAR-10 batch does")
        if number >= MAX_OPCODES:
            raise pickle.UnpicklingError(f"it has over {MAX_OPCODES:,} opcodes, more than any CIFAR-10 batch")
        # The unpickler makes room for as many memo entries as the highest index says.
        if opcode.name == "LONG_BINPUT" and isinstance(argument, int) and argument > MAX_OPCODES:
            raise pickle.UnpicklingError(f"it writes memo entry {argument:,}, more than it can have")


class _Array:
    """Stands for numpy.ndarray and its maker: takes numpy's state tuple, keeps the bytes that are in the file."""

    __slots__ = ("content", "fortran", "shape")  # and so nothing else can be set, on the class neither

    def __init__(self, *_: object) -> None:
        self.content, self.shape, self.fortran = b"", (0, 0), False

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, content = state
        if not isinstance(dtype, _UInt8) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("its array is not plain uint8")
        if len(content) != shape[0] * shape[1]:
            raise pickle.UnpicklingError("its array does not have as many bytes as its shape says")
        self.content, self.shape, self.fortran = content, shape, bool(fortran)


class _UInt8:
    """Stands for numpy.dtype, of which only uint8 is known; its state (byte order, alignment) says nothing more."""

    __slots__ = ()

    def __init__(self, name: object, *_: object) -> None:
        if name not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"its array has dtype {name!r:.20}, not uint8")

    def __setstate__(self, state: Any) -> None:
        pass


class _BatchUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for one of the three names; numpy 2 writes `numpy._core` for `numpy.core`."""
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") | ("numpy", "ndarray"):
                return _Array
            case ("numpy", "dtype"):
                return _UInt8
        raise pickle.UnpicklingError(f"it names {f'{module}.{name}':.60}, which no CIFAR-10 batch does")
