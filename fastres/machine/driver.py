"""What NVIDIA driver there is, asked without torch."""

import ctypes
import re
import sys
from pathlib import Path


def newest_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver can run; None without a driver."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0 or not number.value:
        return None
    return number.value // 1000, number.value % 1000 // 10


def version() -> str | None:
    """The driver's own version, where Linux tells it."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", path.read_text()) if path.exists() else None
    return found[1] if found else None


def has_gpu() -> bool:
    """Whether there is one at all, by the vendor that PCI devices name (Linux)."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    classes = [(path.read_text().strip(), (path.parent / "class").read_text().strip()) for path in vendors]
    return any(vendor == "0x10de" and kind.startswith(("0x0300", "0x0302")) for vendor, kind in classes)
