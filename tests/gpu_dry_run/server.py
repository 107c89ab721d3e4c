"""Runs cases on a fake GPU: a case a line from the standard input, its report a line back.

Torch is imported once, after the library that it takes for CUDA. Each case then is a process of its
own, forked from here.
"""

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import library

CANNOT_RUN = 77  # exit status


def _in_a_process_of_its_own(call: Callable[[], Any]) -> Any:
    """What the call gives, made in a fork of this process; what it prints is dropped."""
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if not child:
            os.chdir(folder)
            with Path("said.txt").open("w") as said:
                os.dup2(said.fileno(), 1)
            Path("result.json").write_text(json.dumps(call()))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        result = Path(folder, "result.json")
        if not result.exists():
            return {"error": f"the process ended with status {status}"}
        return json.loads(result.read_text())


def main() -> None:
    """Answer cases until there are no more."""
    try:
        library.load()
    except library.CannotBuildError as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT_RUN)
    from dry_run import fault_of_fake_cuda, report_of  # they import torch

    # A process that has made a backward pass cannot be forked to make others.
    fault = _in_a_process_of_its_own(fault_of_fake_cuda)
    if fault:
        print(fault, file=sys.stderr)
        sys.exit(CANNOT_RUN)
    print("ready", flush=True)
    for line in sys.stdin:
        report = _in_a_process_of_its_own(functools.partial(report_of, json.loads(line)))
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
