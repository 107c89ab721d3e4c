import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from training_framework.cli.main import main
from training_framework.errors import UserError
from training_framework.measure.report.figures import Bar, BarChart, LineChart, Series
from training_framework.measure.report.render import html_report, markdown_report
from training_framework.measure.report.sources import read_source

HOSTILE = """<script>alert("x&y's")</script>"""
FACTS = {
    "device": "cpu", "device_name": HOSTILE, "dataset": "synthetic", "train_images": 36,
    "image_size": 8, "images_per_step": 16, "flops_per_image": 1e6, "peak_flops": 1e9,
    "peak_flops_source": "measured", "plan": {"compile": False}, "build_seconds": 0.1,
    "warmup_step_seconds": [0.2, 0.1],
}  # fmt: skip


def measurement(number, images=100):
    return {
        "round": number, "seconds": 1.0, "steps": 5, "images": images, "cpu_seconds": 1.0,
        "other_cpu_share": 0.0, "peak_memory_bytes": 2**28, "acc1": 50.0,
        "curve": [[1.0, 30.0], [2.0, 50.0]],
    }  # fmt: skip


def variant(name, batch, speed, **changes):
    return {
        "name": name, "overrides": {"batch_size": batch}, "unit": "images/s",
        "samples": [speed, speed * 1.1], "median": speed, "images_per_second": speed,
        "peak_memory_bytes": 2**28, "cpu_cores": 1.0, "acc1": 50.0, "startup_seconds": 0.5,
        "config": {"batch_size": batch}, "facts": FACTS,
        "measurements": [measurement(0), measurement(1)], **changes,
    }  # fmt: skip


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    marks = {"marks": ["busy machine"], "details": [f"busy machine: {HOSTILE}"]}
    missing = {"measurements": [], "samples": [], "median": None, "images_per_second": None,
               "facts": None, "unavailable": f"no GPU {HOSTILE}", "against": "base"}  # fmt: skip
    content = {
        "schema_version": 1, "experiment": f"sweep {HOSTILE}", "description": HOSTILE,
        "definition": {}, "command": f"efficient-resnet compare {HOSTILE}", "started": "2026",
        "environment": {"cpu_name": HOSTILE, "versions": {"torch": "2.13"}, HOSTILE: HOSTILE},
        "clock": "steps", "complete": True, "rounds": 2,
        "variants": [
            variant("base", 16, 100.0), variant(HOSTILE, 32, 150.0, against="base", **marks),
            variant("far away", 64, 0.0, **missing),
        ],
        "ratios": [{"variant": HOSTILE, "against": "base", "median": 1.5, "low": 1.25,
                    "high": 2.0, "pairs": 2}],
    }  # fmt: skip
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [
        {"step": "1", "train/loss": "2.0", "data_wait": "0.5", "images_per_second": "10"},
        {"step": "2", "train/loss": "1.5", "val/loss": "1.6", "data_wait": "0.5",
         "images_per_second": "10"},
        {"step": "4", "train/loss": "1.0", "val/loss": "1.2", "data_wait": "0.0",
         "images_per_second": "20"},
    ]  # fmt: skip
    epochs = [{"seconds": 4.0, "evaluation_seconds": 1.0, "val_acc1": 40.0},
              {"seconds": 2.0, "evaluation_seconds": 1.0, "val_acc1": 60.0}]  # fmt: skip
    content = {
        "experiment": "demo|" + HOSTILE, "command": "efficient-resnet train", "seconds": 10.0,
        "dataset": HOSTILE, "environment": {"hardware": {"memory_bytes": 2**31}},
        "config": {"model": "resnet10"}, "plan": {"steps_per_epoch": 2, "epochs": 2},
        "epochs": epochs, "metrics": rows,
        "results": {"last_acc1": 60.0, "images_per_second": 15.0, "steps": 4},
    }  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    return path


class Tags(HTMLParser):
    VOID = ("meta", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_hostile_names_are_shown_as_text_and_never_as_markup(comparison, run):
    page = Tags(html_report([read_source(comparison), read_source(run)]))
    assert not page.open
    assert "script" not in page.seen
    assert page.text.count(HOSTILE) > 10


def test_page_loads_nothing_and_fits_a_phone_and_the_dark(comparison):
    text = html_report([read_source(comparison)])
    assert "default-src 'none'" in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert not re.search(r"(src|href)=.(?!#|data:)", text)


def test_comparison_shows_interval_mark_reason_command_and_sweet_spot(comparison):
    text = Tags(html_report([read_source(comparison)])).text
    assert "1.500 [1.250, 2.000]" in text
    assert "busy machine: other work used the processor" in text
    assert f"not available here: no GPU {HOSTILE}" in text
    assert f"efficient-resnet compare {HOSTILE}" in text
    assert "Sweet spot: batch 32" in text
    assert "Throughput over batch size" in text and "Accuracy over time" in text


def opening(page):
    return re.search(r'<p class="answer">(.*?)</p>', page)[1]


def test_page_opens_with_the_answer_that_the_intervals_allow(comparison):
    said = html.unescape(opening(html_report([read_source(comparison)])))
    assert said == (
        f"{HOSTILE} is the fastest: 1.500 [1.250, 2.000] times as fast as base "
        "(marked: busy machine)."
    )
    content = json.loads(comparison.read_text())
    content["ratios"][0] |= {"low": 0.9, "high": 2.0}
    content["complete"] = False
    comparison.write_text(json.dumps(content))
    said = opening(html_report([read_source(comparison)]))
    assert said.startswith("Nothing is proven faster than base: ")
    assert said.endswith("rounds are missing.")


def test_rows_are_sorted_by_their_gain_and_those_without_a_sample_come_last(comparison):
    content = json.loads(comparison.read_text())
    speeds = {"slower": 0.5, "faster": 3.0, "equal": 1.0}
    content["variants"] += [variant(name, 16, 1.0, against="base") for name in speeds]
    content["ratios"] += [
        {"variant": name, "against": "base", "median": speed, "low": speed, "high": speed,
         "pairs": 6} for name, speed in speeds.items()
    ]  # fmt: skip
    comparison.write_text(json.dumps(content))
    page = html_report([read_source(comparison)])
    rows = [html.unescape(name) for name in re.findall(r'<th scope="row">(.*?)</th>', page)]
    assert rows == ["base", "faster", HOSTILE, "equal", "slower", "far away"]


def test_bar_and_whisker_lie_where_their_values_say(comparison):
    text = html_report([read_source(comparison)])
    # The longest thing, the upper end at 2, has 4% of room behind it.
    assert f"left:0.00%;width:{100 * 1.5 / 2.08:.2f}%" in text
    assert f"left:{100 * 1.25 / 2.08:.2f}%;width:{100 * 0.75 / 2.08:.2f}%" in text


def test_bar_below_zero_goes_to_the_left():
    chart = BarChart(title="", bars=[Bar(label="", text="", value=-2.0)])
    assert [chart.place(value) for value in (-2.08, 0.0)] == pytest.approx([0, 100])


def test_same_numbers_draw_the_same_lines_in_the_colors_of_the_page():
    chart = LineChart(
        title="t", x_title="x", y_title="y", doubling_x=True, target=1.5,
        series=[Series(label="a", points=((1.0, 1.0), (8.0, 2.0))),
                Series(label="b", points=((1.0, 2.0), (8.0, 1.0)), color=1)],
    )  # fmt: skip
    svg = chart.svg()
    assert svg == chart.svg()
    assert "var(--c0)" in svg and "var(--c1)" in svg and "var(--soft)" in svg
    assert not re.search(r": #(?!000000|ffffff)", svg)  # no color that the dark would hide
    assert not re.search(r'id="figure', svg)
    assert re.findall(r">([\d.]+)</text>", svg)[:2] == ["1", "8"]
    assert chart.legend() == [("a", 0, 0), ("b", 1, 1)]


def test_run_places_its_steps_in_time_and_its_phases_fill_the_process(run):
    record = read_source(run)
    assert record.curve("train/loss") == ((2.0, 2.0), (4.0, 1.5), (6.0, 1.0))
    assert record.curve("val/loss") == ((4.0, 1.6), (6.0, 1.2))
    phases = record.phases()
    assert sum(phases.values()) == pytest.approx(10.0)
    # Two steps at half the speed with half of it waiting, two without: a third of 4 s.
    assert phases["waiting for data"] == pytest.approx(4 / 3)
    assert phases["start, saving and end"] == pytest.approx(4.0)


def test_markdown_escapes_what_would_break_its_table(run):
    lines = markdown_report([read_source(run)]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}
    assert any("60.00%" in line for line in table)


def test_shares_are_of_their_sum(run):
    assert "waiting for data" in (page := html_report([read_source(run)]))
    assert f"{100 * (4 / 3) / 10:.1f}% (1.333 s)" in page


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"variants": 1}',
        '{"metrics": []}',
        "\x00",
        "[" * 200_000,
    ],
)
def test_file_of_another_kind_is_named_with_the_cure(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"other\.json.*; name a"):
        read_source(path)


def test_text_that_no_file_can_hold_is_refused(run):
    content = json.loads(run.read_text())
    content["config"]["model"] = "\ud800"  # half of a character, which JSON can escape
    run.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"run\.json: not JSON"):
        read_source(run)


def test_command_writes_the_page_and_never_onto_a_result(comparison, in_tmp_path, capsys):
    assert main(["report", str(comparison)]) == 0
    assert (in_tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    before = comparison.read_text()
    assert main(["report", str(comparison), "--output", str(comparison)]) == 2
    assert comparison.read_text() == before
    capsys.readouterr()
    assert main(["report", str(comparison), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("## sweep")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_browser_draws_the_plots_without_a_complaint(comparison, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(html_report([read_source(comparison)]))
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--enable-logging=stderr", "--window-size=800,2400",
             f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]  # fmt: skip
    done = subprocess.run(
        ["chromium", *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    from PIL import Image

    with Image.open(shot) as image:
        colors = {color: count for count, color in image.convert("RGB").getcolors(2**24)}
    blue = sum(n for (r, g, b), n in colors.items() if b > r + 60 and b > g + 30)
    assert blue > 5000  # bars and lines
