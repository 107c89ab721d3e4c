"""The benchmark of acceptance with a part of its faults."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/save_faults.py"


def test_whatever_fails_in_a_save_a_good_checkpoint_is_there(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--every=5", f"--output={tmp_path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("save-faults_*.json")
    result = json.loads(path.read_text())
    assert result["failed_calls"] >= 20
    assert {call.partition(":")[0] for call in result["calls"]} >= {"write", "fsync", "replace"}
    assert any("status -9" in run for run in result["runs"])
    assert any("status 2" in run for run in result["runs"])
