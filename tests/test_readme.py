"""The README says what is so: its commands run, its links lead somewhere; and the file tree is the real one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))]
SETUP = "python3 -m pip install -q --upgrade --target .uv uv && .uv/bin/uv run "

# Not run as they stand, and why. Everything else is run word for word.
DRY = "hours of training: run with --dry-run"
NOT_RUN = "changes the environment the tests run in, and needs a network"
EXCEPTIONS = {
    "fastres train": DRY,
    "fastres train --depth 110 --compile": DRY,
    "fastres train --model PlainNet56 --seed 1": DRY,
    "fastres train --model ImageNetResNet18 --preset fast": DRY,
    "fastres train --preset fast --epochs 4": DRY,
    "fastres train --depth 56 --device cuda:0 --precision bf16 --loader dali": DRY,
    "fastres train --data-dir path/to/cifar-10-batches-bin": DRY,
    "fastres train --val-split --steps 32000 --milestones 16000,24000": DRY,
    "fastres reproduce table6": DRY,
    "fastres reproduce fig6": DRY,
    "fastres reproduce fig7": DRY,
    ".uv/bin/uv pip uninstall nvidia-dali-cuda120": NOT_RUN,
    ".uv/bin/uv pip install nvidia-dali-cuda130": NOT_RUN,
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines()]


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a line in bash, with this environment's programs first on PATH, as `uv run` has it."""
    bin_dir = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(bin_dir.parent)}
    done = subprocess.run(["bash", "-c", command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"$ {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def test_quick_start_is_two_lines_that_set_themselves_up() -> None:
    first, second = commands()[:2]
    assert blocks("sh")[0].splitlines() == [first, second]
    assert first == f"{SETUP}fastres train --preset smoke"
    assert second == f"{SETUP}scripts/test"


def test_ci_runs_the_test_line_word_for_word() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[:2] == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."']
    assert code[2:] == [commands()[1]]


def test_every_exception_is_still_in_the_readme() -> None:
    assert [line for line in EXCEPTIONS if line not in commands()] == []


@pytest.mark.timeout(1200)  # the smoke preset trains for about a minute on two idle cores
def test_commands_run(tmp_path: Path) -> None:
    """All of them, in order, in one folder; of the quick start the part after the set-up, which CI runs for real."""
    test_line = commands()[1]
    for line in commands():
        if line != test_line and EXCEPTIONS.get(line) != NOT_RUN:
            shell(line.removeprefix(SETUP) + (" --dry-run" if EXCEPTIONS.get(line) == DRY else ""), tmp_path)
        if "--preset smoke" in line and SETUP in line:
            (result,) = tmp_path.glob("runs/*/result.json")
            assert json.loads(result.read_text())["test_error"] < 0.1  # where a linear classifier has over 0.5


def test_python_examples_run(tmp_path: Path) -> None:
    """The README's, and those that docstrings show are left to their module's tests."""
    examples = blocks("python")
    assert examples
    for example in examples:
        done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "test error" in done.stdout


def test_test_script_hands_arguments_to_pytest_and_fails_with_it(tmp_path: Path) -> None:
    line = str(ROOT / "scripts/test")
    assert re.search(r"\d+ passed", shell(f"{line} tests/test_architecture.py -k breach", tmp_path).stdout)
    (tmp_path / "test_bad.py").write_text("def test_bad():\n    assert False\n")
    bad = shell(f"! {line} -p no:cacheprovider {tmp_path}/test_bad.py", tmp_path)
    assert re.search(r"=+ 1 failed in .*=+$", bad.stdout.strip())


@pytest.mark.skipif(not shutil.which("ruff", path=Path(sys.executable).parent), reason="ruff is not installed here")
def test_check_script_passes(tmp_path: Path) -> None:
    shell(str(ROOT / "scripts/check"), tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = (ROOT / document).read_text()
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [t for t in targets if not (ROOT / document).parent.joinpath(t.partition("#")[0]).exists()]
    assert missing == []


def listed_files() -> set[str]:
    """Paths of the file tree at the end of CONTRIBUTING.md; two spaces of indentation a level."""
    found, folders = set(), list[str]()
    for line in blocks("text", (ROOT / "CONTRIBUTING.md").read_text())[-1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        path = "".join(folders[:depth]) + name
        folders = [*folders[:depth], name]
        found.add(path)
    return found


def test_file_tree_is_the_real_one() -> None:
    listed = listed_files()
    assert [path for path in sorted(listed) if not (ROOT / path).exists()] == []
    sources = [*ROOT.glob("fastres/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("scripts/*")]
    real = {str(path.relative_to(ROOT)) for path in sources if path.is_file() and not path.name.startswith("__")}
    assert sorted(real - listed) == []
