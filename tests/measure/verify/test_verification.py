"""With real runs, in this process: that each is one of its own is tested by the command itself."""

import subprocess
import sys

import pytest
from forks import NARROW_COMMAND

from training_framework.cli import main as cli
from training_framework.cli.verify import verification_lines
from training_framework.config import TrainConfig
from training_framework.errors import UserError
from training_framework.measure.verify import verification as resumption
from training_framework.measure.verify.verification import stop_points, verify_resume
from training_framework.optimizers import WeightAverage

SETTINGS = {
    "data": "synthetic", "model": "resnet10", "img_size": 8, "num_classes": 4,
    "synthetic_train_images": 36, "synthetic_val_images": 8, "batch_size": 8, "epochs": 2,
    "ema_decay": 0.9, "mixup": 0.2, "accumulate_grad_batches": 2, "threads": 1,
    "tensorboard": False,
}  # fmt: skip


@pytest.fixture
def in_process(narrow_networks, monkeypatch):
    """Runs as calls of the command in this process."""
    calls = []

    def run(command, *, env, **options):
        calls.append((command[3:], env.get("TRAINING_FRAMEWORK_FAULT", "")))
        return subprocess.CompletedProcess(command, cli.main(command[3:]), "", "")

    monkeypatch.setattr(resumption.subprocess, "run", run)
    return calls


def test_a_run_that_resumes_exactly_passes_and_leaves_nothing(in_tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(resumption.tempfile, "tempdir", str(in_tmp_path))
    verification = verify_resume(TrainConfig(**SETTINGS), steps=4, stops=2)
    assert verification.passed
    assert len(in_process) == 4
    assert list(in_tmp_path.glob("verify-resume-*")) == []
    lines = verification_lines(verification)
    assert lines[0].startswith("PASS: 4 steps straight, and stopped after steps")
    for part in ("metrics.csv: 4 rows", "weights and buffers", "weight average", "optimizer state"):
        assert any(part in line for line in lines), part


def test_what_is_not_restored_is_found(in_tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(resumption.tempfile, "tempdir", str(in_tmp_path))
    monkeypatch.setattr(WeightAverage, "load_state_dict", lambda self, state: None)
    verification = verify_resume(TrainConfig(**SETTINGS), steps=4, stops=1)
    assert not verification.passed
    assert any(line.startswith("weight average: ") for line in verification.comparison.differences)
    assert (verification.kept / "runs" / "straight" / "version_0" / "metrics.csv").is_file()
    assert verification_lines(verification)[0].startswith("FAIL: ")


def test_stops_are_drawn_within_the_steps():
    drawn = {stop_points(20, 3, seed) for seed in range(30)}
    assert len(drawn) > 20
    assert all(1 <= first < second < third < 20 for first, second, third in drawn)
    with pytest.raises(UserError, match="5 stops do not fit into 5 steps"):
        stop_points(5, 5, 0)


def test_a_training_that_fails_is_reported_in_its_own_words(in_tmp_path, monkeypatch):
    def run(command, **options):
        error = "note\nerror: the disk is full; make room\n"
        return subprocess.CompletedProcess(command, 2, None, error)

    monkeypatch.setattr(resumption.subprocess, "run", run)
    with pytest.raises(UserError, match="verify-resume: the disk is full; make room"):
        verify_resume(TrainConfig(**SETTINGS), steps=4, stops=1)


def test_the_command_passes_with_processes_of_their_own_that_are_killed(
    in_tmp_path, forks, monkeypatch, capsys
):
    def run(command, *, env, **options):
        assert command[:3] == [sys.executable, "-m", "training_framework"]
        return forks.run(*NARROW_COMMAND, *command[3:], env=env)

    monkeypatch.setattr(resumption.subprocess, "run", run)
    settings = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    status = cli.main(["verify-resume", "--steps=4", "--stops=1", "--kill", *settings])
    said = capsys.readouterr()
    assert status == 0, said
    assert said.out.startswith("PASS: 4 steps straight, and killed in step ")
