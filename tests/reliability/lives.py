"""Processes that train, forked from one that has imported everything, to be killed at any moment.

A process that imports torch anew takes seconds, one that is forked tenths of one, so hundreds of
them are affordable. Forking is safe here because the parent runs one thread and never computes: it
imports and waits (`experiment.py` starts it). For what a fork might hide, a life can also be a
fresh process: this file, run with the arguments of the command.

Two things differ from the command in either: the networks are narrow, so that a save takes
milliseconds, and nothing is measured for the mfu column or for the choice of a precision.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil
import torch
import torch.utils.tensorboard

import training_framework.train  # noqa: F401  # the command imports it only when it trains
from training_framework import faults
from training_framework.cli.main import main as run_command
from training_framework.machine import hardware, peak_flops
from training_framework.models import build_model, resnet, use_small_map_convolutions
from training_framework.training import parts

__all__ = [
    "Life",
    "begin",
    "begin_fresh",
    "end_fault",
    "fork_life",
    "left_in_shared_memory",
    "shared_memory_names",
    "warm_up",
]

LONGEST_LIFE_SECONDS = 120.0
SECONDS_BETWEEN_LOOKS = 0.002


def warm_up() -> None:
    """Make this process ready to be forked into lives."""
    torch.set_num_threads(1)
    _make_training_small()
    # A life may no longer see its own files, nor those by which Python starts a process.
    for module in ("queues", "synchronize", "popen_fork", "resource_sharer", "connection"):
        importlib.import_module(f"multiprocessing.{module}")
    importlib.import_module("training_framework.cli.summary")

    # A network without storage: nothing is computed, but torch imports what it needs for that.
    use_small_map_convolutions(build_model("resnet10", num_classes=2, stem="cifar"), 8)
    threads = psutil.Process().num_threads()
    assert threads == 1, f"{threads} threads: lives could hang on a lock that a thread held"


def _make_training_small() -> None:
    resnet.STAGE_CHANNELS = (4, 8, 16, 32)  # type: ignore[misc]
    peak_flops._measured_cpu_peak = lambda dtype: 1e9
    parts.training_flops_per_image = lambda model, image_size: 10**6
    hardware.measure_bf16_speed = lambda: 1.0


@dataclass
class Life:
    """A process under way, in a session of its own.

    Attributes:
        pid: Its process id, and its session's.
        log: What it prints.
        seconds: How long it lived; 0 while it does.
    """

    pid: int
    log: Path
    seconds: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    def end(self, *, kill_after: float | None = None) -> int:
        """Wait for its end. Returns its exit status, or the negative number of a signal.

        Args:
            kill_after: Seconds from its start after which it is killed by SIGKILL.
        """
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            now = time.monotonic() - self._started
            if pid:
                self.seconds = now
                return os.waitstatus_to_exitcode(status)
            if kill_after is not None and now >= kill_after:
                os.kill(self.pid, signal.SIGKILL)
                kill_after = None
            if now > LONGEST_LIFE_SECONDS:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"a life took over {LONGEST_LIFE_SECONDS:g} s:\n{self.said()}")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def said(self) -> str:
        """The end of what it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def orphans(self) -> list[psutil.Process]:
        """Processes of its session that are still there."""
        return [process for process in psutil.process_iter() if _session(process) == self.pid]


def begin(arguments: Sequence[str], log: Path, *, fault: str = "", gate: int | None = None) -> Life:
    """Start `efficient-resnet ARGUMENTS` in a fork of this process.

    Args:
        arguments: Of the command line.
        log: File that takes what it prints.
        fault: As TRAINING_FRAMEWORK_FAULT names it.
        gate: Reading end of a pipe, from which it takes a byte before it does anything.
    """

    def work() -> int:
        if gate is not None:
            os.read(gate, 1)
        _inject(fault)
        return run_command(list(arguments))

    return fork_life(work, log)


def begin_fresh(arguments: Sequence[str], log: Path, *, fault: str = "") -> Life:
    """Start the same as a process that imports everything itself."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env={**os.environ, faults.VARIABLE: fault},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process.returncode = 0  # it is waited for by its id, not by this object
    return Life(process.pid, log)


def fork_life(work: Callable[[], int], log: Path) -> Life:
    """Run `work` in a fork of this process, whose exit status is what it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _live(work, log)
    return Life(pid, log)


def _live(work: Callable[[], int], log: Path) -> NoReturn:
    """The child: nothing of the parent's (its cleaning up above all) runs in it."""
    status = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _inject(fault: str) -> None:
    """As if the variable had been set when the modules were imported."""
    act = faults.fault_injector(fault)
    for module in _modules():
        if getattr(module, "fault_point", None) is faults.fault_point:
            module.fault_point = act  # type: ignore[attr-defined]


def _modules() -> Iterator[object]:
    for name, module in list(sys.modules.items()):
        if name.startswith("training_framework.") and module is not faults:
            yield module


def _session(process: psutil.Process) -> int:
    try:
        return -1 if process.status() == psutil.STATUS_ZOMBIE else os.getsid(process.pid)
    except (ProcessLookupError, psutil.NoSuchProcess, PermissionError):
        return -1


def end_fault(status: int, said: str) -> str:
    """What is wrong with an end that is to be good or one line of error; empty where nothing is."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    refused = status == 2 and len(errors) == 1 and "; " in errors[0] and "Traceback" not in said
    return "" if status == 0 or refused else f"status {status}: {said}"


def shared_memory_names() -> set[str]:
    """What lies in the machine's shared memory."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def left_in_shared_memory(before: set[str], *, patience_seconds: float = 60.0) -> list[str]:
    """What came into the machine's shared memory and stays: other tests clear theirs away."""
    deadline = time.monotonic() + patience_seconds
    while (left := shared_memory_names() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
        before = before | (shared_memory_names() - left)  # what came later is not ours
    return sorted(left)


if __name__ == "__main__":
    _make_training_small()
    sys.exit(run_command())
