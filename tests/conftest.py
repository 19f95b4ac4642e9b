"""What all tests share: no network, no cache of the user's, no GPU tests without a GPU."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator

import pytest

LOCAL = {"localhost", "127.0.0.1", "::1"}


def pytest_configure(config: pytest.Config) -> None:
    """Give each of the processes that share the tests its own cores: more threads than cores wait for each other."""
    worker: dict[str, object] | None = getattr(config, "workerinput", None)
    if worker and hasattr(os, "sched_setaffinity"):
        place, count = int(str(worker["workerid"]).removeprefix("gw")), int(str(worker["workercount"]))
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[place::count])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Those that may take long go first, else one process might be at the last of them alone.
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers("timeout")), default=0))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none"))


@pytest.fixture(scope="session", autouse=True)
def private_surroundings() -> Iterator[None]:
    """Caches in a temporary folder and none of the user's settings, here and in subprocesses."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FASTRES_")]:
            patch.delenv(name)
        patch.setenv("XDG_CACHE_HOME", folder)
        patch.setenv("MPLBACKEND", "Agg")
        yield


@pytest.fixture(scope="session", autouse=True)
def heeded_interrupt() -> Iterator[None]:
    """A script starts what it puts into its background with SIGINT ignored, which training and its tests would heed."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def few_synthetic_images() -> Iterator[None]:
    """Dozens of runs train on the built-in data, here and in what says so (tests/few.py)."""
    from fastres.data import synthetic
    from tests.few import few_images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "make_synthetic", few_images)
        yield


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """What a test draws from torch's own generator does not depend on the tests before it, nor on who shares them."""
    if torch := sys.modules.get("torch"):  # nobody has drawn from one that nobody has imported
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine fails the test (in this process; subprocesses are not watched)."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        remote = isinstance(address, tuple) and address[0] not in LOCAL
        if self.family in (socket.AF_INET, socket.AF_INET6) and remote:
            raise AssertionError(f"a test tried to reach the network: {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)
