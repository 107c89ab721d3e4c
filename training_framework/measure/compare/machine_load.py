"""Who used the processor while a sample was taken: this process, or others."""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from training_framework.machine.hardware import memory_in_use

__all__ = ["MachineLoad", "MachineWatch", "peak_memory"]


@dataclass(frozen=True, kw_only=True)
class MachineLoad:
    """Use of the CPU over a window.

    Attributes:
        cpu_seconds: CPU time of this process and its children.
        other_cpu_share: Share of the cores this process may run on that everything else took, 0 to
            1; what a hypervisor took away counts as others'.
    """

    cpu_seconds: float
    other_cpu_share: float


class MachineWatch:
    """Measures the use of the CPU from `start` to `stop`.

    The system counts in ticks of 10 ms, so windows should last some tenths of a second.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._cores = _usable_cores()

    def start(self) -> None:
        """Begin a window."""
        self._own, self._busy = self._own_seconds(), self._busy_seconds()
        self._start = time.perf_counter()

    def stop(self) -> MachineLoad:
        """End the window."""
        seconds = time.perf_counter() - self._start
        own, busy = self._own_seconds() - self._own, self._busy_seconds() - self._busy
        others = max(0.0, busy - own) / (seconds * len(self._cores))
        return MachineLoad(cpu_seconds=own, other_cpu_share=min(1.0, others))

    def _own_seconds(self) -> float:
        times = self._process.cpu_times()
        total = times.user + times.system + times.children_user + times.children_system
        for child in self._process.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended and counts above from now on
                child_times = child.cpu_times()
                total += child_times.user + child_times.system
        return total

    def _busy_seconds(self) -> float:
        cores = psutil.cpu_times(percpu=True)
        return sum(_busy(cores[index]) for index in self._cores if index < len(cores))


def _usable_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(psutil.cpu_count() or 1))


def _busy(times: Any) -> float:
    # A guest's time is part of user time already.
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return sum(times) - idle - guests


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
