"""A cheap digest of a user's own loader, so that a resumed run notices another one."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

__all__ = ["user_loader_digest"]

MAX_ROWS = 1024
MAX_BYTES = 1 << 24
MAX_DEPTH = 6
# Attributes in which loaders, samplers and data sets of PyTorch and torchvision keep their parts.
_PARTS = (
    "loader", "dataset", "datasets", "sampler", "batch_sampler", "batch_size", "drop_last",
    "shuffle", "replacement", "num_samples", "indices", "tensors", "data", "targets", "labels",
    "samples", "classes", "collate_fn", "transform", "target_transform", "transforms",
)  # fmt: skip
_NUMBERS = (bool, int, float, complex, np.number)
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_DATA = (Tensor, np.ndarray, list, tuple, range, Dataset, Sampler, *_FUNCTIONS)
# What a loader's, a sampler's or a data set's `set_epoch` sets, by custom.
_OF_THE_EPOCH = "epoch"


def user_loader_digest(loader: Iterable[Any]) -> str:
    """SHA-256 of a loader's attributes, as hexadecimal text. Loads no sample.

    It covers types, lengths, batch size, samplers (and so whether it shuffles), and the tensors,
    arrays, labels, file names and plain numbers that loader, data set and transforms keep as
    attributes: whole up to 16 MiB, otherwise 1,024 evenly spread rows. Of a function it covers the
    name, which all lambdas of one function share. It does not cover text under names other than the
    usual ones, dicts among the attributes, which are usually caches, nor what a data set computes
    in its `__getitem__`.
    """
    digest = hashlib.sha256()
    _add(digest, loader, MAX_DEPTH, set())
    return digest.hexdigest()


def _add(digest: Any, value: Any, depth: int, seen: set[int]) -> None:
    if isinstance(value, Tensor):
        _add_tensor(digest, value.detach())
    elif isinstance(value, np.ndarray):
        _add_rows(digest, value)
    elif hasattr(type(value), "to_numpy"):  # a data frame
        _add_rows(digest, np.asarray(value.to_numpy()))
    elif (text := _plain_text(value)) is not None:
        digest.update(text.encode(errors="replace"))
    elif depth == 0 or id(value) in seen:
        digest.update(type(value).__qualname__.encode())
    elif isinstance(value, list | tuple | range):
        _add_items(digest, value, depth, seen)
    elif isinstance(value, Mapping):
        _add_items(digest, list(value.items()), depth, seen)
    else:
        _add_object(digest, value, depth, seen | {id(value)})


def _plain_text(value: Any) -> str | None:
    """Text that is the same in every process; None for what has none."""
    if isinstance(value, str | PurePath):
        # Without its folder: data may be moved.
        return "s" + str(value).replace("\\", "/").rpartition("/")[2]
    if isinstance(value, _FUNCTIONS):
        return f"f{value.__qualname__};"
    if value is None or isinstance(value, _NUMBERS):
        return f"p{value!r};"
    return None


def _add_items(digest: Any, items: Sequence[Any], depth: int, seen: set[int]) -> None:
    digest.update(f"l{len(items)};".encode())
    if len(items) > MAX_ROWS and set(map(type, items)) == {int}:  # labels, as a rule
        digest.update(repr(items).encode())
        return
    for index in _spread(len(items)):
        _add(digest, items[index], depth - 1, seen)


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
        # A method is not a part. A transform is one, although it can be called.
        if part is not None and not isinstance(part, MethodType | BuiltinFunctionType | type):
            digest.update(name.encode())
            _add(digest, part, depth - 1, seen)
    for name, part in sorted(_own_attributes(value)):
        digest.update(name.encode())
        _add(digest, part, depth - 1, seen)


def _own_attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Those that hold data of an object whose class is not PyTorch's, by name."""
    if type(value).__module__.partition(".")[0] == "torch":
        return
    for name, part in getattr(value, "__dict__", {}).items():
        is_setting = isinstance(part, _NUMBERS) and not name.startswith("_")
        if name not in _PARTS and (
            (is_setting and name != _OF_THE_EPOCH)
            or isinstance(part, _DATA)
            or hasattr(type(part), "to_numpy")
        ):
            yield name, part


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"t{tensor.dtype} {tuple(tensor.shape)};".encode())
    if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return
    if tensor.nbytes > MAX_BYTES:
        tensor = tensor[_spread(len(tensor))]
    plain = tensor.cpu().contiguous().reshape(-1)
    digest.update(plain.view(torch.uint8).numpy())


def _add_rows(digest: Any, array: np.ndarray[Any, Any]) -> None:
    if array.dtype.kind in "OSU":  # names, as a rule
        _add(digest, array.tolist(), MAX_DEPTH, set())
        return
    digest.update(f"a{array.dtype} {array.shape};".encode())
    if not array.size:
        return
    if array.nbytes > MAX_BYTES:
        array = array[_spread(len(array))]
    digest.update(np.ascontiguousarray(array).tobytes())


def _spread(count: int) -> list[int]:
    """Evenly spread positions, at most MAX_ROWS, including the first and the last."""
    if count <= MAX_ROWS:
        return list(range(count))
    return [round(index * (count - 1) / (MAX_ROWS - 1)) for index in range(MAX_ROWS)]
