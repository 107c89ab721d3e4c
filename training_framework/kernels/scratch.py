"""The memory and the threads that a call of the native kernels may use."""

import ctypes
import mmap
import os
import threading

import torch

__all__ = ["scratch_memory", "thread_count"]

HUGE_PAGE_BYTES = 2**21


class _Scratch(threading.local):
    """The memory of a thread, which is kept: fresh pages would cost more than the work on them.

    It is mapped, not allocated, so that the system can use huge pages for it. The mapping is
    private; otherwise forked processes would write to the same pages.
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
    """Whether this process has started OpenMP's threads, or lost them in a fork."""

    started_threads = False
    lost_threads = False


_scratch = _Scratch()


def scratch_memory(floats: int) -> int:
    """Address of memory for so many fp32 numbers, valid until this thread's next call.

    Raises:
        RuntimeError: There is not enough memory; the message is like that of torch's allocator.
    """
    return _scratch.of(floats)


def thread_count() -> int:
    """Threads for a kernel: PyTorch's number, or one in a fork of a process with threads."""
    threads = 1 if _Process.lost_threads else torch.get_num_threads()
    _Process.started_threads |= threads > 1
    return threads


def _continue_with_one_thread() -> None:
    """Use one thread after a fork, which loses OpenMP's threads: its runtime would wait for ever.

    The same holds for PyTorch's operators, so the whole process continues with one thread.
    """
    if _Process.started_threads:
        _Process.lost_threads = True
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_continue_with_one_thread)
