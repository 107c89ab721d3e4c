"""What each switch is (its card), and what it gains (an ablation, as a table and a chart)."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from training_framework.switches import SWITCHES, Switch

__all__ = ["Worth", "switch_cards", "switch_chart", "switch_table", "switch_worths"]

RESULTS = {"same": "same bits", "rounding": "other rounding", "different": "different"}

ALONE, AMONG = "only ", ("with ", "without ")
ROW, LEFT, RIGHT, TOP, BAR = 46, 190, 660, 40, 13
COLORS = {"alone": "#2b6cb0", "among the others": "#c05621"}


@dataclass(frozen=True, kw_only=True)
class Worth:
    """How many times as fast a step is with a switch: above 1 is a gain.

    Attributes:
        switch: Its name.
        alone, among: Median and ends of the 95% interval: with all other switches off, and with the
            others as in `all on`; None where it could not be measured here.
        memory: Peak memory with this switch alone, divided by that with all switches off.
        startup_seconds: Seconds that this switch alone adds to the start.
        marks: Reasons not to trust the two ratios, from the rows that they compare.
        missing: Why it could not be measured; empty where it was.
    """

    switch: str
    alone: tuple[float, float, float] | None
    among: tuple[float, float, float] | None
    memory: float | None
    startup_seconds: float | None
    marks: tuple[str, ...] = ()
    missing: str = ""


def switch_worths(result: Mapping[str, Any]) -> list[Worth]:
    """Each switch of an ablation."""
    rows = {row["name"]: row for row in result["variants"]}
    ratios = {ratio["variant"]: ratio for ratio in result["ratios"]}
    off = rows["all off"]
    worths = []
    for name, row in rows.items():
        if not name.startswith(ALONE):
            continue
        switch = name.removeprefix(ALONE)
        among = next(
            (
                ratios[prefix + switch]
                for prefix in AMONG
                if prefix + switch in ratios and _differs(rows[prefix + switch], rows["all on"])
            ),
            None,
        )
        measured = bool(row["measurements"])
        compared = [row, off]
        if among is not None:
            compared += [rows[among["variant"]], rows["all on"]]
        worths.append(
            Worth(
                switch=switch,
                alone=_interval(ratios.get(name)),
                among=_interval(among),
                memory=row["peak_memory_bytes"] / off["peak_memory_bytes"] if measured else None,
                startup_seconds=max(0.0, row["startup_seconds"] - off["startup_seconds"])
                if measured
                else None,
                marks=tuple(dict.fromkeys(mark for part in compared for mark in part["marks"])),
                missing=row["unavailable"],
            )
        )
    return worths


def _differs(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows' configurations led to different runs on this machine."""
    plans = [part["facts"]["plan"] | {"choices": None} for part in (row, other)]
    own = [part["config"] | dict.fromkeys(plans[0]) for part in (row, other)]
    return plans[0] != plans[1] or own[0] != own[1]


def _interval(ratio: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    """The gain from having the switch; a row without the switch holds the inverse."""
    if ratio is None or ratio["low"] is None:
        return None
    median, low, high = ratio["median"], ratio["low"], ratio["high"]
    if ratio["variant"].startswith("without "):
        return 1 / median, 1 / high, 1 / low
    return median, low, high


def switch_table(worths: list[Worth]) -> str:
    """The gains as a Markdown table."""
    rows = [
        "| switch | speed alone [95%] | among the others | memory | start | results | marks |",
        "|---|---|---|---|---|---|---|",
    ]
    results = {switch.name: RESULTS[switch.numbers] for switch in SWITCHES}
    for worth in worths:
        if worth.alone is None:
            rows.append(f"| {worth.switch} | not measured: {worth.missing} | | | | | |")
            continue
        rows.append(
            f"| {worth.switch} | {_text(worth.alone)} | {_text(worth.among)} "
            f"| {worth.memory:.2f}x | +{worth.startup_seconds:.1f} s "
            f"| {results.get(worth.switch, '-')} | {', '.join(worth.marks) or '-'} |"
        )
    return "\n".join(rows) + "\n"


def switch_cards() -> str:
    """The cards of all switches, in Markdown."""
    return "\n".join(_card(switch) for switch in SWITCHES)


def _card(switch: Switch) -> str:
    card = switch.card
    rows = {
        "Setting": f"`{switch.key}` (`{switch.flag}`): {switch.help}",
        "Results": RESULTS[switch.numbers],
        "Use it for": card.use,
        "Price": card.price,
        "Where it fails": card.failure,
        "Source": card.source,
    }
    lines = [f"- **{name}**: {text}" for name, text in rows.items()]
    return "\n".join([f"## {switch.name}", "", *lines, ""])


def _text(interval: tuple[float, float, float] | None) -> str:
    if interval is None:
        return "-"
    median, low, high = interval
    return f"{median:.2f}x [{low:.2f}, {high:.2f}]"


def switch_chart(worths: list[Worth], caption: str) -> str:
    """The gains as an SVG: bars from 1 with their intervals, readable in light and dark mode."""
    shown = [worth for worth in worths if worth.alone is not None]
    ends = [end for worth in shown for part in (worth.alone, worth.among) if part for end in part]
    low, high = min(0.9, *ends), max(1.1, *ends)
    height = TOP + ROW * len(shown) + 50

    def across(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (RIGHT - LEFT), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img" '
        f'aria-label="{escape(caption)}">',
        "<style>text{font:14px sans-serif;fill:#24292f}.s{font-size:12px}.l{stroke:#57606a}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.l{stroke:#9198a1}}</style>",
        f'<text x="{LEFT}" y="20">how many times as fast a step is</text>',
    ]
    for place, (label, color) in enumerate(COLORS.items()):
        x = LEFT + 260 + 90 * place
        parts.append(f'<rect x="{x}" y="9" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text class="s" x="{x + 16}" y="20">{label}</text>')
    one = across(1.0)
    parts.append(f'<line class="l" x1="{one}" x2="{one}" y1="{TOP - 8}" y2="{height - 46}"/>')
    for number, worth in enumerate(shown):
        top = TOP + ROW * number
        parts.append(f'<text x="0" y="{top + 20}">{escape(worth.switch)}</text>')
        for place, (interval, color) in enumerate(
            zip((worth.alone, worth.among), COLORS.values(), strict=True)
        ):
            if interval is None:
                continue
            y = top + place * (BAR + 2)
            parts += _bar(interval, y, one, across, color)
    parts.append(f'<text class="s" x="0" y="{height - 12}">{escape(caption)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(
    interval: tuple[float, float, float], y: int, one: float, across: Any, color: str
) -> list[str]:
    median, low, high = interval
    start, end = sorted((one, across(median)))
    middle = y + BAR / 2
    return [
        f'<rect x="{start}" y="{y}" width="{round(end - start, 1)}" height="{BAR}" '
        f'fill="{color}"/>',
        f'<line class="l" x1="{across(low)}" x2="{across(high)}" y1="{middle}" y2="{middle}" '
        'stroke-width="2"/>',
        f'<text class="s" x="{RIGHT + 10}" y="{y + BAR - 2}">{median:.2f}x</text>',
    ]
