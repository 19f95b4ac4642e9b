"""CIFAR-10 as arrays: find it, check it, decode it. No torch, no augmentation.

It is looked for where the user points, else in the cache, else on the network (`download.py`). Archives are read member
by member, never unpacked; pickled batches go through `cifar_pickle.py`.
"""

import gzip
import hashlib
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from fastres.data import cifar_pickle, download
from fastres.data.cifar_pickle import PIXEL_BYTES
from fastres.data.imageset import IMAGE_SIZE, Bytes, ImageSet
from fastres.errors import InputError
from fastres.machine.host import default_cache_dir

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")
# SHA-1 of the official data_batch_1.bin ... test_batch.bin, and the archive, as several public loaders pin them.
OFFICIAL_SHA1 = (
    "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "67eb016db431130d61cd03c7ad570b013799c88c",
)
REMOTE = download.Remote(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    num_bytes=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
IMAGES_PER_BATCH = 10_000
RECORD_BYTES = 1 + PIXEL_BYTES  # a label, then the pixels
MAX_PICKLE_BYTES = 32_000_000  # of a pickled batch; an official one has 31.0 MB
BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
MAX_MEMBERS = 100  # of an archive; an official one has 9
SLACK = 1 << 20  # bytes of an archive that are not batches: headers, readme.html, padding

Read = Callable[[str], bytes]  # a batch in binary layout, by its name; called once for each


def load_cifar10(
    data_dir: Path | None = None,
    *,
    train: bool = True,
    urls: Sequence[str] = (),
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> ImageSet:
    """CIFAR-10 from `data_dir`, else `$FASTRES_DATA`, else the cache, else the network.

    What is fetched must be the official archive. What the user points to must have its structure (sizes, labels 0 to 9,
    50,000 + 10,000 images); other contents are allowed and said. The digest of the result is the SHA-256 over the
    batches that are read, in binary layout, data_batch_1 to 5 and test_batch, whatever layout they came in.

    Args:
        train: False reads the test batch alone; the rest need not be there, and the set has no training images.
        data_dir: The folder of the batches (binary or python layout), its parent, a folder with either tar.gz, or that.
        urls: Mirrors of cifar-10-binary.tar.gz, http or https, tried before the official address.
        cache_dir: Default `$FASTRES_CACHE`, else `$XDG_CACHE_HOME/fastres`, else `~/.cache/fastres`.
        progress: Takes bytes done and bytes in all, of a download.
        say: Takes one-line notices.

    Raises:
        InputError: There is no CIFAR-10 in `data_dir`, or it is damaged; a mirror is not an address.
        MachineError: No data given, none in the cache, no address that gives it; or no room for it.
    """
    names = BATCHES if train else BATCHES[-1:]
    named = "--data-dir"
    if data_dir is None and (variable := os.environ.get("FASTRES_DATA")):
        data_dir, named = Path(variable), "FASTRES_DATA"
    if data_dir is not None:
        source, read = _find(data_dir, named, names)
    else:
        source = download.cached(REMOTE, cache_dir or default_cache_dir(), urls, progress=progress, say=say)
        read = _read_archive(source, names)
    images = _decode(read, source, names)
    if not images.official:
        what = f"not the official CIFAR-10 (its digest is {images.digest})" if train else "not the official test images"
        say(f"{source}: {what}: used, and named in the results")
    return images


def _find(path: Path, named: str, names: Sequence[str]) -> tuple[Path, Read]:
    """Where exactly CIFAR-10 lies at `path`, and how to read it."""
    looked_for = f"{BINARY}/{BATCHES[0]}.bin ..., {PYTHON}/{BATCHES[0]} ..., {' or '.join(ARCHIVES)}"
    try:
        path = path.expanduser()
        if path.is_file():
            return path, _read_archive(path, names)
        if not path.is_dir():
            raise InputError(f"{named} {path} does not exist; looked for a folder with {looked_for}")
        partial = ""
        for folder in (path, path / BINARY, path / PYTHON):
            for suffix, convert in ((".bin", _checked_size), ("", _unpickled)):
                missing = [name + suffix for name in names if not (folder / (name + suffix)).is_file()]
                if not missing:
                    return folder, _folder_reader(folder, suffix, convert)
                if len(missing) < len(names):
                    partial = partial or f"; {folder} lacks {', '.join(missing)}"
        for archive in ARCHIVES:
            if (path / archive).is_file():
                return path / archive, _read_archive(path / archive, names)
    except (OSError, RuntimeError) as error:  # no permission, a name too long; no home folder for "~"
        raise InputError(f"{named} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    raise InputError(f"{named} {path} holds no CIFAR-10; looked for {looked_for}{partial}")


def _folder_reader(folder: Path, suffix: str, convert: Callable[[bytes, Path], bytes]) -> Read:
    def read(name: str) -> bytes:
        path = folder / (name + suffix)
        try:
            with path.open("rb") as file:
                return convert(file.read(MAX_PICKLE_BYTES + 1), path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error

    return read


class _Metered(gzip.GzipFile):
    """Stops after `left` bytes: an archive may unpack to a thousand times its size, and its headers to any."""

    left = SLACK

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.left -= len(content)
        if self.left < 0:
            raise tarfile.ReadError("it unpacks to more than CIFAR-10 has")
        return content


def _read_archive(path: Path, names: Sequence[str]) -> Read:
    """The batches of a tar.gz, read member by member into memory; nothing is written to the disk."""
    try:
        with _Metered(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 16) as archive:
                batches = _read_members(archive, stream, path)
            stream.left = SLACK
            while stream.read(1 << 16):  # to the end, where gzip's checksum is
                pass
    # Whatever gzip, zlib and tarfile raise on malformed input; RecursionError: a chain of extended headers.
    except (tarfile.TarError, EOFError, ValueError, OSError, zlib.error, struct.error, RecursionError) as error:
        if isinstance(error, OSError) and error.errno:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        raise InputError(f"{path} is not a whole tar.gz of CIFAR-10: {error}") from error
    if missing := [name for name in names if name not in batches]:
        raise InputError(f"{path} lacks {', '.join(missing)}; a tar.gz of CIFAR-10 has six batches")
    return batches.pop


def _read_members(archive: tarfile.TarFile, stream: _Metered, path: Path) -> dict[str, bytes]:
    batches: dict[str, bytes] = {}
    for _ in range(MAX_MEMBERS):
        stream.left = SLACK
        if (member := archive.next()) is None:
            return batches
        inside = PurePosixPath(member.name)
        if inside.is_absolute() or ".." in inside.parts or member.issparse() or not (member.isreg() or member.isdir()):
            raise InputError(f"{path} holds {member.name!r:.80}: a link, a device or a path outside; it is not read")
        name, convert = inside.name.removesuffix(".bin"), _checked_size if inside.suffix == ".bin" else _unpickled
        if name not in BATCHES or member.isdir():
            continue
        if name in batches:
            raise InputError(f"{path} holds {name} twice; it is not an archive of CIFAR-10")
        if member.size > MAX_PICKLE_BYTES:
            raise InputError(f"{path}: {inside.name} has {member.size:,} bytes, more than any CIFAR-10 batch")
        stream.left = member.size + SLACK
        content = archive.extractfile(member)
        assert content is not None  # it is a regular file
        batches[name] = convert(content.read(), path / inside.name)
    raise InputError(f"{path} holds over {MAX_MEMBERS} members; it is not an archive of CIFAR-10")


def _checked_size(content: bytes, path: Path) -> bytes:
    expected = IMAGES_PER_BATCH * RECORD_BYTES
    if len(content) != expected:
        size = f"{len(content):,}" if len(content) <= MAX_PICKLE_BYTES else f"over {MAX_PICKLE_BYTES:,}"
        raise InputError(f"{path} has {size} bytes; a CIFAR-10 batch has {expected:,}")
    return content


def _unpickled(content: bytes, path: Path) -> bytes:
    if len(content) > MAX_PICKLE_BYTES:
        raise InputError(f"{path} has over {MAX_PICKLE_BYTES:,} bytes, more than any CIFAR-10 batch")
    try:
        return cifar_pickle.to_binary_layout(content, IMAGES_PER_BATCH)
    except ValueError as error:
        raise InputError(f"{path} is not a pickled CIFAR-10 batch: {' '.join(str(error).split()):.160}") from error


def _decode(read: Read, source: Path, names: Sequence[str]) -> ImageSet:
    """Batches in binary layout as an ImageSet; labels checked, digest taken. Holds one batch beside the result."""
    num_images = len(names) * IMAGES_PER_BATCH
    labels: Bytes = np.empty(num_images, np.uint8)
    images: Bytes = np.empty((num_images, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    digest, official, seen = hashlib.sha256(), True, dict[str, str]()
    for k, name in enumerate(names):
        content = read(name)
        digest.update(content)
        sha1 = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        official &= sha1 == OFFICIAL_SHA1[BATCHES.index(name)]
        if (other := seen.setdefault(sha1, name)) != name:
            raise InputError(f"{source}: {name} is the same as {other}; each batch of CIFAR-10 is another")
        records = np.frombuffer(content, np.uint8).reshape(IMAGES_PER_BATCH, RECORD_BYTES)
        if (worst := int(records[:, 0].max())) >= len(CLASS_NAMES):
            where = int(np.argmax(records[:, 0] >= len(CLASS_NAMES)))
            raise InputError(f"{source}: {name} has label {worst} at image {where}; labels are 0 to 9")
        batch = slice(k * IMAGES_PER_BATCH, (k + 1) * IMAGES_PER_BATCH)
        labels[batch] = records[:, 0]
        planes = records[:, 1:].reshape(IMAGES_PER_BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)
        for channel in range(3):  # one at a time: twice as fast as one transposed copy
            images[batch, :, :, channel] = planes[:, channel]
    cut = num_images - IMAGES_PER_BATCH
    return ImageSet(
        train_images=images[:cut],
        train_labels=labels[:cut],
        test_images=images[cut:],
        test_labels=labels[cut:],
        class_names=CLASS_NAMES,
        name="cifar10",
        digest=f"sha256:{digest.hexdigest()}",
        official=official,
        source=str(source),
    )
