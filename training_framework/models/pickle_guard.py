"""Bound how much memory a small weight file may ask for, which PyTorch's safe unpickler does not.

`torch.load(weights_only=True)` runs no code of a file, but it calls the functions that it admits on
whatever the file says, as often as it says, and unpacks what is compressed. So a file of a megabyte
can ask for terabytes. `check_pickles` reads the file first, without calling anything.
"""

import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

__all__ = ["Oversized", "check_pickles"]

_ZIP_START = b"PK\x03\x04"
_MAX_PICKLE_BYTES = 4 << 20
_OLD_FORMAT_PICKLES = 5  # magic number, protocol, system, content, storage keys
_MAX_WEIGHT = 1 << 62
_CALLS = ("REDUCE", "NEWOBJ", "BUILD")
_CHANGES = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")


class Oversized(Exception):
    """A file asks for more memory than its size explains; the text says how."""


def check_pickles(path: Path) -> None:
    """Go through the pickles of a file of torch.save, in its zip format or in the old one.

    A file of another kind passes: torch.load refuses it.

    Raises:
        Oversized: Loading it could take far more memory than its size.
        zipfile.BadZipFile, OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        if stream.read(len(_ZIP_START)) != _ZIP_START:  # how torch tells the formats apart
            stream.seek(0)
            for _ in range(_OLD_FORMAT_PICKLES):
                if not _passes(stream):
                    return
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise Oversized("its parts are compressed, as torch.save never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise Oversized("its parts are larger than the file")
        for entry in entries:
            if not entry.filename.lower().endswith(".pkl"):  # torch finds it in either case
                continue
            if entry.file_size > _MAX_PICKLE_BYTES:
                raise Oversized(f"{entry.filename} has {entry.file_size:,} bytes")
            _passes(io.BytesIO(archive.read(entry)))


def _passes(stream: IO[bytes]) -> bool:
    """Whether one pickle of the stream could be gone through to its end."""
    simulation = _Simulation()
    try:
        for opcode, argument, position in pickletools.genops(stream):
            simulation.step(opcode, argument)
            # Positions count from the stream's start; what came before only makes it laxer.
            if simulation.spent > 4 * (position or 0) + 4096:
                raise Oversized("its pickle copies its parts over and over")
            if simulation.written > _MAX_PICKLE_BYTES:
                raise Oversized(f"its pickle has more than {_MAX_PICKLE_BYTES >> 20} MiB")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError):
        return False  # as far as it went, it was harmless; torch.load will say what is wrong
    return True


class _Simulation:
    """A pickle's stack with the weights of its values: characters, elements, and those in them.

    A value is a list with its weight, so that what refers to a container sees it grow.
    """

    def __init__(self) -> None:
        self.spent = 0
        self.written = 0
        self._stack: list[list[int]] = []
        self._marks: list[int] = []
        self._memo: dict[int, list[int]] = {}

    def step(self, opcode: Any, argument: Any) -> None:
        name, stack = opcode.name, self._stack
        if name == "MARK":
            self._marks.append(len(stack))
        elif name in _PUTS:
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif name in _GETS:
            stack.append(self._memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif pickletools.markobject in opcode.stack_before:
            start = self._marks.pop()
            self._combine(opcode, start - opcode.stack_before.index(pickletools.markobject))
        elif opcode.stack_before:
            self._combine(opcode, len(stack) - len(opcode.stack_before))
        elif opcode.stack_after:
            weight = len(argument) if isinstance(argument, (str, bytes, bytearray)) else 0
            self.written += weight
            stack.append([1 + weight])

    def _combine(self, opcode: Any, start: int) -> None:
        """Let one value take the place of those from `start` on."""
        if start < 0:
            raise IndexError("the stack is empty")
        parts = self._stack[start:]
        del self._stack[start:]
        if opcode.name in _CALLS:
            self.spent += sum(weight for (weight,) in parts[1:])
        if not opcode.stack_after:
            return
        result = [1]
        if opcode.name in _CHANGES:  # what refers to it already sees it grow
            result = parts.pop(0)
        result[0] = min(result[0] + sum(weight for (weight,) in parts), _MAX_WEIGHT)
        self._stack.append(result)
