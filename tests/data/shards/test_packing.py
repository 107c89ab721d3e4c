import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image

from training_framework.data import open_dataset
from training_framework.data.decoding import decode_image
from training_framework.data.jpeg_regions import Box, decode_region
from training_framework.data.shards.packed import inspect_packed
from training_framework.data.shards.packed_file import PackedFile
from training_framework.data.shards.packing import pack_folder
from training_framework.data.splits import FileSplit
from training_framework.errors import UserError
from training_framework.faults import fault_injector


def _picture(path: Path, height: int, width: int, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels.resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes; sizes and formats differ."""
    root = tmp_path / "pets"
    for number in range(5):
        _picture(root / "train" / "cat" / f"{number}.jpg", 60 + 10 * number, 90, seed=number)
        _picture(root / "train" / "dog" / f"{number}.png", 90, 61 + 8 * number, seed=10 + number)
    _picture(root / "val" / "cat" / "a.jpg", 40, 40, seed=20)
    _picture(root / "val" / "dog" / "far" / "b.jpg", 300, 200, seed=21)
    return root


def _row(file: PackedFile, name: str) -> int:
    return next(row for row in range(len(file)) if file.name_of(row) == name)


def test_pictures_keep_their_bytes_unless_they_are_scaled(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "pets.arrow"
    summary = pack_folder(source, dest)
    assert summary.file_bytes == dest.stat().st_size
    file = PackedFile(dest)
    assert (file.info.train_images, file.info.val_images) == (10, 2)
    assert file.info.class_names == ["cat", "dog"]
    names = [file.name_of(row) for row in range(len(file))]
    assert names == sorted(p.relative_to(source).as_posix() for p in source.rglob("*.*"))
    for row, name in enumerate(names):
        data = file.read(row)
        assert data == (source / name).read_bytes()
        assert file.is_intact(row, data)
        with Image.open(source / name) as image:
            assert tuple(file.shapes[row]) == (image.height, image.width)
        assert file.labels[row] == ("dog" in name)


def test_larger_pictures_are_scaled_and_the_others_keep_their_bytes(
    source: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "pets.arrow"
    pack_folder(source, dest, shorter_side=64, quality=95)
    file = PackedFile(dest)
    assert (file.info.shorter_side, file.info.quality) == (64, 95)
    small = _row(file, "train/cat/0.jpg")
    assert file.read(small) == (source / "train/cat/0.jpg").read_bytes()
    scaled = _row(file, "val/dog/far/b.jpg")
    assert tuple(file.shapes[scaled]) == (96, 64)
    with Image.open(source / "val/dog/far/b.jpg") as image:
        expected = np.asarray(image.resize((64, 96), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decode_image(file.read(scaled), "b") - expected).mean() < 3


def test_scaled_pictures_can_be_decoded_in_part(source: Path, tmp_path: Path) -> None:
    pack_folder(source, tmp_path / "pets.arrow", shorter_side=64)
    file = PackedFile(tmp_path / "pets.arrow")
    data = file.read(_row(file, "val/dog/far/b.jpg"))
    region = decode_region(data, Box(40, 20, 20, 20), factor=1)
    assert region is not None
    assert region.pixels.shape[0] * region.pixels.shape[1] < 96 * 64 / 2


def test_raw_pixels_are_the_squares_in_the_middle(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "pets.arrow"
    pack_folder(source, dest, pixels=True, shorter_side=32)
    file = PackedFile(dest)
    assert file.info.pixels == 32
    images = file.pixels(slice(0, 10))
    assert images.shape == (10, 32, 32, 3)
    with Image.open(source / "train/dog/4.png") as image:  # 93 px wide, 90 high
        square = image.crop((1, 0, 91, 90)).resize((32, 32), Image.Resampling.BILINEAR)
    row = _row(file, "train/dog/4.png")
    assert np.abs(images[row].astype(int) - np.asarray(square)).max() <= 1
    assert file.is_intact(row, images[row].tobytes())


def test_raw_pixels_of_pictures_of_one_size_are_kept(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            _picture(tmp_path / "set" / split / name / "1.png", 24, 24, seed=ord(name))
    pack_folder(tmp_path / "set", tmp_path / "set.arrow", pixels=True)
    with Image.open(tmp_path / "set/val/b/1.png") as image:
        expected = np.asarray(image)
    np.testing.assert_array_equal(
        PackedFile(tmp_path / "set.arrow").pixels(slice(2, 4))[1], expected
    )


def test_raw_pixels_of_different_sizes_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cat/0\.jpg: 90x60 px.*--shorter-side"):
        pack_folder(source, tmp_path / "pets.arrow", pixels=True)
    assert not (tmp_path / "pets.arrow").exists()


def test_the_file_does_not_depend_on_the_number_of_processes(source: Path, tmp_path: Path) -> None:
    pack_folder(source, tmp_path / "one.arrow", shorter_side=64, processes=1)
    pack_folder(source, tmp_path / "two.arrow", shorter_side=64, processes=2)
    assert (tmp_path / "one.arrow").read_bytes() == (tmp_path / "two.arrow").read_bytes()


def _pack_until_the_end(source: Path, dest: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make all pieces, then meet a full disk; returns the error."""
    with monkeypatch.context() as patch:
        full = fault_injector("packing.before_replace:1:ENOSPC")
        patch.setattr("training_framework.data.shards.joining.fault_point", full)
        with pytest.raises(UserError) as caught:
            pack_folder(source, dest)
    return str(caught.value)


def test_a_killed_packing_leaves_no_file_and_goes_on(source: Path, tmp_path: Path) -> None:
    pack_folder(source, tmp_path / "expected.arrow")
    dest = tmp_path / "pets.arrow"
    command = [sys.executable, "-m", "training_framework", "data", "pack", str(source), str(dest)]
    fault = {"TRAINING_FRAMEWORK_FAULT": "packing.after_piece:3", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [*command, "--processes", "1"],
        env=os.environ | fault,
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not dest.exists()
    parts = sorted((tmp_path / ".pets.arrow.parts").glob("*.arrow"))
    assert len(parts) == 3
    parts[1].write_bytes(b"torn")
    (tmp_path / ".pets.arrow.parts" / "whole.1").write_bytes(b"torn")
    pack_folder(source, dest)
    assert dest.read_bytes() == (tmp_path / "expected.arrow").read_bytes()
    assert not (tmp_path / ".pets.arrow.parts").exists()


def test_processes_end_with_a_parent_that_is_killed() -> None:
    script = (
        "import os, signal, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from training_framework.data.shards.pieces import begin_process\n"
        "pool = ProcessPoolExecutor(2, initializer=begin_process)\n"
        "pids = [pool.submit(os.getpid) for _ in range(2)]\n"
        "print(*[pid.result() for pid in pids], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    assert parent.returncode == -signal.SIGKILL
    children = [psutil.Process(int(pid)) for pid in parent.stdout.split() if _lives(int(pid))]
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_was_packed_before_is_not_packed_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "pets.arrow"
    _pack_until_the_end(source, dest, monkeypatch)
    monkeypatch.setattr("training_framework.data.shards.pieces.decode_image", None)
    pack_folder(source, dest)
    assert PackedFile(dest).info.train_images == 10


def test_a_full_disk_is_one_line_with_the_cure(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "pets.arrow"
    line = _pack_until_the_end(source, dest, monkeypatch)
    assert line.startswith(f"{dest}: cannot be written to (No space left")
    assert "goes on" in line
    assert not dest.exists()


def test_a_changed_picture_is_packed_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "pets.arrow"
    _pack_until_the_end(source, dest, monkeypatch)
    _picture(source / "train/cat/3.jpg", 33, 44, seed=99)
    (source / "train/dog/0.png").unlink()
    pack_folder(source, dest)
    file = PackedFile(dest)
    assert file.info.train_images == 9
    assert tuple(file.shapes[_row(file, "train/cat/3.jpg")]) == (33, 44)


def test_a_piece_that_changed_on_the_disk_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "pets.arrow"
    _pack_until_the_end(source, dest, monkeypatch)
    part = tmp_path / ".pets.arrow.parts" / "train-00001-0000000.arrow"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match="not as it was written"):
        pack_folder(source, dest)
    pack_folder(source, dest)
    assert PackedFile(dest).info.train_images == 10


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_picture_is_named_and_ends_the_packing(
    source: Path, tmp_path: Path, processes: int
) -> None:
    bad = source / "train/dog/2.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(UserError, match=r"train/dog/2\.png"):
        pack_folder(source, tmp_path / "pets.arrow", processes=processes)
    assert not (tmp_path / "pets.arrow").exists()


def test_bad_pictures_can_be_skipped_and_are_listed(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "pets.arrow"
    bad = source / "train/dog/2.png"
    bad.write_bytes(b"")
    lines: list[str] = []
    summary = pack_folder(source, dest, skip_bad=True, report=lines.append)
    assert summary.info.skipped == ["train/dog/2.png"]
    assert len(lines) == 1 and "dog/2.png" in lines[0]
    assert "train/dog/2.png" not in [PackedFile(dest).name_of(row) for row in range(11)]
    dest.unlink()
    with pytest.raises(UserError, match=r"dog/2\.png"):  # what was skipped before is not so now
        pack_folder(source, dest)


def test_names_that_are_no_text_are_packed(source: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(b"\xff.jpg"))
    (source / "train/cat/1.jpg").rename(source / "train/cat" / odd)
    (source / "train/dog" / odd).write_bytes(b"bad")
    dest = tmp_path / "pets.arrow"
    info = pack_folder(source, dest, skip_bad=True, report=lambda line: None).info
    assert info.skipped == ["train/dog/\ufffd.jpg"]
    file = PackedFile(dest)
    row = _row(file, "train/cat/\ufffd.jpg")
    assert file.read(row) == (source / "train/cat" / odd).read_bytes()


def test_too_many_bad_pictures_are_an_error(source: Path, tmp_path: Path) -> None:
    for number in range(5):
        (source / f"train/dog/{number}.png").write_bytes(b"x")
    with pytest.raises(UserError, match="5 pictures of the train split cannot be decoded"):
        pack_folder(source, tmp_path / "pets.arrow", skip_bad=True, report=lambda line: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shorter_side": 4}, "shorter-side is 4"),
        ({"shorter_side": 64, "quality": 0}, "quality is 0"),
        ({"quality": 80}, "no picture is encoded anew"),
        ({"pixels": True, "shorter_side": 64, "quality": 80}, "no picture is encoded anew"),
        ({"processes": 0}, "processes is 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    source: Path, tmp_path: Path, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pack_folder(source, tmp_path / "pets.arrow", **arguments)  # type: ignore[arg-type]


def test_the_destination_is_never_replaced(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "pets.arrow"
    dest.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists"):
        pack_folder(source, dest)
    with pytest.raises(UserError, match=r"let it end with \.arrow"):
        pack_folder(source, tmp_path / "pets.zip")
    assert dest.read_bytes() == b"precious"


def test_any_arrow_library_can_read_it(source: Path, tmp_path: Path) -> None:
    pack_folder(source, tmp_path / "pets.arrow")
    with pa.memory_map(str(tmp_path / "pets.arrow")) as mapping:
        table = pa.ipc.open_file(mapping).read_all()
    assert table.column_names == ["split", "name", "label", "height", "width", "crc32", "image"]
    assert table["split"].to_pylist() == ["train"] * 10 + ["val"] * 2
    folder = open_dataset("folder", root=source)
    assert isinstance(folder.train, FileSplit)
    assert table["name"].to_pylist()[:10] == list(folder.train.paths)


def test_inspection_tells_what_is_in_it(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "pets.arrow"
    pack_folder(source, dest)
    report = inspect_packed(dest, verify=True)
    assert report.train_per_class == (5, 5)
    assert report.val_per_class == (1, 1)
    assert report.height_range == (40, 300)
    assert report.width_range == (40, 200)
    assert report.file_bytes == dest.stat().st_size
    sizes = sorted(path.stat().st_size for path in source.rglob("*.*"))
    assert report.largest_image_bytes == sizes[-1]


def test_verifying_names_pictures_that_changed(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "pets.arrow"
    pack_folder(source, dest)
    picture = (source / "train/cat/4.jpg").read_bytes()
    content = dest.read_bytes()
    at = content.index(picture) + len(picture) // 2
    dest.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    inspect_packed(dest)
    with pytest.raises(UserError, match=r"1 of 12 pictures .* train/cat/4\.jpg"):
        inspect_packed(dest, verify=True)
