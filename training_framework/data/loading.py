"""Build the loader of a split: resident on the device, or with workers."""

from collections.abc import Iterator

import numpy as np
import torch

from training_framework.data.bad_images import BadImages
from training_framework.data.batch import Batch, Loader
from training_framework.data.resolution import Resolutions
from training_framework.data.sampling import BatchPlan
from training_framework.data.splits import ArraySplit, EncodedSplit, Split
from training_framework.data.worker_loading import WorkerLoader
from training_framework.errors import UserError

__all__ = ["ResidentLoader", "build_loader"]


class ResidentLoader:
    """Keeps a whole split on the device: a batch is one gather.

    Args:
        split: The images; they are copied to the device, channels_last.
        plan: The samples of each batch.
        device: The device of images, labels and batches.
    """

    def __init__(self, split: ArraySplit, *, plan: BatchPlan, device: torch.device | str) -> None:
        self.batch_count = plan.batch_count
        self._plan = plan
        self._device = torch.device(device)
        self._images = split.images.to(self._device).permute(0, 2, 3, 1).contiguous()
        self._labels = split.labels.to(self._device)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from `start_batch` on."""
        batches = self._plan.batches(epoch, start_batch)
        if not batches:
            return
        order = torch.from_numpy(np.concatenate(batches)).to(self._device)
        for indices in order.split([len(batch) for batch in batches]):
            images = self._images.index_select(0, indices).permute(0, 3, 1, 2)
            yield Batch(images, self._labels.index_select(0, indices), indices)

    def close(self) -> None:
        """Do nothing: the images are freed with the loader."""


def build_loader(
    split: Split,
    *,
    device: torch.device | str,
    global_batch_size: int,
    train: bool,
    image_size: int,
    resolutions: Resolutions | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    resident: bool = False,
    num_workers: int = 0,
    prefetch_factor: int = 4,
    pin_memory: bool = False,
    bad_images: BadImages | None = None,
) -> Loader:
    """Choose and build the loader of a split.

    Args:
        split: The split to load. Images that are made on the device are always resident.
        device: The device of the batches.
        global_batch_size: Samples of a batch over all ranks.
        train: Shuffle, take random crops and only whole batches; otherwise every sample in order.
        image_size: Side in pixels of the batches' images.
        resolutions: That side by epoch for encoded images, which are decoded at it; None: always
            `image_size`.
        seed: Draws the order and the crops.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        resident: Keep a whole array split on the device.
        num_workers: Loader processes; 0: load in this process. A resident split needs none.
        prefetch_factor: Batches that each worker prepares in advance.
        pin_memory: Use page-locked host memory, for copies to CUDA during the computation.
        bad_images: Records images that cannot be decoded; None: each is an error.

    Raises:
        UserError: Files cannot be resident, arrays have another image size, or a batch would leave
            a rank without a sample.
    """
    plan = BatchPlan(
        sample_count=len(split),
        global_batch_size=global_batch_size,
        train=train,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    stored = split if isinstance(split, EncodedSplit) else split.array(device)
    if isinstance(stored, EncodedSplit):
        if resident:
            raise UserError(
                f"resident_data is on, but the images in {stored.place} are files",
                "set resident_data to false",
            )
    else:
        _check_size(stored, image_size)
        if resident or stored is not split:  # already made on the device
            return ResidentLoader(stored, plan=plan, device=device)
    return WorkerLoader(
        stored,
        plan=plan,
        device=device,
        image_size=image_size,
        resolutions=resolutions,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        bad_images=bad_images,
    )


def _check_size(split: ArraySplit, image_size: int) -> None:
    height, width = split.images.shape[2:]
    if (height, width) != (image_size, image_size):
        raise UserError(
            f"the images are {width}x{height} px, not {image_size}x{image_size}",
            f"open the data set with img_size {image_size}",
        )
