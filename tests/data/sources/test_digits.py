import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from training_framework.data import ArraySplit
from training_framework.data.sources import digits as digits_module
from training_framework.data.sources.digits import open_digits
from training_framework.errors import UserError


def _splits(image_size: int | None = None) -> tuple[ArraySplit, ArraySplit]:
    dataset = open_digits(image_size=image_size)
    assert isinstance(dataset.train, ArraySplit)
    assert isinstance(dataset.val, ArraySplit)
    return dataset.train, dataset.val


def test_both_splits_together_are_the_published_digits() -> None:
    splits = _splits(image_size=8)
    got = sorted(
        (int(label), *image[0].flatten().tolist())
        for split in splits
        for image, label in zip(split.images, split.labels, strict=True)
    )
    published = load_digits()
    pixels = np.round(published.data * (255 / 16)).astype(int)
    expected = sorted(
        (int(label), *row) for row, label in zip(pixels.tolist(), published.target, strict=True)
    )
    assert got == expected


def test_a_fifth_of_every_class_is_held_out() -> None:
    train, val = _splits()
    assert len(train) + len(val) == 1797
    whole = torch.bincount(train.labels) + torch.bincount(val.labels)
    assert torch.equal(torch.bincount(val.labels), (whole / 5).round().long())


def test_split_is_fixed() -> None:
    _, val = _splits(image_size=8)
    weights = torch.arange(1, len(val) + 1)
    # Written down when the split was made: another value is another held-out set.
    assert int((val.labels * weights).sum()) == 297_264
    assert int(val.images.long().sum()) == 5_366_943


def test_facts_describe_the_images() -> None:
    dataset = open_digits()
    train, val = _splits()
    facts = dataset.facts
    assert (facts.train_images, facts.val_images) == (len(train), len(val))
    assert train.images.shape[1:] == (3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert torch.equal(train.images[:, 0], train.images[:, 2])
    assert facts.array_bytes == 1797 * 3 * 32 * 32
    assert facts.class_names == tuple("0123456789")
    assert (facts.enlarged, facts.flip, facts.crop_padding) == (4, False, 2)
    pixels = train.images.double() / 255
    assert facts.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert facts.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_table_without_the_bundled_file_comes_from_scikit_learn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundled = digits_module._read_table()
    monkeypatch.setattr(digits_module, "find_spec", lambda name: None)
    np.testing.assert_array_equal(digits_module._read_table(), bundled)


def test_images_smaller_than_the_originals_are_an_error() -> None:
    with pytest.raises(UserError, match="img_size of 4"):
        open_digits(image_size=4)
