"""The precisions of a forward pass."""

import contextlib
from typing import Any, Literal

import torch

__all__ = ["Precision", "autocast", "compute_dtype"]

Precision = Literal["32", "bf16-mixed", "16-mixed"]

_NO_CONTEXT = contextlib.nullcontext()
_DTYPES = {"32": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype of the matrix products and convolutions."""
    return _DTYPES[precision]


def autocast(device_type: str, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass; weights stay in fp32. A no-op for precision 32."""
    if precision == "32":
        return _NO_CONTEXT
    return torch.autocast(device_type, dtype=_DTYPES[precision])
