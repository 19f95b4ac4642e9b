"""How many kernels a step launches on an H200, counted by lowering it; the counts must not creep up."""

import functools
import shutil
import sys
from typing import Any

import pytest
import torch

from benchmarks.kernels import count_code, run_inside

lowered = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc") or torch.version.cuda is None,
    reason="needs gcc, and a build of torch with CUDA (no GPU)",
)


@functools.cache
def counted(*flags: str) -> dict[str, Any]:
    (count,) = run_inside(["--no-native", *flags])
    return count


@lowered
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("depth", "scope", "limit"), [(20, "whole", 200), (110, "blocks", 1_190), (110, "whole", 1_100)]
)
def test_launches_of_a_step(depth: int, scope: str, limit: int) -> None:
    count = counted("--depth", str(depth), "--scope", scope)
    parts = count["parts"]
    assert set(parts) == {"load", "forward", "backward", "update", "log"}
    convolutions = depth - 1
    assert parts["forward"] >= 3 * convolutions  # each with its batch norm's two; fewer would be a miscount
    assert parts["backward"] >= 4 * convolutions
    assert parts["load"] == 1
    assert parts["log"] == 1
    assert count["launches"] == sum(parts.values()) <= limit


@lowered
@pytest.mark.timeout(300)
def test_launches_of_a_step_by_our_own_kernels() -> None:
    """Convolution and norm of each layer, twice each way; then what is compiled: head, images, update and log."""
    for count in run_inside(["--depth", "20,110"]):
        layers, parts = count["depth"] - 1, count["parts"]
        assert 2 * layers < parts["forward"] <= 2 * layers + 4
        assert 2 * layers + 2 < parts["backward"] <= 2 * layers + 8  # the last norm's sums, and the weights'
        assert parts["update"] <= 3
        assert count["launches"] == sum(parts.values()) <= 4 * layers + 14


@lowered
@pytest.mark.timeout(300)
def test_launches_of_a_step_with_one_a_layer() -> None:
    for count in run_inside(["--depth", "20,110", "--layer-kernels"]):
        layers, parts = count["depth"] - 1, count["parts"]
        kinds, sums = 6, 2  # of layers, whose weights are one launch each; of the weights' shares, and the last layer's
        assert (parts["forward"], parts["backward"]) == (layers + 1, layers + kinds + sums)
        assert (parts["load"], parts["update"]) == (1, 1)
        assert count["launches"] == sum(parts.values()) <= 2 * layers + 14


@lowered
@pytest.mark.timeout(600)
def test_shadows_save_kernels() -> None:
    network = ("--depth", "20", "--scope", "whole")
    with_them, without = counted(*network), counted(*network, "--no-shadows")
    for part in ("forward", "backward"):  # Inductor joins the casts, but not all of them
        assert with_them["parts"][part] < without["parts"][part]


def test_code_is_counted_by_its_calls() -> None:
    code = """
def triton_poi_fused_0(in_ptr0): ...
def call(self, args):
        buf0 = extern_kernels.convolution(arg0_1, arg1_1)
        assert_size_stride(buf0, (1,), 'torch.ops.aten.convolution.default')
        triton_poi_fused_0.run(buf0, 10, stream=raw_stream0)
        triton_poi_fused_0.run(buf0, 10, stream=raw_stream0)
        buf2 = torch.ops.aten.convolution_backward.default(buf0, arg1_1)
        extern_kernels.mm(buf2, arg1_1, out=buf3)
"""
    count = count_code(code)
    assert (count.triton, count.library) == (2, {"convolution": 1, "convolution_backward": 2, "mm": 1})
    assert count.launches == 6


def test_a_failure_is_said() -> None:
    with pytest.raises(SystemExit, match=r"count-kernels: (?s:.)*21"):
        run_inside(["--depth", "21"])
