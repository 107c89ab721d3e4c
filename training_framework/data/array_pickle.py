"""Pickles of arrays and plain containers, read without running what they may hold."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["unpickle_arrays"]


def unpickle_arrays(data: bytes) -> Any:
    """What a pickle of Python 2 or 3 holds, with the text of Python 2 as bytes.

    Raises:
        Exception: It is damaged, or holds more than arrays, numbers, bytes, text and containers;
            a broken pickle raises whatever its bytes happen to say.
    """
    return _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding} is not allowed")
    return text.encode(encoding)


def _empty_bytes() -> bytes:
    """What the old protocols write `b""` as: a call of `bytes`, which here takes no argument."""
    return b""


def _admitted() -> dict[tuple[str, str], Callable[..., Any]]:
    """What a pickled dictionary of arrays and bytes is built with, by its pickled names."""
    reconstruct: Any = np.empty(0).__reduce__()[0]
    scalar: Any = np.int64(0).__reduce__()[0]
    from_buffer: Any = np.empty(0).__reduce_ex__(5)[0]
    admitted: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
        ("__builtin__", "bytes"): _empty_bytes,
        ("builtins", "bytes"): _empty_bytes,
    }
    for core in ("numpy.core", "numpy._core"):
        admitted[f"{core}.multiarray", "_reconstruct"] = reconstruct
        admitted[f"{core}.multiarray", "scalar"] = scalar
        admitted[f"{core}.numeric", "_frombuffer"] = from_buffer
    return admitted


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays and plain containers; refuses everything else, so a file can run no code."""

    _admitted = _admitted()

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return self._admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None
