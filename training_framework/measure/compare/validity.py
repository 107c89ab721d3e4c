"""The validity gate: reasons not to trust a comparison. Each finding is a mark."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from training_framework.measure.compare.quiet import QUIET
from training_framework.measure.compare.result import Measurement, Ratio, VariantFacts
from training_framework.measure.compare.statistics import (
    FEWEST_PAIRS,
    Interval,
    control_holds,
    has_settled,
    relative_spread,
)

__all__ = ["MARKS", "Mark", "control_marks", "pair_marks", "variant_marks", "work_marks"]

WIDE_SPREAD = 0.05
BUSY_SHARE = 0.05
CONTROL_TOLERANCE = 0.05


class MarkKind(NamedTuple):
    """A mark's letter in narrow tables, and its meaning."""

    letter: str
    meaning: str


MARKS = {
    "recompiled": MarkKind("R", "torch.compile made a graph within a timed window"),
    "busy machine": MarkKind("B", "other work used the processor during the samples"),
    "wide spread": MarkKind("S", f"the middle half of the samples spans over {WIDE_SPREAD:.0%}"),
    "warm-up": MarkKind("W", "the first third of the timed steps is slower than the rest"),
    "different work": MarkKind(
        "D", "the row does not do the same work as the row it is compared with"
    ),
    "few pairs": MarkKind("F", f"there are fewer than {FEWEST_PAIRS} pairs"),
    "target missed": MarkKind("T", "a run ended below the target accuracy; no pair includes it"),
    "control": MarkKind("C", "the baseline differs from itself, or this was not measured"),
}
"""Each mark's letter and meaning."""


class Mark(NamedTuple):
    """A mark from `MARKS`, and its reason in words."""

    name: str
    detail: str


def variant_marks(
    measurements: Sequence[Measurement],
    samples: Sequence[float | None],
    *,
    fastest_probe: float | None = None,
) -> list[Mark]:
    """The marks that follow from one variant's own samples.

    Args:
        measurements: Measurements of the finished rounds.
        samples: The values computed from them.
        fastest_probe: Seconds of the fastest probe of the whole comparison.
    """
    marks = []
    recompiled = [m.round + 1 for m in measurements if m.new_graphs]
    if recompiled:
        rounds = ", ".join(map(str, recompiled))
        graphs = sum(m.new_graphs for m in measurements)
        marks.append(
            Mark("recompiled", f"{graphs} graph(s) compiled in the timed window of round {rounds}")
        )
    busy = [m.other_cpu_share for m in measurements]
    if busy and (share := sum(busy) / len(busy)) > BUSY_SHARE:
        marks.append(Mark("busy machine", f"other processes took {share:.0%} of the cores, "
                          f"{max(busy):.0%} in the worst round"))  # fmt: skip
    elif fastest_probe is not None and (slowed := _slowdown(measurements, fastest_probe)) > QUIET:
        marks.append(
            Mark("busy machine", f"around the samples a fixed task took {slowed:.2f} times as long "
                 "as at its fastest: others outside this system share its cores")
        )  # fmt: skip
    values = [sample for sample in samples if sample is not None]
    if len(values) > 1 and (spread := relative_spread(values)) > WIDE_SPREAD:
        marks.append(
            Mark("wide spread", f"the middle half of the samples spans {spread:.1%} of the median")
        )
    if not has_settled([m.step_seconds for m in measurements if m.step_seconds]):
        marks.append(
            Mark("warm-up", "the first third of the timed steps is slower than the rest; "
                 "raise warmup_steps")
        )  # fmt: skip
    missed = len(samples) - len(values)
    if missed:
        marks.append(Mark("target missed", f"{missed} of {len(samples)} runs missed the target"))
    return marks


def _slowdown(measurements: Sequence[Measurement], fastest_probe: float) -> float:
    """The median of the samples' slower probes, divided by the fastest probe of all."""
    slower = [max(m.probe_seconds) for m in measurements if m.probe_seconds]
    return statistics.median(slower) / fastest_probe if slower else 1.0


def work_marks(
    facts: VariantFacts,
    measurements: Sequence[Measurement],
    other_facts: VariantFacts,
    other_measurements: Sequence[Measurement],
    may_differ: Sequence[str],
) -> list[Mark]:
    """Marks for work that differs from that of the variant that this one is compared with.

    The number of images is the one that was counted, whatever was planned.

    Args:
        may_differ: Kinds of work that differ on purpose: see `Experiment.may_differ`.
    """
    kinds: dict[str, tuple[float | str, float | str]] = {
        "images_per_step": (_images_per_step(measurements), _images_per_step(other_measurements)),
        "flops": (facts.flops_per_image, other_facts.flops_per_image),
        "image_size": (facts.image_size, other_facts.image_size),
        "dataset": (facts.dataset, other_facts.dataset),
    }
    return [
        Mark("different work", f"{kind.replace('_', ' ')}: {_shown(ours)} against {_shown(theirs)}")
        for kind, (ours, theirs) in kinds.items()
        if kind not in may_differ and ours != theirs
    ]


def _images_per_step(measurements: Sequence[Measurement]) -> float:
    steps = sum(measurement.steps for measurement in measurements)
    return round(sum(measurement.images for measurement in measurements) / max(1, steps), 3)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.6g}"


def pair_marks(ratios: Sequence[Ratio]) -> list[Mark]:
    """A mark for too few pairs, for a comparison without a control."""
    fewest = min((ratio.pairs for ratio in ratios), default=FEWEST_PAIRS)
    if fewest >= FEWEST_PAIRS:
        return []
    return [Mark("few pairs", f"{fewest} pair(s); a 95% interval needs {FEWEST_PAIRS}")]


def control_marks(ratio: Ratio | None) -> list[Mark]:
    """What the A/A control says about the comparison as a whole; None: there is no control."""
    if ratio is None:
        return [Mark("control", "no A/A control ran beside the variants")]
    if ratio.pairs < FEWEST_PAIRS:
        return pair_marks([ratio])
    interval = Interval(median=ratio.median, low=ratio.low, high=ratio.high, pairs=ratio.pairs)
    if control_holds(interval, tolerance=CONTROL_TOLERANCE):
        return []
    return [
        Mark(
            "control",
            f"the baseline differs from itself: {ratio.median:.3f} [{ratio.low:.3f}, "
            f"{ratio.high:.3f}] should contain 1 and stay within {CONTROL_TOLERANCE:.0%} of it",
        )
    ]
