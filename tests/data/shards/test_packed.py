import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from training_framework.data import detect_dataset, open_dataset
from training_framework.data.bad_images import BadImages
from training_framework.data.host_batches import FileBatches, StorageFault
from training_framework.data.loading import ResidentLoader, build_loader
from training_framework.data.shards.packed_file import METADATA_KEY, PackedFile
from training_framework.data.shards.packing import pack_folder
from training_framework.data.splits import ArraySplit, FileSplit, PackedSplit, limit_split
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
    pack_folder(source, source.with_suffix(".arrow"))
    return source.with_suffix(".arrow")


@pytest.fixture(scope="module")
def packed_pixels(source: Path) -> Path:
    pack_folder(source, source.with_name("pixels.arrow"), pixels=True, shorter_side=16)
    return source.with_name("pixels.arrow")


def _damaged_copy(path: Path, to: Path) -> Path:
    """One whose first picture is damaged so that it cannot be decoded."""
    file = PackedFile(path)
    content = bytearray(path.read_bytes())
    at = content.index(file.read(0))
    content[at + 2 : at + 40] = bytes(38)
    to.write_bytes(content)
    return to


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
    from_folder, from_file = (
        open_dataset("folder", root=source),
        open_dataset("packed", root=packed),
    )
    name = "train" if train else "val"
    expected = _loader(getattr(from_folder, name), train=train)
    loader = _loader(getattr(from_file, name), num_workers=num_workers, train=train)
    try:
        for want, got in zip(expected.epoch(1), loader.epoch(1), strict=True):
            torch.testing.assert_close(got.images, want.images)
            torch.testing.assert_close(got.labels, want.labels)
            torch.testing.assert_close(got.indices, want.indices)
    finally:
        loader.close()


def test_facts_are_those_of_the_folder(source: Path, packed: Path) -> None:
    folder, file = (
        open_dataset("folder", root=source).facts,
        open_dataset("packed", root=packed).facts,
    )
    assert file == folder


def test_a_path_alone_says_what_it_is(packed: Path, packed_pixels: Path, tmp_path: Path) -> None:
    assert detect_dataset(packed) == "packed"
    assert detect_dataset(packed_pixels) == "packed"
    (tmp_path / "other.txt").write_text("text")
    with pytest.raises(UserError, match=r"packed \.arrow file"):
        detect_dataset(tmp_path / "other.txt")


def test_raw_pixels_are_an_array_split_that_can_be_resident(packed_pixels: Path) -> None:
    dataset = open_dataset("packed", root=packed_pixels)
    assert dataset.facts.storage == "arrays"
    assert dataset.facts.image_size == 16
    assert dataset.facts.array_bytes == 9 * 16 * 16 * 3
    assert dataset.facts.crop_padding == 2
    train = dataset.train
    assert isinstance(train, ArraySplit)
    assert train.images.shape == (6, 3, 16, 16)
    file = PackedFile(packed_pixels)
    for row in range(6):
        pixels = np.frombuffer(file.read(row), dtype=np.uint8).reshape(16, 16, 3)
        np.testing.assert_array_equal(train.images[row].permute(1, 2, 0).numpy(), pixels)
    loader = build_loader(
        train, device="cpu", global_batch_size=3, train=False, image_size=16, resident=True
    )
    assert isinstance(loader, ResidentLoader)
    batches = [batch.images for batch in loader.epoch(0)]
    torch.testing.assert_close(torch.cat(batches), train.images)


def test_raw_pixels_are_mapped_not_copied(packed_pixels: Path) -> None:
    file = PackedFile(packed_pixels)
    images = file.pixels(slice(6, 9))
    assert images.base is not None
    before = packed_pixels.read_bytes()
    images[:] = 0  # a private mapping: what is written stays in this process
    assert packed_pixels.read_bytes() == before


def test_raw_pixels_of_another_size_are_resized(packed_pixels: Path) -> None:
    dataset = open_dataset("packed", root=packed_pixels, image_size=8)
    assert isinstance(dataset.val, ArraySplit)
    assert dataset.val.images.shape == (3, 3, 8, 8)
    assert dataset.facts.crop_padding == 1


def test_a_part_of_the_training_images_keeps_names_and_labels(packed: Path, source: Path) -> None:
    folder = open_dataset("folder", root=source).train
    split = open_dataset("packed", root=packed).train
    small, expected = limit_split(split, 4, seed=5), limit_split(folder, 4, seed=5)
    assert isinstance(small, PackedSplit) and isinstance(expected, FileSplit)
    assert small.labels.tolist() == expected.labels.tolist()
    names = [small.name_of(sample) for sample in range(4)]
    assert names == [f"{packed}/train/{path}" for path in expected.paths]


def test_a_pickled_split_reads_the_same_samples(packed: Path) -> None:
    split = open_dataset("packed", root=packed).train
    assert isinstance(split, PackedSplit)
    copied = pickle.loads(pickle.dumps(split))
    assert copied.file.read(4) == split.file.read(4)
    assert copied.name_of(4) == split.name_of(4)


def test_picture_files_cannot_be_resident(packed: Path) -> None:
    split = open_dataset("packed", root=packed).train
    with pytest.raises(UserError, match=r"set\.arrow holds files"):
        build_loader(
            split, device="cpu", global_batch_size=2, train=True, image_size=16, resident=True
        )


def test_a_picture_that_changed_on_the_disk_is_no_bad_picture(packed: Path, tmp_path: Path) -> None:
    split = open_dataset("packed", root=_damaged_copy(packed, tmp_path / "set.arrow")).train
    assert isinstance(split, PackedSplit)
    batches = FileBatches(
        split, image_size=16, train=True, seed=0, bad_images=BadImages(train=6, val=3)
    )
    with pytest.raises(StorageFault, match=r"set\.arrow/train/class0/bild-ü-0\.jpg.*checksum"):
        batches[0, np.array([0])]


def test_a_file_that_became_shorter_is_an_error(packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set.arrow"
    copy.write_bytes(packed.read_bytes())
    split = open_dataset("packed", root=copy).train
    with copy.open("r+b") as file:
        file.truncate(1000)
    batches = FileBatches(split, image_size=16, train=True, seed=0)  # type: ignore[arg-type]
    with pytest.raises(StorageFault, match="has become shorter"):
        batches[0, np.array([5])]


def _rewritten(path: Path, to: Path, **changes: Any) -> Path:
    """A copy whose columns (by name, or `metadata`, or `options` of the writer) are others."""
    with pa.memory_map(str(path)) as mapping:
        table = pa.ipc.open_file(mapping).read_all().combine_chunks()
    metadata, options = changes.pop("metadata", {}), changes.pop("options", None)
    for name, column in changes.items():
        index = table.column_names.index(name)
        table = table.set_column(index, table.schema.field(index), column)
    info = json.loads(table.schema.metadata[METADATA_KEY]) | metadata
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(info)})
    with pa.ipc.new_file(str(to), table.schema, options=options) as writer:
        writer.write_table(table)
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": pa.array([0, 1, 2] * 2 + [0, 1, 3], pa.int32())}, "outside of its 3 classes"),
        ({"label": pa.array([0, 1, -1] * 3, pa.int32())}, "outside of its 3 classes"),
        ({"label": pa.array([None, 1, 2] * 3, pa.int32())}, "empty cells"),
        ({"height": pa.array([0] * 9, pa.int32())}, "without pixels"),
        ({"image": pa.array([b""] + [b"x"] * 8, pa.large_binary())}, "no bytes"),
        ({"metadata": {"train_images": 7}}, "has 9 samples, but says 10"),
        ({"metadata": {"train_images": -1}}, "train_images"),
        ({"metadata": {"class_names": 3}}, "class_names"),
        ({"metadata": {"format_version": 2}}, "format_version.*update"),
        ({"metadata": {"pixels": 16}}, "columns are not those"),
        ({"metadata": {"pixels": 10**12}}, "pixels"),
        ({"options": pa.ipc.IpcWriteOptions(compression="lz4")}, "compressed"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    packed: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = _rewritten(packed, tmp_path / "x.arrow", **changes)
    with pytest.raises(UserError, match=rf"x\.arrow: .*{message}"):
        PackedFile(path)


def test_other_files_are_refused(packed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.arrow"
    for content in (b"", b"ARROW1", b"text" * 100):
        other.write_bytes(content)
        with pytest.raises(UserError, match=r"other\.arrow: no whole packed file"):
            PackedFile(other)
    table = pa.table({"a": [1]})
    with pa.ipc.new_file(str(other), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="no packed data set"):
        PackedFile(other)
    with pytest.raises(UserError, match="No such file"):
        PackedFile(tmp_path / "missing.arrow")


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.97, 0.999])
def test_truncated_files_are_refused(packed: Path, tmp_path: Path, kept: float) -> None:
    content = packed.read_bytes()
    path = tmp_path / "cut.arrow"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=r"cut\.arrow: no whole packed file"):
        PackedFile(path)


FUZZ = """
import sys
from pathlib import Path
import numpy as np
from training_framework.data.shards.packed import inspect_packed
from training_framework.data.shards.packed_file import PackedFile
from training_framework.errors import UserError
scratch, *sources = map(Path, sys.argv[1:])
for source in sources:
    whole, rng, refused = source.read_bytes(), np.random.default_rng(0), 0
    file = PackedFile(source)
    pictures = [range(whole.index(data), whole.index(data) + len(data))
                for data in (file.read(row) for row in range(len(file)))]
    places = [at for at in range(len(whole)) if not any(at in picture for picture in pictures)]
    for _ in range(400):
        content = bytearray(whole)
        for at in rng.choice(places, 4):
            content[at] = rng.integers(256)
        scratch.write_bytes(content)
        try:
            inspect_packed(scratch, verify=True)
        except UserError:
            refused += 1
    print(refused)
"""


def test_mutated_files_never_end_the_process(
    packed: Path, packed_pixels: Path, tmp_path: Path
) -> None:
    # In a process of its own, which a crash would end.
    command = [sys.executable, "-c", FUZZ, *map(str, (tmp_path / "x", packed, packed_pixels))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    refused = [int(line) for line in done.stdout.split()]
    assert len(refused) == 2 and min(refused) > 100


def test_without_pyarrow_the_error_names_the_extra(
    packed: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for needs_it in (
        lambda: PackedFile(packed),
        lambda: pack_folder(source, tmp_path / "new.arrow"),
    ):
        with pytest.raises(UserError, match=r"pip install 'efficient-resnet\[pack\]'"):
            needs_it()
