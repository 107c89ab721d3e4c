"""The benchmark of acceptance with each situation once."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/double_launches.py"


def test_of_two_runs_started_at_once_on_a_directory_one_writes(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--launches=4", f"--output={tmp_path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("double-launches_*.json")
    result = json.loads(path.read_text())
    assert sum(result["outcomes"].values()) == 4
    assert result["refusals"] >= 2
