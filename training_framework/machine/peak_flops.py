"""The peak speed of a device: from data sheets for GPUs, measured for CPUs."""

import functools
import re
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["gpu_model", "measure_bf16_speed", "measure_peak_flops"]

PEAK_TRIAL_SECONDS = 0.1
BF16_TRIALS = 5

# Dense peak of the tensor cores in FLOP/s, accumulated in fp32, by model (see `gpu_model`); bf16
# and fp16 are equally fast on all of these. Sources: NVIDIA's data sheets and architecture papers
# (without sparsity). A model that is not listed has no peak here: a similar name proves nothing.
CITED_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIE": 756e12,
    "H20": 148e12,
    "A100": 312e12,
    "A100 PCIE": 312e12,
    "A30": 165e12,
    "A40": 150e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "T4": 65e12,
    "V100": 125e12,
    "V100 PCIE": 112e12,
    "V100S PCIE": 130e12,
    "RTX A6000": 155e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# Words of a name that do not change the peak: who sells it, its memory, and its socket where there
# is a model without one.
_BRANDS = re.compile(r"\b(NVIDIA|TESLA|GEFORCE)\b")
_MEMORY_OR_SOCKET = re.compile(r"\d+GB|HBM\d\w?|SXM\d?")


def gpu_model(device_name: str) -> str:
    """A GPU's model, from its name as the driver gives it.

    `NVIDIA A100-SXM4-80GB` is an `A100`, and `NVIDIA GeForce RTX 4090 Laptop GPU` an
    `RTX 4090 LAPTOP GPU`, which is another model than `RTX 4090`.
    """
    words = re.split(r"[ -]+", _BRANDS.sub("", device_name.upper()).strip())
    return " ".join(word for word in words if not _MEMORY_OR_SOCKET.fullmatch(word))


def measure_peak_flops(
    device_kind: str, device_name: str, dtype: torch.dtype
) -> tuple[float, Literal["cited", "measured", "n/a"]]:
    """Peak FLOP/s of a device in a dtype: the denominator of MFU.

    For GPUs in the table above, it is the dense tensor-core rate of the data sheet (half precision
    only). For CPUs it is measured: the best of a few matrix products and a convolution, with the
    threads in use. For other devices it is unknown, and MFU is not reported.

    Returns:
        FLOP/s per device (0 if unknown), and the source of the figure.
    """
    if device_kind == "cpu":
        return _measured_cpu_peak(dtype), "measured"
    if dtype in (torch.bfloat16, torch.float16):
        flops = CITED_PEAK_FLOPS.get(gpu_model(device_name))
        if flops is not None:
            return flops, "cited"
    return 0.0, "n/a"


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
