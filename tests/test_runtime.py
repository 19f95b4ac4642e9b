"""runtime.py: what "auto" means on a machine, and what is refused by name."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from fastres import host
from fastres.cli.flags import parse_channels
from fastres.config import Execution
from fastres.errors import InputError, MachineError
from fastres.runtime import environment, prepare


@pytest.fixture(autouse=True)
def switches_put_back() -> Iterator[None]:
    cudnn, matmul, threads = torch.backends.cudnn, torch.backends.cuda.matmul, torch.get_num_threads()
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
    torch.set_num_threads(threads)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], count: int = 1) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")


def test_no_gpu_means_the_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = prepare(Execution(threads=1))
    assert chosen.device.type == "cpu"
    assert chosen.notes == ("no GPU found: training on the CPU",)
    assert chosen.compile_scope == "none"
    assert not chosen.cuda_graph
    assert prepare(Execution(device="cpu", threads=1)).notes == ()
    with pytest.raises(MachineError, match="--device cuda:0 was asked for"):
        prepare(Execution(device="cuda:0"))


@pytest.mark.parametrize(
    ("vendor", "flags", "precision"),
    [
        ("GenuineIntel", "avx2", "fp32"),
        ("GenuineIntel", "avx512_bf16", "fp32"),
        ("GenuineIntel", "avx512_bf16 amx_bf16", "bf16"),
        ("AuthenticAMD", "avx512f", "fp32"),
        ("AuthenticAMD", "avx512_bf16", "bf16"),
        ("", "", "fp32"),
    ],
)
def test_auto_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, precision: str) -> None:
    monkeypatch.setattr(host, "cpu_info", {"flags": flags, "vendor_id": vendor}.__getitem__)
    assert prepare(Execution(device="cpu", threads=1)).precision == precision
    assert prepare(Execution(device="cpu", threads=1, precision="fp16")).precision == "fp16"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str) -> None:
    pretend_gpu(monkeypatch, capability)
    chosen = prepare(Execution(threads=1))
    assert (chosen.device, chosen.precision, chosen.compile_scope) == (torch.device("cuda", 0), precision, "whole")
    assert chosen.cuda_graph
    assert prepare(Execution(threads=1), depth=110).compile_scope == "blocks"
    assert prepare(Execution(threads=1, compile_scope="whole"), depth=110).compile_scope == "whole"
    assert prepare(Execution(threads=1, compile=False)).compile_scope == "none"
    assert not prepare(Execution(threads=1, cuda_graph=False)).cuda_graph
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    prepare(Execution(threads=1, precision="tf32"))
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_timed_kernels_are_not_deterministic() -> None:
    with pytest.raises(InputError, match="--deterministic rules out"):
        prepare(Execution(device="cpu", threads=1, deterministic=True, compile_mode="max-autotune"))


def test_deterministic_mode_is_switched_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    import torch._inductor.config as inductor

    for wanted in (True, False):
        prepare(Execution(threads=1, deterministic=wanted))
        assert torch.are_deterministic_algorithms_enabled() == inductor.deterministic == wanted
        assert torch.backends.cudnn.benchmark is not wanted


def test_what_a_gpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5))
    with pytest.raises(MachineError, match=r"Some GPU has no bf16.*fp16 or fp32"):
        prepare(Execution(threads=1, precision="bf16"))
    with pytest.raises(InputError, match=r"cuda:1.*has 1 GPU"):
        prepare(Execution(threads=1, device="cuda:1"))


def test_compile_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpp_compiler", lambda: None)
    with pytest.raises(MachineError, match=r"C\+\+ compiler.*--no-compile"):
        prepare(Execution(device="cpu", compile=True, threads=1))


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        assert prepare(Execution(device="cpu", threads=1)).threads == torch.get_num_threads() == 1
        assert prepare(Execution(device="cpu")).threads == host.num_cores()
    finally:
        torch.set_num_threads(before)


def test_environment_is_json_and_names_the_machine() -> None:
    found = environment(prepare(Execution(device="cpu", threads=1)))
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["gpu"] is None
    assert found["cores"] >= 1
    assert found["fastres"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told anything")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    code = """
import resource, torch
from fastres import host
from fastres.cli.flags import parse_channels
from fastres.config import Execution
from fastres.runtime import prepare
{prepare}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    counts = []
    for line in ("", "prepare(Execution(device='cpu', threads=1))"):
        command = [sys.executable, "-c", code.format(prepare=line)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        counts.append(int(done.stdout))
    assert counts[1] < counts[0] / 10


def test_threads_have_an_upper_bound() -> None:
    cores = os.cpu_count() or 1
    assert prepare(Execution(device="cpu", threads=8 * cores)).threads == 8 * cores
    with pytest.raises(InputError, match=rf"--threads is {8 * cores + 1:,}, and this machine has {cores:,} cores"):
        prepare(Execution(device="cpu", threads=8 * cores + 1))


@pytest.mark.parametrize("text", ["nan,0.5,0.5", "-0.1,0.5,0.5", "1e300,0.5,0.5", "0.5,0.5", "124,116,104"])
def test_channels_are_pixels_of_0_to_1(text: str) -> None:
    assert parse_channels("--mean", "0,0.456,1") == (0.0, 0.456, 1.0)  # pixels as they are: 0,0,0 and 1,1,1
    for flag in ("--mean", "--std"):
        with pytest.raises(InputError, match=f"{flag} is '{text}'"):
            parse_channels(flag, text)
    with pytest.raises(InputError, match="--std is '0,1,1'; pixels are 0 to 1 here, so 0 cannot be"):
        parse_channels("--std", "0,1,1")
