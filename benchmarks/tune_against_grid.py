"""Does `tune` find what an exhaustive grid finds?

The script starts from plain settings (fp32, NCHW, PyTorch's own kernels) and lets `tune` choose
among three switches. It then measures all eight combinations in turns, and says how close the
choice is to the best.

    python benchmarks/tune_against_grid.py --data-root DIR     # CIFAR-10
"""

import argparse
import itertools
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from training_framework.measure.compare.comparison import Comparison
from training_framework.measure.compare.environment import device_label
from training_framework.measure.compare.experiment import Experiment, Variant
from training_framework.measure.compare.result import result_file_name, unused_path
from training_framework.measure.compare.table import result_lines
from training_framework.measure.tune.tuning import tune

RESULTS = Path(__file__).parent / "results"
SWITCHES = {
    "channels_last": "channels_last",
    "winograd_convolutions": "winograd",
    "fused_norms": "fused norms",
}
OFF = ("small_map_convolutions", "keep_memory", "fused_optimizer")
KEPT = (
    "accumulate_grad_batches", "batch_size", "compile", "num_workers", "precision", "resident_data",
    "threads", *OFF,
)  # fmt: skip
TOLERANCE = 0.03


def plain_settings(data_root: Path) -> dict[str, Any]:
    return {
        "data": "cifar10",
        "data_root": str(data_root),
        "model": "resnet18",
        "stem": "imagenet",
        "batch_size": 64,
        "precision": "32",
        "compile": False,
        **dict.fromkeys((*SWITCHES, *OFF), False),
    }


def combination(values: dict[str, bool]) -> str:
    return " + ".join(name for key, name in SWITCHES.items() if values[key]) or "plain"


def grid_experiment(base: dict[str, Any], rounds: int, seconds: float) -> Experiment:
    """All combinations in turns."""
    grid = [
        dict(zip(SWITCHES, values, strict=True))
        for values in itertools.product((False, True), repeat=len(SWITCHES))
    ]
    return Experiment(
        name="tune-grid",
        description="Every combination of three switches.",
        base=base,
        variants=tuple(Variant(name=combination(values), overrides=values) for values in grid),
        rounds=rounds,
        seconds=seconds,
    )


def own_command() -> str:
    return shlex.join(["python", "benchmarks/tune_against_grid.py", *sys.argv[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a sample")
    parser.add_argument("--output", type=Path, metavar="FILE", help="result file (JSON)")
    options = parser.parse_args()
    base = plain_settings(options.data_root)
    with tempfile.TemporaryDirectory() as folder:
        tuning = tune(
            None, base, output=Path(folder) / "tuned.yaml", keep=KEPT, command=own_command()
        )
        experiment = grid_experiment(base, options.rounds, options.seconds)
        path = Path(folder) / "grid.json"
        grid = Comparison(experiment, path=path, command=own_command()).run()
    print("\n".join(result_lines(grid)))
    chosen = combination({key: tuning.chosen.get(key, False) for key in SWITCHES})
    # The median of the paired ratios, not of the speeds: the machine drifts between rounds.
    speeds = {"plain": 1.0} | {r.variant: r.median for r in grid.ratios if not r.control}
    best = max(speeds, key=lambda name: speeds[name])
    share = speeds[chosen] / speeds[best]
    print(f"tune chose {chosen}: {share:.1%} of the best of the grid ({best})")
    content = {
        "experiment": "tune-against-grid",
        "command": own_command(),
        "started": tuning.started,
        "commit": tuning.commit,
        "environment": tuning.environment,
        "chosen": chosen,
        "best": best,
        "share_of_best": share,
        "tuning": tuning.model_dump(mode="json"),
        "grid": grid.model_dump(mode="json"),
    }
    label = device_label(Experiment(**grid.definition))
    name = result_file_name("tune-against-grid", label, torch.__version__)
    path = options.output or unused_path(RESULTS / name)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0 if share >= 1 - TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
