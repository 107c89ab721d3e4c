import errno
import io

import pytest

from training_framework.loggers import ConsoleLogger

TRAINING = {
    "epoch": 0,
    "train/loss": 1.4321,
    "train/acc1": 47.23,
    "lr": 0.1,
    "images_per_second": 512.3,
    "data_wait": 0.003,
}
EVALUATION = {
    "epoch": 2,
    "val/loss": 0.8123,
    "val/acc1": 71.5,
    "val/acc5": 97.9,
    "eval_seconds": 2.14,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stream():
    return io.StringIO()


def test_a_logged_step_is_one_plain_line(stream):
    logger = ConsoleLogger(total_steps=390, total_epochs=3, stream=stream)
    logger.advance(39)
    logger.log(40, TRAINING)
    logger.close()
    assert stream.getvalue() == (
        "epoch 1/3  step 40/390  loss 1.432  acc1 47.2%  512 images/s  data wait 0.3%\n"
    )


def test_an_evaluation_is_one_plain_line(stream):
    ConsoleLogger(total_steps=390, total_epochs=3, stream=stream).log(390, EVALUATION)
    assert stream.getvalue() == (
        "epoch 3/3  step 390/390  val loss 0.812  acc1 71.50%  acc5 97.90%  in 2.1 s\n"
    )


def test_training_and_evaluation_at_one_step_are_two_lines(stream):
    ConsoleLogger(total_steps=390, stream=stream).log(390, {**TRAINING, **EVALUATION})
    training, evaluation = stream.getvalue().splitlines()
    assert training.startswith("epoch 3  step 390/390  loss 1.432")
    assert evaluation.startswith("epoch 3  step 390/390  val loss 0.812")


def test_values_that_are_missing_leave_no_gap(stream):
    ConsoleLogger(total_steps=9, stream=stream).log(3, {"train/loss": 2.0, "grad_norm": 1.0})
    assert stream.getvalue() == "step 3/9  loss 2.000\n"


def test_lines_have_at_most_80_columns(stream):
    logger = ConsoleLogger(total_steps=12_345_678, total_epochs=1000, stream=stream)
    logger.log(12_345_678, {**TRAINING, **EVALUATION, "epoch": 999, "images_per_second": 1e6})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].endswith("loss 1.432  acc1 47.2%")


def test_a_message_is_a_line(stream):
    ConsoleLogger(total_steps=9, stream=stream).message("saved last.ckpt")
    assert stream.getvalue() == "saved last.ckpt\n"


def test_a_terminal_is_known_by_itself(stream):
    terminal = Terminal()
    for target in (stream, terminal):
        logger = ConsoleLogger(total_steps=10, stream=target)
        logger.advance(5)
        logger.close()
    assert stream.getvalue() == ""
    assert "5/10" in terminal.getvalue()


def test_the_bar_ends_with_the_last_values_and_the_steps_made(stream):
    logger = ConsoleLogger(total_steps=390, total_epochs=3, terminal=True, stream=stream)
    for step in range(1, 41):
        logger.advance(step)
    logger.log(40, TRAINING)
    logger.close()
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith("epoch 1/3:")
    assert "40/390" in last
    assert "loss 1.432, acc1 47.2%, 512 images/s, lr 0.1" in last


def test_the_bar_of_a_resumed_run_starts_where_it_stopped(stream):
    logger = ConsoleLogger(total_steps=100, start_step=60, terminal=True, stream=stream)
    logger.advance(61)
    logger.close()
    frames = stream.getvalue().rstrip("\n").split("\r")
    assert "60/100" in frames[1]
    assert "61/100" in frames[-1]


def test_an_evaluation_and_a_message_stand_on_lines_of_their_own_above_the_bar(stream):
    logger = ConsoleLogger(total_steps=390, total_epochs=3, terminal=True, stream=stream)
    logger.advance(390)
    logger.log(390, {**TRAINING, **EVALUATION})
    logger.message("saved last.ckpt")
    logger.close()
    lines = [line.split("\r")[-1] for line in stream.getvalue().splitlines()]
    assert "epoch 3/3  step 390/390  val loss 0.812  acc1 71.50%  acc5 97.90%  in 2.1 s" in lines
    assert "saved last.ckpt" in lines


def test_the_bar_is_not_redrawn_at_every_step(stream):
    logger = ConsoleLogger(total_steps=20_000, terminal=True, stream=stream)
    for step in range(1, 20_001):
        logger.advance(step)
    logger.close()
    assert stream.getvalue().count("\r") < 100


class Gone(io.StringIO):
    """A terminal that is closed, as seen from the process that goes on."""

    encoding = "utf-8"

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")

    def flush(self):
        raise BrokenPipeError


@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_that_is_gone_is_no_error(terminal):
    logger = ConsoleLogger(total_steps=10, terminal=terminal, stream=Gone())
    logger.advance(5)
    logger.log(5, {**TRAINING, **EVALUATION})
    logger.message("halfway")
    logger.close()
