"""Experiments of hundreds of processes: run in an interpreter of their own, kept in result files.

    python -m pytest tests/reliability -m long             # small ones, as in the whole suite
    python -m pytest tests/reliability -m long --long      # at full length, with result files

An experiment is a function of a test file that returns plain values. It runs in a fresh interpreter
with one thread, since its processes are forks of that one, and no thread survives a fork.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["run_experiment"]

# As pyproject.toml gives them to pytest.
_PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run_experiment(experiment: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """Run a function in an interpreter of its own; arguments and result are plain values."""
    with tempfile.TemporaryDirectory(prefix="experiment-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, experiment.__code__.co_filename, experiment.__name__,
                   json.dumps(arguments), answer]  # fmt: skip
        environment = {**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(_PATHS)}
        done = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return result


def _main(file: str, name: str, arguments: str, answer: str) -> None:
    spec = importlib.util.spec_from_file_location("experiment_file", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name)(**json.loads(arguments))
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
