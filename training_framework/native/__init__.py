"""Kernels in C++ that are compiled on the user's machine, for what PyTorch does slowly on a CPU."""

from training_framework.native.library import NativeKernelsError

__all__ = ["NativeKernelsError"]
