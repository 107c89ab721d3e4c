"""How a group ends: gracefully, or aborted after the error has been shown."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from training_framework import inference
from training_framework.cli import main as command
from training_framework.errors import UserError
from training_framework.machine import distributed
from training_framework.machine.distributed import Processes, process_group

TWO = Processes(world_size=2, local_world_size=2)
GPU = torch.device("cuda:0")


class FakeNccl:
    """Notes what is done with the group of NCCL, and what is said to the user."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.at_exit: list[object] = []
        group = SimpleNamespace(abort=lambda: self.events.append("abort"))
        for owner, name, value in (
            (torch.cuda, "set_device", lambda device: None),
            (dist, "is_backend_available", lambda backend: True),
            (dist, "init_process_group", lambda *_, **__: self.events.append("init")),
            (dist, "destroy_process_group", lambda: self.events.append("destroy")),
            (dist, "group", SimpleNamespace(WORLD=group)),
            (distributed.atexit, "register", self.at_exit.append),
            (command, "say", lambda line: self.events.append(f"said {line}")),
        ):
            monkeypatch.setattr(owner, name, value)


@pytest.fixture
def nccl(monkeypatch):
    return FakeNccl(monkeypatch)


@pytest.mark.parametrize(
    ("error", "said", "status"),
    [
        (UserError("a fault", "a cure"), "said error: a fault; a cure", 2),
        (KeyboardInterrupt(), "said interrupted", 130),
        (ValueError("x"), "said error: ValueError: x; this is a fault of the program", 70),
    ],
)
def test_an_error_is_said_before_the_group_is_aborted(nccl, monkeypatch, error, said, status):
    def evaluate_file(*_):
        with process_group(TWO, GPU):
            raise error

    monkeypatch.setattr(inference, "evaluate_file", evaluate_file)
    assert command.main(["evaluate", "x.ckpt"]) == status
    assert len(nccl.events) == 2
    assert nccl.events[1].startswith(said)
    (abort,) = nccl.at_exit
    abort()
    assert nccl.events[2:] == ["abort", "destroy"]
    assert signal.alarm(0) == 0, "the limit of its time is lifted"


def test_without_an_error_the_group_ends_at_once(nccl):
    with process_group(TWO, GPU):
        pass
    assert nccl.events == ["init", "destroy"]
    assert not nccl.at_exit


def test_gloo_ends_at_once_after_an_error_too(nccl):
    with pytest.raises(UserError), process_group(TWO, torch.device("cpu")):
        raise UserError("a fault", "a cure")
    assert nccl.events == ["init", "destroy"]
    assert not nccl.at_exit


HANGING_ABORT = """
import sys, time
from types import SimpleNamespace
import torch
import torch.distributed as dist
from training_framework.errors import UserError
from training_framework.machine import distributed
distributed.ABORT_SECONDS = 1
dist.is_backend_available = lambda backend: True
torch.cuda.set_device = dist.init_process_group = lambda *_, **__: None
dist.is_backend_available = lambda backend: True
dist.group = SimpleNamespace(WORLD=SimpleNamespace(abort=lambda: time.sleep(60)))
processes = distributed.Processes(world_size=2, local_world_size=2)
try:
    with distributed.process_group(processes, torch.device("cuda:0")):
        raise UserError("a fault", "a cure")
except UserError as error:
    print(error, flush=True)
sys.exit(2)
"""


def test_an_abort_that_hangs_does_not_keep_the_process():
    done = subprocess.run(
        [sys.executable, "-c", HANGING_ABORT], capture_output=True, text=True, timeout=50,
        check=False,
    )  # fmt: skip
    assert done.stdout == "a fault; a cure\n"
    assert done.returncode == -signal.SIGALRM, done.stderr


def test_a_process_that_is_in_a_group_already_is_told(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with (
        pytest.raises(UserError, match="already in a process group: the script formed one"),
        process_group(TWO, torch.device("cpu")),
    ):
        pass
