"""A comparison as a section of the report: table, bars, sweep, curves, marks, environment."""

from collections.abc import Sequence

from training_framework.measure.compare.accuracy import accuracy_differences
from training_framework.measure.compare.result import Ratio, Result, VariantResult
from training_framework.measure.compare.table import points, sweet_spot_line
from training_framework.measure.report.charts import Bar, Series, bar_chart, line_chart
from training_framework.measure.report.page import (
    Cell,
    command_block,
    environment_list,
    notes,
    paragraph,
    table,
)

__all__ = ["comparison_section"]


def comparison_section(result: Result, *, alone: bool = True) -> str:
    """The section's HTML.

    Args:
        result: What is shown.
        alone: Whether command and environment are shown too; not where the result is part of
            another one's section.
    """
    parts = [
        paragraph(result.description),
        paragraph(_circumstances(result), soft=True),
        _table(result),
        notes(_remarks(result)),
        _ratio_bars(result),
        _accuracy_bars(result),
        _median_bars(result),
        _sweep_charts(result),
        _accuracy_chart(result),
    ]
    if alone:
        origin = {"started": result.started, "commit": result.commit}
        parts += [
            command_block(result.command),
            environment_list({**result.environment, **origin}),
        ]
    return "".join(parts)


def _circumstances(result: Result) -> str:
    facts = next((variant.facts for variant in result.variants if variant.facts), None)
    rounds = f"{result.rounds} round{'' if result.rounds == 1 else 's'}"
    parts = [rounds + ("" if result.complete else ", not complete")]
    if facts is not None:
        kind = "made-up" if facts.dataset == "synthetic" else "real"
        parts.append(f"{facts.dataset} ({kind} images), {facts.image_size} px")
        names = dict.fromkeys(v.facts.device_name for v in result.variants if v.facts)
        parts.append(", ".join(names))
    return "; ".join(parts) + f". The clock: {result.clock}."


def _table(result: Result) -> str:
    """The variants; those without a sample stand there with their reason."""
    variants = result.variants
    unit = variants[0].unit
    has_accuracy = any(variant.acc1 is not None for variant in variants)
    has_mfu = any(variant.mfu is not None for variant in variants)
    has_start = any(variant.startup_seconds is not None for variant in variants)
    titles = ["variant", f"median {unit}", "speed [95%]"]
    titles += ["images/s"] if unit != "images/s" else []
    titles += ["top-1 %"] if has_accuracy else []
    titles += ["peak MiB", "CPU cores"]
    titles += ["MFU"] if has_mfu else []
    titles += ["start s"] if has_start else []
    titles += ["marks"]
    rows: list[Sequence[Cell | str]] = []
    for variant in variants:
        if not variant.measurements:
            rows.append((variant.name, f"not available here: {variant.unavailable or 'not run'}"))
            continue
        cells: list[Cell | str] = [variant.name, _number(variant.median), _speed(result, variant)]
        cells += [_number(variant.images_per_second)] if unit != "images/s" else []
        cells += [_number(variant.acc1)] if has_accuracy else []
        memory = variant.peak_memory_bytes
        cells.append("-" if memory is None else f"{memory / 2**20:,.0f}")
        cells.append("-" if variant.cpu_cores is None else f"{variant.cpu_cores:.2f}")
        cells += ["n/a" if variant.mfu is None else f"{variant.mfu:.0%}"] if has_mfu else []
        start = variant.startup_seconds
        cells += ["-" if start is None else f"{start:.1f}"] if has_start else []
        cells.append(Cell("-", tuple((mark, _detail(variant, mark)) for mark in variant.marks)))
        rows.append(cells)
    return table(titles, rows)


def _detail(variant: VariantResult, mark: str) -> str:
    found = (detail for detail in variant.details if detail.startswith(f"{mark}:"))
    return next(found, mark)


def _speed(result: Result, variant: VariantResult) -> str:
    ratio = result.ratio_of(variant.name)
    if ratio is not None:
        return _interval(ratio)
    return "1 (baseline)" if not variant.against else "-"


def _interval(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.median:.3f}× (one pair)"
    return f"{ratio.median:.3f}× [{ratio.low:.3f}, {ratio.high:.3f}]"


def _remarks(result: Result) -> list[str]:
    """What the marks rest on, what broke off, and the sweet spot of a sweep."""
    lines = [f"the whole comparison: {detail}" for detail in result.details]
    lines += [f"{v.name}: {detail}" for v in result.variants for detail in v.details]
    lines += [
        f"{v.name}: broke off: {v.unavailable}"
        for v in result.variants
        if v.unavailable and v.measurements
    ]
    return [*lines, *([line] if (line := sweet_spot_line(result)) else [])]


def _ratio_bars(result: Result) -> str:
    bars = [
        Bar(
            label=ratio.variant,
            note=f"against {ratio.against}",
            text=_interval(ratio),
            value=ratio.median,
            low=ratio.low,
            high=ratio.high,
            faint=ratio.control,
        )
        for ratio in result.ratios
    ]
    title = "Speed, with its 95% interval (longer is faster, 1 is equal)"
    return bar_chart(bars, title=title, reference=1.0)


def _accuracy_bars(result: Result) -> str:
    against = {variant.name: variant.against for variant in result.variants}
    bars = [
        Bar(
            label=name,
            note=f"against {against[name]}",
            text=points(difference),
            value=difference.median,
            low=difference.low,
            high=difference.high,
        )
        for name, difference in accuracy_differences(result).items()
    ]
    title = "Top-1 accuracy in points against another row over seeds, with its 95% interval"
    return bar_chart(bars, title=title, reference=0.0)


def _median_bars(result: Result) -> str:
    bars = [
        Bar(
            label=variant.name,
            text=f"{_number(variant.median)} {variant.unit}",
            value=variant.median,
            dots=tuple(sample for sample in variant.samples if sample is not None),
            faint=variant.control,
        )
        for variant in result.variants
        if variant.median is not None
    ]
    unit = result.variants[0].unit
    return bar_chart(bars, title=f"Median in {unit}; each dot is one sample")


def _sweep_charts(result: Result) -> str:
    """Throughput and memory, where the variants differ in one number alone."""
    variants = [variant for variant in result.variants if not variant.control]
    keys = {key for variant in variants for key in variant.overrides}
    if len(keys) != 1:
        return ""
    (key,) = keys
    # The baseline may leave the key as it is in the base.
    points = [
        (float(variant.config[key]), variant.images_per_second, variant.peak_memory_bytes or 0)
        for variant in variants
        if variant.images_per_second and _is_positive_number(variant.config.get(key))
    ]
    points.sort()
    if len(points) < 2:
        return ""
    name = key.replace("_", " ")
    speeds = tuple((x, speed) for x, speed, _ in points)
    memory = tuple((x, held / 2**20) for x, _, held in points)
    return "".join(
        line_chart(
            [Series(label=label, points=values, color=0)],
            title=f"{label} over {name}",
            x_title=name,
            y_title=unit,
            doubling_x=True,
            from_zero=True,
        )
        for label, unit, values in (
            ("Throughput", "images/s", speeds),
            ("Peak memory", "MiB", memory),
        )
    )


def _is_positive_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _accuracy_chart(result: Result) -> str:
    series = [
        Series(label=variant.name, points=tuple(measurement.curve), color=number)
        for number, variant in enumerate(result.variants)
        for measurement in variant.measurements
    ]
    return line_chart(
        series,
        title="Accuracy over time, one line a run",
        x_title="seconds since the start of training",
        y_title="top-1, percent",
        target=result.target_accuracy,
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"
