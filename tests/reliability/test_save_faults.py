"""Each system call of a save fails, or is the last of its process: a good checkpoint is there.

First a checkpoint's keeper alone: for each call by which a save changes files (open, write, fsync,
link, replace, ...), and with and without hard links, the call finds the disk full, fails, or is the
last thing that the process does. The newest checkpoint that can be loaded must then be the one
before the save or the one of it, bit for bit; an error must be a UserError; and the next save must
work. Then whole runs: at each point of a save the disk is full, fails, or the run is killed, or a
limit of the system cuts the file short; resumed, it must end as a run without faults.
"""

import json
import resource
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment import run_experiment
from failing_calls import ACTIONS, FailingCalls
from lives import begin, end_fault, fork_life, warm_up
from reliability_result import RESULTS, write_result
from tiny_training import differences, newest_version, write_configuration, write_images

from training_framework.checkpoint import CheckpointKeeper, load_checkpoint, load_newest
from training_framework.cli.main import main as run_command
from training_framework.errors import UserError
from training_framework.faults import POINTS
from training_framework.measure.verify.difference import compare_states

KEPT = 2
USAGE_ERROR = 2
STOPPED_AFTER = 6  # where a row is logged anyway
RUN_ACTIONS = ("ENOSPC", "EIO", "kill")
# The second save of a run has a checkpoint before it, the third one two.
RUN_PASSES = (2, 3)


def state_of(number: int) -> dict[str, Any]:
    """A state that tells its number in every part."""
    generator = torch.Generator().manual_seed(number)
    return {
        "model": {f"weight{i}": torch.randn(8, 4, generator=generator) for i in range(3)},
        "average": None,
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(32, generator=generator)}}},
        "scaler": {},
        "sums": None,
        "progress": {"step": number, "epoch": number},
        "config": {},
        "network": {"model": "resnet10"},
    }


def save(folder: Path, number: int, calls: FailingCalls) -> int:
    """In a process of its own. Returns 0, or 2 where it says that it could not."""
    keeper = CheckpointKeeper(folder, prefix="resnet10", keep=KEPT)
    try:
        with calls:
            try:
                keeper.save(state_of(number), epoch=number, val_acc1=10.0 * number)
            finally:
                keeper.close()
    except UserError as error:
        print(error)
        return USAGE_ERROR
    finally:
        (folder.parent / "trace.json").write_text(json.dumps(calls.trace))
    return 0


def traced_calls(folder: Path, *, without_links: bool) -> list[str]:
    """Names of the calls of a third save, in their order."""
    prepare(folder, without_links=without_links)
    calls = FailingCalls(without_links=without_links)
    log = folder.parent / "save.log"
    life = fork_life(lambda: save(folder, 3, calls), log)
    assert life.end() == 0, life.said()
    trace: list[str] = json.loads((folder.parent / "trace.json").read_text())
    return trace


def prepare(folder: Path, *, without_links: bool) -> None:
    """A folder as two saves leave it."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()

    def save_twice() -> int:
        calls = FailingCalls(without_links=without_links)
        return save(folder, 1, calls) or save(folder, 2, calls)

    life = fork_life(save_twice, folder.parent / "save.log")
    assert life.end() == 0, life.said()


def faults_of_save(folder: Path, fail_at: int, action: str, *, without_links: bool) -> list[str]:
    """What is wrong after the third save met this fault."""
    prepare(folder, without_links=without_links)
    log = folder.parent / "save.log"
    calls = FailingCalls(fail_at, action, without_links=without_links)
    life = fork_life(lambda: save(folder, 3, calls), log)
    status = life.end()
    expected = (-signal.SIGKILL,) if action.startswith("kill") else (0, USAGE_ERROR)
    if status not in expected:
        return [f"status {status}: {life.said()}"]
    faults = []
    try:
        newest = load_newest(folder / "last.ckpt")[0]
    except UserError as error:
        return [f"no checkpoint can be loaded: {error}"]
    number = newest["progress"]["step"]
    if number not in ((3,) if status == 0 else (2, 3)):
        faults.append(f"status {status}, and the newest checkpoint is {number}")
    faults += compare_states(state_of(number), newest).differences
    life = fork_life(lambda: save(folder, 4, FailingCalls(without_links=without_links)), log)
    if life.end() != 0:
        faults.append(f"the next save failed: {life.said()}")
        return faults
    return faults + faults_of_folder(folder, newest_number=4)


def faults_of_folder(folder: Path, *, newest_number: int) -> list[str]:
    """What is wrong with a folder after a save that worked."""
    names = sorted(path.name for path in folder.iterdir())
    numbers = {name: load_checkpoint(folder / name)["progress"]["step"]
               for name in names if not name.startswith(".")}  # fmt: skip
    faults = []
    if len(numbers) < len(names):
        faults.append(f"left over: {names}")
    if numbers.get("last.ckpt") != newest_number:
        faults.append(f"last.ckpt is {numbers.get('last.ckpt')} of {newest_number}")
    best = sorted(number for name, number in numbers.items() if "val_acc1" in name)
    if best[-1:] != [newest_number] or len(best) > KEPT:
        faults.append(f"the best are {best}")
    return faults


def fail_calls(folder: Path, *, every: int) -> tuple[Counter[str], list[str]]:
    """Every call, every action, with and without hard links; only each `every`-th is tried."""
    tried = [
        (without_links, fail_at, name, action)
        for without_links in (False, True)
        for fail_at, name in enumerate(traced_calls(folder, without_links=without_links), start=1)
        for action in ACTIONS
    ]
    counts: Counter[str] = Counter()
    faults = []
    for without_links, fail_at, name, action in tried[::every]:
        where = f"{name} without hard links" if without_links else name
        counts[f"{where}: {action}"] += 1
        found = faults_of_save(folder, fail_at, action, without_links=without_links)
        faults += [f"call {fail_at}, {where}, {action}: {fault}" for fault in found]
    return counts, faults


def fail_runs(folder: Path, *, every: int) -> tuple[Counter[str], list[str]]:
    """Every point of a save in whole runs, of which only each `every`-th is tried."""
    config = folder / "config.yaml"
    write_configuration(config, write_images(folder / "images"), num_workers=0,
                        output_dir=str(folder / "runs"), tensorboard=False)  # fmt: skip
    runs = _Runs(folder, config)
    runs.train("straight")
    straight = newest_version(folder / "runs" / "straight")
    points = sorted(point for point in POINTS if point.startswith("checkpoint."))
    tried = [
        f"{point}:{passes}:{action}"
        for point in points
        for passes in RUN_PASSES
        for action in RUN_ACTIONS
    ][::every]
    counts: Counter[str] = Counter()
    faults = []
    for number, fault in enumerate(tried):
        name = f"run-{number}"
        ended = runs.train(name, fault=fault)
        counts[f"{fault}: status {ended}"] += 1
        faults += [f"{fault}: {line}" for line in runs.wrong_end(ended)]
        faults += [f"{fault}: {line}" for line in runs.finish(name, straight)]
    return counts, faults + cut_short(folder, config, straight, counts)


def cut_short(folder: Path, config: Path, straight: Path, counts: Counter[str]) -> list[str]:
    """A run whose next save is cut short by the system itself."""
    runs = _Runs(folder, config)
    runs.train("limited", f"--stop-after-steps={STOPPED_AFTER}")
    last = newest_version(folder / "runs" / "limited") / "checkpoints" / "last.ckpt"
    limit = last.stat().st_size // 2

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return run_command(["train", f"--config={config}", "--name=limited"])

    runs.life = fork_life(work, folder / "limited.log")
    status = runs.life.end()
    counts[f"file size limit: status {status}"] += 1
    return [f"file size limit: {line}"
            for line in [*runs.wrong_end(status), *runs.finish("limited", straight)]]  # fmt: skip


class _Runs:
    """Runs of one configuration, one at a time."""

    def __init__(self, folder: Path, config: Path) -> None:
        self._folder = folder
        self._config = config

    def train(self, name: str, *flags: str, fault: str = "") -> int:
        """A process of the run of this name. Returns its status."""
        arguments = ["train", f"--config={self._config}", f"--name={name}", *flags]
        self.life = begin(arguments, self._folder / f"{name}.log", fault=fault)
        return self.life.end()

    def wrong_end(self, status: int) -> list[str]:
        """What is wrong with how the latest process met its fault."""
        if status == -signal.SIGKILL:
            return []
        said = self.life.said()
        fault = f"it trains: {said}" if status == 0 else end_fault(status, said)
        return [fault] if fault else []

    def finish(self, name: str, straight: Path) -> list[str]:
        """Resume to the end. Returns what differs from the straight run."""
        runs = self._folder / "runs" / name
        try:
            load_newest(newest_version(runs) / "checkpoints" / "last.ckpt")
        except UserError as error:
            return [f"no checkpoint can be loaded: {error}"]
        status = self.train(name)
        if status != 0:
            return [f"resumed: status {status}: {self.life.said()}"]
        return differences(straight, newest_version(runs))


def save_faults(every: int) -> dict[str, Any]:
    warm_up()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="save-faults-") as temporary:
        folder = Path(temporary)
        calls, faults = fail_calls(folder / "checkpoints", every=every)
        runs, more_faults = fail_runs(folder, every=every)
    return {
        "failed_calls": sum(calls.values()),
        "failed_runs": sum(runs.values()),
        "calls": dict(calls),
        "runs": dict(runs),
        "faults": faults + more_faults,
        "seconds": time.monotonic() - started,
    }


@pytest.mark.long
def test_whatever_fails_in_a_save_a_good_checkpoint_is_there(long):
    found = run_experiment(save_faults, every=1 if long else 5)
    if long:
        write_result("save-faults", RESULTS, found)
    assert not found["faults"]
    assert found["failed_calls"] >= 20
    assert {call.partition(":")[0] for call in found["calls"]} >= {"write", "fsync", "replace"}
    assert any("status -9" in run for run in found["runs"])
    assert any("status 2" in run for run in found["runs"])
