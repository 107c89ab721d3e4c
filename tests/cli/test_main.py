import csv
import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forks import NARROW_COMMAND
from PIL import Image

from training_framework import __version__
from training_framework.checkpoint import load_checkpoint
from training_framework.cli.main import main
from training_framework.config import TrainConfig
from training_framework.config.names import ALIASES

pytestmark = pytest.mark.usefixtures("narrow_networks")

SMALL = "--model resnet10 --batch-size 8 --threads 1 --tensorboard false --momentum 0"
TINY = f"{SMALL} --data synthetic --img-size 8 --num-classes 4 --synthetic-train-images 36"
COLORS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 30)}


def run(command: str) -> int:
    return main(shlex.split(command))


def make_pictures(root: Path, counts: dict[str, int]) -> Path:
    """An image folder whose classes are the colours of its images."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for name, color in COLORS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(-20, 20, (20, 16, 3))
                pixels = (np.array(color) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def wide_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > 80]


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"efficient-resnet {__version__}\n"


@pytest.mark.parametrize(
    "command",
    ["", "train", "plan", "evaluate", "predict", "data", "data subset", "data pack", "data inspect",
     "compare", "tune", "report", "profile", "verify-resume", "recipes", "estimate", "lr-range"],
)  # fmt: skip
def test_help_is_readable_at_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as leaving:
        run(f"{command} --help")
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    assert wide_lines(text) == []
    usage = text.partition("\n\n")[0]
    assert len(usage.splitlines()) <= 5


def test_help_shows_every_setting_with_its_default_and_no_alias(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run("train --help")
    text = " ".join(capsys.readouterr().out.split())
    for key, field in TrainConfig.model_fields.items():
        flag = f"--{key.replace('_', '-')}"
        assert re.search(rf"{flag} (VALUE|\[VALUE\]) ", text), key
        assert str(field.description) in text
    assert "passes over the training set; 9.9 ends within the last one (15)" in text
    assert "for runs; a run is written to <output_dir>/<name>/version_N (logs)" in text
    assert "(slower) (false)" in text
    for alias in ALIASES:
        assert f"--{alias.replace('_', '-')} " not in text


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ("--compile false", "compile", False),
        ("--compile", "compile", True),
        ("--compile auto", "compile", "auto"),
        ("--channels-last --epochs 3", "channels_last", True),
        ("--epochs=3", "epochs", 3),
        ("--milestones 30,60 --scheduler multi_step", "milestones", (30, 60)),
        ("--milestones '[30, 60.5]' --scheduler multi_step", "milestones", (30, 60.5)),
        ("--milestones 30 --scheduler multi_step", "milestones", (30,)),
        ("--precision 32", "precision", "32"),
        ("--precision bf16-mixed", "precision", "bf16-mixed"),
        ("--lr 1e-3", "lr", 1e-3),
        ("--lr auto", "lr", "auto"),
        ("--learning-rate 0.5", "lr", 0.5),
        ("--use-amp", "precision", "mixed"),
        ("--use-amp false", "precision", "32"),
        ("--data-root null", "data_root", None),
        ("--data-root 2024", "data_root", Path("2024")),
        ("--name 1e3", "name", "1e3"),
        ("--val-check-interval 1", "val_check_interval", 1),
        ("--val-check-interval 1.0", "val_check_interval", 1.0),
        ("--config mine.yaml", "seed", 5),
        ("--config mine.yaml --seed 6", "seed", 6),
        ("--config mine.yaml --data-root null", "data_root", None),
    ],
)
def test_flags_mean_what_they_mean_in_yaml(in_tmp_path, monkeypatch, flags, key, value):
    Path("mine.yaml").write_text("seed: 5\ndata_root: somewhere\n")
    given: list[TrainConfig] = []

    def capture(config: TrainConfig) -> Any:
        given.append(config)
        return SimpleNamespace(run_directory=None, stopped_by="")

    monkeypatch.setattr("training_framework.train.main", capture)
    assert run(f"train {flags}") == 0
    found = getattr(given[0], key)
    assert found == value
    assert type(found) is type(value) or isinstance(value, Path)


def test_plan_gives_each_choice_its_reason_in_80_columns(in_tmp_path, capsys):
    assert run(f"plan {TINY} --accelerator cpu --epochs 2") == 0
    out = capsys.readouterr().out
    assert wide_lines(out) == []
    assert "8 = 2 epochs x 4, of 8 images" in out
    table = out.partition("why\n")[2]
    chosen = dict(re.findall(r"^(\w+) +(\S+) +\S", table, flags=re.MULTILINE))
    assert chosen["device"] == "cpu"
    assert {"precision", "channels_last", "compile", "stem", "threads"} <= chosen.keys()
    # A line that is not a choice goes on with the reason of the one above it.
    assert all(re.match(r"\w+ +\S+ +\S| +\S", line) for line in table.splitlines())
    assert list(in_tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with images and a run that was trained on them by flags alone."""
    place = tmp_path_factory.mktemp("colors")
    make_pictures(place / "colors", {"train": 8, "val": 3})
    command = (
        f"train {SMALL} --data-root {place}/colors --img-size 8 --num-workers 0 --epochs 6 "
        f"--lr 0.05 --output-dir {place}/logs --name first"
    )
    assert run(command) == 0
    return place


def test_training_by_flags_leaves_a_run_and_shows_its_result(in_tmp_path, capsys):
    make_pictures(in_tmp_path / "colors", {"train": 4, "val": 1})
    assert run(f"train {SMALL} --data-root colors --img-size 8 --num-workers 0 --epochs 1") == 0
    out, err = capsys.readouterr()
    directory = Path("logs/resnet10-colors/version_0")
    assert f"run directory: {directory}" in err
    assert f"files  {directory}" in out
    assert re.search(r"best   top-1 +\d+\.\d\d%", out)
    assert wide_lines(out + err) == []
    left = {path.name for path in directory.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "run.json", "weights.safetensors", "last.ckpt"} <= left


def test_evaluation_finds_what_the_run_found(trained, capsys):
    directory = trained / "logs/first/version_0"
    with (directory / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    capsys.readouterr()
    assert run(f"evaluate {directory}/checkpoints/last.ckpt --threads 1") == 0
    from_checkpoint = capsys.readouterr().out
    weights = f"evaluate {directory}/weights.safetensors --data-root {trained}/colors"
    assert run(f"{weights} --num-workers 0 --threads 1") == 0
    from_weights = capsys.readouterr().out
    expected = f"colors: 9 images  top-1 {float(last['val/acc1']):.2f}%  top-5 100.00%  loss"
    for out in (from_checkpoint, from_weights):
        assert out.startswith(expected)
        loss = re.search(r"loss (\S+)", out)
        assert loss is not None
        assert float(loss[1]) == pytest.approx(float(last["val/loss"]), rel=1e-3)
    assert float(last["val/acc1"]) > 60


@pytest.mark.parametrize("file", ["checkpoints/last.ckpt", "weights.safetensors"])
def test_prediction_names_the_pictures_of_files_and_folders(trained, capsys, file):
    pictures = trained / "colors/val"
    capsys.readouterr()
    command = f"predict {trained}/logs/first/version_0/{file} {pictures}/red/0.png {pictures}"
    assert run(f"{command} --top 2 --threads 1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        f"{pictures}/{name}"
        for name in ["red/0.png", *(f"{c}/{n}.png" for c in sorted(COLORS) for n in range(3))]
    ]
    for line in lines:
        assert re.search(r": \w+ \d+\.\d%  \w+ \d+\.\d%$", line), line
    assert lines[0] == lines[7]
    named = [re.findall(r"val/(\w+)/.*?: (\w+)", line)[0] for line in lines]
    assert sum(shown == truth for truth, shown in named) > 6


def test_evaluation_of_synthetic_data_makes_the_data_of_the_run(in_tmp_path, capsys):
    # Seed and sizes are the run's, or there would be other classes, patterns and counts.
    assert run(f"train {TINY} --synthetic-val-images 12 --seed 3 --epochs 1 --name a") == 0
    with Path("logs/a/version_0/metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    capsys.readouterr()
    assert run("evaluate logs/a/version_0/checkpoints/last.ckpt --threads 1") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"synthetic: 12 images  top-1 {float(last['val/acc1']):.2f}%")


def test_a_file_name_that_is_no_text_can_be_predicted(trained, tmp_path, capsys):
    name = os.fsencode(tmp_path) + b"/r\xe9d.png"
    with open(name, "wb") as file:  # noqa: PTH123
        file.write((trained / "colors/val/red/0.png").read_bytes())
    capsys.readouterr()
    weights = trained / "logs/first/version_0/weights.safetensors"
    assert run(f"predict {weights} {tmp_path} --threads 1") == 0
    out = capsys.readouterr().out
    assert out.encode().decode().startswith(f"{tmp_path}/r\N{REPLACEMENT CHARACTER}d.png: ")


def test_a_subset_is_copied_and_described(in_tmp_path, capsys):
    make_pictures(in_tmp_path / "colors", {"train": 4, "val": 2})
    command = "data subset colors small/set --classes 2 --train-per-class 3 --val-per-class 1"
    assert run(f"{command} --seed 1") == 0
    out = capsys.readouterr().out
    assert re.fullmatch(
        r"small/set: 6 training and 2 validation images of 2 classes \(\w+, \w+\)\n", out
    )
    assert len(list(Path("small/set/train").rglob("*.png"))) == 6
    assert run("plan --data-root small/set --accelerator cpu") == 0


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_signal_ends_a_run_in_order_and_it_can_go_on(in_tmp_path, forks, capsys, number, status):
    flags = f"{TINY} --epochs 1000 --log-every-n-steps 1 --val-check-interval 1000 --name a"
    process = forks.start(*NARROW_COMMAND, "train", *shlex.split(flags))
    metrics = Path("logs/a/version_0/metrics.csv")
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    done = process.wait()
    out, err = done.stdout, done.stderr
    assert done.returncode == status, err
    assert "Traceback" not in err
    stopped = re.search(rf"stopped by {number.name} after ([\d,]+) steps; resume with", out)
    assert stopped is not None
    steps = int(stopped[1].replace(",", ""))
    last = Path("logs/a/version_0/checkpoints/last.ckpt")
    assert load_checkpoint(last)["progress"]["step"] == steps
    assert f"--resume {last}" in out
    assert run(f"train --resume {last} --stop-after-steps {steps + 2}") == 0
    assert f"stopped by stop_after_steps after {steps + 2:,} steps" in capsys.readouterr().out
    assert load_checkpoint(last)["progress"]["step"] == steps + 2


def test_an_interrupt_before_the_training_is_one_line(in_tmp_path, capsys, monkeypatch):
    def interrupted(config: TrainConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training_framework.train.main", interrupted)
    assert run("train") == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "a file of the run: cannot be written to (No space left on device); free some space, "
            "then continue with --resume and the run's last.ckpt",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "logs/a/metrics.csv"),
            "logs/a/metrics.csv: cannot be written to (Read-only file system); free some space, "
            "then continue with --resume and the run's last.ckpt",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "a.jpg"),
            "a.jpg: Too many open files; allow more open files (ulimit -n 1024), or lower "
            "num_workers",
        ),
        (
            RuntimeError("Too many open files. Communication with the workers is no longer"),
            "a file of the run: Too many open files; allow more open files (ulimit -n 1024), or "
            "lower num_workers",
        ),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                "3.00 GiB of which 1.00 GiB is free. Including non-PyTorch memory, this process has"
            ),
            "memory is full: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
            "capacity of 3.00 GiB of which 1.00 GiB is free; lower batch_size or img_size, turn "
            "on activation_checkpointing, or turn off resident_data",
        ),
    ],
)
def test_a_full_disk_or_memory_is_one_line(in_tmp_path, capsys, monkeypatch, error, line):
    def fail(config: TrainConfig) -> None:
        raise error

    monkeypatch.setattr("training_framework.train.main", fail)
    assert run("train") == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), RuntimeError("a bug")])
def test_a_fault_of_our_own_is_one_line_and_its_traceback_is_kept(
    in_tmp_path, capsys, monkeypatch, error
):
    def fail(config: TrainConfig) -> None:
        raise error

    monkeypatch.setattr("training_framework.train.main", fail)
    monkeypatch.setattr("tempfile.tempdir", str(in_tmp_path))
    assert run("train") == 70
    (kept,) = in_tmp_path.glob("efficient-resnet-*.txt")
    assert "Traceback" in kept.read_text() and "in fail" in kept.read_text()
    err = capsys.readouterr().err
    assert str(error) in err and str(kept) in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_debug_shows_the_traceback_of_an_error_anywhere_on_the_line(in_tmp_path, capsys):
    for arguments in ("--debug plan --epochs 0", "plan --epochs 0 --debug"):
        assert run(arguments) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("error: command line: epochs: 0 should be")
    assert run("plan --epochs 0") == 2
    assert "Traceback" not in capsys.readouterr().err


READER_HAS_LEFT = """
import os, sys
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
from training_framework.cli.main import main
sys.exit(main())
"""


def test_a_reader_that_has_left_is_no_error(in_tmp_path, forks):
    done = forks.run("-c", READER_HAS_LEFT, "plan", *shlex.split(TINY))
    assert (done.returncode, done.stderr) == (1, "")


def test_the_compiler_is_not_imported_until_it_is_wanted():
    """It takes a second."""
    code = (
        "import sys, training_framework.train, training_framework.cli.main\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
