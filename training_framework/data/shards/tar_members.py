"""The samples of one tar shard in the format of WebDataset: an image and its label per key.

Nothing is unpacked: `tarfile` parses each header of 512 bytes, and the rest of the file is read
once, in order, for checksums. A shard is refused if it is damaged or contains anything but plain
files and folders.

Format: https://github.com/webdataset/webdataset, and POSIX.1-2001, `pax`, ustar and pax formats.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from training_framework.data.decoding import IMAGE_SUFFIXES
from training_framework.data.image_files import MAX_IMAGE_BYTES
from training_framework.errors import UserError

__all__ = ["MAX_CLASSES", "Sample", "Shard", "read_shard"]

MAX_CLASSES = 1_000_000
_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTRA_BYTES = 16_384  # for a long name: twice the longest path of Linux, owners and times
_MAX_LABEL_BYTES = 32
_READ_AT_ONCE = 1 << 20
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_EXTRA = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


class Sample(NamedTuple):
    """One image of a shard.

    Attributes:
        name: Name of its member.
        offset: Position of its first byte in the shard.
        length: Length in bytes.
        checksum: CRC-32 of its bytes.
        label: Number of its class.
    """

    name: str
    offset: int
    length: int
    checksum: int
    label: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The result of reading a shard.

    Attributes:
        size: Size in bytes.
        sha256: SHA-256 of the whole file, as hexadecimal text.
        samples: The samples, in the order of their images.
    """

    size: int
    sha256: str
    samples: tuple[Sample, ...]


def read_shard(path: Path) -> Shard:
    """Read a shard to its end.

    Raises:
        UserError: It is damaged or truncated, is not a plain tar file, contains links, devices,
            sparse files or names that lead out of it, or an image without exactly one label.
    """
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            reader = _Reader(path, file)
            for member in reader.members():
                folder, slash, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}{slash}{stem}"
                is_image = f".{extension.lower()}" in IMAGE_SUFFIXES
                if not stem or not (is_image or extension == "cls"):
                    continue  # other fields of a sample: captions, masks, metadata
                if key in (images if is_image else labels):
                    raise reader.fault(f"{member.name}: the second one with this key")
                if is_image:
                    images[key] = member
                else:
                    labels[key] = reader.label_in(member)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "make the file readable") from None
    for key in sorted(images.keys() ^ labels.keys()):
        raise reader.fault(
            f"{images[key].name}: has no label ({key}.cls)"
            if key in images
            else f"{key}.cls: has no image"
        )
    samples = (Sample(*member[:4], labels[key]) for key, member in images.items())
    return Shard(size=reader.position, sha256=reader.sha256.hexdigest(), samples=tuple(samples))


class _Member(NamedTuple):
    name: str
    offset: int
    length: int
    checksum: int
    start: bytes  # its first bytes, up to the longest label


class _Reader:
    """Reads a shard in order."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self.position = 0
        self._path = path
        self._file = file
        self._last = "its start"

    def fault(self, what: str) -> UserError:
        return UserError(f"{self._path}: {what}", "write the shard again")

    def members(self) -> Iterator[_Member]:
        """The plain files of the shard."""
        long_name: str | None = None
        while (header := self._read(_BLOCK)) != bytes(_BLOCK):
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                raise self.fault(f"is damaged after {self._last} ({error})") from None
            if info.type in _EXTRA and 0 <= info.size <= _MAX_EXTRA_BYTES:
                extra = self._padded(info.size)
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    long_name = extra.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif info.type == tarfile.XHDTYPE:
                    long_name = self._pax_path(extra)
                continue
            name = (info.name if long_name is None else long_name).removeprefix("./")
            long_name = None
            parts = name.split("/")
            if info.type == tarfile.DIRTYPE and info.size == 0:
                continue
            if info.type not in _FILES or not 0 <= info.size <= MAX_IMAGE_BYTES:
                raise self.fault(f"{name}: not a plain file of at most {MAX_IMAGE_BYTES:,} bytes")
            if name.startswith("/") or ".." in parts or "\0" in name:
                raise self.fault(f"{name}: this name leads out of the shard")
            self._last = name
            yield self._member(name, info.size)
        while rest := self._file.read(_READ_AT_ONCE):
            self._count(rest)
            if rest.strip(b"\0"):
                raise self.fault(f"contains data after its end, which follows {self._last}")

    def label_in(self, member: _Member) -> int:
        text = member.start.decode("ascii", "replace").strip()
        if member.length > _MAX_LABEL_BYTES or not text.isdecimal() or int(text) >= MAX_CLASSES:
            raise self.fault(f"{member.name}: not a class number below {MAX_CLASSES:,}")
        return int(text)

    def _member(self, name: str, length: int) -> _Member:
        offset, checksum, start = self.position, 0, b""
        for begin in range(0, length, _READ_AT_ONCE):
            content = self._read(min(length - begin, _READ_AT_ONCE))
            checksum = zlib.crc32(content, checksum)
            start = start or content[:_MAX_LABEL_BYTES]
        self._read(-length % _BLOCK)
        return _Member(name, offset, length, checksum, start)

    def _padded(self, length: int) -> bytes:
        return self._read(length + -length % _BLOCK)[:length]

    def _read(self, count: int) -> bytes:
        content = self._file.read(count)
        self._count(content)
        if len(content) < count:
            raise self.fault(f"ends too early, at byte {self.position:,}, in or after {self._last}")
        return content

    def _count(self, content: bytes) -> None:
        self.sha256.update(content)
        self.position += len(content)

    def _pax_path(self, records: bytes) -> str | None:
        """The path in records `LENGTH KEY=VALUE\\n`; None if they have none."""
        path, begin = None, 0
        while begin < len(records):
            digits = records[begin : begin + 6].partition(b" ")[0]
            end = begin + int(digits) if digits.isdigit() else 0
            key, equals, value = records[begin + len(digits) + 1 : end].partition(b"=")
            if end <= begin or not equals or not value.endswith(b"\n"):
                raise self.fault(f"has a damaged extended header after {self._last}")
            if key == b"path":
                path = value[:-1].decode("utf-8", "surrogateescape")
            elif key == b"size" or key.startswith(b"GNU.sparse"):
                raise self.fault(f"contains a sparse or huge file after {self._last}")
            begin = end
        return path
