"""Charts as inline SVG that keep their text size at any width, in light and dark.

Positions across are percentages and positions down are pixels, so a chart is as wide as its
column without a script. Colours come from the page's style sheet.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Series", "Share", "bar_chart", "line_chart", "nice_ticks", "share_bar"]

COLORS = 8
PLOT_HEIGHT = 220
BAR_HEIGHT = 22
# Lines differ in their dashes too: not everybody sees all colours, and paper has none.
DASHES = ("none", "7 3", "2 3", "10 3 2 3")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        label: What it stands for.
        note: A remark below the label; may be empty.
        text: Its value in words.
        value: Its length, from 0 to the right or, below 0, to the left.
        low, high: Ends of its interval; None without one.
        dots: Single samples.
        faint: Whether it is a control.
    """

    label: str
    text: str
    value: float
    note: str = ""
    low: float | None = None
    high: float | None = None
    dots: tuple[float, ...] = ()
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line: its points in order, and the number of its colour; equal labels share one entry."""

    label: str
    points: tuple[tuple[float, float], ...]
    color: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of a whole: its name and size, in the unit of the whole."""

    label: str
    value: float


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten) from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def bar_chart(bars: Sequence[Bar], *, title: str, reference: float | None = None) -> str:
    """Bars from 0 to either side, with intervals as whiskers and samples as dots.

    Args:
        bars: In the order in which they are shown.
        title: Above the chart.
        reference: A value that all bars are to be compared with, drawn as a line.

    Returns:
        A `<figure>`, or nothing without bars.
    """
    if not bars:
        return ""
    ends = [end for bar in bars for end in (bar.value, bar.low or 0.0, bar.high or 0.0, *bar.dots)]
    ends += [0.0, reference or 0.0]
    scale = (1.04 * min(ends), 1.04 * max(ends))
    rows = "".join(_bar_row(bar, scale, reference) for bar in bars)
    return f'<figure class="bars"><figcaption>{escape(title)}</figcaption>{rows}</figure>'


def _bar_row(bar: Bar, scale: tuple[float, float], reference: float | None) -> str:
    length = scale[1] - scale[0] or 1.0

    def across(value: float) -> str:
        return f"{100 * (value - scale[0]) / length:.2f}%"

    middle = BAR_HEIGHT / 2
    shapes = [
        f'<rect class="{"bar faint" if bar.faint else "bar"}" x="{across(min(0.0, bar.value))}" '
        f'y="4" width="{100 * abs(bar.value) / length:.2f}%" height="{BAR_HEIGHT - 8}" rx="2"/>'
    ]
    if reference is not None:
        x = across(reference)
        shapes.append(f'<line class="reference" x1="{x}" x2="{x}" y1="0" y2="{BAR_HEIGHT}"/>')
    shapes += [f'<circle class="dot" cx="{across(v)}" cy="{middle}" r="2.5"/>' for v in bar.dots]
    if bar.low is not None and bar.high is not None:
        top, bottom = 5, BAR_HEIGHT - 5
        ends = [across(bar.low), across(bar.high)]
        shapes.append(
            f'<line class="whisker" x1="{ends[0]}" x2="{ends[1]}" y1="{middle}" y2="{middle}"/>'
        )
        shapes += [
            f'<line class="whisker" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>' for x in ends
        ]
    note = f"<small>{escape(bar.note)}</small>" if bar.note else ""
    name = f"{bar.label}: {bar.text}"
    return (
        f'<div class="row"><div class="head"><span>{escape(bar.label)} {note}</span>'
        f'<span class="value">{escape(bar.text)}</span></div>'
        f'<svg role="img" aria-label="{escape(name)}" width="100%" height="{BAR_HEIGHT}">'
        f"{''.join(shapes)}</svg></div>"
    )


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_title: str,
    y_title: str,
    doubling_x: bool = False,
    from_zero: bool = False,
    target: float | None = None,
) -> str:
    """Lines with their points.

    Args:
        series: Lines; those without points are left out.
        title: Above the chart.
        x_title, y_title: The axes' quantities with their units.
        doubling_x: Whether equal steps across are equal factors, with ticks at the points; for
            positive x.
        from_zero: Whether the y axis starts at 0.
        target: A y value to draw a line at.

    Returns:
        A `<figure>`, or nothing without points.
    """
    series = [line for line in series if line.points]
    if not series:
        return ""
    xs = sorted({x for line in series for x, _ in line.points})
    ys = [y for line in series for _, y in line.points] + ([] if target is None else [target])
    x_range = (math.log2(xs[0]), math.log2(xs[-1])) if doubling_x else (min(0.0, xs[0]), xs[-1])
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = (low if from_zero else low - margin), high + margin

    def across(x: float) -> float:
        place = math.log2(x) if doubling_x else x
        width = x_range[1] - x_range[0]
        return 100 * (place - x_range[0]) / width if width else 50.0

    def down(y: float) -> float:
        return PLOT_HEIGHT * (1 - (y - low) / (high - low))

    x_ticks = xs[:: 1 + len(xs) // 9] if doubling_x else nice_ticks(*x_range, most=5)
    axes = [
        f'<line class="grid" x1="0" x2="100%" y1="{down(y):.1f}" y2="{down(y):.1f}"/>'
        f'<text x="-8" y="{down(y) + 4:.1f}" text-anchor="end">{_tick(y)}</text>'
        for y in nice_ticks(low, high)
    ]
    axes += [
        f'<line class="grid" x1="{across(x):.2f}%" x2="{across(x):.2f}%" y1="0" '
        f'y2="{PLOT_HEIGHT}"/><text x="{across(x):.2f}%" y="{PLOT_HEIGHT + 18}" '
        f'text-anchor="middle">{_tick(x)}</text>'
        for x in x_ticks
    ]
    if target is not None:
        y = f"{down(target):.1f}"
        axes.append(f'<line class="reference" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
    lines = [_line(line, across, down) for line in series]
    return (
        f'<figure class="lines"><figcaption>{escape(title)}</figcaption>'
        f'<div class="axis">{escape(y_title)}</div><div class="plot">'
        f'<svg role="img" aria-label="{escape(title)}" width="100%" height="{PLOT_HEIGHT + 24}">'
        f"{''.join(axes)}{''.join(lines)}</svg></div>"
        f'<div class="axis across">{escape(x_title)}</div>{_legend(series)}</figure>'
    )


def _line(line: Series, across: Callable[[float], float], down: Callable[[float], float]) -> str:
    places = [(across(x), down(y)) for x, y in line.points]
    path = " ".join(f"{x:.2f},{y:.1f}" for x, y in places)
    # Only a stretched picture of its own lets a line run by percentages.
    drawn = (
        f'<svg viewBox="0 0 100 {PLOT_HEIGHT}" preserveAspectRatio="none" width="100%" '
        f'height="{PLOT_HEIGHT}"><polyline class="line {_color(line.color)}" points="{path}" '
        f'stroke-dasharray="{_dash(line.color)}"/></svg>'
    )
    radius = 3.5 if len(places) <= 30 else 0
    dots = "".join(
        f'<circle class="point {_color(line.color)}" cx="{x:.2f}%" cy="{y:.1f}" r="{radius}">'
        f"<title>{escape(line.label)}: {_tick(a)}, {_tick(b)}</title></circle>"
        for (x, y), (a, b) in zip(places, line.points, strict=True)
        if radius or len(places) == 1
    )
    return drawn + dots


def _legend(series: Sequence[Series]) -> str:
    entries = dict.fromkeys((line.label, line.color) for line in series)
    if len(entries) < 2:
        return ""
    items = "".join(
        f'<li><svg width="28" height="10" aria-hidden="true"><line class="line {_color(color)}" '
        f'x1="1" x2="27" y1="5" y2="5" stroke-dasharray="{_dash(color)}"/></svg>'
        f"{escape(label)}</li>"
        for label, color in entries
    )
    return f'<ul class="legend">{items}</ul>'


def share_bar(shares: Sequence[Share], *, title: str, unit: str) -> str:
    """One bar cut into the parts of a whole, each with its share and size.

    Returns:
        A `<figure>`, or nothing where the whole is empty.
    """
    whole = sum(share.value for share in shares)
    if whole <= 0:
        return ""
    parts, items, start = [], [], 0.0
    for number, share in enumerate(shares):
        width = 100 * share.value / whole
        parts.append(
            f'<rect class="part {_color(number)}" x="{start:.2f}%" width="{width:.2f}%" y="0" '
            f'height="{BAR_HEIGHT}"/>'
        )
        items.append(
            f'<li><svg width="12" height="12" aria-hidden="true"><rect class="part '
            f'{_color(number)}" width="12" height="12"/></svg>{escape(share.label)} '
            f"{width:.1f}% ({share.value:,.4g} {escape(unit)})</li>"
        )
        start += width
    return (
        f'<figure class="shares"><figcaption>{escape(title)}</figcaption>'
        f'<svg role="img" aria-label="{escape(title)}" width="100%" height="{BAR_HEIGHT}">'
        f'{"".join(parts)}</svg><ul class="legend">{"".join(items)}</ul></figure>'
    )


def _color(number: int) -> str:
    return f"c{number % COLORS}"


def _dash(number: int) -> str:
    return DASHES[number % len(DASHES)]


def _tick(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.3g}"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.4g}"
