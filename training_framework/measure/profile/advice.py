"""From measurements to a verdict, and to the next setting to change.

Advice that names settings is only given if the configuration accepts them, and if the plan on this
machine then follows them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training_framework.config.loading import load_config
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.machine.hardware import Hardware
from training_framework.measure.profile.ceilings import Ceilings, Limit, find_limit
from training_framework.plan import TrainPlan, make_plan
from training_framework.switches.arithmetic import TRITON_FROM_CAPABILITY

__all__ = ["Run", "Suggestion", "Verdict", "give_verdict"]

LARGE_SHARE = 0.15
MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Something to try.

    Attributes:
        text: In words.
        settings: The settings to change; empty if it is not a matter of settings.
    """

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_Step = tuple[bool, Suggestion]
"""Whether a suggestion applies, and the suggestion."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What advice is for.

    Attributes:
        settings: Plain values of the configuration, by key.
        plan: The run's plan.
        facts: The data.
        hardware: The machine.
    """

    settings: Mapping[str, Any]
    plan: TrainPlan
    facts: DatasetFacts
    hardware: Hardware

    def plan_with(self, **changes: Any) -> TrainPlan | None:
        """The plan with other settings; None if they are refused."""
        loader = self.facts.storage == "loader"
        try:
            return make_plan(
                load_config(overrides={**self.settings, **changes}),
                self.hardware,
                self.facts,
                batches_per_epoch=self.plan.batches_per_epoch if loader else None,
                own_network=self.plan.own_network,
            )
        except UserError:
            return None

    def can_follow(self, suggestion: Suggestion) -> bool:
        """Whether the configuration accepts the settings, and the plan then follows them."""
        changes = suggestion.settings
        new = self.plan_with(**changes)
        if new is None:
            return False
        chosen = new.switch_values()
        return all(chosen.get(k, v) == v for k, v in changes.items() if isinstance(v, bool))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What limits a run, and what to do about it.

    Attributes:
        limit: `loader-bound`, `launch-bound` or `compute-bound`.
        figures: The measurements behind it, in words.
        next_step: What to try next, in words.
        settings: The settings to change for it; empty if it is not a matter of settings.
    """

    limit: Limit
    figures: str
    next_step: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.limit}: {self.figures}; next: {self.next_step}"


def give_verdict(
    ceilings: Ceilings, shares: Mapping[str, float], *, run: Run, bottleneck: str = ""
) -> Verdict:
    """Judge a run.

    Args:
        ceilings: As measured.
        shares: Shares of the phases of a step.
        run: The run.
        bottleneck: The operator that takes the most time, in words.
    """
    limit = find_limit(ceilings, shares["data"])
    if limit == "loader-bound":
        figures = (
            f"{ceilings.both:,.0f} of a possible {ceilings.model:,.0f} images/s "
            f"(the loader alone: {ceilings.loader:,.0f})"
        )
        next_step = _for_loader(run, ceilings)
    elif limit == "launch-bound":
        assert ceilings.device_busy is not None
        figures = (
            f"{ceilings.both:,.0f} images/s with the device computing for "
            f"{100 * ceilings.device_busy:.0f}% of the time and waiting for the host otherwise"
        )
        next_step = _for_launches(run)
    else:
        figures = (
            f"{ceilings.both:,.0f} images/s, while the loader alone reaches {ceilings.loader:,.0f}"
        )
        next_step = _for_computing(run, shares, bottleneck)
    return Verdict(
        limit=limit, figures=figures, next_step=next_step.text, settings=dict(next_step.settings)
    )


def _for_loader(run: Run, ceilings: Ceilings) -> Suggestion:
    plan, facts, cores = run.plan, run.facts, run.hardware.cores
    # Two processes can share a core while they wait for a disk or a copy, but not beside training.
    most = cores if plan.device == "cpu" else 2 * cores
    wanted = round(plan.num_workers * ceilings.model / max(ceilings.loader, 1e-9))
    workers = min(most, max(plan.num_workers + 1, wanted))
    return _first(
        run,
        (facts.storage == "loader", _advice("raise num_workers of your own DataLoader")),
        (
            plan.resident_data,
            _advice(
                "raise batch_size: each batch of resident data has a fixed cost",
                batch_size=2 * plan.global_batch_size,
            ),
        ),
        (
            facts.storage == "arrays" and facts.array_bytes < run.hardware.memory_bytes / 4,
            _advice(
                f"set resident_data: true ({facts.array_bytes / 2**20:,.0f} MB stay on the device)",
                resident_data=True,
            ),
        ),
        (
            plan.num_workers == 0,
            _advice(
                "set num_workers: 1 or more, to load beside the training", num_workers=max(1, cores)
            ),
        ),
        (
            plan.num_workers < most,
            _advice(f"raise num_workers from {plan.num_workers} to {workers}", num_workers=workers),
        ),
        (
            facts.storage == "files",
            _advice(
                f"store the images smaller, near {plan.image_size} px: decoding takes all "
                f"{cores} core(s)"
            ),
        ),
        otherwise=f"give the process more than {cores} core(s), or let more images of a batch "
        "share their cost: raise batch_size",
    )


def _for_launches(run: Run) -> Suggestion:
    plan = run.plan
    once = "one launch for the whole step"
    records_parts = run.settings["compile_mode"] in MODES_WITH_GRAPHS
    one_launch = "reduce-overhead (one launch for many kernels)"
    return _first(
        run,
        (
            not plan.cuda_graph and not records_parts,
            _advice(f"set cuda_graph: true ({once})", cuda_graph=True),
        ),
        (
            not plan.cuda_graph and records_parts,
            _advice(
                f"set cuda_graph: true ({once}) with compile_mode: default",
                cuda_graph=True,
                compile_mode="default",
            ),
        ),
        (
            plan.cuda_graph and not plan.compile and _compiles(run),
            _advice(
                "set compile: true with compile_mode: default (fewer, larger kernels in the graph)",
                compile=True,
                compile_mode="default",
            ),
        ),
        (
            not plan.compile and _compiles(run),
            _advice(
                f"set compile: true with compile_mode: {one_launch}",
                compile=True,
                compile_mode="reduce-overhead",
            ),
        ),
        (
            plan.compile and plan.compile_mode not in MODES_WITH_GRAPHS,
            _advice(
                f"set compile_mode: {one_launch}", compile=True, compile_mode="reduce-overhead"
            ),
        ),
        otherwise=f"raise batch_size from {plan.global_batch_size}: larger kernels, and no more "
        "launches",
    )


def _compiles(run: Run) -> bool:
    """Whether torch.compile can work here; a run for which it was asked does not check that."""
    if run.plan.device != "cuda":
        return True
    capability = run.hardware.usable[0].capability
    return not run.hardware.triton_fault and (
        capability is None or capability >= TRITON_FROM_CAPABILITY
    )


def _for_computing(run: Run, shares: Mapping[str, float], bottleneck: str) -> Suggestion:
    plan, hardware = run.plan, run.hardware
    blamed = f" ({bottleneck})" if bottleneck else ""
    return _first(
        run,
        (
            plan.precision == "32" and _left_to_the_plan(run, "precision") != "32",
            _advice(
                "set precision: mixed (this device is fast in half precision)", precision="mixed"
            ),
        ),
        (
            plan.device == "cpu" and plan.threads < hardware.cores,
            _advice(
                f"raise threads from {plan.threads} to {hardware.cores}, the number of cores",
                threads=hardware.cores,
            ),
        ),
        (
            not plan.channels_last and bool(_left_to_the_plan(run, "channels_last")),
            _advice("set channels_last: true", channels_last=True),
        ),
        (
            plan.activation_checkpointing,
            _advice(
                "set activation_checkpointing: false if the memory allows",
                activation_checkpointing=False,
            ),
        ),
        *_for_large_shares(plan, shares),
        (
            plan.device == "cuda" and not plan.compile and _compiles(run),
            _advice("set compile: true (fewer, larger kernels)", compile=True),
        ),
        otherwise=f"only the arithmetic is left{blamed}: use a smaller model or img_size",
    )


def _for_large_shares(plan: TrainPlan, shares: Mapping[str, float]) -> list[_Step]:
    """Steps against phases beside the network's own that take much of the time."""
    percent = {phase: f"{100 * share:.0f}%" for phase, share in shares.items()}
    return [
        (
            shares["transform"] > LARGE_SHARE,
            _advice(f"use less augmentation: it takes {percent['transform']} of a step"),
        ),
        (
            shares["logging"] > LARGE_SHARE,
            _advice(
                f"raise log_every_n_steps: metrics and logging take {percent['logging']} of a step",
                log_every_n_steps=2 * plan.log_every_n_steps,
            ),
        ),
        (
            shares["optimizer"] > LARGE_SHARE,
            _advice(
                f"raise batch_size or accumulate_grad_batches: the update takes "
                f"{percent['optimizer']} of a step",
                batch_size=2 * plan.global_batch_size,
            ),
        ),
    ]


def _left_to_the_plan(run: Run, key: str) -> Any:
    """What the plan would choose for a setting by itself: what is fast on this machine."""
    plan = run.plan_with(**{key: "auto"})
    return getattr(run.plan if plan is None else plan, key)


def _advice(text: str, **settings: Any) -> Suggestion:
    return Suggestion(text=text, settings=settings)


def _first(run: Run, *steps: _Step, otherwise: str) -> Suggestion:
    """The first step that applies and that the run can follow."""
    return next(
        (step for applies, step in steps if applies and run.can_follow(step)),
        Suggestion(text=otherwise),
    )
