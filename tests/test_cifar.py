"""CIFAR-10 from every layout, and from files that are not what they say."""

import contextlib
import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Literal
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastres.data import cifar, cifar_pickle, download
from fastres.data.cifar import BATCHES, load_cifar10
from fastres.errors import InputError, MachineError
from fastres.machine.host import default_cache_dir

NUM = 10  # images a batch, but in the tests at full size
FULL = cifar.IMAGES_PER_BATCH
Records = npt.NDArray[np.uint8]  # (images, 3073): the binary layout
Batches = dict[str, Records]
Say = list[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def small(monkeypatch: Patch) -> None:
    monkeypatch.setattr(cifar, "IMAGES_PER_BATCH", NUM)


@pytest.fixture(autouse=True)
def offline(monkeypatch: Patch) -> None:
    def refuse(*_: object, **__: object) -> Path:
        raise AssertionError("the cache and the network must not be asked")

    monkeypatch.setattr(download, "cached", refuse)


def make_records(num: int = NUM, seed: int = 0) -> Batches:
    chance = np.random.Generator(np.random.Philox(seed))
    records = chance.integers(0, 256, (len(BATCHES), num, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    return dict(zip(BATCHES, records, strict=True))


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as the strings of Python 2, in which the official batches were written."""

    write: Callable[[bytes], object]
    memoize: Callable[[object], None]
    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.write(b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)))
        self.write(raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def pickled(batch: Records, *, protocol: int = 2, order: Literal["C", "F"] = "C") -> bytes:
    """A batch in the python layout; protocol 2 as cPickle and the numpy of its time wrote it."""
    names = [f"leptodactylus_s_{k:06}.png" for k in range(len(batch))]
    fields = {
        "batch_label": "training batch 1 of 5",
        "labels": batch[:, 0].tolist(),
        "data": np.array(batch[:, 1:], order=order),
        "filenames": names,
    }
    if protocol > 2:
        return pickle.dumps(fields, protocol)
    Python2Pickler(buffer := io.BytesIO(), 2).dump(fields)
    return buffer.getvalue().replace(b"numpy._core.", b"numpy.core.")


def write_folder(folder: Path, records: Batches, *, python: bool = False) -> Path:
    folder.mkdir(parents=True)
    for name, batch in records.items():
        (folder / (name + ("" if python else ".bin"))).write_bytes(pickled(batch) if python else batch.tobytes())
    return folder


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def members(records: Batches, *, python: bool = False) -> list[tuple[tarfile.TarInfo, bytes]]:
    """What an official archive holds; in the python one the batches lie in no order."""
    top = cifar.PYTHON if python else cifar.BINARY
    batches = [
        member(f"{top}/{name}", pickled(records[name]))
        if python
        else member(f"{top}/{name}.bin", records[name].tobytes())
        for name in (BATCHES[::-1] if python else BATCHES)
    ]
    readme = member(f"{top}/readme.html", b"airplane")
    return [member(top, type=tarfile.DIRTYPE), *batches[:5], readme, batches[5]]


def write_tar(path: Path, entries: Iterable[tuple[tarfile.TarInfo, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1, **options) as archive:  # type: ignore[call-overload]
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def records() -> Batches:
    return make_records()


@pytest.fixture
def binary_tar(tmp_path: Path, records: Batches) -> Path:
    return write_tar(tmp_path / "cifar-10-binary.tar.gz", members(records))


def refusal(path: Path, tmp_path: Path) -> str:
    """The message with which `path` is refused: short, and with the file's place in it."""
    with pytest.raises(InputError) as caught:
        load_cifar10(path)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert str(tmp_path) in message
    assert "\n" not in message
    assert len(message) < 500 + len(str(tmp_path))
    return message


@contextlib.contextmanager
def memory_below(limit: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


# --- every layout gives the same arrays


@pytest.mark.parametrize(
    ("at", "lies"),
    [
        (cifar.BINARY, cifar.BINARY),
        (".", cifar.BINARY),
        ("mine", "mine"),
        (cifar.PYTHON, cifar.PYTHON),
        (".", cifar.PYTHON),
        ("any-name.tgz", "any-name.tgz"),
        (".", "cifar-10-binary.tar.gz"),
        (".", "cifar-10-python.tar.gz"),
    ],
)
def test_every_layout_gives_the_same_arrays(at: str, lies: str, tmp_path: Path, records: Batches) -> None:
    python = "py" in lies
    if lies.endswith("gz"):
        write_tar(tmp_path / lies, members(records, python=python))
    else:
        write_folder(tmp_path / lies, records, python=python)
    said: Say = []
    images = load_cifar10(tmp_path / at, say=said.append)
    raw = b"".join(records[name].tobytes() for name in BATCHES)
    assert images.digest == f"sha256:{hashlib.sha256(raw).hexdigest()}"
    assert (images.name, images.official, images.source) == ("cifar10", False, str(tmp_path / lies))
    assert (len(images.train_images), len(images.test_images)) == (5 * NUM, NUM)
    pixels = np.concatenate((images.train_images, images.test_images))
    labels = np.concatenate((images.train_labels, images.test_labels))
    assert pixels.dtype == labels.dtype == np.uint8
    for k in range(6 * NUM):
        record = raw[k * 3073 : (k + 1) * 3073]
        assert labels[k] == record[0]
        for row, column, channel in ((0, 0, 0), (0, 31, 1), (31, 0, 2), (7, 21, 0), (19, 4, 2)):
            assert pixels[k, row, column, channel] == record[1 + channel * 1024 + row * 32 + column]
    assert len(said) == 1
    assert "not the official CIFAR-10" in said[0]
    assert images.digest in said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize("lies", [cifar.BINARY, cifar.PYTHON, "cifar-10-binary.tar.gz"])
def test_the_test_batch_alone(lies: str, tmp_path: Path, records: Batches, monkeypatch: Patch) -> None:
    """It is enough to evaluate; and training batches that are there and damaged do not matter then."""
    only = {"test_batch": records["test_batch"]}
    if lies.endswith("gz"):
        write_tar(tmp_path / lies, [entry for entry in members(records) if "data_batch" not in entry[0].name])
    else:
        write_folder(tmp_path / lies, only, python=lies == cifar.PYTHON)
    raw = records["test_batch"].tobytes()
    pin = hashlib.sha1(raw, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(cifar, "OFFICIAL_SHA1", (*["0" * 40] * 5, pin))
    images = load_cifar10(tmp_path, train=False)
    assert images.official
    assert images.digest == f"sha256:{hashlib.sha256(raw).hexdigest()}"
    assert images.test_labels.tolist() == records["test_batch"][:, 0].tolist()
    assert (len(images.train_images), len(images.train_labels), len(images.test_images)) == (0, 0, NUM)
    assert "lacks data_batch_1" in refusal(tmp_path, tmp_path)


def test_official_is_decided_by_every_batch(tmp_path: Path, records: Batches, monkeypatch: Patch) -> None:
    pins = tuple(hashlib.sha1(records[name].tobytes(), usedforsecurity=False).hexdigest() for name in BATCHES)
    folder = write_folder(tmp_path / cifar.BINARY, records)
    monkeypatch.setattr(cifar, "OFFICIAL_SHA1", pins)
    said: Say = []
    assert load_cifar10(folder, say=said.append).official
    assert said == []
    for k in range(6):
        monkeypatch.setattr(cifar, "OFFICIAL_SHA1", (*pins[:k], "0" * 40, *pins[k + 1 :]))
        assert not load_cifar10(folder, say=said.append).official


# --- where it is looked for


def test_environment_variable_is_second_to_data_dir(tmp_path: Path, records: Batches, monkeypatch: Patch) -> None:
    one, other = (write_folder(tmp_path / name, records) for name in ("one", "other"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTRES_DATA", "~/other")
    assert load_cifar10(one, say=Say().append).source == str(one)
    assert load_cifar10(say=Say().append).source == str(other)
    monkeypatch.setenv("FASTRES_DATA", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"^FASTRES_DATA .*gone does not exist"):
        load_cifar10()
    with pytest.raises(InputError, match=r"^--data-dir .*nowhere does not exist"):
        load_cifar10(tmp_path / "nowhere")


def test_a_folder_without_cifar_or_with_a_part_of_it(tmp_path: Path, records: Batches) -> None:
    message = refusal(tmp_path, tmp_path)
    for name in ("cifar-10-batches-bin/data_batch_1.bin", "cifar-10-batches-py/data_batch_1", *cifar.ARCHIVES):
        assert name in message
    folder = write_folder(tmp_path / cifar.BINARY, records)
    (folder / "data_batch_3.bin").unlink()
    (folder / "test_batch.bin").unlink()
    assert f"{folder} lacks data_batch_3.bin, test_batch.bin" in refusal(tmp_path, tmp_path)
    archive = write_tar(tmp_path / "cifar-10-binary.tar.gz", members(records))
    assert load_cifar10(tmp_path, say=Say().append).source == str(archive)


def test_a_batch_that_is_another_one_too(tmp_path: Path, records: Batches) -> None:
    """As after a slip in a script that copies them: the network would be trained on its test images."""
    folder = write_folder(tmp_path / cifar.BINARY, records)
    (folder / "test_batch.bin").write_bytes((folder / "data_batch_2.bin").read_bytes())
    assert f"{folder}: test_batch is the same as data_batch_2" in refusal(tmp_path, tmp_path)


def test_paths_that_cannot_be_looked_at(tmp_path: Path) -> None:
    for path, complaint in ((tmp_path / ("a" * 300), "File name too long"), (Path("~nobody.here/x"), "home directory")):
        with pytest.raises(InputError, match=rf"^--data-dir .* cannot be read: .*{complaint}"):
            load_cifar10(path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_files_that_cannot_be_read(tmp_path: Path, records: Batches) -> None:
    folder = write_folder(tmp_path / cifar.BINARY, records)
    (folder / "data_batch_1.bin").unlink()
    for path in (folder / "data_batch_1.bin", tmp_path / "c.tar.gz"):
        path.symlink_to("/proc/self/mem")
    for path in (folder, tmp_path / "c.tar.gz"):
        assert "cannot be read: Input/output error" in refusal(path, tmp_path)


def test_cache_folder(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "fastres"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # "should be considered invalid and ignored", says XDG
    assert default_cache_dir() == Path("/home/someone/.cache/fastres")
    monkeypatch.setenv("FASTRES_CACHE", "~/elsewhere")
    assert default_cache_dir() == Path("/home/someone/elsewhere")
    monkeypatch.setenv("FASTRES_CACHE", "~nobody.here/x")
    with pytest.raises(MachineError, match="set FASTRES_CACHE"):
        default_cache_dir()


def test_the_cache_comes_before_the_network(binary_tar: Path, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.undo()  # `offline`; nothing gets past this machine all the same
    monkeypatch.setattr(cifar, "IMAGES_PER_BATCH", NUM)
    monkeypatch.setenv("no_proxy", "*")
    whole = binary_tar.read_bytes()
    remote = download.Remote(f"http://127.0.0.1:1/{binary_tar.name}", len(whole), hashlib.sha256(whole).hexdigest())
    monkeypatch.setattr(cifar, "REMOTE", remote)
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "empty"))
    assert load_cifar10(cache_dir=tmp_path, say=Say().append).source == str(binary_tar)
    with pytest.raises(MachineError) as caught:
        load_cifar10(say=Say().append)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    for part in (str(tmp_path / "empty"), remote.url, "Connection refused", "--data-dir FOLDER", "--dataset synthetic"):
        assert part in message
    assert message.count("\n") == 1


def test_mirrors_and_callbacks_are_passed_on(binary_tar: Path, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(download, "cached", cached := Mock(return_value=binary_tar))
    progress, say = Mock(), Mock()
    load_cifar10(urls=["http://a/b"], cache_dir=tmp_path, progress=progress, say=say)
    cached.assert_called_once_with(cifar.REMOTE, tmp_path, ["http://a/b"], progress=progress, say=say)


# --- bad batches


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda raw: raw[:-1], "has 30,729 bytes; a CIFAR-10 batch has 30,730"),
        (lambda raw: raw + b"\0", "has 30,731 bytes"),
        (lambda _: b"", "has 0 bytes"),
        (lambda raw: b"\x0a" + raw[1:], "data_batch_2 has label 10 at image 0; labels are 0 to 9"),
        (lambda raw: raw[:3073] + b"\xff" + raw[3074:], "has label 255 at image 1"),
    ],
)
@pytest.mark.parametrize("as_archive", [False, True], ids=["folder", "archive"])
def test_bad_batch(
    change: Callable[[bytes], bytes], complaint: str, as_archive: bool, tmp_path: Path, records: Batches
) -> None:
    raw = change(records["data_batch_2"].tobytes())
    if as_archive:
        entries = [(i, c) if "data_batch_2" not in i.name else member(i.name, raw) for i, c in members(records)]
        path = write_tar(tmp_path / "c.tar.gz", entries)
    else:
        path = write_folder(tmp_path / cifar.BINARY, records)
        (path / "data_batch_2.bin").write_bytes(raw)
    assert complaint in refusal(path, tmp_path)


def test_oversized_files_are_not_read_whole(tmp_path: Path, records: Batches, monkeypatch: Patch) -> None:
    for python, name in ((False, "data_batch_1.bin"), (True, "data_batch_1")):
        folder = write_folder(tmp_path / name, records, python=python)
        os.truncate(folder / name, 1 << 40)  # a sparse file of a terabyte
        assert "has over 32,000,000 bytes" in refusal(folder, tmp_path)


# --- bad archives


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.1, 0.5, 0.9, 0.99999])
def test_truncated_archive(binary_tar: Path, keep: float, tmp_path: Path) -> None:
    binary_tar.write_bytes(binary_tar.read_bytes()[: int(keep * binary_tar.stat().st_size)])
    assert "is not a whole tar.gz of CIFAR-10" in refusal(binary_tar, tmp_path)


def test_a_flipped_bit_is_seen_or_changes_no_image(binary_tar: Path, tmp_path: Path) -> None:
    """Gzip's header (time, system, name) has no checksum: a flip there may go unseen, and nowhere else."""
    whole, records = binary_tar.read_bytes(), make_records()
    header = whole.index(b"\0", 10) + 1  # ten bytes, then the file's name
    unseen = set()
    for place in [*range(60), *range(60, len(whole) - 8, len(whole) // 40), *range(len(whole) - 8, len(whole))]:
        binary_tar.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            images = load_cifar10(binary_tar, say=Say().append)
        except InputError:
            continue
        unseen.add(place)
        assert np.array_equal(images.test_labels, records["test_batch"][:, 0])
        assert images.digest == f"sha256:{hashlib.sha256(b''.join(r.tobytes() for r in records.values())).hexdigest()}"
    assert max(unseen) < header
    assert not unseen & {0, 1, 2}  # what makes it a gzip file


def test_archive_with_a_tail_is_refused(binary_tar: Path, tmp_path: Path) -> None:
    whole = binary_tar.read_bytes()
    binary_tar.write_bytes(whole + b"more")
    assert "is not a whole tar.gz" in refusal(binary_tar, tmp_path)
    binary_tar.write_bytes(whole + gzip.compress(bytes(1 << 24), 1))
    assert "unpacks to more than CIFAR-10 has" in refusal(binary_tar, tmp_path)


HOSTILE = {
    "symlink": member("data_batch_1.bin", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("readme.html", type=tarfile.LNKTYPE, linkname="data_batch_1.bin"),
    "fifo": member("fifo", type=tarfile.FIFOTYPE),
    "device": member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "dots": member("cifar-10-batches-bin/../../readme.html", b"x"),
    "dots in a folder's name": member("../up", type=tarfile.DIRTYPE),
    "absolute": member("/etc/data_batch_1.bin", b"x"),
    "sparse": member("data_batch_1.bin", bytes(512), type=tarfile.GNUTYPE_SPARSE),
    "long and absolute": member("/" + "deep/" * 100, b"x"),
}


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_member(kind: str, where: str, tmp_path: Path, records: Batches) -> None:
    entries = members(records)
    entries.insert(0 if where == "first" else len(entries), HOSTILE[kind])
    message = refusal(write_tar(tmp_path / "c.tar.gz", entries, format=tarfile.GNU_FORMAT), tmp_path)
    assert "a link, a device or a path outside; it is not read" in message
    assert [path.name for path in tmp_path.iterdir()] == ["c.tar.gz"]


@pytest.mark.parametrize("name", ["data_batch_1.bin", "elsewhere/data_batch_1.bin", "data_batch_1"])
def test_a_batch_twice(name: str, tmp_path: Path, records: Batches) -> None:
    entries = [*members(records), member(name, records["data_batch_2"].tobytes())]
    assert "holds data_batch_1 twice" in refusal(write_tar(tmp_path / "c.tar.gz", entries), tmp_path)


def test_bombs_stop_early(tmp_path: Path, records: Batches) -> None:
    """Small archives that ask for 256 MB as a batch, as a file beside them, as a header, or for a million members."""
    large = bytes(1 << 28)
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, len(large)
    bombs = {
        "more than any CIFAR-10 batch": [member("data_batch_1.bin", large)],
        "unpacks to more than CIFAR-10 has": [member("readme.html", large)],
        "unpacks to more": [(header, large)],
        "holds over 100 members": (member(f"{k}") for k in range(2000)),
    }
    for complaint, entries in bombs.items():
        path = write_tar(tmp_path / "bomb.tar.gz", entries)
        with memory_below(1 << 24):
            assert complaint in refusal(path, tmp_path)


def test_a_chain_of_headers(tmp_path: Path) -> None:
    """Each extended header makes tarfile look for the next by calling itself."""
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    path = tmp_path / "chain.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf() * 1900))
    refusal(path, tmp_path)


# --- pickled batches


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_python_2_and_3(protocol: int, order: Literal["C", "F"]) -> None:
    batch = make_records()["data_batch_1"]
    content = pickled(batch, protocol=protocol, order=order)
    assert cifar_pickle.to_binary_layout(content, NUM) == batch.tobytes()
    honest = pickle.loads(content, encoding="bytes")  # and it is a pickle as numpy reads it
    key = bytes if protocol == 2 else str
    assert {type(name) for name in honest} == {key}
    assert np.array_equal(honest[b"data" if protocol == 2 else "data"], batch[:, 1:])


class Runs:
    """A pickle that makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_code_does_not(protocol: int, tmp_path: Path, records: Batches) -> None:
    marker = tmp_path / "marker"
    content = pickle.dumps({"data": Runs(marker), "labels": []}, protocol)
    folder = write_folder(tmp_path / cifar.PYTHON, records, python=True)
    (folder / "data_batch_5").write_bytes(content)
    entries = [member("data_batch_5", content), *members(records, python=True)]
    for path in (folder, write_tar(tmp_path / "c.tar.gz", entries)):
        assert "data_batch_5 is not a pickled CIFAR-10 batch: it " in refusal(path, tmp_path)
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()  # it would have


@pytest.mark.parametrize(
    "name",
    [
        b"builtins\neval", b"os\nsystem", b"numpy\nload", b"numpy\nfromfile", b"numpy.core.multiarray\nfromfile",
        b"numpy\nndarray.tofile", b"numpy.core.multiarray\n_reconstruct.__globals__", b"_codecs\nencode",
        b"fastres.data.cifar_pickle\npickle",
    ],
)  # fmt: skip
def test_only_three_names_are_known(name: bytes) -> None:
    with pytest.raises(ValueError, match="which no CIFAR-10 batch does"):
        cifar_pickle.to_binary_layout(b"\x80\x02c" + name + b"\n.", NUM)


RECONSTRUCT, DTYPE = b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\ndtype\n"
BOMBS = {
    "memo index": b"\x80\x02Kar\xff\xff\xff\x7f.",  # an unpickler would make room for 4 billion entries
    "byte array": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "long bytes": b"\x80\x04B" + struct.pack("<I", 0xFFFFFFFF) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"K\x00.",
    "empty dicts": b"\x80\x02" + b"}" * 1_000_000 + b".",
    "marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "numbers": b"\x80\x02(" + b"K\x00" * 1_000_000 + b"t.",
    "nested tuples as a key": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x00s.",  # their hash would end the stack
    "an array's shape": b"\x80\x02" + RECONSTRUCT + b"J\xff\xff\xff\x7f\x85R.",
    "a wide type": b"\x80\x02" + DTYPE + b"U\x0aV999999999\x85R.",
    "a shape without bytes": b"\x80\x02" + RECONSTRUCT + b")R(K\x01J\xff\xff\xff\x7fK\x02\x86" + DTYPE
    + b"U\x02u1\x85R\x89U\x00tb.",
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_pickles_that_ask_for_memory(kind: str) -> None:
    with memory_below(1 << 25), pytest.raises(ValueError, match=r"."):
        cifar_pickle.to_binary_layout(BOMBS[kind], NUM)


@pytest.mark.parametrize("name", [RECONSTRUCT, DTYPE, b"cnumpy\nndarray\n"])
def test_a_pickle_cannot_change_the_stand_ins(name: bytes) -> None:
    for state in (b"}U\x04evilK\x01s", b"N}U\x04evilK\x01s\x86"):
        for made in (b"", b"U\x02u1\x85R"):
            with pytest.raises(ValueError, match=r"."):
                cifar_pickle.to_binary_layout(b"\x80\x02" + name + made + state + b"b.", NUM)
    assert not hasattr(cifar_pickle._Array, "evil")
    assert not hasattr(cifar_pickle._UInt8, "evil")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"labels": [0] * 9 + [256]}, "a label that is not from 0 to 9"),
        ({"labels": [0] * 9 + [-1]}, "a label that is not from 0 to 9"),
        ({"labels": [0] * 9}, "not a list of 10 integers"),
        ({"labels": [0] * 9 + ["1"]}, "not a list of 10 integers"),
        ({"labels": bytes(10)}, "not a list of 10 integers"),
        ({"data": np.zeros((9, 3072), np.uint8)}, "not a 10 x 3,072 array of uint8"),
        ({"data": np.zeros((3072, 10), np.uint8)}, "not a 10 x 3,072 array"),
        ({"data": np.zeros((10, 3072), np.int8)}, "not uint8"),
        ({"data": np.zeros(2, "V1000")}, "not uint8"),
        ({"data": bytes(30720)}, "not a 10 x 3,072 array"),
    ],
)
def test_pickles_of_something_else(fields: dict[str, object], complaint: str) -> None:
    batch: dict[str, object] = {"data": np.zeros((10, 3072), np.uint8), "labels": [0] * 10}
    with pytest.raises(ValueError, match=complaint):
        cifar_pickle.to_binary_layout(pickle.dumps(batch | fields, 4), NUM)


# --- rubbish: nothing but the documented error comes out

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PICKLE_CODES = st.sampled_from([bytes([code]) for code in b"}]()tabesuUTKMJqrhcR\x80\x02\x85\x86\x87\x88\x89N."])


@FUZZ
@given(st.one_of(st.binary(max_size=400), st.lists(st.one_of(PICKLE_CODES, st.binary(max_size=3))).map(b"".join)))
@example(b"].")
@example(b"}.")
def test_rubbish_is_no_pickle(content: bytes) -> None:
    for start in (b"", b"\x80\x02"):
        with pytest.raises(ValueError, match=r"."):
            cifar_pickle.to_binary_layout(start + content, NUM)


HONEST = pickled(make_records(1)["data_batch_1"])
HEAD = HONEST.index(b"T" + struct.pack("<i", 3072))


@FUZZ
@given(st.data())
def test_a_changed_pickle_is_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(HONEST)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, HEAD + 5))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        assert len(cifar_pickle.to_binary_layout(bytes(content), 1)) == 3073


@FUZZ
@given(data=st.data())
def test_a_changed_archive_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    entries = members(make_records())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=data.draw(st.sampled_from([0, 1, 2]))) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    raw = bytearray(buffer.getvalue())
    heads = [0, 512, 1024, 1536]
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.sampled_from(heads)) + data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
    for head in heads:  # with the checksum put right, or nothing else is looked at
        raw[head + 148 : head + 156] = b"        "
        raw[head + 148 : head + 156] = b"%06o\0 " % sum(raw[head : head + 512])
    path = tmp_path / "c.tar.gz"
    path.write_bytes(gzip.compress(bytes(raw), 1))
    with contextlib.suppress(InputError):
        assert len(load_cifar10(path, say=Say().append).test_labels) == NUM


@FUZZ
@given(content=st.binary(max_size=2000))
@example(content=b"")
@example(content=b"<html>not found</html>")
@example(content=bytes(9999))
def test_rubbish_is_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    for whole in (content, gzip.compress(content, 1), b"\x1f\x8b\x08\x00" + content):
        path.write_bytes(whole)
        refusal(tmp_path, tmp_path)


# --- full size


@pytest.fixture
def full_size(monkeypatch: Patch) -> None:
    monkeypatch.setattr(cifar, "IMAGES_PER_BATCH", FULL)


def test_full_size_folder_in_little_memory(full_size: None, tmp_path: Path) -> None:
    (tmp_path / cifar.BINARY).mkdir()
    for k, name in enumerate(BATCHES):
        path = tmp_path / cifar.BINARY / f"{name}.bin"
        path.write_bytes(bytes([k]))
        os.truncate(path, 30_730_000)
    with memory_below(1.4 * 60_000 * 3073):  # the images, a batch, and one that is on its way
        images = load_cifar10(tmp_path, say=Say().append)
    assert images.train_images.shape == (50_000, 32, 32, 3)
    assert images.test_images.shape == (10_000, 32, 32, 3)
    assert images.train_labels[::10_000].tolist() == [0, 1, 2, 3, 4]
    assert images.test_labels[0] == 5


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_full_size_pickles_pass_the_fences(full_size: None, protocol: int) -> None:
    batch = np.zeros((FULL, 3073), np.uint8)
    batch[:, 0] = np.arange(FULL) % 10
    batch[:, 1:] = np.arange(FULL)[:, None] % 256
    content = pickled(batch, protocol=protocol)
    assert len(content) < cifar.MAX_PICKLE_BYTES
    assert cifar._unpickled(content, Path("data_batch_1")) == batch.tobytes()


def test_full_size_archive(full_size: None, tmp_path: Path) -> None:
    batches = {name: np.full((FULL, 3073), k, np.uint8) for k, name in enumerate(BATCHES)}
    images = load_cifar10(write_tar(tmp_path / "c.tar.gz", members(batches)), say=Say().append)
    assert images.digest == f"sha256:{hashlib.sha256(b''.join(map(bytes, batches.values()))).hexdigest()}"
