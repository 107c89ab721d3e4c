import pytest

from training_framework.loggers import LOGGERS, ConsoleLogger, CsvLogger, Logger, LoggerGroup
from training_framework.training.outputs import file_loggers


class Recorder:
    def __init__(self, calls, fails_to_close=False):
        self.calls = calls
        self.fails_to_close = fails_to_close

    def log(self, step, values):
        self.calls.append((self, step, values))

    def message(self, text):
        self.calls.append((self, text))

    def close(self):
        self.calls.append((self, "close"))
        if self.fails_to_close:
            raise OSError("no space left on device")


def test_a_group_passes_everything_to_each_in_order():
    calls = []
    first, second = Recorder(calls), Recorder(calls)
    with LoggerGroup([first, second]) as group:
        group.log(3, {"lr": 0.1})
        group.message("hello")
    assert calls == [
        (first, 3, {"lr": 0.1}),
        (second, 3, {"lr": 0.1}),
        (first, "hello"),
        (second, "hello"),
        (first, "close"),
        (second, "close"),
    ]


def test_a_group_closes_all_although_one_fails_and_says_so():
    calls = []
    first, second = Recorder(calls, fails_to_close=True), Recorder(calls)
    with pytest.raises(OSError, match="no space left"):
        LoggerGroup([first, second]).close()
    assert calls == [(first, "close"), (second, "close")]


def test_an_empty_group_logs_nowhere(capsys):
    with LoggerGroup([]) as group:
        group.log(1, {"lr": 0.1})
        group.message("hello")
    assert capsys.readouterr() == ("", "")


def test_the_sinks_take_the_same_values_and_close_twice(tmp_path, capsys):
    sinks: list[Logger] = [CsvLogger(tmp_path / "metrics.csv"), ConsoleLogger(total_steps=2)]
    group = LoggerGroup(sinks)
    group.log(1, {"train/loss": 0.5})
    group.message("halfway")
    group.close()
    group.close()
    assert capsys.readouterr() == ("", "step 1/2  loss 0.500\nhalfway\n")
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 2


def test_a_new_logger_is_one_line_and_a_run_opens_it(tmp_path, monkeypatch):
    opened = []

    def open_mine(folder, resume_step):
        opened.append((folder, resume_step))
        return Recorder([])

    monkeypatch.setitem(LOGGERS, "mine", open_mine)
    with LoggerGroup(file_loggers(tmp_path, tensorboard=False, resume_step=20)) as group:
        group.log(30, {"lr": 0.1})
    assert opened == [(tmp_path, 20)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_events_are_written_unless_they_are_off(tmp_path):
    with LoggerGroup(file_loggers(tmp_path, tensorboard=True)):
        pass
    assert len(list(tmp_path.glob("events.*"))) == 1
