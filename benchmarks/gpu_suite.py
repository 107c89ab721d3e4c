"""Everything worth running on a machine with a GPU; each part writes a result file.

    python benchmarks/gpu_suite.py                               # the parts that need no data
    python benchmarks/gpu_suite.py --cifar10 DIR --imagenette DIR
    python benchmarks/gpu_suite.py --rows                        # the step's speed alone, 8 minutes
    python benchmarks/gpu_suite.py --accelerator cpu --only demo # try the script without a GPU

If a part fails, the others still run, and the exit status is 1.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from record_run import RESULTS, file_name, record

SYNTHETIC = ["--data", "synthetic", "--num-classes", "10", "--seed", "0"]
SMALL = [*SYNTHETIC, "--img-size", "32", "--synthetic-train-images", "16384", "--epochs", "3"]
LARGE = [*SYNTHETIC, "--img-size", "224", "--synthetic-train-images", "4096", "--epochs", "2"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", default="gpu", help="gpu, or cpu to try the script")
    parser.add_argument("--cifar10", type=Path, help="folder with cifar-10-batches-py")
    parser.add_argument("--imagenette", type=Path, help="folder with train/ and val/")
    parser.add_argument("--rows", action="store_true", help="the parts that time steps, alone")
    parser.add_argument("--only", nargs="*", help="names of the parts to run")
    options = parser.parse_args()
    failed = []
    parts = {**rows(), **({} if options.rows else suite(options.cifar10, options.imagenette))}
    for name, part in parts.items():
        if options.only and name not in options.only:
            continue
        print(f"== {name}", flush=True)
        try:
            part(name, ["--accelerator", options.accelerator])
        except (SystemExit, Exception):
            traceback.print_exc()
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all parts ran")
    return int(bool(failed))


def rows() -> dict[str, Callable[..., None]]:
    """The parts that compare the step on this GPU with other loops."""
    quick = ["--rounds", "6", "--rounds-per-process", "6", "--seconds", "1"]
    speeds = {
        f"step-speed-{row}": script("step_speed.py", row, *quick)
        for row in ("gpu-small", "gpu-large-batch", "gpu-resnet50", "memory")
    }
    peers = {
        f"step-speed-{row}": script("step_speed.py", row, *quick)
        for row in ("lightning", "lightning-tiny")
        if importlib.util.find_spec("pytorch_lightning")
    }
    overhead = {"step-overhead": script("step_overhead.py", "--device", "cuda")}
    return {**speeds, **overhead, **peers}


def script(name: str, *flags: str) -> Callable[[str, list[str]], None]:
    """A part that is a script of its own; it uses the GPU if there is one."""

    def part(_name: str, _device: list[str]) -> None:
        command = [sys.executable, str(Path(__file__).parent / name), *flags]
        subprocess.run(command, check=True)

    return part


def suite(cifar10: Path | None, imagenette: Path | None) -> dict[str, Callable[..., None]]:
    """The parts by name."""
    parts: dict[str, Callable[..., None]] = {"demo": run("--config", "digits")}
    for precision in ("32", "bf16-mixed", "16-mixed"):
        for compiled in ("false", "true"):
            suffix = "-compiled" if compiled == "true" else ""
            flags = ["--precision", precision, "--compile", compiled]
            parts[f"gpu-resnet18-{precision}{suffix}"] = run(*SMALL, "--batch-size", "512", *flags)
    parts["gpu-accumulated-compiled"] = run(
        *SMALL, "--batch-size", "128", "--accumulate-grad-batches", "4", "--compile", "true"
    )
    parts["gpu-everything-on"] = run(
        *[*SMALL, "--batch-size", "256", "--mixup", "0.2", "--cutmix", "1.0", "--cutout", "8"],
        *["--ema-decay", "0.99", "--grad-clip-val", "1.0", "--flip", "alternating"],
        *["--random-erasing", "0.2", "--accumulate-grad-batches", "2"],
    )
    parts["gpu-resnet50-224"] = run(*LARGE, "--model", "resnet50", "--batch-size", "128")
    parts["gpu-resnet50-224-memory-efficient"] = run(
        *["--config", "memory-efficient", *LARGE, "--model", "resnet50"]
    )
    parts["gpu-resume"] = resume
    if cifar10:
        data = ["--data-root", str(cifar10)]
        parts["cifar10-short"] = run("--config", "cifar10-short", *data)
    if imagenette:
        data = ["--data-root", str(imagenette), "--model", "resnet50", "--img-size", "224"]
        parts["imagenette-folder"] = run(*data, "--epochs", "1", "--batch-size", "64")
    return parts


def run(*flags: str) -> Callable[[str, list[str]], None]:
    """A part that records one training run."""

    def part(name: str, device: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            result = record(name, [*flags, *device], None, Path(folder))
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / file_name(result)).write_text(json.dumps(result, indent=1) + "\n")

    return part


def resume(_name: str, device: list[str]) -> None:
    """Compare a stopped and resumed run with an uninterrupted one, both deterministic."""
    flags = [*SMALL, "--batch-size", "256", "--deterministic", "--tensorboard", "false", *device]
    with tempfile.TemporaryDirectory() as folder:
        train(folder, "straight", flags)
        train(folder, "stopped", [*flags, "--stop-after-steps", "90"])
        last = Path(folder, "stopped", "version_0", "checkpoints", "last.ckpt")
        train(folder, "stopped", ["--resume", str(last)])
        ours, theirs = (
            Path(folder, run_name, "version_0", "weights.safetensors").read_bytes()
            for run_name in ("straight", "stopped")
        )
    if ours != theirs:
        sys.exit("the resumed run ended with other weights")
    print("the resumed run ended with the same weights, bit for bit")


def train(folder: str, name: str, flags: list[str]) -> None:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "training_framework", "train"]
    subprocess.run([*command, *flags, "--name", name, "--output-dir", folder], check=True)


if __name__ == "__main__":
    sys.exit(main())
