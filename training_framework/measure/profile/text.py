"""A profile as text for people, at most 80 columns wide."""

import textwrap
from collections.abc import Sequence

from training_framework.measure.profile.phases import StepPhases
from training_framework.measure.profile.profile import Profile
from training_framework.measure.profile.roofline import MachineLimits
from training_framework.measure.profile.step_clock import PHASES
from training_framework.measure.profile.trace import OperatorTime

__all__ = ["profile_lines"]

WIDTH = 80
BAR_WIDTH = 22
TOP_OPERATORS = 8
TOP_SHAPES = 5


def profile_lines(profile: Profile) -> list[str]:
    """The phases, the ceilings, the verdict, the top operators and the files."""
    on_cpu = profile.device == "cpu"
    lines = _phase_lines(profile.phases, on_cpu=on_cpu)
    ceilings = profile.ceilings
    lines += [
        "",
        "ceilings                        images/s",
        f"  loader alone              {ceilings.loader:>12,.0f}",
        f"  model alone, data loaded  {ceilings.model:>12,.0f}",
        f"  both together             {ceilings.both:>12,.0f}",
    ]
    if ceilings.device_busy is not None:
        lines.append(f"  the device computes for {100 * ceilings.device_busy:.0f}% of the time")
    shares = profile.phases.shares
    if not ceilings.agree(1 - shares["data"] - shares["logging"] - shares["rest"]):
        lines += _wrapped(
            "! the ceilings contradict the phases: other work used the machine for a while, or "
            "there were too few steps; measure again"
        )
    lines += ["", *_wrapped(str(profile.verdict)), ""]
    limits = profile.limits
    if profile.operators:
        lines += _table("operator", profile.operators[:TOP_OPERATORS], limits)
    if profile.kernels:
        lines += ["", *_table("kernel", profile.kernels[:TOP_OPERATORS], limits)]
    lines += ["", *_table("layer type", profile.layer_types[:TOP_OPERATORS], limits)]
    shapes = [row for row in profile.shapes if row.flops_per_second][:TOP_SHAPES]
    if shapes:
        lines += ["", *_table("operator by shape", shapes, limits)]
    lines += [
        "",
        *_wrapped(
            f"peak: {limits.flops_per_second / 1e9:,.0f} GFLOP/s of a matrix product "
            f"({limits.flops_source}), {limits.bytes_per_second / 1e9:,.0f} GB/s copied; "
            f"operators over {profile.profiled_steps} steps"
        ),
        "",
        f"files in {profile.directory}:",
        *_wrapped("  " + ", ".join(path.name for path in profile.files)),
    ]
    return lines


def _phase_lines(phases: StepPhases, *, on_cpu: bool) -> list[str]:
    lines = [f"{'phase of a step':<34} {'ms':>10} {'share':>7}"]
    for phase, meaning in PHASES.items():
        share = phases.shares[phase]
        milliseconds = 1000 * phases.seconds[phase]
        bar = "#" * round(BAR_WIDTH * share)
        lines.append(f"{meaning:<34} {milliseconds:>10.2f} {100 * share:>6.1f}%  {bar}".rstrip())
    total = 1000 * sum(phases.seconds.values())
    lines.append(
        f"{'sum':<34} {total:>10.2f} {100 * phases.sum_over_wall:>6.1f}%  of the wall time"
    )
    if not phases.adds_up:
        lines += _wrapped("! the phases do not add up to the wall time: do not trust them")
    cost = f"{100 * phases.border_cost:+.1f}%"
    waiting = (
        f"dividing a step changed its time by {cost} (this is noise: on a CPU nothing waits)"
        if on_cpu
        else f"waiting for the device between phases changed a step's time by {cost}"
    )
    return [*lines, *_wrapped(f"{phases.steps} steps; {waiting}")]


def _table(title: str, rows: Sequence[OperatorTime], limits: MachineLimits) -> list[str]:
    lines = [f"{title:<38} {'calls':>6} {'ms':>9} {'share':>6} {'GFLOP/s':>9} {'peak':>5}"]
    for row in rows:
        speed = peak = ""
        if row.flops_per_second:
            speed = f"{row.flops_per_second / 1e9:,.0f}"
            peak = f"{100 * row.flops_per_second / limits.flops_per_second:.0f}%"
        name = row.name.removeprefix("aten::")
        lines.append(
            f"{_shortened(name, 38):<38} {row.calls:>6.4g} {1000 * row.seconds:>9.2f} "
            f"{100 * row.share:>5.1f}% {speed:>9} {peak:>5}".rstrip()
        )
        if row.shapes:
            lines.append(f"  {_shortened(row.shapes, WIDTH - 2)}")
    return lines


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
