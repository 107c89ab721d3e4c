"""Where a comparison runs: the machine, the versions, the commit, and what is missing here."""

import dataclasses
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from training_framework.config import TrainConfig
from training_framework.machine.hardware import Hardware, detect_hardware, library_versions
from training_framework.measure.compare.experiment import Experiment, Variant

__all__ = ["device_label", "environment_of", "missing_need", "source_commit"]

# Environment variables that affect how fast PyTorch is.
TELLING_VARIABLES = (
    "CUDA_", "GOMP_", "KMP_", "LD_PRELOAD", "MALLOC_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_",
    "PYTORCH_", "THP_", "TORCH",
)  # fmt: skip
# Paths do not affect the speed, and PyTorch sets some of these itself.
PLACES = ("_DIR", "_FILE", "_HOME", "_PATH")


def missing_need(variant: Variant, config: TrainConfig, hardware: Hardware) -> str:
    """Why this machine cannot run a variant; empty if it can."""
    if "gpu" in variant.needs and not hardware.usable:
        faults = [f"{gpu.name} {gpu.fault}" for gpu in hardware.accelerators]
        return faults[0] if faults else "no GPU found"
    if "bf16" in variant.needs:
        on_gpu = bool(hardware.usable) and config.accelerator != "cpu"
        if on_gpu and not hardware.usable[0].bf16:
            return f"{hardware.usable[0].name} does not compute bf16"
        if not on_gpu and not hardware.cpu_bf16:
            return "the CPU has neither avx512_bf16 nor amx, and would emulate bf16"
    return ""


def device_label(experiment: Experiment, hardware: Hardware | None = None) -> str:
    """Name of the device that an experiment measures on this machine, for the file's name."""
    hardware = detect_hardware() if hardware is None else hardware
    on_gpu = any(
        experiment.config_of(variant).accelerator != "cpu" for variant in experiment.variants
    )
    if hardware.usable and on_gpu:
        return hardware.usable[0].name
    return f"cpu-{hardware.cpu_name}"


def environment_of(hardware: Hardware) -> dict[str, Any]:
    """Machine, versions and the environment variables that matter, for a result file."""
    plain = dataclasses.asdict(hardware)
    # Of a moment: each sample has its own, and a comparison may be resumed at another load.
    del plain["other_cpu_share"]
    return {
        **{key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()},
        "system": f"{platform.system()} {platform.release()}",
        "versions": library_versions(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(TELLING_VARIABLES) and not name.endswith(PLACES)
        },
    }


def source_commit() -> str | None:
    """The commit of the framework's sources, with `-dirty` if changed; None if unknown."""
    folder = Path(__file__).parents[2]
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        # An installed package may be inside the checkout of another project.
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", "errors.py"],
            cwd=folder,
            capture_output=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
