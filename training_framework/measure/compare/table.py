"""A result as Markdown tables of at most 80 columns, and lines that say what follows."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training_framework.measure.compare.accuracy import accuracy_differences
from training_framework.measure.compare.result import Ratio, Result, VariantResult
from training_framework.measure.compare.statistics import Interval
from training_framework.measure.compare.validity import MARKS

__all__ = [
    "findings",
    "interval",
    "mark_reasons",
    "number",
    "points",
    "resource_columns",
    "result_lines",
    "setting_of",
    "speed_columns",
    "sweet_spot_line",
]

WIDTH = 80
SWEET_SPOT_TOLERANCE = 0.03
DETAILED_VARIANTS = 3

Column = tuple[str, Callable[[VariantResult], str]]


def result_lines(result: Result) -> list[str]:
    """A result as lines, both for a terminal and for Markdown.

    The table shows the marks of the validity gate; the lines below explain them.
    """
    measured = [variant for variant in result.variants if variant.measurements]
    lines = [f"## {result.experiment}", ""]
    if result.description:
        lines += [*textwrap.wrap(result.description, WIDTH), ""]
    lines += [*textwrap.wrap(setting_of(result), WIDTH), ""]
    if measured:
        lines += [*_table(speed_columns(result), measured), ""]
        lines += [*_table(resource_columns(measured), measured), ""]
    differences = accuracy_differences(result)
    if differences:
        compared = [variant for variant in measured if variant.name in differences]
        lines += [*_table(_accuracy_columns(differences), compared), ""]
    missing = [variant for variant in result.variants if variant.unavailable]
    for variant in missing:
        lines += _item(f"{variant.name}: not available here: {variant.unavailable}")
    lines += [""] if missing else []
    lines += _mark_lines(result)
    lines += [line for finding in findings(result) for line in _item(finding)]
    return lines if lines[-1] else lines[:-1]


def setting_of(result: Result) -> str:
    """Rounds, data, device and clock, in one line."""
    facts = next((variant.facts for variant in result.variants if variant.facts), None)
    parts = [f"{result.rounds} round(s)" + ("" if result.complete else ", not complete")]
    if facts is not None:
        made_up = "made-up" if facts.dataset == "synthetic" else "real"
        names = dict.fromkeys(v.facts.device_name for v in result.variants if v.facts)
        parts.append(f"{facts.dataset} ({made_up} images), {facts.image_size} px")
        parts.append(", ".join(names))
    parts.append(f"PyTorch {result.environment['versions']['torch']}")
    return "; ".join(parts) + f". The clock: {result.clock}."


def _table(columns: Sequence[Column], variants: Sequence[VariantResult]) -> list[str]:
    """Rows with aligned columns; names are shortened if the table would be too wide."""
    rows = [[title for title, _ in columns]]
    rows += [[cell(variant) for _, cell in columns] for variant in variants]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    excess = sum(widths) + 3 * len(widths) + 1 - WIDTH
    widths[0] = max(8, widths[0] - max(0, excess))

    def line(row: Sequence[str]) -> str:
        name = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
        cells = [name.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return [line(rows[0]), f"| {' | '.join(rule)} |", *(line(row) for row in rows[1:])]


def speed_columns(result: Result) -> list[Column]:
    """Name, median, ratio, accuracy and marks: each column's title and a function for its cells."""
    ratios = {ratio.variant: ratio for ratio in result.ratios}
    unit = result.variants[0].unit
    columns: list[Column] = [("variant", lambda variant: variant.name)]
    columns.append((unit, lambda variant: number(variant.median)))
    if unit != "images/s":
        columns.append(("images/s", lambda variant: number(variant.images_per_second)))
    columns.append(("speed [95%]", lambda v: interval(ratios[v.name]) if v.name in ratios else "1"))
    if any(variant.acc1 is not None for variant in result.variants):
        columns.append(("top-1", lambda variant: number(variant.acc1)))
    columns.append(("marks", lambda v: " ".join(MARKS[mark].letter for mark in v.marks) or "-"))
    return columns


def resource_columns(variants: Sequence[VariantResult]) -> list[Column]:
    """The columns for name, images a step, memory, cores, MFU and start."""
    columns: list[Column] = [
        ("variant", lambda variant: variant.name),
        ("images/step", lambda v: number(float(v.facts.images_per_step)) if v.facts else ""),
        ("peak MB", lambda variant: f"{(variant.peak_memory_bytes or 0) / 2**20:,.0f}"),
        ("cores", lambda variant: f"{variant.cpu_cores or 0:.2f}"),
    ]
    if any(variant.mfu is not None for variant in variants):
        columns.append(("MFU", lambda v: "n/a" if v.mfu is None else f"{v.mfu:.0%}"))
    if any(variant.startup_seconds is not None for variant in variants):
        columns.append(("start s", lambda variant: f"{variant.startup_seconds or 0:.1f}"))
        columns.append(("repaid", lambda v: number(v.repays_after_steps)))
    return columns


def _accuracy_columns(differences: Mapping[str, Interval]) -> list[Column]:
    return [
        ("variant", lambda variant: variant.name),
        ("top-1 against", lambda variant: variant.against),
        ("points [95%]", lambda variant: points(differences[variant.name])),
        ("pairs", lambda variant: str(differences[variant.name].pairs)),
    ]


def points(difference: Interval) -> str:
    """A difference of accuracies in percentage points."""
    if difference.low is None or difference.high is None:
        return f"{difference.median:+.2f} [one pair]"
    return f"{difference.median:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def number(value: float | None) -> str:
    """A number with at most four digits, or as a whole number from 1,000 on; `-` for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"


def interval(ratio: Ratio) -> str:
    """A ratio with its 95% interval."""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.median:.3f} [one pair]"
    return f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _mark_lines(result: Result) -> list[str]:
    """Each mark once, with the reasons for up to a few variants."""
    lines = []
    for detail in result.details:
        lines += _item(f"the whole comparison: {detail}")
    for mark, found in mark_reasons(result):
        reasons = [f"{name}: {reason}" for name, reason in found[:DETAILED_VARIANTS]]
        more = len(found) - len(reasons)
        if more > 0:
            reasons.append(f"{more} more, see the result file")
        lines += _item(f"{MARKS[mark].letter} = {mark}. {'; '.join(reasons)}")
    return [*lines, ""] if lines else []


def mark_reasons(result: Result) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each mark, with the rows that have it: their names and reasons."""
    marks = []
    for mark in MARKS:
        prefix = f"{mark}: "
        found = [
            (variant.name, detail.removeprefix(prefix))
            for variant in result.variants
            for detail in variant.details
            if detail.startswith(prefix)
        ]
        if found:
            marks.append((mark, found))
    return marks


def _precision(plan: Mapping[str, Any]) -> str:
    """The precision of a plan, with what fp32 is multiplied as where that is not fp32."""
    in_tf32 = plan["precision"] == "32" and plan.get("fp32_precision") == "tf32"
    return f"{plan['precision']}{' in TF32' if in_tf32 else ''}"


def findings(result: Result) -> list[str]:
    """What else a reader must know: other baselines, the peak behind MFU, the sweet spot."""
    against = {ratio.against for ratio in result.ratios}
    baseline = next((variant.name for variant in result.variants if not variant.against), "")
    findings = []
    if against - {baseline}:
        pairs = [f"{r.variant} against {r.against}" for r in result.ratios if r.against != baseline]
        findings.append(f"Not compared with {baseline}: {'; '.join(pairs)}.")
    peaks = dict.fromkeys(
        f"{v.peak_flops / 1e9:,.0f} GFLOP/s ({_precision(v.facts.plan)}, "
        f"{v.facts.peak_flops_source})"
        for v in result.variants
        if v.facts and v.peak_flops
    )
    if peaks:
        findings.append(f"MFU: share of {', '.join(peaks)}.")
    repaid = [v for v in result.variants if v.repays_after_steps is not None]
    if repaid:
        findings.append(
            "start s: seconds to build and warm up. repaid: steps after which a faster variant "
            "has made up for its longer start."
        )
    return [*findings, *([line] if (line := sweet_spot_line(result)) else [])]


def sweet_spot_line(result: Result) -> str:
    """The smallest batch within 3% of the best throughput, and the first that runs out of memory.

    Empty unless the variants differ only in their batch size.
    """
    sweep = [v for v in result.variants if set(v.overrides) == {"batch_size"} and not v.control]
    measured = [v for v in sweep if v.median is not None and v.unit == "images/s"]
    if len(measured) < 2:
        return ""
    best = max(v.median or 0.0 for v in measured)
    near = [v for v in measured if (v.median or 0.0) >= (1 - SWEET_SPOT_TOLERANCE) * best]
    spot = min(near, key=lambda variant: variant.overrides["batch_size"])
    line = (
        f"Sweet spot: batch {spot.overrides['batch_size']} with {number(spot.median)} images/s, "
        f"the smallest within {SWEET_SPOT_TOLERANCE:.0%} of the best ({number(best)}). Larger "
        "batches need more memory and are hardly faster."
    )
    full = [v.overrides["batch_size"] for v in sweep if v.unavailable.startswith("out of memory")]
    return line + (f" Batch {min(full)} runs out of memory." if full else "")


def _item(text: str) -> list[str]:
    return textwrap.wrap(f"- {text}", WIDTH, subsequent_indent="  ", break_long_words=False)
