"""What this machine is and can do: measured or asked, never assumed."""

import functools
import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

__all__ = [
    "Accelerator",
    "Hardware",
    "detect_hardware",
    "gpu_support_fault",
    "library_versions",
    "measure_peak_flops",
    "memory_in_use",
    "usable_cores",
]

PEAK_TRIAL_SECONDS = 0.1
CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")
MEMORY_LIMIT_FILE = Path("/sys/fs/cgroup/memory.max")

# Dense peak of the tensor cores in FLOP/s by a piece of the device's name: bf16 and fp16 are
# equal on all of these. Sources: NVIDIA's data sheets of each part (without sparsity).
CITED_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "T4": 65e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator, usable or not.

    Attributes:
        kind: PyTorch's device type (`cuda` also for ROCm, `mps`, `xpu`).
        name: As its driver calls it.
        index: Its number among the devices of its kind.
        memory_bytes: Its own memory; 0 where it shares the host's or is unknown.
        bf16: Whether it computes bfloat16 itself.
        fault: Why this PyTorch cannot use it, with the cure; empty where it can.
    """

    kind: str
    name: str
    index: int = 0
    memory_bytes: int = 0
    bf16: bool = False
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Facts of the machine that a plan rests on.

    Attributes:
        cpu_name: Model of the processor.
        cores: Cores this process may run on (affinity and container quota counted in).
        instruction_sets: Those of the CPU that matter here: avx2, avx512, avx512_bf16, amx.
        memory_bytes: Host memory this process may use (container limit counted in).
        accelerators: All that were found, usable or not.
    """

    cpu_name: str
    cores: int
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    accelerators: tuple[Accelerator, ...]

    @property
    def usable(self) -> tuple[Accelerator, ...]:
        """Accelerators that this PyTorch can compute on."""
        return tuple(gpu for gpu in self.accelerators if not gpu.fault)

    @property
    def cpu_bf16(self) -> bool:
        """Whether the CPU computes bfloat16 itself; elsewhere it is emulated, and slower."""
        return bool({"avx512_bf16", "amx", "arm_bf16"} & set(self.instruction_sets))


def detect_hardware() -> Hardware:
    """Look at this machine."""
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
    return Hardware(
        cpu_name=cpu_name,
        cores=usable_cores(),
        instruction_sets=tuple(sets),
        memory_bytes=_usable_memory(),
        accelerators=_accelerators(),
    )


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
    """Cores this process may run on, affinity and a container's quota counted in."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:  # a container's quota: "max 100000" or "150000 100000" (microseconds of CPU per period)
        quota, period = CPU_QUOTA_FILE.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores or 1
    limit = cores if quota == "max" else max(1, int(quota) // int(period))
    return min(cores or 1, limit or 1)


def _usable_memory() -> int:
    total = psutil.virtual_memory().total
    try:
        return min(total, int(MEMORY_LIMIT_FILE.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total


def _accelerators() -> tuple[Accelerator, ...]:
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            # PyTorch warns of a GPU that it has no kernels for in several lines; ours is one line.
            warnings.simplefilter("ignore")
            return tuple(_cuda_device(index) for index in range(torch.cuda.device_count()))
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if current is not None:
        count = torch.accelerator.device_count()
        name = f"{platform.processor() or platform.machine()} {current.type}"
        return tuple(
            Accelerator(kind=current.type, name=name, index=index, bf16=current.type == "xpu")
            for index in range(count)
        )
    return _nvidia_devices_without_cuda()


def _cuda_device(index: int) -> Accelerator:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    # ROCm lists gfx names; there, PyTorch's own check at start-up is the one to trust.
    fault = "" if torch.version.hip else gpu_support_fault(capability, torch.cuda.get_arch_list())
    return Accelerator(
        kind="cuda",
        name=properties.name,
        index=index,
        memory_bytes=properties.total_memory,
        bf16=not fault and torch.cuda.is_bf16_supported(including_emulation=False),
        fault=fault,
    )


def gpu_support_fault(capability: tuple[int, int], built_for: list[str]) -> str:
    """Why a build of PyTorch has no kernels for a GPU, with the cure; empty if it has.

    Machine code (`sm_80`) runs on the same major version from its minor version on; PTX
    (`compute_90`) is compiled by the driver for anything newer. Source: CUDA C++ Programming
    Guide, "Binary compatibility" and "PTX compatibility".

    Args:
        capability: The GPU's compute capability, (6, 1) for 6.1.
        built_for: As `torch.cuda.get_arch_list()` gives it.
    """
    if not built_for:
        return ""
    versions = []
    for name in built_for:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")  # sm_90a, sm_100f: special features of one architecture
        if not digits.isdigit():
            continue
        version = (int(digits[:-1]), int(digits[-1]))
        versions.append(version)
        if kind == "sm" and version[0] == capability[0] and version[1] <= capability[1]:
            return ""
        if kind == "compute" and version <= capability:
            return ""
    if not versions:
        return ""
    lowest = ".".join(map(str, min(versions)))
    mine = ".".join(map(str, capability))
    return (
        f"has compute capability {mine}, but PyTorch {torch.__version__} is built for {lowest} "
        f"and newer; install a PyTorch build with kernels for {mine}"
        if capability < min(versions)
        else f"has compute capability {mine}, which PyTorch {torch.__version__} has no kernels "
        "for; install a newer PyTorch"
    )


def _nvidia_devices_without_cuda() -> tuple[Accelerator, ...]:
    """NVIDIA GPUs that the driver knows but this PyTorch does not see."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no NVIDIA driver: the ordinary machine without a GPU
        return ()
    try:
        if torch.version.cuda is None:
            fault = (
                f"cannot be used: PyTorch {torch.__version__} is built without CUDA; "
                "install a CUDA build (pytorch.org/get-started)"
            )
        else:
            fault = (
                f"cannot be used by PyTorch {torch.__version__} (CUDA {torch.version.cuda}); "
                "update the NVIDIA driver, or check CUDA_VISIBLE_DEVICES"
            )
        return tuple(
            Accelerator(
                kind="cuda",
                name=pynvml.nvmlDeviceGetName(handle),
                index=index,
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                fault=fault,
            )
            for index in range(pynvml.nvmlDeviceGetCount())
            for handle in (pynvml.nvmlDeviceGetHandleByIndex(index),)
        )
    finally:
        pynvml.nvmlShutdown()


def measure_peak_flops(
    device_kind: str, device_name: str, dtype: torch.dtype
) -> tuple[float, Literal["cited", "measured", "n/a"]]:
    """Peak FLOP/s of a device in a dtype: the denominator of MFU.

    GPUs in the cited table have their data sheet's dense tensor-core rate (half precision only);
    CPUs are measured: the best of a few matrix products and a convolution, on the threads in use.
    Elsewhere the peak is unknown, and MFU is not reported.

    Returns:
        FLOP/s per device (0 if unknown), and where the figure comes from.
    """
    if device_kind == "cpu":
        return _measured_cpu_peak(dtype), "measured"
    if dtype in (torch.bfloat16, torch.float16):
        for piece, flops in CITED_PEAK_FLOPS.items():
            if piece in device_name:
                return flops, "cited"
    return 0.0, "n/a"


def _measured_cpu_peak(dtype: torch.dtype) -> float:
    """Best FLOP/s of a few matrix products and a convolution."""
    best = 0.0
    # Its own: how much is drawn depends on the time it takes, and the run's generator must not.
    draws = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws).to(dtype)

    for size in (256, 512, 1024):
        a, b = numbers(size, size), numbers(size, size)
        seconds = _fastest_call(lambda a=a, b=b: torch.mm(a, b))  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
        if seconds > PEAK_TRIAL_SECONDS:  # emulated: larger ones would take ever longer
            return best
    images = numbers(8, 128, 28, 28).contiguous(memory_format=torch.channels_last)
    weight = numbers(128, 128, 3, 3).contiguous(memory_format=torch.channels_last)
    seconds = _fastest_call(lambda: torch.nn.functional.conv2d(images, weight, padding=1))
    # At the border fewer taps meet a pixel: 3 * 28 - 2 in each direction.
    return max(best, 2 * 8 * 128 * 128 * (3 * 28 - 2) ** 2 / seconds)


def _fastest_call(call: Callable[[], object]) -> float:
    call()
    best = float("inf")
    end = time.perf_counter() + PEAK_TRIAL_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on, by distribution name."""
    names = ("torch", "numpy", "pillow", "simplejpeg")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **versions}


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak of PyTorch's allocations on a CUDA device, else this process's resident set.

    The peak is that since the start of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _this_process(os.getpid()).memory_info().rss


@functools.cache
def _this_process(pid: int) -> psutil.Process:
    """Kept, since finding a process takes longer than asking it; by its number, for forks."""
    return psutil.Process(pid)
