import hashlib
import json
import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from training_framework.checkpoint import load_checkpoint, read_description, save_checkpoint
from training_framework.checkpoint.file import begins_like_checkpoint, read_state
from training_framework.checkpoint.flat_state import FlatState
from training_framework.errors import UserError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
DTYPES += (torch.int16, torch.int8, torch.uint8, torch.bool)
SMALL = {"model": {"w": torch.arange(6.0).view(2, 3), "v": torch.tensor([True, False])}, "n": 1}


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return (
            ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and bool(torch.equal(ours, theirs))
        )
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, (list, tuple)):
        pairs = zip(ours, theirs, strict=True)
        return type(ours) is type(theirs) and all(same(a, b) for a, b in pairs)
    return type(ours) is type(theirs) and ours == theirs


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {
        "by dtype": {str(dtype): torch.ones(3, dtype=dtype) for dtype in DTYPES},
        "shapes": [torch.tensor(1.5), torch.empty(0, 4), torch.zeros(2, 1, 3)],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 7: {}}, "betas": (0.9, 0.999)},
        "plain": {"none": None, "yes": True, "inf": math.inf, "large": 2**63 - 1, "tiny": 5e-324},
        "text": ["päth", "\udc80", '"\\\n'],
        "$odd": {"$tensor": "no tensor"},
        "a/b": {"c": torch.zeros(1)},
        "a": {"b/c": torch.ones(1)},
    }
    save_checkpoint(tmp_path / "a.ckpt", state)
    assert same(read_state(tmp_path / "a.ckpt"), state)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.ckpt"]


def test_tensors_lie_in_memory_as_they_did(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number, shape in enumerate([(4, 3, 3, 3), (4, 3, 1, 1), (4, 1, 3, 3)]):
        plain = torch.randn(shape, generator=generator)
        for layout in (torch.contiguous_format, torch.channels_last):
            tensor = plain.clone(memory_format=layout)
            save_checkpoint(tmp_path / "a.ckpt", {"w": tensor})
            loaded = read_state(tmp_path / "a.ckpt")["w"]
            assert torch.equal(loaded, tensor), number
            assert loaded.stride() == tensor.stride()
            assert loaded.data_ptr() % 64 == 0


def test_what_torch_notes_beside_a_state_dict_is_kept(tmp_path):
    state = torch.nn.BatchNorm2d(2).state_dict()
    save_checkpoint(tmp_path / "a.ckpt", {"model": state})
    loaded = read_state(tmp_path / "a.ckpt")["model"]
    assert isinstance(loaded, OrderedDict)
    assert loaded._metadata == state._metadata == {"": {"version": 2}}


def test_the_file_is_a_safetensors_file(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", SMALL)
    with safe_open(tmp_path / "a.ckpt", framework="pt") as file:
        assert torch.equal(file.get_tensor("model/w"), SMALL["model"]["w"])
        assert file.metadata()["format_version"] == "2"


def test_a_copy_stays_when_the_state_changes():
    state = {"w": torch.zeros(3), "listed": [1]}
    copied = FlatState.of(state).copied()
    state["w"].add_(1)
    state["listed"].append(2)
    assert same(copied.put_together(), {"w": torch.zeros(3), "listed": [1]})


def test_the_description_is_read_without_the_tensors(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", SMALL)
    content = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[:-26])
    assert read_description(tmp_path / "cut.ckpt")["n"] == 1
    with pytest.raises(UserError, match=r"cut\.ckpt: cannot be read as a checkpoint"):
        read_state(tmp_path / "cut.ckpt")


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"spoiled\.ckpt: cannot be read as a checkpoint \(.+\); it"
    ):
        read_state(path)


def test_every_changed_byte_is_noticed(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", SMALL)
    content = (tmp_path / "a.ckpt").read_bytes()
    for place in range(len(content)):
        spoiled = bytearray(content)
        spoiled[place] ^= 1 << place % 8
        refused(tmp_path / "spoiled.ckpt", bytes(spoiled))


def test_every_other_length_is_noticed(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", SMALL)
    content = (tmp_path / "a.ckpt").read_bytes()
    for length in range(len(content)):
        refused(tmp_path / "spoiled.ckpt", content[:length])
    refused(tmp_path / "spoiled.ckpt", content + b"\0")


def test_pieces_that_changed_places_are_noticed(tmp_path):
    state = {"a": torch.arange(8.0), "b": torch.arange(8.0) + 1}
    save_checkpoint(tmp_path / "a.ckpt", state)
    content = (tmp_path / "a.ckpt").read_bytes()
    refused(tmp_path / "spoiled.ckpt", content[:-64] + content[-32:] + content[-64:-32])
    refused(tmp_path / "spoiled.ckpt", content[:-64] + bytes(64))


def forged(content: bytes, change: Any) -> bytes:
    """A file whose header somebody changed, with a new digest beside it."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    header["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head).hexdigest().encode()
    return head.replace(b"0" * 64, digest, 1) + content[8 + length :]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["__metadata__"].pop("state"),
        lambda header: header["__metadata__"].update(state="[" * 100_000),
        lambda header: header["__metadata__"].update(state='{"$tensor": "gone"}'),
        lambda header: header["__metadata__"].update(state='{"$items": [[[], 1]]}'),
        lambda header: header["__metadata__"].update(state='{"$state_dict": 5}'),
        lambda header: header["__metadata__"].update(state="9" * 5000),
        lambda header: header["__metadata__"].update(crc32=""),
        lambda header: header["model/w"].update(shape=[2**40, 2**40]),
        lambda header: header["model/w"].update(data_offsets=[0, 2**60]),
        lambda header: header["model/w"].update(dtype="O"),
        lambda header: header.pop("model/w"),
    ],
)
def test_a_header_that_somebody_made_up_is_refused(tmp_path, change):
    save_checkpoint(tmp_path / "a.ckpt", SMALL)
    content = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "same.ckpt").write_bytes(forged(content, lambda header: None))
    assert same(read_state(tmp_path / "same.ckpt"), SMALL)
    refused(tmp_path / "spoiled.ckpt", forged(content, change))


class Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_is_named_and_not_read(in_tmp_path, as_zip):
    torch.save({"model": Command()}, "hostile.ckpt", _use_new_zipfile_serialization=as_zip)
    assert not begins_like_checkpoint(Path("hostile.ckpt"))
    with pytest.raises(UserError, match=r"hostile\.ckpt: was written by torch\.save, .*--weights"):
        load_checkpoint(Path("hostile.ckpt"))
    assert not Path("canary").exists()
    torch.load("hostile.ckpt", weights_only=False)
    assert Path("canary").exists(), "the file would have run code"


def test_a_large_file_of_another_kind_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "huge.ckpt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"huge\.ckpt: cannot be read as a checkpoint"):
        read_state(tmp_path / "huge.ckpt")


def test_what_the_file_has_no_name_for_is_refused_when_it_is_written(tmp_path):
    with pytest.raises(UserError, match=r"model/w: a checkpoint cannot contain torch\.complex64"):
        save_checkpoint(tmp_path / "a.ckpt", {"model": {"w": torch.zeros(1, dtype=torch.cfloat)}})
    assert not list(tmp_path.iterdir())


def test_a_file_too_large_for_its_header_is_refused_when_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("training_framework.checkpoint.file.MAX_HEADER_BYTES", 300)
    with pytest.raises(UserError, match="the header of a checkpoint with 2 tensors"):
        save_checkpoint(tmp_path / "a.ckpt", SMALL)


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    """As with a signal in the midst of a large write."""

    class Short:
        def __init__(self, file: Any) -> None:
            self.file, self.seek = file, file.seek

        def write(self, content: memoryview) -> int:
            return int(self.file.write(content[:100]))

    from training_framework.checkpoint.file import write_header, write_tensors

    state = FlatState.of({"w": torch.from_numpy(np.arange(1000))})
    with (tmp_path / "a.ckpt").open("wb", buffering=0) as file:
        checksums = write_tensors(Short(file), state)  # type: ignore[arg-type]
        write_header(Short(file), state, checksums)  # type: ignore[arg-type]
    assert torch.equal(read_state(tmp_path / "a.ckpt")["w"], torch.arange(1000))
