"""Pack an image folder into one Arrow file (`packed_file` describes it).

The pictures of each class are packed in pieces, each a small file beside the destination, by as
many processes as wanted; then the pieces are put together in the listing's order. So the
result does not depend on the number of processes, a packing that was stopped goes on with those
pieces that are missing, and the destination appears whole or not at all. Until then the pieces need
as much room as the result, raw pixels twice as much.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from training_framework.data.bad_images import BadImages, SplitName
from training_framework.data.shards.joining import join_pieces
from training_framework.data.shards.packed_file import PackInfo, load_pyarrow
from training_framework.data.shards.pieces import (
    Packing,
    Piece,
    PieceResult,
    as_text,
    begin_process,
    make_piece,
)
from training_framework.data.sources.folder import open_folder
from training_framework.data.splits import Dataset, FileSplit, Split
from training_framework.errors import UserError

__all__ = ["PackSummary", "pack_folder"]

SUFFIX = ".arrow"
DEFAULT_QUALITY = 90
_PIECE_IMAGES = 256
_PIECES_AHEAD = 4
_SMALLEST_SIDE = 8
_GO_ON = "make room there, or name another; the same command goes on with what is packed already"


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What `pack_folder` wrote.

    Attributes:
        dest: The packed file.
        info: What it says of itself.
        file_bytes: Its size.
    """

    dest: Path
    info: PackInfo
    file_bytes: int


def pack_folder(
    source: Path,
    dest: Path,
    *,
    pixels: bool = False,
    shorter_side: int | None = None,
    quality: int | None = None,
    skip_bad: bool = False,
    processes: int = 1,
    report: Callable[[str], None] = tqdm.write,
    show_progress: bool = False,
) -> PackSummary:
    """Pack an image folder into one file, or go on with it.

    Args:
        source: Holds train/<class>/* and val/<class>/* (or test/).
        dest: The new file, `.arrow`.
        pixels: Store raw uint8 pixels of square images: the middle of each picture, scaled to
            `shorter_side`. Without it, all pictures must be square and of one size.
        shorter_side: Scale pictures whose shorter side is longer down to it, in pixels. The others
            keep their bytes.
        quality: JPEG quality of those that are scaled down, 90 unless given.
        skip_bad: Pass over pictures that cannot be decoded, up to 1% of a split.
        processes: That decode and encode; 1 works in this one.
        report: Says a line about a picture that was passed over.
        show_progress: Show a progress bar on standard error.

    Raises:
        UserError: An argument or the folder is wrong, `dest` exists, a picture cannot be decoded
            or too many cannot, a process was killed, the disk is full, or pyarrow is missing.
    """
    load_pyarrow()
    _check_arguments(dest, pixels, shorter_side, quality, processes)
    dataset = open_folder(root=source)
    packing = Packing(
        folder=dest.with_name(f".{dest.name}.parts"),
        pixels=pixels,
        shorter_side=shorter_side,
        quality=None if pixels or not shorter_side else quality or DEFAULT_QUALITY,
        skip_bad=skip_bad,
    )
    pieces = list(_pieces(dataset))
    bad = BadImages(train=len(dataset.train), val=len(dataset.val), report=report)
    try:
        packing.folder.mkdir(parents=True, exist_ok=True)
        with tqdm(
            total=dataset.facts.train_images + dataset.facts.val_images,
            unit="img",
            desc=dest.name,
            disable=not show_progress,
        ) as bar:
            results = {}
            for number, result in _results(packing, pieces, processes):
                if result.fault:
                    raise UserError(*result.fault)
                bad.add(pieces[number].split, result.bad)
                results[number] = result
                bar.update(len(pieces[number].paths))
        info = _info(dataset, source, packing, pieces, results)
        files = [results[number].path for number in range(len(pieces))]
        join_pieces(files, dest, info, folder=packing.folder)
        shutil.rmtree(packing.folder, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{error.filename or dest}: cannot be written to ({error.strerror})", _GO_ON
        ) from None
    except BrokenProcessPool:
        raise UserError(
            f"{dest}: a packing process was killed, perhaps for want of memory",
            "start the same command again, with fewer --processes if need be: it goes on",
        ) from None
    return PackSummary(dest=dest, info=info, file_bytes=dest.stat().st_size)


def _check_arguments(
    dest: Path, pixels: bool, shorter_side: int | None, quality: int | None, processes: int
) -> None:
    if dest.suffix != SUFFIX:
        raise UserError(f"{dest}: is no name of a packed file", f"let it end with {SUFFIX}")
    if dest.exists():
        raise UserError(f"{dest}: exists", "name a new file or remove it")
    if shorter_side is not None and shorter_side < _SMALLEST_SIDE:
        raise UserError(f"shorter-side is {shorter_side}", f"take at least {_SMALLEST_SIDE}")
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"quality is {quality}", "take 1 to 100")
    if quality is not None and (pixels or shorter_side is None):
        raise UserError(
            "quality is given, but no picture is encoded anew",
            "drop it, or give shorter-side and no pixels",
        )
    if processes < 1:
        raise UserError(f"processes is {processes}", "take at least 1")


def _pieces(dataset: Dataset) -> Iterator[Piece]:
    """The samples in the order of the listing; no piece holds samples of two classes.

    So a picture that comes, goes or changes leaves the pieces of the other classes valid.
    """
    splits: tuple[tuple[SplitName, Split], ...] = ("train", dataset.train), ("val", dataset.val)
    for name, split in splits:
        assert isinstance(split, FileSplit)
        labels = split.labels.tolist()
        begin = 0
        for label, members in itertools.groupby(labels):
            end = begin + len(list(members))
            for start in range(begin, end, _PIECE_IMAGES):
                yield Piece(
                    split=name,
                    label=label,
                    offset=start - begin,
                    root=split.root,
                    paths=split.paths[start : min(start + _PIECE_IMAGES, end)],
                )
            begin = end


def _results(
    packing: Packing, pieces: Sequence[Piece], processes: int
) -> Iterator[tuple[int, PieceResult]]:
    """Each piece's number and result, as they are done."""
    if processes == 1:
        for number, piece in enumerate(pieces):
            yield number, make_piece(packing, piece)
        return
    with ProcessPoolExecutor(min(processes, len(pieces)), initializer=begin_process) as executor:
        try:
            waiting = iter(enumerate(pieces))
            under_way: dict[Future[PieceResult], int] = {}
            while True:
                for number, piece in waiting:
                    under_way[executor.submit(make_piece, packing, piece)] = number
                    if len(under_way) >= _PIECES_AHEAD * processes:
                        break
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    yield under_way.pop(future), future.result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _info(
    dataset: Dataset,
    source: Path,
    packing: Packing,
    pieces: Sequence[Piece],
    results: dict[int, PieceResult],
) -> PackInfo:
    skipped, counts = [], {"train": 0, "val": 0}
    sides = {result.side for result in results.values() if result.side}
    left = dict.fromkeys(range(dataset.facts.num_classes), 0)
    for number, piece in enumerate(pieces):
        result = results[number]
        counts[piece.split] += result.count
        left[piece.label] += result.count if piece.split == "train" else 0
        skipped += [f"{piece.split}/{os.path.relpath(name, piece.root)}" for name in result.bad]
    empty = [name for label, name in enumerate(dataset.facts.class_names) if not left[label]]
    if empty:
        raise UserError(
            f"{source}: no training picture of class {empty[0]} can be decoded",
            "add pictures or remove the class",
        )
    if len(sides) > 1:
        raise UserError(
            f"{source}: raw pixels need images of one size, and there are some of {min(sides)} and "
            f"of {max(sides)} px",
            "give shorter-side",
        )
    return PackInfo(
        source=as_text(source.resolve().name),
        class_names=[as_text(name) for name in dataset.facts.class_names],
        train_images=counts["train"],
        val_images=counts["val"],
        pixels=next(iter(sides), None),
        shorter_side=packing.shorter_side,
        quality=packing.quality,
        skipped=[as_text(name) for name in skipped],
    )
