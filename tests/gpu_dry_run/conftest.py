"""A process that runs trainings on a fake GPU, for all tests of this folder."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
CANNOT_RUN = 77

Report = SimpleNamespace
DryRun = Callable[..., Report]


@pytest.fixture(scope="session")
def _server() -> Iterator["subprocess.Popen[str]"]:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, str(FOLDER / "server.py")], env=environment, cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None
    if server.stdout.readline() != "ready\n":
        said = server.communicate()[1].strip()
        constraints = (ROOT / "constraints.txt").read_text()
        written_for = re.search(r"^torch==(\S+)", constraints, re.MULTILINE)
        version = importlib.metadata.version("torch")
        assert written_for is not None
        has_reason = "no g++" in said or version != f"{written_for[1]}+cpu"
        if server.returncode == CANNOT_RUN and has_reason:
            pytest.skip(f"no dry run of the GPU here: {said[:300]}")
        pytest.fail(f"the dry run of the GPU does not start: {said[-2000:]}")
    yield server
    server.communicate()


@pytest.fixture(scope="session")
def dry_run(_server: "subprocess.Popen[str]") -> DryRun:
    """Run a training on a fake GPU, in a process of its own: what was observed.

    See `observer.Observed` for the report's fields; `plan` and `steps` are those of the run, and
    `error` is the traceback that ended it. With `may_fail` an error is not a failure.
    """

    def run(
        settings: dict[str, Any] | None = None,
        *,
        gpu: dict[str, Any] | None = None,
        processes: int = 1,
        resumed_with: dict[str, Any] | None = None,
        plants: tuple[tuple[str, str, str], ...] = (),
        may_fail: bool = False,
    ) -> Report:
        assert _server.stdin is not None and _server.stdout is not None
        case = {
            "settings": settings or {}, "gpu": gpu or {}, "processes": processes, "plants": plants,
        }  # fmt: skip
        if resumed_with is not None:
            case["resumed_with"] = resumed_with
        print(json.dumps(case), file=_server.stdin, flush=True)
        report = SimpleNamespace(**json.loads(_server.stdout.readline()))
        assert hasattr(report, "plan"), report.error
        assert may_fail or not report.error, report.error
        return report

    return run
