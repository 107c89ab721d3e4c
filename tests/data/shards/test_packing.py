import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from forks import Forks
from PIL import Image

from training_framework.data.decoding import decode_image
from training_framework.data.jpeg_regions import Box, decode_region
from training_framework.data.shards import packing
from training_framework.data.shards.shard_index import INFO_FILE
from training_framework.data.sources.shards import ShardSplit, open_shards, verify_shards
from training_framework.errors import UserError
from training_framework.faults import fault_injector

ENTRIES = ["dataset.json", "index.safetensors", "train-000000.tar", "val-000000.tar"]


def _image(path: Path, height: int, width: int, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels.resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes; sizes and formats differ."""
    root = tmp_path / "pets"
    for number in range(5):
        _image(root / "train" / "cat" / f"{number}.jpg", 60 + 10 * number, 90, seed=number)
        _image(root / "train" / "dog" / f"{number}.png", 90, 61 + 8 * number, seed=10 + number)
    _image(root / "val" / "cat" / "a.jpg", 40, 40, seed=20)
    _image(root / "val" / "dog" / "far" / "b.jpg", 300, 200, seed=21)
    return root


def _members(path: Path) -> dict[str, bytes]:
    """Names and contents as Python's own tar reader sees them."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_images_keep_their_bytes_and_order_and_any_tar_reader_finds_them(
    source: Path, tmp_path: Path
) -> None:
    info, index = packing.pack_folder(source, tmp_path / "shards")
    assert (index.train_images, len(index)) == (10, 12)
    assert (info.class_names, info.source) == (["cat", "dog"], "pets")
    for split in ("train", "val"):
        members = _members(tmp_path / "shards" / f"{split}-000000.tar")
        files = sorted(path for path in (source / split).rglob("*.*"))
        images = [name for name in members if not name.endswith(".cls")]
        assert images == [path.relative_to(source / split).as_posix() for path in files]
        for name, path in zip(images, files, strict=True):
            assert members[name] == path.read_bytes()
            label = members[name.rpartition(".")[0] + ".cls"]
            assert label == (b"1" if "dog" in name else b"0")
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ENTRIES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pets", "shards"]


def test_larger_images_are_scaled_and_can_be_decoded_in_part(source: Path, tmp_path: Path) -> None:
    packing.pack_folder(source, tmp_path / "shards", shorter_side=64)
    train = _members(tmp_path / "shards" / "train-000000.tar")
    assert train["cat/0.jpg"] == (source / "train/cat/0.jpg").read_bytes()
    scaled = _members(tmp_path / "shards" / "val-000000.tar")["dog/far/b.jpg"]
    with Image.open(source / "val/dog/far/b.jpg") as image:
        expected = np.asarray(image.resize((64, 96), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decode_image(scaled, "b") - expected).mean() < 3
    region = decode_region(scaled, Box(40, 20, 20, 20), factor=1)
    assert region is not None
    assert region.pixels.shape[0] * region.pixels.shape[1] < 96 * 64 / 2
    assert open_shards(root=tmp_path / "shards").facts.image_size == 64


def test_the_result_does_not_depend_on_the_number_of_workers(source: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("three", 3)):
        packing.pack_folder(source, tmp_path / name, shorter_side=64, workers=workers)
    for name in ENTRIES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_many_images_become_many_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing.pack_folder(source, tmp_path / "one")
    monkeypatch.setattr(packing, "_SHARD_IMAGES", 4)
    packing.pack_folder(source, tmp_path / "many")
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.tar"))
    assert shards == [f"train-00000{n}.tar" for n in range(3)] + ["val-000000.tar"]
    one, many = open_shards(root=tmp_path / "one"), open_shards(root=tmp_path / "many")
    assert one.digest() == many.digest()
    assert isinstance(one.train, ShardSplit) and isinstance(many.train, ShardSplit)
    of_one, of_many = one.train.images(), many.train.images()
    assert [of_one.read(n) for n in range(10)] == [of_many.read(n) for n in range(10)]


def test_a_killed_packing_leaves_no_folder_and_can_be_done_again(
    source: Path, tmp_path: Path, forks: Forks
) -> None:
    packing.pack_folder(source, tmp_path / "expected")
    dest = tmp_path / "shards"
    command = ["-m", "training_framework", "data", "pack", source, dest]
    for fault in ("packing.after_shard:1", "packing.before_rename:1"):
        environment = os.environ | {"TRAINING_FRAMEWORK_FAULT": fault}
        killed = forks.run(*command, "--workers", "1", env=environment)
        assert killed.returncode == -signal.SIGKILL
        assert not dest.exists()
    assert (tmp_path / ".shards.partial").exists()
    packing.pack_folder(source, dest)
    assert not (tmp_path / ".shards.partial").exists()
    for name in ENTRIES:
        assert (dest / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = fault_injector("packing.before_rename:1:ENOSPC")
    monkeypatch.setattr(packing, "fault_point", full)
    dest = tmp_path / "shards"
    with pytest.raises(
        UserError, match=rf"^{dest}: cannot be written to \(No space left.*free some space"
    ):
        packing.pack_folder(source, dest)
    assert [path.name for path in tmp_path.iterdir()] == ["pets"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_image_is_named_and_ends_the_packing(
    source: Path, tmp_path: Path, workers: int
) -> None:
    bad = source / "train/dog/2.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(UserError, match=r"train/dog/2\.png"):
        packing.pack_folder(source, tmp_path / "shards", workers=workers)
    assert not (tmp_path / "shards").exists()


def test_bad_images_can_be_left_out_and_are_listed(source: Path, tmp_path: Path) -> None:
    (source / "train/dog/2.png").write_bytes(b"")
    lines: list[str] = []
    info, index = packing.pack_folder(
        source, tmp_path / "shards", skip_bad=True, report=lines.append
    )
    assert info.skipped == ["train/dog/2.png"]
    assert len(lines) == 1 and "dog/2.png" in lines[0]
    assert (index.train_images, len(index)) == (9, 11)
    assert "dog/2.png" not in _members(tmp_path / "shards" / "train-000000.tar")


def test_too_many_bad_images_are_an_error(source: Path, tmp_path: Path) -> None:
    for number in range(5):
        (source / f"train/dog/{number}.png").write_bytes(b"x")
    with pytest.raises(UserError, match="5 images of the train split cannot be decoded"):
        packing.pack_folder(source, tmp_path / "shards", skip_bad=True, report=lambda line: None)


def test_names_that_no_key_may_have_are_changed_and_stay_apart(
    source: Path, tmp_path: Path
) -> None:
    cat = source / "train/cat"
    (cat / "0.jpg").rename(cat / os.fsdecode(b"\xff.jpg"))
    (cat / "1.jpg").rename(cat / "two\nlines.v2.jpg")
    (cat / "2.jpg").rename(cat / ("long " * 40 + ".JPG"))
    _image(cat / "3.png", 20, 20, seed=0)  # beside 3.jpg
    packing.pack_folder(source, tmp_path / "shards")
    names = [name for name in _members(tmp_path / "shards/train-000000.tar") if "cat" in name]
    images = [name for name in names if not name.endswith(".cls")]
    expected = [
        "3.jpg",
        "3_2.png",
        "4.jpg",
        "long " * 40 + ".jpg",
        "two_lines_v2.jpg",
        "\ufffd.jpg",
    ]
    assert images == [f"cat/{name}" for name in expected]
    verify_shards(tmp_path / "shards")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"shorter_side": 4}, "shorter-side is 4"), ({"workers": 0}, "workers is 0")],
)
def test_arguments_that_mean_nothing_are_refused(
    source: Path, tmp_path: Path, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        packing.pack_folder(source, tmp_path / "shards", **arguments)  # type: ignore[arg-type]


def test_the_destination_is_never_replaced(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "precious"
    dest.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists"):
        packing.pack_folder(source, dest)
    assert dest.read_bytes() == b"precious"


def test_what_the_folder_says_of_itself_is_under_a_digest(source: Path, tmp_path: Path) -> None:
    packing.pack_folder(source, tmp_path / "shards")
    path = tmp_path / "shards" / INFO_FILE
    content = json.loads(path.read_text())
    content["class_names"].reverse()
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"dataset\.json: has changed since it was written \(SHA-256\)"
    ):
        open_shards(root=tmp_path / "shards")
