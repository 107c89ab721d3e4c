"""Recognize errors caused by full memory."""

import re

__all__ = ["memory_shortage"]

# PyTorch's messages for full memory of the host, of CUDA, NCCL and mps. Without memory, cuBLAS
# cannot start, and cuDNN has no kernel that fits. If oneDNN has no memory for a kernel, its message
# is only that it could not create it.
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
    """The message of an error caused by full memory, with its numbers; None for other errors.

    A host that overcommits memory raises no error: the kernel kills the process instead.
    """
    text = " ".join(str(error).split())
    # By name: torch's class has several import paths, and numpy has its own class.
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    has_sign = text == _ONEDNN_SIGN or any(sign in text.lower() for sign in _SIGNS)
    if not known and not (isinstance(error, RuntimeError) and has_sign):
        return None
    text = re.sub(r"^\[enforce fail at [^\]]*\][^:]*?(?=DefaultCPUAllocator)", "", text)
    # Cut off advice on PyTorch's allocator and addresses in its code.
    text = re.split(r" Including non-PyTorch| Of the allocated| Error code| If reserved", text)[0]
    return text.rstrip(". ") or type(error).__name__
