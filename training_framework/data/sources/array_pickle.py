"""Pickles of arrays and plain containers, read without calling anything that they name.

The opcodes are taken one by one (`pickletools` splits them) and do here what they say only as far
as arrays, numbers, text and containers need it. No class of the pickle is looked up, no function of
it is called, numpy is handed nothing but checked dtypes and bytes, and what is made is no larger
than the file, however often its parts are referred to.
"""

import pickle
import pickletools
import re
from enum import Enum
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["unpickle_arrays"]


def unpickle_arrays(data: bytes) -> Any:
    """What a pickle of Python 2 or 3 holds, with the text of Python 2 as bytes.

    Arrays of numbers come back as writable arrays.

    Raises:
        pickle.UnpicklingError: It is damaged, or holds more than arrays, numbers, bytes, text,
            lists, tuples, and dictionaries whose keys are text, bytes or integers.
    """
    try:
        return _Machine(len(data)).run(data)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise pickle.UnpicklingError(f"damaged: {error}") from None


class _Name(Enum):
    """The names that a pickled array refers to, and what stands for them here."""

    NDARRAY = 1
    DTYPE = 2
    RECONSTRUCT = 3
    FROM_BUFFER = 4
    SCALAR = 5
    ENCODE = 6
    BYTES = 7


_NAMES = {
    ("numpy", "ndarray"): _Name.NDARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
    ("_codecs", "encode"): _Name.ENCODE,
    ("__builtin__", "bytes"): _Name.BYTES,
    ("builtins", "bytes"): _Name.BYTES,
    **{
        (f"{core}.{module}", name): meaning
        for core in ("numpy.core", "numpy._core")
        for module, name, meaning in (
            ("multiarray", "_reconstruct", _Name.RECONSTRUCT),
            ("multiarray", "scalar", _Name.SCALAR),
            ("numeric", "_frombuffer", _Name.FROM_BUFFER),
        )
    },
}
_PLAIN = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_PYTHON_2_TEXT = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Dtype:
    """A dtype of numbers; its byte order comes with its state."""

    def __init__(self, code: Any) -> None:
        self.code = _text(code)
        self.order = "="
        if not re.fullmatch(r"b1|[iuf][1248]", self.code) or self.code == "f1":
            raise pickle.UnpicklingError(f"an array of {self.code!r} is not allowed")

    def set_state(self, state: Any) -> None:
        version, order, subarray, names, fields = state[:5]
        if (subarray, names, fields) != (None, None, None) or _text(order) not in "<>=|":
            raise pickle.UnpicklingError(f"a dtype of version {version} with parts is not allowed")
        self.order = _text(order)

    def read(self, raw: Any, shape: Any) -> NDArray[Any]:
        dtype = np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]
        if type(raw) not in (bytes, bytearray) or type(shape) is not tuple:
            raise pickle.UnpicklingError("an array of objects is not allowed")
        if any(type(side) is not int or side < 0 for side in shape):
            raise pickle.UnpicklingError("an array's shape is no tuple of counts")
        if prod(shape) * dtype.itemsize != len(raw):
            raise pickle.UnpicklingError("an array's bytes are not those of its shape")
        array: NDArray[Any] = np.ndarray(prod(shape), dtype, bytes(raw)).copy()
        return array


class _Unfinished:
    """An array whose state is still to come, and the places in the memo that refer to it."""

    def __init__(self) -> None:
        self.places: list[int] = []


class _Machine:
    """The stack and memo of one pickle.

    Args:
        size: Of the pickle in bytes: what is made may be twice as large, since text can become
            bytes and these an array.
    """

    def __init__(self, size: int) -> None:
        self._left = 2 * size
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        argument: Any
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name in _PLAIN:
                self._stack.append(argument)
            elif name in _PYTHON_2_TEXT:
                self._stack.append(argument.encode("latin-1"))
            elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                self._remember(len(self._memo) if argument is None else argument)
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                self._stack.append(self._memo[argument])
            elif name == "STOP":
                return self._stack.pop()
            elif name not in ("PROTO", "FRAME"):
                self._structure(name, argument)
        raise pickle.UnpicklingError("it has no end")

    def _remember(self, place: int) -> None:
        top = self._stack[-1]
        self._memo[place] = top
        if type(top) is _Unfinished:
            top.places.append(place)

    def _structure(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "MARK":
            self._outer.append(stack)
            self._stack = []
        elif name in ("TUPLE", "LIST"):
            items = self._since_mark()
            self._stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            _exactly(list, self._stack[-1]).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(self._since_mark() if name == "SETITEMS" else self._pop(2))
        elif name == "DICT":
            items = self._since_mark()
            self._stack.append({})
            self._set_items(items)
        else:
            self._object(name, argument)

    def _object(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_named(*self._pop(2)))
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            stack.append(self._made(function, _exactly(tuple, arguments)))
        elif name == "BUILD":
            self._build(stack.pop())
        else:
            raise pickle.UnpicklingError(f"the opcode {name} is not allowed")

    def _pop(self, count: int) -> list[Any]:
        popped = self._stack[-count:]
        del self._stack[-count:]
        return popped

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _set_items(self, items: list[Any]) -> None:
        target = _exactly(dict, self._stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Others might take long to hash, or a stack deeper than the interpreter's.
            if type(key) not in (str, bytes, int):
                raise pickle.UnpicklingError(f"a key of type {type(key).__name__} is not allowed")
            target[key] = value

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise pickle.UnpicklingError("it would take more memory than its size explains")

    def _array(self, dtype: Any, raw: Any, shape: Any, order: str) -> NDArray[Any]:
        self._spend(len(raw))
        return _exactly(_Dtype, dtype).read(raw, shape).reshape(shape, order=order)

    def _made(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """What a call would return, were it made."""
        if function is _Name.RECONSTRUCT and arguments[:2] == (_Name.NDARRAY, (0,)):
            return _Unfinished()
        if function is _Name.DTYPE:
            return _Dtype(arguments[0])
        if function is _Name.ENCODE and arguments[1:] == ("latin1",):
            self._spend(len(arguments[0]))
            return _exactly(str, arguments[0]).encode("latin-1")
        if function is _Name.BYTES and arguments == ():  # as the old protocols write b""
            return b""
        if function is _Name.SCALAR:
            dtype, raw = arguments
            return self._array(dtype, raw, (), "C")[()]
        if function is _Name.FROM_BUFFER:
            raw, dtype, shape, order = arguments
            return self._array(dtype, raw, shape, "F" if order == "F" else "C")
        name = function.name if isinstance(function, _Name) else type(function).__name__
        raise pickle.UnpicklingError(f"this call of {name} is not allowed")

    def _build(self, state: Any) -> None:
        top = self._stack[-1]
        if type(top) is _Dtype:
            top.set_state(_exactly(tuple, state))
            return
        _, shape, dtype, fortran, raw = _exactly(tuple, state)
        array = self._array(dtype, raw, shape, "F" if fortran else "C")
        for place in _exactly(_Unfinished, top).places:
            self._memo[place] = array
        self._stack[-1] = array


def _exactly(wanted: type, value: Any) -> Any:
    if type(value) is not wanted:
        raise pickle.UnpicklingError(f"a {type(value).__name__} is not allowed here")
    return value


def _named(module: Any, name: Any) -> _Name:
    try:
        return _NAMES[_text(module), _text(name)]
    except KeyError:
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None


def _text(value: Any) -> str:
    text = value.decode("ascii") if type(value) is bytes else value
    return str(_exactly(str, text))
