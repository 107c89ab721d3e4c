"""The precisions of a forward pass."""

import contextlib
import warnings
from typing import Any, Literal

import torch

__all__ = [
    "Fp32Precision",
    "Precision",
    "ProductFormat",
    "autocast",
    "compute_dtype",
    "product_format",
    "set_fp32_precision",
]

Precision = Literal["32", "bf16-mixed", "16-mixed"]
Fp32Precision = Literal["ieee", "tf32"]
ProductFormat = Literal["fp32", "tf32", "bf16", "fp16"]
"""What convolutions and matrix products multiply; all of them add up in fp32."""

_NO_CONTEXT = contextlib.nullcontext()
_DTYPES = {"32": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype of the matrix products and convolutions."""
    return _DTYPES[precision]


def product_format(precision: Precision, fp32_precision: Fp32Precision) -> ProductFormat:
    """What convolutions and matrix products multiply."""
    if precision == "32":
        return "tf32" if fp32_precision == "tf32" else "fp32"
    return "bf16" if precision == "bf16-mixed" else "fp16"


def set_fp32_precision(value: Fp32Precision) -> None:
    """Let CUDA multiply fp32 numbers as TF32, or not: convolutions and matrix products alike.

    PyTorch's own setting is TF32 for convolutions and IEEE fp32 for matrix products.

    We use the older of PyTorch's two sets of switches. It sets the newer one too
    (`torch.backends.*.fp32_precision`), and then both can be read. The newer set leaves the older
    one behind, and PyTorch raises where its own compiler reads that (PyTorch's issues 166387 and
    179445).
    """
    allowed = value == "tf32"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


def autocast(device_type: str, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass; weights stay in fp32. A no-op for precision 32."""
    if precision == "32":
        return _NO_CONTEXT
    return torch.autocast(device_type, dtype=_DTYPES[precision])
