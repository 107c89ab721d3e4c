"""The `estimate` command: its flags and its output."""

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from training_framework.config.flags import add_config_flags, given_settings
from training_framework.errors import UserError

if TYPE_CHECKING:
    from training_framework.measure.estimate import RunEstimate

__all__ = ["add_estimate", "estimate_lines"]

NOTEWORTHY_SHARE = 0.05


def add_estimate(commands: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "measure a few steps, and say what the whole run will take here"
    parser = commands.add_parser("estimate", help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=_estimate, parser=parser)
    add_config_flags(parser)
    parser.usage = f"{parser.prog} [--config FILE] [--price-per-hour P] [...]"
    group = parser.add_argument_group("estimate")
    group.add_argument("--steps", type=int, default=30, help="steps to time at each size (30)")
    group.add_argument(
        "--price-per-hour",
        type=float,
        metavar="P",
        help="price of an hour of this machine; gives the price of the run",
    )
    group.add_argument("--watts", type=float, metavar="W",
                       help="power that you assume for this machine under load; gives the energy "
                       "of the run")  # fmt: skip


def _estimate(options: argparse.Namespace) -> None:
    from training_framework.measure.estimate import estimate_run
    from training_framework.train import configure

    for flag, value in (("--price-per-hour", options.price_per_hour), ("--watts", options.watts)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{flag} is {value}", "give a number above 0")
    config = configure(options.config, given_settings(options), source="command line")
    print(f"{options.steps} steps at each image size ...", file=sys.stderr)
    found = estimate_run(config, steps=options.steps)
    print("\n".join(estimate_lines(found, price=options.price_per_hour, watts=options.watts)))


def estimate_lines(
    found: "RunEstimate", *, price: float | None = None, watts: float | None = None
) -> list[str]:
    """An estimate for people.

    Args:
        found: What was measured.
        price: Of an hour; None: the price of the run is not shown.
        watts: Assumed power; None: the energy is not shown.
    """
    plan, ends = found.plan, _interval(found)
    low, high = (_duration(end) for end in ends)
    where = "of the device" if plan.device == "cuda" else "of this process"
    lines = [f"time    {_duration(found.seconds)} (95%: {low} to {high})"]
    for time in found.step_times:
        lines.append(
            f"        {time.steps:,.0f} steps of {plan.images_per_step} images at "
            f"{time.image_size} px, {time.seconds:.4g} s each"
        )
    if found.evaluation_seconds:
        lines.append(
            f"        {found.evaluations:,} evaluations, {found.evaluation_seconds:.3g} s each"
        )
    lines.append(
        f"        {found.start_seconds:.3g} s to start; writing checkpoints is not counted"
    )
    lines.append(f"memory  {found.memory_bytes / 2**30:.2f} GiB, the peak {where}")
    hours = found.seconds / 3600
    if price is not None:
        low_price, high_price = (end / 3600 * price for end in ends)
        lines.append(
            f"price   {hours * price:.2f} ({low_price:.2f} to {high_price:.2f}), "
            f"at {price:g} an hour"
        )
    if watts is not None:
        low_energy, high_energy = (end / 3600 * watts / 1000 for end in ends)
        lines.append(
            f"energy  {hours * watts / 1000:.3g} kWh ({low_energy:.3g} to {high_energy:.3g}), "
            f"assuming {watts:g} W"
        )
    if found.other_cpu_share > NOTEWORTHY_SHARE:
        lines.append(
            f"note: other programs used {found.other_cpu_share:.0%} of the CPU meanwhile; "
            "on an idle machine the run is faster"
        )
    return lines


def _interval(found: "RunEstimate") -> tuple[float, float]:
    return max(0.0, found.seconds - found.error_seconds), found.seconds + found.error_seconds


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 120:
        return f"{minutes:.1f} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
