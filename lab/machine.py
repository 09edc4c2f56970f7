"""This machine: what it is, what computes on it, and the memory that is free and was held."""

import os
import platform
import sys
from typing import Any


def facts() -> dict[str, Any]:
    """Python, platform, processors, and the accelerator as far as torch is loaded already (it is never imported for this)."""
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(), "device": device_name()}


def device_name() -> str:
    """What computes here, in words: the CUDA device that torch sees, else the CPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"cpu ({os.cpu_count()} cores)"


def free_memory() -> tuple[int, str]:
    """(bytes free now, the device's name): of the GPU, or of this machine."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], device_name()
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024, device_name()
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), device_name()


def peak_memory_mib() -> dict[str, float]:
    """The most memory this process has held: resident, and on the accelerator if torch has used one."""
    import resource

    per_mib = 1024 if sys.platform == "linux" else 1 << 20
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mib, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["device"] = round(torch.cuda.max_memory_allocated() / (1 << 20), 1)
    return peak
