"""Differences in accuracy between the variants of a comparison of whole trainings."""

from training_framework.measure.compare.result import Result, VariantResult
from training_framework.measure.compare.statistics import Interval, paired_difference

__all__ = ["accuracy_differences"]


def accuracy_differences(result: Result) -> dict[str, Interval]:
    """Differences in final top-1 accuracy between variants and their references, in points.

    Runs of one round have the same seed and form a pair. Only comparisons that measure `accuracy`
    have differences: the others train the same seed again and again, which says nothing of chance.

    Returns:
        The difference of each variant; variants without a pair are left out.
    """
    if result.definition.get("measure") != "accuracy":
        return {}
    reached = {variant.name: _reached(variant) for variant in result.variants}
    differences = {}
    for variant in result.variants:
        ours, theirs = reached[variant.name], reached.get(variant.against, {})
        rounds = sorted(ours.keys() & theirs.keys())
        if rounds:
            differences[variant.name] = paired_difference(
                [ours[number] for number in rounds], [theirs[number] for number in rounds]
            )
    return differences


def _reached(variant: VariantResult) -> dict[int, float]:
    return {m.round: m.acc1 for m in variant.measurements if m.acc1 is not None}
