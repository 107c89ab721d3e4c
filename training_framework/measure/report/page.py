"""The parts that every section of a report is made of: tables, notes, environment, page.

All text is escaped here, on its way into the page.
"""

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any, NamedTuple

__all__ = ["Cell", "command_block", "environment_list", "notes", "page", "paragraph", "table"]

# Whatever a result file holds, the page may load nothing and run nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: What it says.
        marks: Marks of the validity gate, each with what it rests on.
    """

    text: str
    marks: Sequence[tuple[str, str]] = ()


def table(titles: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> str:
    """A table whose first column names the row; on a phone each row becomes a card.

    A row of two cells below more titles spans the table with its second cell.
    """
    head = "".join(
        f'<th scope="col"{"" if number == 0 else _NUMBER}>{escape(title)}</th>'
        for number, title in enumerate(titles)
    )
    body = "".join(_row(titles, [Cell(c) if isinstance(c, str) else c for c in row])
                   for row in rows)  # fmt: skip
    return (
        f'<div class="scroll cards"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


_NUMBER = ' class="number"'


def _row(titles: Sequence[str], cells: Sequence[Cell]) -> str:
    name, *values = cells
    head = f'<th scope="row">{escape(name.text)}</th>'
    if len(cells) == 2 < len(titles):
        (reason,) = values
        return (
            f'<tr class="missing">{head}<td colspan="{len(titles) - 1}">{escape(reason.text)}</td>'
            "</tr>"
        )
    data = "".join(
        f'<td class="number" data-label="{escape(title)}"><span>{_content(cell)}</span></td>'
        for title, cell in zip(titles[1:], values, strict=True)
    )
    return f"<tr>{head}{data}</tr>"


def _content(cell: Cell) -> str:
    marks = " ".join(
        f'<span class="mark" title="{escape(detail)}">{escape(mark)}</span>'
        for mark, detail in cell.marks
    )
    return marks or escape(cell.text)


def paragraph(text: str, *, soft: bool = False) -> str:
    """A paragraph, or nothing without text."""
    if not text:
        return ""
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>"


def notes(lines: Sequence[str]) -> str:
    """A list, or nothing without lines."""
    if not lines:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def command_block(command: str) -> str:
    """The command that repeats a result."""
    shown = escape(command) if command else "not recorded"
    return f"<h3>Repeat it</h3><pre><code>{shown}</code></pre>"


def environment_list(environment: Mapping[str, Any]) -> str:
    """A machine, its versions and variables as a list of names and values."""
    items = "".join(
        f"<dt>{escape(_spaced(key))}</dt><dd>{escape(_shown(key, value))}</dd>"
        for key, value in environment.items()
        if value not in (None, "", [], {})
    )
    return f"<h3>Environment</h3><dl>{items}</dl>"


def _spaced(key: str) -> str:
    # Environment variables keep their names.
    return key.removesuffix("_bytes").replace("_", " ") if key.islower() else key


def _shown(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return f"{value / 2**30:,.1f} GiB"
    if isinstance(value, Mapping):
        shown = (
            f"{_spaced(str(name))}: {_shown(str(name), part)}"
            for name, part in value.items()
            if part not in (None, "")
        )
        return ", ".join(shown)
    if isinstance(value, (list, tuple)):
        return "; ".join(_shown("", part) for part in value)
    return str(value)


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A self-contained HTML page.

    Args:
        title: Of the page.
        sections: The heading of each section, as text, and its content, as HTML.
    """
    style = resources.files("training_framework.measure.report").joinpath("report.css")
    contents = ""
    if len(sections) > 1:
        links = "".join(
            f'<li><a href="#result-{number}">{escape(heading)}</a></li>'
            for number, (heading, _) in enumerate(sections)
        )
        contents = f"<nav><ul>{links}</ul></nav>"
    body = "".join(
        f'<section id="result-{number}"><h2>{escape(heading)}</h2>{content}</section>'
        for number, (heading, content) in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style.read_text(encoding='utf-8')}</style></head>"
        f"<body><h1>{escape(title)}</h1>{contents}<main>{body}</main></body></html>\n"
    )
