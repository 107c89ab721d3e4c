from pathlib import Path
from typing import Any

import pytest
import torch

from training_framework.checkpoint import load_checkpoint, load_newest, previous_of, save_checkpoint
from training_framework.errors import UserError

PARTS = ("model", "average", "optimizer", "scaler", "sums", "progress", "config", "network")


def write(path: Path, step: int) -> None:
    save_checkpoint(path, {**dict.fromkeys(PARTS), "progress": {"step": step}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "does not contain the state of a run"),
        ({"model": {}}, "is incomplete: 'average' is missing"),
        ({**dict.fromkeys(PARTS), "optimizer": 3}, "its 'optimizer' is not a state"),
    ],
)
def test_states_of_other_things_are_told_apart(tmp_path, content: Any, message: str):
    save_checkpoint(tmp_path / "other.ckpt", content)
    with pytest.raises(UserError, match=rf"other\.ckpt: .*{message}"):
        load_checkpoint(tmp_path / "other.ckpt")


def test_the_one_before_is_taken_where_the_last_is_damaged_or_gone(tmp_path):
    last = tmp_path / "last.ckpt"
    write(last, 2)
    assert load_newest(last)[0]["progress"] == {"step": 2}
    assert load_newest(last)[1:] == (last, [])
    write(previous_of(last), 1)
    assert previous_of(last).name == "last-1.ckpt"
    last.write_bytes(last.read_bytes()[:-1])
    state, path, (line,) = load_newest(last)
    assert (state["progress"]["step"], path) == (1, previous_of(last))
    assert line.startswith(f"warning: {last}: cannot be read as a checkpoint (")
    assert line.endswith("; using last-1.ckpt, the one before it")
    last.unlink()
    assert load_newest(last)[0]["progress"]["step"] == 1


def test_both_are_named_where_both_are_damaged(tmp_path):
    last = tmp_path / "last.ckpt"
    for path in (last, previous_of(last)):
        write(path, 1)
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"last\.ckpt: .*last-1\.ckpt: .*; resume from another"):
        load_newest(last)


def test_an_older_format_of_torch_is_no_checkpoint(tmp_path):
    torch.save({**dict.fromkeys(PARTS), "format_version": 1}, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"old\.ckpt: was written by torch\.save"):
        load_checkpoint(tmp_path / "old.ckpt")
