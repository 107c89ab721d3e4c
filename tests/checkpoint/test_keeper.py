import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from training_framework.checkpoint import CheckpointKeeper, load_checkpoint, load_newest
from training_framework.checkpoint import keeper as keeper_module
from training_framework.checkpoint.flat_state import FlatState
from training_framework.errors import UserError
from training_framework.faults import fault_injector

pytestmark = pytest.mark.usefixtures("narrow_networks")

PARTS = ("model", "average", "optimizer", "scaler", "sums", "progress", "config", "network")


def state_of(mark: float) -> dict[str, Any]:
    """A state whose weights and step are the mark."""
    parts = {"model": {"w": torch.full((3,), float(mark))}, "progress": {"step": int(mark)}}
    return {**dict.fromkeys(PARTS), **parts}


def mark_of(path: Path) -> float:
    return load_checkpoint(path)["model"]["w"][0].item()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def keep(folder: Path, accuracies: list[float | None], *, count: int) -> CheckpointKeeper:
    """Save one checkpoint an epoch, marked with the epoch."""
    with CheckpointKeeper(folder, prefix="resnet10", keep=count) as keeper:
        for epoch, accuracy in enumerate(accuracies):
            keeper.save(state_of(epoch), epoch=epoch, val_acc1=accuracy)
            keeper.wait()  # a disk that is fast enough for every save
    return keeper


def test_the_last_and_the_one_before_it_stay(tmp_path):
    keeper = keep(tmp_path, [None], count=0)
    assert names_in(tmp_path) == ["last.ckpt"]
    keep(tmp_path, [None] * 4, count=0)
    assert names_in(tmp_path) == ["last-1.ckpt", "last.ckpt"]
    assert (mark_of(tmp_path / "last-1.ckpt"), mark_of(keeper.last)) == (2, 3)


def test_the_best_stay_with_what_they_held(tmp_path):
    keeper = keep(tmp_path, [20.0, 40.0, 9.5, 30.0, None], count=2)
    best = {
        "resnet10-epoch=01-val_acc1=40.0000.ckpt": 1,
        "resnet10-epoch=03-val_acc1=30.0000.ckpt": 3,
    }
    assert names_in(tmp_path) == ["last-1.ckpt", "last.ckpt", *best]
    assert {name: mark_of(tmp_path / name) for name in best} == best
    assert mark_of(keeper.last) == 4


def test_of_equal_ones_the_earlier_stays(tmp_path):
    keep(tmp_path, [50.0, 50.0, 50.0], count=1)
    assert names_in(tmp_path)[2:] == ["resnet10-epoch=00-val_acc1=50.0000.ckpt"]


def test_equal_ones_of_one_epoch_get_versions(tmp_path):
    with CheckpointKeeper(tmp_path, prefix="resnet10", keep=3) as keeper:
        for mark in range(4):
            keeper.save(state_of(mark), epoch=0, val_acc1=50.0)
            keeper.wait()
    stem = "resnet10-epoch=00-val_acc1=50.0000"
    kept = {f"{stem}.ckpt": 0, f"{stem}-v1.ckpt": 1, f"{stem}-v2.ckpt": 2}
    assert {name: mark_of(tmp_path / name) for name in kept} == kept
    assert len(names_in(tmp_path)) == 5


def test_a_step_that_is_made_again_is_kept_once(tmp_path):
    for _ in range(2):  # killed after the first save, then resumed from before it
        keep(tmp_path, [50.0, 60.0], count=3)
    assert names_in(tmp_path)[2:] == [
        "resnet10-epoch=00-val_acc1=50.0000.ckpt",
        "resnet10-epoch=01-val_acc1=60.0000.ckpt",
    ]


def test_keeping_none_keeps_those_of_before(tmp_path):
    keep(tmp_path, [50.0], count=1)
    keep(tmp_path, [60.0, 70.0], count=0)
    assert names_in(tmp_path)[2:] == ["resnet10-epoch=00-val_acc1=50.0000.ckpt"]


def test_files_of_other_names_are_left_alone(tmp_path):
    mine = ["best.ckpt", "resnet18-epoch=00-val_acc1=1.0000.ckpt", "notes.txt"]
    for name in mine:
        (tmp_path / name).touch()
    keep(tmp_path, [1.0, 2.0], count=1)
    assert set(mine) <= set(names_in(tmp_path))


def failing(number: int) -> Callable[..., None]:
    def fail(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_without_hard_links_files_are_copied_and_renamed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    keep(tmp_path, [1.0, None], count=1)
    best = "resnet10-epoch=00-val_acc1=1.0000.ckpt"
    assert names_in(tmp_path) == ["last-1.ckpt", "last.ckpt", best]
    assert [mark_of(tmp_path / name) for name in names_in(tmp_path)] == [0, 1, 0]
    monkeypatch.setattr("shutil.copyfile", failing(errno.ENOSPC))
    with pytest.raises(UserError, match=r"last\.ckpt: the checkpoint cannot be written \(No space"):
        keep(tmp_path, [2.0], count=1)
    assert names_in(tmp_path) == ["last-1.ckpt", "last.ckpt", best]


class Gate:
    """Holds the writing thread up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.threads: list[str] = []
        self.states: list[int] = []
        write = keeper_module.write_beside

        def held(path: Path, state: Any) -> Path:
            self.threads.append(threading.current_thread().name)
            self.states.append(state.description["progress"]["step"])
            assert self.opened.wait(20)
            return write(path, state)

        monkeypatch.setattr(keeper_module, "write_beside", held)

    def wait_for_write(self) -> None:
        """Until a write has begun."""
        deadline = time.monotonic() + 20
        while not self.states:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_a_save_is_written_by_a_thread_as_it_was_when_it_was_asked_for(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    keeper = CheckpointKeeper(tmp_path, prefix="a", keep=0, more_state=lambda: {"more": (1,)})
    state = state_of(1)
    keeper.save(state, epoch=0, val_acc1=None)
    state["model"]["w"].fill_(9)
    assert names_in(tmp_path) == []
    gate.opened.set()
    keeper.wait()
    assert gate.threads == ["checkpoint"]
    assert mark_of(keeper.last) == 1
    assert load_checkpoint(keeper.last)["more"] == (1,)


SLOW_DISK = [  # accuracies of the saves during one write; those that are written after it
    ([None, None, None], [3]),
    ([50.0, None, None], [1, 3]),
    ([50.0, 60.0, 70.0], [3]),
    ([50.0, 40.0, 45.0], [1, 3]),
    ([50.0, 50.0, 60.0, None], [3, 4]),
    ([50.0, 60.0, 55.0, 40.0], [2, 4]),
]


@pytest.mark.parametrize(("accuracies", "written"), SLOW_DISK)
def test_on_a_slow_disk_training_goes_on_and_the_newest_wins(
    tmp_path, monkeypatch, accuracies, written
):
    gate = Gate(monkeypatch)
    steps = []
    keeper = CheckpointKeeper(tmp_path, prefix="a", keep=1)
    monkeypatch.setattr(keeper, "_keep_previous", lambda: steps.append(gate.states[-1]))
    keeper.save(state_of(0), epoch=0, val_acc1=None)
    gate.wait_for_write()
    for step, accuracy in enumerate(accuracies, 1):
        keeper.save(state_of(step), epoch=step, val_acc1=accuracy)  # none of them waits
    gate.opened.set()
    keeper.close()
    assert steps == [0, *written]
    assert mark_of(keeper.last) == len(accuracies)
    best = max((a, -i) for i, a in enumerate(accuracies, 1) if a) if any(accuracies) else None
    kept = [mark_of(path) for path in tmp_path.glob("a-epoch*")]
    assert kept == ([] if best is None else [-best[1]])


def test_a_save_waits_only_where_two_that_may_be_best_wait(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    keeper = CheckpointKeeper(tmp_path, prefix="a", keep=3)
    keeper.save(state_of(0), epoch=0, val_acc1=10.0)
    gate.wait_for_write()
    for step in (1, 2):
        keeper.save(state_of(step), epoch=step, val_acc1=10.0 + step)
    third = threading.Thread(target=lambda: keeper.save(state_of(3), epoch=3, val_acc1=13.0))
    third.start()
    third.join(0.05)
    assert third.is_alive()
    gate.opened.set()
    third.join(20)
    keeper.close()
    assert sorted(mark_of(path) for path in tmp_path.glob("a-epoch*")) == [1, 2, 3]


def test_after_a_failed_write_nothing_that_waits_is_written(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    keeper = CheckpointKeeper(tmp_path, prefix="a", keep=1)
    keeper.save(state_of(0), epoch=0, val_acc1=None)
    gate.wait_for_write()
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    keeper.save(state_of(1), epoch=1, val_acc1=None)
    gate.opened.set()
    with pytest.raises(UserError, match="No space"):
        keeper.close()
    assert gate.states == [0]


def test_where_memory_is_short_the_state_itself_is_written(tmp_path, monkeypatch):
    memory = psutil.virtual_memory()._replace(available=23)  # the state takes 12 bytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    gate = Gate(monkeypatch)
    gate.opened.set()
    keep(tmp_path, [None], count=0)
    assert gate.threads == [threading.current_thread().name]
    assert names_in(tmp_path) == ["last.ckpt"]


def test_where_no_memory_can_be_pinned_the_state_itself_is_written(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    gate.opened.set()
    monkeypatch.setattr(
        FlatState, "copied", failing_with(RuntimeError("CUDA error: out of memory"))
    )
    keep(tmp_path, [None], count=0)
    assert gate.threads == [threading.current_thread().name]
    assert names_in(tmp_path) == ["last.ckpt"]


def failing_with(error):
    def fail(*_):
        raise error

    return fail


def wait_until_idle(keeper: CheckpointKeeper) -> None:
    """As `wait`, without its error."""
    deadline = time.monotonic() + 20
    while keeper._background.is_busy:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_error_of_the_thread_is_raised_by_the_next_call_once(tmp_path, monkeypatch):
    keeper = CheckpointKeeper(tmp_path, prefix="a", keep=0)
    keeper.save(state_of(1), epoch=0, val_acc1=None)
    keeper.wait()
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    for later in (lambda: keeper.save(state_of(3), epoch=0, val_acc1=None), keeper.close):
        keeper.save(state_of(2), epoch=0, val_acc1=50.0)
        wait_until_idle(keeper)
        with pytest.raises(UserError, match=r"last\.ckpt: the checkpoint cannot be written"):
            later()
    keeper.wait()
    assert names_in(tmp_path) == ["last.ckpt"]
    assert mark_of(keeper.last) == 1


def test_the_first_error_is_the_one_to_show(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with (
        pytest.raises(RuntimeError, match="the first"),
        CheckpointKeeper(tmp_path, prefix="a", keep=0) as keeper,
    ):
        keeper.save(state_of(2), epoch=0, val_acc1=None)
        raise RuntimeError("the first")


def test_saves_are_due_by_steps_and_by_seconds(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    keeper = CheckpointKeeper(tmp_path, prefix="a", keep=0)
    clock[0] += 1e6
    assert not keeper.is_due(1)
    keeper = CheckpointKeeper(tmp_path, prefix="a", keep=0, every_n_steps=3, every_seconds=10)
    assert [step for step in range(1, 8) if keeper.is_due(step)] == [3, 6]
    clock[0] += 10
    assert keeper.is_due(1)
    gate = Gate(monkeypatch)
    keeper.save(state_of(1), epoch=0, val_acc1=None)
    assert not keeper.is_due(2)
    clock[0] += 10
    assert not keeper.is_due(2), "while a save is written, none is due by the clock"
    gate.opened.set()
    keeper.wait()
    assert keeper.is_due(2)


STEP_AFTER_FAULT_AT_THIRD_PASS = {
    "before_write": 2, "in_write": 2, "before_fsync": 2, "before_replace": 2,
    "before_directory_fsync": 3, "after_save": 3,
}  # fmt: skip


def save_three(folder: Path) -> None:
    with CheckpointKeeper(folder, prefix="a", keep=1) as keeper:
        for step in range(1, 4):
            keeper.save(state_of(step), epoch=step, val_acc1=10.0 * step)
            keeper.wait()


def inject(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    injector = fault_injector(fault)
    for module in ("keeper", "writing"):
        monkeypatch.setattr(f"training_framework.checkpoint.{module}.fault_point", injector)


def check_folder(folder: Path, point: str) -> None:
    step = STEP_AFTER_FAULT_AT_THIRD_PASS[point]
    state, _, lines = load_newest(folder / "last.ckpt")
    assert state["progress"]["step"] == state["model"]["w"][0] == step
    assert not lines
    for path in folder.glob("[!.]*.ckpt"):
        load_checkpoint(path)


@pytest.mark.parametrize("point", STEP_AFTER_FAULT_AT_THIRD_PASS)
def test_a_process_killed_in_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, point):
    inject(monkeypatch, f"checkpoint.{point}:3:kill")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            save_three(tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    check_folder(tmp_path, point)
    keep(tmp_path, [None, None], count=1)
    assert not list(tmp_path.glob(".*")), "later saves clear away what was left"


@pytest.mark.parametrize("point", STEP_AFTER_FAULT_AT_THIRD_PASS)
def test_a_save_that_fails_leaves_a_whole_checkpoint(tmp_path, monkeypatch, point):
    inject(monkeypatch, f"checkpoint.{point}:3:ENOSPC")
    with pytest.raises(UserError, match=r"last\.ckpt: the checkpoint cannot be written \(No space"):
        save_three(tmp_path)
    check_folder(tmp_path, point)
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".resnet18-epoch=00-val_acc1=50.0000.ckpt.tmp"
    left.write_bytes(b"half")
    whole = tmp_path / "last.ckpt"
    whole.write_bytes(b"whole")
    CheckpointKeeper(tmp_path, prefix="resnet18", keep=1)
    assert not left.exists() and whole.exists()


def test_where_no_thread_can_be_started_a_save_is_made_at_once(tmp_path, monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with CheckpointKeeper(tmp_path, prefix="resnet10", keep=1) as keeper:
        keeper.save(state_of(7), epoch=0, val_acc1=None)
    assert mark_of(tmp_path / "last.ckpt") == 7
