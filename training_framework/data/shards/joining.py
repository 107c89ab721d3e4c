"""Put the pieces of a packed file together."""

import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training_framework.data.shards.packed_file import (
    METADATA_KEY,
    PackInfo,
    load_pyarrow,
    schema_of,
)
from training_framework.data.shards.pieces import write_batches
from training_framework.errors import UserError
from training_framework.faults import fault_point

__all__ = ["join_pieces"]


def join_pieces(pieces: Sequence[Path], dest: Path, info: PackInfo, *, folder: Path) -> None:
    """Write a packed file of all the pieces; it appears whole, or not at all.

    Args:
        pieces: Their files, in order.
        dest: The packed file.
        info: What it shall say of itself.
        folder: For unfinished files, on the file system of `dest`.

    Raises:
        OSError: It cannot be written.
        UserError: A piece is not as it was written.
    """
    whole = folder / f"whole.{os.getpid()}"
    schema = schema_of(info.pixels).with_metadata({METADATA_KEY: info.model_dump_json().encode()})
    batches: Iterator[Any] = (batch for path in pieces for batch in _intact_batches(path))
    if info.pixels is not None:
        batches = _one_for_each_split(batches, info.pixels, folder / f"pixels.{os.getpid()}")
    write_batches(whole, schema, batches)
    _flush(whole)
    fault_point("packing.before_replace")
    whole.replace(dest)
    _flush(dest.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _intact_batches(path: Path) -> Iterator[Any]:
    arrow = load_pyarrow()
    try:
        with path.open("rb") as file, arrow.ipc.open_file(file) as reader:
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
        intact = all(map(_is_intact, batches))
    except (arrow.ArrowException, ValueError):
        intact, batches = False, []
    if not intact:
        path.unlink()
        raise UserError(
            f"{path}: is not as it was written", "start the same command again, which redoes it"
        )
    yield from batches


def _is_intact(batch: Any) -> bool:
    if batch.schema.names[-1] == "image":
        stored: Iterable[Any] = (image.as_buffer() for image in batch.column("image"))
    else:
        stored = _pixels(batch)
    return [zlib.crc32(image) for image in stored] == batch.column("crc32").to_pylist()


def _pixels(batch: Any) -> NDArray[np.uint8]:
    """The raw images of a batch: (N, bytes of an image)."""
    values: NDArray[np.uint8] = batch.column("pixels").storage.flatten().to_numpy()
    return values.reshape(len(batch), -1)


def _one_for_each_split(batches: Iterable[Any], side: int, scratch: Path) -> Iterator[Any]:
    """Batches that each hold a whole split, so that its images lie one after the other."""
    arrow = load_pyarrow()
    for _, parts in itertools.groupby(batches, key=lambda batch: batch.column("split")[0].as_py()):
        columns: list[list[Any]] = []
        with scratch.open("wb") as file:
            for part in parts:
                file.write(_pixels(part).data)
                rows = arrow.array(np.arange(len(part)))
                # Copies, which do not hold on to the images.
                columns.append([column.take(rows) for column in part.columns[:-1]])
        images = np.memmap(scratch, dtype=np.uint8, mode="r").reshape(-1, side, side, 3)
        yield arrow.record_batch(
            [arrow.concat_arrays(column) for column in zip(*columns, strict=True)]
            + [arrow.FixedShapeTensorArray.from_numpy_ndarray(images)],
            schema=schema_of(side),
        )
