"""From a configuration and a plan to the parts of a run, each built from plain arguments."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training_framework.config import TrainConfig
from training_framework.data import (
    BadImages,
    Dataset,
    EncodedSplit,
    EvalTransform,
    ForeignLoader,
    Loader,
    Split,
    TrainTransform,
    WorkerLoader,
    build_loader,
    detect_dataset,
    open_dataset,
)
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.loggers import (
    ConsoleLogger,
    CsvLogger,
    Logger,
    LoggerGroup,
    TensorBoardLogger,
)
from training_framework.machine.distributed import Processes, gathered
from training_framework.optimizers import (
    Schedule,
    WeightAverage,
    build_optimizer,
    build_schedule,
    has_fused_optimizer,
)
from training_framework.plan import TrainPlan
from training_framework.training.cuda_graph import CudaGraphStep
from training_framework.training.metrics import ClassificationSums
from training_framework.training.step import TrainStep

__all__ = [
    "Loaders",
    "assemble_schedule",
    "assemble_step",
    "foreign_facts",
    "open_configured_dataset",
    "open_loggers",
    "sample_name",
    "split_loader",
]


def open_configured_dataset(config: TrainConfig) -> Dataset:
    """The data set that a configuration names, or that its data_root holds."""
    name: str | None = config.data
    if name is None:
        name = "digits" if config.data_root is None else detect_dataset(config.data_root)
    return open_dataset(
        name,
        root=config.data_root,
        image_size=config.img_size,
        num_classes=config.num_classes,
        synthetic_train_images=config.synthetic_train_images,
        synthetic_val_images=config.synthetic_val_images,
        limit_train_images=config.limit_train_images,
        seed=config.seed,
    )


def foreign_facts(
    train_loader: Iterable[Any], val_loader: Iterable[Any] | None, num_classes: int | None
) -> DatasetFacts:
    """Facts of the user's own loaders, as far as they tell.

    Raises:
        UserError: The number of classes or the size of the images cannot be found out.
    """
    dataset = getattr(train_loader, "dataset", None)
    names = getattr(dataset, "classes", None)
    if num_classes is None and names is None:
        num_classes = _count_classes(dataset)
    if names is None or (num_classes is not None and len(names) != num_classes):
        names = [str(index) for index in range(num_classes or 0)]
    try:
        image = dataset[0][0] if dataset is not None else next(iter(train_loader))[0][0]
        image_size = int(image.shape[-1])
    except (TypeError, AttributeError, IndexError, KeyError, StopIteration):
        raise UserError(
            "the training loader yields no (images, labels) with image tensors",
            "yield float images (N, 3, H, W) and integer labels (N,)",
        ) from None
    return DatasetFacts(
        name="loader",
        train_images=_sample_count(train_loader),
        val_images=0 if val_loader is None else _sample_count(val_loader),
        class_names=tuple(map(str, names)),
        image_size=image_size,
        storage="loader",
        array_bytes=0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def _sample_count(loader: Any) -> int:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return len(loader) * (getattr(loader, "batch_size", None) or 1)


def _count_classes(dataset: Any) -> int:
    labels = getattr(dataset, "targets", None)
    if labels is None and isinstance(dataset, torch.utils.data.TensorDataset):
        labels = dataset.tensors[1]
    if labels is None:
        raise UserError(
            "the training loader does not say how many classes there are",
            "set num_classes (Config.NUM_CLASSES)",
        )
    return int(torch.as_tensor(labels).max()) + 1


def sample_name(source: Dataset | tuple[Iterable[Any], Iterable[Any] | None], index: int) -> str:
    """What to call a training sample in messages: its file, or its position where there is none."""
    return source.train.name_of(index) if isinstance(source, Dataset) else str(index)


class Loaders:
    """The loaders of a run and what turns their batches into the network's input.

    Attributes:
        bad_images: Images that could not be decoded and were skipped; None where the first
            one ends the run.
    """

    def __init__(
        self,
        *,
        train: Loader,
        val: Loader | None,
        train_transform: TrainTransform,
        eval_transform: EvalTransform,
        bad_images: BadImages | None = None,
    ) -> None:
        self.train = train
        self.val = val
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.bad_images = bad_images

    @classmethod
    def assemble(
        cls,
        config: TrainConfig,
        plan: TrainPlan,
        facts: DatasetFacts,
        *,
        source: Dataset | tuple[Iterable[Any], Iterable[Any] | None],
        processes: Processes,
        device: torch.device,
    ) -> "Loaders":
        """Build them for a data set, or around the user's own (train, val) loaders.

        Raises:
            UserError: A validation file is empty, which would be met after an epoch only.
        """
        bad_images = None
        if isinstance(source, Dataset):
            if config.on_bad_image == "skip":
                bad_images = BadImages(train=len(source.train), val=len(source.val))
            elif isinstance(source.val, EncodedSplit):
                source.val.refuse_empty()
            parts: dict[str, Any] = {
                "bad_images": bad_images,
                "config": config,
                "plan": plan,
                "processes": processes,
                "device": device,
            }
            val = split_loader(source.val, train=False, **parts) if len(source.val) else None
            train = split_loader(source.train, train=True, **parts)
        else:
            train = ForeignLoader(source[0], device=device, num_classes=plan.num_classes)
            val = None
            if source[1] is not None:
                val = ForeignLoader(source[1], device=device, num_classes=plan.num_classes)
        eval_transform = EvalTransform(
            mean=facts.mean, std=facts.std, device=device, channels_last=plan.channels_last
        )
        train_transform = TrainTransform(
            mean=facts.mean,
            std=facts.std,
            sample_count=facts.train_images,
            seed=config.seed,
            device=device,
            flip=plan.flip,
            crop_padding=plan.crop_padding,
            cutout=config.cutout,
            random_erasing=config.random_erasing,
            mixup=config.mixup,
            cutmix=config.cutmix,
            channels_last=plan.channels_last,
        )
        return cls(
            train=train,
            val=val,
            train_transform=train_transform,
            eval_transform=eval_transform,
            bad_images=bad_images,
        )

    def report_to(self, report: Callable[[str], None], bad_images_file: Path) -> None:
        """Say what happens while loading through `report`, and list bad pictures in a file."""
        for loader in (self.train, self.val):
            if isinstance(loader, WorkerLoader):
                loader.report = report
        if self.bad_images is not None:
            self.bad_images.list_in(bad_images_file, report)

    def share_bad_images(self) -> int:
        """Let every process know of all bad pictures: their number.

        All processes must call it at the same point.

        Raises:
            UserError: Together they are too many.
        """
        if self.bad_images is None:
            return 0
        for by_split in gathered(self.bad_images.by_split()):
            for split, reasons in by_split.items():
                self.bad_images.add(split, reasons)
        return len(self.bad_images)

    def close(self) -> None:
        """End the loaders' processes."""
        self.train.close()
        if self.val is not None:
            self.val.close()


def split_loader(
    split: Split,
    *,
    train: bool,
    config: TrainConfig,
    plan: TrainPlan,
    processes: Processes,
    device: torch.device,
    bad_images: BadImages | None = None,
) -> Loader:
    """The loader of one split as planned: for training, or for evaluation."""
    return build_loader(
        split,
        device=device,
        global_batch_size=plan.global_batch_size if train else plan.evaluation_batch_size,
        train=train,
        image_size=plan.image_size,
        seed=config.seed,
        rank=processes.rank,
        world_size=processes.world_size,
        resident=plan.resident_data,
        num_workers=plan.num_workers,
        prefetch_factor=config.prefetch_factor,
        pin_memory=plan.pin_memory,
        bad_images=bad_images,
    )


def assemble_step(
    config: TrainConfig, plan: TrainPlan, model: nn.Module, device: torch.device
) -> TrainStep:
    """What makes the optimizer steps, around a network on its device."""
    wrapped = model
    if plan.world_size > 1:
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    # After DDP has given every rank the weights of rank 0, so that all average the same.
    average = WeightAverage(model, decay=config.ema_decay) if config.ema_decay else None
    fused = plan.fused_optimizer
    if fused and config.fused_optimizer == "auto":
        fused = has_fused_optimizer(config.optimizer, device.type)
    optimizer = build_optimizer(
        model,
        name=config.optimizer,
        lr=plan.lr,
        momentum=config.momentum if config.optimizer == "sgd" else 0.0,
        nesterov=plan.nesterov,
        weight_decay=config.weight_decay,
        decay_norm_and_bias=config.decay_norm_and_bias,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        fused=fused,
    )
    make_step = CudaGraphStep if plan.cuda_graph else TrainStep
    return make_step(
        wrapped,
        optimizer,
        device_type=device.type,
        precision=plan.precision,
        label_smoothing=config.label_smoothing,
        grad_clip_val=config.grad_clip_val,
        sums=ClassificationSums(device, num_classes=plan.num_classes),
        average=average,
        compile_mode=plan.compile_mode if plan.compile else None,
    )


def assemble_schedule(config: TrainConfig, plan: TrainPlan) -> Schedule:
    """The learning-rate schedule, in steps."""
    options: dict[str, Any] = {}
    if config.scheduler == "step":
        options = {"step_size": plan.step_size_steps, "gamma": config.gamma}
    elif config.scheduler == "multi_step":
        options = {"milestones": plan.milestones_steps, "gamma": config.gamma}
    return build_schedule(
        config.scheduler,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        **options,
    )


def open_loggers(
    directory: Path, *, plan: TrainPlan, tensorboard: bool, resume_step: int | None
) -> tuple[LoggerGroup, ConsoleLogger]:
    """All sinks of a run, and the one among them that shows progress."""
    console = ConsoleLogger(
        total_steps=plan.total_steps, start_step=resume_step or 0, total_epochs=plan.epochs
    )
    sinks: list[Logger] = [console, CsvLogger(directory / "metrics.csv", resume_step=resume_step)]
    if tensorboard:
        purge_step = None if resume_step is None else resume_step + 1
        sinks.append(TensorBoardLogger(directory, purge_step=purge_step))
    return LoggerGroup(sinks), console
