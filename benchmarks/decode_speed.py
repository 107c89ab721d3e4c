"""From files to uint8 batches: how fast one core decodes, and how close loading comes on all cores.

    python benchmarks/decode_speed.py --photos FOLDER

FOLDER holds photographs as JPEG files, such as images of ImageNet; subfolders do not matter. The
following take turns on one thread. Each makes batches of random-resized crops of all photographs:

- `pillow`: the reference, a typical data set for a DataLoader: Pillow opens, decodes, crops and
  resizes one image at a time, and the samples are stacked;
- `files`: the framework, from the same files;
- `packed`: the framework, from a copy that `data pack --shorter-side 256` made;
- `pillow, packed`: the reference on the images of that copy, to show what smaller images gain;
- `pillow again`: the reference once more, as an A/A control.

On all cores, the framework's loader takes turns with its limit: as many processes, which decode
the same batches but do not hand them over.

Result: benchmarks/results/decode-speed_<device>_<torch>_<date>.json. Its ratios are medians of the
paired ratios over the rounds, with bootstrap 95% intervals.
"""

import argparse
import io
import json
import math
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training_framework.data import EncodedSplit, FileSplit, WorkerLoader, open_dataset
from training_framework.data.decoding import (
    Pixels,
    decode_random_resized_crop,
    random_crop_box,
)
from training_framework.data.host_batches import FileBatches
from training_framework.data.sampling import BatchPlan
from training_framework.data.shards.packing import pack_folder
from training_framework.machine.hardware import detect_hardware
from training_framework.machine.load import MachineWatch
from training_framework.measure.compare.environment import environment_of, source_commit
from training_framework.measure.compare.result import result_file_name, unused_path
from training_framework.measure.compare.statistics import control_holds, paired_ratio

RESULTS = Path(__file__).parent / "results"
SIZE = 224
SHORTER_SIDE = 256
BATCH_SIZE = 32
PATIENCE_SECONDS = 600.0  # with a process that has died
SUFFIXES = (".jpg", ".jpeg")
# Each ratio's name: who, against whom.
RATIOS = {
    "files / pillow": ("files", "pillow"),
    "packed / pillow": ("packed", "pillow"),
    "packed / pillow on the packed copy": ("packed", "pillow, packed"),
    "pillow again / pillow": ("pillow again", "pillow"),
}
CLOCK = (
    "seconds of one pass over all photographs: reading from a warm page cache, drawing and "
    "decoding the crops, putting batches of uint8 together; one thread. With all cores: one epoch "
    "of the loader, its processes running, from asking for the first batch to having the last"
)


class PlainPhotographs:
    """The reference: a typical data set for a DataLoader, with torchvision's semantics."""

    def __init__(self, read: Sequence[Callable[[], bytes]]) -> None:
        self.read = read
        self.random = random.Random(0)

    def __len__(self) -> int:
        return len(self.read)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(io.BytesIO(self.read[index]())).convert("RGB")
        image = image.crop(self.random_box(*image.size))
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def random_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of a crop of 8 to 100% of the area, 3:4 to 4:3."""
        for _ in range(10):
            area = width * height * self.random.uniform(0.08, 1)
            aspect = math.exp(self.random.uniform(math.log(3 / 4), math.log(4 / 3)))
            across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if across <= width and down <= height:
                left = self.random.randint(0, width - across)
                top = self.random.randint(0, height - down)
                return left, top, left + across, top + down
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side

    def one_pass(self, _number: int) -> None:
        for start in range(0, len(self), BATCH_SIZE):
            torch.stack([self[index] for index in range(start, min(start + BATCH_SIZE, len(self)))])


class OwnBatches:
    """The framework's batches of a split, made in this process."""

    def __init__(self, split: EncodedSplit) -> None:
        self._count = len(split)
        self._batches = FileBatches(split, image_size=SIZE, train=True, seed=0)

    def one_pass(self, number: int) -> None:
        for start in range(0, self._count, BATCH_SIZE):
            self._batches[number, np.arange(start, min(start + BATCH_SIZE, self._count))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEG photographs")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of turns (12)")
    parser.add_argument("--repeats", type=int, default=4, help="copies of each in an epoch (4)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in SUFFIXES)
    assert files, f"{options.photos} holds no JPEG files"
    with tempfile.TemporaryDirectory() as folder:
        packed = packed_copy(files, Path(folder))
        result = measure(files, packed, rounds=options.rounds, repeats=options.repeats)
    options.output.mkdir(parents=True, exist_ok=True)
    name = result_file_name("decode-speed", f"cpu-{detect_hardware().cpu_name}", torch.__version__)
    path = unused_path(options.output / name)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(readable(result)))
    print(path)


def packed_copy(files: Sequence[Path], folder: Path) -> EncodedSplit:
    """The packed photographs, with the validation split that a set needs; nothing reads it here."""
    for name, chosen in (("train", files), ("val", files[:1])):
        (folder / name / "photograph").mkdir(parents=True)
        for number, file in enumerate(chosen):
            (folder / name / "photograph" / f"{number:06}.jpg").symlink_to(file.resolve())
    path = folder / "shards"
    pack_folder(folder, path, shorter_side=SHORTER_SIDE, workers=detect_hardware().cores)
    split = open_dataset("shards", root=path).train
    assert isinstance(split, EncodedSplit)
    return split


def measure(
    files: Sequence[Path], packed: EncodedSplit, *, rounds: int, repeats: int
) -> dict[str, Any]:
    """All turns, the ratios, and how far the framework's pixels are from Pillow's."""
    split = FileSplit(Path("/"), tuple(str(file.resolve()) for file in files), labels(len(files)))
    plain = PlainPhotographs([file.read_bytes for file in files])
    stored = packed.images()
    in_memory = [stored.read(sample) for sample in range(len(stored))]
    sides: dict[str, PlainPhotographs | OwnBatches] = {
        "pillow": plain,
        "files": OwnBatches(split),
        "packed": OwnBatches(packed),
        "pillow, packed": PlainPhotographs([lambda data=data: data for data in in_memory]),  # type: ignore[misc]
        "pillow again": plain,
    }
    for side in sides.values():
        side.one_pass(0)
    watch = MachineWatch()
    watch.start()
    seconds = in_turns({name: side.one_pass for name, side in sides.items()}, rounds)
    load = watch.stop()
    images = {name: [len(files) / passed for passed in turns] for name, turns in seconds.items()}
    ratios = {
        name: vars(paired_ratio(images[ours], images[theirs]))
        for name, (ours, theirs) in RATIOS.items()
    }
    control = paired_ratio(images["pillow again"], images["pillow"])
    return {
        "experiment": "decode-speed",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": source_commit(),
        "clock": CLOCK,
        "environment": environment_of(detect_hardware()),
        "dataset": "photographs",
        "photographs": len(files),
        "mean_pixels": float(np.mean([math.prod(Image.open(file).size) for file in files])),
        "mean_bytes": float(np.mean([file.stat().st_size for file in files])),
        "mean_bytes_packed": float(np.mean([len(data) for data in in_memory])),
        "image_size": SIZE,
        "packed_shorter_side": SHORTER_SIDE,
        "rounds": rounds,
        "warm_up": "one pass of each side, dropped",
        "other_cpu_share": load.other_cpu_share,
        "control_holds": control_holds(control),
        "images_per_second_of_one_core": images,
        "ratios": ratios,
        "mean_absolute_error_of_255": pixel_errors(files),
        "all_cores": all_cores(split, rounds=max(2, rounds // 2), repeats=repeats),
    }


def labels(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def in_turns(sides: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side by round; every other round goes backwards (A B B A)."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        order = list(sides) if number % 2 else list(reversed(sides))
        for name in order:
            start = time.perf_counter()
            sides[name](number)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def pillow_crop(data: bytes, *, size: int, rng: np.random.Generator) -> Pixels:
    """The crop that the framework draws, from an image that Pillow decodes completely."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box = random_crop_box(image.height, image.width, rng=rng)
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    return np.asarray(image.crop(corners).resize((size, size), Image.Resampling.BILINEAR))


def pixel_errors(files: Sequence[Path]) -> dict[str, float]:
    """Errors of the framework's crops against Pillow's: the mean, and that of the worst image."""
    errors = []
    for number, file in enumerate(files):
        data = file.read_bytes()
        exact = pillow_crop(data, size=SIZE, rng=np.random.default_rng(number))
        crop = decode_random_resized_crop(data, file, size=SIZE, rng=np.random.default_rng(number))
        errors.append(float(np.abs(crop.astype(int) - exact).mean()))
    return {"mean": float(np.mean(errors)), "worst_picture": max(errors)}


def all_cores(split: FileSplit, *, rounds: int, repeats: int) -> dict[str, Any]:
    """Images per second of the loader, with one process a core, and of its limit."""
    cores = detect_hardware().cores
    many = FileSplit(split.root, split.paths * repeats, labels(len(split) * repeats))
    plan = BatchPlan(sample_count=len(many), global_batch_size=BATCH_SIZE, train=True, seed=0)
    loader = WorkerLoader(many, plan=plan, device="cpu", image_size=SIZE, num_workers=cores)

    def load(number: int) -> None:
        for _ in loader.epoch(number):
            pass

    limit = DecodeOnly(many, plan, cores)
    try:
        load(0)
        limit.one_pass(0)
        seconds = in_turns({"loader": load, "decoding alone": limit.one_pass}, rounds)
    finally:
        limit.close()
        loader.close()
    count = plan.batch_count * BATCH_SIZE
    images = {name: [count / passed for passed in turns] for name, turns in seconds.items()}
    return {
        "processes": cores,
        "images_of_an_epoch": count,
        "images_per_second": images,
        "share_of_the_limit": vars(paired_ratio(images["loader"], images["decoding alone"])),
    }


class DecodeOnly:
    """Processes that each decode every n-th batch of an epoch and discard it."""

    def __init__(self, split: FileSplit, plan: BatchPlan, processes: int) -> None:
        context = multiprocessing.get_context("fork")
        self._barrier = context.Barrier(processes + 1)
        self._numbers = [context.SimpleQueue() for _ in range(processes)]
        self._processes = [
            context.Process(
                target=_decode_share,
                args=(split, plan, slice(part, None, processes), self._barrier, numbers),
            )
            for part, numbers in enumerate(self._numbers)
        ]
        for process in self._processes:
            process.start()

    def one_pass(self, number: int) -> None:
        for numbers in self._numbers:
            numbers.put(number)
        self._barrier.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        for numbers in self._numbers:
            numbers.put(None)
        for process in self._processes:
            process.join()


def _decode_share(
    split: FileSplit, plan: BatchPlan, part: slice, barrier: Barrier, numbers: Any
) -> None:
    torch.set_num_threads(1)
    batches = FileBatches(split, image_size=SIZE, train=True, seed=0)
    while (number := numbers.get()) is not None:
        for samples in plan.batches(number)[part]:
            batches[number, samples]
        barrier.wait(PATIENCE_SECONDS)


def readable(result: dict[str, Any]) -> list[str]:
    """The result in a few lines."""
    images = result["images_per_second_of_one_core"]
    lines = [
        f"{result['photographs']} photographs of {result['mean_pixels'] / 1e6:.2f} megapixels and "
        f"{result['mean_bytes'] / 1e3:.0f} KB ({result['mean_bytes_packed'] / 1e3:.0f} KB packed), "
        f"{result['rounds']} rounds"
    ]
    lines += [
        f"{name:16} {np.median(turns):7.0f} images/s of one core" for name, turns in images.items()
    ]
    lines += [_ratio_line(name, ratio) for name, ratio in result["ratios"].items()]
    errors, loaded = result["mean_absolute_error_of_255"], result["all_cores"]
    lines.append(
        f"difference from Pillow's pixels: {errors['mean']:.2f} of 255, "
        f"{errors['worst_picture']:.2f} for the worst image"
    )
    lines.append(
        f"loader with {loaded['processes']} processes: "
        f"{np.median(loaded['images_per_second']['loader']):.0f} images/s"
    )
    lines.append(_ratio_line("loader / decoding alone", loaded["share_of_the_limit"]))
    lines.append(f"others took {result['other_cpu_share']:.0%} of the cores")
    return lines


def _ratio_line(name: str, ratio: dict[str, Any]) -> str:
    if ratio["low"] is None:
        return f"{name}: {ratio['median']:.3f}x"
    return f"{name}: {ratio['median']:.3f}x [{ratio['low']:.3f}, {ratio['high']:.3f}]"


if __name__ == "__main__":
    main()
