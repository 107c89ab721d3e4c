"""Record a training run as a result file: the command, what it printed, what it measured.

    python benchmarks/record_run.py demo -- --config digits
    python benchmarks/record_run.py cifar10-short -- --config cifar10-short --data-root DIR

The run is a process of its own, as a user starts it. The result goes to --output or
benchmarks/results/<experiment>_<device>_<torch>_<date>.json.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from training_framework.measure.compare.environment import source_commit

RESULTS = Path(__file__).parent / "results"
MACHINE_PATH = re.compile(r"(?<![\w.])/[\w./-]+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", help="name of the result")
    parser.add_argument("--dataset", help="name of the data to show with the result")
    parser.add_argument("--output", type=Path, metavar="FILE", help="result file (JSON)")
    parser.add_argument("flags", nargs="+", help="flags of `efficient-resnet train`, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = record(options.experiment, options.flags, options.dataset, Path(folder))
    path = options.output or RESULTS / file_name(result)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


def record(experiment: str, flags: list[str], dataset: str | None, folder: Path) -> dict[str, Any]:
    """Run `efficient-resnet train` with the flags and collect what it wrote."""
    others_busy = psutil.cpu_percent(interval=2.0)
    date = time.strftime("%Y-%m-%d", time.gmtime())
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "training_framework", "train", *flags, "--output-dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ,
    )
    seconds = time.perf_counter() - start
    print(process.stdout)
    if process.returncode:
        sys.exit(process.returncode)
    (run_directory,) = folder.glob("*/version_0")
    run = json.loads((run_directory / "run.json").read_text())
    with (run_directory / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    public = [without_machine_paths(flag) for flag in flags]
    return {
        "experiment": experiment,
        "command": " ".join(["efficient-resnet", "train", *public]),
        "date": date,
        "commit": source_commit() or "",
        "clock": "whole process: imports, data, training, evaluation, checkpoints",
        "seconds": seconds,
        "cpu_busy_before_percent": others_busy,
        "dataset": dataset or run["data"]["name"],
        "environment": {"versions": run["versions"], "hardware": run["hardware"]},
        "config": {**run["config"], "data_root": None, "output_dir": "logs"},
        "plan": {**run["plan"], "output_dir": "logs"},
        "epochs": run["epochs"],
        "results": {**run["results"], "run_directory": None},
        "metrics": rows,
        "output": [
            without_machine_paths(line.replace(str(folder), "logs"))
            for line in process.stdout.splitlines()
        ],
    }


def without_machine_paths(text: str) -> str:
    """Results are published; where the data lay on this machine is nobody's concern."""
    return MACHINE_PATH.sub("DIR", text)


def file_name(result: dict[str, Any]) -> str:
    """`demo_cpu-2-cores_2.13.0_2026-11-21.json`."""
    plan = result["plan"]
    device = plan["device"] if plan["device"] != "cpu" else f"cpu-{plan['threads']}-threads"
    if plan["device"] != "cpu":
        device = re.sub(r"[^a-z0-9]+", "-", plan["device_name"].lower()).strip("-")
    torch_version = result["environment"]["versions"]["torch"].partition("+")[0]
    return f"{result['experiment']}_{device}_{torch_version}_{result['date']}.json"


if __name__ == "__main__":
    main()
