"""How much memory a process has, and had, on a GPU or on the host."""

import os
import sys
from pathlib import Path

import torch

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # bytes


def reset_peak_memory(device: torch.device) -> None:
    """Begin `peak_memory` anew on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU since `reset_peak_memory`, or that this process ever held in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes  # macOS counts bytes


def usable_memory(device: torch.device) -> int | None:
    """Bytes that this process can have in all, what it holds already included; None where nothing tells.

    On a GPU what other processes leave of it; on a host what is available now, within the limits of its control group
    and of `ulimit -v`.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    meminfo, statm = Path("/proc/meminfo"), Path("/proc/self/statm")
    if not (meminfo.exists() and statm.exists()):  # macOS: of the whole machine
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    limits = [number for path in CGROUP_LIMITS if path.exists() and (number := path.read_text().strip()).isdigit()]
    sizes = [int(number) for number in limits]
    mapped, held = (int(pages) * resource.getpagesize() for pages in statm.read_text().split()[:2])
    if (address_space := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        sizes.append(address_space - mapped + held)  # libraries are mapped whole and held in part
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return min([*sizes, 1024 * int(available.split()[1]) + held])
