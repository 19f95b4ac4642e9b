"""cudagraph.py with doubles of streams and graphs: branches run side by side, in order with all that is around them."""

from functools import partial

import pytest
import torch

from fastres.cudagraph import WARM_UP_CALLS, CapturedGraph
from tests.fakecuda import FakeCuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def captured(cuda: FakeCuda, names: str) -> CapturedGraph:
    """A graph whose branches launch a kernel each, made behind a kernel that wrote what they read."""
    cuda.launch("weights")
    return CapturedGraph([partial(cuda.launch, name) for name in names], [])


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_warmed_up_then_captured_with_a_wait_between(cuda: FakeCuda, names: str) -> None:
    captured(cuda, names)
    assert cuda.log == ["weights", *names * WARM_UP_CALLS, "synchronize", "capture", *names, "captured"]
    (graph,) = cuda.graphs
    assert graph.error_mode == "thread_local"


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_warm_up_is_behind_what_was_launched_and_before_what_will_be(cuda: FakeCuda, names: str) -> None:
    training = cuda.current
    captured(cuda, names)
    assert cuda.current is training
    weights, *calls = cuda.launches
    warm_up = calls[: WARM_UP_CALLS * len(names)]
    assert all(weights in call.before for call in calls)
    for k, call in enumerate(warm_up):  # behind all branches of the calls before it
        assert call.before.issuperset(warm_up[: k // len(names) * len(names)])
    assert training.before.issuperset(warm_up)


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_each_branch_has_a_stream_of_its_own_beside_the_others(cuda: FakeCuda, names: str) -> None:
    """In the warm-up the same one as in the capture: gradients are accumulated on the stream that first did so."""
    training = cuda.current
    captured(cuda, names)
    streams = [{call.stream for call in cuda.launches if call.kernel == name} for name in names]
    assert all(len(own) == 1 for own in streams)
    assert len(set.union(*streams, {training, cuda.graphs[0].stream})) == len(names) + 2
    calls = cuda.launches[1:]
    for k in range(0, len(calls), len(names)):
        together = calls[k : k + len(names)]
        assert not any(call.before & set(together) for call in together)


def test_streams_join_also_where_a_branch_fails(cuda: FakeCuda) -> None:
    """Else the capture could not end, and the error would be that one."""

    def fails() -> None:
        cuda.launch("b")
        if cuda.log.count("b") > WARM_UP_CALLS:
            raise MemoryError("in the capture")

    before = cuda.current
    with pytest.raises(MemoryError, match="in the capture"):
        CapturedGraph([partial(cuda.launch, "a"), fails, partial(cuda.launch, "c")], [])
    assert cuda.current is before


def test_one_branch_needs_no_fork(cuda: FakeCuda) -> None:
    training = cuda.current
    captured(cuda, "a")
    assert {call.stream for call in cuda.launches[1:]} == {cuda.graphs[0].stream}
    assert cuda.graphs[0].stream is not training  # the current stream cannot capture where it is the default one


def test_a_replay_launches_what_was_captured(cuda: FakeCuda) -> None:
    graph = captured(cuda, "ab")
    cuda.log.clear()
    for _ in range(2):
        graph.replay()
    assert cuda.log == [*"abab"]
    assert {call.stream for call in cuda.launches[-4:]} == {cuda.current}


@pytest.mark.parametrize("moved", [0, 1])
def test_a_static_tensor_that_moved_is_refused(cuda: FakeCuda, moved: int) -> None:
    static = [torch.zeros(2, 3), torch.zeros(4)]
    graph = CapturedGraph([lambda: None], static)
    static[moved].add_(1)
    graph.check()
    static[moved].data = static[moved].clone()
    with pytest.raises(RuntimeError, match=r"a tensor of shape \((2, 3|4,)\) moved after it was captured"):
        graph.check()
