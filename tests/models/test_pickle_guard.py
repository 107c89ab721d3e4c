import argparse
import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from training_framework.models.pickle_guard import Oversized, check_pickles
from training_framework.models.resnet import build_model


def _training_state() -> dict[str, Any]:
    """What other trainers save beside weights, too."""
    model = build_model("resnet18", num_classes=10, stem="cifar")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    milestones = collections.Counter([30, 60])
    return {
        "model": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"milestones": milestones, "last": [0.1] * 500},
        "args": argparse.Namespace(lr=0.1),
        "bytes": b"\\x00\\xff" * 500,
        "classes": [f"class {number}" for number in range(1000)],
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_trainers_save_passes(tmp_path: Path, zipped: bool, protocol: int) -> None:
    path = tmp_path / "state.pth"
    torch.save(
        _training_state(),
        path,
        _use_new_zipfile_serialization=zipped,
        pickle_protocol=protocol,
    )
    check_pickles(path)


def _amplified(function: bytes, argument: bytes, times: int) -> bytes:
    """A pickle that calls a function on one argument, over and over, and keeps every result."""
    call = b"h\x00h\x01R"
    return (
        b"\x80\x02" + function + b"q\x00" + argument + b"q\x01]q\x02(" + call * times + b"e."
    )  # fmt: skip


TEXT = b"X" + (200_000).to_bytes(4, "little") + b"a" * 200_000
AMPLIFIERS = {
    "text encoded": _amplified(
        b"c_codecs\nencode\n", TEXT + b"X\x06\x00\x00\x00latin1\x86", 50_000
    ),
    "lists made sets": _amplified(
        b"cbuiltins\nset\n", b"](" + b"K\x01K\x02" * 20_000 + b"e\x85", 20_000
    ),
    "lists counted": _amplified(
        b"ccollections\nCounter\n", b"](" + b"M\x01\x02" * 20_000 + b"e\x85", 20_000
    ),
    "objects made anew": _amplified(
        b"ccollections\nOrderedDict\n", b"](" + b"K\x01K\x02\x86" * 20_000 + b"e\x85", 20_000
    ).replace(b"h\x01R", b"h\x01\x81"),
}


def _zip(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", b"3\n")
    return path


@pytest.mark.parametrize("what", AMPLIFIERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_copy_their_parts_over_and_over_are_refused(
    tmp_path: Path, what: str, zipped: bool
) -> None:
    path = tmp_path / "bomb.pth"
    if zipped:
        _zip(path, AMPLIFIERS[what])
    else:
        path.write_bytes(AMPLIFIERS[what])
    with pytest.raises(Oversized, match="copies its parts over and over"):
        check_pickles(path)


def test_nothing_after_the_harm_hides_it(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    path.write_bytes(AMPLIFIERS["text encoded"][:-1] + b"\xff\xff")
    with pytest.raises(Oversized, match="copies"):
        check_pickles(path)


def test_compressed_parts_are_refused(tmp_path: Path) -> None:
    path = _zip(tmp_path / "bomb.pth", bytes(1 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(Oversized, match="its parts are compressed"):
        check_pickles(path)


def test_parts_that_lie_upon_each_other_are_refused(tmp_path: Path) -> None:
    """Several entries of the directory may point at the same bytes of the file."""
    path = _zip(tmp_path / "bomb.pth", pickle.dumps(bytes(100_000)))
    with zipfile.ZipFile(path, "a") as archive:
        entry = archive.infolist()[0]
        for number in range(50):
            twin = zipfile.ZipInfo(f"archive/data/{number}")
            twin.header_offset, twin.CRC = entry.header_offset, entry.CRC
            twin.file_size = twin.compress_size = entry.file_size
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True
    with pytest.raises(Oversized, match="its parts are larger than the file"):
        check_pickles(path)


def test_a_huge_pickle_is_refused_in_either_case_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/DATA.PKL", bytes(5 << 20))
    with pytest.raises(Oversized, match=r"archive/DATA.PKL has 5,242,880 bytes"):
        check_pickles(path)
    path.write_bytes(pickle.dumps(["a" * (1 << 20), "b" * (1 << 20), *["c" * 999] * 3], 2) * 9)
    check_pickles(path)
    path.write_bytes(pickle.dumps(["a" * (1 << 21), "b" * (1 << 21), "c" * (1 << 21)], 2))
    with pytest.raises(Oversized, match="its pickle has more than 4 MiB"):
        check_pickles(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02.", b"\x80\x02h\x05.", bytes(100)])
def test_what_is_no_such_file_is_left_to_torch(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    check_pickles(path)


def test_a_zip_with_a_pickle_in_front_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    harmless = io.BytesIO()
    torch.save({"w": torch.ones(2)}, harmless)
    path = tmp_path / "both.pth"
    path.write_bytes(AMPLIFIERS["text encoded"] + harmless.getvalue())
    with pytest.raises(Oversized):
        check_pickles(path)
