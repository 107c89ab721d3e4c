from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training_framework.cli.main import main

pytestmark = pytest.mark.usefixtures("narrow_networks")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for number in range(count):
            path = tmp_path / "pets" / split / ("cat" if number % 2 else "dog") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pets"


def test_packing_inspecting_and_training(
    source: Path, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "pack", str(source), "shards", "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "8 training and 2 validation images of 2 classes in 2 shards" in shown
    assert main(["data", "inspect", "shards", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "2 tar shards, packed from pets" in shown
    assert "10 images: 8 for training, 2 for validation" in shown
    assert "checksums: all 10 match" in shown
    assert "      4       1  cat" in shown
    settings = "--model resnet10 --img-size 16 --batch-size 4 --epochs 1 --threads 1"
    flags = [*settings.split(), "--num-workers", "0", "--tensorboard", "false"]
    Path("shards").rename("packed")
    assert main(["train", "--data", "packed", *flags]) == 0  # a folder of that name, not a data set
    assert main(["plan", "--data", "shards", "--data-root", "packed", *flags]) == 0
    assert main(["plan", "--data-root", "packed", *flags]) == 0
    assert "packed: 8 training, 2 validation images, 2 classes, 16 px" in capsys.readouterr().out


def test_images_left_out_are_listed(
    source: Path, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "train" / "cat" / "3.png").write_bytes(b"not an image")
    command = ["data", "pack", str(source), "shards", "--workers", "1"]
    assert main(command) == 2
    assert "cat/3.png" in capsys.readouterr().err
    assert main([*command, "--on-bad-image", "skip"]) == 0
    shown = capsys.readouterr()
    assert "1 bad ones skipped" in shown.out
    assert "cat/3.png" in shown.err
    assert main(["data", "inspect", "shards"]) == 0
    assert "skipped as bad: train/cat/3.png" in capsys.readouterr().out


def test_a_path_and_a_root_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--data", "./a", "--data-root", "b"]) == 2
    assert "data is './a' but data_root is 'b'; keep one of them" in capsys.readouterr().err


def test_a_run_goes_on_with_data_by_its_path(
    source: Path, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pets", "moved"):
        assert main(["data", "pack", str(source), f"shards/{name}", "--workers", "1"]) == 0
    settings = "--model resnet10 --img-size 16 --batch-size 4 --epochs 1 --threads 1"
    flags = [*settings.split(), "--num-workers", "0", "--tensorboard", "false"]
    assert main(["train", "--data", "shards/pets", *flags, "--stop-after-steps", "1"]) == 0
    (checkpoint,) = Path("logs").rglob("last.ckpt")
    assert main(["train", "--data", "shards/moved", "--resume", str(checkpoint)]) == 0
    weights = checkpoint.with_name("weights.safetensors")
    saved = weights if weights.exists() else checkpoint
    assert main(["evaluate", str(saved), "--data", "shards/moved", "--threads", "1"]) == 0
    assert "moved: 2 images" in capsys.readouterr().out
