"""What a data set's module offers: how to open it, and how to tell it by its files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training_framework.data.splits import Dataset

__all__ = ["DataSource", "DatasetRequest"]


@dataclass(frozen=True, kw_only=True)
class DatasetRequest:
    """What `open_dataset` was asked for; each source reads what concerns it."""

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
        open: Opens it. Raises UserError where its files are missing or wrong.
        recognizes: Whether a folder holds it; None where it reads no files.
        layout: What such a folder holds, for messages.
    """

    open: Callable[[DatasetRequest], Dataset]
    recognizes: Callable[[Path], bool] | None = None
    layout: str = ""
