"""Any image folder (names, links, formats, modes, sizes): read as Pillow reads it, or one line.

`pytest --long tests/reliability/test_folder_properties.py` tries many more.
"""

import os
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from training_framework.data import FileSplit, open_dataset
from training_framework.data.decoding import decode_image
from training_framework.data.host_batches import FileBatches
from training_framework.data.shards.packing import pack_folder
from training_framework.data.sources.shards import ShardSplit, open_shards, verify_shards
from training_framework.errors import UserError

EXAMPLES = 5000 if "LONG_TESTS" in os.environ else 60
MODES = {
    ".png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    ".jpg": ("L", "RGB", "CMYK"),
    ".JPEG": ("L", "RGB", "CMYK"),
    ".webp": ("RGB", "RGBA"),
    ".bmp": ("1", "L", "P", "RGB"),
    ".gif": ("1", "L", "P", "RGB"),
    ".tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
}
JPEG_TOLERANCE = 3
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Entry:
    """A file below a class: an image of some mode, or `what` else it is."""

    stem: bytes
    suffix: str
    what: str
    mode: str
    size: tuple[int, int]
    orientation: int


def _is_name(name: bytes) -> bool:
    return not name.startswith((b".", b"-")) and name.lower() not in (b"thumbs.db", b"desktop.ini")


names = st.one_of(
    st.lists(st.sampled_from([b"a", b"B", b" ", b"\n", b"'", b'"', b"\\", b"\xff", b"\x1b[2J",
                              b"\t", b"%s", b"{}", b"$(x)", b"\xe2\x80\xae"]),
             min_size=1, max_size=4)
    .map(b"".join),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1,
            max_size=8).map(str.encode),
).filter(_is_name)  # fmt: skip
sides = st.one_of(st.integers(1, 9), st.sampled_from([1, 2, 17, 300]))


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    suffix = draw(st.sampled_from(sorted(MODES)))
    return Entry(
        stem=draw(names),
        suffix=suffix,
        what=draw(st.sampled_from(["image"] * 40 + ["empty", "text", "cut", "link", "dangling",
                                                    "loop", "folder", "pipe", "hidden"])),
        mode=draw(st.sampled_from(MODES[suffix])),
        size=draw(st.tuples(sides, sides)),
        orientation=draw(st.integers(0, 9)),
    )  # fmt: skip


@st.composite
def folders(draw: st.DrawFn) -> dict[str, dict[bytes, list[Entry]]]:
    """Files by class and split; mostly the splits have the same classes."""
    classes = draw(st.lists(names, min_size=1, max_size=2, unique=True))
    odd = draw(st.integers(0, 9)) == 0
    files = st.lists(entries(), min_size=0 if odd else 1, max_size=3)
    extra = [draw(names)] if odd else []
    return {
        "train": {name: draw(files) for name in classes},
        "val": {name: draw(files) for name in classes[:1] + extra},
    }


def _pixels(entry: Entry) -> Image.Image:
    width, height = entry.size
    rng = np.random.default_rng(sum(entry.stem))
    if entry.mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[entry.mode]
        return Image.fromarray(rng.integers(0, 1 << 16, (height, width)).astype(kind))
    coarse = Image.fromarray(rng.integers(0, 256, (2, 2, 4), dtype=np.uint8), "RGBA")
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    return image if entry.mode == "RGBA" else image.convert("RGB").convert(entry.mode)


def _make(folder: Path, entry: Entry) -> None:
    name = os.fsencode(folder) + b"/" + entry.stem + entry.suffix.encode()
    path = Path(os.fsdecode(name))
    if entry.what in ("image", "cut", "link", "hidden"):
        target = path if entry.what in ("image", "cut") else folder.parent.parent / ".elsewhere"
        exif = Image.Exif()
        exif[ORIENTATION] = entry.orientation
        kind = Image.registered_extensions()[entry.suffix.lower()]
        options = {} if kind in ("BMP", "GIF", "TIFF") or not entry.orientation else {"exif": exif}
        with target.open("wb") as file:
            _pixels(entry).save(file, kind, **options)
        if entry.what == "cut":
            os.truncate(path, path.stat().st_size // 2)
        elif entry.what == "link":
            copy = folder.parent.parent / f".{len(list(folder.parent.parent.iterdir()))}"
            target.rename(copy)
            path.symlink_to(copy)
        elif entry.what == "hidden":
            target.rename(folder / f".hidden{entry.suffix}")
    elif entry.what in ("empty", "text"):
        path.write_bytes(b"" if entry.what == "empty" else b"not an image")
    elif entry.what == "folder":
        (path / "deeper").mkdir(parents=True)
    elif entry.what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(".." if entry.what == "loop" else "nowhere")


def _build(root: Path, content: dict[str, dict[bytes, list[Entry]]]) -> None:
    for split, classes in content.items():
        for name, files in classes.items():
            folder = root / split / os.fsdecode(name)
            folder.mkdir(parents=True, exist_ok=True)
            for entry in files:
                try:
                    _make(folder, entry)
                except FileExistsError:
                    continue  # the same name twice


def _as_pillow_reads_it(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(gray[:, :, None], 3, axis=2)
        if image.mode == "P" and "transparency" in image.info:
            return np.asarray(image.convert("RGBA").convert("RGB"))
        return np.asarray(image.convert("RGB"))


def _check_samples(split: FileSplit, root: Path) -> bool:
    """Whether every sample can be read; those that can be are right."""
    all_whole = True
    for train in (True, False):
        batches = FileBatches(split, image_size=8, train=train, seed=0)
        for sample in range(len(split)):
            path = Path(split.name_of(sample))
            try:
                pixels = decode_image(split.images().read(sample), path)
                batch = batches[0, np.array([sample])].batch
            except UserError as error:
                _check_line(error, root)
                all_whole = False
                continue
            expected = _as_pillow_reads_it(path)
            tolerance = JPEG_TOLERANCE if path.suffix.lower() in (".jpg", ".jpeg") else 0
            assert pixels.shape == expected.shape
            assert np.abs(pixels.astype(int) - expected).max() <= tolerance
            assert batch.images.shape == (1, 8, 8, 3)
            assert torch.equal(batch.labels, split.labels[[sample]])
    return all_whole


def _check_line(error: UserError, root: Path) -> None:
    line = str(error)
    assert line.isprintable() and "\n" not in line
    assert str(root) in line and "; " in line
    assert not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in line)


def _listed(split: FileSplit) -> list[tuple[str, str]]:
    """Class and path below it of every sample, by walking the folder independently."""
    found = []
    for folder, _, files in os.walk(split.root, followlinks=True):
        relative = os.path.relpath(folder, split.root)
        found += [
            (relative.partition("/")[0], os.path.join(relative, name))  # noqa: PTH118
            for name in files
            if not name.startswith(".")
        ]
    return sorted(found)


def _entry(
    what: str = "image", suffix: str = ".png", mode: str = "RGB", stem: bytes = b"a"
) -> Entry:
    return Entry(stem, suffix, what, mode, (3, 2), 6)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="LONG_TESTS" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    database=None,
)
@given(folders())
@example({"train": {b"a\nb": [_entry()]}, "val": {b"a\nb": [_entry(mode="I;16")]}})
@example({"train": {b"\xff": [_entry(stem=b"\xfe'\"")]}, "val": {b"\xff": [_entry("cut")]}})
@example({"train": {b"a": [_entry(), _entry("loop", stem=b"l")]}, "val": {b"a": [_entry()]}})
@example({"train": {b"a": [_entry("link"), _entry(stem=b"b")]}, "val": {b"a": [_entry("link")]}})
def test_any_folder_is_read_right_or_refused_in_one_line(
    content: dict[str, dict[bytes, list[Entry]]],
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "set")
        _build(root, content)
        try:
            dataset = open_dataset("folder", root=root)
        except UserError as error:
            _check_line(error, root)
            return
        whole = True
        for split in (dataset.train, dataset.val):
            assert isinstance(split, FileSplit)
            names = dataset.facts.class_names
            listed = zip(
                (names[label] for label in split.labels.tolist()), split.paths, strict=True
            )
            assert sorted(listed) == _listed(split)
            assert split.digest() == split.digest()
            whole &= _check_samples(split, root)
        try:
            pack_folder(root, Path(scratch, "shards"))
        except UserError as error:
            _check_line(error, root)
            assert not whole and not Path(scratch, "shards").exists()
            return
        assert whole
        packed = open_shards(root=Path(scratch, "shards"))
        verify_shards(Path(scratch, "shards"))
        for ours, theirs in ((packed.train, dataset.train), (packed.val, dataset.val)):
            assert isinstance(ours, ShardSplit) and isinstance(theirs, FileSplit)
            assert torch.equal(ours.labels, theirs.labels)
            for sample in range(len(theirs)):
                assert ours.images().read(sample) == theirs.images().read(sample)
