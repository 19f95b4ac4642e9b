"""CIFAR-10 as arrays: find it, prove it, decode it. No torch, no augmentation.

It is looked for where the user points, else in the cache, else on the network (`download.py`). Archives are read member
by member, never unpacked; pickled batches go through an unpickler that knows four names.
"""

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastres.data import download
from fastres.data.imageset import IMAGE_SIZE, Bytes, ImageSet
from fastres.errors import InputError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")
# SHA-1 of the official members data_batch_1.bin ... test_batch.bin, as several public loaders pin them.
OFFICIAL_SHA1 = (
    "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "67eb016db431130d61cd03c7ad570b013799c88c",
)
IMAGES_PER_BATCH = 10_000
PIXEL_BYTES = 3 * IMAGE_SIZE * IMAGE_SIZE
RECORD_BYTES = 1 + PIXEL_BYTES  # a label, then the planes R, G, B, row by row
BATCH_BYTES = IMAGES_PER_BATCH * RECORD_BYTES
PICKLE_BYTES = 32_000_000  # the official pickled batches have 31.0 MB; more is refused
FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
ARCHIVES = (download.ARCHIVE, "cifar-10-python.tar.gz")

Read = Callable[[], bytes]  # one batch's file, read when called


def load_cifar10(
    data_dir: Path | None = None,
    *,
    urls: Sequence[str] = (),
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> ImageSet:
    """CIFAR-10 from `data_dir`, else `$FASTRES_DATA`, else the cache, else the network.

    Args:
        data_dir: The folder of the batches, binary or pickled layout, its parent, either tar.gz, or a folder of one.
        urls: Mirrors of cifar-10-binary.tar.gz, tried before the official address.
        cache_dir: Default `$FASTRES_CACHE`, else `$XDG_CACHE_HOME/fastres`, else `~/.cache/fastres`.
        progress: Takes bytes done and bytes in all, of a download.
        say: Takes one-line notices.

    Raises:
        InputError: `data_dir` holds no CIFAR-10, or something else than it says.
        MachineError: No data there, none in the cache, and no address that answers.
    """
    named = "--data-dir"
    if data_dir is None and (variable := os.environ.get("FASTRES_DATA")):
        data_dir, named = Path(variable), "FASTRES_DATA"
    if data_dir is not None:
        source, batches = _find(data_dir.expanduser(), named)
    else:
        source = download.cached_archive(cache_dir or default_cache_dir(), urls, progress=progress, say=say)
        batches = _archive(source)
    images = _decode(batches, str(source))
    if not images.official:
        say(f"{source} is not the official CIFAR-10 ({images.digest[:23]}...): used, and recorded with the results")
    return images


def default_cache_dir() -> Path:
    """Where a downloaded archive is kept."""
    if folder := os.environ.get("FASTRES_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastres"


def _find(path: Path, named: str) -> tuple[Path, Mapping[str, bytes]]:
    """What lies at `path`: where exactly, and its six batches in binary layout."""
    if not path.exists():
        raise InputError(f"{named} {path} does not exist; give the folder that holds {FOLDERS[0]}, or {ARCHIVES[0]}")
    if path.is_file():
        return path, _archive(path)
    for folder in (path, *(path / name for name in FOLDERS)):
        for suffix, convert in ((".bin", _checked_size), ("", _unpickled)):
            files = [folder / (name + suffix) for name in BATCHES]
            found = [file.is_file() for file in files]
            if all(found):
                return folder, {name: convert(_read(file), file) for name, file in zip(BATCHES, files, strict=True)}
            if any(found):
                missing = [file.name for file, there in zip(files, found, strict=True) if not there]
                raise InputError(
                    f"{folder} lacks {', '.join(missing)}; a whole CIFAR-10 has all of {BATCHES[0]} ... {BATCHES[-1]}"
                )
    for archive in ARCHIVES:
        if (path / archive).is_file():
            return path / archive, _archive(path / archive)
    raise InputError(
        f"{named} {path} holds no CIFAR-10: none of {FOLDERS[0]}/{BATCHES[0]}.bin, {FOLDERS[1]}/{BATCHES[0]}, "
        f"{' or '.join(ARCHIVES)} is there"
    )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(PICKLE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _archive(path: Path) -> Mapping[str, bytes]:
    """The six batches of a tar.gz, read member by member; nothing is written to the disk."""
    batches: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for name, convert, member in _batch_members(archive, path):
                if name in batches:
                    raise InputError(f"{path} holds {member.name} twice; it is not an official CIFAR-10 archive")
                if member.size > PICKLE_BYTES:
                    raise InputError(f"{path}: {member.name} has {member.size:,} bytes, more than any CIFAR-10 batch")
                file = archive.extractfile(member)
                assert file is not None  # a regular file
                batches[name] = convert(file.read(), path / member.name)
                if len(batches) == len(BATCHES):
                    return batches
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:  # zlib's errors are ValueErrors or OSErrors
        raise InputError(f"{path} is not a whole tar.gz of CIFAR-10: {error}") from error
    missing = [name for name in BATCHES if name not in batches]
    raise InputError(f"{path} lacks {', '.join(missing)}; it is not a CIFAR-10 archive")


def _batch_members(
    archive: tarfile.TarFile, path: Path
) -> Iterator[tuple[str, Callable[[bytes, Path], bytes], tarfile.TarInfo]]:
    """The members that are batches; anything that no CIFAR-10 archive holds is refused."""
    for count, member in enumerate(archive):
        parts = PurePosixPath(member.name).parts
        if count >= 100:
            raise InputError(f"{path} holds over 100 members; it is not a CIFAR-10 archive")
        if member.name.startswith("/") or ".." in parts or not (member.isreg() or member.isdir()):
            raise InputError(f"{path} holds {member.name!r}, a link, a device or a path outside; it is not read")
        if member.isreg():
            base = PurePosixPath(member.name).name
            if base.removesuffix(".bin") in BATCHES:
                yield base.removesuffix(".bin"), _checked_size if base.endswith(".bin") else _unpickled, member


def _checked_size(content: bytes, path: Path) -> bytes:
    if len(content) != BATCH_BYTES:
        over = "over " if len(content) > PICKLE_BYTES else ""
        raise InputError(
            f"{path} has {over}{min(len(content), PICKLE_BYTES):,} bytes; a CIFAR-10 batch has {BATCH_BYTES:,}"
        )
    return content


class _BatchUnpickler(pickle.Unpickler):
    """Reads what a pickled CIFAR batch needs and nothing else: dicts, lists, numbers, text, and one uint8 array.

    Each of the four callables that such a batch names is replaced by a stand-in that allocates nothing: the array is
    what bytes are really in the file.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR-10 batch does")


class _Array:
    """Stands for the array while it is unpickled: takes numpy's state tuple, keeps the raw bytes."""

    shape: tuple[int, ...] = ()
    content = b""

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, content = state
        if not isinstance(dtype, _UInt8) or fortran or not isinstance(content, bytes | str):
            raise pickle.UnpicklingError("its array is not plain uint8")
        self.shape = shape
        self.content = content if isinstance(content, bytes) else content.encode("latin1")


class _UInt8:
    """Stands for numpy's dtype: only uint8 is known, and its state says nothing more."""

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_array(*_: Any) -> _Array:
    return _Array()


def _dtype(name: Any, *_: Any) -> _UInt8:
    if name not in ("u1", b"u1", "uint8"):
        raise pickle.UnpicklingError(f"its array has dtype {name!r}, not uint8")
    return _UInt8()


def _latin1(text: str, _encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def _unpickled(content: bytes, path: Path) -> bytes:
    """A pickled batch in the binary layout."""
    if len(content) > PICKLE_BYTES:
        raise InputError(f"{path} has over {PICKLE_BYTES:,} bytes, more than any CIFAR-10 batch")
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        fields = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        data, labels = fields["data"], fields["labels"]
        if not isinstance(data, _Array) or data.shape != (IMAGES_PER_BATCH, PIXEL_BYTES):
            raise ValueError("its data is not a 10,000 x 3,072 array")
        if len(data.content) != IMAGES_PER_BATCH * PIXEL_BYTES or len(labels) != IMAGES_PER_BATCH:
            raise ValueError("it does not hold 10,000 images and labels")
        records = np.empty((IMAGES_PER_BATCH, RECORD_BYTES), np.uint8)
        records[:, 0] = np.array(labels, dtype=np.uint8)
        records[:, 1:] = np.frombuffer(data.content, np.uint8).reshape(IMAGES_PER_BATCH, PIXEL_BYTES)
    except Exception as error:  # a hostile pickle can raise anything
        raise InputError(f"{path} is not a pickled CIFAR-10 batch: {error}") from error
    return records.tobytes()


def _decode(batches: Mapping[str, bytes], source: str) -> ImageSet:
    """Six batches in binary layout as an ImageSet, labels and digest checked."""
    digest, official = hashlib.sha256(), True
    labels = np.empty(len(BATCHES) * IMAGES_PER_BATCH, np.uint8)
    images: Bytes = np.empty((len(labels), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for k, (name, sha1) in enumerate(zip(BATCHES, OFFICIAL_SHA1, strict=True)):
        content = batches[name]
        digest.update(content)
        official &= hashlib.sha1(content, usedforsecurity=False).hexdigest() == sha1
        records = np.frombuffer(content, np.uint8).reshape(IMAGES_PER_BATCH, RECORD_BYTES)
        part = slice(k * IMAGES_PER_BATCH, (k + 1) * IMAGES_PER_BATCH)
        labels[part] = records[:, 0]
        images[part] = records[:, 1:].reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE).transpose(0, 2, 3, 1)
        if (worst := int(labels[part].max())) >= len(CLASS_NAMES):
            where = int(np.argmax(labels[part] >= len(CLASS_NAMES)))
            raise InputError(f"{source}: {name} has label {worst} at record {where}; labels are 0 to 9")
    cut = 5 * IMAGES_PER_BATCH
    return ImageSet(
        train_images=images[:cut],
        train_labels=labels[:cut],
        test_images=images[cut:],
        test_labels=labels[cut:],
        class_names=CLASS_NAMES,
        name="cifar10",
        digest=f"sha256:{digest.hexdigest()}",
        official=official,
        source=source,
    )
