"""Compares what `tune` finds with plain PyTorch settings, and with the plan that it starts from.

    python benchmarks/tune_against_plain.py --data-root DIR     # CIFAR-10

`tune` starts from the plan's default for ResNet-18. Then plain settings (fp32, NCHW, PyTorch's own
kernels, a DataLoader in this process), the plan and the tuned settings take turns, all with the
same number of images a step. The result file has the format of `compare`; the trials go beside it,
as tune-cifar10_….json.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from training_framework.measure.compare.comparison import Comparison
from training_framework.measure.compare.environment import device_label
from training_framework.measure.compare.experiment import Experiment, Variant
from training_framework.measure.compare.result import result_file_name, save_result, unused_path
from training_framework.measure.compare.table import result_lines
from training_framework.measure.tune.tuning import tune

RESULTS = Path(__file__).parent / "results"
PLAIN: dict[str, Any] = {
    "precision": "32",
    "channels_last": False,
    "compile": False,
    "fused_optimizer": False,
    "small_map_convolutions": False,
    "winograd_convolutions": False,
    "fused_norms": False,
    "keep_memory": False,
    "resident_data": False,
    "num_workers": 0,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a sample")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    base = {
        "data": "cifar10",
        "data_root": str(options.data_root),
        "model": "resnet18",
        "stem": "imagenet",
        "batch_size": options.batch_size,
    }
    command = shlex.join(["python", "benchmarks/tune_against_plain.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        tuning = tune(None, base, output=Path(folder) / "tuned.yaml", command=command)
    print(f"tuned: {tuning.chosen or 'as planned'}")
    experiment = Experiment(
        name="tune-against-plain",
        description="Plain settings, the plan, and what tune makes of it: ResNet-18, CIFAR-10.",
        base=base,
        variants=(
            Variant(name="plain", overrides=PLAIN),
            Variant(name="as planned"),
            Variant(name="tuned", overrides=tuning.chosen),
        ),
        rounds=options.rounds,
        seconds=options.seconds,
    )
    label = device_label(experiment)
    evidence = result_file_name("tune-cifar10", label, torch.__version__)
    save_result(tuning, unused_path(options.output / evidence))
    path = unused_path(options.output / result_file_name(experiment.name, label, torch.__version__))
    result = Comparison(experiment, path=path, command=command).run()
    print("\n".join([*result_lines(result), str(path)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
