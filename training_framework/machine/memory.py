"""Measure memory in use, and keep freed memory for the tensors of the next step."""

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
_MAX_INT = 2**31 - 1


def can_keep_freed_memory() -> bool:
    """Whether this process allocates with glibc, which can be told to keep freed memory."""
    return platform.libc_ver()[0] == "glibc"


@functools.cache
def keep_freed_memory() -> bool:
    """Make this process keep freed memory until its end instead of returning it to the system.

    The activations of a step are so large that malloc returns them to the system when they are
    freed. The next step then needs new pages, each of which the system must clear and map. The
    price: the process never uses less memory than it once needed.

    Returns:
        Whether it succeeded.
    """
    if not can_keep_freed_memory():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MAX_INT))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: on a CUDA device, PyTorch's peak since the start of the process.

    On other devices, the present resident set of this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _this_process(os.getpid()).memory_info().rss


@functools.cache
def _this_process(pid: int) -> psutil.Process:
    """Cached, since finding a process takes longer than querying it; by number, for forks."""
    return psutil.Process(pid)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: on a CUDA device, PyTorch's peak since its counter was reset.

    On other devices, the largest resident set of this process so far; if the system does not record
    that, the present one.
    """
    if device.type != "cuda":
        with contextlib.suppress(OSError, IndexError, ValueError):
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return memory_in_use(device)
