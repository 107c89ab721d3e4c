"""The benchmark of acceptance with a twentieth of its files."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/mutate_checkpoints.py"


def test_spoiled_checkpoints_are_refused_and_forged_ones_do_nothing_else(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--mutations=100", f"--output={tmp_path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("mutate-checkpoints_*.json")
    result = json.loads(path.read_text())
    outcomes = result["outcomes"]
    assert sum(sum(counts.values()) for counts in outcomes.values()) == result["files"] > 100
    assert outcomes["bits flipped"].keys() == {"refused"}
    assert outcomes["pickle with code"] == {"refused": 1}
