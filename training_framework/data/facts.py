"""The facts about a data set that a plan needs."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["DatasetFacts"]


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """Facts about a data set: enough to plan a run, without any pixels.

    Attributes:
        name: Its name in logs: `digits`, `cifar10`, the name of a folder.
        train_images: Images in the training split.
        val_images: Images in the validation split; 0 if there is none.
        class_names: The names of the classes, in label order.
        image_size: Side in pixels of the square images that the loader yields.
        storage: `arrays` (uint8 arrays in memory), `files` (decoded one by one), `generated`
            (synthetic, made on the device), `loader` (the user's own DataLoader).
        array_bytes: Bytes of both splits as uint8 arrays; 0 unless storage is `arrays` or
            `generated`.
        mean: Per-channel mean of the training images, in units where 255 is 1.
        std: Per-channel standard deviation, same units.
        enlarged: Factor by which the originals were enlarged to `image_size` (digits: 4, from 8 px
            to 32 px); 1 if they were not.
        flip: Whether a mirrored image still belongs to its class.
        crop_padding: Padding in pixels for pad-and-crop that suits the data set; 0: none.
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
