"""The loaders execute one plan: resident and DALI are equal to a slow, obvious reference and to each other."""

import contextlib
import dataclasses
import gc
import importlib.util
import json
import multiprocessing
import pickle
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import fastres
from fastres.build import build_loaders
from fastres.config import make_config
from fastres.data import dali, deviceplan, table, torchvision
from fastres.data.dali import DaliLoader, dali_available
from fastres.data.deviceplan import DevicePlan
from fastres.data.imageset import ImageSet
from fastres.data.pixels import SCALE
from fastres.data.plan import EpochPlan
from fastres.data.resident import ResidentLoader, evaluation_batches
from fastres.data.table import TableLoader
from fastres.data.torchvision import TorchvisionLoader
from fastres.errors import MachineError
from fastres.runtime import Runtime, prepare
from tests.fakecuda import FakeCuda, FakeStream, Recorded
from tests.runs import tiny
from tests.test_step import one_thread  # noqa: F401 (a fixture for the whole file)

CPU, NUM, BATCH = torch.device("cpu"), 50, 16
STEPS = 3 * NUM // BATCH + 2  # over three epochs; 16 does not divide 50, so batches straddle their edges
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_dali = pytest.mark.skipif(not dali_available(), reason="DALI is not installed here")
# Python 3.12 and later warn of any fork beside threads; worker processes are how people load data.
forks = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning",
    "ignore:This DataLoader will create 2 worker processes",  # where the tests have one core
)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (NUM + 7, 32, 32, 3), np.uint8)
    labels = chance.integers(0, 10, NUM + 7).astype(np.uint8)
    names = tuple("abcdefghij")
    return ImageSet(pixels[:NUM], labels[:NUM], pixels[NUM:], labels[NUM:], names, "random", "sha256:0", True, "here")


def reference(images: ImageSet, seed: int, step: int, dtype: torch.dtype, *, augment: bool = True) -> Tensor:
    """`inside ? (float32(u8[source]) - mean[source]) * SCALE : 0`, cast once; pixel by pixel."""
    mean = images.train_images.astype(np.float64).mean(axis=0).astype(np.float32)
    samples = EpochPlan(seed, NUM, augment=augment).at(step * BATCH, BATCH)
    batch = np.zeros((BATCH, 32, 32, 3), np.float32)
    for b in range(BATCH):
        image, dy, dx = samples.index[b], int(samples.dy[b]), int(samples.dx[b])
        for y in range(32):
            for x in range(32):
                from_y, from_x = y + dy - 4, (31 - x if samples.flip[b] else x) + dx - 4
                if 0 <= from_y < 32 and 0 <= from_x < 32:
                    value = np.float32(images.train_images[image, from_y, from_x]) - mean[from_y, from_x]
                    batch[b, y, x] = value * np.float32(SCALE)
    return torch.from_numpy(batch).permute(0, 3, 1, 2).to(dtype)


@pytest.fixture(scope="module")
def references(images: ImageSet) -> list[Tensor]:
    return [reference(images, 1, step, torch.float32) for step in range(STEPS)]


def make(kind: type, images: ImageSet, *, seed: int = 1, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    plan = EpochPlan(seed, NUM, augment=how.pop("augment", True))
    how = {"mean": images.mean_image(), "batch_size": BATCH, "device": CPU, "dtype": dtype, **how}
    return kind(images, plan, **how)


def take(loader: Any, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, as a training step asks for it."""
    loader.prepare(step)
    batch: tuple[Tensor, Tensor] = loader.load(torch.tensor([step]))
    return batch


def labels_of(images: ImageSet, step: int) -> Tensor:
    return torch.from_numpy(images.train_labels[EpochPlan(1, NUM).at(step * BATCH, BATCH).index].astype(np.int64))


EXACT = [
    (TableLoader, {}),
    (ResidentLoader, {}),
    pytest.param(ResidentLoader, {"compiled": True}, marks=pytest.mark.timeout(300)),
    pytest.param(DaliLoader, {"num_threads": 1, "steps_per_run": 1}, marks=needs_dali),
    pytest.param(DaliLoader, {"num_threads": 2, "steps_per_run": 3}, marks=needs_dali),
    pytest.param(DaliLoader, {"num_threads": 4, "steps_per_run": 64}, marks=needs_dali),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "how"), EXACT)
def test_equal_to_the_reference_over_three_epochs(
    images: ImageSet, references: list[Tensor], kind: type, how: dict[str, Any], dtype: torch.dtype
) -> None:
    loader = make(kind, images, dtype=dtype, **how)
    for step, expected in enumerate(references):
        batch, labels = take(loader, step)
        assert batch.dtype == dtype
        assert torch.equal(batch, expected.to(dtype)), step
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
        assert torch.equal(labels, labels_of(images, step))
    loader.close()
    loader.close()


@needs_dali
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dali_is_resident(images: ImageSet, dtype: torch.dtype) -> None:
    ours, theirs = make(DaliLoader, images, dtype=dtype), make(TableLoader, images, dtype=dtype)
    for step in range(STEPS):
        for a, b in zip(take(ours, step), take(theirs, step), strict=True):
            assert torch.equal(a, b)
    ours.close()


@needs_dali
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_any_prefetch_depth_is_the_same(
    images: ImageSet, references: list[Tensor], monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setattr(dali, "RUNS_AHEAD", ahead)
    loader = make(DaliLoader, images, steps_per_run=2)
    for step, expected in enumerate(references):
        assert torch.equal(take(loader, step)[0], expected), step
    loader.close()


@pytest.mark.parametrize(("kind", "how"), EXACT)
def test_any_step_may_be_asked_for(images: ImageSet, references: list[Tensor], kind: type, how: dict[str, Any]) -> None:
    loader = make(kind, images, **how)
    for step in (7, 8, 2, 2, 6, 7, 8, 6, 10, 0, 1, 5):  # the second 6 where DALI's ring, of four runs, has had a 10
        batch, labels = take(loader, step)
        assert torch.equal(batch, references[step]), step
        assert torch.equal(labels, labels_of(images, step))
    loader.close()


@pytest.mark.parametrize("kind", [TableLoader, ResidentLoader, pytest.param(DaliLoader, marks=needs_dali)])
def test_loaders_of_several_plans_are_each_what_it_is_alone(images: ImageSet, kind: type) -> None:
    others = [EpochPlan(seed, NUM) for seed in (2, 5)]
    if kind is DaliLoader:
        shared = make(DaliLoader, images, others=others).seats()
    else:
        first = make(kind, images)
        shared = [first, *map(first.sharing, others)]
    alone = [make(TableLoader, images, seed=seed) for seed in (1, 2, 5)]
    for step in range(STEPS):
        for ours, theirs in zip(shared, alone, strict=True):
            for got, wanted in zip(take(ours, step), take(theirs, step), strict=True):
                assert torch.equal(got, wanted)
    for loader in shared:
        loader.close()


@needs_dali
def test_dali_makes_many_steps_in_a_run_and_works_ahead(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take_run = DaliLoader._take

    def counted(self: DaliLoader) -> Tensor:
        taken.append(self._asked[0])
        return take_run(self)

    monkeypatch.setattr(DaliLoader, "_take", counted)
    loader = make(DaliLoader, images, steps_per_run=3)
    for step in range(9):
        take(loader, step)
        assert taken == list(range(step // 3 + 3))  # its own and the two after it
        assert loader._asked == [step // 3 + 3]  # under way meanwhile
    loader.close()
    assert taken == list(range(6))  # nothing reads the data any longer
    for frames, num_others, steps in ((BATCH * 4, 0, 4), (BATCH * 4, 1, 2), (BATCH - 1, 0, 1)):
        monkeypatch.setattr(dali, "FRAMES_PER_RUN", frames)
        loader = make(DaliLoader, images, others=[EpochPlan(2, NUM)] * num_others, num_threads=3)
        assert (loader.steps_per_run, loader._pipeline.num_threads) == (steps, 3)
        loader.close()


@needs_dali
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc: threads cannot be counted")
def test_dali_ends_its_threads(images: ImageSet) -> None:
    def threads() -> int:
        return sum(1 for _ in Path("/proc/self/task").iterdir())

    gc.collect()  # pipelines of tests before
    first = make(DaliLoader, images)  # some of DALI's threads are the library's, and stay
    take(first, 0)
    first.close()
    before = threads()
    loader = make(DaliLoader, images, num_threads=4)
    take(loader, 0)
    assert threads() > before
    loader.close()
    assert threads() <= before


@pytest.mark.parametrize(("kind", "how"), EXACT)
def test_a_batch_is_not_overwritten_by_later_ones(
    images: ImageSet, references: list[Tensor], kind: type, how: dict[str, Any]
) -> None:
    loader = make(kind, images, **how)
    kept = [take(loader, step)[0] for step in range(STEPS)]
    assert all(torch.equal(batch, expected) for batch, expected in zip(kept, references, strict=True))
    loader.close()


@pytest.mark.parametrize("chunk", [16, 25, 49])
def test_the_table_is_filled_piece_by_piece(
    images: ImageSet, references: list[Tensor], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(table, "CHUNK", chunk)
    loader = make(TableLoader, images)
    assert all(torch.equal(take(loader, step)[0], references[step]) for step in range(4))


@forks
@pytest.mark.parametrize(
    "kind", [TableLoader, ResidentLoader, pytest.param(DaliLoader, marks=needs_dali), TorchvisionLoader]
)
def test_layout_mean_and_augmentation_are_as_asked(images: ImageSet, kind: type) -> None:
    mean = np.full((32, 32, 3), 100, np.float32)
    loader = make(kind, images, augment=False, channels_last=False, mean=mean)
    batch, _ = take(loader, 0)
    index = EpochPlan(1, NUM).at(0, BATCH).index
    expected = (images.train_images[index].astype(np.float32) - 100) / 64
    assert batch.is_contiguous()
    assert torch.equal(batch, torch.from_numpy(expected).permute(0, 3, 1, 2))
    loader.close()


@needs_dali
def test_two_pipelines_do_not_share_anything(images: ImageSet) -> None:
    one, other = make(DaliLoader, images, seed=1), make(DaliLoader, images, seed=2)
    for step in range(4):
        for loader, seed in ((one, 1), (other, 2)):
            resident = make(ResidentLoader, images, seed=seed)
            assert torch.equal(take(loader, step)[0], take(resident, step)[0])
    one.close()
    other.close()


def test_dali_is_looked_for_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(name: str) -> None:
        return None

    def find_no_namespace(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name.partition('.')[0]!r}")

    monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
    assert not dali_available()
    monkeypatch.setattr(importlib.util, "find_spec", find_no_namespace)  # not even another of NVIDIA's packages
    assert not dali_available()


@needs_dali
def test_a_dali_whose_first_kernel_fails_does_not_start(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one without kernels for this GPU: it is built, and fails when it runs."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Critical error in pipeline:\n... encountered:\n\ncudaErrorNoKernelImageForDevice (209)")

    dali.check_starts(CPU)
    monkeypatch.setattr("nvidia.dali.Pipeline.outputs", fails)
    with pytest.raises(MachineError, match="cudaErrorNoKernelImageForDevice"):
        dali.check_starts(CPU)
    config = make_config("smoke", execution={"device": "cpu", "threads": 1})
    runtime = prepare(config.execution)
    monkeypatch.setattr("fastres.build.loader_kind", lambda *_: "dali")  # as "auto" is on a GPU
    for where in ("outputs", "schedule_run", "feed_input"):
        said: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(f"nvidia.dali.Pipeline.{where}", fails)
            (loader,) = build_loaders([config], images, images.mean_image(), runtime, said.append)
        assert loader.name == "resident"
        assert re.match("taking the resident loader: DALI .*: cudaErrorNoKernelImage", said[0])


@needs_dali
@pytest.mark.parametrize("at", [0, 1])
def test_a_signal_while_dali_is_fed_ends_in_that_signal(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    loader = make(DaliLoader, images, steps_per_run=1)
    loader.prepare(0)
    feed, left = loader._feed, [at]

    def interrupted(name: str, tensor: Tensor) -> None:
        if not left.pop():
            raise KeyboardInterrupt
        left.append(0)
        feed(name, tensor)

    monkeypatch.setattr(loader, "_feed", interrupted)
    with contextlib.closing(loader):
        with pytest.raises(KeyboardInterrupt):
            loader.prepare(1)
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="make another loader"):  # what was fed would be taken for another run
            loader.prepare(5)
    assert loader._pipeline is None


@needs_dali
def test_a_signal_before_dali_was_told_to_make_anything(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make(DaliLoader, images, steps_per_run=1)
    loader._ask(0)  # it needs one more before it begins
    loader.close()
    assert loader._pipeline is None


def test_a_run_of_dali_has_no_more_frames_than_a_gpu_takes(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "dali_available", lambda: True)
    with pytest.raises(MachineError, match=r"at most 65,535 images at once, and these need 65,536 \(--graph-steps 64"):
        make(DaliLoader, images, batch_size=1024, ahead=64, device=torch.device("cuda"))
    others = [EpochPlan(seed, NUM) for seed in (2, 3, 4)]
    with pytest.raises(MachineError, match=r"need 65,536 \(--graph-steps 16, 4 of 1,024\)"):
        make(DaliLoader, images, batch_size=1024, ahead=16, others=others, device=torch.device("cuda"))


def test_dali_that_is_not_there_says_what_to_do(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "dali_available", lambda: False)
    with pytest.raises(MachineError, match=r"pip install nvidia-dali-cuda120, or use --loader resident"):
        make(DaliLoader, images)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_evaluation_is_one_plain_view_of_each_image(images: ImageSet, batch_size: int) -> None:
    mean = images.mean_image()
    batches = evaluation_batches(
        images.test_images, images.test_labels, mean, batch_size=batch_size, device=CPU, dtype=torch.bfloat16
    )
    seen, labels = zip(*batches, strict=True)
    expected = torch.from_numpy((images.test_images.astype(np.float32) - mean) / 64).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat(seen), expected.to(torch.bfloat16))
    assert torch.cat(labels).tolist() == images.test_labels.tolist()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_evaluation_in_the_other_layout(images: ImageSet) -> None:
    mean, shown, labels = images.mean_image(), images.test_images, images.test_labels
    how: dict[str, Any] = {"batch_size": 4, "device": CPU, "dtype": torch.float32}
    batches = evaluation_batches(shown, labels, mean, channels_last=False, **how)
    for (batch, _), start in zip(batches, (0, 4), strict=True):
        expected = (shown[start : start + 4].astype(np.float32) - mean) / 64
        assert batch.is_contiguous()
        assert torch.equal(batch, torch.from_numpy(expected).permute(0, 3, 1, 2))


# --- torchvision: the same order and pixels, its own dice


def crops_of(image: npt.NDArray[np.uint8], mean: npt.NDArray[np.float32]) -> dict[bytes, tuple[int, int, bool]]:
    """All 162 crops of an image, as bytes."""
    padded = np.pad((image.astype(np.float32) - mean) / 64, ((4, 4), (4, 4), (0, 0)))
    found = {}
    for dy in range(9):
        for dx in range(9):
            crop = padded[dy : dy + 32, dx : dx + 32]
            found[crop.tobytes()], found[crop[:, ::-1].tobytes()] = (dy, dx, False), (dy, dx, True)
    return found


@pytest.fixture
def torchvision_loader(images: ImageSet) -> Iterator[Callable[..., TorchvisionLoader]]:
    made: list[TorchvisionLoader] = []

    def start(**how: Any) -> TorchvisionLoader:
        made.append(make(TorchvisionLoader, images, **how))
        return made[-1]

    yield start
    for loader in made:
        loader.close()


@forks
def test_torchvision_gives_each_image_once_an_epoch_in_a_true_crop(
    images: ImageSet, torchvision_loader: Callable[..., TorchvisionLoader]
) -> None:
    loader, mean = torchvision_loader(), images.mean_image()
    dice = set()
    for step in range(7):
        batch, labels = take(loader, step)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, labels_of(images, step))
        for pixels, index in zip(batch, EpochPlan(1, NUM).at(step * BATCH, BATCH).index, strict=True):
            crops = crops_of(images.train_images[index], mean)
            dice.add(crops[pixels.permute(1, 2, 0).contiguous().numpy().tobytes()])
    assert len(dice) > 60  # of 112 draws from 162
    dy, dx, flip = zip(*dice, strict=True)
    assert set(dy) == set(dx) == set(range(9))
    assert 0.3 < np.mean(flip) < 0.7


@forks
@pytest.mark.parametrize("num_workers", [1, 2])
def test_torchvision_resumes_and_counts_no_workers(
    torchvision_loader: Callable[..., TorchvisionLoader], num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[int] = []
    start = TorchvisionLoader._start

    def counted(self: TorchvisionLoader, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        starts.append(step)
        return start(self, step)

    monkeypatch.setattr(TorchvisionLoader, "_start", counted)
    whole, resumed = torchvision_loader(), torchvision_loader(num_workers=num_workers)
    batches = [take(whole, step)[0] for step in range(6)]
    for step in (3, 3, 4, 5, 1):
        assert torch.equal(take(resumed, step)[0], batches[step])
    assert starts == [0, 3, 1]  # workers live on from step to step
    assert not torch.equal(take(torchvision_loader(seed=2), 0)[0], batches[0])


@forks
def test_torchvision_leaves_this_process_alone(torchvision_loader: Callable[..., TorchvisionLoader]) -> None:
    state, before = torch.get_rng_state(), len(multiprocessing.active_children())
    loader = torchvision_loader(dtype=torch.bfloat16, augment=False, num_workers=2)
    assert take(loader, 0)[0].dtype == torch.bfloat16
    assert len(multiprocessing.active_children()) == before + 2
    assert loader.prefetched == 2 * torchvision.PREFETCH_FACTOR
    loader.close()
    loader.close()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(multiprocessing.active_children()) == before


@pytest.mark.parametrize("num_workers", [-1, 0])
def test_torchvision_has_workers(images: ImageSet, num_workers: int) -> None:
    with pytest.raises(ValueError, match=f"num_workers is {num_workers}; it must be at least 1"):
        make(TorchvisionLoader, images, num_workers=num_workers)


def test_torchvision_draws_by_seed_and_position(images: ImageSet) -> None:
    with torch.random.fork_rng(devices=[]):
        views = {}
        for seed in (1, 2):
            dataset = make(TorchvisionLoader, images, seed=seed)._dataset
            for position in range(20):
                views[seed, position] = dataset[position, 0][0].numpy().tobytes()
    assert len(set(views.values())) > 25  # of 40 draws from 162


def test_torchvision_can_send_its_images_to_workers_that_are_no_forks(images: ImageSet) -> None:
    """As on macOS and from Python 3.14 on: by pickle. Such workers take seconds to start, so none is started here."""
    with torch.random.fork_rng(devices=[]):
        dataset = make(TorchvisionLoader, images)._dataset
        there = pickle.loads(pickle.dumps(dataset))
        for key in ((0, 3), (1, 3), (10**12, 49)):
            (image, label), (expected, expected_label) = there[key], dataset[key]
            assert torch.equal(image, expected)
            assert label == expected_label


@needs_dali
@forks
@pytest.mark.timeout(60)
def test_torchvision_workers_outlive_a_forgotten_pipeline(
    images: ImageSet, torchvision_loader: Callable[..., TorchvisionLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that collected it would wait for ever for DALI's threads, which a fork does not have."""
    get = torchvision._Images.__getitem__

    def collecting(self: torchvision._Images, key: tuple[int, int]) -> tuple[Tensor, int]:
        if key[0] % BATCH == 0:
            gc.collect()
        return get(self, key)

    monkeypatch.setattr(torchvision._Images, "__getitem__", collecting)
    forgotten = make(DaliLoader, images)
    take(forgotten, 0)
    forgotten.itself = forgotten  # garbage that only the collector finds, as after an exception
    del forgotten
    assert len(take(torchvision_loader(), 0)[1]) == BATCH


# --- steps that are prepared before they are launched, as a graph of several steps has it


@pytest.mark.parametrize(("kind", "how"), EXACT)
@pytest.mark.parametrize("ahead", [1, 3])
def test_steps_may_be_prepared_before_the_first_is_loaded(
    images: ImageSet, references: list[Tensor], kind: type, how: dict[str, Any], ahead: int
) -> None:
    """A loader that reuses a place too early would hand out a later step's batch."""
    if ahead > how.get("steps_per_run", ahead):
        pytest.skip("no more than a run's steps")
    loader = make(kind, images, **how)
    for first in range(0, STEPS - ahead + 1, ahead):
        for step in range(first, first + ahead):
            loader.prepare(step)
        for step in range(first, first + ahead):
            batch, labels = loader.load(torch.tensor([step]))
            assert torch.equal(batch, references[step]), step
            assert torch.equal(labels, labels_of(images, step))
    loader.close()


@needs_dali
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_graph_of_more_steps_than_a_run_would_have(images: ImageSet, first: int) -> None:
    """All its steps are prepared before the first is launched; runs shorter than that would overtake the reader."""
    ours, theirs = make(DaliLoader, images, ahead=9, steps_per_run=2, num_threads=1), make(TableLoader, images)
    for start in range(first, first + 45, 9):
        for step in range(start, start + 9):
            ours.prepare(step)
        for step in range(start, start + 9):
            counter = torch.tensor([step])
            assert torch.equal(ours.load(counter)[0], theirs.load(counter)[0]), step
    ours.close()
    config = make_config(execution={"loader": "dali", "graph_steps": 7, "device": "cpu", "threads": 1})
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, batch_size=2_048))
    (built,) = build_loaders([config], images, images.mean_image(), Runtime(CPU, "fp32", threads=1))
    assert built._loader.steps_per_run == built.period == 7  # type: ignore[attr-defined]
    built.close()


def test_the_device_plan_moves_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deviceplan, "CHUNK", 4)
    plan = EpochPlan(3, NUM)
    ours = DevicePlan(plan, BATCH, CPU)
    for launch in (*([step] for step in (*range(30), 7, 1000, 1001, 0)), *(range(n, n + 4) for n in range(2, 30, 4))):
        for step in launch:
            ours.prepare(step)
        for step in launch:
            index, dy, dx, flip = deviceplan.decode(deviceplan.look_up(ours.codes, torch.tensor([step])))
            expected = plan.at(step * BATCH, BATCH)
            for got, wanted in ((index, expected.index), (dy, expected.dy), (dx, expected.dx), (flip, expected.flip)):
                assert got.tolist() == wanted.tolist()
    with pytest.raises(ValueError, match="at most"):
        DevicePlan(EpochPlan(0, 2**20 + 1), 1, CPU)


@needs_dali
@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_the_ring_holds_for_slow_and_fast_consumers(images: ImageSet, references: list[Tensor], pause: float) -> None:
    """A batch stays what it is until the next run is entered, whatever DALI does meanwhile."""
    loader = make(DaliLoader, images, steps_per_run=2)
    for step, expected in enumerate(references):
        loader.prepare(step)
        time.sleep(pause)
        assert torch.equal(loader.load(torch.tensor([step]))[0], expected), step
    loader.close()


@needs_dali
@pytest.mark.parametrize("ahead", [1, 2])
def test_the_ring_is_ordered_by_events(images: ImageSet, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """As on a GPU, with streams that keep account: no slot is filled before it was read, nor read before filled."""
    loader = make(DaliLoader, images, steps_per_run=2, ahead=ahead)
    cuda, side, outputs = FakeCuda(monkeypatch), FakeStream(), loader._pipeline.outputs
    training, loader._side = cuda.current, side
    taken: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(pipeline, name)

        def outputs(self, cuda_stream: int) -> Any:
            assert cuda_stream == side.cuda_stream
            run = len(taken)
            places = (2 * (run - dali.RING_RUNS), 2 * (run - dali.RING_RUNS) + 1)  # the steps whose place it takes
            assert run < dali.RING_RUNS or side.before >= {("step", step) for step in places}
            taken.append(run)
            side.before.add(("run", run))
            return outputs()

    pipeline, loader._pipeline = loader._pipeline, Watched()
    for start in range(0, 20, ahead):
        for step in range(start, start + ahead):
            loader.prepare(step)
        for step in range(start, start + ahead):  # one launch
            assert ("run", step // 2) in training.before
            training.before.add(("step", step))
    assert len(taken) > 2 * dali.RING_RUNS
    loader.close()


@needs_dali
def test_dalis_buffers_are_held_until_their_copy_is_done(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI writes a later run into a buffer that was let go, and knows nothing of the stream that copies."""
    loader = make(DaliLoader, images, steps_per_run=2)
    cuda, outputs = FakeCuda(monkeypatch), loader._pipeline.outputs
    loader._side = FakeStream()

    class OnNoStream:
        def __getattr__(self, name: str) -> Any:
            return getattr(pipeline, name)

        def outputs(self, cuda_stream: int) -> Any:
            assert cuda_stream == FakeStream.cuda_stream
            return outputs()

    pipeline, loader._pipeline = loader._pipeline, OnNoStream()
    for step in range(0, 12, 2):
        loader.prepare(step)
        cuda.current.before.add(("step", step))
    assert len(loader._held) == 6 + 2  # a run for each, and two ahead: the device has done nothing yet
    events = [event for event, _ in loader._held]
    for event in events[:3]:
        assert isinstance(event, Recorded)
        event.done = True
    loader.prepare(12)
    assert [event for event, _ in loader._held][:-1] == events[3:]
    loader.close()
    assert not loader._held


@needs_dali
def test_a_compiled_ring_gives_the_same_batches(images: ImageSet, references: list[Tensor]) -> None:
    loaders = [make(DaliLoader, images, steps_per_run=2, compiled=compiled) for compiled in (False, True)]
    for step in range(5):
        for loader in loaders:
            loader.prepare(step)
        (batch, labels), (other, others) = (loader.load(torch.tensor([step])) for loader in loaders)
        assert torch.equal(batch, references[step])
        assert torch.equal(batch, other)
        assert torch.equal(labels, others)
        assert batch.stride() == other.stride()
    for loader in loaders:
        loader.close()


@needs_dali
@pytest.mark.parametrize(
    ("broken", "raised", "said"),
    [
        (ImportError("libdali.so: undefined symbol"), MachineError, r"does not start: libdali\.so.*--loader resident"),
        (RuntimeError("cudaErrorMemoryAllocation (2):\nout of memory"), RuntimeError, "out of memory"),
    ],
    ids=["half installed", "out of memory"],
)
def test_dali_that_does_not_start(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch, broken: Exception, raised: type[Exception], said: str
) -> None:
    def fails(*_: object) -> None:
        raise broken

    monkeypatch.setattr("fastres.data.dali._pipeline", fails)
    with pytest.raises(raised, match=said):
        make(DaliLoader, images)


@needs_dali
@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_a_pipeline_that_fails_is_an_error_and_no_hang(images: ImageSet, fails_at: int) -> None:
    loader = make(DaliLoader, images, steps_per_run=1)
    outputs, calls = loader._pipeline.outputs, []

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(pipeline, name)

        def outputs(self, **how: Any) -> Any:
            calls.append(1)
            if len(calls) > fails_at:
                raise RuntimeError("\n\nCritical error in pipeline:\nmore")
            return outputs(**how)

    pipeline = loader._pipeline
    loader._pipeline = Failing()

    def all_steps() -> None:
        for step in range(STEPS):
            take(loader, step)

    with pytest.raises(MachineError, match=r"DALI failed at its run \d: Critical error.*--loader resident"):
        all_steps()
    loader.close()
    assert len(calls) == fails_at + 1  # it is asked for nothing more


@needs_dali
def test_where_dali_does_not_start_the_resident_loader_takes_over(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError(
            "Error in GPU operator `nvidia.dali.fn.warp_affine`,\nwhich was used ...\n\nencountered:\n\nno kernel image"
        )

    monkeypatch.setattr("fastres.data.dali._pipeline", fails)
    monkeypatch.setattr("fastres.build.loader_kind", lambda *_: "dali")
    said: list[str] = []
    config = make_config(execution={"device": "cpu", "threads": 1})
    runtime = Runtime(CPU, "fp32", threads=1)
    (built,) = build_loaders([config], images, images.mean_image(), runtime, said.append)
    assert built.name == "resident"
    (line,) = said
    assert line.startswith("taking the resident loader: DALI does not start: no kernel image;")
    with pytest.raises(MachineError, match="no kernel image"):
        build_loaders([config], images, images.mean_image(), runtime)  # a benchmark would time something else
    by_name = dataclasses.replace(config, execution=dataclasses.replace(config.execution, loader="dali"))
    with pytest.raises(MachineError, match="no kernel image"):
        build_loaders([by_name], images, images.mean_image(), runtime, said.append)
    fastres.train(tiny(tmp_path / "run", recipe={"steps": 2}), verbosity="quiet")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["loader"] == "resident"
