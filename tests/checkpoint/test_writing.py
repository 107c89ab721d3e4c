import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from training_framework.checkpoint import save_checkpoint
from training_framework.checkpoint.file import read_state
from training_framework.errors import UserError


def state_of(mark: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((3,), mark)}}


def mark_of(path: Path) -> float:
    return read_state(path)["model"]["w"][0].item()


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
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_gone_has_a_cure_of_its_own(tmp_path):
    with pytest.raises(
        UserError, match=r"a\.ckpt: .* \(No such file or directory\); restore its fol"
    ):
        save_checkpoint(tmp_path / "gone" / "a.ckpt", state_of(1))


def test_file_and_folder_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        calls.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    save_checkpoint(tmp_path / "a.ckpt", state_of(1))
    assert calls == [".a.ckpt.tmp", "replace", tmp_path.name]


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
def test_a_disk_that_fills_up_in_the_middle_of_a_write_keeps_the_old_file(tmp_path, forks):
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, state_of(1))
    done = forks.run("-c", FULL_DISK, path)
    assert done.returncode == 0, done.stderr
    assert f"{path}: the checkpoint cannot be written (File too large); free" in done.stdout
    assert mark_of(path) == 1
    assert list(tmp_path.iterdir()) == [path]
