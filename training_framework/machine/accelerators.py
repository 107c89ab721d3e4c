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
from typing import Any

import torch

__all__ = [
    "Accelerator",
    "find_accelerators",
    "find_triton_fault",
    "gpu_support_fault",
    "one_device_is_visible",
]

# They share compute capability 7.5 with GPUs that have tensor cores. Source: NVIDIA's data sheets
# of the TU116 and TU117 parts.
TURING_WITHOUT_TENSOR_CORES = re.compile(
    r"\b(GTX 16\d\d|T(400|500|550|600|1000|1200|2000)|MX[45]50)\b"
)
# AMD's architectures with units for matrices of fp16 and bf16: CDNA, and RDNA from its third
# generation on. Source: ROCm documentation, "Data types and precision support".
AMD_WITH_MATRIX_UNITS = re.compile(r"gfx(908|90a|94|95|11|12)")
# By them, the processes of one machine are given different devices: as SLURM does.
VISIBILITY_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
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
        matrix_units: Whether it has units for products of half-precision matrices, according to its
            driver; None: what its name and capability say.
        architecture: AMD's name of it, such as gfx942; empty for others.
        uuid: What tells it from all other devices; empty if unknown.
        fault: Why this PyTorch cannot use it, with the cure; empty if it can.
    """

    kind: str
    name: str
    index: int = 0
    memory_bytes: int = 0
    bf16: bool = False
    capability: tuple[int, int] | None = None
    matrix_units: bool | None = None
    architecture: str = ""
    uuid: str = ""
    fault: str = ""

    @property
    def tensor_cores(self) -> bool:
        """Whether half precision is faster on it than fp32; assumed if unknown."""
        if self.matrix_units is not None:
            return self.matrix_units
        if self.capability is None:
            return True
        return self.capability >= (7, 0) and not TURING_WITHOUT_TENSOR_CORES.search(self.name)

    @property
    def tf32(self) -> bool:
        """Whether it multiplies fp32 numbers as TF32 on tensor cores."""
        return self.capability is not None and self.capability >= (8, 0)

    @property
    def channels_last_fault(self) -> str:
        """Why the channels_last layout does not pay on it, in a few words; empty if it does."""
        if self.kind == "mps":
            return "no gain on mps"
        if self.architecture and os.environ.get("PYTORCH_MIOPEN_SUGGEST_NHWC") != "1":
            # As ATen/native/ConvUtils.h decides it.
            return "reordered by each convolution on ROCm unless PYTORCH_MIOPEN_SUGGEST_NHWC is 1"
        return "" if self.tensor_cores else "slower on GPUs without tensor cores"


def find_accelerators() -> tuple[Accelerator, ...]:
    """All accelerators of this machine; without CUDA, NVIDIA's that its driver knows."""
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            # PyTorch warns in several lines about a GPU that it does not support; we use one line.
            warnings.simplefilter("ignore")
            return tuple(_cuda_device(index) for index in range(torch.cuda.device_count()))
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if current is not None:
        found = range(torch.accelerator.device_count())
        if current.type == "xpu":
            return tuple(_xpu_device(index) for index in found)
        name = f"{platform.processor() or platform.machine()} {current.type}"
        return tuple(Accelerator(kind=current.type, name=name, index=index) for index in found)
    return _nvidia_devices_without_cuda()


def _cuda_device(index: int) -> Accelerator:
    properties = torch.cuda.get_device_properties(index)
    facts: dict[str, Any] = {
        "kind": "cuda",
        "name": properties.name,
        "index": index,
        "memory_bytes": properties.total_memory,
        "uuid": str(getattr(properties, "uuid", "")),
    }
    if torch.version.hip:
        # It has no such list of versions: we trust PyTorch's own check at start-up.
        architecture = properties.gcnArchName
        units = AMD_WITH_MATRIX_UNITS.match(architecture) is not None
        return Accelerator(**facts, architecture=architecture, matrix_units=units, bf16=units)
    capability = (properties.major, properties.minor)
    fault = gpu_support_fault(capability, torch.cuda.get_arch_list())
    # torch.cuda.is_bf16_supported asks the current device, which need not be this one.
    bf16 = not fault and capability >= (8, 0)
    return Accelerator(**facts, bf16=bf16, capability=capability, fault=fault)


def _xpu_device(index: int) -> Accelerator:
    properties = torch.xpu.get_device_properties(index)
    # Older integrated GPUs lack them. Not every PyTorch that we support names them.
    units = bool(getattr(properties, "has_subgroup_matrix_multiply_accumulate", True))
    return Accelerator(
        kind="xpu",
        name=properties.name,
        index=index,
        # An integrated GPU reports its share of the host's.
        memory_bytes=properties.total_memory,
        bf16=units,
        matrix_units=units,
        uuid=str(getattr(properties, "uuid", "")),
    )


def one_device_is_visible() -> bool:
    """Whether a variable of the environment shows this process one device alone."""
    texts = (os.environ.get(name, "").strip(" ,") for name in VISIBILITY_VARIABLES)
    return any(text and "," not in text for text in texts)


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
