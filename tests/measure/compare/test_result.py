import datetime

import pytest

from training_framework.errors import UserError
from training_framework.measure.compare.result import (
    Ratio,
    Result,
    VariantResult,
    load_result,
    result_file_name,
    save_result,
    unused_path,
)
from training_framework.measure.compare.table import result_lines, sweet_spot_line
from training_framework.measure.report.render import html_report


def variant(name: str, median: float | None = 100.0, **changes) -> VariantResult:
    values = {
        "name": name,
        "overrides": {},
        "unit": "images/s",
        "samples": [] if median is None else [median],
        "median": median,
        "config": {},
        "measurements": []
        if median is None
        else [
            {"round": 0, "seconds": 1.0, "steps": 1, "images": 100, "cpu_seconds": 1.0,
             "other_cpu_share": 0.0, "peak_memory_bytes": 2**30}
        ],
        **changes,
    }  # fmt: skip
    return VariantResult(**values)


def result(*variants: VariantResult, **changes) -> Result:
    values = {
        "experiment": "mine",
        "definition": {},
        "command": "efficient-resnet compare mine",
        "started": "2026-01-01T00:00:00+00:00",
        "environment": {"versions": {"torch": "2.13.0"}},
        "clock": "steps",
        "complete": True,
        "rounds": 6,
        "variants": list(variants),
        **changes,
    }
    return Result(**values)


def test_a_saved_result_loads_as_it_was(tmp_path):
    ratio = Ratio(variant="b", against="a", median=1.1, low=1.0, high=None, pairs=1)
    saved = result(variant("a"), variant("b"), ratios=[ratio])
    save_result(saved, tmp_path / "deep/er/r.json")
    assert load_result(tmp_path / "deep/er/r.json") == saved
    assert [path.name for path in (tmp_path / "deep/er").iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"r.json: not a result file of schema version 1"),
        ('{"schema_version": 2}', r"schema_version"),
        (None, r"r.json: cannot be read"),
    ],
)
def test_what_is_no_result_file_is_refused(tmp_path, text, message):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_result(path)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to.*--output"):
        save_result(result(variant("a")), tmp_path / "file/r.json")


def test_files_are_named_for_experiment_device_version_and_day():
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = result_file_name("batch-sweep", "AMD EPYC (Zen 4) @ 2.5GHz", "2.13.0+cpu")
    assert name == f"batch-sweep_amd-epyc-zen-4-2.5ghz_2.13.0_{today}.json"


def test_no_file_is_written_over(tmp_path):
    for expected in ("r.json", "r-2.json", "r-3.json"):
        path = unused_path(tmp_path / "r.json")
        assert path.name == expected
        path.touch()


def test_tables_stay_within_80_columns_and_keep_what_distinguishes_rows(tmp_path):
    ratio = Ratio(variant="x" * 48, against="a", median=1.234, low=1.001, high=1.5, pairs=9)
    marks = ["recompiled", "busy machine", "wide spread", "warm-up", "different work"]
    long = variant("x" * 48, 12345.678, against="a", marks=marks,
                   details=[f"{mark}: because" for mark in marks])  # fmt: skip
    lines = result_lines(result(variant("a"), long, ratios=[ratio]))
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "1.234 [1.001, 1.500]" in line)
    assert "R B S W D" in row
    assert "…" in row
    assert "- R = recompiled. " + "x" * 48 + ": because" in " ".join(lines).replace("\n", " ")


def test_the_sweet_spot_is_the_smallest_batch_within_three_percent():
    sizes = {16: 80.0, 32: 97.5, 64: 100.0, 128: 99.0}
    sweep = [
        variant(f"batch {size}", speed, overrides={"batch_size": size})
        for size, speed in sizes.items()
    ]
    full = variant("batch 256", None, overrides={"batch_size": 256},
                   unavailable="out of memory: no more")  # fmt: skip
    line = sweet_spot_line(result(*sweep, full))
    assert line.startswith("Sweet spot: batch 32 with 97.5 images/s")
    assert line.endswith("Batch 256 runs out of memory.")
    assert sweet_spot_line(result(variant("a"), variant("b"))) == ""


def runs(name: str, accuracies: list[float], **changes) -> VariantResult:
    measurements = [
        {"round": number, "seconds": 1.0, "steps": 1, "images": 100, "cpu_seconds": 1.0,
         "other_cpu_share": 0.0, "peak_memory_bytes": 2**30, "seed": number, "acc1": acc1}
        for number, acc1 in enumerate(accuracies)
    ]  # fmt: skip
    return variant(name, 1.0, unit="s", measurements=measurements, **changes)


def test_accuracies_are_compared_seed_by_seed():
    plain = [40.0, 50.0, 45.0, 42.0, 48.0, 41.0]  # seeds differ by more than the two rows do
    worse = [39.0, 49.5, 43.0, 41.5, 46.0, 40.5]
    variants = runs("plain", plain), runs("worse", worse, against="plain")
    trained = result(*variants, definition={"measure": "accuracy"})
    row = next(line for line in result_lines(trained) if "-0.75" in line)
    assert " ".join(row.split()) == "| worse | plain | -0.75 [-2.00, -0.50] | 6 |"
    page = html_report([trained])
    assert "-0.75 [-2.00, -0.50]" in page
    # The scale goes from 1.04 times the lowest end, -2, to 0, where the bar ends.
    assert "left:63.94%;width:36.06%" in page
    steps = result(*variants, definition={"measure": "steps"})
    assert "points [95%]" not in "\n".join(result_lines(steps))


def test_rows_without_samples_are_listed_below_the_table():
    lines = result_lines(result(variant("a"), variant("g", None, unavailable="no GPU found")))
    assert "- g: not available here: no GPU found" in lines
    assert not any(line.startswith("| g ") for line in lines)
