import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from training_framework.data.sources.archives import unpack_files
from training_framework.errors import UserError

WANTED = ("one", "two")


def _archive(path: Path, fill: Callable[[tarfile.TarFile], None]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in WANTED:
            _add(tar, f"set/{name}", name.encode())
        fill(tar)
    return path


def _add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def _everything_below(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != "archive.tar.gz"
    }


HARMLESS: dict[str, Callable[[tarfile.TarFile], None]] = {
    "more files": lambda tar: _add(tar, "set/readme.html", b"hello"),
    "a path upwards": lambda tar: _add(tar, "../escaped", b"x"),
    "a path upwards below the set": lambda tar: _add(tar, "set/../../escaped", b"x"),
    "an absolute path": lambda tar: _add(tar, "/tmp/escaped-absolute", b"x"),
    "a link elsewhere": lambda tar: _add(tar, "set/link", type=tarfile.SYMTYPE, linkname="/etc"),
    "a device": lambda tar: _add(tar, "set/device", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "a file below a link": lambda tar: (
        _add(tar, "set/link", type=tarfile.SYMTYPE, linkname=".."),
        _add(tar, "set/link/escaped", b"x"),
    ),
}
REFUSED: dict[str, tuple[Callable[[tarfile.TarFile], None], str]] = {
    "a link for a file": (
        lambda tar: _add(tar, "set/one", type=tarfile.SYMTYPE, linkname="../../target"),
        "set/one is not a plain file",
    ),
    "a hard link for a file": (
        lambda tar: _add(tar, "set/one", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        "set/one is not a plain file",
    ),
    "a device for a file": (
        lambda tar: _add(tar, "set/two", type=tarfile.BLKTYPE, devmajor=8),
        "set/two is not a plain file",
    ),
    "a pipe for a file": (
        lambda tar: _add(tar, "set/two", type=tarfile.FIFOTYPE),
        "set/two is not a plain file",
    ),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_is_not_wanted_is_not_unpacked(tmp_path: Path, what: str) -> None:
    archive = _archive(tmp_path / "archive.tar.gz", HARMLESS[what])
    unpack_files(archive, tmp_path / "set", WANTED)
    assert _everything_below(tmp_path) == {"set": None, "set/one": b"one", "set/two": b"two"}
    assert not Path("/tmp/escaped-absolute").exists()


@pytest.mark.parametrize("what", REFUSED)
def test_hostile_archives_are_refused_and_leave_nothing(tmp_path: Path, what: str) -> None:
    fill, says = REFUSED[what]
    archive = _archive(tmp_path / "archive.tar.gz", fill)
    with pytest.raises(UserError, match=rf"archive\.tar\.gz: cannot be unpacked \({says}\)"):
        unpack_files(archive, tmp_path / "set", WANTED)
    assert _everything_below(tmp_path) == {}


def test_a_huge_file_is_refused_before_it_fills_the_disk(tmp_path: Path) -> None:
    header = tarfile.TarInfo("set/one")
    header.size = 1 << 40
    with gzip.open(tmp_path / "archive.tar.gz", "wb", compresslevel=1) as stream:
        stream.write(header.tobuf())
        stream.write(bytes(10 << 20))
    with pytest.raises(UserError, match=r"cannot be unpacked \(set/one is not a plain file\)"):
        unpack_files(tmp_path / "archive.tar.gz", tmp_path / "set", WANTED)
    assert _everything_below(tmp_path) == {}


@pytest.mark.parametrize("cut", [0, 10, 100])
def test_damaged_archives_are_refused(tmp_path: Path, cut: int) -> None:
    archive = _archive(tmp_path / "archive.tar.gz", lambda tar: None)
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"cannot be unpacked|lacks set/one"):
        unpack_files(archive, tmp_path / "set", WANTED)
    archive.write_bytes(b"text, not an archive")
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack_files(archive, tmp_path / "set", WANTED)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    archive = _archive(tmp_path / "archive.tar.gz", lambda tar: None)
    with pytest.raises(UserError, match="lacks set/three; delete it to download it again"):
        unpack_files(archive, tmp_path / "set", ("one", "three"))
