"""Make two runs with the same seed equal."""

import os
import random
from typing import Any

import numpy as np
import torch

__all__ = [
    "random_states",
    "restore_random_states",
    "seed_everything",
    "use_deterministic_algorithms",
]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's own generators.

    The framework draws order and augmentation from counters (`data.draws`), which need no seeding.
    These generators are for the initial weights and for user code.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's own generators, as values for a checkpoint.

    User code may draw from them: dropout in a network, a loader that shuffles.

    Args:
        device: Device of the run; the state of its generator is included if it is a CUDA device.
    """
    name, key, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(key).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators to states from `random_states`.

    States from a run without a CUDA device leave the generator of a CUDA device unchanged.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: The states are invalid.
    """
    _, key, position, *_ = numpy = states["numpy"]
    if not (len(key) == 624 and 0 <= position <= 624):  # numpy itself only checks the length
        raise ValueError("NumPy's generator cannot have this state")
    np.random.set_state(numpy)  # noqa: NPY002
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def use_deterministic_algorithms(device_type: str) -> None:
    """Make PyTorch refuse algorithms whose results vary from run to run.

    On a CPU, the algorithms in use are deterministic for a fixed number of threads. cuDNN's
    benchmark mode chooses kernels by their speed, which varies, so it is turned off. On a CUDA GPU,
    call it before the first product of matrices: cuBLAS needs workspaces of its own for each
    stream, and without them PyTorch refuses every linear layer.
    """
    if device_type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=device_type == "mps")
    torch.backends.cudnn.benchmark = False
