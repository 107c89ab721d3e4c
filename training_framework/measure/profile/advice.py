"""From measurements to a verdict, and to the next setting to change."""

from dataclasses import dataclass

from training_framework.data.facts import DatasetFacts
from training_framework.machine.hardware import Hardware
from training_framework.measure.profile.ceilings import Ceilings, Limit, find_limit
from training_framework.plan import TrainPlan

__all__ = ["Verdict", "give_verdict"]

LARGE_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What limits a run, and what to do about it.

    Attributes:
        limit: `loader-bound`, `launch-bound` or `compute-bound`.
        figures: The measurements behind it, in words.
        next_step: What to try next.
    """

    limit: Limit
    figures: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.limit}: {self.figures}; next: {self.next_step}"


def give_verdict(
    ceilings: Ceilings,
    shares: dict[str, float],
    *,
    plan: TrainPlan,
    facts: DatasetFacts,
    hardware: Hardware,
    bottleneck: str = "",
) -> Verdict:
    """Judge a run.

    Args:
        ceilings: As measured.
        shares: Shares of the phases of a step.
        plan: The run's plan.
        facts: The data.
        hardware: The machine.
        bottleneck: The operator that takes the most time, in words.
    """
    limit = find_limit(ceilings, shares["data"])
    if limit == "loader-bound":
        return Verdict(
            limit=limit,
            figures=f"{ceilings.both:,.0f} of a possible {ceilings.model:,.0f} images/s "
            f"(the loader alone: {ceilings.loader:,.0f})",
            next_step=_for_loader(plan, facts, hardware, ceilings),
        )
    if limit == "launch-bound":
        assert ceilings.device_busy is not None
        return Verdict(
            limit=limit,
            figures=f"{ceilings.both:,.0f} images/s with the device computing for "
            f"{100 * ceilings.device_busy:.0f}% of the time and waiting for the host otherwise",
            next_step=_for_launches(plan),
        )
    return Verdict(
        limit=limit,
        figures=f"{ceilings.both:,.0f} images/s, while the loader alone reaches "
        f"{ceilings.loader:,.0f}",
        next_step=_for_computing(plan, hardware, shares, bottleneck),
    )


def _for_loader(
    plan: TrainPlan, facts: DatasetFacts, hardware: Hardware, ceilings: Ceilings
) -> str:
    cores = hardware.cores
    # Two processes can share a core while they wait for a disk or a copy, but not beside training.
    most = cores if plan.device == "cpu" else 2 * cores
    wanted = round(plan.num_workers * ceilings.model / max(ceilings.loader, 1e-9))
    workers = min(most, max(plan.num_workers + 1, wanted))
    return _first(
        (facts.storage == "loader", "raise num_workers of your own DataLoader"),
        (
            plan.resident_data,
            "raise batch_size: each batch of resident data has a fixed cost",
        ),
        (
            facts.storage == "arrays" and facts.array_bytes < hardware.memory_bytes / 4,
            f"set resident_data: true ({facts.array_bytes / 2**20:,.0f} MB stay on the device)",
        ),
        (plan.num_workers == 0, "set num_workers: 1 or more, to load beside the training"),
        (plan.num_workers < most, f"raise num_workers from {plan.num_workers} to {workers}"),
        (
            facts.storage == "files",
            f"store the images smaller, near {plan.image_size} px: decoding takes all "
            f"{cores} core(s)",
        ),
        otherwise=f"give the process more than {cores} core(s), or set resident_data: true",
    )


def _for_launches(plan: TrainPlan) -> str:
    one_launch = "reduce-overhead (one launch for many kernels)"
    return _first(
        (not plan.compile, f"set compile: true with compile_mode: {one_launch}"),
        (
            plan.compile_mode not in ("reduce-overhead", "max-autotune"),
            f"set compile_mode: {one_launch}",
        ),
        otherwise=f"raise batch_size from {plan.global_batch_size}: larger kernels, and no more "
        "launches",
    )


def _for_computing(
    plan: TrainPlan,
    hardware: Hardware,
    shares: dict[str, float],
    bottleneck: str,
) -> str:
    half_is_fast = (
        hardware.cpu_bf16_pays if plan.device == "cpu" else plan.device in ("cuda", "xpu")
    )
    percent = {phase: f"{100 * share:.0f}%" for phase, share in shares.items()}
    blamed = f" ({bottleneck})" if bottleneck else ""
    return _first(
        (
            plan.precision == "32" and half_is_fast,
            "set precision: mixed (this device is fast in half precision)",
        ),
        (
            plan.device == "cpu" and plan.threads < hardware.cores,
            f"raise threads from {plan.threads} to {hardware.cores}, the number of cores",
        ),
        (not plan.channels_last and plan.device != "mps", "set channels_last: true"),
        (plan.activation_checkpointing, "set activation_checkpointing: false if the memory allows"),
        (
            shares["transform"] > LARGE_SHARE,
            f"use less augmentation: it takes {percent['transform']} of a step",
        ),
        (
            shares["logging"] > LARGE_SHARE,
            f"raise log_every_n_steps: metrics and logging take {percent['logging']} of a step",
        ),
        (
            shares["optimizer"] > LARGE_SHARE,
            f"raise batch_size or accumulate_grad_batches: the update takes "
            f"{percent['optimizer']} of a step",
        ),
        (plan.device == "cuda" and not plan.compile, "set compile: true (fewer, larger kernels)"),
        otherwise=f"only the arithmetic is left{blamed}: use a smaller model or img_size",
    )


def _first(*steps: tuple[bool, str], otherwise: str) -> str:
    """The first step that applies."""
    return next((step for applies, step in steps if applies), otherwise)
