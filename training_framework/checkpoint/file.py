"""The file of a checkpoint: a state of tensors and plain values, with checks for damage.

It is a safetensors file. Nested names become the names of tensors (`model/conv1.weight`), and all
other values are JSON in the header, including the places of the tensors. The header also has a
CRC-32 of each tensor and, in its first field, its own SHA-256. So a file that was truncated, mixed
up or changed in any bit is refused. The file contains no pickle: reading a hostile one builds
tensors, numbers and text, and cannot run code.

The tensors have a CRC-32, since it is several times as fast as a SHA-256 without hardware support,
and neither protects against someone who writes a new checksum for the new content.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from training_framework.checkpoint.flat_state import FlatState, is_channels_last
from training_framework.errors import UserError, shown

__all__ = [
    "FORMAT_VERSION",
    "begins_like_checkpoint",
    "read_description",
    "read_state",
    "write_header",
    "write_tensors",
]

FORMAT_VERSION = 2
MAX_HEADER_BYTES = 2**25
_START = b'{"__metadata__":{"sha256":"'
_DIGEST = slice(8 + len(_START), 8 + len(_START) + 64)
_NO_DIGEST = "0" * 64
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_stored(tensor: Tensor) -> Tensor:
    """The tensor made contiguous; a channels_last one only permuted."""
    return tensor.permute(0, 2, 3, 1) if is_channels_last(tensor) else tensor.contiguous()


def _bytes_of(stored: Tensor) -> memoryview:
    array = stored.view(_SAME_SIZE_INTEGER[stored.element_size()]).numpy()
    return array.reshape(-1).view(np.uint8).data


def write_tensors(file: RawIOBase, state: FlatState) -> list[str]:
    """Write the tensors after the space for the header, and return a checksum of each.

    Args:
        file: Opened without a buffer. Otherwise a process that forks while another thread writes
            copies the buffer to its child, which writes it once more.
        state: The flat state; its tensors may be on any device.

    Raises:
        UserError: The file format has no name for the dtype of a tensor, or the header is larger
            than readers accept.
        OSError: The file cannot be written.
    """
    for name, tensor in state.tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise UserError(
                f"{name}: a checkpoint cannot contain {tensor.dtype}",
                f"use one of {', '.join(str(dtype) for dtype in _DTYPE_NAMES)}",
            )
    room = len(_header(state, ["0" * 8] * len(state.tensors)))
    if room > MAX_HEADER_BYTES:
        raise UserError(
            f"the header of a checkpoint with {len(state.tensors)} tensors takes "
            f"{room / 2**20:.0f} MiB",
            f"train a network with fewer tensors: the limit is {MAX_HEADER_BYTES >> 20} MiB",
        )
    file.seek(room)
    checksums = []
    for tensor in state.tensors.values():
        content = _bytes_of(_as_stored(tensor.detach().cpu()))
        checksums.append(f"{zlib.crc32(content):08x}")
        _write_all(file, content)
    return checksums


def write_header(file: RawIOBase, state: FlatState, checksums: list[str]) -> None:
    """Write the header last, so that a partial file is never valid."""
    header = bytearray(_header(state, checksums))
    header[_DIGEST] = hashlib.sha256(header).hexdigest().encode()
    file.seek(0)
    _write_all(file, memoryview(header))


def _write_all(file: RawIOBase, content: memoryview) -> None:
    while content:
        content = content[file.write(content) or 0 :]


def _header(state: FlatState, checksums: list[str]) -> bytes:
    entries: dict[str, Any] = {
        "__metadata__": {
            "sha256": _NO_DIGEST,
            "format_version": str(FORMAT_VERSION),
            "crc32": " ".join(checksums),
            "state": json.dumps(state.description, separators=(",", ":")),
        }
    }
    end = 0
    for name, tensor in state.tensors.items():
        start, end = end, end + tensor.nbytes
        shape = [tensor.shape[i] for i in (0, 2, 3, 1)] if is_channels_last(tensor) else None
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": shape or list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    assert text.startswith(_START)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_state(path: Path) -> Any:
    """Read and check a whole file, and build its state on the CPU.

    Raises:
        UserError: The file does not exist, cannot be read, is damaged, or is of another kind or
            format version.
    """
    with _opened(path) as file:
        entries = _checked_entries(file)
        metadata = entries.pop("__metadata__")
        file.seek(0)
        tensors = _checked_tensors(file.read(), list(entries), metadata["crc32"].split())
        return FlatState(json.loads(metadata["state"]), tensors).put_together()


def read_description(path: Path) -> Any:
    """Read and check only the header of a file: the state with names instead of tensors.

    Raises:
        UserError: As for `read_state`, as far as the header shows.
    """
    with _opened(path) as file:
        return json.loads(_checked_entries(file)["__metadata__"]["state"])


def begins_like_checkpoint(path: Path) -> bool:
    """Whether a file starts like a checkpoint of this framework, damaged or not."""
    with path.open("rb") as file:
        return file.read(8 + len(_START))[8:] == _START


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint",
            "name a .ckpt file, such as logs/NAME/version_0/checkpoints/last.ckpt",
        )
    try:
        with path.open("rb") as file:
            yield file
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error})", "check its disk"
        ) from None
    except Exception as error:  # a forged header can make any reader fail
        reason = str(error) if isinstance(error, _Damage) else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({reason})",
            "it is damaged or not a checkpoint; use another one from the same folder",
        ) from None


class _Damage(Exception):
    """The bytes of a file contradict each other; the text says where."""


def _checked_entries(file: BinaryIO) -> dict[str, Any]:
    header = _read_header(file)
    cleared = bytearray(header)
    cleared[_DIGEST] = _NO_DIGEST.encode()
    if header[_DIGEST] != hashlib.sha256(cleared).hexdigest().encode():
        raise _Damage("its header does not match its digest")
    entries: dict[str, Any] = json.loads(header[8:])
    version = entries["__metadata__"]["format_version"]
    if version != str(FORMAT_VERSION):
        raise UserError(
            f"{file.name}: has format version {shown(version)}, but this version of the framework "
            f"reads version {FORMAT_VERSION}",
            "read it with the version of the framework that wrote it",
        )
    return entries


def _read_header(file: BinaryIO) -> bytes:
    start = file.read(8 + len(_START))
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise UserError(
            f"{file.name}: was written by torch.save, not by this framework",
            "to start from its weights, pass it as --weights",
        )
    if start[8:] != _START:
        raise _Damage("it does not start like one" if any(start) else "it is empty")
    length = int.from_bytes(start[:8], "little")
    size = os.fstat(file.fileno()).st_size
    if not len(start) < 8 + length <= min(size, MAX_HEADER_BYTES):
        raise _Damage("its header is truncated")
    return start + file.read(8 + length - len(start))


def _checked_tensors(content: bytes, names: list[str], checksums: list[str]) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError:
        raise _Damage("its size does not match its header") from None
    for name, checksum in zip(names, checksums, strict=True):
        if f"{zlib.crc32(_bytes_of(tensors[name])):08x}" != checksum:
            raise _Damage(f"{name} does not match its checksum")
    return tensors
