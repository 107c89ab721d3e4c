"""The peak speed of a device: from data sheets for GPUs, measured for CPUs."""

import functools
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from training_framework.machine.precision import ProductFormat

__all__ = ["CITED_PEAKS", "CitedPeaks", "measure_bf16_speed", "measure_peak_flops"]

PEAK_TRIAL_SECONDS = 0.1
BF16_TRIALS = 5


class CitedPeaks(NamedTuple):
    """A model's dense peaks in TFLOP/s, with products added up in fp32; 0: it lacks the units.

    Attributes:
        bf16: Of bfloat16 on tensor cores.
        fp16: Of half precision on tensor cores.
        tf32: Of TF32 on tensor cores.
        fp32: Of IEEE fp32, without tensor cores.
        source: NVIDIA's document. Where it gives rates with sparsity, these are their halves.
    """

    bf16: float
    fp16: float
    tf32: float
    fp32: float
    source: str


_A100 = CitedPeaks(312, 312, 156, 19.5, "A100 data sheet")
_H100_SXM = CitedPeaks(989, 989, 494, 67, "H100 data sheet")
_HOPPER_NVL = (835, 835, 417, 60)
_V100_PCIE = CitedPeaks(0, 112, 0, 14, "V100 data sheet")
_V100_SXM2 = CitedPeaks(0, 125, 0, 15.7, "V100 data sheet")

# By the driver's name of the device, without "NVIDIA " in front, which older drivers leave out. A
# name that is not listed has no peak here: a similar name can be another chip (RTX 4090 Laptop), a
# part of one (MIG) or a special edition (A100-SXM-64GB). H20 and A10G are not listed: we found no
# data sheet to check theirs against.
CITED_PEAKS = {
    "B200": CitedPeaks(2250, 2250, 1100, 75, "Blackwell data sheet (HGX B200)"),
    "H200": CitedPeaks(989, 989, 494, 67, "H200 data sheet"),
    "H200 NVL": CitedPeaks(*_HOPPER_NVL, "H200 data sheet"),
    "GH200 480GB": CitedPeaks(989, 989, 494, 67, "GH200 data sheet"),
    "GH200 144G HBM3e": CitedPeaks(989, 989, 494, 67, "GH200 data sheet"),
    "H100 80GB HBM3": _H100_SXM,
    "H100 NVL": CitedPeaks(*_HOPPER_NVL, "H100 data sheet"),
    "H100 PCIe": CitedPeaks(756, 756, 378, 51, "H100 data sheet"),
    "A100-SXM4-40GB": _A100,
    "A100-SXM4-80GB": _A100,
    "A100-PCIE-40GB": _A100,
    "A100 80GB PCIe": _A100,
    "A30": CitedPeaks(165, 165, 82, 10.3, "A30 data sheet"),
    "A40": CitedPeaks(149.7, 149.7, 74.8, 37.4, "A40 data sheet"),
    "A10": CitedPeaks(125, 125, 62.5, 31.2, "A10 data sheet"),
    "L40S": CitedPeaks(362, 362, 183, 91.6, "L40S data sheet"),
    "L40": CitedPeaks(181, 181, 90.5, 90.5, "L40 data sheet"),
    "L4": CitedPeaks(121, 121, 60, 30.3, "L4 data sheet"),
    "Tesla T4": CitedPeaks(0, 65, 0, 8.1, "T4 data sheet"),
    "Tesla V100-SXM2-16GB": _V100_SXM2,
    "Tesla V100-SXM2-32GB": _V100_SXM2,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla V100S-PCIE-32GB": CitedPeaks(0, 130, 0, 16.4, "V100 data sheet"),
    "RTX A6000": CitedPeaks(154.8, 154.8, 77.4, 38.7, "Ampere GA102 architecture paper"),
    "GeForce RTX 5090": CitedPeaks(209.5, 209.5, 104.8, 104.8, "RTX Blackwell architecture paper"),
    "GeForce RTX 4090": CitedPeaks(165.2, 165.2, 82.6, 82.6, "Ada architecture paper"),
    "GeForce RTX 3090": CitedPeaks(71, 71, 35.6, 35.6, "Ampere GA102 architecture paper"),
}
_CPU_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def measure_peak_flops(
    device_kind: str, device_name: str, factors: ProductFormat
) -> tuple[float, Literal["cited", "measured", "n/a"]]:
    """Peak FLOP/s of a device: the denominator of MFU.

    For GPUs in the table above, it is the dense rate of the data sheet. For CPUs it is measured:
    the best of a few matrix products and a convolution, with the threads in use. For other devices
    it is unknown, and MFU is not reported.

    Args:
        device_kind: PyTorch's type of the device.
        device_name: The device's name, as its driver gives it.
        factors: What convolutions and matrix products multiply.

    Returns:
        FLOP/s per device (0 if unknown), and the source of the figure.
    """
    if device_kind == "cpu":
        return _measured_cpu_peak(_CPU_DTYPES[factors]), "measured"
    peaks = CITED_PEAKS.get(device_name.removeprefix("NVIDIA "))
    teraflops = 0.0 if peaks is None else getattr(peaks, factors)
    return (teraflops * 1e12, "cited") if teraflops else (0.0, "n/a")


def _measured_cpu_peak(dtype: torch.dtype) -> float:
    """Best FLOP/s of a few matrix products and a convolution."""
    best = 0.0
    # A separate generator: the number of draws depends on timing, and must not affect the run's.
    draws = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws).to(dtype)

    for size in (256, 512, 1024):
        a, b = numbers(size, size), numbers(size, size)
        seconds = _fastest_call(lambda a=a, b=b: torch.mm(a, b))  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
        if seconds > PEAK_TRIAL_SECONDS:  # emulated: larger products would take even longer
            return best
    seconds = _fastest_call(_convolution(dtype, draws))
    # At the border, fewer taps cover a pixel: 3 * 28 - 2 products in each direction.
    return max(best, 2 * 8 * 128 * 128 * (3 * 28 - 2) ** 2 / seconds)


@functools.cache
def measure_bf16_speed() -> float:
    """The speed of a bf16 convolution on this CPU, as a multiple of fp32.

    Having the instructions is not enough: avx512_bf16 doubles the speed of Zen 4, but halves that
    of Sapphire Rapids without AMX, as in some virtual machines (docs/experiments.md).
    """
    draws = torch.Generator().manual_seed(0)
    calls = [_convolution(dtype, draws) for dtype in (torch.float32, torch.bfloat16)]
    fastest = [float("inf"), float("inf")]
    for _ in range(BF16_TRIALS):  # alternating, and the best of each, to cope with a busy machine
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            fastest[index] = min(fastest[index], time.perf_counter() - start)
    return fastest[0] / fastest[1]


def _convolution(dtype: torch.dtype, draws: torch.Generator) -> Callable[[], Tensor]:
    """A convolution that is typical of ResNets, in channels_last."""
    layout = torch.channels_last
    images = torch.randn(8, 128, 28, 28, generator=draws).to(dtype, memory_format=layout)
    weight = torch.randn(128, 128, 3, 3, generator=draws).to(dtype, memory_format=layout)
    return lambda: torch.nn.functional.conv2d(images, weight, padding=1)


def _fastest_call(call: Callable[[], object]) -> float:
    call()
    best = float("inf")
    end = time.perf_counter() + PEAK_TRIAL_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
