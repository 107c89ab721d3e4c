"""Machines that nobody here has, and what a plan decides on each: docs/machines.md.

Their facts are what PyTorch would report there. Nothing is measured.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from training_framework.config import TrainConfig
from training_framework.data.facts import DatasetFacts
from training_framework.machine.hardware import Accelerator, Hardware
from training_framework.machine.peak_flops import CITED_PEAKS, measure_peak_flops
from training_framework.plan import TrainPlan, make_plan
from training_framework.switches import arithmetic

__all__ = [
    "JOBS",
    "MACHINES",
    "Job",
    "Machine",
    "machine_table",
    "peak_table",
    "plan_of",
    "plan_reasons",
    "plan_table",
]

GIBIBYTE = 2**30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine, and how many processes train on it.

    Attributes:
        name: Its name in tables.
        hardware: What a process sees of it.
        processes: Processes that train together on it.
    """

    name: str
    hardware: Hardware
    processes: int = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """A typical training.

    Attributes:
        name: Its name in tables.
        facts: The data set.
        settings: What is asked for.
        batch_size: Images of a step for each process.
    """

    name: str
    facts: DatasetFacts
    settings: dict[str, Any]
    batch_size: int


def _host(cores: int, gibibytes: int, *accelerators: Accelerator, **facts: Any) -> Hardware:
    return Hardware(
        cpu_name=facts.pop("cpu_name", "host CPU"),
        cores=cores,
        instruction_sets=facts.pop("instruction_sets", ("avx2",)),
        memory_bytes=gibibytes * GIBIBYTE,
        accelerators=accelerators,
        cpp_compiler="g++",
        glibc=True,
        **facts,
    )


def _gpu(name: str, capability: tuple[int, int], gibibytes: float, **facts: Any) -> Accelerator:
    return Accelerator(
        kind="cuda",
        name=name,
        memory_bytes=round(gibibytes * GIBIBYTE),
        bf16=capability >= (8, 0),
        capability=capability,
        **facts,
    )


_GTX_1080 = _gpu("NVIDIA GeForce GTX 1080", (6, 1), 7.9)
_H200 = _gpu("NVIDIA H200", (9, 0), 139.8)
_MI300X = Accelerator(
    kind="cuda",
    name="AMD Instinct MI300X",
    memory_bytes=192 * GIBIBYTE,
    bf16=True,
    matrix_units=True,
    architecture="gfx942",
)
_MAX_1550 = Accelerator(
    kind="xpu",
    name="Intel Data Center GPU Max 1550",
    memory_bytes=64 * GIBIBYTE,
    bf16=True,
    matrix_units=True,
)
_TOO_OLD = replace(
    _GTX_1080,
    fault="has compute capability 6.1, but this PyTorch is built for 7.5 and newer; install a "
    "PyTorch build with kernels for 6.1",
)

MACHINES = (
    Machine(name="GTX 1080", hardware=_host(8, 32, _GTX_1080)),
    Machine(name="GTX 1650", hardware=_host(8, 16, _gpu("NVIDIA GeForce GTX 1650", (7, 5), 3.8))),
    Machine(name="T4", hardware=_host(4, 16, _gpu("Tesla T4", (7, 5), 14.6))),
    Machine(name="V100", hardware=_host(8, 60, _gpu("Tesla V100-SXM2-16GB", (7, 0), 15.8))),
    Machine(name="A10", hardware=_host(30, 200, _gpu("NVIDIA A10", (8, 6), 22.1))),
    Machine(name="A100", hardware=_host(12, 85, _gpu("NVIDIA A100-SXM4-80GB", (8, 0), 79.2))),
    Machine(name="RTX 4090", hardware=_host(16, 64, _gpu("NVIDIA GeForce RTX 4090", (8, 9), 23.5))),
    Machine(
        name="RTX 5090", hardware=_host(16, 64, _gpu("NVIDIA GeForce RTX 5090", (12, 0), 31.4))
    ),
    Machine(name="H100 NVL", hardware=_host(40, 320, _gpu("NVIDIA H100 NVL", (9, 0), 93.1))),
    Machine(name="H200", hardware=_host(24, 240, _H200)),
    Machine(name="B200", hardware=_host(28, 240, _gpu("NVIDIA B200", (10, 0), 178.4))),
    Machine(
        name="8 H200 (torchrun)",
        hardware=_host(192, 2000, *(replace(_H200, index=index) for index in range(8))),
        processes=8,
    ),
    Machine(
        name="8 H200 (SLURM, each process sees one)",
        hardware=_host(24, 2000, _H200, one_device_each=True, own_cores=True),
        processes=8,
    ),
    Machine(
        name="Apple M3 Max",
        hardware=_host(
            16,
            64,
            Accelerator(kind="mps", name="arm mps"),
            cpu_name="arm",
            instruction_sets=("arm_bf16",),
        ),
    ),
    Machine(name="MI300X (ROCm)", hardware=_host(24, 240, _MI300X)),
    Machine(name="Max 1550 (XPU)", hardware=_host(32, 240, _MAX_1550)),
    Machine(
        name="GTX 1080 (too old for this PyTorch)",
        hardware=_host(8, 32, _TOO_OLD, instruction_sets=("avx2", "avx512")),
    ),
)

JOBS = (
    Job(
        name="ResNet-18, CIFAR-10, 128 images for each process, 30 epochs",
        facts=DatasetFacts(
            name="cifar10",
            train_images=50_000,
            val_images=10_000,
            class_names=tuple(f"class {number}" for number in range(10)),
            image_size=32,
            storage="arrays",
            array_bytes=60_000 * 3 * 32**2,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            crop_padding=4,
        ),
        settings={"model": "resnet18", "epochs": 30},
        batch_size=128,
    ),
    Job(
        name="ResNet-50, ImageNet at 224 px, 256 images for each process, 90 epochs",
        facts=DatasetFacts(
            name="imagenet",
            train_images=1_281_167,
            val_images=50_000,
            class_names=tuple(f"class {number}" for number in range(1000)),
            image_size=224,
            storage="files",
            array_bytes=0,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
        ),
        settings={"model": "resnet50", "epochs": 90},
        batch_size=256,
    ),
)


def plan_of(machine: Machine, job: Job, **settings: Any) -> TrainPlan:
    """What is planned for a job on a machine, on which `settings` are asked for too."""
    asked = {**job.settings, "batch_size": job.batch_size * machine.processes, **settings}
    # It is asked of the device itself, which is not here. All of these kinds have fused SGD.
    with mock.patch.object(arithmetic, "has_fused_optimizer", return_value=True):
        return make_plan(
            TrainConfig(**asked),
            machine.hardware,
            job.facts,
            world_size=machine.processes,
            local_world_size=machine.processes,
        )


def machine_table() -> str:
    """What is assumed of each machine, and what it could reach at most."""
    rows = [
        "| machine | device | memory | cores for each process | precision 32 multiplies "
        "| peak TFLOP/s planned | in precision 32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for machine in MACHINES:
        plan, in_fp32 = plan_of(machine, JOBS[1]), plan_of(machine, JOBS[1], precision="32")
        hardware = machine.hardware
        own = hardware.accelerators[0].memory_bytes
        cells = (
            machine.name,
            plan.device_name,
            f"{own / GIBIBYTE:.0f} GB" if own else "the host's",
            str(hardware.cores_each(machine.processes)),
            in_fp32.product_format,
            _peak(plan),
            _peak(in_fp32),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def _peak(plan: TrainPlan) -> str:
    if plan.device == "cpu":
        return "measured at the start"
    peak, _ = measure_peak_flops(plan.device, plan.device_name, plan.product_format)
    return f"{peak / 1e12:g}" if peak else "unknown"


def plan_table(job: Job) -> str:
    """The choices for a job, a line for each machine."""
    rows = [
        "| machine | device | precision | layout | CUDA graph | compile | fused optimizer | data "
        "| memory, by estimate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for machine in MACHINES:
        plan = plan_of(machine, job)
        cells = (
            machine.name,
            plan.device if machine.processes == 1 else f"{machine.processes} x {plan.device}",
            plan.precision + (" in TF32" if plan.product_format == "tf32" else ""),
            "channels_last" if plan.channels_last else "contiguous",
            "on" if plan.cuda_graph else "off",
            plan.compile_mode if plan.compile else "off",
            "on" if plan.fused_optimizer else "off",
            "resident" if plan.resident_data else f"loaded by {plan.num_workers}",
            _memory(plan),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def _memory(plan: TrainPlan) -> str:
    reason = next((c.reason for c in plan.choices if c.name == "auto_micro_batch"), "")
    if not reason:
        return "-"
    figures = reason.partition("take about ")[2].partition(" by estimate")[0]
    return figures + (", in parts" if plan.auto_micro_batch else "")


# What other documents explain, or what the tables above show in full.
_NOT_SHOWN = {
    "auto_micro_batch", "crop_padding", "flip", "lr", "num_workers", "resident_data", "stem",
    "threads",
}  # fmt: skip


def plan_reasons() -> str:
    """Every choice that has a reason, each reason once, with the machines that it holds for."""
    holds_for: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for job in JOBS:
        for machine in MACHINES:
            plan = plan_of(machine, job)
            for choice in plan.choices:
                if choice.name not in _NOT_SHOWN:
                    reason = choice.reason.replace(plan.device_name, "the device")
                    names = holds_for[choice.name, choice.value, reason]
                    if machine.name not in names:
                        names.append(machine.name)
    rows = ["| choice | value | reason | machines |", "|---|---|---|---|"]
    for (name, value, reason), machines in sorted(holds_for.items()):
        where = "all" if len(machines) == len(MACHINES) else ", ".join(machines)
        rows.append(f"| `{name}` | {value} | {reason} | {where} |")
    return "\n".join([*rows, ""])


def peak_table() -> str:
    """The cited peaks in TFLOP/s."""
    rows = ["| device | bf16 | fp16 | TF32 | fp32 | NVIDIA's |", "|---|---|---|---|---|---|"]
    for name in CITED_PEAKS:
        peaks = CITED_PEAKS[name]
        figures = (f"{figure:g}" if figure else "-" for figure in peaks[:4])
        rows.append(f"| {name} | {' | '.join(figures)} | {peaks.source} |")
    return "\n".join([*rows, ""])
