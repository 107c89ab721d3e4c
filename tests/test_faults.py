"""Faults happen at the asked pass of the asked point, and nowhere else."""

import ast
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import training_framework
from training_framework import faults
from training_framework.errors import UserError
from training_framework.faults import POINTS, check_fault_variable, fault_injector

PACKAGE = Path(training_framework.__file__).parent


def test_an_error_is_raised_at_the_asked_pass_alone():
    pass_point = fault_injector("step.after_update:2:ENOSPC")
    pass_point("step.after_update")
    pass_point("step.before_update")
    with pytest.raises(OSError, match="No space left") as raised:
        pass_point("step.after_update")
    assert raised.value.errno == errno.ENOSPC
    pass_point("step.after_update")


@pytest.mark.parametrize(
    ("action", "number"), [("", signal.SIGKILL), (":kill", signal.SIGKILL), (":term", 15)]
)
def test_a_signal_ends_the_process_at_the_asked_pass(action, number):
    program = (
        "from training_framework.faults import fault_point\n"
        "for passed in range(1, 4):\n"
        "    print(passed, flush=True)\n"
        "    fault_point('evaluation.batch')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {faults.VARIABLE: f"evaluation.batch:2{action}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (-number, ["1", "2"]), done.stderr


def test_without_the_variable_a_pass_does_nothing():
    assert faults.fault_point is fault_injector("")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("step.afterupdate:1", "'step.afterupdate'"),
        ("step.after_update", "''"),
        ("step.after_update:0", "'0'"),
        ("step.after_update:-1", "'-1'"),
        ("step.after_update:1:explode", "'explode'"),
        ("step.after_update:1:EVERYTHING", "'EVERYTHING'"),
    ],
)
def test_a_setting_that_names_nothing_is_refused(setting, named, monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, setting)
    with pytest.raises(UserError, match=re.escape(named)):
        check_fault_variable()


def test_the_program_passes_the_known_points_and_no_others():
    passed = {
        ast.literal_eval(node.args[0])
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fault_point"
    }
    assert passed == POINTS
