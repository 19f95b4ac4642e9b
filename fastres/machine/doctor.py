"""What works on this machine, what does not, and what to type: `fastres doctor`.

Each check stands alone: an exception in one becomes its line, and the others go on.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastres.errors import FastresError, first_line
from fastres.machine import checks
from fastres.machine.checks import Finding


@dataclass(frozen=True)
class Examination:
    """What was found, and what `fastres train` will do; `possible` is whether it can."""

    findings: list[Finding]
    verdict: str
    possible: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def examine(data_dir: Path | None = None) -> Examination:
    """Look at everything that training needs.

    Args:
        data_dir: Where CIFAR-10 lies; default: as `fastres train` looks for it, but for the network.
    """
    looks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("system", checks.system),
        ("torch", checks.torch_build),
        ("bytecode", checks.bytecode),
        ("packages", checks.packages),
        ("GPU", checks.gpus),
        ("driver", checks.nvidia_driver),
        ("CPU", checks.cpu),
        ("memory", checks.memory),
        ("compiler", checks.compiler),
        ("Triton", checks.triton),
        ("DALI", checks.dali),
        ("CIFAR-10", lambda: checks.data(data_dir)),
        ("disk, runs", checks.run_disk),
        ("disk, data cache", checks.cache_disk),
        ("compile cache", checks.compile_cache),
    ]
    findings = [finding for what, check in looks for finding in _isolated(what, check)]
    if any(finding.stops for finding in findings):
        stopping = ", ".join(dict.fromkeys(finding.what for finding in findings if finding.stops))
        return Examination(findings, f"fastres train cannot run here yet; see {stopping} above", possible=False)
    try:
        return Examination(findings, f"fastres train will use: {_plan()}", possible=True)
    except FastresError as error:
        return Examination(findings, f"fastres train cannot run here yet: {error}", possible=False)
    except Exception as error:  # noqa: BLE001 (the report never fails itself)
        return Examination(
            findings, f"fastres train: what it will do is not known ({first_line(error)})", possible=False
        )


def _isolated(what: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """A check's findings; torch's warnings, which say what a finding says better, are not shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(check())
    except Exception as error:  # noqa: BLE001 (the other checks go on)
        return [Finding("note", what, f"cannot be checked: {first_line(error)}")]


def _plan() -> str:
    """What `fastres train` resolves to here."""
    from fastres.build import loader_kind
    from fastres.config import RunConfig
    from fastres.resolve import prepare_unchecked

    config = RunConfig()
    runtime = prepare_unchecked(config)  # the kernels are checked, and compiled, where a run begins
    compiled = "eager" if runtime.compile_scope == "none" else f"compiled ({runtime.compile_scope})"
    parts = [str(runtime.device), runtime.precision, f"{loader_kind(config.execution, runtime)} loader", compiled]
    if runtime.cuda_graph:
        parts.append("a step as one CUDA graph")
    if runtime.native:
        parts.append("fastres' own kernels")
    if runtime.device.type == "cpu":
        parts.append(f"{runtime.threads} thread{'s' if runtime.threads > 1 else ''}")
    return ", ".join(parts)
