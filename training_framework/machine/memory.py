"""Memory: how much is in use, and keeping what tensors free for the next step's tensors."""

import contextlib
import ctypes
import functools
import os
import platform
from pathlib import Path

import psutil
import torch

__all__ = ["can_keep_freed_memory", "keep_freed_memory", "memory_in_use", "peak_memory"]

# Parameters of glibc's mallopt (mallopt(3)).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def can_keep_freed_memory() -> bool:
    """Whether this process allocates by glibc, which can be told so."""
    return platform.libc_ver()[0] == "glibc"


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep freed memory, for good, instead of giving it back to the system.

    A step's activations are large, so that malloc gives them back when they are freed; the next
    step then takes new pages, each of which the system must clear and map. The price: what the
    process once needed it holds until its end.

    Returns:
        Whether that could be done.
    """
    if not can_keep_freed_memory():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak of PyTorch's allocations on a CUDA device, else this process's resident set.

    The peak is that since the start of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _this_process(os.getpid()).memory_info().rss


@functools.cache
def _this_process(pid: int) -> psutil.Process:
    """Kept, since finding a process takes longer than asking it; by its number, for forks."""
    return psutil.Process(pid)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch had allocated on a CUDA device since its counter was reset.

    Elsewhere the highest resident set of this process so far, or where the system keeps no such
    count, the present one.
    """
    if device.type != "cuda":
        with contextlib.suppress(OSError, IndexError, ValueError):
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return memory_in_use(device)
