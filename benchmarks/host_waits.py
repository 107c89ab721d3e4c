"""Count how often the host waits for the GPU inside a training step, from the profiler's trace.

    python benchmarks/host_waits.py --output FILE

A step that waits is not launched ahead of the GPU: the GPU idles until the host catches up. The
steps are those of a training run without its logged rows, which wait on purpose. Each is made as
planned, eager, recorded as CUDA graphs, and with images that the host sends.
"""

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from step_speed import settings_of
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from training_framework.config.loading import load_config
from training_framework.errors import UserError
from training_framework.machine.hardware import detect_hardware, library_versions
from training_framework.measure.compare.timing import StepSampler
from training_framework.runs.directory import write_json

__all__ = ["LAUNCHES", "WAITS", "calls_inside", "measure"]

STEP = "measured step"
STEPS = 10
WARMUP_STEPS = 12  # longer than the three steps before a recording
# CUDA's and HIP's functions that return when the GPU has finished something.
WAITS = frozenset(
    f"{system}{name}"
    for system in ("cuda", "hip")
    for name in ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "Memcpy")
)
LAUNCHES = frozenset(
    ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx",
     "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync", "hipLaunchKernel",
     "hipExtModuleLaunchKernel", "hipGraphLaunch", "hipMemcpyAsync", "hipMemsetAsync")
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "as planned": {},
    "eager": {"compile": False, "cuda_graph": False},
    "recorded": {"compile": False, "cuda_graph": True, "precision": "bf16-mixed"},
    "images from the host": {"resident_data": False},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="result (JSON)")
    options = parser.parse_args()
    settings = {
        "data": "synthetic", "synthetic_train_images": 4096, "model": "resnet18", "img_size": 32,
        "batch_size": 128, "accelerator": "gpu",
        **settings_of(options.settings),
    }  # fmt: skip
    rows = {name: measured_or_reason({**settings, **more}) for name, more in VARIANTS.items()}
    hardware = detect_hardware()
    write_json(
        options.output,
        {
            "experiment": "host-waits",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "device": hardware.usable[0].name if hardware.usable else hardware.cpu_name,
            "versions": library_versions(),
            "steps": STEPS,
            "settings": settings,
            "rows": rows,
        },
    )
    print(json.dumps(rows, indent=1))
    return int(any("failed" in row or row.get("waits") for row in rows.values()))


def measured_or_reason(settings: dict[str, Any]) -> dict[str, Any]:
    """The counts, or why there are none."""
    try:
        return measure(settings)
    except UserError as error:
        return {"unavailable": str(error)}
    except Exception as error:  # the other rows are still worth having
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Make steps under the profiler and count.

    Returns:
        `device`; `waits` and `launches` by name, calls per step; and the settings of the plan.

    Raises:
        UserError: A setting is wrong or cannot be used on this machine.
    """
    sampler = StepSampler(
        load_config(overrides=settings),
        steps=STEPS,
        seconds=1.0,
        warmup_steps=WARMUP_STEPS,
        peak=(0.0, "n/a"),
    )
    activities = [ProfilerActivity.CPU]
    if sampler.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    try:
        with profile(activities=activities) as recorded:
            for _ in range(STEPS):
                with record_function(STEP):
                    sampler.optimizer_step()
            if sampler.device.type != "cpu":
                torch.accelerator.synchronize(sampler.device)
    finally:
        sampler.close()
    events = recorded.events() or []
    chosen = sampler.plan.switch_values()
    return {
        "device": sampler.device.type,
        "waits": calls_inside(events, WAITS),
        "launches": calls_inside(events, LAUNCHES),
        "plan": {key: chosen[key] for key in ("precision", "compile", "cuda_graph")},
    }


def calls_inside(events: Sequence[Any], names: Iterable[str]) -> dict[str, float]:
    """How often each of some functions is called in a step, by the thread that makes the steps.

    Args:
        events: The profiler's, among them one annotation for each step.
        names: Names of the functions.

    Returns:
        Mean calls per step of those that are called at all: by the function's name and, in
        parentheses, the operator that called it.
    """
    wanted = frozenset(names)
    steps = [
        event for event in events if event.name == STEP and event.device_type == DeviceType.CPU
    ]
    counts = Counter(
        f"{event.name} ({event.cpu_parent.name})" if event.cpu_parent else event.name
        for event in events
        if event.name in wanted
        and any(
            event.thread == step.thread
            and step.time_range.start <= event.time_range.start <= step.time_range.end
            for step in steps
        )
    )
    return {name: count / len(steps) for name, count in counts.most_common()}


if __name__ == "__main__":
    sys.exit(main())
