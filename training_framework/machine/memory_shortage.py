"""Telling a memory that is full from every other error."""

import re

__all__ = ["memory_shortage"]

# PyTorch's words for host memory, for CUDA's, NCCL's and mps's own errors, and for libraries of a
# CUDA device that find no memory: cuBLAS then cannot start, and cuDNN has no kernel that fits.
# oneDNN says of a kernel that it has no room for just that it could not create it.
_SIGNS = (
    "can't allocate memory",
    "can't start new thread",
    "out of memory",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_alloc_failed",
    "unable to find an engine",
)
_ONEDNN_SIGN = "could not create a primitive"


def memory_shortage(error: BaseException) -> str | None:
    """What an error says of a memory that is full, with its numbers; None for any other error.

    A host that overcommits its memory raises nothing: the kernel kills the process instead.
    """
    text = " ".join(str(error).split())
    # Its name, since torch's class is found at several places and numpy has one of its own.
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    said = text == _ONEDNN_SIGN or any(sign in text.lower() for sign in _SIGNS)
    if not known and not (isinstance(error, RuntimeError) and said):
        return None
    text = re.sub(r"^\[enforce fail at [^\]]*\][^:]*?(?=DefaultCPUAllocator)", "", text)
    # What follows is advice on PyTorch's allocator and addresses in its code.
    text = re.split(r" Including non-PyTorch| Of the allocated| Error code| If reserved", text)[0]
    return text.rstrip(". ") or type(error).__name__
