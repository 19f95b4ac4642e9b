"""guards.py: memory that ran out is explained, with a batch size that fits. (Signals: tests/test_loop.py.)"""

import contextlib
import dataclasses
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from fastres import checkpoint, guards
from fastres.config import RunConfig, make_config
from fastres.errors import DiskFull, Interrupted, MachineError, OutOfMemory
from fastres.guards import (
    Interrupt,
    check_memory,
    explained_compilation,
    explained_full_disk,
    explained_memory_errors,
    interrupts,
    memory_of_a_step,
)
from fastres.machine import memory
from fastres.rundir import CONFIG
from fastres.runtime import Runtime
from tests.test_step import one_thread  # noqa: F401 (a fixture for the whole file)

SAID = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.50 GiB is free."
)


def config(batch_size: int = 4096, **changes: Any) -> RunConfig:
    execution = {"device": "cpu", "precision": "fp32"}
    return make_config(recipe={"batch_size": batch_size}, **{"execution": execution, "model": {"depth": 8}, **changes})


CPU = Runtime(torch.device("cpu"), "fp32")


def explained(error: Exception, run: RunConfig | None = None, own: Runtime = CPU) -> str:
    with pytest.raises(OutOfMemory) as caught, explained_memory_errors(run or config(), own):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


def suggested(message: str) -> int:
    found = re.search(r"--batch-size (\d+)$", message)
    assert found, message
    return int(found[1])


@pytest.mark.parametrize("depth", [8, 20])
def test_memory_of_a_step_is_counted_by_hand(depth: int) -> None:
    """Each 3x3 layer keeps its input and its output (for the normalisation), those of equal shape once."""
    _, image = memory_of_a_step(config(model={"depth": depth}), bytes_each=4)
    blocks = (depth - 2) // 6
    maps = 1024 * 16 * (2 + 4 * blocks) + 256 * 32 * 4 * blocks + 64 * 64 * 4 * blocks  # ahead of and behind each BN
    assert image == pytest.approx(4 * maps * guards.BACKWARD, rel=0.06)  # and the image, the logits, the zero padding


def test_memory_follows_precision_replicas_and_data() -> None:
    fixed, image = memory_of_a_step(config(), bytes_each=4)
    assert memory_of_a_step(config(model={"depth": 8, "norm_batch": 64}), bytes_each=4) == (fixed, image)
    assert memory_of_a_step(config(model={"arch": "imagenet", "depth": 18}), bytes_each=4)[1] > image
    assert memory_of_a_step(config(), bytes_each=2)[1] == pytest.approx(image / 2, abs=1)
    several = memory_of_a_step(config(), bytes_each=4, num_replicas=3)
    assert several[1] == pytest.approx(3 * image, abs=2)
    assert several[0] - fixed == 2 * 16 * 75_290
    small, _ = memory_of_a_step(config(data={"dataset": "synthetic"}), bytes_each=4)
    assert fixed - small == 40_000 * 3_072 * guards.LOADER_BYTES


def test_the_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what was needed, what is free, and names a batch that needs less."""
    monkeypatch.setattr(guards, "usable_memory", lambda _: 3_000_000_000)
    run = config()
    fixed, image = memory_of_a_step(run, bytes_each=4)
    message = explained(torch.OutOfMemoryError(SAID), run)
    need = f"{(fixed + 4096 * image) / 1e9:.1f} GB"
    assert f"a step of ResNet8 on 4,096 images needs about {need}, 2.7 GB of them at once" in message
    assert "3.0 GB are free for it on the CPU" in message
    batch = suggested(message)
    assert message.endswith(f"a batch of about {batch:,} fits: --batch-size {batch}")
    assert fixed + batch * image <= guards.USABLE_SHARE * 3e9 < fixed + (batch + 64) * image
    assert batch % 64 == 0
    assert message.count("\n") == 1
    smaller = explained(torch.OutOfMemoryError(SAID), run, dataclasses.replace(CPU, precision="bf16"))
    assert suggested(smaller) > 1.9 * batch - 64


def test_an_estimate_that_is_no_help_gives_way_to_half(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable in (10**15, None):
        monkeypatch.setattr(guards, "usable_memory", lambda _, usable=usable: usable)
        assert suggested(explained(torch.OutOfMemoryError(SAID))) == 2048

    def no_room(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(guards, "memory_of_a_step", no_room)
    assert suggested(explained(torch.OutOfMemoryError(SAID))) == 2048


def test_fewer_runs_at_once_need_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another batch size would be another experiment."""
    monkeypatch.setattr(guards, "usable_memory", lambda _: 3_000_000_000)
    said = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 800000000 bytes."
    with pytest.raises(OutOfMemory) as caught, explained_memory_errors(config(128), CPU, num_replicas=5):
        raise RuntimeError(said)
    assert "0.8 GB of them at once" in str(caught.value)
    assert str(caught.value).endswith("\nfewer runs at once need less: --side-by-side 2")


def test_no_batch_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "usable_memory", lambda _: 1_000_000)
    assert "try a smaller --depth than 8" in explained(torch.OutOfMemoryError(SAID))
    monkeypatch.setattr(guards, "usable_memory", lambda _: 10**15)
    assert "try a smaller --depth than 8" in explained(torch.OutOfMemoryError(SAID), config(1))


def test_deep_networks_are_extrapolated() -> None:
    for depth, bytes_each in ((56, 4), (110, 2)):
        deep = config(model={"depth": depth})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guards, "DEEP", 1_000)
            counted = memory_of_a_step(deep, bytes_each=bytes_each)
        assert memory_of_a_step(deep, bytes_each=bytes_each) == pytest.approx(counted, rel=1e-3)


def test_what_a_cpu_cannot_hold_is_refused_before(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, image = memory_of_a_step(config(), bytes_each=4)
    for spare in (1, -1):
        monkeypatch.setattr(
            guards, "usable_memory", lambda _, spare=spare: (fixed + 4096 * image) / guards.DOUBT + spare
        )
        with contextlib.nullcontext() if spare > 0 else pytest.raises(OutOfMemory, match="--batch-size"):
            check_memory(config(), CPU)
    with pytest.raises(OutOfMemory, match=r"a step of ResNet200000 .* needs about [0-9.]+ GB"):
        check_memory(config(model={"depth": 200_000}), CPU)
    monkeypatch.setattr(guards, "usable_memory", lambda _: None)
    check_memory(config(), CPU)


def test_real_allocators() -> None:
    """What torch's CPU allocator and numpy raise themselves."""
    for ask in (lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)):
        with pytest.raises(OutOfMemory, match="--batch-size"), explained_memory_errors(config(), CPU):
            ask()


def test_a_step_lets_go_before_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the failed step had got so far is free again when the estimate is made, though the error remembers it."""
    alive: list[int] = []

    class Big:
        def __del__(self) -> None:
            alive.remove(1)

    def step() -> None:
        big = Big()  # noqa: F841 (held by its frame)
        alive.append(1)
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(guards, "_way_out", lambda *_: f"{len(alive)} held")
    with pytest.raises(OutOfMemory, match="0 held"), explained_memory_errors(config(), CPU):
        step()


@pytest.mark.parametrize(
    "said", ["CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED when calling", "CUDA error: out of memory"]
)
def test_libraries_say_it_in_their_words(said: str) -> None:
    assert "--batch-size" in explained(RuntimeError(said))


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"), explained_memory_errors(config(), CPU):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(("batch_size", "rounded"), [(1, 1), (31, 31), (39, 32), (100, 96), (1000, 960)])
def test_a_batch_is_rounded_down_a_little(batch_size: int, rounded: int) -> None:
    assert guards._rounded(batch_size) == rounded
    assert 0.8 * batch_size < rounded <= batch_size


def test_usable_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    cpu = torch.device("cpu")
    free = memory.usable_memory(cpu)
    assert free is not None
    assert 1e8 < free < 1e14
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (limit, tmp_path / "none"))
    limit.write_text("12345678\n")
    assert memory.usable_memory(cpu) == 12_345_678
    limit.write_text("max\n")
    assert memory.usable_memory(cpu) == pytest.approx(free, rel=0.5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 7)
    assert memory.usable_memory(torch.device("cuda", 0)) == 12


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_stops_at_once_and_says_what_is_left(signum: signal.Signals, code: int, tmp_path: Path) -> None:
    interrupt, noted = Interrupt("resume with: fastres train --resume x"), list[int | None]()

    def work() -> None:
        interrupt.training = True
        try:
            os.kill(os.getpid(), signum)
            noted.append(interrupt.signum)
            os.kill(os.getpid(), signum)
        except Exception:  # noqa: BLE001 (as a compiler may have around what it calls)
            pytest.fail("taken for an error of the work")

    at_once = f"stopped by {signum.name} at once; nothing was saved, so it begins anew; resume with: fastres"
    with pytest.raises(Interrupted, match=at_once) as caught, interrupts(interrupt):
        work()
    assert caught.value.exit_code == code
    assert noted == [signum]
    for step in (1_200, 800):
        checkpoint.save(tmp_path / str(step), {"w": torch.zeros(1)}, {"step": step})
    interrupt.signum, interrupt.folders = None, [tmp_path / "1200", tmp_path / "800"]
    with (
        pytest.raises(Interrupted, match=r"at once; the newest checkpoint is of step 800; resume"),
        interrupts(interrupt),
    ):
        work()


def test_a_handler_that_is_not_pythons_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another program embeds Python; it could not be put back."""
    handler = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda signum: None if signum == signal.SIGHUP else handler(signum))
    with interrupts(Interrupt("resume")):
        assert handler(signal.SIGHUP) != handler(signal.SIGTERM)


def test_sigusr1_is_heeded_where_python_handles_it_and_else_may_be_faulthandlers() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        for usual, heeded in ((signal.SIG_DFL, False), (lambda *_: None, True)):
            signal.signal(signal.SIGUSR1, usual)
            with interrupts(interrupt := Interrupt("resume")):
                interrupt.training = True
                assert (signal.getsignal(signal.SIGUSR1) == signal.getsignal(signal.SIGTERM)) == heeded
            assert signal.getsignal(signal.SIGUSR1) == usual
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_stays_ignored(signum: signal.Signals) -> None:
    """As SIGHUP under nohup, SIGINT in a script's background. Other signals are put back as they were."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signum, signal.SIG_IGN)
    try:
        interrupt = Interrupt("resume")
        with interrupts(interrupt):
            interrupt.training = True
            signal.raise_signal(signum)
            assert interrupt.signum is None
        signal.signal(signum, signal.SIG_DFL)
        with interrupts(interrupt):
            interrupt.training = True
            signal.raise_signal(signum)
        assert interrupt.signum == signum
        assert {each: signal.getsignal(each) for each in before} == {**before, signum: signal.SIG_DFL}
    finally:
        signal.signal(signum, before[signum])


def test_a_second_signal_is_told_through_the_error_that_it_causes() -> None:
    """A capture of several branches that an exception ends raises one of its own: streams have not joined."""

    interrupt = Interrupt("resume")

    def left() -> None:
        interrupt.training = True
        signal.raise_signal(signal.SIGTERM)
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            failing(RuntimeError("operation would result in a merge of separate capture sequences"))()

    with pytest.raises(Interrupted, match="stopped by SIGTERM at once"), interrupts(interrupt):
        left()
    with pytest.raises(RuntimeError, match="another"), interrupts(Interrupt("resume")):
        failing(RuntimeError("another"))()


def test_before_training_the_first_signal_stops_at_once() -> None:
    """A network of 110 layers compiles for a minute, and there is nothing yet to save."""
    interrupt = Interrupt("resume with: fastres train --resume x", training=True)  # of the runs before
    stopped = "^stopped by SIGINT before the first step; resume with: fastres train --resume x$"
    with pytest.raises(Interrupted, match=stopped) as caught, interrupts(interrupt):
        signal.raise_signal(signal.SIGINT)
    assert caught.value.exit_code == 130


def test_a_compiler_that_does_not_work_is_explained() -> None:
    compiled = dataclasses.replace(CPU, compile_scope="whole")
    error: Exception
    for error in (InvalidCxxCompiler(), InductorError(OSError("no g++"), None), OSError(28, "No space left")):
        explained = pytest.raises(MachineError, match=r"compiling does not work here: .*; use --no-compile \(--debug")
        with explained, explained_compilation(compiled):
            raise error
        gpu = dataclasses.replace(compiled, device=torch.device("cuda", 0), native=True)
        for own, ways in ((gpu, "--no-compile --no-native"), (_uncompiled(gpu), "--no-native")):
            with pytest.raises(MachineError, match=f"; use {ways} "), explained_compilation(own):
                raise error
        with pytest.raises(type(error)), explained_compilation(CPU):  # nothing is compiled
            raise error
    for error in (torch.OutOfMemoryError(SAID), RuntimeError("a bug"), InductorError(MemoryError(SAID), None)):
        with pytest.raises(type(error)), explained_compilation(compiled):
            raise error


def _uncompiled(runtime: Runtime) -> Runtime:
    return dataclasses.replace(runtime, compile_scope="none")


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_usable_memory_counts_what_the_process_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import resource

    page, cpu = resource.getpagesize(), torch.device("cpu")
    (tmp_path / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable:  1000000 kB\n")
    (tmp_path / "statm").write_text("5000 1000 200 1 0 300 0\n")  # pages: mapped, held, ...
    files = {"/proc/meminfo": tmp_path / "meminfo", "/proc/self/statm": tmp_path / "statm"}
    monkeypatch.setattr(memory, "Path", files.__getitem__)
    monkeypatch.setattr(memory, "CGROUP_LIMITS", ())
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert memory.usable_memory(cpu) == 1_000_000 * 1024 + 1000 * page
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10_000 * page, resource.RLIM_INFINITY))
    assert memory.usable_memory(cpu) == (10_000 - 5000 + 1000) * page


def test_peak_memory_is_in_bytes() -> None:
    block = torch.ones(64_000_000, dtype=torch.uint8)
    assert memory.peak_memory(torch.device("cpu")) > block.nbytes


def test_a_full_disk_before_all_have_begun_offers_no_way_on(tmp_path: Path) -> None:
    interrupt = Interrupt("resume with: x", folders=[tmp_path / "a", tmp_path / "b"])
    for folder, resumable in zip(interrupt.folders, (False, True), strict=True):
        folder.mkdir()
        (folder / CONFIG).write_text("{}")
        with pytest.raises(DiskFull) as caught, explained_full_disk(interrupt):
            raise DiskFull("no room")
        assert ("resume with: x" in str(caught.value)) == resumable


@pytest.mark.parametrize(("said", "gb"), [("800000000 bytes", "0.8"), ("512.00 MiB", "0.5"), ("524288 KiB", "0.5")])
def test_what_was_asked_for_in_any_unit(said: str, gb: str) -> None:
    assert f"{gb} GB of them at once" in explained(RuntimeError(f"CUDA out of memory. Tried to allocate {said}."))
