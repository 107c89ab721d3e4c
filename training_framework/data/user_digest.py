"""A cheap digest of a user's own loader, so that a resumed run notices another one."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["user_loader_digest"]

MAX_ROWS = 1024
MAX_BYTES = 1 << 24
MAX_DEPTH = 6
# Attributes in which loaders, samplers and data sets of PyTorch and torchvision keep their parts.
_PARTS = (
    "loader", "dataset", "datasets", "sampler", "batch_sampler", "batch_size", "drop_last",
    "shuffle", "replacement", "num_samples", "indices", "tensors", "data", "targets", "labels",
    "samples", "classes",
)  # fmt: skip


def user_loader_digest(loader: Iterable[Any]) -> str:
    """SHA-256 of a loader's attributes, as hexadecimal text. Loads no sample.

    It covers types, lengths, batch size, samplers (and so whether it shuffles). If the data set
    keeps tensors, arrays, labels or file names as PyTorch's and torchvision's do, it covers these
    too: whole up to 16 MiB, otherwise 1,024 evenly spread rows. It does not cover the samples that
    a user's own data set makes in its `__getitem__`.
    """
    digest = hashlib.sha256()
    _add(digest, loader, MAX_DEPTH, set())
    return digest.hexdigest()


def _add(digest: Any, value: Any, depth: int, seen: set[int]) -> None:
    if isinstance(value, Tensor):
        _add_tensor(digest, value.detach())
    elif isinstance(value, np.ndarray):
        _add_rows(digest, value)
    elif isinstance(value, str):
        # Without the folder: data may be moved.
        digest.update(b"s" + value.replace("\\", "/").rpartition("/")[2].encode(errors="replace"))
    elif value is None or isinstance(value, bool | int | float):
        digest.update(f"p{value!r};".encode())
    elif depth == 0 or id(value) in seen:
        digest.update(type(value).__qualname__.encode())
    elif isinstance(value, list | tuple | range):
        digest.update(f"l{len(value)};".encode())
        for index in _spread(len(value)):
            _add(digest, value[index], depth - 1, seen)
    else:
        _add_object(digest, value, depth, seen | {id(value)})


def _add_object(digest: Any, value: Any, depth: int, seen: set[int]) -> None:
    try:
        length = len(value)
    except (TypeError, NotImplementedError):
        length = -1
    # Without the module, which is __main__ in a started script.
    digest.update(f"o{type(value).__qualname__} {length};".encode())
    for name in _PARTS:
        try:
            part = getattr(value, name, None)
        except (RuntimeError, TypeError, ValueError, LookupError, NotImplementedError):
            continue  # a property of a user's class
        if part is not None and not callable(part):
            digest.update(name.encode())
            _add(digest, part, depth - 1, seen)


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"t{tensor.dtype} {tuple(tensor.shape)};".encode())
    if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return
    if tensor.nbytes > MAX_BYTES:
        tensor = tensor[_spread(len(tensor))]
    plain = tensor.cpu().contiguous().reshape(-1)
    digest.update(plain.view(torch.uint8).numpy())


def _add_rows(digest: Any, array: np.ndarray[Any, Any]) -> None:
    digest.update(f"a{array.dtype} {array.shape};".encode())
    if array.dtype.hasobject or not array.size:
        return
    if array.nbytes > MAX_BYTES:
        array = array[_spread(len(array))]
    digest.update(np.ascontiguousarray(array).tobytes())


def _spread(count: int) -> list[int]:
    """Evenly spread positions, at most MAX_ROWS, including the first and the last."""
    if count <= MAX_ROWS:
        return list(range(count))
    return [round(index * (count - 1) / (MAX_ROWS - 1)) for index in range(MAX_ROWS)]
