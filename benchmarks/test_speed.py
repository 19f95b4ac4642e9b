"""How long the pieces of training take; the same code that `train` and `fastres bench` run.

    pytest benchmarks --benchmark-group-by=group

`scripts/bench-compare BASE` runs this file on two commits in turns. Batches are ResNet-20's 128 images, on the GPU
where there is one.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastres import checkpoint
from fastres.bench.cells import Cell
from fastres.bench.measure import Bench
from fastres.config import make_config
from fastres.data.dali import dali_available
from fastres.data.imageset import ImageSet
from fastres.data.plan import EpochPlan
from fastres.data.synthetic import make_synthetic
from fastres.runtime import synchronize

BATCH_SIZE = 128
LOADERS = [
    "resident",
    pytest.param("dali", marks=pytest.mark.skipif(not dali_available(), reason="DALI is not installed")),
    "torchvision",
]


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """As many training images as the built-in set has."""
    return make_synthetic()


def make_bench(images: ImageSet, loader: str) -> Bench:
    """ResNet-20 fed by a loader, warmed up."""
    config = make_config(data={"dataset": "synthetic"}, recipe={"batch_size": BATCH_SIZE}, execution={"loader": loader})
    return Bench(Cell(loader, config), images)


@pytest.fixture(scope="module")
def resident(images: ImageSet) -> Iterator[Bench]:
    """ResNet-20 fed by the resident loader, warmed up."""
    bench = make_bench(images, "resident")
    yield bench
    bench.close()


def timed(
    benchmark: BenchmarkFixture,
    function: Callable[[], object],
    *,
    num_images: int = 0,
    rounds: int = 15,
    setup: Callable[[], None] | None = None,
) -> None:
    """Time a function that leaves nothing running; images a second of its median go into the result."""
    benchmark.pedantic(function, setup=setup, rounds=rounds, iterations=1, warmup_rounds=2)  # type: ignore[no-untyped-call]
    if num_images and benchmark.stats:
        benchmark.extra_info["images_per_second"] = num_images / benchmark.stats["median"]


@pytest.mark.benchmark(group="plan")
def test_epoch_plan(benchmark: BenchmarkFixture) -> None:
    plan, position = EpochPlan(0, 50_000), 0

    def an_epoch() -> None:
        nonlocal position
        position += 50_000  # never the same epoch: its order would be at hand
        plan.at(position, 50_000)

    timed(benchmark, an_epoch, num_images=50_000)


@pytest.mark.benchmark(group="loader")
@pytest.mark.parametrize("name", LOADERS)
def test_loader(benchmark: BenchmarkFixture, images: ImageSet, name: str) -> None:
    bench = make_bench(images, name)
    loader, device, chunk = bench.replica.loader, bench.runtime.device, 16 if name == "torchvision" else 64
    counter, step = bench.replica.counter.clone(), bench.done

    def batches() -> None:
        nonlocal step
        for _ in range(chunk):
            loader.prepare(step)
            loader.load(counter.fill_(step))
            step += 1
        synchronize(device)

    try:
        timed(benchmark, batches, num_images=chunk * BATCH_SIZE)
    finally:
        bench.close()


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("part", ["forward", "forward and backward", "optimizer"])
def test_part(benchmark: BenchmarkFixture, resident: Bench, part: str) -> None:
    replica, device = resident.replica, resident.runtime.device
    replica.loader.prepare(resident.done)
    batch = replica.loader.load(replica.counter)

    def forward() -> None:
        replica.forward(*batch)
        synchronize(device)

    def forward_and_backward() -> None:
        replica.backward(replica.forward(*batch)[0])
        synchronize(device)

    def update() -> None:  # `train`'s own, which on a GPU is not the optimizer's; takes the gradients away
        replica.update()
        synchronize(device)

    if part == "forward":
        timed(benchmark, forward, num_images=BATCH_SIZE)
    elif part == "optimizer":
        timed(benchmark, update, setup=forward_and_backward)
    else:
        forward_and_backward()
        timed(benchmark, forward_and_backward, setup=update, num_images=BATCH_SIZE)
        update()


@pytest.mark.benchmark(group="step")
def test_whole_step(benchmark: BenchmarkFixture, resident: Bench) -> None:
    timed(benchmark, lambda: resident.timed(1), num_images=BATCH_SIZE)


@pytest.mark.benchmark(group="checkpoint")
@pytest.mark.parametrize("what", ["save", "load"])
def test_checkpoint(benchmark: BenchmarkFixture, resident: Bench, tmp_path: Path, what: str) -> None:
    tensors = dict(resident.replica.net.state_dict())
    tensors |= {f"momentum/{name}": torch.zeros_like(value) for name, value in tensors.items()}
    path = checkpoint.save(tmp_path, tensors, {"step": 0})
    timed(
        benchmark,
        (lambda: checkpoint.save(tmp_path, tensors, {"step": 0})) if what == "save" else lambda: checkpoint.load(path),
    )


@pytest.mark.benchmark(group="command")
def test_help(benchmark: BenchmarkFixture) -> None:
    timed(
        benchmark, lambda: subprocess.run([sys.executable, "-m", "fastres", "--help"], check=True, capture_output=True)
    )
