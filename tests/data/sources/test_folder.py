import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training_framework.data import FileSplit
from training_framework.data.sources.folder import open_folder
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


def _link(path: str, target: str) -> Callable[[Path], None]:
    return lambda root: (root / path).symlink_to(target)


def _rename(path: str, other: str) -> Callable[[Path], Path]:
    return lambda root: (root / path).rename(root / other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_make("val/fox/7.jpg"), r"val/fox: this class is missing in .*train"),
        (_make("train/dog/notes.txt"), r"dog/notes\.txt: does not have the suffix of an image"),
        (_make("train/labels.csv"), r"train/labels\.csv: not in a class folder"),
        (lambda root: (root / "train/fox").mkdir(), "train/fox: the class is empty"),
        (lambda root: (root / "val/emu").mkdir(), "val/emu: the class is empty"),
        (lambda root: os.mkfifo(root / "train/dog/pipe.jpg"), r"dog/pipe\.jpg: not a file"),
        (
            _link("train/dog/9.jpg", "gone.jpg"),
            r"dog/9\.jpg: not a file; remove it, or repair the l",
        ),
        (_link("train/dog/zero.jpg", "/dev/zero"), r"dog/zero\.jpg: not a file"),
        (_link("train/dog/self.jpg", "self.jpg"), r"dog/self\.jpg: Too many levels"),
        (_link("train/fox", "fox"), r"train/fox: Too many levels"),
        (
            _link("train/dog/back", "."),
            r"dog/back: the class contains this folder twice, through a link",
        ),
        (
            _link("train/cat/deep/up", "../.."),
            r"cat/deep/up/?.*: the class contains this folder twice",
        ),
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
    with pytest.raises(UserError, match="train: has no class folders"):
        open_folder(root=tmp_path)


def test_no_root_is_an_error() -> None:
    with pytest.raises(UserError, match="data_root is not set"):
        open_folder(root=None)


def test_links_to_pictures_and_to_folders_elsewhere_are_followed(root: Path) -> None:
    (root / "train/dog/8.jpg").symlink_to(root / "val/dog/5.jpg")
    (root / "train/fox").symlink_to(root / "train/emu")
    (root / "train/dog/more").symlink_to(root / "train/emu")
    listed = [path for path, _ in _files(open_folder(root=root).train)]
    assert {"dog/8.jpg", "fox/4.webp", "dog/more/4.webp"} <= set(listed)


def test_links_cannot_multiply_a_class(root: Path) -> None:
    folder = root / "train/dog"
    for level in range(40):
        (folder / str(level)).mkdir()
    for level in range(39):
        for name in ("left", "right"):
            (folder / str(level) / name).symlink_to(folder / str(level + 1))
    with pytest.raises(UserError, match="the class contains this folder twice, through a link"):
        open_folder(root=root)


ODD = [
    b"line\nbreak.jpg", b"tab\t.jpg", b"100%s {name} %.jpg", b"\xff\xfe.jpg", "日本 ü.jpg".encode(),
    b"quote\"'.jpg", b"-rf.jpg", b"\x1b[2J.jpg", b"a" * 251 + b".jpg",
]  # fmt: skip


def test_odd_names_deep_folders_and_thousands_of_files_are_listed(root: Path) -> None:
    folder = deep = root / "train/dog"
    while len(str(deep)) < 3500:
        deep /= "d" * 200
        deep.mkdir()
    odd = {place / os.fsdecode(name) for place in (folder, deep) for name in ODD}
    for path in odd | {folder / f"{number}.jpg" for number in range(5000)}:
        path.touch()
    split = open_folder(root=root).train
    assert isinstance(split, FileSplit)
    listed = {split.root / path for path in split.paths}
    assert odd < listed
    assert len(listed) == len(split) >= 5000 + len(odd)


def test_folders_deeper_than_the_interpreters_stack_are_listed(root: Path) -> None:
    top = deep = root / "train/dog"
    for _ in range(sys.getrecursionlimit() + 100):
        deep /= "a"
        deep.mkdir()
    picture = deep / "1.jpg"
    picture.touch()
    try:
        assert len(open_folder(root=root).train) == 5
    finally:  # pytest's own cleaning up cannot go so deep
        picture.unlink()
        while deep != top:
            deep.rmdir()
            deep = deep.parent


def test_empty_validation_files_are_named_at_once(root: Path) -> None:
    split = open_folder(root=root).val
    assert isinstance(split, FileSplit)
    with pytest.raises(UserError, match=r"val/cat/6\.tiff: is empty; replace or delete the file"):
        split.refuse_empty()
    for path in split.paths:
        (split.root / path).write_bytes(b"x")
    split.refuse_empty()
    (split.root / split.paths[1]).unlink()
    with pytest.raises(UserError, match=r"val/dog/5\.jpg: No such file"):
        split.refuse_empty()
