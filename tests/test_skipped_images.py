"""Runs that skip bad images: whole runs, as users start them."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forks
from PIL import Image
from safetensors.torch import load_file

from training_framework.cli.main import main

pytestmark = pytest.mark.usefixtures("narrow_networks")

RUN = (
    "train --data-root pictures --model resnet10 --batch-size 6 --epochs 2 --threads 1 "
    "--img-size 16 --tensorboard false --on-bad-image skip --log-every-n-steps 1"
)
BAD_TRAIN, BAD_VAL = ("ant/3.jpg", "ant/4.jpg", "bee/11.jpg"), ("bee/2.jpg",)


@pytest.fixture
def pictures(in_tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for name in ("ant", "bee"):
            folder = Path("pictures", split, name)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (30, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    for split, names in (("train", BAD_TRAIN), ("val", BAD_VAL)):
        for name in names:
            path = Path("pictures", split, name)
            path.write_bytes(path.read_bytes()[:700])
    return in_tmp_path


def train(place: str, more: str = "") -> Path:
    assert main(shlex.split(f"{RUN} --output-dir {place} {more}")) == 0
    return Path(place) / "resnet10-pictures/version_0"


def listed(run: Path) -> list[tuple[str, str]]:
    lines = (run / "bad_images.txt").read_text(encoding="utf-8").splitlines()
    return sorted((split, name) for split, name, _ in (line.split("\t") for line in lines))


ALL = sorted(
    [("train", f"pictures/train/{name}") for name in BAD_TRAIN]
    + [("val", f"pictures/val/{name}") for name in BAD_VAL]
)


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = (load_file(run / "weights.safetensors") for run in (first, second))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_bad_images_are_listed_counted_and_the_same_with_workers_and_after_a_resumption(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = train("alone", "--num-workers 0")
    printed = capsys.readouterr()
    assert "data   4 bad images skipped, listed in bad_images.txt" in printed.out
    assert "note: skipped pictures/val/bee/2.jpg: cannot be decoded" in printed.err
    assert listed(alone) == ALL
    assert json.loads((alone / "run.json").read_text())["results"]["bad_images"] == 4

    workers = train("workers", "--num-workers 2")
    assert listed(workers) == ALL
    assert_same_weights(alone, workers)

    train("resumed", "--num-workers 0 --stop-after-steps 3")
    capsys.readouterr()
    resumed = train("resumed", "--num-workers 0 --resume resumed/resnet10-pictures/version_0/"
                    "checkpoints/last.ckpt")  # fmt: skip
    assert listed(resumed) == ALL
    assert "data   4 bad images" in capsys.readouterr().out
    assert_same_weights(alone, resumed)


def test_bad_images_do_not_count_in_evaluate_and_predict(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = train("runs", "--num-workers 0") / "checkpoints/last.ckpt"
    capsys.readouterr()
    evaluate = f"evaluate {checkpoint} --num-workers 0 --threads 1"
    assert main(shlex.split(f"{evaluate} --on-bad-image stop")) == 2
    assert "val/bee/2.jpg: cannot be decoded" in capsys.readouterr().err
    assert main(shlex.split(f"{evaluate} --on-bad-image skip")) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("pictures: 9 images ")
    assert "note: 1 of 10 images are bad and were skipped" in printed.err

    predict = f"predict {checkpoint} pictures/val --threads 1"
    assert main(shlex.split(predict)) == 2
    capsys.readouterr()
    assert main(shlex.split(f"{predict} --on-bad-image skip")) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 9
    assert "note: skipped pictures/val/bee/2.jpg: cannot be decoded" in printed.err


def test_two_processes_list_what_either_of_them_met(pictures: Path, forks: Forks) -> None:
    arguments = ["-m", "training_framework", *shlex.split(RUN), "--accelerator", "cpu"]
    done = forks.run_ranks(2, *arguments, "--num-workers", "0", "--output-dir", "two")
    assert done.returncode == 0, done.stderr
    assert "data   4 bad images skipped" in done.stdout
    assert listed(Path("two/resnet10-pictures/version_0")) == ALL
