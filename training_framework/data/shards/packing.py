"""Pack an image folder into tar shards in the format of WebDataset.

The images keep the order of the folder's listing, so the result does not depend on the number of
workers. The folder of shards appears whole or not at all; a stopped packing has to start anew.
"""

import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from training_framework.data.bad_images import BadImages, SplitName
from training_framework.data.decoding import Pixels, decode_image, resize
from training_framework.data.image_files import FileSplit, StorageFault, read_image
from training_framework.data.shards.shard_index import (
    INFO_FILE,
    ShardIndex,
    ShardInfo,
    build_index,
    write_index,
)
from training_framework.data.sources.folder import open_folder
from training_framework.data.splits import Split
from training_framework.errors import UserError, one_line
from training_framework.faults import fault_point

__all__ = ["pack_folder"]

_QUALITY = 90
_SHARD_IMAGES = 1024
_IMAGES_AHEAD = 8
_MIN_SIDE = 8
_MAX_JPEG_SIDE = 65_500
_JPEG_UNIT = 16  # width in pixels of a coding unit of a JPEG with halved chroma
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")


def pack_folder(
    source: Path,
    dest: Path,
    *,
    shorter_side: int | None = None,
    skip_bad: bool = False,
    workers: int = 1,
    report: Callable[[str], None] = tqdm.write,
    show_progress: bool = False,
) -> tuple[ShardInfo, ShardIndex]:
    """Pack an image folder into a new folder of shards.

    Args:
        source: Folder with train/<class>/* and val/<class>/* (or test/).
        dest: The new folder.
        shorter_side: Scale images with a longer shorter side down to this one, in pixels, and save
            them as JPEG of quality 90. The others keep their bytes.
        skip_bad: Skip images that cannot be decoded, up to 1% of a split.
        workers: Threads that decode and encode.
        report: Shows a line about a skipped image.
        show_progress: Show a progress bar on standard error.

    Returns:
        The description of the new folder, and its index.

    Raises:
        UserError: An argument or the folder is wrong, `dest` exists, an image (or with `skip_bad`,
            too many of them) cannot be decoded, or the disk is full.
    """
    if dest.exists():
        raise UserError(f"{dest}: already exists", "name a new folder or remove it")
    if shorter_side is not None and shorter_side < _MIN_SIDE:
        raise UserError(f"shorter-side is {shorter_side}", f"take at least {_MIN_SIDE}")
    if workers < 1:
        raise UserError(f"workers is {workers}", "take at least 1")
    dataset = open_folder(root=source)
    bad = BadImages(train=len(dataset.train), val=len(dataset.val), report=report)
    scratch = dest.with_name(f".{dest.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        with (
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
            tqdm(total=len(dataset.train) + len(dataset.val), disable=not show_progress) as bar,
        ):
            shards = _Shards(scratch, shorter_side, pool.map, bad if skip_bad else None, bar.update)
            shards.write("train", dataset.train)
            shards.write("val", dataset.val)
        info = ShardInfo(
            source=_as_text(source.resolve().name),
            class_names=[_as_text(name) for name in dataset.facts.class_names],
            shorter_side=shorter_side,
            skipped=[
                _as_text(os.path.relpath(name, source))
                for reasons in bad.by_split().values()
                for name in reasons
            ],
        )
        return _finish(scratch, dest, info)
    except OSError as error:
        raise UserError(
            f"{error.filename or dest}: cannot be written to ({error.strerror})",
            "free some space there, or name another folder",
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Shards(NamedTuple):
    """Writes the shards of a folder.

    Attributes:
        folder: The new folder.
        shorter_side: As for `pack_folder`.
        in_threads: A `map` whose calls run at the same time.
        bad: Records skipped images; None: each is an error.
        advance: Called with the number of images of each written shard.
    """

    folder: Path
    shorter_side: int | None
    in_threads: Callable[..., Iterator[tuple[bytes, str] | UserError]]
    bad: BadImages | None
    advance: Callable[[int], object]

    def write(self, name: SplitName, split: Split) -> None:
        """Write all shards of a split."""
        assert isinstance(split, FileSplit)
        store = partial(_stored, split, self.shorter_side)
        for number, begin in enumerate(range(0, len(split), _SHARD_IMAGES)):
            samples = range(begin, min(begin + _SHARD_IMAGES, len(split)))
            bad_here: dict[str, str] | None = None if self.bad is None else {}
            members = _members(self.in_threads, store, split, samples, bad_here)
            _write_tar(self.folder / f"{name}-{number:06}.tar", members)
            if self.bad is not None:
                self.bad.add(name, bad_here or {})
            self.advance(len(samples))


def _members(
    in_threads: Callable[..., Iterator[tuple[bytes, str] | UserError]],
    store: Callable[[int], tuple[bytes, str] | UserError],
    split: FileSplit,
    samples: range,
    bad: dict[str, str] | None,
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a shard's members; `bad` receives the reasons for skipped images."""
    taken = set[str]()
    for begin in range(samples.start, samples.stop, _IMAGES_AHEAD):
        ahead = range(begin, min(begin + _IMAGES_AHEAD, samples.stop))
        for sample, stored in zip(ahead, in_threads(store, ahead), strict=True):
            if isinstance(stored, UserError):
                name = split.name_of(sample)
                if bad is None or isinstance(stored, StorageFault):
                    raise stored
                bad[name] = stored.fault.removeprefix(one_line(f"{name}:")).strip()
                continue
            key = _key_of(split.paths[sample], taken)
            yield f"{key}{stored[1]}", stored[0]
            yield f"{key}.cls", b"%d" % int(split.labels[sample])


def _key_of(path: str, taken: set[str]) -> str:
    """A key that is not yet taken in a shard, without dots in the name of the file."""
    folder, _, name = _CONTROLS.sub("_", _as_text(path)).rpartition("/")
    stem = key = f"{folder}/{Path(name).stem.replace('.', '_')}"
    number = 1
    while key in taken:
        number += 1
        key = f"{stem}_{number}"
    taken.add(key)
    return key


def _as_text(name: str) -> str:
    """A file's name in valid UTF-8: names may contain any bytes."""
    return os.fsencode(name).decode(errors="replace")


def _stored(
    split: FileSplit, shorter_side: int | None, sample: int
) -> tuple[bytes, str] | UserError:
    """The bytes to store for an image and their suffix, or the error of a bad image.

    The whole image is decoded even if its bytes are kept, so that damage is found now.
    """
    path = Path(split.name_of(sample))
    try:
        data = read_image(path)
        pixels = decode_image(data, path)
    except UserError as error:
        return error
    height, width = pixels.shape[:2]
    scale = (shorter_side or height) / min(height, width)
    shape = round(height * scale), round(width * scale)
    if shorter_side is None or scale >= 1 or max(shape) > _MAX_JPEG_SIDE:
        return data, path.suffix.lower()
    return _jpeg(resize(pixels, *shape)), ".jpg"


def _jpeg(pixels: Pixels) -> bytes:
    """Encode with restart markers, so that a region can be decoded without the rest.

    There is a marker every one, two or three units of 16 pixels, the largest of these that divides
    a row. The markers add 1 to 4% to the size.
    """
    units = -(-pixels.shape[1] // _JPEG_UNIT)
    interval = next(count for count in (3, 2, 1) if units % count == 0)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(
        stream, "JPEG", quality=_QUALITY, subsampling="4:2:0", restart_marker_blocks=interval
    )
    return stream.getvalue()


def _write_tar(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    fault_point("packing.after_shard")


def _finish(scratch: Path, dest: Path, info: ShardInfo) -> tuple[ShardInfo, ShardIndex]:
    """Read the shards back for their checksums, then rename the folder."""
    index, digests = build_index(scratch)
    info = info.model_copy(update={"shards": digests}).sealed()
    with (scratch / INFO_FILE).open("w", encoding="utf-8") as file:
        file.write(info.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    write_index(scratch, index, timed=False)
    _flush_folder(scratch)
    fault_point("packing.before_rename")
    scratch.rename(dest)
    _flush_folder(dest.parent)
    return info, index


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
