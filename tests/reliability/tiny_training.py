"""A training that takes a second and uses everything that a resumption has to restore."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training_framework.config import TrainConfig
from training_framework.data.sample_digest import digest_of_batches
from training_framework.data.sampling import epoch_order, training_batches
from training_framework.measure.verify.difference import compare_runs

__all__ = [
    "EPOCHS",
    "STEPS",
    "differences",
    "expected_digests",
    "newest_version",
    "write_configuration",
    "write_images",
]

CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS = 3, 15, 4
BATCH_SIZE, EPOCHS, ACCUMULATED = 6, 3, 2
IMAGES = CLASSES * TRAIN_PER_CLASS
# Seven batches of an epoch: three groups of two and one of one.
STEPS = EPOCHS * -(-(IMAGES // BATCH_SIZE) // ACCUMULATED)
SETTINGS: dict[str, Any] = {
    "data": "folder",
    "model": "resnet10",
    "img_size": 8,
    "batch_size": BATCH_SIZE,
    "accumulate_grad_batches": ACCUMULATED,
    "epochs": EPOCHS,
    "optimizer": "adamw",
    "lr": 0.01,
    "ema_decay": 0.9,
    "mixup": 0.2,
    "grad_clip_val": 5.0,
    "flip": "random",
    "precision": "32",
    # They hold no state, and each process would ask the compiler for this processor's settings.
    "fused_norms": False,
    "winograd_convolutions": False,
    "threads": 1,
    "log_every_n_steps": 2,
    "val_check_interval": 3,
    "save_every_n_steps": 2,
    "save_top_k": 2,
    "tensorboard": True,
}


def write_images(folder: Path) -> Path:
    """An image folder: `train` and `val` of a few classes, 12 x 12 px PNG files."""
    draws = np.random.default_rng(0)
    for split, count in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
        for label in range(CLASSES):
            place = folder / split / f"class_{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, size=(12, 12, 3), dtype=np.uint8)
                pixels[..., label] //= 2
                Image.fromarray(pixels).save(place / f"{number:02d}.png")
    return folder


def write_configuration(path: Path, images: Path, **settings: Any) -> TrainConfig:
    """Write the YAML file of this training, and return what it says.

    Args:
        path: For the file.
        images: As from `write_images`.
        **settings: That differ.
    """
    values = {**SETTINGS, "data_root": str(images), **settings}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return TrainConfig(**{**values, "data_root": images})


def newest_version(runs: Path) -> Path:
    """The run directory of the highest number."""
    return max(runs.glob("version_*"), key=lambda path: int(path.name.partition("_")[2]))


def expected_digests(seed: int = 0) -> list[str]:
    """The sample digest of each epoch, from the permutations, without any loader.

    Each epoch's batches are checked to hold no sample twice.
    """
    digests = []
    for epoch in range(EPOCHS):
        order = epoch_order(IMAGES, seed=seed, epoch=epoch, shuffle=True)
        batches = training_batches(order, global_batch_size=BATCH_SIZE)
        samples = np.concatenate(batches)
        assert len(np.unique(samples)) == len(samples) == IMAGES // BATCH_SIZE * BATCH_SIZE
        digests.append(digest_of_batches(map(torch.from_numpy, batches)))
    return digests


def differences(straight: Path, other: Path) -> list[str]:
    """What differs between two finished run directories; nothing where they are equal."""
    found = list(compare_runs(straight, other).differences)
    names = [
        sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (straight, other)
    ]
    kept = [[name for name in listed if "val_acc1" in name] for listed in names]
    if kept[0] != kept[1]:
        found.append(f"best checkpoints: {kept[0]} straight and {kept[1]} resumed")
    leftover = [name for name in names[1] if name.startswith(".")]
    if leftover:
        found.append(f"left over: {leftover}")
    if not (other / "run.json").exists():
        return [*found, "it is not finished, and nothing goes on with it"]
    weights = [(run / "weights.safetensors").read_bytes() for run in (straight, other)]
    if weights[0] != weights[1]:
        found.append("weights.safetensors: the bytes differ")
    return found + _event_differences(straight, other)


def _event_differences(straight: Path, other: Path) -> list[str]:
    events = [_scalars(run) for run in (straight, other)]
    found = []
    for name in sorted(events[0].keys() | events[1].keys()):
        ours, theirs = (side.get(name, []) for side in events)
        if ours != theirs:
            found.append(f"TensorBoard: {name}: {ours} straight and {theirs} resumed"[:300])
    return found


def _scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, but for those that measure time and memory."""
    # It tells of every event that a resumption made void, which is what is wanted here.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    measured = ("images_per_second", "data_wait", "memory", "mfu", "eval_seconds")
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if not name.endswith(measured)
    }
