"""Kernels in C++ that are compiled on the user's machine, for what PyTorch does slowly on a CPU."""

from training_framework.kernels.compiler import NativeKernelsError

__all__ = ["NativeKernelsError"]
