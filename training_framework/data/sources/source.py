"""The interface of a data set's module: how to open it and how to recognize its files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training_framework.data.splits import Dataset

__all__ = ["DataSource", "DatasetRequest"]


@dataclass(frozen=True, kw_only=True)
class DatasetRequest:
    """The arguments of `open_dataset`; each source reads those that concern it."""

    root: Path | None = None
    image_size: int | None = None
    num_classes: int | None = None
    synthetic_train_images: int = 2048
    synthetic_val_images: int = 512
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data set that can be opened by name.

    Attributes:
        open: Opens it. Raises UserError if its files are missing or wrong.
        recognizes: Whether a folder contains it; None if it reads no files.
        layout: Description of such a folder's content, for messages.
    """

    open: Callable[[DatasetRequest], Dataset]
    recognizes: Callable[[Path], bool] | None = None
    layout: str = ""
