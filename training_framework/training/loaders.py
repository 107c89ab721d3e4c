"""The loaders of a run, and what turns their batches into the network's input."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from training_framework.data import (
    BadImages,
    Dataset,
    EncodedSplit,
    EvalTransform,
    Loader,
    Split,
    TrainTransform,
    UserLoader,
    WorkerLoader,
    build_loader,
)
from training_framework.data.appearance import Appearance
from training_framework.data.facts import DatasetFacts
from training_framework.machine.distributed import Processes, gathered
from training_framework.machine.precision import compute_dtype
from training_framework.plan import PlannedRun, TrainPlan, UserLoaders

__all__ = ["Loaders", "sample_name", "split_loader"]


def sample_name(source: Dataset | UserLoaders, index: int) -> str:
    """Name of a training sample in messages: its file or, without a file, its position."""
    return source.train.name_of(index) if isinstance(source, Dataset) else str(index)


class Loaders:
    """The loaders of a run and what turns their batches into the network's input.

    Attributes:
        bad_images: Images that could not be decoded and were skipped; None if the first one ends
            the run.
        norms: Training batches beside those that are trained on, for the statistics of a weight
            average; None: not needed.
    """

    def __init__(
        self,
        *,
        train: Loader,
        val: Loader | None,
        train_transform: TrainTransform,
        eval_transform: EvalTransform,
        bad_images: BadImages | None = None,
        norms: Loader | None = None,
    ) -> None:
        self.norms = norms
        self.train = train
        self.val = val
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.bad_images = bad_images

    @classmethod
    def build(cls, planned: PlannedRun, device: torch.device) -> "Loaders":
        """Build them for a data set, or around the user's own (train, val) loaders.

        Raises:
            UserError: A validation file is empty, which would otherwise only show after an epoch.
        """
        plan, facts, source = planned.plan, planned.facts, planned.source
        bad_images, norms = None, None
        if isinstance(source, Dataset):
            if plan.on_bad_image == "skip":
                bad_images = BadImages(train=len(source.train), val=len(source.val))
            elif isinstance(source.val, EncodedSplit):
                source.val.refuse_empty()
            load = functools.partial(
                split_loader,
                plan=plan,
                processes=planned.processes,
                device=device,
                bad_images=bad_images,
            )
            val = load(source.val, train=False) if len(source.val) else None
            train = load(source.train, train=True)
            if plan.recompute_norm_batches:
                # A worker loader has one epoch at a time, and the run's is under way.
                norms = load(source.train, train=True)
        else:
            own = functools.partial(UserLoader, device=device, num_classes=plan.num_classes)
            train, val = own(source.train), None if source.val is None else own(source.val)
        eval_transform, train_transform = _transforms(plan, facts, device)
        return cls(
            train=train,
            val=val,
            train_transform=train_transform,
            eval_transform=eval_transform,
            bad_images=bad_images,
            norms=norms,
        )

    def report_to(self, report: Callable[[str], None], bad_images_file: Path) -> None:
        """Say what happens while loading through `report`, and list bad images in a file."""
        for loader in (self.train, self.val, self.norms):
            if isinstance(loader, WorkerLoader):
                loader.report = report
        if self.bad_images is not None:
            self.bad_images.list_in(bad_images_file, report)

    def share_bad_images(self) -> int:
        """Share all bad images among the processes; return their number.

        All processes must call it at the same point.

        Raises:
            UserError: There are too many in total.
        """
        if self.bad_images is None:
            return 0
        for by_split in gathered(self.bad_images.by_split()):
            for split, reasons in by_split.items():
                self.bad_images.add(split, reasons)
        return len(self.bad_images)

    def close(self) -> None:
        """End the loaders' processes."""
        for loader in (self.train, self.val, self.norms):
            if loader is not None:
                loader.close()


def _transforms(
    plan: TrainPlan, facts: DatasetFacts, device: torch.device
) -> tuple[EvalTransform, TrainTransform]:
    """What turns batches into the network's input, in an evaluation and in training."""
    # Our networks begin with a convolution, for which autocast would cast the images anyway.
    dtype = torch.float32 if plan.own_network else compute_dtype(plan.precision)
    eval_transform = EvalTransform(
        mean=facts.mean,
        std=facts.std,
        device=device,
        # Images that are resized and then rounded differ from those rounded before.
        dtype=dtype if plan.eval_img_size == plan.image_size else torch.float32,
        channels_last=plan.channels_last,
        size=plan.eval_img_size,
    )
    train_transform = TrainTransform(
        mean=facts.mean,
        std=facts.std,
        sample_count=facts.train_images,
        seed=plan.seed,
        device=device,
        flip=plan.flip,
        crop_padding=plan.crop_padding,
        cutout=plan.cutout,
        random_erasing=plan.random_erasing,
        appearance=Appearance(
            color_jitter=plan.color_jitter,
            auto_augment=plan.auto_augment,
            operations=plan.rand_augment_operations,
            magnitude=plan.rand_augment_magnitude,
        ),
        resolutions=plan.resolutions,
        mixup=plan.mixup,
        cutmix=plan.cutmix,
        dtype=dtype,
        channels_last=plan.channels_last,
    )
    return eval_transform, train_transform


def split_loader(
    split: Split,
    *,
    train: bool,
    plan: TrainPlan,
    processes: Processes,
    device: torch.device,
    bad_images: BadImages | None = None,
) -> Loader:
    """The loader of one split as planned: for training, or for evaluation.

    Files are decoded at the size that the network gets; arrays are resized on the device.
    """
    decodes_to = plan.image_size if train else plan.eval_img_size
    return build_loader(
        split,
        device=device,
        global_batch_size=plan.global_batch_size if train else plan.evaluation_batch_size,
        train=train,
        image_size=decodes_to if isinstance(split, EncodedSplit) else plan.image_size,
        resolutions=plan.resolutions if train else None,
        seed=plan.seed,
        rank=processes.rank,
        world_size=processes.world_size,
        resident=plan.resident_data,
        num_workers=plan.num_workers,
        prefetch_factor=plan.prefetch_factor,
        pin_memory=plan.pin_memory,
        bad_images=bad_images,
    )
