"""The pieces that a packed file is put together from: the work of one process at a time."""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from training_framework.data.bad_images import SplitName
from training_framework.data.decoding import Pixels, decode_image, image_shape, resize
from training_framework.data.host_batches import StorageFault, read_picture
from training_framework.data.shards.packed_file import load_pyarrow, schema_of
from training_framework.errors import UserError, one_line
from training_framework.faults import fault_point

__all__ = [
    "Packing",
    "Piece",
    "PieceResult",
    "as_text",
    "begin_process",
    "make_piece",
    "write_batches",
]

_PIECE_KEY = b"efficient-resnet-piece"
_JPEG_UNIT = 16  # pixels across of what a JPEG with halved chroma is coded by
_MOST_JPEG_SIDE = 65_500


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How pictures are packed, and the folder that the pieces lie in; see `pack_folder`."""

    folder: Path
    pixels: bool
    shorter_side: int | None
    quality: int | None
    skip_bad: bool


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some samples of one class of a split.

    Attributes:
        split: `train` or `val`.
        label: Of all its samples.
        offset: Samples of the class before it.
        root: Folder that the paths are relative to.
        paths: One a sample.
    """

    split: SplitName
    label: int
    offset: int
    root: Path
    paths: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PieceResult:
    """A piece that was packed, or why it was not.

    Attributes:
        path: The piece's file.
        count: Samples in it.
        bad: Pictures that were passed over: reasons by path.
        side: Side in pixels of its raw images; None for picture files, or without samples.
        fault: What ended the packing and its cure: a UserError does not travel between processes.
    """

    path: Path
    count: int = 0
    bad: Mapping[str, str] = field(default_factory=dict)
    side: int | None = None
    fault: tuple[str, str] | None = None


def begin_process() -> None:
    """Prepare a process that makes pieces: the parent hears the signals, each has one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    # Without it, a process of a pool waits for work for ever once its parent was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def make_piece(packing: Packing, piece: Piece) -> PieceResult:
    """Pack the samples of a piece, unless its file is there from an earlier attempt.

    Raises:
        OSError: The file cannot be written.
    """
    path = packing.folder / f"{piece.split}-{piece.label:05}-{piece.offset:07}.arrow"
    try:
        digest = _digest(packing, piece)
        return _finished(packing, path, digest) or _packed(packing, piece, path, digest)
    except UserError as error:
        return PieceResult(path=path, fault=(error.fault, error.cure))


def _digest(packing: Packing, piece: Piece) -> str:
    """Of everything that a piece's content depends on."""
    files: list[tuple[str, int, int]] = []
    for name in piece.paths:
        try:
            status = (piece.root / name).stat()
        except OSError as error:
            raise UserError(f"{piece.root / name}: {error.strerror}", "restore the file") from None
        files.append((name, status.st_size, status.st_mtime_ns))
    options = (packing.pixels, packing.shorter_side, packing.quality)
    content = json.dumps((options, piece.split, piece.label, str(piece.root.resolve()), files))
    return hashlib.sha256(content.encode()).hexdigest()


def _finished(packing: Packing, path: Path, digest: str) -> PieceResult | None:
    arrow = load_pyarrow()
    try:
        with path.open("rb") as file, arrow.ipc.open_file(file) as reader:
            note = json.loads((reader.schema.metadata or {})[_PIECE_KEY])
            count = sum(reader.get_batch(n).num_rows for n in range(reader.num_record_batches))
    except (arrow.ArrowException, OSError, ValueError, KeyError):
        return None  # there is none, or the machine went down while it was written
    if note["digest"] != digest or (note["bad"] and not packing.skip_bad):
        return None
    return PieceResult(path=path, count=count, bad=note["bad"], side=note["side"])


def _packed(packing: Packing, piece: Piece, path: Path, digest: str) -> PieceResult:
    names: list[str] = []
    stored: list[bytes | Pixels] = []
    shapes: list[tuple[int, int]] = []
    bad: dict[str, str] = {}
    side: int | None = None
    for relative in piece.paths:
        name = str(piece.root / relative)
        data = read_picture(Path(name))
        try:
            content, shape = _prepared(packing, data, name)
            if packing.pixels:
                side = side or shape[0]
                _check_square(name, shape, side)
        except StorageFault:
            raise
        except UserError as error:
            if not packing.skip_bad:
                raise
            bad[name] = error.fault.removeprefix(one_line(f"{name}:")).strip()
            continue
        names.append(as_text(relative))
        stored.append(content)
        shapes.append(shape)
    note = json.dumps({"digest": digest, "bad": bad, "side": side}).encode()
    batch = _batch(piece, names, stored, shapes, side)
    temporary = path.with_suffix(f".{os.getpid()}")
    schema = batch.schema.with_metadata({_PIECE_KEY: note})
    write_batches(temporary, schema, [batch] if names else [])
    temporary.replace(path)
    fault_point("packing.after_piece")
    return PieceResult(path=path, count=len(names), bad=bad, side=side)


def as_text(name: str) -> str:
    """A file's name as UTF-8 can write it: names may hold any bytes."""
    return os.fsencode(name).decode(errors="replace")


def _check_square(name: str, shape: tuple[int, int], side: int) -> None:
    if shape != (side, side):
        # No UserError of a bad picture, which would be passed over.
        raise StorageFault(
            f"{name}: {shape[1]}x{shape[0]} px, and raw pixels need square images of one size",
            "give --shorter-side",
        )


def _prepared(packing: Packing, data: bytes, name: str) -> tuple[bytes | Pixels, tuple[int, int]]:
    """What is stored of a picture, with height and width in pixels.

    The whole picture is decoded even where its bytes are kept: this is the time to find out that
    it cannot be.
    """
    height, width = image_shape(data, name)
    pixels = decode_image(data, name)
    side = packing.shorter_side
    if packing.pixels:
        if side is None:
            return pixels, (height, width)
        shorter = min(height, width)
        top, left = (height - shorter) // 2, (width - shorter) // 2
        square = pixels[top : top + shorter, left : left + shorter]
        return resize(square, side, side), (side, side)
    if side is None or min(height, width) <= side:
        return data, (height, width)
    if height <= width:
        shape = side, round(side * width / height)
    else:
        shape = round(side * height / width), side
    if max(shape) > _MOST_JPEG_SIDE:
        return data, (height, width)
    return _jpeg(resize(pixels, *shape), packing.quality), shape


def _jpeg(pixels: Pixels, quality: int | None) -> bytes:
    """Encode with restart markers, by which a part can be decoded without the rest.

    Every one to three units of 16 pixels there is one, as many as divide a row of them. They cost 1
    to 4% in size.
    """
    units = -(-pixels.shape[1] // _JPEG_UNIT)
    interval = next(count for count in (3, 2, 1) if units % count == 0)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(
        stream, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_blocks=interval
    )
    return stream.getvalue()


def _batch(
    piece: Piece,
    names: Sequence[str],
    stored: Sequence[bytes | Pixels],
    shapes: Sequence[tuple[int, int]],
    side: int | None,
) -> Any:
    arrow = load_pyarrow()
    if side is None:
        images = arrow.array(stored, arrow.large_binary())
    else:
        images = arrow.FixedShapeTensorArray.from_numpy_ndarray(np.stack(stored))
    checksums = [
        zlib.crc32(content if isinstance(content, bytes) else content.data) for content in stored
    ]
    return arrow.record_batch(
        [
            arrow.array([piece.split] * len(names), arrow.utf8()),
            arrow.array(names, arrow.utf8()),
            arrow.array([piece.label] * len(names), arrow.int32()),
            arrow.array([height for height, _ in shapes], arrow.int32()),
            arrow.array([width for _, width in shapes], arrow.int32()),
            arrow.array(checksums, arrow.uint32()),
            images,
        ],
        schema=schema_of(side),
    )


def write_batches(path: Path, schema: Any, batches: Iterable[Any]) -> None:
    """Write an Arrow IPC file.

    Raises:
        OSError: It cannot be written.
    """
    arrow = load_pyarrow()
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
