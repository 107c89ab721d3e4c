"""What the digest of a split covers."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training_framework.data import ArraySplit, FileSplit, open_dataset
from training_framework.data.sources.synthetic import SyntheticSplit
from training_framework.errors import UserError


def _files(root: Path, *names: str) -> FileSplit:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return FileSplit(root, names, torch.arange(len(names)))


def test_the_digest_of_files_covers_paths_sizes_and_labels_but_not_where_they_are(
    tmp_path: Path,
) -> None:
    split = _files(tmp_path / "a", "x/1.jpg", "x/22.jpg")
    digest = split.digest()
    assert len(digest) == 64 and int(digest, 16)
    assert _files(tmp_path / "b", "x/1.jpg", "x/22.jpg").digest() == digest
    changed = [
        replace(split, labels=split.labels.flip(0)),
        _files(tmp_path / "c", "x/1.jpg", "y/22.jpg"),
        _files(tmp_path / "d", "x/22.jpg", "x/1.jpg"),
        split.limited(1, seed=0),
    ]
    (tmp_path / "b/x/1.jpg").write_bytes(b"longer than before")
    changed.append(FileSplit(tmp_path / "b", split.paths, split.labels))
    assert len({digest, *(other.digest() for other in changed)}) == 6


def test_names_that_are_no_text_have_a_digest(tmp_path: Path) -> None:
    assert _files(tmp_path, os.fsdecode(b"\xff.jpg")).digest()


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    split = _files(tmp_path, "1.jpg")
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"1\.jpg: No such file.*restore"):
        split.digest()


@pytest.mark.parametrize(
    "change",
    [
        lambda images, labels: (images.flip(0), labels),
        lambda images, labels: (images, labels.flip(0)),
        lambda images, labels: (images.reshape(2, 3, 8, 2), labels),
    ],
)
def test_the_digest_of_arrays_covers_pixels_shape_and_labels(change: Callable[..., tuple]) -> None:
    images = torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4)
    split = ArraySplit(images, torch.tensor([0, 1]))
    other = ArraySplit(*change(images, torch.tensor([0, 1])))
    assert split.digest() != other.digest()
    assert split.resized(8).digest() != other.resized(8).digest()
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert ArraySplit(strided, split.labels).digest() == split.digest()


def test_the_digest_of_resized_arrays_does_not_depend_on_rounding() -> None:
    images = torch.arange(192, dtype=torch.uint8).view(4, 3, 4, 4)
    split = ArraySplit(images, torch.tensor([0, 1, 0, 1])).resized(8)
    rounded = replace(split, images=split.images ^ 1)
    assert rounded.digest() == split.digest() != replace(split, made_from="").digest()
    parts = [split.limited(2, seed=seed).digest() for seed in range(4)]
    assert len({split.digest(), *parts}) > 2


def test_the_digest_of_synthetic_images_covers_all_that_makes_them() -> None:
    split = SyntheticSplit(8, 2, 16, seed=1)
    changes = ({"count": 9}, {"num_classes": 3}, {"image_size": 8}, {"seed": 2}, {"stream": 1})
    digests = {replace(split, **change).digest() for change in changes}
    assert len({split.digest(), *digests}) == 6
    assert SyntheticSplit(8, 2, 16, seed=1).digest() == split.digest()


def test_the_digest_of_a_set_covers_its_classes_and_both_splits() -> None:
    dataset = open_dataset("digits")
    assert dataset.digest() == open_dataset("digits").digest()
    others = [
        replace(dataset, facts=replace(dataset.facts, class_names=tuple("abcdefghij"))),
        replace(dataset, val=dataset.train),
        dataset.with_train_images(100, seed=0),
        open_dataset("digits", image_size=16),
    ]
    assert len({dataset.digest(), *(other.digest() for other in others)}) == 5
