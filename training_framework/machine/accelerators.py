"""Accelerators: which ones there are, and whether this PyTorch can use them."""

import importlib.util
import os
import platform
import re
import shutil
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Accelerator", "find_accelerators", "find_triton_fault", "gpu_support_fault"]

# They share compute capability 7.5 with GPUs that have tensor cores. Source: NVIDIA's data sheets
# of the TU116 and TU117 parts.
TURING_WITHOUT_TENSOR_CORES = re.compile(
    r"\b(GTX 16\d\d|T(400|500|550|600|1000|1200|2000)|MX[45]50)\b"
)


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator, usable or not.

    Attributes:
        kind: PyTorch's device type (`cuda` also for ROCm, `mps`, `xpu`).
        name: Its name according to the driver.
        index: Its number among the devices of its kind.
        memory_bytes: Its own memory; 0 if it shares the host's or if unknown.
        bf16: Whether it supports bfloat16 in hardware.
        capability: CUDA's compute capability, (6, 1) for 6.1; None where there is no such number.
        fault: Why this PyTorch cannot use it, with the cure; empty if it can.
    """

    kind: str
    name: str
    index: int = 0
    memory_bytes: int = 0
    bf16: bool = False
    capability: tuple[int, int] | None = None
    fault: str = ""

    @property
    def tensor_cores(self) -> bool:
        """Whether half precision is faster on it than fp32; assumed if unknown."""
        if self.capability is None:
            return True
        return self.capability >= (7, 0) and not TURING_WITHOUT_TENSOR_CORES.search(self.name)


def find_accelerators() -> tuple[Accelerator, ...]:
    """All accelerators of this machine; without CUDA, NVIDIA's that its driver knows."""
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            # PyTorch warns in several lines about a GPU that it does not support; we use one line.
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
    # ROCm lists gfx names; there we trust PyTorch's own check at start-up.
    capability = None if torch.version.hip else (properties.major, properties.minor)
    fault = "" if capability is None else gpu_support_fault(capability, torch.cuda.get_arch_list())
    return Accelerator(
        kind="cuda",
        name=properties.name,
        index=index,
        memory_bytes=properties.total_memory,
        # torch.cuda.is_bf16_supported asks the current device, which need not be this one.
        bf16=not fault and (capability is None or capability >= (8, 0)),
        capability=capability,
        fault=fault,
    )


def find_triton_fault() -> str:
    """What Triton lacks to compile kernels, in a few words; empty if nothing.

    It compiles a launcher in C for each kernel, against Python's headers.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else ("cc", "gcc", "clang"))):
        return f"Triton finds no C compiler{f' (CC is {named!r})' if named else ''}"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"Triton needs Python's headers, and {header} is missing"


def gpu_support_fault(capability: tuple[int, int], built_for: list[str]) -> str:
    """Why a build of PyTorch has no kernels for a GPU, with the cure; empty if it has some.

    Machine code (`sm_80`) runs on the same major version with the same or a later minor version.
    The driver compiles PTX (`compute_90`) for the same or any later version. Source: CUDA C++
    Programming Guide, "Binary compatibility" and "PTX compatibility".

    Args:
        capability: The GPU's compute capability, (6, 1) for 6.1.
        built_for: The list from `torch.cuda.get_arch_list()`.
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
    """NVIDIA GPUs that the driver finds but this PyTorch cannot use."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no NVIDIA driver: an ordinary machine without a GPU
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
