"""Result files as one HTML page or as Markdown."""

from collections.abc import Sequence
from importlib import resources

from training_framework.measure.compare.result import Result
from training_framework.measure.compare.table import result_lines
from training_framework.measure.report.sections import Section, section_of
from training_framework.measure.report.sources import Source

__all__ = ["html_page", "html_report", "markdown_report"]


def html_report(sources: Sequence[Source]) -> str:
    """Results as one page."""
    sections = [section_of(source) for source in sources]
    title = sections[0].heading if len(sections) == 1 else f"{len(sections)} results"
    return html_page(title, sections)


def html_page(title: str, sections: Sequence[Section]) -> str:
    """One self-contained page, which loads nothing, runs nothing and fits on a phone."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    files = resources.files("training_framework.measure.report")
    # Everything is escaped, except what the template itself marks as safe.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files.joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        title=title,
        style=Markup(files.joinpath("report.css").read_text("utf-8")),
        sections=sections,
    )


def markdown_report(sources: Sequence[Source]) -> str:
    """The same results as Markdown tables."""
    parts = [
        "\n".join(result_lines(source))
        if isinstance(source, Result)
        else _markdown(section_of(source))
        for source in sources
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(section: Section) -> str:
    rows = [
        [*row, *[""] * (len(section.titles) - len(row))] for row in (section.titles, *section.rows)
    ]
    cells = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    rule = " | ".join([f":{'-' * (widths[0] - 1)}", *(f"{'-' * (w - 1)}:" for w in widths[1:])])
    table = [f"| {line} |" for line in (lines[0], rule, *lines[1:])]
    heading = " ".join(section.heading.split())
    return "\n".join(
        [f"## {heading}", "", section.answer, "", *table, "", f"    {section.command}"]
    )
