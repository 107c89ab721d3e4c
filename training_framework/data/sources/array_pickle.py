"""Read pickles of arrays and plain containers without calling anything that they name.

This is Python's own unpickler with only the opcodes that arrays, numbers, text and containers need.
Calls go to the checked functions below, whose results are no larger than the file justifies.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["unpickle_arrays"]

_PLAIN = {
    "APPEND", "APPENDS", "BINBYTES", "BINBYTES8", "BINFLOAT", "BINGET", "BININT", "BININT1",
    "BININT2", "BINPUT", "BINSTRING", "BINUNICODE", "BINUNICODE8", "EMPTY_TUPLE", "FLOAT", "FRAME",
    "GET", "GLOBAL", "INT", "LIST", "LONG", "LONG1", "LONG4", "LONG_BINGET", "LONG_BINPUT",
    "MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "PUT", "SHORT_BINBYTES", "SHORT_BINSTRING",
    "SHORT_BINUNICODE", "STACK_GLOBAL", "STOP", "STRING", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "UNICODE",
}  # fmt: skip
_NAMES = {
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
    "__builtin__.bytes": "bytes",
    "builtins.bytes": "bytes",
} | {
    f"{core}.{name}": name.rpartition(".")[2].lstrip("_")
    for core in ("numpy.core", "numpy._core")
    for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
}
_CONTAINER_BYTES = 64
_ALLOWANCE_BYTES = 1 << 20


def unpickle_arrays(data: bytes) -> Any:
    """The content of a pickle of Python 2 or 3; text of Python 2 comes back as bytes.

    Arrays of numbers come back as writable arrays.

    Raises:
        pickle.UnpicklingError: It is damaged, or contains more than arrays, numbers, bytes, text,
            lists, tuples, and dictionaries whose keys are text, bytes or integers.
    """
    try:
        return _ArrayUnpickler(data).load()
    except _Refused:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise _Refused(f"damaged: {error or type(error).__name__}") from None


class _Refused(pickle.UnpicklingError):
    """A pickle contains something that is not allowed."""


class _Name(str):
    """A name that a pickled array refers to."""


class _Dtype:
    """A dtype of numbers; the byte order follows in its state."""

    def __init__(self, code: Any) -> None:
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", _text(code)):
            raise _Refused(f"an array of {_text(code)!r} is not allowed")
        self.dtype = np.dtype(_text(code))

    def set_state(self, state: Any) -> None:
        if tuple(state[2:5]) != (None, None, None) or _text(state[1]) not in "<>=|":
            raise _Refused("a dtype with parts is not allowed")
        self.dtype = self.dtype.newbyteorder(_text(state[1]))  # type: ignore[arg-type]


class _ArrayUnpickler(pickle._Unpickler):
    """Based on Python's unpickler in Python: a pickle can inflate the memo of the one in C."""

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._size = len(data)
        self._left = 2 * len(data) + _ALLOWANCE_BYTES  # text becomes bytes, which become an array

    def find_class(self, module: Any, name: Any) -> _Name:
        found = _NAMES.get(f"{module}.{name}")
        if found is None:
            raise _Refused(f"{module}.{name} is not allowed")
        return _Name(found)

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _Refused("it would take more memory than its size justifies")

    def _array(self, dtype: Any, raw: Any, shape: Any, order: str = "C") -> NDArray[Any]:
        if type(dtype) is not _Dtype or type(raw) not in (bytes, bytearray):
            raise _Refused("an array of objects is not allowed")
        if any(type(side) is not int or side < 0 for side in shape):
            raise _Refused("damaged: an array's shape is not a tuple of counts")
        if prod(shape) * dtype.dtype.itemsize != len(raw):
            raise _Refused("damaged: the size of an array does not match its shape")
        self._spend(len(raw))
        flat: NDArray[Any] = np.ndarray(prod(shape), dtype.dtype, bytes(raw)).copy()
        return flat.reshape(shape, order="F" if order == "F" else "C")

    def _call(self) -> None:
        """Push the result that the requested call would have."""
        arguments, name = self.stack.pop(), self.stack.pop()
        made: Any
        if type(name) is not _Name or type(arguments) is not tuple:
            raise _Refused(f"this call of {type(name).__name__} is not allowed")
        if name == "reconstruct" and arguments[:2] == ("ndarray", (0,)):
            made = np.empty(0, np.uint8)
        elif name == "dtype":
            made = _Dtype(arguments[0])
        elif name == "encode" and arguments[1:] == ("latin1",):
            self._spend(len(arguments[0]))
            made = _text(arguments[0]).encode("latin-1")
        elif name == "bytes" and not arguments:  # as the old protocols write b""
            made = b""
        elif name == "scalar":
            dtype, raw = arguments
            made = self._array(dtype, raw, ())[()]
        elif name == "frombuffer":
            raw, dtype, shape, order = arguments
            made = self._array(dtype, raw, shape, order)
        else:
            raise _Refused(f"this call of {name.upper()} is not allowed")
        self.append(made)

    def _set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is _Dtype:
            target.set_state(state)
        elif type(target) is np.ndarray:
            _, shape, dtype, fortran, raw = state
            array = self._array(dtype, raw, shape, "F" if fortran else "C")
            state = (1, shape, array.dtype, bool(fortran), bytes(raw))
            target.__setstate__(state)  # type: ignore[arg-type]
        else:
            raise _Refused(f"a state of a {type(target).__name__} is not allowed")

    def _set_items(self, count: int | None = None) -> None:
        items = self.pop_mark() if count is None else [self.stack.pop() for _ in range(count)][::-1]
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys might take long to hash, or recurse too deeply.
            if type(key) not in (str, bytes, int) or type(target) is not dict:
                raise _Refused(f"a key of type {type(key).__name__} is not allowed")
            target[key] = value

    def _start(self, load: Callable[[Any], None]) -> None:
        self._spend(_CONTAINER_BYTES)
        load(self)

    def _dictionary(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.stack.extend(items)
        self._set_items(len(items))

    def _byte_array(self) -> None:
        length = int.from_bytes(self.read(8), "little")
        content = self.read(min(length, self._size))
        if len(content) < length:
            raise _Refused("damaged: it ends too early")
        self.append(bytearray(content))

    def _refuse(self, name: str) -> None:
        raise _Refused(f"the opcode {name} is not allowed")


def _text(value: Any) -> str:
    text = value.decode("ascii") if type(value) is bytes else value
    if type(text) is not str:
        raise _Refused(f"a {type(value).__name__} is not allowed here")
    return text


_CHECKED: dict[str, Callable[[Any], None]] = {
    "REDUCE": _ArrayUnpickler._call,
    "BUILD": _ArrayUnpickler._set_state,
    "SETITEM": lambda self: self._set_items(2),
    "SETITEMS": _ArrayUnpickler._set_items,
    "DICT": _ArrayUnpickler._dictionary,
    "BYTEARRAY8": _ArrayUnpickler._byte_array,
}


def _loads() -> dict[int, Callable[[Any], None]]:
    """The function for each opcode."""
    loads: dict[int, Callable[[Any], None]] = {}
    for opcode in pickletools.opcodes:
        name, code = opcode.name, ord(opcode.code)
        if name in ("EMPTY_DICT", "EMPTY_LIST", "MARK"):
            loads[code] = partial(_ArrayUnpickler._start, load=pickle._Unpickler.dispatch[code])
        elif name in _PLAIN:
            loads[code] = pickle._Unpickler.dispatch[code]
        else:
            loads[code] = _CHECKED.get(name, partial(_ArrayUnpickler._refuse, name=name))
    return loads


_ArrayUnpickler.dispatch = _loads()
