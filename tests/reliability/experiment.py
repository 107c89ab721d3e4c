"""Experiments of hundreds of processes: run in an interpreter of their own, kept in result files.

    python -m pytest tests/reliability -m long             # small ones, as in the whole suite
    python -m pytest tests/reliability -m long --long      # at full length, with result files

An experiment is a function of a test file that returns plain values. It runs in a fresh interpreter
with one thread, since its processes are forks of that one, and no thread survives a fork.
"""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "run_experiment", "write_result"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run_experiment(experiment: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """Run a function in an interpreter of its own; arguments and result are plain values."""
    with tempfile.TemporaryDirectory(prefix="experiment-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, experiment.__code__.co_filename, experiment.__name__,
                   json.dumps(arguments), answer]  # fmt: skip
        environment = {**os.environ, **_ONE_THREAD, "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return result


def write_result(name: str, found: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `<name>_cpu-1-threads_<torch>_<date>.json`: what ran, on what, and what came of it."""
    from training_framework.machine.hardware import detect_hardware, library_versions

    versions, date = library_versions(), time.strftime("%Y-%m-%d", time.gmtime())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    result = {
        "experiment": name,
        "date": date,
        "commit": commit,
        "device_name": detect_hardware().cpu_name,
        "python": platform.python_version(),
        "versions": versions,
        **found,
    }
    release = versions["torch"].partition("+")[0]
    path = folder / f"{name}_cpu-1-threads_{release}_{date}.json"
    text = json.dumps(result, indent=1)
    # Messages name files in the temporary folder, whose path says nothing and is this machine's.
    text = re.sub(r"(?<![\w.])/[\w./-]*/(?=[\w.=-]+)", "", text)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _main(file: str, name: str, arguments: str, answer: str) -> None:
    spec = importlib.util.spec_from_file_location("experiment_file", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name)(**json.loads(arguments))
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
