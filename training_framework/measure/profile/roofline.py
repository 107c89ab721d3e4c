"""Each layer's arithmetic intensity and speed, compared with the machine's limits.

Williams, Waterman, Patterson: Roofline, an insightful visual performance model (CACM 52(4), 2009).
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from training_framework.machine.peak_flops import measure_peak_flops
from training_framework.machine.precision import ProductFormat
from training_framework.measure.profile.operator_flops import (
    WINOGRAD,
    WINOGRAD_BACKWARD,
    operator_cost,
)
from training_framework.measure.profile.run_parts import synchronize
from training_framework.measure.profile.trace import OperatorCall
from training_framework.models.flops import meta_copy

__all__ = [
    "LayerPoint",
    "MachineLimits",
    "layer_names",
    "layer_points",
    "measure_limits",
    "plot_roofline",
]

MEBIBYTE = 2**20
LETTERS = "ABCDE"
# Dark on white, so that the image is readable on light and dark pages.
INK, PAPER, FORWARD, BACKWARD = "#1b1b1b", "#ffffff", "#0060b0", "#c04a00"


@dataclass(frozen=True, kw_only=True)
class MachineLimits:
    """The limits of a device.

    Attributes:
        flops_per_second: The fastest square matrix product in the run's precision, or the data
            sheet's figure.
        flops_source: `measured` or `cited`.
        bytes_per_second: The fastest copy too large for the caches; counts bytes read and written.
    """

    flops_per_second: float
    flops_source: str
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class LayerPoint:
    """All calls of one operator with the same shapes.

    Attributes:
        label: Channels, kernel, stride and map size, or the sizes of a matrix product.
        layers: Names of the model's layers with these shapes.
        direction: `forward` or `backward`.
        calls: Calls a step.
        seconds: Seconds a step.
        flops: FLOPs of one call.
        bytes: Bytes of one call: inputs, weight and outputs, once for each product.
        intensity: FLOPs per byte.
        flops_per_second: The FLOP/s achieved.
        attainable: The FLOP/s that the roofline allows at this intensity.
    """

    label: str
    layers: tuple[str, ...]
    direction: Literal["forward", "backward"]
    calls: float
    seconds: float
    flops: int
    bytes: int
    intensity: float
    flops_per_second: float
    attainable: float


def measure_limits(
    device: torch.device,
    device_name: str,
    dtype: torch.dtype,
    factors: ProductFormat,
    *,
    seconds: float = 0.25,
) -> MachineLimits:
    """Measure a device's peak, or look it up, and measure the speed of its memory.

    Args:
        device: The device to measure.
        device_name: Its name, to look up.
        dtype: Type of the products.
        factors: What the products multiply: fp32 numbers may be rounded to TF32.
        seconds: Seconds for each measurement.
    """
    flops, source = measure_peak_flops(device.type, device_name, factors)
    if not flops:
        flops, source = _measured_product(device, dtype, seconds), "measured"
    megabytes = 128 if device.type == "cpu" else 1024
    read = torch.ones(megabytes * MEBIBYTE // 4, device=device)
    written = torch.empty_like(read)
    best = _best_seconds(device, lambda: written.copy_(read), seconds)
    return MachineLimits(
        flops_per_second=flops,
        flops_source=source,
        bytes_per_second=2 * megabytes * MEBIBYTE / best,
    )


def _measured_product(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    size = 4096
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _best_seconds(device, lambda: left @ right, seconds)


def _best_seconds(device: torch.device, work: Any, seconds: float) -> float:
    work()
    synchronize(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def layer_names(model: nn.Module, image_size: int) -> dict[str, tuple[str, ...]]:
    """Names of a model's convolutions by the label of their shapes.

    Args:
        model: Takes (N, 3, H, W) images; not a compiled or DDP wrapper. It is not changed.
        image_size: Side of the images in pixels.
    """
    names: dict[str, list[str]] = defaultdict(list)
    shape_only = meta_copy(model).eval()

    def note(name: str) -> Any:
        def hook(layer: nn.Conv2d, inputs: tuple[torch.Tensor, ...], _output: Any) -> None:
            label = _convolution_label(inputs[0].shape, layer.weight.shape, layer.stride)
            names[label].append(name)

        return hook

    for name, layer in shape_only.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note(name))
    with torch.no_grad():
        shape_only(torch.empty(1, 3, image_size, image_size, device="meta"))
    return {label: tuple(found) for label, found in names.items()}


def layer_points(
    calls: Sequence[OperatorCall],
    *,
    steps: int,
    element_bytes: int,
    limits: MachineLimits,
    names: dict[str, tuple[str, ...]],
) -> list[LayerPoint]:
    """A point for each shape of convolutions and matrix products, longest first.

    Args:
        calls: Calls in the profiled steps.
        steps: Number of these optimizer steps.
        element_bytes: Bytes of a number in the run's precision.
        limits: The machine's limits.
        names: As returned by `layer_names`.
    """
    groups: dict[tuple[str, Literal["forward", "backward"], int, int], list[float]] = defaultdict(
        list
    )
    for call in calls:
        cost = operator_cost(call.name, call.shapes, call.values)
        if cost is None or cost.flops == 0:
            continue
        direction: Literal["forward", "backward"] = "backward" if call.in_backward else "forward"
        groups[_label(call), direction, cost.flops, cost.elements].append(call.seconds)
    points = []
    for (label, direction, flops, elements), seconds in groups.items():
        bytes_moved = elements * element_bytes
        intensity = flops / bytes_moved
        points.append(
            LayerPoint(
                label=label,
                layers=names.get(label, ()),
                direction=direction,
                calls=len(seconds) / steps,
                seconds=sum(seconds) / steps,
                flops=flops,
                bytes=bytes_moved,
                intensity=intensity,
                flops_per_second=flops * len(seconds) / sum(seconds),
                attainable=min(limits.flops_per_second, intensity * limits.bytes_per_second),
            )
        )
    return sorted(points, key=lambda point: -point.seconds)


def _label(call: OperatorCall) -> str:
    if call.name == "aten::convolution":
        return _convolution_label(call.shapes[0], call.shapes[1], call.values[3])
    if call.name == "aten::convolution_backward":
        return _convolution_label(call.shapes[1], call.shapes[2], call.values[4])
    if call.name == WINOGRAD:
        return _convolution_label(call.shapes[0], call.shapes[1], call.values[2])
    if call.name == WINOGRAD_BACKWARD:
        return _convolution_label(call.shapes[1], call.shapes[2], call.values[3])
    left, right = [shape for shape in call.shapes if shape][-2:]
    return f"{'x'.join(map(str, left))} @ {'x'.join(map(str, right))}"


def _convolution_label(
    images: Sequence[int], weight: Sequence[int], stride: Sequence[int] | int
) -> str:
    step = stride if isinstance(stride, int) else stride[0]
    strided = f"/{step}" if step > 1 else ""
    return f"{images[1]}-{weight[0]} {weight[2]}x{weight[3]}{strided} {images[2]} px"


def plot_roofline(
    points: Sequence[LayerPoint], limits: MachineLimits, *, title: str, path: Path
) -> None:
    """Draw the points below the machine's roofline, as a PNG; areas show shares of the time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=PAPER)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _draw_roof(axes, points, limits)
    total = sum(point.seconds for point in points) or 1.0
    for direction, color, marker in (("forward", FORWARD, "o"), ("backward", BACKWARD, "^")):
        own = [point for point in points if point.direction == direction]
        axes.scatter(
            [point.intensity for point in own],
            [point.flops_per_second / 1e9 for point in own],
            s=[20 + 600 * point.seconds / total for point in own],
            c=color,
            marker=marker,
            alpha=0.65,
            label=f"{direction} (area: share of these points' time)",
        )
    for letter, point in zip(LETTERS, points, strict=False):
        where = (point.intensity, point.flops_per_second / 1e9)
        axes.annotate(letter, where, xytext=(7, 5), textcoords="offset points", color=INK)
        name = f"{point.label}, {point.direction}: {100 * point.seconds / total:.0f}%"
        axes.plot([], [], marker=f"${letter}$", color=INK, linestyle="none", label=name)
    axes.set_title(title, color=INK, fontsize=11)
    axes.set_xlabel("arithmetic intensity, FLOP per byte of inputs, weights and outputs", color=INK)
    axes.set_ylabel("achieved GFLOP/s", color=INK)
    axes.tick_params(colors=INK)
    axes.grid(visible=True, which="major", color="#d8d8d8", linewidth=0.6)
    # Below the axes, where it hides no point.
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, labelcolor=INK, facecolor=PAPER)
    figure.savefig(path, facecolor=PAPER)


def _draw_roof(axes: Any, points: Sequence[LayerPoint], limits: MachineLimits) -> None:
    ridge = limits.flops_per_second / limits.bytes_per_second
    intensities = [point.intensity for point in points] + [ridge]
    left, right = min(intensities) / 3, max(intensities) * 3
    peak = limits.flops_per_second / 1e9
    axes.plot(
        [left, ridge, right],
        [left * limits.bytes_per_second / 1e9, peak, peak],
        color=INK,
        linewidth=1.4,
        label=f"{limits.bytes_per_second / 1e9:,.0f} GB/s copied, {peak:,.0f} GFLOP/s "
        f"of a matrix product ({limits.flops_source})",
    )
    axes.set_xlim(left, right)
    slowest = min([point.flops_per_second / 1e9 for point in points], default=peak)
    axes.set_ylim(slowest / 2, 2 * max(peak, *(p.flops_per_second / 1e9 for p in points), 0.0))
