"""Standard streams that are closed when the command starts, each in a fresh process."""

import subprocess
import sys

import pytest


# Each alone: tests/reliability/test_surroundings.py.
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_command_does_its_work_without_a_standard_stream(closed, tmp_path):
    log = tmp_path / "log"
    program = (
        "import os, sys\n"
        "from training_framework.cli.main import main\n"
        "status = main(['train', '--epochs=x'])\n"
        f"file = open({str(log)!r}, 'w')\n"
        "assert file.fileno() > 2, file.fileno()\n"
        "os.write(1, b'what a library prints')\n"
        "file.write(f'{status} {sys.stdout.fileno() is not None}')\n"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert log.read_text() == "2 True"


def test_text_that_a_stream_cannot_encode_is_escaped():
    program = (
        "from training_framework.cli.streams import prepare_streams\n"
        "prepare_streams()\n"
        "print('\\u00fc \\udcff')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "\\xfc \\udcff\n"), done.stderr
