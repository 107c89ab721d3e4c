"""A torch.profiler window over some steps: operators, kernels, layer types, the bottleneck."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from training_framework.measure.profile.operator_flops import (
    WINOGRAD,
    WINOGRAD_BACKWARD,
    operator_cost,
)
from training_framework.measure.profile.run_parts import synchronize

__all__ = [
    "Kernel",
    "KernelWindow",
    "OperatorCall",
    "OperatorTime",
    "busy_seconds",
    "group_calls",
    "layer_type_of",
    "read_calls",
    "read_kernels",
]

# They call other operators, which ones depends on the device; FLOP/s only make sense for the whole.
WHOLE_OPERATORS = (
    "aten::convolution", "aten::convolution_backward", WINOGRAD, WINOGRAD_BACKWARD,
)  # fmt: skip
MICROSECONDS = 1e6
MEMORY_EVENTS = 200_000

# The first one that occurs in the lower-case name of an operator or kernel decides.
LAYER_TYPES = {
    "convolution": ("conv", "fprop", "dgrad", "wgrad", "winograd", "im2col"),
    "batch norm": ("batch_norm", "batchnorm", "bn_fw", "bn_bw"),
    "optimizer": ("sgd", "adam", "_foreach", "multi_tensor", "optimizer"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "pooling": ("pool", "aten::mean", "aten::max"),
    "activation": ("relu", "threshold", "clamp_min"),
    "matrix product": ("mm", "gemm", "matmul", "linear", "cublas"),
    "copies and casts": ("copy", "memcpy", "memset", "aten::to", "_to_copy", "contiguous", "clone"),
    "indexing": ("index", "gather", "roll", "scatter"),
    "elementwise": ("add", "mul", "div", "sub", "fill", "zero", "where", "elementwise", "sum"),
    "compiled": ("triton", "compiled", "inductor", "cpp_fused"),
}


@dataclass(frozen=True, kw_only=True)
class OperatorCall:
    """One call of an operator in the window.

    Attributes:
        name: As the profiler writes it.
        shapes: Shapes of its tensor arguments; empty for others.
        values: Values of its other arguments.
        seconds: On the device if there is one, else on the CPU; without the calls that it makes
            itself, except for convolutions.
        in_backward: Whether autograd called it.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    values: tuple[Any, ...]
    seconds: float
    in_backward: bool


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """Calls that belong together.

    Attributes:
        name: Name of the operator or group.
        layer_type: The kind of layer it works for.
        calls: Average calls a step.
        seconds: Average seconds a step.
        share: Share of the time of all operators.
        flops_per_second: FLOP/s while it runs; None if its FLOPs are not counted.
        shapes: Shapes of the arguments, if calls are grouped by them.
    """

    name: str
    layer_type: str
    calls: float
    seconds: float
    share: float
    flops_per_second: float | None = None
    shapes: str = ""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One execution of a kernel (or a copy) on a device, in seconds from an arbitrary moment."""

    name: str
    start: float
    end: float


@dataclass(kw_only=True)
class KernelWindow:
    """Records steps with torch.profiler, and on CUDA also the allocations.

    Attributes:
        device: Where the run is.
        trace: Where to write the trace (chrome://tracing, ui.perfetto.dev), as .json or .json.gz.
        memory_snapshot: Where to write the memory history (pytorch.org/memory_viz); only on CUDA.
        calls: The recorded calls; filled at the end.
        kernels: The recorded kernels; empty on a CPU.
        files: The files that were written.
    """

    device: torch.device
    trace: Path
    memory_snapshot: Path
    calls: list[OperatorCall] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def begin(self) -> None:
        """Start recording."""
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
        elif self.device.type == "xpu":
            activities.append(ProfilerActivity.XPU)
        synchronize(self.device)
        self._profile = profile(activities=activities, record_shapes=True, acc_events=True)
        self._profile.start()

    def end(self) -> None:
        """Stop, read what was recorded and write the files."""
        synchronize(self.device)
        self._profile.stop()
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.memory_snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            self.files.append(self.memory_snapshot)
        self._profile.export_chrome_trace(str(self.trace))
        self.files.append(self.trace)
        events = self._profile.events() or []
        self.calls = read_calls(events, on_device=self.device.type in ("cuda", "xpu"))
        self.kernels = read_kernels(events)


def read_calls(events: Iterable[Any], *, on_device: bool) -> list[OperatorCall]:
    """Operator calls from the profiler's events.

    Args:
        events: FunctionEvents, with shapes.
        on_device: Use the time of the kernels that a call launched instead of its CPU time.
    """
    calls = []
    for event in events:
        if event.device_type != DeviceType.CPU or event.is_user_annotation:
            continue
        ancestors = _ancestors(event)
        if any(name in WHOLE_OPERATORS for name in ancestors):
            continue
        whole = event.name in WHOLE_OPERATORS
        if on_device:
            time = event.device_time_total if whole else event.self_device_time_total
        else:
            time = event.cpu_time_total if whole else event.self_cpu_time_total
        if time <= 0:
            continue
        calls.append(
            OperatorCall(
                name=event.name,
                shapes=tuple(tuple(shape) for shape in event.input_shapes or ()),
                values=tuple(event.concrete_inputs or ()),
                seconds=time / MICROSECONDS,
                in_backward=any(name.startswith("autograd::engine") for name in ancestors),
            )
        )
    return calls


def _ancestors(event: Any) -> list[str]:
    names = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name)
    return names


def read_kernels(events: Iterable[Any]) -> list[Kernel]:
    """What ran on a device, from the profiler's events."""
    return [
        Kernel(
            name=event.name,
            start=event.time_range.start / MICROSECONDS,
            end=event.time_range.end / MICROSECONDS,
        )
        for event in events
        if event.device_type != DeviceType.CPU and not event.is_user_annotation
    ]


def busy_seconds(kernels: Sequence[Kernel]) -> float:
    """Time in which at least one kernel runs; kernels that run side by side count once."""
    busy, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        busy += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    return busy


def layer_type_of(name: str) -> str:
    """Which kind of layer an operator or kernel works for, by its name."""
    lower = name.lower()
    if lower.startswith("autograd::") or (
        "::" not in lower and lower.rstrip("0123456789").endswith("backward")
    ):
        return "autograd"  # autograd's own time; the operators it calls have their own rows
    for layer_type, words in LAYER_TYPES.items():
        if any(word in lower for word in words):
            return layer_type
    return "other"


def group_calls(
    calls: Sequence[OperatorCall], *, by: str, steps: int, limit: int | None = None
) -> list[OperatorTime]:
    """Add up calls, longest first.

    Args:
        calls: Calls in all steps.
        by: `operator`, `layer_type`, or `shape` (operator and shapes of its arguments).
        steps: Number of these optimizer steps.
        limit: Number of groups to return; None: all.
    """
    groups: dict[tuple[str, str], list[OperatorCall]] = defaultdict(list)
    for call in calls:
        if by == "layer_type":
            groups[layer_type_of(call.name), ""].append(call)
        else:
            groups[call.name, _shown(call.shapes) if by == "shape" else ""].append(call)
    total = sum(call.seconds for call in calls)
    rows = []
    for (name, shapes), members in groups.items():
        seconds = sum(call.seconds for call in members)
        costs = [operator_cost(call.name, call.shapes, call.values) for call in members]
        flops = sum(cost.flops for cost in costs if cost)
        rows.append(
            OperatorTime(
                name=name,
                layer_type=name if by == "layer_type" else layer_type_of(name),
                calls=len(members) / steps,
                seconds=seconds / steps,
                share=seconds / total,
                flops_per_second=flops / seconds if flops else None,
                shapes=shapes,
            )
        )
    return sorted(rows, key=lambda row: -row.seconds)[:limit]


def _shown(shapes: Sequence[Sequence[int]]) -> str:
    return " ".join("x".join(map(str, shape)) for shape in shapes if shape)
