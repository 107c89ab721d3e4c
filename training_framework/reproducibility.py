"""Everything that makes two runs with one seed equal."""

import random

import numpy as np
import torch

__all__ = ["seed_everything", "use_deterministic_algorithms"]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's own generators.

    The framework draws order and augmentation from counters (`data.draws`), which need no seeding;
    this is for the initial weights and for user code.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def use_deterministic_algorithms(device_type: str) -> None:
    """Let PyTorch refuse algorithms whose results vary from run to run.

    On a CPU the algorithms in use are deterministic for a fixed number of threads. cuDNN's
    benchmark mode picks kernels by their speed, which varies, so it is off then.
    """
    torch.use_deterministic_algorithms(True, warn_only=device_type == "mps")
    torch.backends.cudnn.benchmark = False
