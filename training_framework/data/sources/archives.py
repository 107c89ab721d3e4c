"""Archives of others: the files that are wanted are taken out of them, and nothing else."""

import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training_framework.errors import UserError

__all__ = ["unpack_files"]

_MOST_BYTES = 256 << 20  # CIFAR's archives hold 186 MB
_MOST_MEMBERS = 100
_CURE = "delete it, and it is downloaded again"


def unpack_files(archive: Path, folder: Path, wanted: Sequence[str]) -> None:
    """Take files out of a .tar.gz: `<name of folder>/<wanted>` becomes `folder/<wanted>`.

    They are unpacked beside the final place, which is then made in one move, so that no
    half-unpacked folder is ever found. Nothing of the archive decides where anything is written:
    members of other names are passed over, links and devices among the wanted are refused.

    Args:
        archive: The archive.
        folder: The new folder, which must not exist.
        wanted: Names of the files, all of which must be there.

    Raises:
        UserError: The archive is damaged, lacks a file, or holds more than such an archive may.
        OSError: The files cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as scratch:
        unpacked = Path(scratch) / folder.name
        unpacked.mkdir()
        try:
            with gzip.open(archive) as stream:
                missing = _take(stream, folder.name, set(wanted), unpacked)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
            raise UserError(f"{archive}: cannot be unpacked ({error})", _CURE) from None
        if missing:
            raise UserError(f"{archive}: lacks {folder.name}/{min(missing)}", _CURE)
        unpacked.rename(folder)


def _take(stream: gzip.GzipFile, prefix: str, wanted: set[str], folder: Path) -> set[str]:
    """Write the wanted files of an archive: those that it lacks."""
    missing = set(wanted)
    bounded: Any = _Bounded(stream)  # of a stream, tarfile needs to read alone
    with tarfile.open(fileobj=bounded, mode="r|") as tar:
        for number, member in enumerate(tar):
            if number >= _MOST_MEMBERS:
                raise tarfile.TarError(f"it holds more than {_MOST_MEMBERS} files")
            top, _, name = member.name.partition("/")
            if top != prefix or name not in wanted:
                continue
            # A sparse file has any size without a byte in the archive.
            plain = member.isreg() and not member.issparse() and member.size <= _MOST_BYTES
            content = tar.extractfile(member) if plain else None
            if content is None:
                raise tarfile.TarError(f"{member.name} is no plain file")
            with content, (folder / name).open("wb") as file:
                shutil.copyfileobj(content, file)
            missing.discard(name)
    return missing


class _Bounded:
    """A stream that ends in an error after `_MOST_BYTES`: a small archive may unpack to any size.

    tarfile asks it for one block after the other, and so holds no more than that either.
    """

    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream = stream
        self._left = _MOST_BYTES

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.TarError(f"it unpacks to more than {_MOST_BYTES >> 20} MiB")
        return data
