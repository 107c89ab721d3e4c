"""Charts of a report: bars, which the page's style sheet draws, and lines, which matplotlib draws.

Names from result files never reach an SVG: labels and legends are outside it, where the template
escapes them.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bar", "BarChart", "LineChart", "Series"]

COLORS = ("#1f6db5", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#0e7490", "#be185d", "#4b5563")
TEXT, SOFT, RULE = "#1b1f24", "#57606a", "#d5d9de"
# The page's variables for these colors; dark mode gives them other values.
VARIABLES = {TEXT: "text", SOFT: "soft", RULE: "rule"} | {c: f"c{n}" for n, c in enumerate(COLORS)}
# Lines also differ in their dashes: not everybody sees all colors, and prints may have none.
DASHES = ("-", "--", ":", "-.")
MAX_MARKED_POINTS = 30
# Ids that are used are hashes of what they name; the others would repeat in every figure.
UNUSED_ID = re.compile(r' id="(?!p[0-9a-f]{10}|m[0-9a-f]{10})[^"]*"')


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        label: What the bar shows.
        note: A remark beside the label; may be empty.
        text: Its value in words.
        value: Its length, to the right of 0 or, if negative, to the left.
        low, high: Ends of its interval; None without one.
        faint: Whether it is a control.
    """

    label: str
    text: str
    value: float
    note: str = ""
    low: float | None = None
    high: float | None = None
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class BarChart:
    """Bars on one scale; all of them are compared with the value `reference`."""

    title: str
    bars: Sequence[Bar]
    reference: float | None = None

    def place(self, value: float) -> float:
        """The place of a value, in percent of the width."""
        ends = [end for bar in self.bars for end in (bar.value, bar.low or 0.0, bar.high or 0.0)]
        ends += [0.0, self.reference or 0.0]
        low, high = 1.04 * min(ends), 1.04 * max(ends)
        return 100 * (value - low) / ((high - low) or 1.0)


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line: its points in order and its color's number; equal labels share a legend entry."""

    label: str
    points: tuple[tuple[float, float], ...]
    color: int = 0


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines with their points.

    Attributes:
        title: Shown above the chart.
        series: The lines, with at least one point in total.
        x_title, y_title: The axes' quantities with their units.
        doubling_x: Whether the x axis is logarithmic, with ticks at the points; for positive x.
        from_zero: Whether the y axis starts at 0.
        target: A y value to draw a line at.
    """

    title: str
    series: Sequence[Series]
    x_title: str
    y_title: str
    doubling_x: bool = False
    from_zero: bool = False
    target: float | None = None

    def legend(self) -> list[tuple[str, int, int]]:
        """Label, color and dashes of each line; empty if there is only one."""
        entries = dict.fromkeys((line.label, line.color) for line in self.series if line.points)
        shown = [(label, n % len(COLORS), n % len(DASHES)) for label, n in entries]
        return shown if len(shown) > 1 else []

    def svg(self) -> str:
        """The chart as SVG, in the page's colors and fonts; the same numbers give the same text."""
        from matplotlib import style  # slow to import

        with style.context(["default", _STYLE]):
            return self._drawn()

    def _drawn(self) -> str:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for line in self.series:
            few = len(line.points) <= MAX_MARKED_POINTS
            axes.plot(
                [x for x, _ in line.points],
                [y for _, y in line.points],
                color=COLORS[line.color % len(COLORS)],
                linestyle=DASHES[line.color % len(DASHES)],
                marker="o" if few else "",
            )
        if self.target is not None:
            axes.axhline(self.target, color=TEXT, linestyle=":", linewidth=1)
        if self.from_zero:
            axes.set_ylim(bottom=0)
        if self.doubling_x:
            places = sorted({x for line in self.series for x, _ in line.points})
            places = places[:: 1 + len(places) // 9]
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{x:,.6g}" for x in places])
            axes.minorticks_off()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(_METADATA))
        return _as_part_of_page(text.getvalue())


_METADATA = ("Creator", "Date", "Format", "Type")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "text.color": SOFT,
    **{f"{axis}tick.{part}": SOFT for axis in "xy" for part in ("color", "labelcolor")},
}


def _as_part_of_page(svg: str) -> str:
    svg = UNUSED_ID.sub("", svg[svg.index("<svg") :])
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', svg, count=1)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg
