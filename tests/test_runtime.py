"""runtime.py: what "auto" means on a machine, and what is refused by name."""

import getpass
import json
import os
import platform
import pwd
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import fastres
from fastres import runtime
from fastres.cli.flags import parse_channels
from fastres.config import Execution
from fastres.errors import InputError, MachineError, OutOfMemory, says_out_of_memory
from fastres.machine import checks, driver, gpu, host
from fastres.machine import environment as env
from fastres.machine.environment import _commit, environment
from fastres.runtime import prepare


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
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_60", "sm_70", "sm_75", "sm_80", "sm_90"])
    monkeypatch.setattr("fastres.runtime._check_launchers", lambda: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", "somewhere")


def test_no_gpu_means_the_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "why_none", lambda: "")
    chosen = prepare(Execution(threads=1))
    assert chosen.device.type == "cpu"
    assert chosen.notes == ("no GPU found: using the CPU",)
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
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # no Triton, as on Windows
    without = prepare(Execution(threads=1))
    assert (without.compile_scope, without.native) == ("none", False)
    assert "training without torch.compile, more slowly: torch came without Triton" in without.notes


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_newer_switches_of_torch_do_not_change_the_precision(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """torch.backends.fp32_precision: what cuDNN's own switch leaves open is as it says."""
    pretend_gpu(monkeypatch, (9, 0))
    for backend in (torch.backends, torch.backends.cudnn):
        monkeypatch.setattr(backend, "fp32_precision", "tf32")
    prepare(Execution(threads=1, precision=precision, native=False))  # type: ignore[arg-type]
    assert torch._C._get_fp32_precision_getter("cuda", "conv") == ("tf32" if precision == "tf32" else "none")
    assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")  # and can be read


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


@pytest.mark.parametrize(("lacks", "says"), [("c_compiler", "need a C compiler"), ("python_header", "need Python.h")])
def test_a_gpu_without_what_launches_kernels(monkeypatch: pytest.MonkeyPatch, lacks: str, says: str) -> None:
    check = runtime._check_launchers
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(runtime, "_check_launchers", check)
    for part in ("c_compiler", "python_header"):
        monkeypatch.setattr(host, part, lambda part=part: None if part == lacks else "there")
    for how in (Execution(threads=1), Execution(threads=1, compile=False), Execution(threads=1, native=False)):
        with pytest.raises(MachineError, match=f"{says}.*--no-compile --no-native"):
            prepare(how)
    assert not prepare(Execution(threads=1, compile=False, native=False)).native  # as it said


@pytest.mark.parametrize(
    ("newest", "has_gpu", "hidden", "built_for", "why"),
    [
        (None, False, None, "13.2", ""),
        (None, True, None, "13.2", "there is an NVIDIA GPU, but no driver"),
        ((12, 4), True, None, "13.2", "the driver knows CUDA up to 12.4, and this torch needs 13.2"),
        ((13, 0), True, "", "13.2", "hidden by CUDA_VISIBLE_DEVICES=''"),
        ((13, 0), True, "-1", "13.2", "hidden by CUDA_VISIBLE_DEVICES='-1'"),
        ((13, 0), True, None, None, "this torch was built for the CPU alone"),
        ((13, 0), True, "7", "13.2", "CUDA_VISIBLE_DEVICES is '7'"),
        ((13, 0), True, None, "13.2", ""),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
    newest: tuple[int, int] | None,
    has_gpu: bool,
    hidden: str | None,
    built_for: str | None,
    why: str,
) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: the driver is too old", UserWarning, stacklevel=1)  # as torch does
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(driver, "newest_cuda", lambda: newest)
    monkeypatch.setattr(driver, "has_gpu", lambda: has_gpu)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert prepare(Execution(threads=1)).notes == (f"no GPU {f'({why})' if why else 'found'}: using the CPU",)
    because = re.escape(f" ({why})" if why else "")
    with pytest.raises(MachineError, match=f"torch finds no CUDA GPU{because}; use --device cpu or auto"):
        prepare(Execution(threads=1, device="cuda"))


def test_why_cuda_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "CUDA initialization: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before "
        "calling NumCudaDevices() that might have already set an error? Error 802: system not yet initialized "
        "(Triggered internally at c10/cuda/CUDAFunctions.cpp:109.)"
    )
    once = [said]

    def is_available() -> bool:
        while once:  # torch says it once a process
            warnings.warn(once.pop(), UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(gpu, "_SAID", [])
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(driver, "newest_cuda", lambda: (13, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    why = "CUDA does not start: Error 802: system not yet initialized"
    for _ in range(2):
        assert prepare(Execution(threads=1)).notes == (f"no GPU ({why}): using the CPU",)


def test_a_gpu_that_torch_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would take it, and fail at the first kernel."""
    pretend_gpu(monkeypatch, (5, 2))
    chosen = prepare(Execution(threads=1))
    assert chosen.device.type == "cpu"
    assert chosen.notes[0].startswith("this torch has no kernels for Some GPU (compute capability 5.2): using the CPU")
    with pytest.raises(MachineError, match="this torch has no kernels for Some GPU"):
        prepare(Execution(threads=1, device="cuda"))


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_75", "sm_80", "sm_90", "sm_120"], (8, 9), True),
        (["sm_75", "sm_80", "sm_90", "sm_120"], (11, 0), False),
        (["sm_75", "sm_80", "sm_90", "compute_90"], (11, 0), True),
        (["sm_86"], (8, 0), False),
        (["sm_100a"], (10, 0), True),
        (["sm_100f"], (10, 0), True),
        (["compute_120f"], (12, 1), True),
        (["gfx90a"], (9, 0), True),
        ([], (9, 0), True),
    ],
)
def test_which_gpus_torch_was_built_for(
    monkeypatch: pytest.MonkeyPatch, archs: list[str], capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    assert gpu.has_kernels(capability) == runs


def test_which_other_torch_may_have_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    assert gpu.other_torch((11, 0)) == "install a newer torch"
    assert gpu.other_torch((6, 1)) == gpu.OLDER_TORCH


def test_a_home_that_may_not_be_looked_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As of a container's user whose HOME is root's; Path.exists raises there."""

    def exists(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", exists)
    assert host.writable(tmp_path / "a" / "b")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert not host.writable(tmp_path / "a" / "b")


def test_torchs_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch makes it when it is imported further, with a traceback; torch 2.11 also where the user has no name."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(MachineError, match=r"torch's cache cannot be made: .*; set TORCHINDUCTOR_CACHE_DIR"):
        prepare(Execution(device="cpu", threads=1))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")

    def full() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "gettempdir", full)
        with pytest.raises(MachineError, match="No usable temporary directory"):
            prepare(Execution(device="cpu", threads=1))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert host.inductor_cache_dir() == Path(default_cache_dir())

    def nameless(_uid: int) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back, too, where it was not there
    monkeypatch.setattr(pwd, "getpwuid", nameless)
    prepare(Execution(device="cpu", threads=1))
    assert getpass.getuser() == f"uid_{os.getuid()}"  # which torch 2.11 asks where it compiles, whatever the folder
    assert (tmp_path / f"torchinductor_uid_{os.getuid()}").is_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / f"torchinductor_uid_{os.getuid()}")


def test_a_gpu_too_old_for_triton_is_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (6, 1))
    chosen = prepare(Execution(threads=1))
    assert (chosen.compile_scope, chosen.precision, chosen.native) == ("none", "fp16", False)
    assert any("without torch.compile, more slowly" in note for note in chosen.notes)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (Execution(device="cpu", threads=1, compile_mode="max-autotune"), "nothing is compiled here"),
        (Execution(device="cpu", threads=1, compile_scope="blocks"), "nothing is compiled here"),
        (Execution(device="cpu", threads=1, graph_steps=8), "--graph-steps does nothing without a CUDA graph"),
    ],
)
def test_what_does_nothing_is_told(how: Execution, says: str) -> None:
    (note,) = prepare(how).notes
    assert says in note


def test_a_gpu_that_others_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    for said, kind in (
        ("CUDA error: out of memory", OutOfMemory),
        ("CUDA-capable device(s) is/are busy", MachineError),
    ):

        def fails(_: object, said: str = said) -> None:
            raise RuntimeError(said)

        monkeypatch.setattr(torch.cuda, "set_device", fails)
        with pytest.raises(kind, match="cuda:0"):
            prepare(Execution(threads=1))


def test_kernels_that_do_not_go_with_a_precision_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5))
    slow = "training without fastres' own kernels, more slowly: they"
    assert prepare(Execution(threads=1)).notes == (f"{slow} are for bf16, and this GPU has fp16 alone",)
    assert prepare(Execution(threads=1, precision="fp32")).notes == (f"{slow} do not go with --precision fp32",)
    assert prepare(Execution(threads=1, native=False)).notes == ()


def test_an_error_that_follows_from_lack_of_memory_says_so() -> None:
    late = RuntimeError("capturing stream has unjoined work")
    assert not says_out_of_memory(late)
    late.__context__ = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    assert says_out_of_memory(late)
    late.__suppress_context__ = True  # raised from None: it has nothing to do with it
    assert not says_out_of_memory(late)
    late.__cause__ = late  # or one that has it for its cause
    assert not says_out_of_memory(late)
    for name in ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"):
        assert says_out_of_memory(RuntimeError(f"cuDNN error: {name}"))
    assert says_out_of_memory(RuntimeError("Can't allocate 4096 bytes on device 0."))  # DALI's words


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
    assert found["fastres"] == fastres.__version__


def test_the_commit_is_that_of_this_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE"):  # as in a hook of another repository, whose commit it is not
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("FASTRES_COMMIT", "told")
    if (Path(fastres.__file__).parents[1] / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}\+?", str(_commit()))
    else:
        assert _commit() == "told"
    monkeypatch.setattr("fastres.machine.environment._git", lambda *_: None)  # there is none
    assert _commit() == "told"
    monkeypatch.setenv("FASTRES_COMMIT", "")
    assert _commit() is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told anything")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    code = """
import resource, torch
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


def test_a_commit_has_a_plus_where_files_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Untracked files, as runs/, do not count; where git does not say, they may differ."""
    module = tmp_path / "fastres" / "machine" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(env, "__file__", str(module))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "config.json").touch()
    commit = str(_commit())
    assert len(commit) == 40
    module.write_text("changed")
    assert _commit() == f"{commit}+"
    module.write_text("")
    asked = env._git
    monkeypatch.setattr(env, "_git", lambda root, *command: None if command[0] == "status" else asked(root, *command))
    assert _commit() == f"{commit}+"


def test_either_dali_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in checks.DALI:
        monkeypatch.setattr(host, "version_of", {name: "2.4.0"}.get)
        assert environment(prepare(Execution(device="cpu", threads=1)))["dali"] == "2.4.0"
