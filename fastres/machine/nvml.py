"""What NVIDIA's management library knows of a GPU: energy and clocks.

https://docs.nvidia.com/deploy/nvml-api/
"""

import importlib
from typing import Any

import torch


def joules(device: torch.device) -> float:
    """Energy that the GPU used since its driver was loaded; 0.0 where nothing counts it (also before Volta)."""
    nvml = _library(device)
    if nvml is None:
        return 0.0
    try:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(_handle(nvml, device))) / 1e3  # it counts millijoules
    except nvml.NVMLError:
        return 0.0


def clocks(device: torch.device) -> dict[str, int]:
    """Clocks at this moment in MHz, and the power limit in watts; empty where nothing tells them."""
    nvml = _library(device)
    if nvml is None:
        return {}
    try:
        handle = _handle(nvml, device)
        return {
            "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "max_sm_clock_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_limit_watts": nvml.nvmlDeviceGetPowerManagementLimit(handle) // 1000,
        }
    except nvml.NVMLError:
        return {}


def _library(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    nvml = importlib.import_module("pynvml")  # of nvidia-ml-py; without types
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _handle(nvml: Any, device: torch.device) -> Any:
    """By the GPU's own name: CUDA_VISIBLE_DEVICES renumbers for torch, and not for NVML."""
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
