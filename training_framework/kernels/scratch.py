"""Memory and threads that a call of the native kernels may use."""

import ctypes
import mmap
import os
import threading

import torch

__all__ = ["scratch_memory", "thread_count"]

HUGE_PAGE_BYTES = 2**21


class _Scratch(threading.local):
    """A thread's memory, kept and grown: fresh pages would cost more than the work on them.

    It is mapped, not allocated, so that the system may back it with huge pages. Private, since
    processes that were forked would write into the same pages otherwise.
    """

    size = 0
    address = 0

    def of(self, floats: int) -> int:
        needed = 4 * floats + HUGE_PAGE_BYTES
        if needed > self.size:
            try:
                self.memory = mmap.mmap(-1, needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, OverflowError):
                raise RuntimeError(
                    f"native kernels: can't allocate memory: {needed} bytes of scratch"
                ) from None
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self.memory.madvise(mmap.MADV_HUGEPAGE)
            start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
            self.size, self.address = needed, -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        return self.address


class _Process:
    """What this process has done with OpenMP's threads."""

    started_threads = False
    lost_threads = False


_scratch = _Scratch()


def scratch_memory(floats: int) -> int:
    """Address of room for so many fp32 numbers, of this thread, until its next call.

    Raises:
        RuntimeError: There is no such memory; the message is like that of torch's allocator.
    """
    return _scratch.of(floats)


def thread_count() -> int:
    """Threads for a kernel: PyTorch's number, and one in a process forked from one with threads."""
    threads = 1 if _Process.lost_threads else torch.get_num_threads()
    _Process.started_threads |= threads > 1
    return threads


def _go_on_with_one_thread() -> None:
    """OpenMP's threads do not come along in a fork, but its runtime waits for them, for ever.

    That holds for PyTorch's operators too, so all of the process goes on with one.
    """
    if _Process.started_threads:
        _Process.lost_threads = True
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_go_on_with_one_thread)
