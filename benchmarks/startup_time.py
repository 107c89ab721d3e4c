"""How long a command takes until the end of its first optimizer step, beyond importing torch.

    python benchmarks/startup_time.py

`efficient-resnet train --config digits` starts and kills itself right after its first step. A
process that only imports torch takes turns with it. Files are cached and the native kernels are
compiled, as on any start but the first on a machine. The answer is the median difference.

Result: benchmarks/results/startup-time_<device>_<torch>_<date>.json.
"""

import argparse
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reliability_result import RESULTS, write_result
from step_overhead import median_with_interval

from training_framework.machine.hardware import usable_cores

FIRST_STEP = {"TRAINING_FRAMEWORK_FAULT": "step.after_update:1:kill"}


def seconds_of(command: list[str], *, expected: int, **environment: str) -> float:
    """Seconds that a process takes; it must end with the given status."""
    started = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode != expected:
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="pairs of processes (12)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args()
    importing = [sys.executable, "-c", "import torch"]
    training = [sys.executable, "-m", "training_framework", "train", "--config=digits"]
    samples: dict[str, list[float]] = {"importing torch": [], "to the first step": []}
    for number in range(options.rounds + 1):  # the first round warms files and caches
        with tempfile.TemporaryDirectory() as folder:
            command = [*training, f"--output-dir={folder}"]
            first = seconds_of(command, expected=-signal.SIGKILL, **FIRST_STEP)
        imported = seconds_of(importing, expected=0)
        if number:
            samples["to the first step"].append(first)
            samples["importing torch"].append(imported)
    differences = [a - b for a, b in zip(*reversed(samples.values()), strict=True)]
    median, low, high = median_with_interval(differences)
    path = write_result(
        "startup-time",
        options.output,
        {
            "command": shlex.join(["python", "benchmarks/startup_time.py", *sys.argv[1:]]),
            "clock": "wall-clock seconds of whole processes; digits, eager, warm files",
            "samples": samples,
            "beyond_importing_torch_seconds": [median, low, high],
        },
        device=f"cpu-{usable_cores()}-threads",
    )
    print(f"importing torch {statistics.median(samples['importing torch']):.2f} s")
    print(f"first step {median:.2f} s later [{low:.2f}, {high:.2f}]")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
