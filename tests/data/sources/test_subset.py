import json
import shutil
from pathlib import Path

import pytest

from training_framework.data.sources.folder import open_folder
from training_framework.data.sources.subset import make_subset
from training_framework.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("val", 3)):
        for name in ("ant", "bee", "cow", "doe", "elk"):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.jpg").write_text(f"{split}/{name}/{number}")
    return tmp_path / "source"


def _contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()
    }


def _make(source: Path, dest: Path, *, classes: int = 3, train: int = 4, seed: int = 0) -> object:
    return make_subset(
        source, dest, classes=classes, train_per_class=train, val_per_class=2, seed=seed
    )


def test_subset_is_a_folder_data_set_of_the_asked_size(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "deep" / "tiny"
    summary = make_subset(source, dest, classes=3, train_per_class=4, val_per_class=2, seed=0)
    facts = open_folder(root=dest).facts
    assert facts.class_names == summary.classes
    assert facts.num_classes == 3
    assert (facts.train_images, facts.val_images) == (12, 6)
    assert (summary.train_images, summary.val_images) == (12, 6)
    for path, content in _contents(dest).items():
        if path != "subset.json":
            assert path == f"{content}.jpg"
    assert [path.name for path in dest.parent.iterdir()] == ["tiny"]


def test_record_names_what_was_chosen_and_no_machine_path(source: Path, tmp_path: Path) -> None:
    _make(source, tmp_path / "tiny")
    text = (tmp_path / "tiny" / "subset.json").read_text()
    record = json.loads(text)
    assert record["source"] == "source"
    assert str(tmp_path) not in text
    chosen = {
        f"{split}/{name}/{file}"
        for split in ("train", "val")
        for name, files in record[split].items()
        for file in files
    }
    assert chosen == set(_contents(tmp_path / "tiny")) - {"subset.json"}


def test_same_seed_chooses_the_same_and_another_seed_does_not(source: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        _make(source, tmp_path / name, seed=seed)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    assert _contents(tmp_path / "a").keys() != _contents(tmp_path / "c").keys()


def test_nothing_is_written_over(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "tiny"
    dest.mkdir()
    (dest / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="tiny: exists and is not an empty folder"):
        _make(source, dest)
    assert _contents(dest) == {"mine.txt": "kept"}
    (dest / "mine.txt").unlink()
    _make(source, dest)
    assert len(_contents(dest)) == 19


@pytest.mark.parametrize(
    ("classes", "train", "message"),
    [(6, 4, "train: has 5 classes, not 6"), (5, 7, "train/ant: has 6 images, not 7")],
)
def test_too_little_is_an_error_that_says_how_much_there_is(
    source: Path, tmp_path: Path, classes: int, train: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _make(source, tmp_path / "tiny", classes=classes, train=train)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_none_of_something_is_an_error(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="classes is 0; take at least 1"):
        _make(source, tmp_path / "tiny", classes=0)


def test_failed_copy_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile = shutil.copyfile

    def copy_of_a_vanishing_file(file: Path, target: Path) -> None:
        if "val" in file.parts:
            file.unlink()
        copyfile(file, target)

    monkeypatch.setattr(shutil, "copyfile", copy_of_a_vanishing_file)
    with pytest.raises(UserError, match="No such file"):
        _make(source, tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
