"""What the plan has to know about a data set, without the data."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["DatasetFacts"]


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """Facts of a data set: enough to plan a run, none of the pixels.

    Attributes:
        name: What to call it in logs: `digits`, `cifar10`, the folder's name.
        train_images: Images in the training split.
        val_images: Images in the validation split; 0 where there is none.
        class_names: One name a class, in label order.
        image_size: Side in pixels of the square images as they leave the loader.
        storage: `arrays` (uint8 arrays in memory), `files` (decoded one by one), `generated`
            (synthetic, made on the device), `loader` (the user's own DataLoader).
        array_bytes: Bytes of both splits as uint8 arrays; 0 unless storage is `arrays` or
            `generated`.
        mean: Per-channel mean of the training images, in units where 255 is 1.
        std: Per-channel standard deviation, same units.
        enlarged: How many times the originals were enlarged to `image_size` (digits: 8 px to 32 px
            is 4); 1 where they were not.
        flip: Whether a mirrored image still belongs to its class.
        crop_padding: Padding in pixels for pad-and-crop that suits the set; 0 for none.
    """

    name: str
    train_images: int
    val_images: int
    class_names: tuple[str, ...]
    image_size: int
    storage: Literal["arrays", "files", "generated", "loader"]
    array_bytes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    enlarged: int = 1
    flip: bool = True
    crop_padding: int = 0

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)
