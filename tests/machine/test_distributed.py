"""Processes over gloo, beside one process on the same global batch.

Most are forks with torchrun's environment; where torchrun itself matters (signals, an error in one
process) it is the real one.
"""

import contextlib
import csv
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import Forks

from training_framework.checkpoint import load_checkpoint
from training_framework.cli.main import main
from training_framework.errors import UserError
from training_framework.machine.distributed import Processes, process_group
from training_framework.training.evaluation import evaluate

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
DIGITS = (
    "--data=digits", "--img-size=16", "--model=resnet10", "--stem=imagenet", "--precision=32",
    "--threads=1", "--num-workers=0", "--tensorboard=false", "--log-every-n-steps=1",
)  # fmt: skip
# In fp32, rounding alone drives two runs on the digits apart within a few steps, also one process
# with one thread from one with two: their flat backgrounds put many activations at the kink of a
# ReLU. Residual blocks that start as the identity, and a low rate, keep 20 steps comparable.
CALM = ("--zero-init-last-norm", "--lr=0.001", "--scheduler=constant")
FOUR_EPOCHS = (
    "--epochs=4", "--lr=0.1", "--zero-init-last-norm", "--batch-size=64", "--ema-decay=0.9",
    "--accumulate-grad-batches=2", "--sync-batchnorm",
)  # fmt: skip


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, *TORCHRUN, "-m", "training_framework", *arguments]


def run_two(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun(*arguments),
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def run(forks: Forks, folder: Path, processes: int, *arguments: str) -> str:
    """Run a command that succeeds, and return what it printed; one process is this one."""
    if processes == 1:
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(arguments) == 0
        return printed.getvalue()
    done = forks.run_ranks(2, "-m", "training_framework", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"logs/{name}/version_0/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def found_by_evaluate(output: str) -> tuple[str, ...]:
    """Images, top-1, top-5 and loss of the one line that `evaluate` prints."""
    pattern = r"digits: (\d+) images  top-1 ([\d.]+)%  top-5 ([\d.]+)%  loss ([\d.]+)"
    (found,) = re.findall(pattern, output)
    return found


@pytest.fixture(scope="module")
def trained_runs(forks, tmp_path_factory):
    """A folder with the runs `one` and `two`, by as many processes, on the same global batches."""
    folder = tmp_path_factory.mktemp("trained_runs")
    for processes, name in ((1, "one"), (2, "two")):
        run(forks, folder, processes, "train", *DIGITS, *FOUR_EPOCHS, f"--name={name}")
    return folder


def test_two_processes_make_the_losses_of_one(forks, tmp_path):
    settings = (*DIGITS, *CALM, "--epochs=1", "--sync-batchnorm", "--stop-after-steps=20")
    for processes, name in ((1, "one"), (2, "two")):
        run(forks, tmp_path, processes, "train", *settings, "--batch-size=64", f"--name={name}")
    one, two = (
        [float(row["train/loss"]) for row in rows_of(tmp_path, name)] for name in ("one", "two")
    )
    assert len(one) == 20
    assert two == pytest.approx(one, rel=0, abs=1e-4)


def test_two_processes_reach_the_accuracy_of_one_with_average_and_accumulation(trained_runs):
    one, two = (float(rows_of(trained_runs, name)[-1]["val/acc1"]) for name in ("one", "two"))
    assert one > 90
    assert two == pytest.approx(one, abs=1.5)


def test_one_process_alone_writes(trained_runs):
    assert [path.name for path in (trained_runs / "logs/two").iterdir()] == ["version_0"]
    steps = [int(row["step"]) for row in rows_of(trained_runs, "two")]
    assert steps == list(range(1, 4 * 11 + 1))
    directory = trained_runs / "logs/two/version_0"
    names = {path.name for path in directory.iterdir()}
    assert names == {
        ".lock", "checkpoints", "config.yaml", "metrics.csv", "run.json", "weights.safetensors"
    }  # fmt: skip


def test_two_processes_evaluate_the_same_images_and_hits_as_one(forks, trained_runs):
    checkpoint = "logs/two/version_0/checkpoints/last.ckpt"
    alone, together = (
        found_by_evaluate(
            run(forks, trained_runs, processes, "evaluate", checkpoint, "--threads=1")
        )
        for processes in (1, 2)
    )
    assert alone == together
    assert alone[0] == "359"
    assert f"{float(rows_of(trained_runs, 'two')[-1]['val/acc1']):.2f}" == alone[1]


def test_all_processes_take_the_value_of_rank_0(forks, tmp_path):
    script = tmp_path / "say.py"
    script.write_text(
        "import os\n"
        "from training_framework.machine.distributed import Processes, value_of_first_process\n"
        "processes = Processes.from_environment()\n"
        "print(value_of_first_process('speed', os.environ['RANK'], processes))\n"
    )
    done = forks.run_ranks(2, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0"]


def test_a_checkpoint_of_one_process_goes_on_with_two(forks, tmp_path):
    """Without synchronized norms: their statistics differ by rank, and rank 0's are the run's.

    The learning rate and the order of the images go on where they were; what is evaluated during
    the run is what its checkpoint holds.
    """
    settings = (*DIGITS, *CALM, "--epochs=1", "--batch-size=128", "--ema-decay=0.5")
    run(forks, tmp_path, 1, "train", *settings, "--name=run", "--stop-after-steps=5")
    checkpoint = "logs/run/version_0/checkpoints/last.ckpt"
    resume = ("train", f"--resume={checkpoint}", "--stop-after-steps=null")
    refused = forks.run_ranks(2, "-m", "training_framework", *resume, cwd=tmp_path)
    assert refused.returncode != 0
    assert (
        "it trained in 1 process(es), and there are 2 now; start 1 process(es), or resume with"
        in refused.stderr
    )
    run(forks, tmp_path, 2, *resume, "--allow-config-change")
    rows = rows_of(tmp_path, "run")
    assert [int(row["step"]) for row in rows] == list(range(1, 12))
    found = found_by_evaluate(run(forks, tmp_path, 1, "evaluate", checkpoint, "--threads=1"))
    # Two processes evaluate in other batches than one, which may round one image over a tie.
    one_image = 100 / int(found[0]) + 0.01
    for name, percent in zip(("acc1", "acc5"), found[1:3], strict=True):
        assert float(percent) == pytest.approx(float(rows[-1][f"val/{name}"]), abs=one_image)
    assert float(found[3]) == pytest.approx(float(rows[-1]["val/loss"]), abs=1e-4)


@pytest.mark.parametrize(
    ("fault", "by_torchrun"),
    [("a batch that cannot be shared", False), ("a place that rank 0 alone is refused", True)],
)
def test_an_error_is_said_once_and_ends_all_processes(tmp_path, forks, fault, by_torchrun):
    (tmp_path / "file").write_text("not a folder")
    if fault == "a batch that cannot be shared":
        settings, said = "--batch-size=33", "batch_size 33 cannot be shared equally by 2 processes"
    else:
        settings, said = "--output-dir=file", "file/resnet10-digits: cannot be written to"
    start = time.monotonic()
    if by_torchrun:
        done = run_two(tmp_path, "train", *DIGITS, settings)
    else:
        program = ("-m", "training_framework", "train", *DIGITS, settings)
        done = forks.run_ranks(2, *program, cwd=tmp_path)
    assert time.monotonic() - start < 60
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert done.stderr.count("Traceback") == by_torchrun, "torchrun's own alone"
    assert not list(tmp_path.rglob("*.ckpt"))


def test_two_processes_stopped_in_an_evaluation_make_it_when_they_go_on(
    trained_runs, forks, monkeypatch
):
    program = ("-m", "training_framework", "train", *DIGITS, *FOUR_EPOCHS, "--name=stopped")
    for fault, steps in (("evaluation.batch:2:term", 10), ("", 44)):
        monkeypatch.setenv("TRAINING_FRAMEWORK_FAULT", fault)
        done = forks.run_ranks(2, *program, cwd=trained_runs)
        assert (done.returncode == 0) == (not fault), done.stderr
        assert len(rows_of(trained_runs, "stopped")) == steps
    without_times = [
        [{key: row[key] for key in ("step", "train/loss", "val/loss", "val/acc1", "grad_norm")}
         for row in rows_of(trained_runs, name)]
        for name in ("stopped", "two")
    ]  # fmt: skip
    assert without_times[0] == without_times[1]


def test_a_loss_that_is_not_finite_ends_two_processes_with_one_line(forks, tmp_path):
    settings = ("--batch-size=64", "--epochs=1", "--lr=1e30")
    done = forks.run_ranks(2, "-m", "training_framework", "train", *DIGITS, *settings, cwd=tmp_path)
    assert done.returncode != 0
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(
        r"the training loss became nan at step \d, batch \d of epoch 0: samples", error
    )
    assert not list(tmp_path.rglob("*.ckpt"))


def test_sigterm_to_torchrun_saves_and_ends(tmp_path):
    settings = (*DIGITS, *CALM, "--epochs=1000", "--batch-size=64", "--name=run")
    # Rows that are far apart, so that the stop falls between two of them.
    settings = (*settings, "--log-every-n-steps=1000000", "--val-check-interval=1000000")
    started = subprocess.Popen(
        torchrun("train", *settings),
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        metrics = tmp_path / "logs/run/version_0/metrics.csv"
        deadline = time.monotonic() + 100
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 1):
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        started.send_signal(signal.SIGTERM)
        start = time.monotonic()
        started.communicate(timeout=60)
        assert time.monotonic() - start < 20
    finally:
        started.kill()
        started.wait()
    assert started.returncode != 0
    state = load_checkpoint(tmp_path / "logs/run/version_0/checkpoints/last.ckpt")
    assert state["progress"]["step"] > 22
    counted = int(state["sums"]["sums"][3])
    assert counted == 64 * (state["progress"]["step"] % 22), "images of both processes"


@pytest.fixture
def group_of_one(monkeypatch):
    """The environment of a group of this process alone, which believes that there are two."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    processes = Processes(world_size=2, local_world_size=2)
    monkeypatch.setattr(Processes, "from_environment", lambda: processes)


WHOLE = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "a", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"RANK": "2"}, "RANK is 2, and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK is 0, and WORLD_SIZE is 0"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1, and LOCAL_WORLD_SIZE is 1"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is ''"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({"MASTER_PORT": None}, "MASTER_PORT is ''"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
    ],
)
def test_an_environment_that_torchrun_never_makes_is_an_error(changed, fault, monkeypatch):
    for name in (*WHOLE, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**WHOLE, **changed}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=fault) as caught:
        Processes.from_environment()
    assert "torchrun" in caught.value.cure


def test_one_process_needs_no_variable_but_a_local_rank_alone_changes_nothing(monkeypatch):
    for name in (*WHOLE, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Processes.from_environment() == Processes()


def gloo_threads() -> int:
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith("pt_gloo") for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="lists threads by Linux's /proc")
@pytest.mark.parametrize("fault", [None, UserError("a fault", "a cure")])
def test_no_thread_of_gloo_is_left_when_a_training_ends(group_of_one, monkeypatch, tmp_path, fault):
    seen = []

    def count_and_evaluate(*arguments, **settings):
        seen.append(gloo_threads())
        if fault is not None:
            raise fault
        return evaluate(*arguments, **settings)

    monkeypatch.setattr("training_framework.training.parts.evaluate", count_and_evaluate)
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        code = main(["train", *DIGITS, "--epochs=1", "--limit-train-images=128"])
    assert code == (0 if fault is None else 2)
    assert min(seen) > 0
    assert gloo_threads() == 0


@pytest.mark.parametrize("before", [None, "1"])  # torchrun sets it to 1
@pytest.mark.parametrize("records_steps", [True, False])
def test_nccl_ends_no_process_by_itself_where_steps_are_recorded(
    monkeypatch, before, records_steps
):
    name, seen = "TORCH_NCCL_ASYNC_ERROR_HANDLING", []
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    for owner, function, replacement in (
        (dist, "is_backend_available", lambda _: True),
        (dist, "init_process_group", lambda *_, **__: seen.append(os.environ.get(name))),
        (dist, "destroy_process_group", lambda: None),
        (torch.cuda, "set_device", lambda _: None),
    ):
        monkeypatch.setattr(owner, function, replacement)
    two = Processes(rank=0, world_size=2, local_rank=0, local_world_size=2)
    with process_group(two, torch.device("cuda:0"), records_steps=records_steps):
        assert os.environ.get(name) == before
    assert seen == ["0" if records_steps else before]
