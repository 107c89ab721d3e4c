"""The benchmark of what guarantees cost, on a tiny network: it runs and says what it should."""

import json
from pathlib import Path

from forks import Forks

SCRIPT = Path(__file__).parents[2] / "benchmarks/reliability_price.py"


def test_epochs_with_all_guarantees_are_compared_with_bare_steps(
    tmp_path: Path, forks: Forks
) -> None:
    done = forks.run(
        SCRIPT, "--rounds=2", "--model=resnet10", "--image-size=8", "--images=70",
        "--batch-size=16", "--threads=1", "--output=result.json", cwd=tmp_path,
    )  # fmt: skip
    # So short an epoch pays far more than 1% for its checkpoint, and the script says so.
    assert done.returncode == 1, done.stderr
    assert "of an epoch they take" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    bare, guarded = result["variants"][:2]
    assert [variant["name"] for variant in (bare, guarded)] == ["bare", "all of it"]
    assert {m["images"] for m in bare["measurements"] + guarded["measurements"]} == {64}
    assert "checkpoint" in result["clock"]
    (ratio,) = (ratio for ratio in result["ratios"] if ratio["variant"] == "all of it")
    assert ratio["median"] < 0.99
