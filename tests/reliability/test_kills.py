"""The benchmark of acceptance with a tenth of its kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/kill_runs.py"


@pytest.mark.timeout(280)  # under 60 s on two free cores
def test_runs_that_are_killed_twenty_times_end_as_one_that_was_not(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills=20", "--forks-only", f"--output={tmp_path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("kill-runs_*.json")
    result = json.loads(path.read_text())
    assert result["kills"] == sum(result["kills_by_place"].values()) == 20
    assert result["workers"] == [0, 1, 2]
    assert not result["faults"]
    assert not result["orphans"]
    assert result["seconds_until_no_process_was_left"] < 30
