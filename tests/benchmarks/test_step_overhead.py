"""The benchmark of acceptance, short, with a bound that only a mistake in the loop exceeds."""

import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/step_overhead.py"


def test_a_step_costs_little_more_than_in_a_bare_loop(tmp_path, forks):
    done = forks.run(
        SCRIPT, "--rounds=6", "--steps=100", "--batch-size=8", "--output=results", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("step-overhead_cpu-1-threads_*.json")
    result = json.loads(path.read_text())
    turns = result["turn_seconds"]
    # Of every side the best turn, since other work on the machine only ever adds.
    bare, framework = (
        min(seconds for turn in turns for seconds in turn[side]) for side in ("bare", "framework")
    )
    assert len(turns) == result["rounds"] == 6
    # On a machine that is ten times as slow as usual, so is the framework.
    steps = result["steps_per_turn"]
    assert 0 < (framework - bare) / steps < max(400e-6, 0.6 * bare / steps)
    assert str(tmp_path) not in path.read_text()
