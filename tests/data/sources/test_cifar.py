import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training_framework.data import ArraySplit
from training_framework.data.sources.cifar import CIFAR10, CIFAR100, CifarFiles, open_cifar
from training_framework.errors import UserError


def _write(path: Path, content: Any, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def _make_set(source: CifarFiles, folder: Path, count: int = 4, protocol: int = 2) -> None:
    """A set of `count` images a file, with pixels and labels that tell where they came from."""
    folder.mkdir(parents=True)
    names = [f"class {number}".encode() for number in range(source.num_classes)]
    _write(folder / source.meta_file, {source.names_key: names}, protocol)
    generator = np.random.default_rng(0)
    for name in (*source.train_files, source.val_file):
        data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = generator.integers(0, source.num_classes, count).tolist()
        _write(folder / name, {b"data": data, source.labels_key: labels}, protocol)


def _content(path: Path) -> Any:
    return pickle.loads(path.read_bytes(), encoding="bytes")


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("inside", [True, False])
def test_files_are_read_as_they_were_written(
    tmp_path: Path, source: CifarFiles, protocol: int, inside: bool
) -> None:
    folder = tmp_path / source.folder
    _make_set(source, folder, protocol=protocol)
    dataset = open_cifar(source, root=folder if inside else tmp_path)
    assert isinstance(dataset.train, ArraySplit)
    assert isinstance(dataset.val, ArraySplit)
    expected = np.concatenate([_content(folder / name)[b"data"] for name in source.train_files])
    np.testing.assert_array_equal(dataset.train.images.numpy().reshape(-1, 3072), expected)
    assert dataset.val.labels.tolist() == _content(folder / source.val_file)[source.labels_key]
    facts = dataset.facts
    assert facts.class_names[1] == "class 1"
    assert facts.train_images == 4 * len(source.train_files)
    assert (facts.image_size, facts.crop_padding, facts.flip, facts.enlarged) == (32, 4, True, 1)


def test_other_sizes_are_resized(tmp_path: Path) -> None:
    _make_set(CIFAR100, tmp_path / CIFAR100.folder)
    dataset = open_cifar(CIFAR100, root=tmp_path, image_size=16)
    assert isinstance(dataset.train, ArraySplit)
    assert dataset.train.images.shape == (4, 3, 16, 16)
    assert dataset.facts.array_bytes == 8 * 3 * 16 * 16


class _Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_pickle_that_runs_a_command_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / CIFAR100.folder
    _make_set(CIFAR100, folder)
    marker = tmp_path / "ran"
    _write(folder / "train", {b"data": _Command(marker)})
    with pytest.raises(UserError, match=r"train: not a CIFAR file \(.*system is not allowed\)"):
        open_cifar(CIFAR100, root=tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "does not contain 'data' and 'fine_labels'"),
        ([1], "does not contain 'data'"),
        ({b"data": np.zeros((2, 3072)), b"fine_labels": [0, 1]}, "not an array of uint8"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0]}, "for 1 labels"),
        ({b"data": np.zeros((1, 100), np.uint8), b"fine_labels": [0]}, r"\(1, 100\) for 1"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"fine_labels": []}, "for 0 labels"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [0.5]}, "not integers"),
        (
            {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [3, 100]},
            r"label 100 of image 1 is not in 0\.\.99",
        ),
    ],
)
def test_wrong_contents_are_errors_that_name_the_file(
    tmp_path: Path, content: Any, message: str
) -> None:
    folder = tmp_path / CIFAR100.folder
    _make_set(CIFAR100, folder)
    _write(folder / "test", content)
    with pytest.raises(UserError, match=f"test: .*{message}"):
        open_cifar(CIFAR100, root=tmp_path)


def test_truncated_and_missing_files_are_errors_that_name_them(tmp_path: Path) -> None:
    folder = tmp_path / CIFAR10.folder
    _make_set(CIFAR10, folder)
    third = folder / "data_batch_3"
    third.write_bytes(third.read_bytes()[:500])
    with pytest.raises(UserError, match="data_batch_3: not a CIFAR file"):
        open_cifar(CIFAR10, root=tmp_path)
    third.unlink()
    with pytest.raises(UserError, match="data_batch_3: No such file"):
        open_cifar(CIFAR10, root=tmp_path)


def test_wrong_class_names_are_an_error(tmp_path: Path) -> None:
    folder = tmp_path / CIFAR10.folder
    _make_set(CIFAR10, folder)
    _write(folder / "batches.meta", {b"label_names": [b"one"]})
    with pytest.raises(UserError, match=r"batches\.meta: does not list 10 class names"):
        open_cifar(CIFAR10, root=tmp_path)


def test_files_that_are_not_the_published_ones_are_said_once(tmp_path: Path) -> None:
    _make_set(CIFAR10, tmp_path / CIFAR10.folder)
    (note,) = open_cifar(CIFAR10, root=tmp_path).notes
    assert note.startswith("note: all files of cifar10 differ from the published ones")
    sums = {
        path.name: hashlib.md5(path.read_bytes()).hexdigest()
        for path in (tmp_path / CIFAR10.folder).iterdir()
    }
    published = replace(CIFAR10, file_md5s=sums)
    assert open_cifar(published, root=tmp_path).notes == ()
    second = replace(CIFAR10, file_md5s={**sums, "data_batch_2": "0", "test_batch": "0"})
    (note,) = open_cifar(second, root=tmp_path).notes
    assert note.startswith("note: data_batch_2, test_batch of cifar10 differ")


def test_lists_in_lists_do_not_become_huge_arrays(tmp_path: Path) -> None:
    folder = tmp_path / CIFAR100.folder
    _make_set(CIFAR100, folder)
    nested: list[Any] = [0] * 10
    for _ in range(12):
        nested = [nested] * 10
    for labels in (nested, [0, [1]], [True, 1], [10**400, 1]):
        _write(folder / "test", {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": labels})
        with pytest.raises(UserError, match=r"labels are not integers|for \d+ labels|is not in 0"):
            open_cifar(CIFAR100, root=tmp_path)


def test_a_file_too_large_or_none_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / CIFAR10.folder
    _make_set(CIFAR10, folder)
    with (folder / "data_batch_2").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        UserError, match=r"data_batch_2: 1,099,511,627,776 bytes are too many for such a file"
    ):
        open_cifar(CIFAR10, root=tmp_path)
    (folder / "data_batch_2").unlink()
    os.mkfifo(folder / "data_batch_2")
    with pytest.raises(UserError, match="data_batch_2: not a file"):
        open_cifar(CIFAR10, root=tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A local web server: its address, and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()
        thread.join()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


def _archive(source: CifarFiles, scratch: Path) -> bytes:
    _make_set(source, scratch / source.folder)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.add(scratch / source.folder, arcname=source.folder)
    return stream.getvalue()


def test_absent_set_is_downloaded_checked_and_unpacked(
    tmp_path: Path, server: tuple[str, Path]
) -> None:
    address, served = server
    content = _archive(CIFAR100, tmp_path / "scratch")
    (served / CIFAR100.archive).write_bytes(content)
    source = replace(
        CIFAR100, url=f"{address}/{CIFAR100.archive}", md5=hashlib.md5(content).hexdigest()
    )
    root = tmp_path / "data"
    downloaded = open_cifar(source, root=root).train
    (served / CIFAR100.archive).unlink()
    again = open_cifar(source, root=root).train
    original = open_cifar(CIFAR100, root=tmp_path / "scratch").train
    assert isinstance(downloaded, ArraySplit)
    assert isinstance(again, ArraySplit)
    assert isinstance(original, ArraySplit)
    assert torch.equal(downloaded.images, original.images)
    assert torch.equal(again.images, original.images)
    left = sorted(path.name for path in root.iterdir())
    assert left == [CIFAR100.folder, CIFAR100.archive]


def test_processes_that_start_together_download_once(
    tmp_path: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, served = server
    content = _archive(CIFAR100, tmp_path / "scratch")
    (served / CIFAR100.archive).write_bytes(content)
    source = replace(
        CIFAR100, url=f"{address}/{CIFAR100.archive}", md5=hashlib.md5(content).hexdigest()
    )
    requests = []

    def note_and_wait(*_: object) -> None:
        # Long enough that all of them find the set absent before the first one has it.
        requests.append(1)
        time.sleep(0.3)

    monkeypatch.setattr(_QuietHandler, "log_request", note_and_wait)
    with ThreadPoolExecutor(4) as pool:
        starts = [pool.submit(open_cifar, source, root=tmp_path / "data") for _ in range(4)]
    assert {len(start.result().train) for start in starts} == {4}
    assert len(requests) == 1


def test_download_with_another_checksum_is_refused(
    tmp_path: Path, server: tuple[str, Path]
) -> None:
    address, served = server
    (served / CIFAR100.archive).write_bytes(b"something else")
    source = replace(CIFAR100, url=f"{address}/{CIFAR100.archive}")
    with pytest.raises(UserError, match="cannot be downloaded from"):
        open_cifar(source, root=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_offline_and_absent_is_one_line_that_says_what_to_put_where(tmp_path: Path) -> None:
    source = replace(CIFAR10, url=f"http://127.0.0.1:9/{CIFAR10.archive}")
    with pytest.raises(UserError) as caught:
        open_cifar(source, root=tmp_path / "data")
    message = str(caught.value)
    assert "\n" not in message
    assert f"put {CIFAR10.archive} (MD5 {CIFAR10.md5})" in message
    assert str(tmp_path / "data") in message


def test_an_incomplete_folder_is_not_downloaded_over(tmp_path: Path) -> None:
    folder = tmp_path / "data" / CIFAR10.folder
    _make_set(CIFAR10, folder)
    (folder / "test_batch").unlink()
    source = replace(CIFAR10, url=f"http://127.0.0.1:9/{CIFAR10.archive}")
    with pytest.raises(UserError, match="cifar-10-batches-py: lacks test_batch; complete it"):
        open_cifar(source, root=tmp_path / "data")
    assert (folder / "data_batch_5").is_file()
