import errno
import os
from pathlib import Path

import pytest

from training_framework import faults
from training_framework.errors import UserError
from training_framework.loggers import CsvLogger, TensorBoardLogger
from training_framework.loggers.record_file import RecordFile


def test_records_are_in_the_file_at_once_and_in_order(tmp_path):
    file = RecordFile(tmp_path / "a", new=True)
    file.write(b"one,")
    file.write(b"two,")
    assert (tmp_path / "a").read_bytes() == b"one,two,"
    file.close()
    more = RecordFile(tmp_path / "a", new=False)
    more.write(b"three")
    more.close()
    assert (tmp_path / "a").read_bytes() == b"one,two,three"


def test_a_record_that_the_system_takes_in_pieces_is_written_whole(tmp_path, monkeypatch):
    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:3])

        def __getattr__(self, name):
            return getattr(self.file, name)

    file = RecordFile(tmp_path / "a", new=True)
    monkeypatch.setattr(file, "_file", Slow(file._file))
    file.write(b"0123456789")
    file.close()
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named_and_closing_afterwards_writes_nothing(tmp_path):
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    file = RecordFile(tmp_path / "metrics.csv", new=False)
    with pytest.raises(UserError, match=r"metrics\.csv: cannot be written to \(No space left"):
        file.write(b"row\n")
    file.close()


@pytest.mark.parametrize("sink", [CsvLogger, TensorBoardLogger])
def test_a_deleted_folder_is_noticed_at_the_next_row(tmp_path, sink):
    folder = tmp_path / "run"
    folder.mkdir()
    logger = sink(folder / "metrics.csv" if sink is CsvLogger else folder)
    logger.log(1, {"lr": 0.1})
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    with pytest.raises(UserError, match="deleted during the run"):
        logger.log(2, {"lr": 0.1})
    logger.close()


@pytest.mark.parametrize("sink", [CsvLogger, TensorBoardLogger])
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, sink):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file.*cannot be written to"):
        sink(tmp_path / "file/metrics.csv" if sink is CsvLogger else tmp_path / "file")


@pytest.mark.parametrize(("point", "rows"), [("before_row", 1), ("after_row", 2)])
def test_a_row_that_fails_is_the_users_error(tmp_path, monkeypatch, point, rows):
    inject = faults.fault_injector(f"logging.{point}:2:EIO")
    monkeypatch.setattr("training_framework.loggers.csv.fault_point", inject)
    path = tmp_path / "metrics.csv"
    logger = CsvLogger(path)
    logger.log(1, {"lr": 0.1})
    with pytest.raises(UserError, match=os.strerror(errno.EIO)):
        logger.log(2, {"lr": 0.1})
    logger.close()
    assert path.read_text().count("\n") == 1 + rows
