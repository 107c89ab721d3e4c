"""scikit-learn's handwritten digits: the data set that needs no download."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training_framework.data.facts import DatasetFacts
from training_framework.data.sources.source import DataSource
from training_framework.data.splits import ArraySplit, Dataset
from training_framework.errors import UserError

__all__ = ["SOURCE", "open_digits"]

_SIDE = 8
_BRIGHTEST = 16
_HELD_OUT_OF = 5
_DEFAULT_IMAGE_SIZE = 32


def open_digits(*, image_size: int | None = None) -> Dataset:
    """Open the digits: 1,797 gray 8x8 images, resized, as three equal channels.

    A fixed fifth of every class is held out. Digits are not mirrored. They fill the frame, so the
    crop padding is a sixteenth of the side (2 px at 32 px, half an original pixel), which moves
    them by less than the width of their strokes.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.

    Args:
        image_size: Side in pixels; None: 32.

    Raises:
        UserError: `image_size` is below the originals' 8 px.
    """
    size = image_size or _DEFAULT_IMAGE_SIZE
    if size < _SIDE:
        raise UserError(
            f"img_size of {size} is smaller than the digits' {_SIDE} px", f"use {_SIDE} or more"
        )
    table = _read_table()
    labels = table[:, -1].astype(np.int64)
    gray = np.round(table[:, :-1] * (255 / _BRIGHTEST)).astype(np.uint8)
    images = torch.from_numpy(gray).view(-1, 1, _SIDE, _SIDE).expand(-1, 3, -1, -1).contiguous()
    held_out = _held_out(labels)
    train, val = (
        ArraySplit(images[rows], torch.from_numpy(labels[rows])).resized(size)
        for rows in (~held_out, held_out)
    )
    deviation, mean = torch.std_mean(train.images[:, 0] / 255, correction=0)
    facts = DatasetFacts(
        name="digits",
        train_images=len(train),
        val_images=len(val),
        class_names=tuple(str(digit) for digit in range(10)),
        image_size=size,
        storage="arrays",
        array_bytes=train.images.nbytes + val.images.nbytes,
        mean=(mean.item(),) * 3,
        std=(deviation.item(),) * 3,
        enlarged=size // _SIDE,
        flip=False,
        crop_padding=size // 16,
    )
    return Dataset(facts, train, val)


def _read_table() -> NDArray[np.float64]:
    """(1797, 65): 64 pixels in 0..16 and the digit."""
    # Importing sklearn takes a second, because of scipy; reading its file takes milliseconds.
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations or []) if package else []:
        table = Path(folder, "datasets", "data", "digits.csv.gz")
        if table.is_file():
            lines = gzip.decompress(table.read_bytes()).decode().splitlines()
            return np.loadtxt(lines, delimiter=",", dtype=np.float64)
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack((digits.data, digits.target)).astype(np.float64)


def _held_out(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """A fixed random fifth of every class."""
    # NumPy promises only the raw bits of its generators to stay the same in every version.
    order = np.argsort(np.random.Philox(key=0).random_raw(len(labels)), kind="stable")
    held_out = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held_out[members[: round(len(members) / _HELD_OUT_OF)]] = True
    return held_out


SOURCE = DataSource(open=lambda asked: open_digits(image_size=asked.image_size))
