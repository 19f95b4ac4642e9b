"""What machine, which versions and which commit a result comes from."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastres import __version__
from fastres.machine import driver, host
from fastres.runtime import Runtime


def environment(runtime: Runtime) -> dict[str, Any]:
    """Machine, versions and commit, as JSON values, for `environment.json` and benchmark results."""
    cuda = runtime.device.type == "cuda"
    return {
        "fastres": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,  # type: ignore[no-untyped-call]
        "numpy": host.version_of("numpy"),
        "dali": host.version_of("nvidia-dali-cuda120") or host.version_of("nvidia-dali-cuda130"),
        "gpu": torch.cuda.get_device_name(runtime.device) if cuda else None,
        "driver": driver.version() if cuda else None,
        "cpu": host.cpu_name(),
        "cpu_id": host.cpu_id(),
        "cores": host.num_cores(),
        "threads": runtime.threads,
        **runtime.to_dict(),
        "platform": platform.platform(),
    }


def _commit() -> str | None:
    """The commit of the source tree that runs, with "+" where files differ from it; None where nothing says.

    A copy without its .git, or where git says nothing, may be told by FASTRES_COMMIT.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists() and (commit := _git(root, "rev-parse", "HEAD")):
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        return commit + ("" if changed == "" else "+")  # None: git did not say, so they may
    return os.environ.get("FASTRES_COMMIT") or None


def _git(root: Path, *command: str) -> str | None:
    """The first line that git prints; None where it fails."""
    # Of this tree: not of the one whose hook runs this, and also where another user owns it, as in a container.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    line = ["git", "-c", f"safe.directory={root}", "-C", str(root), *command]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=10, check=True, env=env)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0]
