"""Reading tar shards: the same batches as from the folder, and nothing wrong passes."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training_framework.data import StorageFault, build_loader, open_dataset
from training_framework.data.bad_images import BadImages
from training_framework.data.host_batches import FileBatches
from training_framework.data.shards.packing import pack_folder
from training_framework.data.shards.shard_index import INDEX_FILE, INFO_FILE
from training_framework.data.sources.folder import open_folder
from training_framework.data.sources.shards import ShardSplit, open_shards, verify_shards
from training_framework.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed") / "set"
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for number in range(count):
            path = root / split / f"class{number % 3}" / f"bild-ü-{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
            coarse.resize((42, 30), Image.Resampling.BICUBIC).save(path, quality=95)
    return root


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    pack_folder(source, source.with_name("packed") / "set")
    return source.with_name("packed") / "set"


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(packed, tmp_path / "set"))


def _train(folder: Path) -> ShardSplit:
    split = open_shards(root=folder).train
    assert isinstance(split, ShardSplit)
    return split


def _loader(split: Any, *, num_workers: int = 0, train: bool = True) -> Any:
    return build_loader(
        split,
        device="cpu",
        global_batch_size=3,
        train=train,
        image_size=16,
        seed=3,
        num_workers=num_workers,
    )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_equal_those_of_the_folder(
    source: Path, packed: Path, num_workers: int, train: bool
) -> None:
    folder, shards = open_dataset("folder", root=source), open_dataset("shards", root=packed)
    name = "train" if train else "val"
    expected = _loader(getattr(folder, name), train=train)
    loader = _loader(getattr(shards, name), num_workers=num_workers, train=train)
    try:
        for want, got in zip(expected.epoch(1), loader.epoch(1), strict=True):
            torch.testing.assert_close(got.images, want.images)
            torch.testing.assert_close(got.labels, want.labels)
            torch.testing.assert_close(got.indices, want.indices)
    finally:
        loader.close()
    assert shards.facts == folder.facts


def test_a_part_of_the_training_images_keeps_names_and_labels(packed: Path, source: Path) -> None:
    folder = open_folder(root=source).train
    small, expected = _train(packed).limited(4, seed=5), folder.limited(4, seed=5)
    assert small.labels.tolist() == expected.labels.tolist()
    names = [small.name_of(sample) for sample in range(4)]
    paths = [Path(expected.name_of(sample)).relative_to(source / "train") for sample in range(4)]
    assert names == [f"{packed}/train-000000.tar/{path}" for path in paths]
    assert small.digest() != _train(packed).digest()


def test_a_pickled_split_reads_the_same_samples(packed: Path) -> None:
    split = _train(packed)
    copied = pickle.loads(pickle.dumps(split))
    assert copied.images().read(4) == split.images().read(4)
    assert copied.name_of(4) == split.name_of(4)


def test_shards_cannot_be_resident(packed: Path) -> None:
    with pytest.raises(UserError, match=r"the images in .*set are files"):
        build_loader(
            _train(packed),
            device="cpu",
            global_batch_size=2,
            train=True,
            image_size=16,
            resident=True,
        )


def _invert(path: Path, at: int, count: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        inverted = bytes(byte ^ 255 for byte in file.read(count))
        file.seek(at)
        file.write(inverted)


def _place_of(folder: Path, sample: int) -> tuple[int, int]:
    index = _train(folder).index
    return int(index.table[1, sample]), int(index.lengths[sample])


def test_one_inverted_byte_of_an_image_is_found_by_training_and_by_verification(
    shards: Path,
) -> None:
    offset, length = _place_of(shards, 2)
    _invert(shards / "train-000000.tar", offset + length - 3)
    name = r"train-000000\.tar/class1/bild-ü-1\.jpg"
    split = _train(shards)
    batches = FileBatches(
        split, image_size=16, train=True, seed=0, bad_images=BadImages(train=6, val=3)
    )
    batches[0, np.array([1])]
    with pytest.raises(
        StorageFault, match=rf"{name}: has changed since it was indexed.*pack again"
    ):
        batches[0, np.array([2])]
    with pytest.raises(UserError, match=rf"1 of 9 images have changed .*: {name}; restore"):
        verify_shards(shards)


def test_swapped_images_are_found(shards: Path) -> None:
    first, second = (_place_of(shards, sample) for sample in (0, 1))
    path = shards / "train-000000.tar"
    content = bytearray(path.read_bytes())
    length = min(first[1], second[1])
    one, other = (slice(offset, offset + length) for offset, _ in (first, second))
    content[one], content[other] = content[other], content[one]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"2 of 9 images .*bild-ü-0\.jpg, .*bild-ü-3\.jpg"):
        verify_shards(shards)


def _flip_label(shards: Path) -> None:
    path = shards / "train-000000.tar"
    with tarfile.open(path) as tar:
        member = tar.getmember("class1/bild-ü-4.cls")
    content = bytearray(path.read_bytes())
    content[member.offset_data] = ord("2")
    path.write_bytes(content)


def test_a_flipped_label_in_a_shard_changes_no_training_and_is_found(shards: Path) -> None:
    before = _train(shards).labels
    _flip_label(shards)
    assert torch.equal(_train(shards).labels, before)
    with pytest.raises(UserError, match=r"1 of 9 images .*train-000000\.tar/class1/bild-ü-4\.jpg"):
        verify_shards(shards)
    (shards / INDEX_FILE).unlink()  # nor does it get into a new index
    with pytest.raises(
        UserError, match=r"train-000000\.tar: has changed since it was packed \(SHA-256\)"
    ):
        open_shards(root=shards)


def test_every_inverted_byte_of_the_index_is_noticed(shards: Path) -> None:
    path = shards / INDEX_FILE
    whole, expected = path.read_bytes(), _train(shards)
    for at in range(0, len(whole), 7):
        _invert(path, at)
        split = _train(shards)
        assert torch.equal(split.labels, expected.labels)
        assert split.digest() == expected.digest()
        assert [split.name_of(n) for n in range(6)] == [expected.name_of(n) for n in range(6)]
        assert path.read_bytes() == whole  # made anew


def test_an_index_that_reaches_out_is_not_believed(shards: Path) -> None:
    from training_framework.data.shards.shard_index import ShardIndex, write_index

    good = _train(shards).index
    for row, value in ((0, 2), (0, -1), (1, 1 << 40), (2, 1 << 62), (4, -1), (4, 1 << 40), (5, 1)):
        table = good.table.copy()
        table[row, 3] = value
        changed = ShardIndex(good.shards, good.train_images, table, good.names)
        assert write_index(shards, changed, timed=False)
        assert np.array_equal(_train(shards).index.table, good.table)


@pytest.mark.parametrize("kept", [0, 100, 512, 0.4, 0.999])
def test_a_shard_cut_short_is_named_with_the_member(shards: Path, kept: float) -> None:
    path = shards / "train-000000.tar"
    split = _train(shards)
    size = path.stat().st_size
    os.truncate(path, kept if isinstance(kept, int) else int(kept * size))
    with pytest.raises(
        UserError, match=r"train-000000\.tar: (ends too early, at byte|has changed since it was)"
    ):
        open_shards(root=shards)
    if kept != 0.999:
        batches = FileBatches(split, image_size=16, train=True, seed=0)
        with pytest.raises(StorageFault, match=r"ü-5\.jpg: the shard has become shorter"):
            batches[0, np.array([5])]


def test_a_shard_that_is_gone_is_named(shards: Path) -> None:
    split = _train(shards)
    (shards / "train-000000.tar").rename(shards / "train-000001.tar")
    with pytest.raises(UserError, match=r"train-000000\.tar: is missing; restore"):
        open_shards(root=shards)
    with pytest.raises(StorageFault, match=r"train-000000\.tar/.*jpg: No such file"):
        split.images().read(0)


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _train(shards).digest()
    (shards / INDEX_FILE).unlink()
    (shards / INDEX_FILE).mkdir()  # root may write anywhere else
    dataset = open_shards(root=shards)
    assert dataset.train.digest() == expected
    assert len(dataset.notes) == 1 and "every start reads all shards" in dataset.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["a", "b"], "digest": ""}, "label 2 of 3? ?2? ?classes"),
        ({"class_names": 3}, "class_names"),
        ({"format_version": 2}, "format_version"),
        ({"shorter_side": 0}, "shorter_side"),
        ({"shards": {"train-000000.tar": "x"}}, "has changed since it was written"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(
    shards: Path, change: dict[str, Any], message: str
) -> None:
    path = shards / INFO_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        open_shards(root=shards)


def _jpeg(seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def _member(name: str, content: bytes, **attributes: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content


def _write(path: Path, *members: tuple[tarfile.TarInfo, bytes], kind: int = 1) -> None:
    with tarfile.open(path, "w", format=kind) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))


def _sample(key: str, label: int) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [_member(f"{key}.jpg", _jpeg(label)), _member(f"{key}.cls", b"%d\n" % label)]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_of_other_tools_are_read(tmp_path: Path, kind: int) -> None:
    long = "./folder/" + ("x" * 150 if kind != tarfile.USTAR_FORMAT else "x") + "/1"
    extra = [
        _member("folder", b"", type=tarfile.DIRTYPE),
        _member("0.json", b"{}"),
        _member("0.seg.png", b"mask"),
        _member("._0.jpg", b"resource fork"),
    ]
    _write(tmp_path / "pets-train-0.tar", *extra, *_sample("0", 2), *_sample(long, 0), kind=kind)
    _write(tmp_path / "pets-train-1.tar", *reversed(_sample("0", 1)), kind=kind)
    _write(tmp_path / "pets-test-0.tar", *_sample("0", 1), kind=kind)
    dataset = open_shards(root=tmp_path)
    assert dataset.facts.class_names == ("0", "1", "2")
    assert dataset.train.labels.tolist() == [2, 0, 1]
    assert dataset.train.name_of(1).endswith(f"pets-train-0.tar/{long[2:]}.jpg")
    assert isinstance(dataset.train, ShardSplit)
    images = dataset.train.images()
    assert [images.read(n) for n in range(3)] == [_jpeg(2), _jpeg(0), _jpeg(1)]
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    assert open_shards(root=tmp_path).facts.class_names == ("cat", "dog", "owl")
    verify_shards(tmp_path)
    _write(tmp_path / "pets-train-1.tar", *_sample("0", 1), *_sample("1", 1), kind=kind)
    assert open_shards(root=tmp_path).facts.train_images == 4  # the index was stale


def test_shards_of_the_tar_command_are_read(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for key, label in (("a", 0), ("b", 1)):
            (tmp_path / split / f"{key}.jpg").write_bytes(_jpeg(label))
            (tmp_path / split / f"{key}.cls").write_text(str(label))
        (tmp_path / "shards").mkdir(exist_ok=True)
        shutil.which("tar") or pytest.skip("no tar command")
        os.system(f"tar -C {tmp_path}/{split} -cf {tmp_path}/shards/{split}-0.tar .")
    assert sorted(open_shards(root=tmp_path / "shards").train.labels.tolist()) == [0, 1]


def _bytes_of(*members: tuple[tarfile.TarInfo, bytes], **options: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _pax(**headers: str) -> bytes:
    info, content = _sample("a", 0)[0]
    info.pax_headers = headers
    return _bytes_of((info, content), format=tarfile.PAX_FORMAT)


def _header_only(kind: bytes, size: int, name: str = "a.jpg") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


GOOD = _sample("a", 0)
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "absolute": (lambda: _bytes_of(_member("/etc/a.jpg", b"x")), "leads out"),
    "parent": (lambda: _bytes_of(_member("x/../../a.jpg", b"x")), "leads out"),
    "symbolic link": (
        lambda: _bytes_of(_member("a.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        "not a plain file",
    ),
    "hard link": (
        lambda: _bytes_of(_member("a.jpg", b"", type=tarfile.LNKTYPE, linkname="b.jpg")),
        "not a plain file",
    ),
    "device": (lambda: _bytes_of(_member("a.jpg", b"", type=tarfile.CHRTYPE)), "not a plain file"),
    "pipe": (lambda: _bytes_of(_member("a.jpg", b"", type=tarfile.FIFOTYPE)), "not a plain file"),
    "sparse": (lambda: _header_only(tarfile.GNUTYPE_SPARSE, 0), "not a plain file"),
    "sparse by pax": (lambda: _pax(**{"GNU.sparse.major": "1"}), "sparse or huge"),
    "huge": (lambda: _header_only(tarfile.REGTYPE, 1 << 40), "not a plain file"),
    "huge by pax": (lambda: _pax(size=str(1 << 60)), "sparse or huge"),
    "huge, but allowed": (lambda: _header_only(tarfile.REGTYPE, 1 << 29), "ends too early"),
    "negative size": (lambda: _header_only(tarfile.REGTYPE, -512), "not a plain file"),
    "pax bomb": (lambda: _pax(comment="x" * (1 << 20)), "not a plain file"),
    "damaged pax": (
        lambda: _pax(comment="x" * 40).replace(b"comment=", b"comment~"),
        "damaged extended header",
    ),
    "long name bomb": (lambda: _header_only(tarfile.GNUTYPE_LONGNAME, 1 << 30), "not a plain file"),
    "long links": (lambda: _header_only(tarfile.GNUTYPE_LONGLINK, 100), "not a plain file"),
    "duplicate image": (lambda: _bytes_of(*GOOD, GOOD[0]), "the second one with this key"),
    "two formats": (
        lambda: _bytes_of(*GOOD, _member("a.png", b"x")),
        "the second one with this key",
    ),
    "duplicate label": (
        lambda: _bytes_of(*GOOD, _member("a.cls", b"1")),
        "the second one with this key",
    ),
    "no label": (lambda: _bytes_of(GOOD[0]), r"a\.jpg: has no label"),
    "no image": (lambda: _bytes_of(*GOOD, _member("b.cls", b"1")), r"b\.cls: has no image"),
    "negative label": (lambda: _bytes_of(GOOD[0], _member("a.cls", b"-1")), "class number"),
    "label in words": (lambda: _bytes_of(GOOD[0], _member("a.cls", b"cat")), "class number"),
    "huge label": (lambda: _bytes_of(GOOD[0], _member("a.cls", b"9" * 30)), "class number"),
    "long label": (lambda: _bytes_of(GOOD[0], _member("a.cls", b"1" + b" " * 99)), "class number"),
    "damaged header": (
        lambda: _bytes_of(*GOOD).replace(b"a.cls", b"b.cls", 1),
        r"damaged after a\.jpg \(bad checksum\)",
    ),
    "two archives in one": (lambda: _bytes_of(*GOOD) + _bytes_of(*GOOD), "after its end"),
    "compressed": (lambda: b"\x1f\x8b" + bytes(range(256)) * 4, "damaged after its start"),
    "text": (lambda: b"text" * 1000, "damaged after its start"),
    "empty": (lambda: b"", "ends too early"),
    "no samples": (lambda: bytes(1024), "a split has no images"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shards_are_one_line(tmp_path: Path, name: str) -> None:
    make, message = HOSTILE[name]
    (tmp_path / "train-0.tar").write_bytes(make())
    _write(tmp_path / "val-0.tar", *GOOD)
    with pytest.raises(UserError, match=message) as caught:
        open_shards(root=tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / INDEX_FILE).exists()


def test_mutated_shards_are_read_right_or_refused(packed: Path, tmp_path: Path) -> None:
    whole = (packed / "train-000000.tar").read_bytes()
    expected = set(_train(packed).index.checksums.tolist())
    shutil.copy(packed / "val-000000.tar", tmp_path)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        content = bytearray(whole)
        for at in rng.integers(0, 6 * 2048, 3):  # mostly headers
            content[at] = rng.integers(256)
        (tmp_path / "train-000000.tar").write_bytes(content)
        (tmp_path / INDEX_FILE).unlink(missing_ok=True)
        try:
            split = _train(tmp_path)
        except UserError:
            refused += 1
        else:
            assert len(split) == 6
            assert len(expected & set(split.index.checksums.tolist())) >= 3
    assert refused > 100
