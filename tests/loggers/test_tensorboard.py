import subprocess
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training_framework.loggers import TensorBoardLogger


def scalars(directory, tag):
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_values_stand_under_their_own_names(tmp_path):
    logger = TensorBoardLogger(tmp_path / "run")
    logger.log(10, {"train/loss": 1.5, "lr": 0.25})
    logger.log(20, {"train/loss": 1.25})
    logger.close()
    assert scalars(tmp_path / "run", "train/loss") == [(10, 1.5), (20, 1.25)]
    assert scalars(tmp_path / "run", "lr") == [(10, 0.25)]


def test_a_resumed_run_shows_each_step_once(tmp_path):
    first = TensorBoardLogger(tmp_path)
    for step in (10, 20, 30):
        first.log(step, {"lr": 1.0})
    first.close()
    second = TensorBoardLogger(tmp_path, resume_step=20)
    for step in (30, 40):
        second.log(step, {"lr": 2.0})
    second.close()
    assert scalars(tmp_path, "lr") == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


@pytest.mark.parametrize(("resume_step", "expected"), [(None, 0), (20, 20)])
def test_a_message_stands_at_the_last_step(tmp_path, resume_step, expected):
    logger = TensorBoardLogger(tmp_path, resume_step=resume_step)
    logger.message("before")
    logger.log(30, {"lr": 1.0})
    logger.message("after")
    logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    messages = [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events.Tensors("messages/text_summary")
    ]
    assert messages == [(expected, "before"), (30, "after")]


def test_importing_the_loggers_does_not_import_tensorboard():
    code = "import sys, training_framework.loggers; assert 'tensorboard' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_killed_run_has_left_every_row_that_was_logged(tmp_path, forks):
    code = (
        "import os, signal, sys\n"
        "from training_framework.loggers import TensorBoardLogger\n"
        "logger = TensorBoardLogger(sys.argv[1])\n"
        "for step in (10, 20):\n"
        "    logger.log(step, {'lr': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = forks.run("-c", code, tmp_path)
    assert done.returncode == -9
    assert scalars(tmp_path, "lr") == [(10, 1.0), (20, 1.0)]


def test_a_torn_event_hides_nothing_of_the_run_that_goes_on(tmp_path):
    first = TensorBoardLogger(tmp_path)
    for step in (10, 20, 30):
        first.log(step, {"lr": 1.0})
    first.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    second = TensorBoardLogger(tmp_path, resume_step=20)
    second.log(30, {"lr": 2.0})
    second.close()
    assert scalars(tmp_path, "lr") == [(10, 1.0), (20, 1.0), (30, 2.0)]


@pytest.mark.parametrize("jump", [0, -86_400, 86_400])
def test_files_sort_in_the_order_of_their_runs_however_the_clock_jumps(tmp_path, monkeypatch, jump):
    now = 1_700_000_000
    monkeypatch.setattr(time, "time_ns", lambda: now * 10**9)
    for start in range(3):
        logger = TensorBoardLogger(tmp_path, resume_step=10 * start if start else None)
        for step in (10 * start + 10, 10 * start + 20):
            logger.log(step, {"lr": float(start)})
        logger.close()
        now += jump
    assert scalars(tmp_path, "lr") == [(10, 0.0), (20, 1.0), (30, 2.0), (40, 2.0)]
