import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training_framework.checkpoint import CheckpointKeeper, load_checkpoint, save_checkpoint
from training_framework.errors import UserError

PARTS = ("model", "average", "optimizer", "scaler", "sums", "progress", "config", "network")


def state_of(mark: float, size: int = 3) -> dict[str, Any]:
    return {**dict.fromkeys(PARTS), "model": {"w": torch.full((size,), mark)}}


def mark_of(path: Path) -> float:
    return load_checkpoint(path)["model"]["w"][0].item()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_state_comes_back_as_it_was(tmp_path):
    state = {
        **state_of(1.5),
        "progress": {"step": 3, "best": None, "epochs": [{"seconds": 0.5}]},
        "optimizer": {"state": {0: {"momentum_buffer": torch.arange(4.0)}}, "param_groups": []},
        "config": {"lr": "auto", "milestones": [3, 5.5], "data_root": "päth"},
    }
    save_checkpoint(tmp_path / "a.ckpt", state)
    loaded = load_checkpoint(tmp_path / "a.ckpt")
    momentum = loaded["optimizer"]["state"][0].pop("momentum_buffer")
    assert torch.equal(momentum, torch.arange(4.0))
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert (loaded["progress"], loaded["config"]) == (state["progress"], state["config"])
    assert names_in(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, failing):
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, state_of(1))
    before = path.read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if failing == "fsync" else Path, failing, fail)
    with pytest.raises(UserError, match=r"last\.ckpt: .* \(No space left on device\); free some"):
        save_checkpoint(path, state_of(2))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["last.ckpt"]


# A limit on the size of files fails in the middle of a write, as a full disk does.
FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from training_framework.checkpoint import save_checkpoint
from training_framework.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(Path(sys.argv[1]), {"model": torch.zeros(1_000_000)})
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_a_disk_that_fills_up_in_the_middle_of_a_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, state_of(1))
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True
    )
    assert f"{path}: the checkpoint cannot be written (File too large); free" in done.stdout
    assert mark_of(path) == 1
    assert names_in(tmp_path) == ["last.ckpt"]


class Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_file_is_named_and_not_run(in_tmp_path, as_zip):
    hostile = {**state_of(1), "format_version": 1, "config": Command()}
    torch.save(hostile, "hostile.ckpt", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError, match=r"hostile\.ckpt: .*it holds code: \w+\.system"):
        load_checkpoint(Path("hostile.ckpt"))
    assert not Path("canary").exists()
    torch.load("hostile.ckpt", weights_only=False)
    assert Path("canary").exists(), "the file would have run code"


@pytest.mark.parametrize("as_zip", [True, False])
def test_damage_of_any_kind_is_a_user_error(tmp_path, as_zip):
    path = tmp_path / "damaged.ckpt"
    content = {**state_of(1), "format_version": 1}
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    generator = np.random.default_rng(0)
    refused = 0
    for attempt in range(150):
        damaged = whole.copy()
        if attempt % 2:
            damaged = damaged[: generator.integers(len(whole))]
        else:
            damaged[generator.integers(0, len(whole), 8)] = generator.integers(0, 256, 8)
        path.write_bytes(damaged.tobytes())
        try:
            load_checkpoint(path)
        except UserError as error:
            assert str(path) in error.fault
            refused += 1
    assert refused > 75


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "is no checkpoint of this framework"),
        ({"state_dict": {}}, "is no checkpoint of this framework"),
        ({**state_of(1), "format_version": 9}, "format version 9"),
        ({"format_version": 1, "model": {}}, "lacks 'average'"),
    ],
)
def test_other_files_of_torch_are_told_apart(tmp_path, content, message):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "other.ckpt")


def keep(folder: Path, accuracies: list[float | None], *, count: int) -> CheckpointKeeper:
    """Save one checkpoint an epoch, marked with the epoch."""
    keeper = CheckpointKeeper(folder, prefix="resnet10", keep=count)
    for epoch, accuracy in enumerate(accuracies):
        keeper.save(state_of(epoch), epoch=epoch, val_acc1=accuracy)
    return keeper


def test_the_best_stay_with_what_they_held(tmp_path):
    keeper = keep(tmp_path, [20.0, 40.0, 9.5, 30.0, None], count=2)
    best = {
        "resnet10-epoch=01-val_acc1=40.0000.ckpt": 1,
        "resnet10-epoch=03-val_acc1=30.0000.ckpt": 3,
    }
    assert names_in(tmp_path) == ["last.ckpt", *best]
    assert {name: mark_of(tmp_path / name) for name in best} == best
    assert mark_of(keeper.last) == 4


def test_of_equal_ones_the_earlier_stays(tmp_path):
    keep(tmp_path, [50.0, 50.0, 50.0], count=1)
    assert names_in(tmp_path) == ["last.ckpt", "resnet10-epoch=00-val_acc1=50.0000.ckpt"]


def test_equal_ones_of_one_epoch_get_versions(tmp_path):
    keeper = CheckpointKeeper(tmp_path, prefix="resnet10", keep=3)
    for mark in range(4):
        keeper.save(state_of(mark), epoch=0, val_acc1=50.0)
    stem = "resnet10-epoch=00-val_acc1=50.0000"
    kept = {f"{stem}.ckpt": 0, f"{stem}-v1.ckpt": 1, f"{stem}-v2.ckpt": 2}
    assert {name: mark_of(tmp_path / name) for name in kept} == kept
    assert len(names_in(tmp_path)) == 4


def test_keeping_none_writes_only_the_last(tmp_path):
    keep(tmp_path, [50.0, 60.0], count=0)
    assert names_in(tmp_path) == ["last.ckpt"]


def test_files_of_other_names_are_left_alone(tmp_path):
    mine = ["best.ckpt", "resnet18-epoch=00-val_acc1=1.0000.ckpt", "notes.txt"]
    for name in mine:
        (tmp_path / name).touch()
    keep(tmp_path, [1.0, 2.0], count=1)
    assert set(mine) <= set(names_in(tmp_path))


def test_without_hard_links_the_best_are_copies(tmp_path, monkeypatch):
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", fail)
    keep(tmp_path, [1.0, None], count=1)
    assert names_in(tmp_path) == ["last.ckpt", "resnet10-epoch=00-val_acc1=1.0000.ckpt"]
    assert mark_of(tmp_path / "resnet10-epoch=00-val_acc1=1.0000.ckpt") == 0
    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(UserError, match=r"val_acc1=2\.0000\.ckpt: the checkpoint cannot be"):
        keep(tmp_path, [2.0], count=1)
    assert len(names_in(tmp_path)) == 2
