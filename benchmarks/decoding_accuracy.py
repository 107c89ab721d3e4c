"""Does decoding only what a crop needs change what a network learns?

    python benchmarks/decoding_accuracy.py --data-root FOLDER      # such as Imagenette

Trains the same small network with several seeds: once on the framework's images, and once on
images that Pillow decodes completely and resizes with antialiasing. A seed gives both sides the
same weights, order and crops, so the accuracies form pairs. Nothing here is timed.

Result: benchmarks/results/decoding-accuracy-<size>px_<device>_<torch>_<date>.json. The exit
status is 1 if the interval of the differences does not contain 0.
"""

import argparse
import io
import math
import shlex
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from decode_speed import pillow_crop
from PIL import Image
from reliability_result import RESULTS, write_result

from training_framework.config import TrainConfig
from training_framework.config.loading import config_to_dict
from training_framework.data import host_batches
from training_framework.data.decoding import Pixels, resize_and_center_crop
from training_framework.machine.hardware import usable_cores
from training_framework.training.run import TrainingRun

# Student's t for a two-sided 95% interval, by degrees of freedom.
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def pillow_random_crop(
    data: bytes, _path: Path | str, *, size: int, rng: np.random.Generator, out: Pixels
) -> None:
    """The crop that the framework draws, from an image decoded completely."""
    out[:] = pillow_crop(data, size=size, rng=rng)


def pillow_center_crop(data: bytes, _path: Path | str, *, size: int, out: Pixels) -> None:
    """The middle of an image decoded completely."""
    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    out[:] = resize_and_center_crop(pixels, size)


PILLOW = {
    "decode_random_resized_crop": pillow_random_crop,
    "decode_center_crop": pillow_center_crop,
}


def accuracy(config: TrainConfig, *, exact: bool) -> float:
    """Top-1 accuracy in percent after training; `exact` is Pillow's side."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if exact:
            for name, decode in PILLOW.items():
                stack.enter_context(mock.patch.object(host_batches, name, decode))
        result = TrainingRun(config.model_copy(update={"output_dir": Path(folder)})).execute()
    assert result.last_acc1 is not None
    return result.last_acc1


def measure(config: TrainConfig, seeds: int) -> dict[str, Any]:
    """Accuracies of both sides by seed, and the interval of their differences."""
    rows = []
    for seed in range(seeds):
        seeded = config.model_copy(update={"seed": seed})
        row = {"framework": accuracy(seeded, exact=False), "pillow": accuracy(seeded, exact=True)}
        rows.append(row)
        print(f"seed {seed}: {row['framework']:.2f}% against Pillow's {row['pillow']:.2f}%")
    differences = [row["framework"] - row["pillow"] for row in rows]
    mean = statistics.mean(differences)
    half = STUDENT_T[seeds - 1] * statistics.stdev(differences) / math.sqrt(seeds)
    return {
        "unit": "top-1 accuracy in percent; differences in points",
        "config": config_to_dict(config),
        "accuracies": rows,
        "difference": [mean, mean - half, mean + half],
        "spread_over_seeds": statistics.stdev(row["pillow"] for row in rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--seeds", type=int, default=3, choices=[n + 1 for n in STUDENT_T])
    parser.add_argument("--images", type=int, default=3000, help="training images (3000)")
    parser.add_argument("--epochs", type=int, default=4, help="of each training (4)")
    parser.add_argument("--image-size", type=int, default=128, help="side in pixels (128)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args()
    config = TrainConfig(
        data_root=options.data_root,
        limit_train_images=options.images,
        img_size=options.image_size,
        model="resnet10",
        stem="imagenet",  # so that decoding, not arithmetic, decides how long it takes
        epochs=options.epochs,
        val_check_interval=float(options.epochs),
        batch_size=64,
        num_workers=0,  # both sides decode in this process
        accelerator="cpu",
        tensorboard=False,
        save_top_k=0,
        resume="never",
    )
    result = measure(config, options.seeds)
    command = shlex.join(["python", "benchmarks/decoding_accuracy.py", *sys.argv[1:]])
    path = write_result(
        f"decoding-accuracy-{options.image_size}px",
        options.output,
        {"command": command, **result},
        device=f"cpu-{usable_cores()}-threads",
    )
    mean, low, high = result["difference"]
    print(f"difference {mean:+.2f} points [{low:+.2f}, {high:+.2f}]")
    print(path)
    return 0 if low <= 0 <= high else 1


if __name__ == "__main__":
    sys.exit(main())
