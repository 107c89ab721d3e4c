"""Packed data sets: one Arrow IPC file with both splits (https://arrow.apache.org/docs/format).

Columns, one row a sample, the training split first:

- `split` utf8, `name` utf8 (path within the split), `label` int32, `height` and `width` int32;
- `crc32` uint32, of the bytes of the picture as they are stored (zlib's);
- `image` large_binary, a JPEG or another picture file; or else `pixels`, a uint8 tensor (height,
  width, 3), square and of one size for all samples (Arrow's canonical extension type
  `arrow.fixed_shape_tensor`), in one record batch a split.

What concerns the whole set is JSON under the key `efficient-resnet` of the schema's metadata. Any
Arrow library can read these files; here pyarrow writes and opens them (the extra `pack`).
"""

import mmap
import os
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from training_framework.errors import UserError

__all__ = ["METADATA_KEY", "PackInfo", "PackedFile", "load_pyarrow", "schema_of"]

METADATA_KEY = b"efficient-resnet"

_MOST_IMAGE_BYTES = 1 << 30
_MOST_PIXELS = 16_384  # a side; the bytes of an image then still fit into 32 bits
_CURE = "pack it again with `efficient-resnet data pack`"


class PackInfo(BaseModel):
    """What a packed file says of itself.

    Attributes:
        format_version: Of the layout above.
        source: Name of the folder that was packed.
        class_names: In label order.
        train_images: Rows of the training split.
        val_images: Rows of the validation split, which follow.
        pixels: Side in pixels of the raw images; None where picture files are stored.
        shorter_side: Pictures with a longer shorter side were scaled down to it; None: none were.
        quality: JPEG quality of the pictures that were scaled down; None: raw, or none were.
        skipped: Pictures that could not be decoded, as `split/name`.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    format_version: Literal[1] = 1
    source: str
    class_names: list[str]
    train_images: PositiveInt
    val_images: PositiveInt
    pixels: Annotated[int, Field(ge=1, le=_MOST_PIXELS)] | None = None
    shorter_side: PositiveInt | None = None
    quality: PositiveInt | None = None
    skipped: list[str] = []


class _Table(NamedTuple):
    """The columns of a record batch, or of all of them; `spans` are positions in the file."""

    labels: NDArray[np.int32]
    shapes: NDArray[np.int32]
    checksums: NDArray[np.uint32]
    spans: NDArray[np.int64]


class PackedFile:
    """A packed file, opened: its table in memory, its pictures on the disk.

    Pictures are read by their position, not through a mapping: of a disk that fails, reading tells
    by an error, a mapping by a signal that ends the process. Pickling keeps the path alone.

    Args:
        path: The file.

    Attributes:
        path: The file.
        info: What it says of itself.
        labels: (N,) int64.
        shapes: (N, 2) int32, height and width in pixels.

    Raises:
        UserError: pyarrow is missing, or this is no packed file, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}", "check the path") from None
        weakref.finalize(self, os.close, self._descriptor)
        self.info, table, self._names = _read(path)
        self.labels = table.labels.astype(np.int64)
        self.shapes = table.shapes
        self._checksums = table.checksums
        self._spans = table.spans

    def __reduce__(self) -> tuple[type["PackedFile"], tuple[Path]]:
        return PackedFile, (self.path,)

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, row: int) -> str:
        """A sample's split and its path within it."""
        split = "train" if row < self.info.train_images else "val"
        return f"{split}/{self._names[row].as_py()}"

    def size_of(self, row: int) -> int:
        """Bytes of a sample."""
        return int(self._spans[row, 1] - self._spans[row, 0])

    def read(self, row: int) -> bytes:
        """The bytes of a sample.

        Raises:
            OSError: They cannot be read, or the file has become shorter.
        """
        position, size = int(self._spans[row, 0]), self.size_of(row)
        data = os.pread(self._descriptor, size, position)
        if len(data) < size:
            raise OSError(0, "the file has become shorter")
        return data

    def is_intact(self, row: int, data: bytes) -> bool:
        """Whether these are the bytes that were packed, by their checksum."""
        return zlib.crc32(data) == int(self._checksums[row])

    def pixels(self, rows: slice) -> NDArray[np.uint8]:
        """Raw images, mapped from the file: (N, S, S, 3).

        Args:
            rows: All rows of one split of a file with `info.pixels`.
        """
        side = self.info.pixels
        assert side is not None
        count, begin = len(self._spans[rows]), int(self._spans[rows][0, 0])
        # Private and writable, since torch warns of arrays that are not; nobody writes.
        mapping = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)
        size = count * side * side * 3
        images = np.frombuffer(mapping, dtype=np.uint8, count=size, offset=begin)
        return images.reshape(count, side, side, 3)


def load_pyarrow() -> ModuleType:
    """The pyarrow module, with its `ipc`.

    Raises:
        UserError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise UserError(
            "packed data needs pyarrow, which is not installed",
            "pip install 'efficient-resnet[pack]'",
        ) from None
    return pyarrow


def schema_of(pixels: int | None) -> Any:
    """The columns of a packed file as an Arrow schema, without metadata.

    Args:
        pixels: Side of the raw images; None for picture files.
    """
    arrow = load_pyarrow()
    stored = ("image", arrow.large_binary())
    if pixels is not None:
        stored = ("pixels", arrow.fixed_shape_tensor(arrow.uint8(), (pixels, pixels, 3)))
    return arrow.schema(
        [
            ("split", arrow.utf8()),
            ("name", arrow.utf8()),
            ("label", arrow.int32()),
            ("height", arrow.int32()),
            ("width", arrow.int32()),
            ("crc32", arrow.uint32()),
            stored,
        ]
    )


def _read(path: Path) -> tuple[PackInfo, _Table, Any]:
    """What a file says of itself, its table, and its names as an Arrow array."""
    arrow = load_pyarrow()
    try:
        mapping = arrow.memory_map(os.fsencode(path).decode())
        whole = mapping.read_buffer(mapping.size())
        reader = arrow.ipc.open_file(arrow.BufferReader(whole))
        info = _read_info(path, reader.schema)
        # Arrow takes a file's metadata at its word, until asked to check them.
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
        tables = [_columns(path, batch, whole) for batch in batches]
        # Copies, as all of the table is: of a mapping, a file that shrinks later ends the process.
        names = [batch.column("name").take(arrow.array(np.arange(len(batch)))) for batch in batches]
    except UserError:
        raise
    except (arrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: no whole packed file ({reason})", _CURE) from None
    if not tables:
        raise UserError(f"{path}: holds no samples", _CURE)
    table = _Table(*map(np.concatenate, zip(*tables, strict=True)))
    fault = next(_faults(info, table, len(tables)), None)
    if fault:
        raise UserError(f"{path}: {fault}", _CURE)
    return info, table, arrow.chunked_array(names)


def _read_info(path: Path, schema: Any) -> PackInfo:
    text = (schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise UserError(f"{path}: an Arrow file, but no packed data set", _CURE)
    try:
        info = PackInfo.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"])) or "metadata"
        raise UserError(
            f"{path}: {key}: {first['msg']}",
            "update efficient-resnet if a newer version packed it, or pack it again",
        ) from None
    if not schema.equals(schema_of(info.pixels)):
        raise UserError(f"{path}: its columns are not those of a packed data set", _CURE)
    return info


def _columns(path: Path, batch: Any, whole: Any) -> _Table:
    if any(column.null_count for column in batch.columns):
        raise UserError(f"{path}: has empty cells", _CURE)
    label, height, width, checksum = (
        batch.column(name).to_numpy() for name in ("label", "height", "width", "crc32")
    )
    stored = batch.columns[-1]
    if batch.schema.names[-1] == "image":
        _, offsets, content = stored.buffers()
        ends = np.frombuffer(offsets or b"", dtype=np.int64)[stored.offset :][: len(stored) + 1]
    else:
        values = stored.storage.flatten()
        _, content = values.buffers()
        image_bytes = stored.type.storage_type.list_size
        ends = values.offset + np.arange(len(stored) + 1, dtype=np.int64) * image_bytes
    if content is None or len(ends) != len(batch) + 1:
        raise UserError(f"{path}: has a record batch without images", _CURE)
    start = content.address - whole.address
    if start < 0 or start + content.size > whole.size:
        raise UserError(f"{path}: is compressed, so it cannot be read by position", _CURE)
    spans = start + np.stack([ends[:-1], ends[1:]], axis=1)
    return _Table(label, np.stack([height, width], axis=1), checksum, spans)


def _faults(info: PackInfo, table: _Table, batches: int) -> Iterator[str]:
    """What no file that was packed here has."""
    count, promised = len(table.labels), info.train_images + info.val_images
    if count != promised:
        yield f"has {count} samples, but says {promised}"
    if table.labels.min() < 0 or table.labels.max() >= len(info.class_names):
        yield f"has a label outside of its {len(info.class_names)} classes"
    if table.shapes.min() < 1:
        yield "has a picture without pixels"
    sizes = table.spans[:, 1] - table.spans[:, 0]
    if sizes.min() < 1 or sizes.max() > _MOST_IMAGE_BYTES:
        yield "has a picture of no bytes, or of more than there can be"
    if info.pixels is not None:
        breaks = np.flatnonzero(table.spans[1:, 0] != table.spans[:-1, 1]) + 1
        if batches != 2 or breaks.tolist() not in ([], [info.train_images]):
            yield "has raw images that do not lie one after the other"
        if (table.shapes != info.pixels).any():
            yield f"has raw images that are not of {info.pixels} px"
