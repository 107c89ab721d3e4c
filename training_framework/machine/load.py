"""Who used the processor while a sample was taken: this process, or others."""

import contextlib
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import psutil

__all__ = ["MachineLoad", "MachineWatch", "neighbours_note"]

# One busy process on four cores; less is the usual noise of a system.
NOTEWORTHY_SHARE = 0.2


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

    @property
    def seconds(self) -> float:
        """Since the start of the window."""
        return time.perf_counter() - self._start

    def stop(self) -> MachineLoad:
        """End the window."""
        seconds = self.seconds
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


def neighbours_note(other_cpu_share: float, cores: int, threads: int) -> str:
    """What to tell of other processes that take the cores a training is to run on; empty if none.

    Args:
        other_cpu_share: As in `MachineLoad`.
        cores: That this process may run on.
        threads: Of the training.
    """
    if other_cpu_share < NOTEWORTHY_SHARE:
        return ""
    taken = other_cpu_share * cores
    free = max(1, cores - math.ceil(taken - NOTEWORTHY_SHARE))
    cure = f"end them or set threads to {free}" if threads > free else "end them to train faster"
    return (
        f"other processes keep {taken:.1f} of the {cores} cores busy, which can make a step take "
        f"three times as long; {cure}"
    )
