"""Use what was trained: evaluate it on a data set, let it name pictures."""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from training_framework.plan import make_plan, plan_run
from training_framework.runs.network_card import NetworkCard, load_network
from training_framework.training.evaluation import Evaluation, evaluate
from training_framework.training.loaders import split_loader

__all__ = ["evaluate_file", "predict_files"]

PICTURES_AT_ONCE = 64
_DATA_KEYS = (
    "data", "data_root", "num_classes", "seed", "synthetic_train_images", "synthetic_val_images",
)  # fmt: skip


def evaluate_file(path: Path, overrides: Mapping[str, Any]) -> tuple[Evaluation, DatasetFacts]:
    """Evaluate a checkpoint or weight file on a data set, every sample once.

    Args:
        path: A .ckpt or weights.safetensors of this framework.
        overrides: Settings (data, data_root, batch_size, ...) that win over those of the
            checkpoint's run; its image size and classes are the network's own.

    Raises:
        UserError: A file or setting is wrong, or the data has other classes than the network.
    """
    network, card = load_network(path)
    planned = plan_run(_evaluation_config(path, card, overrides), own_network=card.model)
    plan, facts, dataset = planned.plan, planned.facts, planned.source
    assert isinstance(dataset, Dataset)
    if facts.class_names != card.class_names:
        ours, theirs = _first_difference(card.class_names, facts.class_names)
        raise UserError(
            f"{path}: the network's classes are not those of {facts.name} "
            f"({len(card.class_names)} against {len(facts.class_names)}; "
            f"{ours!r} against {theirs!r})",
            "name the data that it was trained for",
        )
    processes = planned.processes
    device = plan.torch_device(processes.local_rank)
    torch.set_num_threads(plan.threads)
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
        evaluation = evaluate(
            network.to(device),
            loader,
            EvalTransform(mean=card.mean, std=card.std, device=device),
            device=device,
            num_classes=plan.num_classes,
            precision=plan.precision,
        )
        loader.close()
    return evaluation, facts


def _evaluation_config(path: Path, card: NetworkCard, overrides: Mapping[str, Any]) -> TrainConfig:
    """What to evaluate on: the data of the network's own run unless said otherwise."""
    base: dict[str, Any] = {}
    given = {canonical(name, value)[0] for name, value in overrides.items()}
    if path.suffix != ".safetensors":
        trained = load_checkpoint(path)["config"]
        keys = {"batch_size"} if given & {"data", "data_root"} else {"batch_size", *_DATA_KEYS}
        base = {key: value for key, value in trained.items() if key in keys}
    base["img_size"] = card.image_size
    config = load_config(overrides=overrides, base=base, source="command line")
    if config.data == "synthetic":  # it has the classes that it is asked for
        config = config.model_copy(update={"num_classes": len(card.class_names)})
    return config


def _first_difference(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    pairs = itertools.zip_longest(ours, theirs, fillvalue="")
    return next(pair for pair in pairs if pair[0] != pair[1])


def predict_files(
    path: Path, pictures: Sequence[Path], *, top: int, overrides: Mapping[str, Any]
) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """Name what pictures show.

    Args:
        path: A .ckpt or weights.safetensors of this framework.
        pictures: Image files, and folders whose image files (at any depth) are meant.
        top: How many classes to give for each.
        overrides: accelerator, precision, threads and on_bad_image.

    Yields:
        Each picture's path with its most probable classes and their probabilities.

    Raises:
        UserError: A file is missing or cannot be read; it is damaged or no picture, unless
            on_bad_image is skip, which says so on stderr.
    """
    files = _picture_files(pictures)
    network, card = load_network(path)
    config = load_config(overrides=overrides, source="command line")
    facts = DatasetFacts(
        name="pictures",
        train_images=len(files),
        val_images=len(files),
        class_names=card.class_names,
        image_size=card.image_size,
        storage="loader",
        array_bytes=0,
        mean=card.mean,
        std=card.std,
    )
    plan = make_plan(config, detect_hardware(), facts)
    device = plan.torch_device(0)
    torch.set_num_threads(plan.threads)
    network.to(device)
    transform = EvalTransform(mean=card.mean, std=card.std, device=device)
    for start in range(0, len(files), PICTURES_AT_ONCE):
        part = files[start : start + PICTURES_AT_ONCE]
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


def _picture_files(pictures: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for picture in pictures:
        if picture.is_dir():
            found = sorted(p for p in picture.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise UserError(f"{picture}: holds no image files", "name another folder")
            files += found
        elif picture.is_file():
            files.append(picture)
        else:
            raise UserError(f"{picture}: no such file or folder", "check the path")
    return files


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _prepared(
    files: Sequence[Path], card: NetworkCard, *, skip_bad: bool
) -> list[tuple[Path, Pixels]]:
    """The network's view of each picture."""
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
