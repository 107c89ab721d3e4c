"""Learning-rate schedules: pure functions from the step to a multiplier of the peak rate.

Steps count optimizer steps from 0; a run of `total_steps` uses the values at 0 to
`total_steps - 1`, and a step beyond the run gets the last value again. As a schedule has no state,
resuming needs no more than the step.

Warm-up is linear: with `warmup_steps` w, step s < w gets (s + 1) / (w + 1), and step w is the first
at the peak. The ramp is even from zero, where a step would be computed for nothing and which is
therefore left out, to the peak. `one_cycle` has its own warm-up, of the same length.
"""

import bisect
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from training_framework.errors import UserError

__all__ = ["SCHEDULES", "Schedule", "build_schedule", "schedule_options"]

Schedule = Callable[[int], float]
"""Step, from 0, to multiplier of the peak learning rate."""


def _warmed_up(after_warmup: Schedule, *, total_steps: int, warmup_steps: int | None) -> Schedule:
    """The linear ramp times the schedule, held at the run's last step."""
    warmup = warmup_steps or 0

    def multiplier(step: int) -> float:
        step = min(step, total_steps - 1)
        return min(1.0, (step + 1) / (warmup + 1)) * after_warmup(step)

    return multiplier


def _progress(step: int, total_steps: int, warmup_steps: int | None) -> float:
    """Share of the way from the end of the warm-up to `total_steps`; 0 during the warm-up."""
    warmup = warmup_steps or 0
    return max(0, step - warmup) / max(1, total_steps - warmup)


def _cosine_between(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _constant(*, total_steps: int, warmup_steps: int | None = None) -> Schedule:
    """Warm-up, then the peak."""
    return _warmed_up(lambda step: 1.0, total_steps=total_steps, warmup_steps=warmup_steps)


def _linear(
    *, total_steps: int, warmup_steps: int | None = None, final_fraction: float = 0.0
) -> Schedule:
    """Warm-up, then a straight line that would reach `final_fraction` at `total_steps`."""
    return _warmed_up(
        lambda step: 1 + (final_fraction - 1) * _progress(step, total_steps, warmup_steps),
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )


def _cosine(
    *, total_steps: int, warmup_steps: int | None = None, final_fraction: float = 0.0
) -> Schedule:
    """Warm-up, then half a cosine that would reach `final_fraction` at `total_steps`.

    Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts. The last step's rate is
    a little above the end, so that no step is computed at a rate of zero.
    """
    return _warmed_up(
        lambda step: _cosine_between(1, final_fraction, _progress(step, total_steps, warmup_steps)),
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )


def _trapezoid(
    *,
    total_steps: int,
    warmup_steps: int | None = None,
    decay_fraction: float = 0.2,
    final_fraction: float = 0.0,
) -> Schedule:
    """Warm-up, the peak, then a straight line that would reach `final_fraction` at `total_steps`.

    The line takes the last `decay_fraction` of the run (Zhai et al., arXiv 2106.04560, section 3.5,
    and Haegele et al., arXiv 2405.18392).
    """
    decay_steps = decay_fraction * total_steps

    def after_warmup(step: int) -> float:
        left = min(1.0, (total_steps - step) / decay_steps)
        return final_fraction + (1 - final_fraction) * left

    return _warmed_up(after_warmup, total_steps=total_steps, warmup_steps=warmup_steps)


def _step(
    *, total_steps: int, warmup_steps: int | None = None, step_size: int, gamma: float = 0.1
) -> Schedule:
    """Warm-up, and times `gamma` every `step_size` steps.

    The drops count from the start of the run, not from the end of the warm-up (Goyal et al.,
    arXiv 1706.02677, section 5.1), so that a longer warm-up does not move them.
    """
    if step_size < 1:
        raise UserError(f"scheduler step has a step_size of {step_size} steps", "give 1 or more")
    return _warmed_up(
        lambda step: gamma ** (step // step_size),
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )


def _multi_step(
    *,
    total_steps: int,
    warmup_steps: int | None = None,
    milestones: Sequence[int],
    gamma: float = 0.1,
) -> Schedule:
    """Warm-up, and times `gamma` at each of the `milestones`, in steps from the run's start."""
    ordered = sorted(milestones)
    return _warmed_up(
        lambda step: gamma ** bisect.bisect_right(ordered, step),
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )


def _one_cycle(
    *,
    total_steps: int,
    warmup_steps: int | None = None,
    start_divisor: float = 25.0,
    final_divisor: float = 1e4,
) -> Schedule:
    """Half a cosine up to the peak, then half a cosine down.

    From 1 / start_divisor to 1, then to 1 / (start_divisor * final_divisor), which the last step
    gets: torch's OneCycleLR (Smith and Topin, arXiv 1708.07120), save that momentum stays as it
    is. Without `warmup_steps` the way up is 30% of the run, as there; with it, the peak is at that
    step. A run of one to three steps starts at the peak.
    """
    last_step = total_steps - 1
    # OneCycleLR puts the peak between two steps where 30% of the run is not a whole number; in
    # runs of a few steps it would lie before step 0, and a single step would get the final rate.
    peak_step = max(0.0, 0.3 * total_steps - 1) if warmup_steps is None else float(warmup_steps)
    start, final = 1 / start_divisor, 1 / (start_divisor * final_divisor)

    def multiplier(step: int) -> float:
        step = min(step, last_step)
        if step <= peak_step:
            return _cosine_between(start, 1, step / peak_step if peak_step else 1)
        return _cosine_between(1, final, (step - peak_step) / (last_step - peak_step))

    return multiplier


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": _cosine,
    "step": _step,
    "multi_step": _multi_step,
    "one_cycle": _one_cycle,
    "linear": _linear,
    "trapezoid": _trapezoid,
    "constant": _constant,
}


def build_schedule(
    name: str, *, total_steps: int, warmup_steps: int | None = None, **options: Any
) -> Schedule:
    """The schedule `name` for a run.

    Args:
        name: A key of SCHEDULES.
        total_steps: Optimizer steps of the run.
        warmup_steps: Optimizer steps of warm-up; None: 30% of the run for `one_cycle`, none for
            the others.
        **options: `cosine` and `linear`: final_fraction (0.0), the multiplier at the end;
            `trapezoid`: the same, and decay_fraction (0.2), the share of the run in which the rate
            falls; `step`: step_size, in steps, and gamma (0.1); `multi_step`: milestones, in steps,
            and gamma (0.1); `one_cycle`: start_divisor (25) and final_divisor (1e4).

    Returns:
        A function from the step, 0 or more, to the multiplier of the peak learning rate.

    Raises:
        UserError: Unknown schedule, an option that it lacks or misses, no steps, or a warm-up
            that is longer than the run.
    """
    if name not in SCHEDULES:
        raise UserError(f"unknown scheduler {name!r}", f"choose one of {', '.join(SCHEDULES)}")
    builder = SCHEDULES[name]
    if total_steps < 1:
        raise UserError(f"the run has {total_steps} steps", "give it more images or epochs")
    warmup = warmup_steps or 0
    if warmup < 0:
        raise UserError(f"warmup_steps is {warmup}", "give 0 or more")
    if warmup > total_steps:
        raise UserError(
            f"warmup_steps {warmup} is longer than the run's {total_steps} steps",
            "shorten the warm-up or train longer",
        )
    _check_options(name, options)
    return builder(total_steps=total_steps, warmup_steps=warmup_steps, **options)


def schedule_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a schedule besides the number of steps and the warm-up, by name."""
    return {
        key: parameter
        for key, parameter in inspect.signature(SCHEDULES[name]).parameters.items()
        if key not in ("total_steps", "warmup_steps")
    }


def _check_options(name: str, options: dict[str, Any]) -> None:
    parameters = schedule_options(name)
    for key in options:
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise UserError(f"scheduler {name} has no option {key!r}", f"its options are: {known}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise UserError(f"scheduler {name} needs {key}", f"give {key}, in steps")
    for key in ("decay_fraction", "final_fraction"):
        if key in options and not (0 <= options[key] <= 1 and (options[key] or key[0] == "f")):
            raise UserError(f"{key} is {options[key]}", "give a share of the run or of the peak")
