from pathlib import Path

import pytest
import torch

from training_framework.data import DATA_SETS, ArraySplit, FileSplit, detect_dataset, open_dataset
from training_framework.data.sources.synthetic import SyntheticSplit
from training_framework.errors import UserError


def test_synthetic_set_has_the_asked_sizes() -> None:
    dataset = open_dataset(
        "synthetic",
        image_size=20,
        num_classes=7,
        synthetic_train_images=50,
        synthetic_val_images=10,
        seed=4,
    )
    assert dataset.facts.num_classes == 7
    assert dataset.facts.array_bytes == 60 * 3 * 20 * 20
    assert isinstance(dataset.train, SyntheticSplit)
    assert isinstance(dataset.val, SyntheticSplit)
    assert (len(dataset.train), len(dataset.val)) == (50, 10)
    assert dataset.train.array("cpu").images.shape == (50, 3, 20, 20)
    assert dataset.train.stream != dataset.val.stream


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="'cifar-10'; did you mean 'cifar10'"):
        open_dataset("cifar-10")
    with pytest.raises(UserError, match=f"choose from {', '.join(DATA_SETS)}"):
        open_dataset("xyz")


def test_another_number_of_classes_is_an_error() -> None:
    assert open_dataset("digits", num_classes=10).facts.num_classes == 10
    with pytest.raises(UserError, match="num_classes is 5, but digits has 10 classes"):
        open_dataset("digits", num_classes=5)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["train/a/1.jpg", "val/a/1.jpg"], "folder"),
        (["train/a/1.jpg", "test/a/1.jpg"], "folder"),
        (["train/a/1.jpg"], "folder"),
        (["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"], "cifar10"),
        (["cifar-100-python/train", "cifar-100-python/test"], "cifar100"),
        (["train", "test"], "cifar100"),
        (["train-000000.tar", "val-000000.tar"], "shards"),
        (["pets-train-0.tar", "pets-val-0.tar"], "shards"),
    ],
)
def test_what_a_folder_holds_is_detected(tmp_path: Path, paths: list[str], expected: str) -> None:
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert detect_dataset(tmp_path) == expected


def test_unknown_and_missing_folders_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"{tmp_path} contains no known data set; .*train/ and val/"
    ):
        detect_dataset(tmp_path)
    with pytest.raises(UserError, match="gone is not a folder"):
        detect_dataset(tmp_path / "gone")


def test_limited_training_images_are_drawn_evenly_over_the_classes() -> None:
    whole = open_dataset("digits")
    part = open_dataset("digits", limit_train_images=105, seed=3)
    assert isinstance(whole.train, ArraySplit) and isinstance(part.train, ArraySplit)
    assert part.facts.train_images == len(part.train) == 105
    assert part.facts.val_images == whole.facts.val_images
    counts = part.train.labels.bincount(minlength=10)
    assert counts.min() == 10 and counts.max() == 11
    image_bytes = whole.train.images[0].nbytes
    assert part.facts.array_bytes == image_bytes * (105 + part.facts.val_images)
    assert part.train.labels.tolist() != sorted(part.train.labels.tolist())

    again = open_dataset("digits", limit_train_images=105, seed=3)
    other = open_dataset("digits", limit_train_images=105, seed=4)
    assert isinstance(again.train, ArraySplit) and isinstance(other.train, ArraySplit)
    assert torch.equal(part.train.images, again.train.images)
    assert not torch.equal(part.train.images, other.train.images)


def test_limited_parts_nest_and_keep_files_with_their_labels() -> None:
    labels = torch.tensor([0] * 30 + [1] * 3 + [2] * 17)
    paths = tuple(f"{label}/{number}.jpg" for number, label in enumerate(labels.tolist()))
    split = FileSplit(Path("root"), paths, labels)
    small, large = (split.limited(count, seed=0) for count in (12, 20))
    assert isinstance(small, FileSplit) and isinstance(large, FileSplit)
    assert set(small.paths) < set(large.paths)
    assert sorted(small.labels.bincount().tolist()) == [3, 4, 5]
    assert [int(path[0]) for path in large.paths] == large.labels.tolist()
    assert len(set(large.paths)) == 20


def test_more_training_images_than_there_are_is_an_error() -> None:
    with pytest.raises(UserError, match=r"limit_train_images is 2000, but digits has 1\d{3}"):
        open_dataset("digits", limit_train_images=2000)
    with pytest.raises(UserError, match="synthetic has 50 training images; lower it to 50"):
        open_dataset("synthetic", synthetic_train_images=50, limit_train_images=51)
