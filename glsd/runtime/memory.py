"""Peak memory of this process since a mark: what torch allocated on a GPU, the resident size on a CPU."""

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


def mark_memory(device: torch.device) -> int:
    """Forget the peak so far and return the bytes held now, for ``grown_since``.

    Where the system cannot forget it (not Linux), the peak so far is returned: what stays below it is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        _RESET.write_text("5")  # the peak becomes the size of now, see proc(5)
    return _peak_resident()


def grown_since(mark: int, device: torch.device) -> int:
    """Return by how many bytes the peak since ``mark_memory`` exceeds what was held then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - mark
    return max(0, _peak_resident() - mark)


def total_memory(device: torch.device) -> int:
    """Return the bytes of the GPU, or of this machine's main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peak_resident() -> int:
    # Not ru_maxrss where it can be helped: a process inherits that one from the parent that started it.
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
