from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training_framework.data.folder import open_folder
from training_framework.data.splits import FileSplit
from training_framework.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path in (
        "train/dog/2.JPEG",
        "train/dog/1.png",
        "train/cat/deep/er/3.jpg",
        "train/emu/4.webp",
        "val/dog/5.jpg",
        "val/cat/6.tiff",
    ):
        file = tmp_path / "set" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "set"


def _files(split: object) -> list[tuple[str, int]]:
    assert isinstance(split, FileSplit)
    for path in split.paths:
        assert (split.root / path).is_file()
    return list(zip(split.paths, split.labels.tolist(), strict=True))


def test_classes_are_the_sorted_folders_of_train(root: Path) -> None:
    dataset = open_folder(root=root)
    assert dataset.facts.class_names == ("cat", "dog", "emu")
    assert _files(dataset.train) == [
        ("cat/deep/er/3.jpg", 0),
        ("dog/1.png", 1),
        ("dog/2.JPEG", 1),
        ("emu/4.webp", 2),
    ]
    assert _files(dataset.val) == [("cat/6.tiff", 0), ("dog/5.jpg", 1)]
    assert isinstance(dataset.train, FileSplit)
    assert dataset.train.labels.dtype == torch.int64
    facts = dataset.facts
    assert (facts.name, facts.storage, facts.image_size) == ("set", "files", 224)
    assert (facts.train_images, facts.val_images, facts.array_bytes) == (4, 2, 0)
    assert open_folder(root=root, image_size=64).facts.image_size == 64


def test_test_folder_stands_in_for_val(root: Path) -> None:
    (root / "val").rename(root / "test")
    assert _files(open_folder(root=root).val) == [("cat/6.tiff", 0), ("dog/5.jpg", 1)]


def test_hidden_files_are_ignored(root: Path) -> None:
    before = open_folder(root=root).facts
    for name in ("train/.cache", "train/dog/.DS_Store", "val/dog/Thumbs.db", "val/desktop.ini"):
        (root / name).touch()
    assert open_folder(root=root).facts == before


def _make(path: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()

    return make


def _rename(path: str, other: str) -> Callable[[Path], Path]:
    return lambda root: (root / path).rename(root / other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_make("val/fox/7.jpg"), r"val/fox: a class that .*train lacks"),
        (_make("train/dog/notes.txt"), r"dog/notes\.txt: no picture by its name"),
        (_make("train/labels.csv"), r"train/labels\.csv: lies outside the class folders"),
        (lambda root: (root / "train/fox").mkdir(), "train/fox: the class is empty"),
        (lambda root: (root / "val/emu").mkdir(), "val/emu: the class is empty"),
        (_rename("train", "training"), "set/train: no such folder"),
        (_rename("val", "validation"), "set/val: no such folder"),
    ],
)
def test_disorder_is_an_error_that_names_it(
    root: Path, change: Callable[[Path], object], message: str
) -> None:
    change(root)
    with pytest.raises(UserError, match=message):
        open_folder(root=root)


def test_no_class_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="train: holds no class folder"):
        open_folder(root=tmp_path)


def test_no_root_is_an_error() -> None:
    with pytest.raises(UserError, match="data_root is not set"):
        open_folder(root=None)
