"""The comparison of same_bits.py: whatever changes is reported, and nothing else is."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks/same_bits.py"


@pytest.fixture(scope="module")
def same_bits():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("same_bits", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture
def outcome(same_bits):
    losses = tuple((2.5 - 0.0625 * step).hex() for step in range(30))
    return same_bits.Outcome(
        losses=losses, val_losses=((1.5).hex(), (1.25).hex()), weights_sha256="a" * 64
    )


def with_next_value(values: tuple[str, ...], place: int) -> tuple[str, ...]:
    """`values` with the smallest change in single precision at `place`."""
    changed = list(values)
    changed[place] = (float.fromhex(values[place]) + 2**-23).hex()
    return tuple(changed)


def test_equal_outcomes_have_no_difference(same_bits, outcome):
    assert same_bits.compare({"one": outcome}, {"one": replace(outcome)}) == []


def test_a_loss_that_differs_in_its_last_bit_is_reported_with_its_step(same_bits, outcome):
    changed = replace(outcome, losses=with_next_value(outcome.losses, 16))
    (line,) = same_bits.compare({"one": outcome}, {"one": changed})
    assert line == "one: loss of step 17: 1.5 recorded, 1.50000012 now (1 of 30 differ)"


def test_a_changed_validation_loss_is_reported(same_bits, outcome):
    changed = replace(outcome, val_losses=with_next_value(outcome.val_losses, 1))
    (line,) = same_bits.compare({"one": outcome}, {"one": changed})
    assert line.startswith("one: validation loss of evaluation 2: 1.25 recorded, 1.25000012 now")


def test_missing_losses_are_reported(same_bits, outcome):
    changed = replace(outcome, losses=outcome.losses[:-1])
    assert same_bits.compare({"one": outcome}, {"one": changed}) == [
        "one: loss: 30 recorded, 29 now"
    ]


def test_changed_weights_are_reported(same_bits, outcome):
    changed = replace(outcome, weights_sha256="b" * 64)
    assert same_bits.compare({"one": outcome}, {"one": changed}) == [
        "one: final weights: digest aaaaaaaaaaaa recorded, bbbbbbbbbbbb now"
    ]


def test_missing_new_and_failed_trainings_are_reported(same_bits, outcome):
    recorded = {"gone": outcome, "same": outcome, "broken": outcome}
    found = {"same": outcome, "broken": "exit status 1: no such key", "new": outcome}
    assert same_bits.compare(recorded, found) == [
        "gone: recorded, but was not run",
        "broken: failed: exit status 1: no such key",
        "new: was run, but is not recorded",
    ]


def test_a_machine_without_a_record_is_told_so_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "check", "--records", tmp_path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout.startswith("no ")
    assert done.stdout.count("\n") == 1


def test_what_is_written_is_read_back(same_bits, outcome, tmp_path):
    path = tmp_path / "records" / "cpu_1.0.json"
    same_bits.write_record(path, {"conditions": {"cpu": "x"}, "without": []}, {"one": outcome})
    assert json.loads(path.read_text())["conditions"] == {"cpu": "x"}
    assert same_bits.read_record(path)[1] == {"one": outcome}


def test_check_tells_a_changed_record_from_a_training_that_it_really_runs(
    same_bits, tmp_path, capsys
):
    name = "own-network"
    found = same_bits.run_training(same_bits.TRAININGS[name], tmp_path)
    assert len({*found.losses}) == 30, "each step has its own loss"
    changed = replace(found, losses=with_next_value(found.losses, 29))
    records = tmp_path / "records"
    same_bits.write_record(
        same_bits.record_path(records),
        {"conditions": {}, "without": [], "commit": "none"},
        {name: changed},
    )
    assert same_bits.main(["check", "--only", name, "--records", str(records)]) == 1
    assert f"{name}: loss of step 30: " in capsys.readouterr().out
