"""What a run reports about itself: its opening lines, and run.json."""

import dataclasses
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training_framework.data.facts import DatasetFacts
from training_framework.machine.hardware import Hardware, library_versions
from training_framework.machine.load import neighbours_note
from training_framework.machine.peak_flops import measure_peak_flops
from training_framework.plan import PlannedRun, TrainPlan
from training_framework.runs.directory import write_json
from training_framework.runs.network_card import NetworkCard
from training_framework.runs.progress import Progress, TrainResult

__all__ = ["Costs", "busy_machine_note", "opening_lines", "write_record"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What MFU is computed from.

    Attributes:
        flops_per_image: Training FLOPs of an image.
        peak_flops: Peak FLOP/s of all devices together; 0 if unknown.
        peak_source: How the peak is known.
    """

    flops_per_image: float
    peak_flops: float
    peak_source: str

    @classmethod
    def measure(cls, plan: TrainPlan, *, flops_per_image: float) -> "Costs":
        """The costs with the peak of the plan's device, measured if no table has it.

        Args:
            flops_per_image: Training FLOPs of an image; 0 if they cannot be counted.
        """
        if not flops_per_image:
            return cls(flops_per_image=0, peak_flops=0, peak_source="not asked")
        peak, source = measure_peak_flops(plan.device, plan.device_name, plan.product_format)
        return cls(
            flops_per_image=flops_per_image,
            peak_flops=peak * plan.world_size,
            peak_source=source,
        )

    def line(self, device_name: str) -> str:
        """The costs in one line."""
        if not self.flops_per_image:
            return "MFU n/a: the operations of this network cannot be counted"
        work = f"training takes {self.flops_per_image / 1e9:.3g} GFLOP an image"
        if not self.peak_flops:
            return f"{work}; MFU n/a: the peak of {device_name} is unknown"
        return f"{work}; 100% MFU is {self.peak_flops / 1e9:.4g} GFLOP/s ({self.peak_source})"


def busy_machine_note(plan: TrainPlan, hardware: Hardware) -> str:
    """What other processes take of the CPU, and what to do about it; empty if it is little."""
    if plan.device != "cpu":
        return ""
    return neighbours_note(hardware.other_cpu_share, hardware.cores, plan.threads)


def opening_lines(
    plan: TrainPlan, facts: DatasetFacts, hardware: Hardware, costs: Costs
) -> list[str]:
    """What the run trains, and on which device."""
    lines = [f"note: {gpu.name} {gpu.fault}" for gpu in hardware.accelerators if gpu.fault]
    busy = busy_machine_note(plan, hardware)
    if busy:
        lines += textwrap.wrap(f"note: {busy}", 80, subsequent_indent="      ")
    layout = "channels_last" if plan.channels_last else "contiguous"
    products = " in TF32" if plan.product_format == "tf32" else ""
    compiled = f", compiled ({plan.compile_mode})" if plan.compile else ""
    lines.append(
        f"{facts.name}: {facts.train_images:,} training and {facts.val_images:,} validation "
        f"images, {plan.num_classes} classes, {plan.image_size} px"
    )
    lines.append(
        f"{plan.device} ({plan.device_name}), precision {plan.precision}{products}, "
        f"{layout}{compiled}; "
        f"{plan.total_steps:,} steps"
    )
    return [*lines, costs.line(plan.device_name)]


def write_record(
    directory: Path,
    *,
    planned: PlannedRun,
    network: NetworkCard,
    identity: Mapping[str, Any],
    costs: Costs,
    resumed_from: Path | None,
    started: float,
    seconds: float,
    progress: Progress,
    result: TrainResult,
) -> None:
    """Write run.json: what ran, on what machine, and its result.

    Args:
        directory: The run's.
        planned: The run's plan, and what it is based on.
        network: The network's card.
        identity: What distinguishes the run from others (`runs.identity`).
        costs: The run's costs.
        resumed_from: The checkpoint that this part of the run resumed from.
        started: When it began, in seconds since 1970.
        seconds: How long it took.
        progress: The run's progress.
        result: The run's result.
    """
    record: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": seconds,
        "resumed_from": resumed_from,
        "versions": library_versions(),
        "hardware": dataclasses.asdict(planned.hardware),
        "data": dataclasses.asdict(planned.facts),
        "network": network.as_dict(),
        "config": planned.settings,
        "identity": dict(identity),
        "plan": planned.plan.as_dict(),
        "training_flops_per_image": costs.flops_per_image,
        "peak_flops": costs.peak_flops,
        "peak_flops_source": costs.peak_source,
        "epochs": progress.epochs,
        "results": dataclasses.asdict(result),
    }
    write_json(directory / "run.json", record)
