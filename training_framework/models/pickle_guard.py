"""Limit the memory that a small weight file can request; PyTorch's safe unpickler does not.

`torch.load(weights_only=True)` runs no code from a file. But it calls its allowed functions with
any arguments in the file, any number of times, and it unpacks compressed parts. So a file of a
megabyte can request terabytes. `check_pickles` first reads the file without calling anything.
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
    """A file requests more memory than its size justifies; the text is the reason."""


def check_pickles(path: Path) -> None:
    """Check the pickles in a file of torch.save, in the zip format or the old one.

    A file of another kind passes, since torch.load refuses it.

    Raises:
        Oversized: Loading it could take far more memory than its size.
        zipfile.BadZipFile, OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        if stream.read(len(_ZIP_START)) != _ZIP_START:  # as torch distinguishes the formats
            stream.seek(0)
            for _ in range(_OLD_FORMAT_PICKLES):
                if not _passes(stream):
                    return
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise Oversized("its parts are compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise Oversized("its parts are larger than the file")
        for entry in entries:
            if not entry.filename.lower().endswith(".pkl"):  # torch ignores the case
                continue
            if entry.file_size > _MAX_PICKLE_BYTES:
                raise Oversized(f"{entry.filename} has {entry.file_size:,} bytes")
            _passes(io.BytesIO(archive.read(entry)))


def _passes(stream: IO[bytes]) -> bool:
    """Whether one pickle of the stream could be simulated to its end."""
    simulation = _Simulation()
    try:
        for opcode, argument, position in pickletools.genops(stream):
            simulation.step(opcode, argument)
            # Positions count from the start of the stream; earlier pickles only relax the limit.
            if simulation.spent > 4 * (position or 0) + 4096:
                raise Oversized("its pickle copies its parts over and over")
            if simulation.written > _MAX_PICKLE_BYTES:
                raise Oversized(f"its pickle has more than {_MAX_PICKLE_BYTES >> 20} MiB")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError):
        return False  # harmless up to here; torch.load will report the damage
    return True


class _Simulation:
    """A pickle's stack with the weights of its values: all their characters and elements.

    A value is a list of one weight, so that all references to a container see it grow.
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
        """Replace the values from `start` on by one value."""
        if start < 0:
            raise IndexError("the stack is empty")
        parts = self._stack[start:]
        del self._stack[start:]
        if opcode.name in _CALLS:
            self.spent += sum(weight for (weight,) in parts[1:])
        if not opcode.stack_after:
            return
        result = [1]
        if opcode.name in _CHANGES:  # existing references to it see it grow
            result = parts.pop(0)
        result[0] = min(result[0] + sum(weight for (weight,) in parts), _MAX_WEIGHT)
        self._stack.append(result)
