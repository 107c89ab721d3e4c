"""The short trainings of same_bits.py, and what it records: losses and a digest of the weights.

They use only public interfaces: the commands, `main`, the trainer, and the files of a run
directory. Every setting that could depend on a measured speed is fixed, and so are the threads.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

__all__ = ["STEPS", "TRAININGS", "Outcome", "Training", "TrainingFailedError", "run_training"]

ROOT = Path(__file__).parent.parent
OWN_NETWORK = Path(__file__).parent / "same_bits_own_network.py"
MAIN = (
    "import json, sys; from training_framework.train import main; main(**json.loads(sys.argv[1]))"
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
STEPS = 30
EVALUATED_STEPS = (15, 30)
TIMEOUT_SECONDS = 300
# Each of these can change how a library computes, and with it the last bits.
LIBRARY_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "TORCH")

BASE: dict[str, Any] = {
    "data": "digits", "limit_train_images": 320, "model": "resnet10", "batch_size": 32, "epochs": 3,
    "lr": 0.02, "seed": 7, "precision": "32", "bf16_products": False, "accelerator": "cpu",
    "compile": False, "num_workers": 0, "log_every_n_steps": 1, "val_check_interval": 15,
    "tensorboard": False, "name": "same-bits", "output_dir": "logs",
}  # fmt: skip
PLAIN = {
    "channels_last": False, "winograd_convolutions": False, "fused_norms": False,
    "small_map_convolutions": False, "keep_memory": False, "fused_optimizer": False,
}  # fmt: skip
KERNELS = dict.fromkeys(PLAIN, True)
AVERAGED = {
    "batch_size": 16, "limit_train_images": 464, "accumulate_grad_batches": 3, "ema_decay": 0.9,
    "mixup": 0.4,
}  # fmt: skip
FOLDER = {
    "data": "folder", "data_root": "images", "limit_train_images": None, "img_size": 32,
    "batch_size": 16, "num_workers": 2, "flip": "random",
}  # fmt: skip
# Keys of BASE that some trainings leave at their defaults, to test these. Precision is not among
# them, since its `auto` depends on a measured speed.
DEFAULTED = ("model", "lr", "compile", "num_workers")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training of 30 optimizer steps, evaluated after 15 and 30.

    Attributes:
        settings: By key of the configuration; they override BASE, and None removes a key of BASE.
        threads: CPU threads of each process.
        processes: Number of processes; torchrun starts more than one.
        stop_after: Stop after this many steps and resume; None: train without a stop.
        face: What starts it: the command, `main`, or the trainer with a user's network and loaders.
        equals: The training that this one must equal bit for bit; empty: none.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    processes: int = 1
    stop_after: int | None = None
    face: Literal["command", "main", "own network"] = "command"
    equals: str = ""


TRAININGS: dict[str, Training] = {
    "plain-fp32-sgd": Training(settings=PLAIN),
    "bf16-mixed": Training(settings={"precision": "bf16-mixed"}),
    "16-mixed": Training(settings={"precision": "16-mixed"}),
    "accumulation-ema-mixup": Training(settings=AVERAGED),
    "accumulation-ema-mixup-resumed": Training(
        settings=AVERAGED, stop_after=13, equals="accumulation-ema-mixup"
    ),
    "adamw-clipping-smoothing": Training(
        face="main",
        settings={
            "optimizer": "adamw", "lr": 0.002, "grad_clip_val": 1.0, "label_smoothing": 0.2,
            "scheduler": "cosine", "warmup_epochs": 0.5, "weight_decay": 0.05,
        },
    ),
    "all-kernels": Training(settings=KERNELS, threads=2),
    "digits-defaults": Training(
        settings=dict.fromkeys(DEFAULTED),
        threads=2,
    ),
    "image-folder": Training(settings=FOLDER),
    "image-folder-resumed": Training(settings=FOLDER, stop_after=17, equals="image-folder"),
    "two-processes": Training(
        settings={"sync_batchnorm": True, "grad_clip_val": 5.0}, processes=2
    ),
    "own-network": Training(face="own network"),
    "cutmix-erasing-cutout-crop": Training(
        settings={
            "cutmix": 1.0, "random_erasing": 0.5, "cutout": 8, "crop_padding": 4, "flip": "random",
            "scheduler": "multi_step", "milestones": [1, 2], "gamma": 0.3,
        },
    ),
    "checkpointing-shared-weights": Training(
        settings={
            "activation_checkpointing": True, "share_early_weights": True,
            "zero_init_last_norm": True, "flip": "alternating",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a training computed.

    Attributes:
        losses: The loss of each step in order, as float.hex of the logged single-precision value.
        val_losses: The loss of each evaluation in order, likewise.
        weights_sha256: Over names, types, shapes and bytes of the final weights.
    """

    losses: tuple[str, ...]
    val_losses: tuple[str, ...]
    weights_sha256: str


class TrainingFailedError(Exception):
    """A training ended with an error, or did not write the files that it should."""


def run_training(training: Training, folder: Path) -> Outcome:
    """Run `training` in processes of its own.

    Args:
        training: What to run.
        folder: An empty folder, for its data and its run directory.

    Raises:
        TrainingFailedError: It failed, or did not log what it should.
    """
    settings = {**BASE, **training.settings, "threads": training.threads}
    settings = {key: value for key, value in settings.items() if value is not None}
    if settings["data"] == "folder":
        write_images(folder / settings["data_root"])
    if training.stop_after is not None:
        _run(training, {**settings, "stop_after_steps": training.stop_after}, folder)
    _run(training, settings, folder)
    return _outcome(folder)


def write_images(folder: Path) -> None:
    """Write an image folder of four classes, half PNG and half JPEG: noise on the class's tint."""
    draws = np.random.default_rng(11)
    for split, count in (("train", 40), ("val", 12)):
        for label in range(4):
            place = folder / split / f"class_{label}"
            place.mkdir(parents=True)
            for number in range(count):
                height, width = draws.integers(36, 56, size=2)
                pixels = draws.integers(0, 128, size=(height, width, 3))
                pixels[..., label % 3] += 30 * label
                suffix = ".png" if number % 2 else ".jpg"
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(place / f"{number:02d}{suffix}")


def _run(training: Training, settings: dict[str, Any], folder: Path) -> None:
    command = [sys.executable]
    if training.processes > 1:
        command += [*TORCHRUN, str(training.processes)]
    if training.face == "main":
        command += ["-c", MAIN, json.dumps(settings)]
    elif training.face == "own network":
        command += [str(OWN_NETWORK), json.dumps(settings)]
    else:
        command += ["-m", "training_framework", "train", *_flags(settings)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=_environment(training.threads), capture_output=True,
            text=True, timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TrainingFailedError(f"not finished after {TIMEOUT_SECONDS} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no error text"]
        raise TrainingFailedError(f"exit status {done.returncode}: {lines[-1]}")


def _flags(settings: dict[str, Any]) -> list[str]:
    flags = []
    for key, value in settings.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        flags.append(
            f"--{key.replace('_', '-')}={text.lower() if value in (True, False) else text}"
        )
    return flags


def _environment(threads: int) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(LIBRARY_VARIABLES)
    }
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return {
        **kept,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        # Threads that wait without spinning are not slowed down as much by other processes.
        "OMP_WAIT_POLICY": "passive",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _outcome(folder: Path) -> Outcome:
    found = sorted((folder / "logs").rglob("metrics.csv"))
    if len(found) != 1:
        raise TrainingFailedError(f"{len(found)} files metrics.csv instead of 1")
    with found[0].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    evaluated = [row for row in rows if row["val/loss"]]
    if steps != list(range(1, STEPS + 1)):
        raise TrainingFailedError(f"metrics.csv has the steps {steps} instead of 1 to {STEPS}")
    if tuple(int(row["step"]) for row in evaluated) != EVALUATED_STEPS:
        raise TrainingFailedError(f"evaluations are not after the steps {EVALUATED_STEPS}")
    return Outcome(
        losses=tuple(_hex(row["train/loss"]) for row in rows),
        val_losses=tuple(_hex(row["val/loss"]) for row in evaluated),
        weights_sha256=_weights_digest(found[0].with_name("weights.safetensors")),
    )


def _hex(text: str) -> str:
    # The log has the fewest digits that identify the single-precision value.
    return float(np.float32(text)).hex()


def _weights_digest(path: Path) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(load_file(path).items()):
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
