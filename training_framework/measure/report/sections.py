"""What a report says about each kind of result: an answer in one sentence, then the evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training_framework.measure.compare.accuracy import accuracy_differences
from training_framework.measure.compare.result import Ratio, Result, VariantResult
from training_framework.measure.compare.table import (
    findings,
    interval,
    mark_reasons,
    number,
    points,
    resource_columns,
    setting_of,
    speed_columns,
)
from training_framework.measure.compare.validity import MARKS
from training_framework.measure.report.figures import Bar, BarChart, LineChart, Series
from training_framework.measure.report.sources import ProfileRecord, RunRecord, Source
from training_framework.measure.tune.result import Trial, TuningResult

__all__ = ["Section", "section_of"]

SECONDS = "seconds since the start of training"
MAX_TRIAL_BARS = 12


@dataclass(frozen=True, kw_only=True)
class Section:
    """A result as a report shows it.

    Attributes:
        heading: Its name.
        answer: The conclusion, in one sentence.
        lead: Paragraphs on what was measured.
        titles: Titles of the columns; the first column names the rows.
        rows: Cells of each row. A row of only two cells holds its name, and why it has no values.
        notes, bars, lines: Further evidence.
        parts: Results that belong to this one.
        command: The command that repeats it.
        environment: What it was measured on, as names and values.
    """

    heading: str
    answer: str
    titles: Sequence[str] = ("what", "value")
    rows: Sequence[Sequence[str]]
    lead: Sequence[str] = ()
    notes: Sequence[str] = ()
    bars: Sequence[BarChart] = ()
    lines: Sequence[LineChart] = ()
    parts: "Sequence[Section]" = ()
    command: str
    environment: Sequence[tuple[str, str]] = ()


def section_of(source: Source) -> Section:
    """The section for a result file."""
    if isinstance(source, Result):
        return _comparison(source)
    if isinstance(source, TuningResult):
        return _tuning(source)
    return _run(source) if isinstance(source, RunRecord) else _profile(source)


def _comparison(result: Result) -> Section:
    differences = accuracy_differences(result)
    ratios = [
        Bar(label=r.variant, note=f"against {r.against}", text=interval(r), value=r.median,
            low=r.low, high=r.high, faint=r.control)
        for r in sorted(result.ratios, key=lambda ratio: -ratio.median)
    ]  # fmt: skip
    accuracies = [
        Bar(label=name, text=points(d), value=d.median, low=d.low, high=d.high)
        for name, d in differences.items()
    ]
    measured = [variant for variant in result.variants if variant.measurements]
    columns = [*speed_columns(result)[:-1], *resource_columns(measured)[1:]]
    broken = [v for v in result.variants if v.unavailable and v.measurements]
    origin = {"started": result.started, "commit": result.commit}
    return Section(
        heading=result.experiment,
        answer=_answer(result),
        lead=(result.description, setting_of(result)),
        titles=[*(title for title, _ in columns), "marks"],
        rows=[
            [*(cell(v) for _, cell in columns), ", ".join(v.marks) or "-"]
            if v.measurements
            else [v.name, f"not available here: {v.unavailable or 'not run'}"]
            for v in _by_gain(result)
        ],
        notes=[
            *(f"the whole comparison: {detail}" for detail in result.details),
            *(
                f"{mark}: {MARKS[mark].meaning}. "
                + "; ".join(f"{name}: {reason}" for name, reason in reasons)
                for mark, reasons in mark_reasons(result)
            ),
            *(f"{variant.name}: stopped early: {variant.unavailable}" for variant in broken),
            *findings(result),
        ],
        bars=[
            BarChart(title="Speed, with its 95% interval (longer is faster, 1 is equal)",
                     bars=ratios, reference=1.0),
            BarChart(title="Top-1 accuracy in points against the row compared with, over seeds, "
                     "with its 95% interval", bars=accuracies, reference=0.0),
        ],
        lines=[*_sweep(result), _accuracy_over_time(result)],
        command=result.command,
        environment=_listed({**result.environment, **origin}),
    )  # fmt: skip


def _answer(result: Result) -> str:
    """The comparison's conclusion, based on whole intervals."""
    ratios = [ratio for ratio in result.ratios if not ratio.control]
    if not ratios:
        if result.ratios:
            control = result.ratios[0]
            return f"Run against itself, {control.against} is {_times(control)} as fast."
        return "Nothing can be compared yet."
    baseline = next((v.name for v in result.variants if not v.against), "")
    direct = [ratio for ratio in ratios if ratio.against == baseline] or ratios
    best = max(direct, key=lambda ratio: ratio.median)
    if best.low is not None and best.low > 1:
        answer = f"{best.variant} is the fastest: {_times(best)} as fast as {best.against}"
    else:
        answer = f"Nothing is proven faster than {best.against}: {best.variant} is {_times(best)}"
        answer += " as fast"
    if (difference := accuracy_differences(result).get(best.variant)) is not None:
        answer += f", with {points(difference)} points of top-1 accuracy"
    marks = next((v.marks for v in result.variants if v.name == best.variant), [])
    answer += f" (marked: {', '.join(marks)})" if marks else ""
    return answer + ("." if result.complete else "; some rounds are missing.")


def _times(ratio: Ratio) -> str:
    return f"{interval(ratio)} times"


def _by_gain(result: Result) -> list[VariantResult]:
    """Rows grouped by baseline, the fastest first; rows without a sample last."""
    groups = list(dict.fromkeys(variant.against for variant in result.variants))

    def place(variant: VariantResult) -> tuple[bool, int, float]:
        ratio = result.ratio_of(variant.name)
        gain = ratio.median if ratio else 0.0
        return (not variant.measurements, groups.index(variant.against), -gain)

    return sorted(result.variants, key=place)


def _sweep(result: Result) -> list[LineChart]:
    """Throughput and memory, if the variants differ in only one number."""
    variants = [variant for variant in result.variants if not variant.control]
    keys = {key for variant in variants for key in variant.overrides}
    if len(keys) != 1:
        return []
    (key,) = keys
    # The baseline may leave the key as it is in the base.
    found = sorted(
        (float(v.config[key]), v.images_per_second, (v.peak_memory_bytes or 0) / 2**20)
        for v in variants
        if v.images_per_second and _is_positive_number(v.config.get(key))
    )
    if len(found) < 2:
        return []
    name = key.replace("_", " ")
    return [
        LineChart(title=f"{title} over {name}", x_title=name, y_title=unit, doubling_x=True,
                  from_zero=True, series=[Series(label=title, points=values)])
        for title, unit, values in (
            ("Throughput", "images/s", tuple((x, speed) for x, speed, _ in found)),
            ("Peak memory", "MiB", tuple((x, memory) for x, _, memory in found)),
        )
    ]  # fmt: skip


def _is_positive_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _accuracy_over_time(result: Result) -> LineChart:
    series = [
        Series(label=variant.name, points=tuple(measurement.curve), color=place)
        for place, variant in enumerate(result.variants)
        for measurement in variant.measurements
    ]
    return LineChart(title="Accuracy over time, one line a run", series=series, x_title=SECONDS,
                     y_title="top-1, percent", target=result.target_accuracy)  # fmt: skip


def _run(run: RunRecord) -> Section:
    reached = run.results
    ends, seconds = [], 0.0
    for epoch in run.epochs:
        seconds += epoch.seconds
        if epoch.val_acc1 is not None:
            ends.append((seconds, epoch.val_acc1))
    losses = [
        Series(label=label, points=run.curve(column), color=color)
        for color, (label, column) in enumerate(
            [("training", "train/loss"), ("validation", "val/loss")]
        )
    ]
    remarks = [f"clock: {run.clock}"] if run.clock else []
    if run.cpu_busy_before_percent is not None:
        remarks.append(f"the processor was {run.cpu_busy_before_percent:.0f}% busy before the run")
    accuracy = "no evaluation" if reached.last_acc1 is None else f"{reached.last_acc1:.2f}% top-1"
    return Section(
        heading=run.experiment,
        answer=f"{accuracy} in {run.seconds:,.1f} s in total.",
        rows=_run_rows(run),
        notes=remarks,
        bars=[_shares("Where the time went", run.phases(), "s")],
        lines=[
            LineChart(title="Accuracy over time", series=[Series(label="", points=tuple(ends))],
                      x_title=SECONDS, y_title="top-1, percent"),
            LineChart(title="Loss over time", series=losses, x_title=SECONDS, y_title="loss"),
        ],
        command=run.command,
        environment=_listed({**run.environment, "commit": run.commit}),
    )  # fmt: skip


def _run_rows(run: RunRecord) -> list[tuple[str, str]]:
    reached = run.results
    percent = {
        "top-1, last": reached.last_acc1,
        "top-1, best": reached.best_acc1,
        "top-5, last": reached.last_acc5,
    }
    losses = {"training loss, last": reached.train_loss, "validation loss": reached.val_loss}
    return [
        ("data", run.dataset),
        ("model", str(run.config.get("model", "?"))),
        *((name, f"{value:.2f}%") for name, value in percent.items() if value is not None),
        *((name, f"{value:.4f}") for name, value in losses.items() if value is not None),
        ("total time", f"{run.seconds:,.1f} s"),
        ("training images/s", f"{reached.images_per_second:,.1f}"),
        ("epochs", f"{len(run.epochs)} of {run.plan.epochs}"),
        ("optimizer steps", f"{reached.steps:,}"),
        ("date", run.date),
    ]


def _profile(profile: ProfileRecord) -> Section:
    ceilings = {
        "loader alone": profile.ceilings.loader,
        "model alone, data loaded": profile.ceilings.model,
        "both together": profile.ceilings.both,
    }
    phases = {name: 1000 * seconds for name, seconds in profile.phases.seconds.items()}
    hardware = {**profile.hardware, "versions": profile.versions, "date": profile.date}
    return Section(
        heading=f"profile of {profile.config.get('model', 'a run')}",
        answer=f"{profile.verdict.limit}: {profile.verdict.figures}",
        lead=(f"Next: {profile.verdict.next_step}",),
        rows=[(label, f"{value:,.1f} images/s") for label, value in ceilings.items()],
        bars=[_shares("Phases of a step", phases, "ms")],
        command=profile.command,
        environment=_listed(hardware),
    )


def _tuning(tuning: TuningResult) -> Section:
    rows = [
        (trial.name, f"rejected: {trial.reason}")
        if trial.outcome == "rejected"
        else (
            trial.name,
            str(trial.rung + 1),
            number(trial.images_per_second) + ("" if trial.outcome == "measured" else " *"),
            number(trial.score),
            number(trial.peak_memory_bytes and trial.peak_memory_bytes / 2**20),
            f"{trial.seconds:.1f}",
        )
        for trial in tuning.trials
    ]
    longest = {t.name: t for t in tuning.trials if t.score is not None}
    ranked = sorted(longest.values(), key=lambda trial: -(trial.score or 0.0))[:MAX_TRIAL_BARS]
    return Section(
        heading=tuning.experiment,
        answer=tuning.verdict or "The search was interrupted before anything was chosen.",
        titles=("trial", "round", "images/s", "with its start", "peak MiB", "seconds"),
        rows=rows,
        notes=["* stopped after its warm-up, which was less than half as fast as the best trial"]
        if any(trial.outcome == "hopeless" for trial in tuning.trials)
        else [],
        bars=[_trial_bars(ranked)],
        parts=[_comparison(tuning.confirmation)] if tuning.confirmation else [],
        command=tuning.command,
        environment=_listed({**tuning.environment, "commit": tuning.commit}),
    )


def _trial_bars(ranked: Sequence[Trial]) -> BarChart:
    bars = [
        Bar(label=trial.name, text=f"{number(trial.score)} images/s", value=trial.score or 0.0)
        for trial in ranked
    ]
    planned = next((trial.score for trial in ranked if not trial.overrides), None)
    return BarChart(title="Longest trial of each, best first", bars=bars, reference=planned)


def _shares(title: str, parts: Mapping[str, float], unit: str) -> BarChart:
    """The parts of a whole, each with its share and value."""
    whole = sum(parts.values()) or 1.0
    return BarChart(
        title=title,
        bars=[
            Bar(label=name, text=f"{value / whole:.1%} ({value:,.4g} {unit})", value=value)
            for name, value in parts.items()
        ],
    )


def _listed(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A machine, its versions and variables as names and values."""
    return [
        (_spaced(key), _shown(key, value))
        for key, value in environment.items()
        if value not in (None, "", [], {})
    ]


def _spaced(key: str) -> str:
    # Environment variables keep their names.
    return key.removesuffix("_bytes").replace("_", " ") if key.islower() else key


def _shown(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return f"{value / 2**30:,.1f} GiB"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {text}" for name, text in _listed(value))
    if isinstance(value, (list, tuple)):
        return "; ".join(_shown("", part) for part in value)
    return str(value)
