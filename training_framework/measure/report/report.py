"""Result files as one HTML page for people, or as Markdown."""

from collections.abc import Sequence
from html import escape

from training_framework.measure.compare.result import Result
from training_framework.measure.compare.table import result_lines
from training_framework.measure.report.charts import Bar, Series, Share, bar_chart, line_chart
from training_framework.measure.report.charts import share_bar as share_chart
from training_framework.measure.report.comparison_section import comparison_section
from training_framework.measure.report.page import (
    command_block,
    environment_list,
    notes,
    page,
    paragraph,
    table,
)
from training_framework.measure.report.sources import ProfileRecord, RunRecord, Source
from training_framework.measure.tune.result import Trial, TuningResult

__all__ = ["html_report", "markdown_report"]

Row = tuple[str, str]


def html_report(sources: Sequence[Source]) -> str:
    """One self-contained page: it loads nothing, runs nothing, and fits a phone."""
    sections = [(_heading(source), _section(source)) for source in sources]
    title = sections[0][0] if len(sections) == 1 else f"{len(sections)} results"
    return page(title, sections)


def markdown_report(sources: Sequence[Source]) -> str:
    """The same results as Markdown tables."""
    parts = []
    for source in sources:
        if isinstance(source, Result):
            parts.append("\n".join(result_lines(source)))
        elif isinstance(source, TuningResult):
            parts.append(_tuning_markdown(source))
        else:
            rows = _run_rows(source) if isinstance(source, RunRecord) else _profile_rows(source)
            parts.append(_markdown_table(_heading(source), ("what", "value"), rows, source.command))
    return "\n\n".join(parts) + "\n"


def _heading(source: Source) -> str:
    if isinstance(source, ProfileRecord):
        return f"profile of {source.config.get('model', 'a run')}"
    return source.experiment


def _section(source: Source) -> str:
    if isinstance(source, Result):
        return comparison_section(source)
    if isinstance(source, TuningResult):
        return _tuning_section(source)
    return _run_section(source) if isinstance(source, RunRecord) else _profile_section(source)


def _run_rows(run: RunRecord) -> list[Row]:
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
        ("time, all in", f"{run.seconds:,.1f} s"),
        ("training images/s", f"{reached.images_per_second:,.1f}"),
        ("epochs", f"{len(run.epochs)} of {run.plan.epochs}"),
        ("optimizer steps", f"{reached.steps:,}"),
        ("date", run.date),
    ]


def _run_section(run: RunRecord) -> str:
    ends, seconds = [], 0.0
    for epoch in run.epochs:
        seconds += epoch.seconds
        if epoch.val_acc1 is not None:
            ends.append((seconds, epoch.val_acc1))
    accuracy = [Series(label="validation", points=tuple(ends), color=0)]
    losses = [
        Series(label=label, points=run.curve(column), color=number)
        for number, (label, column) in enumerate(
            [("training", "train/loss"), ("validation", "val/loss")]
        )
    ]
    x_title = "seconds since the start of training"
    shares = [Share(label=label, value=value) for label, value in run.phases().items()]
    remarks = [f"clock: {run.clock}"] if run.clock else []
    if run.cpu_busy_before_percent is not None:
        remarks.append(f"the processor was {run.cpu_busy_before_percent:.0f}% busy before the run")
    return "".join(
        [
            table(("what", "value"), _run_rows(run)),
            line_chart(accuracy, title="Accuracy over time", x_title=x_title,
                       y_title="top-1, percent"),
            line_chart(losses, title="Loss over time", x_title=x_title, y_title="loss"),
            share_chart(shares, title="Where the time went", unit="s"),
            notes(remarks),
            command_block(run.command),
            environment_list({**run.environment, "commit": run.commit}),
        ]
    )  # fmt: skip


def _profile_rows(profile: ProfileRecord) -> list[Row]:
    ceilings = profile.ceilings
    return [
        ("verdict", profile.verdict.limit),
        ("figures", profile.verdict.figures),
        ("next", profile.verdict.next_step),
        ("loader alone", f"{ceilings.loader:,.1f} images/s"),
        ("model alone, data there", f"{ceilings.model:,.1f} images/s"),
        ("both together", f"{ceilings.both:,.1f} images/s"),
        *(
            (f"{phase}, a step", f"{1000 * seconds:,.2f} ms")
            for phase, seconds in profile.phases.seconds.items()
        ),
    ]


def _profile_section(profile: ProfileRecord) -> str:
    verdict, ceilings = profile.verdict, profile.ceilings
    shares = [
        Share(label=phase, value=1000 * seconds)
        for phase, seconds in profile.phases.seconds.items()
    ]
    # A loader with nothing to do can be a thousand times as fast as the model.
    scale = 2 * max(ceilings.model, ceilings.both)
    bars = [
        Bar(
            label=label,
            text=f"{value:,.1f} images/s",
            value=min(value, scale),
            note="beyond this scale" if value > scale else "",
        )
        for label, value in (
            ("loader alone", ceilings.loader),
            ("model alone, data there", ceilings.model),
            ("both together", ceilings.both),
        )
    ]
    return "".join(
        [
            f"<p><strong>{escape(verdict.limit)}</strong>: {escape(verdict.figures)}</p>",
            paragraph(f"Next: {verdict.next_step}"),
            share_chart(shares, title="Phases of a step", unit="ms"),
            bar_chart(bars, title="Ceilings", reference=ceilings.both),
            command_block(profile.command),
            environment_list(
                {**profile.hardware, "versions": profile.versions, "date": profile.date}
            ),
        ]
    )


def _tuning_section(tuning: TuningResult) -> str:
    titles = ("trial", "round", "images/s", "with its start", "peak MiB", "took s")
    rows = [
        (
            trial.name,
            str(trial.rung + 1),
            f"{_number(trial.images_per_second)}{'' if trial.outcome == 'measured' else ' *'}",
            _number(trial.score),
            _number(trial.peak_memory_bytes and trial.peak_memory_bytes / 2**20),
            f"{trial.seconds:.1f}",
        )
        if trial.outcome != "rejected"
        else (trial.name, f"rejected: {trial.reason}")
        for trial in tuning.trials
    ]
    best: dict[str, Trial] = {}
    for trial in tuning.trials:
        if trial.score is not None:
            best[trial.name] = trial
    ranked = sorted(best.values(), key=lambda trial: -(trial.score or 0.0))[:12]
    bars = [
        Bar(label=trial.name, text=f"{_number(trial.score)} images/s", value=trial.score or 0.0)
        for trial in ranked
    ]
    default = next((t.score for t in reversed(ranked) if not t.overrides), None)
    stopped = [t for t in tuning.trials if t.outcome == "hopeless"]
    confirmed = ""
    if tuning.confirmation is not None:
        confirmed = "<h3>Confirmation in paired turns</h3>" + comparison_section(
            tuning.confirmation, alone=False
        )
    return "".join(
        [
            paragraph(tuning.verdict or "The search was interrupted: nothing is chosen yet."),
            bar_chart(bars, title="Longest trial of each, best first", reference=default),
            confirmed,
            f"<h3>All {len(tuning.trials)} trials</h3>",
            table(titles, rows),
            notes(["* stopped after its warm-up: hopeless"] if stopped else []),
            command_block(tuning.command),
            environment_list({**tuning.environment, "commit": tuning.commit}),
        ]
    )


def _tuning_markdown(tuning: TuningResult) -> str:
    rows = [
        (trial.name, _number(trial.score) if trial.outcome == "measured" else trial.outcome)
        for trial in tuning.trials
    ]
    text = _markdown_table(tuning.experiment, ("trial", "images/s"), rows, tuning.command)
    return f"{text}\n\n{tuning.verdict}" if tuning.verdict else text


def _markdown_table(
    heading: str, titles: tuple[str, str], rows: Sequence[Row], command: str
) -> str:
    cells = [tuple(_markdown_cell(text) for text in row) for row in (titles, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(2)]
    lines = [f"| {a.ljust(widths[0])} | {b.rjust(widths[1])} |" for a, b in cells]
    lines.insert(1, f"| :{'-' * (widths[0] - 1)} | {'-' * (widths[1] - 1)}: |")
    return "\n".join([f"## {heading}", "", *lines, "", f"    {command}"])


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}"
