"""The properties of this machine: measured or queried, never assumed."""

import importlib.metadata
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from training_framework.errors import UserError
from training_framework.kernels.compiler import find_compiler, missing_compiler
from training_framework.machine.accelerators import (
    Accelerator,
    find_accelerators,
    find_triton_fault,
    gpu_support_fault,
    one_device_is_visible,
)
from training_framework.machine.load import MachineWatch
from training_framework.machine.memory import can_keep_freed_memory, memory_in_use
from training_framework.machine.peak_flops import measure_bf16_speed

__all__ = [
    "Accelerator",
    "Hardware",
    "detect_hardware",
    "gpu_support_fault",
    "library_versions",
    "memory_in_use",
    "usable_cores",
]

CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")
MEMORY_LIMIT_FILE = Path("/sys/fs/cgroup/memory.max")
BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx", "arm_bf16"})
# A smaller speed-up would not outweigh the casts of the weights.
MIN_BF16_SPEED = 1.1
# The system counts in ticks of 10 ms.
MIN_WATCH_SECONDS = 0.08


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The facts about the machine that a plan is based on.

    Attributes:
        cpu_name: Model of the processor.
        cores: Cores that this process may run on (within affinity and container quota).
        instruction_sets: The relevant ones of the CPU: avx2, avx512, avx512_bf16, amx, arm_bf16.
        memory_bytes: Host memory that this process may use (within the container limit).
        accelerators: All that were found, usable or not.
        own_cores: Whether `cores` are this process's alone, as SLURM binds its tasks; otherwise the
            processes of this machine share them.
        one_device_each: Whether the environment shows this process one device alone, as SLURM does
            where each process of a machine gets its own.
        bf16_speed: Measured speed of a bf16 convolution on this CPU as a multiple of fp32; None if
            not measured or if the CPU has no instructions for bf16.
        cpp_compiler: Name of the C++ compiler for CPU kernels; None if there is no working one.
        cpp_compiler_fault: Why there is none, in a few words.
        triton_fault: Why Triton, which writes torch.compile's kernels for GPUs, cannot work here;
            empty if it can, or if there is no GPU for it.
        glibc: Whether glibc allocates memory; glibc can be told to keep freed memory.
        thread_limit: Largest number of threads of OpenMP (OMP_THREAD_LIMIT); None: no limit.
        other_cpu_share: Share of the cores that other processes used during detection, 0 to 1; 0
            under torchrun, whose other processes would count.
    """

    cpu_name: str
    cores: int
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    accelerators: tuple[Accelerator, ...]
    own_cores: bool = False
    one_device_each: bool = False
    bf16_speed: float | None = None
    cpp_compiler: str | None = None
    cpp_compiler_fault: str = "no C++ compiler is installed"
    triton_fault: str = ""
    glibc: bool = False
    thread_limit: int | None = None
    other_cpu_share: float = 0.0

    def cores_each(self, local_world_size: int) -> int:
        """Cores for each of the processes on this machine, at least one."""
        return self.cores if self.own_cores else max(1, self.cores // local_world_size)

    @property
    def usable(self) -> tuple[Accelerator, ...]:
        """Accelerators that this PyTorch can use."""
        return tuple(gpu for gpu in self.accelerators if not gpu.fault)

    @property
    def cpu_bf16(self) -> bool:
        """Whether the CPU supports bfloat16 in hardware; emulation is slower than fp32."""
        return bool(self.bf16_instructions)

    @property
    def cpu_bf16_pays(self) -> bool:
        """Whether bfloat16 is faster than fp32; not so on every CPU with the instructions."""
        measured = self.bf16_speed is None or self.bf16_speed >= MIN_BF16_SPEED
        return self.cpu_bf16 and measured

    @property
    def bf16_instructions(self) -> tuple[str, ...]:
        """The CPU's instruction sets for bfloat16."""
        return tuple(name for name in self.instruction_sets if name in BF16_INSTRUCTIONS)


def detect_hardware() -> Hardware:
    """Detect the properties of this machine.

    If the CPU has instructions for bfloat16, their speed is measured once per process, in about a
    tenth of a second. Meanwhile, the use of the cores by other processes is measured.

    Raises:
        UserError: The system does not provide them.
    """
    if sys.platform == "linux" and not Path("/proc/self").exists():
        raise UserError("/proc is not mounted", "mount it: it describes memory and cores")
    watch = _started_watch()
    thread_limit = _apply_thread_limit()
    compiler = find_compiler()
    flags, cpu_name = _cpu_flags()
    sets = [
        name
        for name, flag in {
            "avx2": "avx2",
            "avx512": "avx512f",
            "avx512_bf16": "avx512_bf16",
            "amx": "amx_bf16",
            "arm_bf16": "bf16",
        }.items()
        if flag in flags
    ]
    bf16_speed = measure_bf16_speed() if BF16_INSTRUCTIONS & set(sets) else None
    accelerators = find_accelerators()
    on_cuda = any(gpu.kind == "cuda" and not gpu.fault for gpu in accelerators)
    return Hardware(
        cpu_name=cpu_name,
        cores=usable_cores(),
        instruction_sets=tuple(sets),
        memory_bytes=_usable_memory(),
        accelerators=accelerators,
        own_cores=_cores_are_own(),
        one_device_each=one_device_is_visible(),
        bf16_speed=bf16_speed,
        cpp_compiler=None if compiler is None else Path(compiler).name,
        cpp_compiler_fault=missing_compiler() if compiler is None else "",
        triton_fault=find_triton_fault() if on_cuda else "",
        glibc=can_keep_freed_memory(),
        thread_limit=thread_limit,
        other_cpu_share=_other_cpu_share(watch),
    )


def _apply_thread_limit() -> int | None:
    """Limit PyTorch's threads to OMP_THREAD_LIMIT, and return it.

    With more threads than OpenMP may start, a parallel region of PyTorch waits for threads that do
    not exist, and hangs.
    """
    text = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    limit = int(text) if text.isascii() and text.isdecimal() else 0
    if limit < 1:
        return None
    if torch.get_num_threads() > limit:
        torch.set_num_threads(limit)
    return limit


def _started_watch() -> MachineWatch | None:
    """Start to watch other processes; None if they belong to the same training."""
    if "RANK" in os.environ:
        return None
    watch = MachineWatch()
    watch.start()
    return watch


def _other_cpu_share(watch: MachineWatch | None) -> float:
    """The share of the cores that others used, over at least a few ticks."""
    if watch is None:
        return 0.0
    time.sleep(max(0.0, MIN_WATCH_SECONDS - watch.seconds))
    return watch.stop().other_cpu_share


def _cpu_flags() -> tuple[set[str], str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set(), platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", ""))
    return set(flags.split()), fields.get("model name", platform.machine())


def usable_cores() -> int:
    """Cores that this process may run on, within its affinity and the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:  # a container's quota: "max 100000" or "150000 100000" (microseconds of CPU per period)
        quota, period = CPU_QUOTA_FILE.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores or 1
    limit = cores if quota == "max" else max(1, int(quota) // int(period))
    return min(cores or 1, limit or 1)


def _cores_are_own() -> bool:
    """Whether SLURM has bound this process to cores of its own.

    Processes that torchrun starts within a SLURM task share the task's cores.
    """
    bound = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return bound == str(usable_cores()) and "TORCHELASTIC_RUN_ID" not in os.environ


def _usable_memory() -> int:
    total = psutil.virtual_memory().total
    try:
        return min(total, int(MEMORY_LIMIT_FILE.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total


def library_versions() -> dict[str, str]:
    """Versions of the libraries that affect results, by distribution name."""
    names = ("torch", "numpy", "pillow", "simplejpeg")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **versions}
