"""`fastres doctor`: every ill is named with its cure, and no check takes the others down."""

import ctypes
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastres import resolve, runtime
from fastres.cli import run
from fastres.cli.doctor import plain, table
from fastres.data import cifar
from fastres.errors import InputError, MachineError
from fastres.machine import checks, doctor, driver, host, memory
from fastres.machine.checks import Finding

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plan sets torch's threads, as training does."""
    before = torch.get_num_threads()
    monkeypatch.setattr(host, "num_cores", lambda: 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(driver, "newest_cuda", lambda: None)
    monkeypatch.setattr(driver, "has_gpu", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with made-up GPUs, by their compute capabilities."""

    def install(*capabilities: tuple[int, int], cuda: tuple[int, int] = (13, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        seen = [SimpleNamespace(name="NVIDIA X", major=major, minor=minor) for major, minor in capabilities]
        monkeypatch.setattr(torch.cuda, "get_device_properties", seen.__getitem__)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100e9, 150e9))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_80", "sm_90a", "sm_120", "compute_120"])
        monkeypatch.setattr(torch.version, "cuda", "13.2")
        monkeypatch.setattr(driver, "newest_cuda", lambda: cuda)
        monkeypatch.setattr(driver, "version", lambda: "580.65.06")

    return install


def one(findings: Any) -> Finding:
    (finding,) = findings
    return finding


# --- the whole


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.examine()
    assert found.possible
    assert found.verdict.startswith("fastres train will use: cpu, ")
    native = ", fastres' own kernels" if shutil.which("g++") else ""
    assert found.verdict.endswith(f"resident loader, eager{native}, 1 thread")
    whats = [finding.what for finding in found.findings]
    assert whats == [
        "system", "torch", "GPU", "driver", "CPU", "memory", "compiler", "Triton", "DALI", "CIFAR-10", "disk, runs",
        "disk, data cache", "compile cache",
    ]  # fmt: skip
    assert not [finding for finding in found.findings if finding.value.startswith("cannot be checked")]
    assert run(["doctor", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["possible"] is True
    assert [finding["what"] for finding in tree["findings"]] == whats


def test_the_plan_is_what_training_resolves_to(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = runtime.Runtime(torch.device("cuda", 0), "bf16", compile_scope="whole", cuda_graph=True)
    monkeypatch.setattr(resolve, "prepare", lambda *_, **__: resolved)
    monkeypatch.setattr("fastres.data.dali.dali_available", lambda: True)
    assert doctor._plan() == "cuda:0, bf16, dali loader, compiled (whole), a step as one CUDA graph"


def test_no_check_takes_the_others_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        yield Finding("ok", "half", "seen")
        raise ValueError("two\nlines")

    for name in ("system", "run_disk", "cpu"):
        monkeypatch.setattr(checks, name, broken)
    found = doctor.examine()
    lost = [f for f in found.findings if f.value == "cannot be checked: ValueError: two"]
    assert [f.what for f in lost] == ["system", "CPU", "disk, runs"]
    assert found.possible


@pytest.mark.parametrize("error", [MachineError("--compile on cuda needs a C++ compiler"), RuntimeError("CUDA error")])
def test_where_training_cannot_be_prepared_it_says_so(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def prepare(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(resolve, "prepare", prepare)
    found = doctor.examine()
    assert not found.possible
    assert str(error) in found.verdict


def test_exit_code_and_words_where_training_is_not_possible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Finding("error", "disk, runs", "no room", "make some", stops=True)
    monkeypatch.setattr(checks, "run_disk", lambda: [bad])
    assert run(["doctor"]) == 3
    out = capsys.readouterr().out
    assert "see disk, runs above" in out.splitlines()[-1]
    assert "error  disk, runs" in out
    assert "-> make some" in out


def test_it_fits_80_columns_and_nothing_is_cut(gpu: Any) -> None:
    from rich.console import Console

    gpu((6, 1), (9, 0))
    found = doctor.examine()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(found))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "\u2026" not in text
    words = "".join(text.split())
    for finding in found.findings:
        assert "".join(finding.value.split()) in words
        assert "".join(finding.remedy.split()) in words
    assert all(finding.value in plain(found) for finding in found.findings)


def test_torch_need_not_be_importable() -> None:
    """In a process of its own where importing torch fails."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fastres.cli import run; code = run(['doctor']); print('code', code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "code 3"
    assert "error  torch" in done.stdout
    assert "install --force-reinstall torch" in done.stdout


# --- check by check


def test_torch_that_is_too_old_or_not_built_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    found = one(checks.torch_build())
    assert (found.mark, found.stops) == ("error", True)
    assert "'torch>=2.11'" in found.remedy
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert one(checks.torch_build()).mark == "ok"
    monkeypatch.setattr(driver, "newest_cuda", lambda: (13, 0))
    assert one(checks.torch_build()).mark == "note"


@pytest.mark.parametrize(
    ("capability", "mark", "says"),
    [
        ((9, 0), "ok", "bf16"),
        ((12, 0), "ok", "bf16"),
        ((7, 5), "note", "no bf16"),
        ((7, 0), "note", "no bf16"),
        ((8, 0), "ok", "bf16"),
        ((7, 2), "note", "no bf16"),  # what is built for 7.0 runs on it
        ((6, 1), "error", "this torch has no kernels for it"),
        ((10, 0), "error", "this torch has no kernels for it"),
        ((12, 1), "ok", "bf16"),
    ],
)
def test_generations_of_gpus(gpu: Any, capability: tuple[int, int], mark: str, says: str) -> None:
    gpu(capability)
    found = one(checks.gpus())
    assert (found.mark, found.stops) == (mark, False)  # --device auto takes the CPU
    assert says in found.value
    assert "100.0 of 150.0 GB free" in found.value


def test_a_second_gpu_that_is_too_old_stops_nothing(gpu: Any) -> None:
    gpu((9, 0), (6, 1))
    assert [(f.mark, f.stops) for f in checks.gpus()] == [("ok", False), ("note", False)]


def test_a_gpu_too_old_for_triton(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((6, 1))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_60"])
    assert "too old for torch.compile" in one(checks.gpus()).value


def test_a_gpu_that_is_full_hides_no_other(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0), (9, 0))

    def room(index: int) -> tuple[float, float]:
        if index == 0:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return 100e9, 150e9

    monkeypatch.setattr(torch.cuda, "mem_get_info", room)
    full, free = checks.gpus()
    assert "memory not known (RuntimeError: CUDA error: out of memory)" in full.value
    assert "100.0 of 150.0 GB free" in free.value


def test_a_hidden_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "training will be on the CPU" in one(checks.gpus()).value
    monkeypatch.setattr(driver, "newest_cuda", lambda: (13, 0))
    assert one(checks.gpus()).remedy == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("driver_cuda", "torch_cuda", "mark"),
    [((12, 8), "13.2", "note"), ((13, 0), "13.2", "ok"), ((13, 2), "12.6", "ok"), ((12, 8), None, "ok")],
)
def test_drivers(gpu: Any, monkeypatch: pytest.MonkeyPatch, driver_cuda: Any, torch_cuda: Any, mark: str) -> None:
    gpu((9, 0), cuda=driver_cuda)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    found = one(checks.nvidia_driver())
    assert found.mark == mark
    assert ("too old" in found.value) == ("a torch for an older CUDA" in found.remedy) == (mark == "note")
    assert "580.65.06" in found.value


def test_a_gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(checks.nvidia_driver()).mark == "ok"
    monkeypatch.setattr(driver, "has_gpu", lambda: True)
    assert one(checks.nvidia_driver()).remedy == "install NVIDIA's driver"


def test_what_the_driver_library_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    class Library:
        def __init__(self, _: str) -> None:
            pass

        def cuDriverGetVersion(self, number: Any) -> int:  # noqa: N802 (its name)
            number._obj.value = 12_080
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert driver.newest_cuda() == (12, 8)


def test_compilers(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpp_compiler", lambda: None)
    assert (one(checks.compiler()).mark, one(checks.compiler()).stops) == ("note", False)
    monkeypatch.setattr(host, "cpp_compiler", lambda: "/usr/bin/clang++")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda _: None)
        patch.setattr(sys, "platform", "linux")
        found = one(checks.compiler())
        assert (found.mark, found.remedy) == ("note", "apt-get install g++")
        assert "own CPU kernels need g++" in found.value
    gpu((9, 0))
    monkeypatch.setattr(host, "c_compiler", lambda: None)
    found = one(checks.compiler())
    assert (found.mark, found.stops) == ("error", True)
    assert "--no-compile --no-native" in found.remedy
    monkeypatch.setattr(host, "c_compiler", lambda: "/usr/bin/gcc")
    monkeypatch.setattr(host, "python_header", lambda: False)
    found = one(checks.compiler())
    assert "Python.h is missing" in found.value
    assert found.stops
    monkeypatch.setattr(host, "python_header", lambda: True)
    assert one(checks.compiler()) == Finding("ok", "compiler", "/usr/bin/gcc")


def test_compilers_by_tritons_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """$CC and nothing else where it is set; gcc; clang."""
    for name in ("gcc", "clang"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert host.c_compiler() == str(tmp_path / "gcc")
    (tmp_path / "gcc").unlink()
    assert host.c_compiler() == str(tmp_path / "clang")
    monkeypatch.setenv("CC", "nowhere")
    assert host.c_compiler() is None


def test_triton_is_needed_on_a_gpu_alone(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "version_of", lambda _: None)
    assert one(checks.triton()).mark == "ok"
    gpu((9, 0))
    assert (one(checks.triton()).mark, one(checks.triton()).stops) == ("error", True)


def test_dali(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, str] = {}
    monkeypatch.setattr(host, "version_of", installed.get)
    monkeypatch.setattr("fastres.data.dali.dali_available", lambda: bool(installed))
    assert one(checks.dali()).mark == "ok"
    gpu((9, 0))
    assert (one(checks.dali()).mark, one(checks.dali()).stops) == ("note", False)
    installed["nvidia-dali-cuda130"] = "2.4.0"
    monkeypatch.setattr("fastres.data.dali.check_starts", lambda _: None)
    assert one(checks.dali()) == Finding("ok", "DALI", "nvidia-dali-cuda130 2.4.0")

    def fails(_: object) -> None:
        raise MachineError("DALI does not start: No module named 'optree'")

    with monkeypatch.context() as patch:
        patch.setattr("fastres.data.dali.check_starts", fails)
        assert (one(checks.dali()).mark, one(checks.dali()).stops) == ("error", False)
        assert "does not start: No module named 'optree'" in one(checks.dali()).value
    installed["nvidia-dali-cuda120"] = "2.4.0"
    both = one(checks.dali())
    assert (both.mark, both.stops) == ("error", True)
    assert "uninstall nvidia-dali-cuda120 nvidia-dali-cuda130 && " in both.remedy
    del installed["nvidia-dali-cuda120"]
    monkeypatch.setattr("fastres.data.dali.dali_available", lambda: False)
    assert "its files are gone" in one(checks.dali()).value


def test_a_python_without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "version_of", lambda _: None)
    monkeypatch.setattr(sys, "version_info", (3, 15, 0))
    assert "has no build for Python" in one(checks.dali()).value


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(checks.packages()) == []
    monkeypatch.setitem(sys.modules, "tomli_w", None)  # as if it were not there
    found = one(checks.packages())
    assert (found.mark, found.what, found.stops) == ("error", "tomli-w", True)
    assert found.remedy.endswith(" install --force-reinstall tomli-w")


def homeless() -> Path:
    raise MachineError("no cache folder: there is no home")


def test_bytecode_that_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept or not, found there it is used."""
    kept = tmp_path / "__init__.pyc"
    monkeypatch.setattr(importlib.util, "cache_from_source", lambda _: str(kept))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = one(checks.bytecode())
    assert (found.mark, found.stops) == ("note", False)
    assert found.remedy.endswith(f" -m compileall -qq -j 0 {Path(torch.__file__).parent.parent}")
    kept.touch()
    assert list(checks.bytecode()) == []
    kept.unlink()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert list(checks.bytecode()) == []


def test_how_packages_are_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clone = tmp_path / "my clone"
    monkeypatch.setattr(sys, "prefix", str(clone / ".venv"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert checks._pip() == f"VIRTUAL_ENV='{clone}/.venv' uv pip"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    assert checks._pip() == f"{sys.executable} -m pip"
    (clone / ".uv/bin").mkdir(parents=True)
    (clone / ".uv/bin/uv").touch()
    monkeypatch.chdir(clone)
    assert checks._pip() == ".uv/bin/uv pip"  # as the README has it
    monkeypatch.chdir(tmp_path)
    assert checks._pip() == "'my clone/.uv/bin/uv' pip"


def test_kernels_are_kept_where_it_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert host.kernel_cache_dir() == tmp_path / "cache"
    monkeypatch.setattr(host, "writable", lambda _: False)
    own = host.kernel_cache_dir()
    assert (own.parent, own.stat().st_mode & 0o777) == (tmp_path, 0o700)
    monkeypatch.setattr(host, "default_cache_dir", homeless)
    assert host.kernel_cache_dir() == own
    own.chmod(0o777)  # others may put code there
    with pytest.raises(MachineError, match="cannot be used; set FASTRES_CACHE to one"):
        host.kernel_cache_dir()
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(MachineError, match="cannot be used; set FASTRES_CACHE to one"):
        host.kernel_cache_dir()
    monkeypatch.setattr("os.getuid", lambda: 4321)
    (tmp_path / "fastres_4321").mkdir()  # somebody else's
    with pytest.raises(MachineError, match="fastres_4321 cannot be used; set FASTRES_CACHE to one"):
        host.kernel_cache_dir()


def test_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never fetched; what is pointed to and is none stops, what is not official is said."""
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    absent = one(checks.data(None))
    assert (absent.mark, absent.stops) == ("note", False)
    assert "--dataset synthetic" in absent.remedy
    with monkeypatch.context() as patch:
        patch.setattr(host, "writable", lambda _: False)
        nowhere = one(checks.data(None))
        assert (nowhere.mark, nowhere.stops) == ("error", True)
        assert nowhere.value == f"not here, and {tmp_path}/cache, where it would be downloaded to, cannot be written"
        patch.setattr(host, "default_cache_dir", homeless)
        assert one(checks.data(None)).value == "not here, and no cache folder: there is no home"
        assert one(checks.data(None)).stops
    wrong = one(checks.data(tmp_path / "nowhere"))
    assert (wrong.mark, wrong.stops) == ("error", True)
    assert "does not exist" in wrong.value
    monkeypatch.setenv("FASTRES_DATA", str(tmp_path / "variable"))
    assert "variable" in one(checks.data(None)).value
    for official in (True, False):
        images = SimpleNamespace(official=official, source="here", digest="sha256:0123456789abcdef0123")
        monkeypatch.setattr(cifar, "load_cifar10", lambda *_, images=images, **__: images)
        found = one(checks.data(tmp_path))
        assert (found.mark, "not the official files" in found.value) == (("ok", False) if official else ("note", True))
    monkeypatch.delenv("FASTRES_DATA")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / cifar.REMOTE.name).write_bytes(b"broken")

    def damaged(*_: object, **__: object) -> None:
        raise InputError("not a whole tar.gz")

    monkeypatch.setattr(cifar, "load_cifar10", damaged)
    broken = one(checks.data(None))
    assert (broken.mark, broken.stops) == ("error", False)  # the next run fetches it anew
    assert broken.remedy == f"rm {tmp_path}/cache/{cifar.REMOTE.name}"


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for free, mark, stops in ((5e9, "ok", False), (1e9, "note", False), (1e8, "error", True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        runs, cache = *checks.run_disk(), *checks.cache_disk()
        assert (runs.mark, runs.stops) == (mark, stops)
        assert not cache.stops
    monkeypatch.setattr("os.access", lambda *_: False)
    runs, cache = *checks.run_disk(), *checks.cache_disk()
    assert (runs.value, runs.stops, cache.stops) == (f"{tmp_path}/runs cannot be written", True, False)


def test_compile_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/var/inductor")
    assert one(checks.compile_cache()).value in ("/var/inductor", "/var/inductor cannot be written")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert "torchinductor_" in one(checks.compile_cache()).value
    assert "until that folder is emptied" in one(checks.compile_cache()).value
    monkeypatch.setattr("os.access", lambda *_: False)
    assert one(checks.compile_cache()).remedy.startswith("export TORCHINDUCTOR_CACHE_DIR=")


def test_tritons_cache(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu((9, 0))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    _, found = checks.compile_cache()
    assert (found.mark, found.what) == ("ok", "Triton cache")
    assert found.value.startswith(f"{tmp_path}/cache/triton")
    monkeypatch.setattr(host, "writable", lambda folder: tmp_path not in folder.parents)
    assert host.triton_cache_dir().is_relative_to(tmp_path / "tmp")
    monkeypatch.setattr(host, "writable", lambda folder: folder.name not in ("triton", "mine"))  # made by somebody else
    assert host.triton_cache_dir().is_relative_to(tmp_path / "tmp")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    _, found = checks.compile_cache()
    assert (found.mark, found.value) == ("error", f"{tmp_path}/mine cannot be written")


def test_what_linux_tells_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data-centre GPUs are 3D controllers (0x0302), desktop ones VGA; the open kernel module has a name of its own."""
    monkeypatch.undo()
    monkeypatch.setattr(driver, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert (driver.version(), driver.has_gpu()) == (None, False)
    proc, device = tmp_path / "proc/driver/nvidia/version", tmp_path / "sys/bus/pci/devices/0000:17:00.0"
    proc.parent.mkdir(parents=True)
    for module in (
        "NVIDIA UNIX x86_64 Kernel Module  580.65.06",
        "NVIDIA UNIX Open Kernel Module for x86_64  580.65.06",
    ):
        proc.write_text(f"NVRM version: {module}  Sun Jul 27 07:19:59 UTC 2025\nGCC version:  gcc version 12.3.0\n")
        assert driver.version() == "580.65.06"
    device.mkdir(parents=True)
    for vendor, kind, found in (
        ("0x10de", "0x030000", True),  # VGA
        ("0x10de", "0x030200", True),  # 3D controller: an H200
        ("0x10de", "0x040300", False),  # its sound
        ("0x8086", "0x030000", False),
    ):
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
        assert driver.has_gpu() == found


def test_the_cpp_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("g++", "clang++", "mine"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for wanted, found in (("mine", "mine"), ("nowhere", "g++")):
        monkeypatch.setenv("CXX", wanted)
        assert host.cpp_compiler() == str(tmp_path / found)


def test_writable_is_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert host.writable(tmp_path / "new" / "newer")
    assert not host.writable(tmp_path / "file")
    assert not host.writable(tmp_path / "file" / "below")


def test_torchs_cache_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "here")
    assert host.make_inductor_cache() == tmp_path / "here"


def test_cpu_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_info", {"cpu family": "6", "model": "207", "stepping": "2"}.__getitem__)
    assert host.cpu_id() == "6/207/2"
    monkeypatch.setattr(host, "cpu_info", lambda _: "")
    assert host.cpu_id() == ""


def test_both_dalis_stop_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "version_of", lambda _: "2.4.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = one(checks.dali())
    assert (found.mark, found.stops) == ("error", False)


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable, mark in ((None, "note"), (3_900_000_000, "note"), (4_100_000_000, "ok")):
        monkeypatch.setattr(memory, "usable_memory", lambda _, usable=usable: usable)
        assert one(checks.memory()).mark == mark
