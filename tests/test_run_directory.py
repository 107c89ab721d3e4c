import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training_framework.errors import UserError
from training_framework.run_directory import (
    create_run_directory,
    run_directory_of,
    write_json,
    write_text_atomically,
)


def test_versions_count_up_past_the_highest(tmp_path):
    assert create_run_directory(tmp_path / "logs", "a") == tmp_path / "logs/a/version_0"
    (tmp_path / "logs/a/version_7").mkdir()
    (tmp_path / "logs/a/version_x").mkdir()
    assert create_run_directory(tmp_path / "logs", "a").name == "version_8"
    assert create_run_directory(tmp_path / "logs", "b").name == "version_0"
    assert (tmp_path / "logs/a/version_8/checkpoints").is_dir()


RACE = """
import sys
from pathlib import Path
from training_framework.run_directory import create_run_directory
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    print(create_run_directory(Path(sys.argv[1]), "race"))
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


def test_a_file_in_the_place_is_an_error_that_names_it(tmp_path):
    (tmp_path / "logs").write_text("mine")
    with pytest.raises(UserError, match=r"logs.*cannot be written to .*another --output-dir"):
        create_run_directory(tmp_path / "logs", "a")
    assert (tmp_path / "logs").read_text() == "mine"


def test_the_directory_of_a_checkpoint_is_found_where_it_is_a_run(tmp_path):
    directory = create_run_directory(tmp_path, "a")
    checkpoint = directory / "checkpoints" / "last.ckpt"
    assert run_directory_of(checkpoint) is None
    (directory / "config.yaml").touch()
    assert run_directory_of(checkpoint) == directory
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
