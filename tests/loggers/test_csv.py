import math

import numpy as np
import pytest

from training_framework.errors import UserError
from training_framework.loggers import COLUMNS, CsvLogger

HEADER = (
    "epoch,step,train/loss,train/acc1,train/acc5,val/loss,val/acc1,val/acc5,val/acc1_tta,"
    "lr,grad_norm,images_per_second,data_wait,memory,mfu,eval_seconds"
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def rows(path):
    header, *lines = path.read_text().splitlines()
    assert header == HEADER
    return [dict(zip(COLUMNS, line.split(","), strict=True)) for line in lines]


def write(path, steps, **kwargs):
    logger = CsvLogger(path, **kwargs)
    for step in steps:
        logger.log(step, {"epoch": 0, "train/loss": step / 8})
    logger.close()


def test_columns_stand_in_their_fixed_order_whatever_the_order_of_the_values(path):
    logger = CsvLogger(path)
    logger.log(10, {"val/acc1": 71.5, "lr": 0.1, "train/loss": 1.25, "epoch": 0.0})
    logger.close()
    assert path.read_text() == f"{HEADER}\n0,10,1.25,,,,71.5,,,0.1,,,,,,\n"


def test_every_row_is_in_the_file_as_soon_as_it_is_logged(path):
    logger = CsvLogger(path)
    logger.log(1, {"lr": 0.5})
    assert path.read_text().endswith(",0.5,,,,,,\n")
    logger.close()


@pytest.mark.parametrize(
    "value", [0.1, 1 / 3, 1e-5, 3.0000001e-8, 98.6111, 2.5e30, 1234.5678, -0.3]
)
def test_numbers_give_back_the_same_float32(path, value):
    logger = CsvLogger(path)
    logger.log(1, {"lr": value})
    logger.close()
    text = rows(path)[0]["lr"]
    assert np.float32(text) == np.float32(value)
    assert len(text) <= len("-1.2345678e-30")


def test_numbers_are_as_short_as_they_can_be(path):
    logger = CsvLogger(path)
    logger.log(1, {"lr": float(np.float32(0.1)), "train/acc1": 100.0, "memory": 5_368_709_121.0})
    logger.close()
    row = rows(path)[0]
    assert (row["lr"], row["train/acc1"], row["memory"]) == ("0.1", "100", "5368709121")


def test_values_beyond_float32_and_not_numbers_are_written_as_they_are(path):
    logger = CsvLogger(path)
    logger.log(1, {"lr": 1e-45, "grad_norm": math.inf, "train/loss": math.nan, "mfu": 1e300})
    logger.close()
    row = rows(path)[0]
    assert float(row["lr"]) == 1e-45
    assert float(row["mfu"]) == 1e300
    assert (row["grad_norm"], row["train/loss"]) == ("inf", "nan")


def test_an_unknown_column_is_an_error_that_lists_the_columns(path):
    logger = CsvLogger(path)
    with pytest.raises(UserError, match=r"no column 'val/top1'; its columns are: epoch, step"):
        logger.log(1, {"val/top1": 3.0})
    logger.close()
    assert rows(path) == []


@pytest.mark.parametrize("step", [9, 10])
def test_steps_must_increase(path, step):
    logger = CsvLogger(path)
    logger.log(10, {"lr": 0.1})
    with pytest.raises(AssertionError, match=f"step {step} is logged after step 10"):
        logger.log(step, {"lr": 0.1})
    logger.close()


def test_a_new_run_never_writes_over_a_file(path):
    path.write_text("precious")
    with pytest.raises(UserError, match=r"metrics\.csv already exists"):
        CsvLogger(path)
    assert path.read_text() == "precious"


def test_a_resumed_run_logs_each_step_once(path):
    write(path, [10, 20, 30, 40])
    write(path, [30, 40, 50], resume_step=20)
    assert [int(row["step"]) for row in rows(path)] == [10, 20, 30, 40, 50]


def test_resuming_keeps_the_order_of_steps_enforced(path):
    write(path, [10, 20, 30])
    logger = CsvLogger(path, resume_step=20)
    with pytest.raises(AssertionError, match="step 20 is logged after step 20"):
        logger.log(20, {"lr": 0.1})
    logger.close()


@pytest.mark.parametrize("lost_bytes", range(1, 23))
def test_a_torn_last_row_is_dropped(path, lost_bytes):
    write(path, [10, 20])
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost_bytes])
    write(path, [30], resume_step=25)
    assert path.read_bytes() == whole[: whole.rindex(b"0,20")] + b"0,30,3.75,,,,,,,,,,,,,\n"


@pytest.mark.parametrize("junk", [b"\0" * 40, b"\xff\xfe,\n", b"0,x20,1,,,,,,,,,,,,,\n", b"\n"])
def test_what_a_power_cut_leaves_is_dropped(path, junk):
    write(path, [10])
    whole = path.read_bytes()
    path.write_bytes(whole + junk)
    write(path, [], resume_step=25)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("torn", ["", "epoch,st", HEADER, HEADER + "\n"])
def test_a_file_torn_in_its_header_starts_again(path, torn):
    path.write_text(torn)
    write(path, [30], resume_step=25)
    assert [int(row["step"]) for row in rows(path)] == [30]


def test_a_resumed_run_without_a_file_makes_one(path):
    write(path, [30], resume_step=25)
    assert [int(row["step"]) for row in rows(path)] == [30]


def test_a_file_of_another_kind_is_left_alone(path):
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(UserError, match="does not list the columns of this version"):
        CsvLogger(path, resume_step=1)
    assert path.read_text() == "step,loss\n1,2\n"


def test_resuming_replaces_the_file_in_one_move_and_leaves_nothing_behind(path, monkeypatch):
    write(path, [10, 20, 30])
    whole = path.read_bytes()

    def crash(self, target):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", crash)
        with pytest.raises(UserError, match="power cut"):
            CsvLogger(path, resume_step=20)
    assert path.read_bytes() == whole

    write(path, [], resume_step=20)
    assert [int(row["step"]) for row in rows(path)] == [10, 20]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.csv"]


def test_rows_of_an_earlier_version_get_the_columns_that_it_lacked(path):
    earlier = HEADER.replace("val/acc1_tta,", "")
    path.write_text(f"{earlier}\n0,10,1.25,,,,71.5,33.5,0.1,,,,,,\n0,20,1.0,,")
    logger = CsvLogger(path, resume_step=20)
    logger.log(20, {"lr": 0.5})
    logger.close()
    assert path.read_text().splitlines()[1] == "0,10,1.25,,,,71.5,33.5,,0.1,,,,,,"
    assert [row["lr"] for row in rows(path)] == ["0.1", "0.5"]
