"""Keeping the host memory that tensors free, for the next step's tensors."""

import ctypes
import functools
import platform

__all__ = ["can_keep_freed_memory", "keep_freed_memory"]

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
