import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from training_framework.errors import UserError
from training_framework.runs.directory import (
    DirectoryLock,
    check_space,
    check_writable,
    create_run_directory,
    next_version,
    run_directories,
    run_directory_of,
    write_json,
    write_text_atomically,
)


def create(output_dir: Path, name: str, **options: Any) -> Path:
    """A run directory, unlocked again."""
    lock = create_run_directory(output_dir, name, config_yaml="seed: 1\n", **options)
    lock.release()
    return lock.directory


def test_versions_count_up_past_the_highest(tmp_path):
    assert create(tmp_path / "logs", "a") == tmp_path / "logs/a/version_0"
    (tmp_path / "logs/a/version_7").mkdir()
    (tmp_path / "logs/a/version_x").mkdir()
    assert next_version(tmp_path / "logs/a") == 8
    assert create(tmp_path / "logs", "a").name == "version_8"
    assert create(tmp_path / "logs", "b").name == "version_0"
    names = [path.name for path in run_directories(tmp_path / "logs/a")]
    assert names == ["version_8", "version_7", "version_0"]
    assert run_directories(tmp_path / "logs/c") == []
    assert next_version(tmp_path / "logs/c") == 0


def test_a_directory_is_whole_and_locked_when_it_appears(tmp_path, monkeypatch):
    rename = Path.rename

    def seen(path: Path, target: Path) -> Path:
        assert (path / "config.yaml").read_text() == "seed: 1\n"
        assert (path / "checkpoints").is_dir()
        assert DirectoryLock.take(path) is None
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", seen)
    lock = create_run_directory(tmp_path, "a", config_yaml="seed: 1\n")
    assert DirectoryLock.take(lock.directory) is None
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["version_0"]
    lock.release()


def test_a_version_that_another_run_took_is_refused(tmp_path):
    create(tmp_path, "a", version=3)
    with pytest.raises(UserError, match=r"a/version_3: another run is using it; wait"):
        create(tmp_path, "a", version=3)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["version_3"]


RACE = """
import sys
from pathlib import Path
from training_framework.runs.directory import create_run_directory
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    print(create_run_directory(Path(sys.argv[1]), "race", config_yaml="").directory)
"""


def test_of_runs_that_start_at_once_each_gets_its_own(tmp_path):
    count = 40
    command = [sys.executable, "-c", RACE, str(tmp_path), str(count)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    directories = [line for racer in racers for line in racer.communicate()[0].split()]
    assert [racer.returncode for racer in racers] == [0, 0]
    expected = {str(tmp_path / "race" / f"version_{number}") for number in range(2 * count)}
    assert len(directories) == 2 * count
    assert set(directories) == expected


def test_one_at_a_time_holds_a_lock(tmp_path):
    lock = DirectoryLock.take(tmp_path)
    assert lock is not None
    assert DirectoryLock.take(tmp_path) is None
    lock.release()
    lock.release()
    again = DirectoryLock.take(tmp_path)
    assert again is not None
    again.release()


def test_a_lock_ends_with_its_process_although_its_children_live_on(tmp_path):
    """As loader processes do for some seconds after a kill."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        DirectoryLock.take(tmp_path)
        grandchild = os.fork()
        if grandchild:
            os.write(writing, f"{grandchild}\n".encode())
        time.sleep(60)
        os._exit(0)
    grandchild = int(os.read(reading, 20))
    try:
        assert DirectoryLock.take(tmp_path) is None
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lock = DirectoryLock.take(tmp_path)
        assert lock is not None
        lock.release()
        os.kill(grandchild, 0)
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_where_there_are_no_locks_nothing_is_refused(tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    locks = [DirectoryLock.take(tmp_path) for _ in range(2)]
    for lock in locks:
        assert lock is not None
        lock.release()


def test_a_file_in_the_place_is_an_error_that_names_it(tmp_path):
    (tmp_path / "logs").write_text("mine")
    for attempt in (lambda: create(tmp_path / "logs", "a"), lambda: check(tmp_path / "logs/a")):
        with pytest.raises(UserError, match=r"logs.*cannot be written to .*another --output-dir"):
            attempt()
    assert (tmp_path / "logs").read_text() == "mine"


def check(directory: Path) -> None:
    check_writable(directory)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_place_is_tried_out_and_left_as_it_was(tmp_path, monkeypatch, number):
    check(tmp_path / "logs" / "a")
    assert not list(tmp_path.iterdir())

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        UserError, match=rf"{tmp_path}: cannot be written to \({os.strerror(number)}"
    ):
        check(tmp_path / "logs" / "a")
    assert not list(tmp_path.iterdir())


def test_a_disk_too_small_for_a_checkpoint_is_refused(tmp_path):
    check_space(tmp_path / "logs", 1000)
    with pytest.raises(
        UserError, match=r"its disk has .* MiB left, .* run takes 1,048,576,000 MiB"
    ):
        check_space(tmp_path / "logs", 1000 * 2**40)


def test_the_directory_of_a_checkpoint_is_found_where_it_is_a_run(tmp_path):
    directory = create(tmp_path, "a")
    checkpoint = directory / "checkpoints" / "last.ckpt"
    assert run_directory_of(checkpoint) == directory
    (directory / "config.yaml").unlink()
    assert run_directory_of(checkpoint) is None
    assert run_directory_of(tmp_path / "last.ckpt") is None


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_write_keeps_the_old_text_and_leaves_no_other(tmp_path, monkeypatch, failing):
    path = tmp_path / "config.yaml"
    write_text_atomically(path, "old\n")

    def fail(*arguments: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os if failing == "fsync" else Path, failing, fail)
    with pytest.raises(OSError, match="no space"):
        write_text_atomically(path, "new\n")
    monkeypatch.undo()
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]
    write_text_atomically(path, "new\n")
    assert path.read_text() == "new\n"
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_holds_paths_as_text(tmp_path):
    write_json(tmp_path / "run.json", {"steps": 3, "resumed_from": Path("a/last.ckpt")})
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text) == {"steps": 3, "resumed_from": "a/last.ckpt"}
    assert text.endswith("}\n")
