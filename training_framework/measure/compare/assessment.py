"""From raw samples to a result: values, medians, ratios with intervals, marks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training_framework.config.loading import config_to_dict
from training_framework.measure.compare import timing, training_runs
from training_framework.measure.compare.experiment import CONTROL, Experiment, Variant
from training_framework.measure.compare.result import (
    Measurement,
    Ratio,
    Result,
    VariantFacts,
    VariantResult,
)
from training_framework.measure.compare.statistics import paired_ratio, relative_spread
from training_framework.measure.compare.validity import (
    Mark,
    control_marks,
    pair_marks,
    variant_marks,
    work_marks,
)

__all__ = ["Records", "VariantRecord", "assess"]


@dataclass
class VariantRecord:
    """What is known about one variant so far."""

    facts: VariantFacts | None = None
    measurements: list[Measurement] = field(default_factory=list)
    unavailable: str = ""


Records = Mapping[str, VariantRecord]


def assess(
    experiment: Experiment,
    records: Records,
    *,
    finished_rounds: int,
    **origin: Any,
) -> Result:
    """The result of the finished rounds.

    Args:
        experiment: What is compared.
        records: By variant name, including the control.
        finished_rounds: Samples of later rounds are left out.
        **origin: The remaining fields of `Result`: command, started, commit, environment.
    """
    target = _target(experiment, records, finished_rounds)
    peaks = _peak_flops(records)
    probes = [s for r in records.values() for m in r.measurements for s in m.probe_seconds or ()]
    fastest_probe = min(probes, default=None)
    variants = [
        _variant_result(
            experiment,
            variant,
            records[variant.name],
            finished_rounds=finished_rounds,
            targets=target,
            peaks=peaks,
            fastest_probe=fastest_probe,
        )
        for variant in experiment.all_variants()
    ]
    ratios = _compared(variants, experiment.may_differ)
    control = next((ratio for ratio in ratios if ratio.control), None)
    marks = control_marks(control)
    if control is None:  # a control's mark would cover all pairs
        marks += pair_marks(ratios)
    return Result(
        experiment=experiment.name,
        description=experiment.description,
        definition=experiment.model_dump(mode="json"),
        clock=timing.CLOCK if experiment.measure == "steps" else training_runs.CLOCK,
        complete=finished_rounds >= experiment.rounds,
        rounds=finished_rounds,
        marks=[mark.name for mark in marks],
        details=[f"{mark.name}: {mark.detail}" for mark in marks],
        target_accuracy=_overall_target(target),
        variants=variants,
        ratios=ratios,
        **origin,
    )


def _compared(variants: Sequence[VariantResult], may_differ: Sequence[str]) -> list[Ratio]:
    """Each variant's ratio to the one that it is compared with; marks other work than that's."""
    by_name = {variant.name: variant for variant in variants}
    ratios = []
    for variant in variants:
        other = by_name.get(variant.against)
        if other is None:
            continue
        ratio = _ratio(variant, other)
        if ratio is not None:
            ratios.append(ratio)
            variant.repays_after_steps = _repays_after(variant, other)
        if variant.facts and other.facts and variant.measurements and other.measurements:
            _add_marks(variant, work_marks(variant.facts, variant.measurements, other.facts,
                       other.measurements, may_differ))  # fmt: skip
    return ratios


def _add_marks(variant: VariantResult, marks: Sequence[Mark]) -> None:
    variant.marks = list(dict.fromkeys([*variant.marks, *(mark.name for mark in marks)]))
    variant.details += [f"{mark.name}: {mark.detail}" for mark in marks]


def _variant_result(
    experiment: Experiment,
    variant: Variant,
    record: VariantRecord,
    *,
    finished_rounds: int,
    targets: Mapping[int, float],
    peaks: Mapping[str, float],
    fastest_probe: float | None,
) -> VariantResult:
    measurements = [m for m in record.measurements if m.round < finished_rounds]
    samples = [_value(experiment, m, targets) for m in measurements]
    values = [sample for sample in samples if sample is not None]
    result = VariantResult(
        name=variant.name,
        overrides=variant.overrides,
        environment=variant.environment,
        against=experiment.reference_of(variant)
        if variant.name != CONTROL
        else experiment.baseline_variant.name,
        control=variant.name == CONTROL,
        unit=_unit(experiment, _overall_target(targets)),
        samples=samples,
        median=_median(values),
        spread=relative_spread(values) if len(values) > 1 else None,
        unavailable=record.unavailable,
        config=config_to_dict(experiment.config_of(variant)),
        facts=record.facts,
        measurements=measurements,
    )
    if measurements and record.facts is not None:
        _add_medians(result, record.facts, peaks[_peak_kind(record.facts)])
        _add_marks(result, variant_marks(measurements, samples, fastest_probe=fastest_probe))
    return result


def _value(
    experiment: Experiment, measurement: Measurement, targets: Mapping[int, float]
) -> float | None:
    """The sample's value in the experiment's unit."""
    if experiment.measure == "steps":
        return measurement.images / measurement.seconds
    if experiment.measure == "epoch":
        return float(np.median(measurement.epoch_seconds))
    if experiment.target_accuracy is None:
        return measurement.seconds
    target = targets.get(measurement.round)
    if target is None:
        return None
    reached = (seconds for seconds, acc1 in measurement.curve if acc1 >= target)
    return next(reached, None)


def _unit(experiment: Experiment, target: float | None) -> str:
    if experiment.measure != "accuracy":
        return {"steps": "images/s", "epoch": "s/epoch"}[experiment.measure]
    if experiment.target_accuracy is None:
        return "s"
    return f"s to {target:.1f}%" if target is not None else "s to equal accuracy"


def _target(experiment: Experiment, records: Records, rounds: int) -> dict[int, float]:
    """The target accuracy of each round; `equal` is known when all variants have trained."""
    wanted = experiment.target_accuracy
    if wanted is None:
        return {}
    if wanted != "equal":
        return dict.fromkeys(range(rounds), float(wanted))
    targets: dict[int, float] = {}
    for record in records.values():
        for measurement in record.measurements:
            best = max((acc1 for _, acc1 in measurement.curve), default=0.0)
            number = measurement.round
            targets[number] = min(best, targets.get(number, math.inf))
    return targets


def _overall_target(targets: Mapping[int, float]) -> float | None:
    return _median(list(targets.values()))


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _peak_kind(facts: VariantFacts) -> str:
    """What a peak applies to: the device, its threads and the precision."""
    threads = facts.plan["threads"] if facts.device == "cpu" else ""
    products = facts.plan.get("fp32_precision", "")  # older result files have none
    return f"{facts.device_name} {threads} {facts.plan['precision']} {products}"


def _peak_flops(records: Records) -> dict[str, float]:
    """The highest peak measured for each kind, since a busy machine measures too low."""
    peaks: dict[str, float] = {}
    for record in records.values():
        if record.facts is not None:
            kind = _peak_kind(record.facts)
            peaks[kind] = max(peaks.get(kind, 0.0), record.facts.peak_flops)
    return peaks


def _add_medians(result: VariantResult, facts: VariantFacts, peak_flops: float) -> None:
    measurements = result.measurements
    speed = _median([m.images / m.seconds for m in measurements])
    assert speed is not None
    result.images_per_second = speed
    result.peak_memory_bytes = max(m.peak_memory_bytes for m in measurements)
    result.cpu_cores = _median([m.cpu_seconds / m.seconds for m in measurements])
    result.acc1 = _median([m.acc1 for m in measurements if m.acc1 is not None])
    if peak_flops:
        result.peak_flops = peak_flops
        result.mfu = speed * facts.flops_per_image / peak_flops
    steps = [seconds for m in measurements for seconds in m.step_seconds]
    if steps:
        settled = len(facts.warmup_step_seconds) * float(np.median(steps))
        extra = max(0.0, sum(facts.warmup_step_seconds) - settled)
        result.startup_seconds = facts.build_seconds + extra


def _ratio(variant: VariantResult, other: VariantResult) -> Ratio | None:
    """Speed of the variant over speed of the other, over the rounds in which both have a sample."""
    ours, theirs = (_samples_by_round(result) for result in (variant, other))
    rounds = sorted(ours.keys() & theirs.keys())
    if not rounds:
        return None
    pairs = [[ours[number] for number in rounds], [theirs[number] for number in rounds]]
    if variant.unit != "images/s":  # less time is more speed
        pairs.reverse()
    processes = {m.round: m.process for m in variant.measurements}
    clusters = [processes[number] for number in rounds]
    interval = paired_ratio(*pairs, clusters=clusters if len(set(clusters)) > 1 else None)
    return Ratio(
        variant=variant.name,
        against=other.name,
        median=interval.median,
        low=interval.low,
        high=interval.high,
        pairs=interval.pairs,
        control=variant.control,
    )


def _samples_by_round(result: VariantResult) -> dict[int, float]:
    return {
        measurement.round: sample
        for measurement, sample in zip(result.measurements, result.samples, strict=True)
        if sample is not None
    }


def _repays_after(variant: VariantResult, other: VariantResult) -> int | None:
    """Steps (of equally many images) after which a faster variant makes up for a longer start."""
    if variant.startup_seconds is None or other.startup_seconds is None or variant.facts is None:
        return None
    assert variant.images_per_second is not None and other.images_per_second is not None
    images = variant.facts.images_per_step
    gain = images / other.images_per_second - images / variant.images_per_second
    later = variant.startup_seconds - other.startup_seconds
    return math.ceil(later / gain) if gain > 0 and later > 0 else None
