"""A whole profile: phases, ceilings, verdict, operators, roofline, and their files."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_framework.config import TrainConfig
from training_framework.errors import UserError
from training_framework.machine.hardware import library_versions
from training_framework.machine.precision import compute_dtype
from training_framework.measure.profile.advice import Run, Verdict, give_verdict
from training_framework.measure.profile.ceilings import (
    Ceilings,
    measure_loader_alone,
    measure_model_alone,
)
from training_framework.measure.profile.phases import StepPhases, measure_steps
from training_framework.measure.profile.roofline import (
    LayerPoint,
    MachineLimits,
    layer_names,
    layer_points,
    measure_limits,
    plot_roofline,
)
from training_framework.measure.profile.run_parts import build_profiled_parts
from training_framework.measure.profile.trace import (
    KernelWindow,
    OperatorCall,
    OperatorTime,
    busy_seconds,
    group_calls,
)
from training_framework.runs.directory import write_json
from training_framework.training.parts import Parts

__all__ = ["SCHEMA_VERSION", "Profile", "create_profile_directory", "profile_run"]

SCHEMA_VERSION = 1
# Every step leaves thousands of events, and a few steps are enough.
MAX_PROFILED_STEPS = 5
ROWS_IN_FILE = 60


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a profile found; `profile.json` holds the same.

    Attributes:
        device: PyTorch's device type.
        operators: By name, longest first. On a device these are the times of its kernels, by the
            operator that launched them; empty if a CUDA graph replays them.
        kernels: A device's kernels by name; empty on a CPU.
        layer_types: Operators by kind of layer, or kernels if a CUDA graph replays them.
        shapes: Operators by name and the shapes of their arguments.
        roofline: A point for each shape of convolution and matrix product.
        files: What was written.
    """

    device: str
    phases: StepPhases
    ceilings: Ceilings
    verdict: Verdict
    operators: list[OperatorTime]
    kernels: list[OperatorTime]
    layer_types: list[OperatorTime]
    shapes: list[OperatorTime]
    profiled_steps: int
    limits: MachineLimits
    roofline: list[LayerPoint]
    directory: Path
    files: list[Path]

    @property
    def bottleneck(self) -> OperatorTime | None:
        """What takes the most time; None if nothing was recorded."""
        return next(iter([*self.operators, *self.kernels]), None)


def create_profile_directory(output_dir: Path, name: str) -> Path:
    """Create the next free `<output_dir>/<name>/N`.

    The system call that creates the folder fails if it exists, so nothing is overwritten.

    Raises:
        UserError: The folder cannot be created.
    """
    parent = output_dir / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name) for path in parent.iterdir() if path.name.isdecimal()]
        number = max(taken, default=-1) + 1
        while True:
            directory = parent / str(number)
            try:
                directory.mkdir()
                return directory
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(
            f"{error.filename or parent}: cannot be written to ({error.strerror})",
            "give another --output-dir",
        ) from None


def profile_run(
    config: TrainConfig,
    *,
    steps: int = 20,
    warmup: int = 5,
    output_dir: Path = Path("profiles"),
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
    parts: Parts | None = None,
) -> Profile:
    """Measure where the time of a configured run goes, and write the result.

    Args:
        config: The run's configuration. It is trained for some steps from the start; nothing is
            saved.
        steps: Optimizer steps of each measurement.
        warmup: Steps before the first measurement.
        output_dir: The files go to `<output_dir>/<name>/N`.
        command: The command that repeats this, for the record.
        say: Called with progress messages.
        parts: The run's parts, if they differ from what `config` builds. They are closed.

    Raises:
        UserError: A setting is wrong or cannot be used on this machine.
    """
    for name, value in (("steps", steps), ("warmup", warmup)):
        if value < 1:
            raise UserError(f"profile: {name} is {value}", "give 1 or more")
    say("building the run")
    parts = build_profiled_parts(config) if parts is None else parts
    with ExitStack() as stack:
        stack.callback(parts.close)
        directory = create_profile_directory(output_dir, parts.plan.name)
        stack.callback(_remove_if_empty, directory)
        return _profile(
            parts, steps=steps, warmup=warmup, directory=directory, command=command, say=say
        )


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):  # it is not empty: keep what was written
        directory.rmdir()


def _profile(
    parts: Parts,
    *,
    steps: int,
    warmup: int,
    directory: Path,
    command: str,
    say: Callable[[str], None],
) -> Profile:
    plan = parts.plan
    profiled_steps = min(steps, MAX_PROFILED_STEPS)
    window = KernelWindow(
        device=parts.device,
        trace=directory / "trace.json.gz",
        memory_snapshot=directory / "memory_snapshot.pickle",
    )
    say(f"training {2 * steps} steps and {profiled_steps} under the profiler, after a warm-up")
    phases = measure_steps(parts, steps=steps, warmup=warmup, last=(window, profiled_steps))
    say("measuring the model alone, then the loader alone")
    busy = _device_busy(window, profiled_steps, phases.undivided_seconds)
    ceilings = _ceilings(parts, steps, phases.undivided_seconds, busy)
    say("measuring the machine's limits")
    dtype = compute_dtype(plan.precision)
    limits = measure_limits(parts.device, plan.device_name, dtype, plan.product_format)
    plot = directory / "roofline.png"
    points = _roofline(parts, window, profiled_steps, limits, plot)
    tables = _tables(window, profiled_steps)
    profile = Profile(
        device=plan.device,
        phases=phases,
        ceilings=ceilings,
        verdict=give_verdict(
            ceilings,
            phases.shares,
            run=Run(
                settings=parts.planned.settings,
                plan=plan,
                facts=parts.planned.facts,
                hardware=parts.planned.hardware,
            ),
            bottleneck=_named([*tables["operators"], *tables["kernels"]], limits),
        ),
        **tables,
        profiled_steps=profiled_steps,
        limits=limits,
        roofline=points,
        directory=directory,
        files=[directory / "profile.json", plot, *window.files],
    )
    write_json(directory / "profile.json", _record(profile, parts, warmup, command))
    return profile


def _ceilings(
    parts: Parts, steps: int, seconds_per_step: float, device_busy: float | None
) -> Ceilings:
    return Ceilings(
        model=measure_model_alone(parts, steps=steps, warmup=2),
        loader=measure_loader_alone(parts, steps=steps, warmup=1),
        both=parts.plan.images_per_step / seconds_per_step,
        device_busy=device_busy,
    )


def _roofline(
    parts: Parts, window: KernelWindow, steps: int, limits: MachineLimits, plot: Path
) -> list[LayerPoint]:
    plan = parts.plan
    points = layer_points(
        window.calls,
        steps=steps,
        element_bytes=compute_dtype(plan.precision).itemsize,
        limits=limits,
        names=layer_names(parts.step.model, plan.image_size),
    )
    title = (
        f"{plan.model}, {plan.image_size} px, batch {plan.device_batch_size}, "
        f"precision {plan.precision}, {plan.device_name}"
    )
    plot_roofline(points, limits, title=title, path=plot)
    return points


def _device_busy(window: KernelWindow, steps: int, seconds_per_step: float) -> float | None:
    if window.device.type == "cpu" or not window.kernels:
        return None
    return min(1.0, busy_seconds(window.kernels) / steps / seconds_per_step)


def _tables(window: KernelWindow, steps: int) -> dict[str, list[OperatorTime]]:
    kernel_calls = [
        OperatorCall(
            name=kernel.name,
            shapes=(),
            values=(),
            seconds=kernel.end - kernel.start,
            in_backward=False,
        )
        for kernel in window.kernels
    ]
    return {
        "operators": group_calls(window.calls, by="operator", steps=steps, limit=ROWS_IN_FILE),
        "kernels": group_calls(kernel_calls, by="operator", steps=steps, limit=ROWS_IN_FILE),
        # A replayed CUDA graph launches its kernels without their operators.
        "layer_types": group_calls(
            kernel_calls if _mostly_replayed(window) else window.calls, by="layer_type", steps=steps
        ),
        "shapes": group_calls(window.calls, by="shape", steps=steps, limit=ROWS_IN_FILE),
    }


def _mostly_replayed(window: KernelWindow) -> bool:
    launched = sum(call.seconds for call in window.calls)
    ran = sum(kernel.end - kernel.start for kernel in window.kernels)
    return launched < ran / 2


def _named(rows: list[OperatorTime], limits: MachineLimits) -> str:
    if not rows:
        return ""
    row = rows[0]
    text = f"{row.name} takes {100 * row.share:.0f}%"
    if row.flops_per_second:
        text += f" at {100 * row.flops_per_second / limits.flops_per_second:.0f}% of the peak"
    return text


def _record(profile: Profile, parts: Parts, warmup: int, command: str) -> dict[str, Any]:
    """The contents of profile.json."""
    found = dataclasses.asdict(profile)
    directory = found.pop("directory")
    found["files"] = [str(path.relative_to(directory)) for path in profile.files]
    found["phases"]["sum_over_wall"] = profile.phases.sum_over_wall
    found["phases"]["border_cost"] = profile.phases.border_cost
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "units": {"ceilings": "images/s", "device_busy": "share", "seconds": "s a step"},
        "warmup_steps": warmup,
        "dropped_steps": max(warmup, 1) + parts.plan.steps_loaded_ahead,
        **found,
        "versions": library_versions(),
        "hardware": dataclasses.asdict(parts.planned.hardware),
        "data": dataclasses.asdict(parts.planned.facts),
        "config": parts.planned.settings,
        "plan": parts.plan.as_dict(),
    }
