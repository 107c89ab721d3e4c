"""Use a trained network: evaluate it on a data set, or classify images."""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from training_framework.checkpoint import load_checkpoint
from training_framework.config import TrainConfig, load_config
from training_framework.config.names import canonical
from training_framework.data import BadImages, Dataset, EvalTransform
from training_framework.data.decoding import (
    IMAGE_SUFFIXES,
    Pixels,
    decode_center_crop,
    decode_image,
    resize,
)
from training_framework.data.facts import DatasetFacts
from training_framework.data.image_files import StorageFault, read_image
from training_framework.errors import UserError
from training_framework.machine.distributed import process_group
from training_framework.machine.hardware import detect_hardware
from training_framework.machine.precision import autocast
from training_framework.plan import TrainPlan, make_plan, plan_run
from training_framework.runs.network_card import NetworkCard, load_network
from training_framework.switches import set_up_process
from training_framework.training.batch_counting import BatchCounter
from training_framework.training.evaluation import Evaluation, evaluate
from training_framework.training.loaders import split_loader

__all__ = ["evaluate_file", "predict_files"]

IMAGES_PER_BATCH = 64
_DATA_KEYS = (
    "data", "data_root", "num_classes", "seed", "synthetic_train_images", "synthetic_val_images",
)  # fmt: skip


def evaluate_file(path: Path, overrides: Mapping[str, Any]) -> tuple[Evaluation, DatasetFacts]:
    """Evaluate a checkpoint or weight file on every image of a data set, once.

    Args:
        path: A .ckpt or weights.safetensors of this framework.
        overrides: Settings (data, data_root, batch_size, ...) that replace those of the
            checkpoint's run. Image size and classes are always the network's own.

    Raises:
        UserError: A file or setting is wrong, or the classes of the data and the network differ.
    """
    network, card = load_network(path)
    planned = plan_run(_evaluation_config(path, card, overrides), own_network=card.model)
    plan, facts, dataset = planned.plan, planned.facts, planned.source
    assert isinstance(dataset, Dataset)
    if facts.class_names != card.class_names:
        ours, theirs = _first_difference(card.class_names, facts.class_names)
        raise UserError(
            f"{path}: the classes of the network differ from those of {facts.name} "
            f"({len(card.class_names)} against {len(facts.class_names)}; "
            f"{ours!r} against {theirs!r})",
            "name the data set that the network was trained on",
        )
    processes = planned.processes
    device = plan.torch_device(processes.local_rank)
    set_up_process(plan.switch_values(), device.type)
    with process_group(processes, device):
        bad_images = None
        if plan.on_bad_image == "skip":
            bad_images = BadImages(train=0, val=len(dataset.val), report=_to_stderr)
        loader = split_loader(
            dataset.val,
            train=False,
            bad_images=bad_images,
            plan=plan,
            processes=processes,
            device=device,
        )
        counter = BatchCounter(
            _placed(network, plan, device),
            _transform(card, plan, device),
            device=device,
            num_classes=plan.num_classes,
            precision=plan.precision,
            tta=plan.tta,
        )
        counter.report = _to_stderr
        evaluation = evaluate(counter, loader, device=device)
        loader.close()
    return evaluation, facts


def _evaluation_config(path: Path, card: NetworkCard, overrides: Mapping[str, Any]) -> TrainConfig:
    """The settings to evaluate with; data defaults to that of the network's own run."""
    base: dict[str, Any] = {}
    given = {canonical(name, value)[0] for name, value in overrides.items()}
    if path.suffix != ".safetensors":
        trained = load_checkpoint(path)["config"]
        keys = {"batch_size"} if given & {"data", "data_root"} else {"batch_size", *_DATA_KEYS}
        base = {key: value for key, value in trained.items() if key in keys}
    base |= {"img_size": card.array_size or card.image_size, "eval_img_size": card.image_size}
    config = load_config(overrides=overrides, base=base, source="command line")
    if config.data == "synthetic":  # its number of classes is a setting
        config = config.model_copy(update={"num_classes": len(card.class_names)})
    return config


def _first_difference(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    pairs = itertools.zip_longest(ours, theirs, fillvalue="")
    return next(pair for pair in pairs if pair[0] != pair[1])


def predict_files(
    path: Path, image_paths: Sequence[Path], *, top: int, overrides: Mapping[str, Any]
) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """Classify images.

    Args:
        path: A .ckpt or weights.safetensors of this framework.
        image_paths: Image files, and folders of them, searched at any depth.
        top: How many classes to give for each image.
        overrides: accelerator, precision, threads and on_bad_image.

    Yields:
        The path of each image, with its most probable classes and their probabilities.

    Raises:
        UserError: A file is missing or cannot be read, or it is damaged or not an image. With
            on_bad_image skip, damaged files are skipped with a note on stderr.
    """
    files = _image_files(image_paths)
    network, card = load_network(path)
    config = load_config(overrides=overrides, source="command line")
    facts = DatasetFacts(
        name="images",
        train_images=len(files),
        val_images=len(files),
        class_names=card.class_names,
        image_size=card.image_size,
        storage="loader",
        array_bytes=0,
        mean=card.mean,
        std=card.std,
    )
    plan = make_plan(config, detect_hardware(), facts, own_network=card.model)
    device = plan.torch_device(0)
    set_up_process(plan.switch_values(), device.type)
    _placed(network, plan, device)
    transform = _transform(card, plan, device)
    for start in range(0, len(files), IMAGES_PER_BATCH):
        part = files[start : start + IMAGES_PER_BATCH]
        views = _prepared(part, card, skip_bad=plan.on_bad_image == "skip")
        if not views:
            continue
        images = (
            torch.from_numpy(np.stack([pixels for _, pixels in views]))
            .to(device)
            .permute(0, 3, 1, 2)
        )
        with torch.inference_mode(), autocast(device.type, plan.precision):
            logits = network(transform.normalized(images))
        shares, classes = logits.float().softmax(dim=1).topk(min(top, len(card.class_names)))
        rows = zip(views, shares.tolist(), classes.tolist(), strict=True)
        for (file, _), row_shares, row_classes in rows:
            yield (
                file,
                [
                    (card.class_names[index], share)
                    for index, share in zip(row_classes, row_shares, strict=True)
                ],
            )


def _placed(network: nn.Module, plan: TrainPlan, device: torch.device) -> nn.Module:
    """The network on its device, in the plan's memory format."""
    network.to(device)
    if plan.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _transform(card: NetworkCard, plan: TrainPlan, device: torch.device) -> EvalTransform:
    """From pixels to the network's input, in the plan's memory format."""
    return EvalTransform(
        mean=card.mean,
        std=card.std,
        device=device,
        channels_last=plan.channels_last,
        size=card.image_size,
    )


def _image_files(image_paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in image_paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise UserError(f"{path}: contains no image files", "name another folder")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder", "check the path")
    return files


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _prepared(
    files: Sequence[Path], card: NetworkCard, *, skip_bad: bool
) -> list[tuple[Path, Pixels]]:
    """Each image as the network's input: scaled and cropped."""
    prepared = []
    for file in files:
        try:
            prepared.append((file, _view(read_image(file), file, card)))
        except StorageFault:
            raise
        except UserError as error:
            if not skip_bad:
                raise
            _to_stderr(f"note: skipped {error.fault}")
    return prepared


def _view(data: bytes, file: Path, card: NetworkCard) -> Pixels:
    if card.center_crop:
        return decode_center_crop(data, file, size=card.image_size)
    pixels = decode_image(data, file)
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return resize(pixels[top : top + side, left : left + side], card.image_size, card.image_size)
