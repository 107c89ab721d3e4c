"""C++ kernels, compiled on the user's machine, for what PyTorch computes slowly on CPUs."""

from training_framework.kernels.compiler import NativeKernelsError

__all__ = ["NativeKernelsError"]
