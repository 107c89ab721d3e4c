"""Check operands before native kernels, which receive bare addresses, read them."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_operand", "is_readable"]


def is_readable(tensor: Tensor) -> bool:
    """Whether the kernels can read a tensor's numbers: fp32, on the CPU, dense."""
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def check_operand(operator: str, name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Check a tensor before its address is given to a kernel.

    Args:
        operator: Name of the operator, for the message.
        name: Name of its argument, for the message.
        tensor: The argument; it may have any strides.
        shape: The required size of each dimension; None: any size.

    Raises:
        RuntimeError: The kernels cannot read it, or it has another shape. Torch's own operators
            raise the same.
    """
    if not is_readable(tensor):
        raise RuntimeError(
            f"{operator}: expected {name} to be a dense torch.float32 tensor on the CPU, "
            f"but it is {tensor.dtype} on {tensor.device} ({tensor.layout})"
        )
    fits = len(shape) == tensor.dim() and all(
        size in (None, given) for size, given in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise RuntimeError(
            f"{operator}: expected {name} of shape ({sizes}), but it has {tuple(tensor.shape)}"
        )
