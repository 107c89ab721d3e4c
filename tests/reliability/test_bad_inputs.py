"""Whatever is wrong with what was given, one line names it and the cure, and nothing is harmed."""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from forks import Forks
from PIL import Image
from safetensors.torch import save_file

from training_framework.checkpoint import load_checkpoint, save_checkpoint
from training_framework.cli.main import main
from training_framework.data.sources.cifar import CIFAR10
from training_framework.machine.hardware import Accelerator, detect_hardware
from training_framework.models import build_model

pytestmark = pytest.mark.usefixtures("narrow_networks")

SMALL = "--model resnet10 --batch-size 4 --epochs 1 --threads 1 --tensorboard false"
TINY = f"{SMALL} --data synthetic --img-size 8 --num-classes 4 --synthetic-train-images 36"
PICTURES = f"{SMALL} --data-root pictures --img-size 16 --num-workers 0"
CHECKPOINT = "run/checkpoints/last.ckpt"


@dataclass(frozen=True)
class Bad:
    """Bad input: how it comes about, the command that meets it, and the line that says so.

    Attributes:
        name: What is wrong.
        command: Arguments as in a shell.
        says: Regular expression for the whole line after `error: `.
        prepare: Makes the files, in the working directory.
        begins: The run starts before it can meet the fault, and so leaves its own folder.
    """

    name: str
    command: str
    says: str
    prepare: Callable[[], Any] = lambda: None
    begins: bool = False


def files(**texts: str) -> Callable[[], None]:
    """Write text files: `mine="..."` becomes mine.yaml."""

    def write() -> None:
        for name, text in texts.items():
            Path(f"{name}.yaml").write_text(text, encoding="utf-8")

    return write


def file(path: str, content: bytes = b"just text") -> Callable[[], None]:
    def write() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)

    return write


def torch_file(path: str, make: Callable[[], Any]) -> Callable[[], None]:
    return lambda: torch.save(make(), path)


def make_pictures(root: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("ant", "bee"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (48, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")


def pictures(*changes: Callable[[], Any]) -> Callable[[], None]:
    """An image folder that was whole before `changes`."""

    def make() -> None:
        make_pictures(Path("pictures"))
        for change in changes:
            change()

    return make


def truncate(path: str) -> Callable[[], None]:
    def cut() -> None:
        content = Path(path).read_bytes()
        Path(path).unlink()  # the run's files are links to those of all tests
        Path(path).write_bytes(content[: int(len(content) * 0.6)])

    return cut


def cifar(*changes: Callable[[], Any]) -> Callable[[], None]:
    """A CIFAR-10 of two images a file that was whole before `changes`."""

    def make() -> None:
        folder = Path(CIFAR10.folder)
        folder.mkdir()
        meta = {b"label_names": [f"class {number}".encode() for number in range(10)]}
        (folder / CIFAR10.meta_file).write_bytes(pickle.dumps(meta, protocol=2))
        for name in (*CIFAR10.train_files, CIFAR10.val_file):
            write_cifar_batch(folder / name, labels=[0, 1])
        for change in changes:
            change()

    return make


def write_cifar_batch(path: Path, *, labels: list[int]) -> None:
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": labels}
    path.write_bytes(pickle.dumps(content, protocol=2))


def run_result(**changes: Any) -> bytes:
    """A training run's result file."""
    run = {
        "experiment": "demo", "command": "efficient-resnet train", "seconds": 10.0,
        "dataset": "digits", "environment": {}, "config": {},
        "plan": {"steps_per_epoch": 2, "epochs": 1}, "epochs": [], "metrics": [],
        "results": {"images_per_second": 1.0, "steps": 2},
    }  # fmt: skip
    return json.dumps({**run, **changes}).encode()


class Command:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def resnet_state(name: str) -> dict[str, torch.Tensor]:
    return build_model(name, num_classes=4, stem="cifar").state_dict()


def checkpoint_without(path: str, key: str) -> Callable[[], None]:
    def write() -> None:
        state = load_checkpoint(Path(CHECKPOINT))
        del state[key]
        save_checkpoint(Path(path), state)

    return write


def later_checkpoint(path: str) -> None:
    state = load_checkpoint(Path(CHECKPOINT))
    with mock.patch("training_framework.checkpoint.file.FORMAT_VERSION", 3):
        save_checkpoint(Path(path), state)


def flipped(path: str, position: float) -> Callable[[], None]:
    """A file of the run with one bit changed, at a part of its length."""

    def flip() -> None:
        content = bytearray(Path(path).read_bytes())
        content[int(len(content) * position)] ^= 1
        Path(path).unlink()  # as for `truncate`
        Path(path).write_bytes(content)

    return flip


CONFIGURATIONS = [
    Bad(
        "a misspelt key in a file",
        "train --config mine.yaml",
        r"mine\.yaml: unknown key 'epoch'; did you mean 'epochs'\?",
        files(mine="epoch: 3\n"),
    ),
    Bad(
        "a key like no other",
        "plan --config mine.yaml",
        r"mine\.yaml: unknown key 'zzz'; `efficient-resnet train --help` lists them all",
        files(mine="zzz: 3\n"),
    ),
    Bad(
        "a misspelt key in the file that is extended",
        "train --config mine.yaml",
        r"base\.yaml: unknown key 'batchsize'; did you mean 'batch_size'\?",
        files(mine="extends: base.yaml\n", base="batchsize: 3\n"),
    ),
    Bad(
        "text for a number in a file",
        "train --config mine.yaml",
        r"mine\.yaml: epochs: 'three' should be a valid number; epochs means: passes .*",
        files(mine="epochs: three\n"),
    ),
    Bad(
        "a number in quotes",
        "train --config mine.yaml",
        r"mine\.yaml: lr: '0\.1' should be a valid number or 'auto'; .*",
        files(mine='lr: "0.1"\n'),
    ),
    Bad(
        "a fraction for a whole number",
        "train --batch-size 1.5",
        r"command line: batch_size: 1\.5 should be a valid integer.*; .*",
    ),
    Bad(
        "a number out of its range",
        "train --epochs 0",
        r"command line: epochs: 0 should be greater than 0; .*",
    ),
    Bad(
        "not a number",
        "train --lr .nan",
        r"command line: lr: nan should be .*; .*",
    ),
    Bad(
        "text for a yes or no",
        "train --compile perhaps",
        r"command line: compile: 'perhaps' should be .*; compile means: .*",
    ),
    Bad(
        "a choice that there is not",
        "train --optimizer sdg",
        r"command line: optimizer: 'sdg' should be 'sgd', 'adam', 'adamw' or 'muon'; .*",
    ),
    Bad(
        "a model that there is not",
        "train --model resnet19",
        r"command line: model: 'resnet19' should be .*'resnet18'.*; .*",
    ),
    Bad(
        "a data set that there is not",
        "train --data cifar11",
        r"command line: data: 'cifar11' should be .*'cifar10'.*; data means: .*",
    ),
    Bad(
        "nested YAML as a value",
        "train --lr '{a: 1}'",
        r"command line: lr: \{'a': 1\} should be .*; .*",
    ),
    Bad(
        "two names of one setting that differ, in a file",
        "train --config mine.yaml",
        r"mine\.yaml: epochs is 3 but max_epochs is 4, .*; keep one of them \(epochs\)",
        files(mine="epochs: 3\nmax_epochs: 4\n"),
    ),
    Bad(
        "two names of one setting that differ, as flags",
        "train --lr 0.1 --learning-rate 0.2",
        r"command line: lr is 0\.1 but learning_rate is 0\.2, .*; keep one of them \(lr\)",
    ),
    Bad(
        "two settings for one thing, from two places",
        "train --config mine.yaml --warmup-steps 3",
        r"mine\.yaml, command line: warmup_epochs and warmup_steps are both given; keep one .*",
        files(mine="warmup_epochs: 1\n"),
    ),
    Bad(
        "a warm-up longer than the run",
        "train --epochs 2 --warmup-epochs 3",
        r"command line: warmup_epochs 3 is longer than the run's 2 epochs; lower warmup_epochs .*",
    ),
    Bad(
        "milestones that do not increase",
        "train --scheduler multi_step --milestones 60,30",
        r"command line: milestones \[60.*, 30.*\] do not increase; sort them",
    ),
    Bad(
        "a schedule without its milestones",
        "train --scheduler multi_step",
        r"command line: scheduler multi_step has no milestones; give some, .*",
    ),
    Bad(
        "a data folder for a set without files",
        "train --data synthetic --data-root pictures",
        r"command line: data is synthetic, .* data_root is 'pictures'; remove data_root .*",
    ),
    Bad(
        "a circle of extends",
        "train --config a.yaml",
        r"a\.yaml: extends forms a cycle \(a.yaml -> b.yaml -> a.yaml\); break .*",
        files(a="extends: b.yaml\n", b="extends: a.yaml\n"),
    ),
    Bad(
        "a file that extends itself",
        "train --config a.yaml",
        r"a\.yaml: extends forms a cycle \(a.yaml -> a.yaml\); break .*",
        files(a="extends: a.yaml\n"),
    ),
    Bad(
        "a missing base",
        "train --config mine.yaml",
        r"mine\.yaml: extends: gone\.yaml: no such configuration file; name a YAML file or .*",
        files(mine="extends: gone.yaml\n"),
    ),
    Bad(
        "a missing configuration file",
        "train --config gone.yaml",
        r"gone\.yaml: no such configuration file; name a YAML file or .*cpu-optimized.*",
    ),
    Bad(
        "a misspelt preset",
        "plan --config cpu-optimised",
        r"cpu-optimised: no such configuration file; did you mean cpu-optimized\?",
    ),
    Bad(
        "a folder for a configuration file",
        "train --config folder",
        r"folder: is a folder; name a YAML file",
        lambda: Path("folder").mkdir(),
    ),
    Bad(
        "broken YAML",
        "train --config mine.yaml",
        r"mine\.yaml: is not valid YAML in line 2: .*; fix that line",
        files(mine="lr: [1\n"),
    ),
    Bad(
        "a key given twice",
        "train --config mine.yaml",
        r"mine\.yaml: is not valid YAML: line 2: the key 'lr' is given twice; .*",
        files(mine="lr: 1.0\nlr: 2.0\n"),
    ),
    Bad(
        "a list for a configuration",
        "train --config mine.yaml",
        r"mine\.yaml: contains no `key: value` lines; write one setting per line",
        files(mine="- lr\n"),
    ),
    Bad(
        "bytes for a configuration",
        "train --config mine.yaml",
        r"mine\.yaml: is not UTF-8 text .*; name a YAML file",
        file("mine.yaml", b"\xff\xfe\x00"),
    ),
    Bad(
        "YAML that would run code",
        "train --config mine.yaml",
        r"mine\.yaml: is not valid YAML in line 1: .*; .*",
        files(mine="lr: !!python/object/apply:os.system ['touch canary']\n"),
    ),
    Bad(
        "a run's name with a slash",
        f"train {TINY} --name ../elsewhere",
        r"command line: name: '\.\./elsewhere' should match .*; name means: .*letters, digits.*",
    ),
]

DATA = [
    Bad(
        "a missing data folder",
        "train --data-root gone",
        r"data_root gone is not a folder; name a folder with train/ and val/.*",
    ),
    Bad(
        "a data folder that holds something else",
        "train --data-root other",
        r"data_root other contains no known data set; name a folder with train/ and val/.*",
        file("other/readme.txt"),
    ),
    Bad(
        "images from nowhere",
        "train --data folder",
        r"data is folder, but data_root is not set; .*",
    ),
    Bad(
        "a folder without val",
        f"train {PICTURES}",
        r"pictures/val: no such folder; name a folder with train/<class>/\* and val/<class>/\*",
        pictures(lambda: shutil.rmtree("pictures/val")),
    ),
    Bad(
        "an empty class",
        f"train {PICTURES}",
        r"pictures/train/cow: the class is empty; add images or remove the folder",
        pictures(lambda: Path("pictures/train/cow").mkdir()),
    ),
    Bad(
        "no class at all",
        f"train {PICTURES}",
        r"pictures/train: has no class folders; .*",
        pictures(lambda: shutil.rmtree("pictures/train"), lambda: Path("pictures/train").mkdir()),
    ),
    Bad(
        "a class to validate that is not trained",
        f"train {PICTURES}",
        r"pictures/val/cow: this class is missing in pictures/train; .*",
        pictures(file("pictures/val/cow/1.jpg")),
    ),
    Bad(
        "an image outside the classes",
        f"plan {PICTURES}",
        r"pictures/train/1\.jpg: not in a class folder; move it .*",
        pictures(file("pictures/train/1.jpg")),
    ),
    Bad(
        "notes among the images",
        f"train {PICTURES}",
        r"pictures/train/ant/notes\.txt: does not have the suffix of an image; move it away.*",
        pictures(file("pictures/train/ant/notes.txt")),
    ),
    Bad(
        "a truncated image to train on",
        f"train {PICTURES} --batch-size 8",
        r"pictures/train/bee/2\.jpg: cannot be decoded .*; replace or delete the file",
        pictures(truncate("pictures/train/bee/2.jpg")),
        begins=True,
    ),
    Bad(
        "a truncated image to validate on",
        f"train {PICTURES}",
        r"pictures/val/ant/0\.jpg: cannot be decoded .*; replace or delete the file",
        pictures(truncate("pictures/val/ant/0.jpg")),
        begins=True,
    ),
    Bad(
        "text with the name of an image",
        f"train {PICTURES} --batch-size 8",
        r"pictures/train/ant/1\.jpg: not an image of a known format .*; replace or delete the file",
        pictures(file("pictures/train/ant/1.jpg")),
        begins=True,
    ),
    Bad(
        "an empty image, met by a loader process",
        f"train {PICTURES} --batch-size 8 --num-workers 1",
        r"pictures/train/ant/1\.jpg: not an image of a known format .*; replace or delete the file",
        pictures(file("pictures/train/ant/1.jpg", b"")),
        begins=True,
    ),
    Bad(
        "another number of classes",
        f"train {PICTURES} --num-classes 5",
        r"num_classes is 5, but folder in pictures has 2 classes; set num_classes to 2 or .*",
        pictures(),
    ),
    Bad(
        "files as resident data",
        f"train {PICTURES} --resident-data",
        r"resident_data: true needs images held as arrays, .*; use resident_data: auto",
        pictures(),
    ),
    Bad(
        "a truncated CIFAR file",
        "train --data-root .",
        r"cifar-10-batches-py/data_batch_3: not a CIFAR file .*; replace it with the original",
        cifar(truncate("cifar-10-batches-py/data_batch_3")),
    ),
    Bad(
        "fewer labels than images",
        "train --data cifar10 --data-root .",
        r"cifar-10-batches-py/test_batch: 'data' is \(2, 3072\) for 1 labels, .*; take the file .*",
        cifar(lambda: write_cifar_batch(Path("cifar-10-batches-py/test_batch"), labels=[0])),
    ),
    Bad(
        "a label past the last class",
        "train --data cifar10 --data-root .",
        r"cifar-10-batches-py/test_batch: label 10 of image 1 is not in 0\.\.9; take the file .*",
        cifar(lambda: write_cifar_batch(Path("cifar-10-batches-py/test_batch"), labels=[0, 10])),
    ),
    Bad(
        "a CIFAR file that would run code",
        "train --data cifar10 --data-root .",
        r"cifar-10-batches-py/data_batch_1: not a CIFAR file \(.*system is not allowed\); .*",
        cifar(file("cifar-10-batches-py/data_batch_1", pickle.dumps({b"data": Command()}))),
    ),
    Bad(
        "an empty image to validate on",
        f"train {PICTURES}",
        r"pictures/val/ant/1\.jpg: is empty; replace or delete the file",
        pictures(file("pictures/val/ant/1.jpg", b"")),
    ),
    Bad(
        "more bad images than may be skipped",
        f"train {PICTURES} --batch-size 8 --on-bad-image skip",
        r"4 images of the train split cannot be decoded, but at most 3 of 8 may be skipped: .*",
        pictures(*(file(f"pictures/train/ant/{number}.jpg") for number in range(4))),
        begins=True,
    ),
    Bad(
        "a link that leads nowhere",
        f"plan {PICTURES}",
        r"pictures/train/ant/9\.jpg: not a file; remove it, or repair the link",
        pictures(lambda: Path("pictures/train/ant/9.jpg").symlink_to("gone.jpg")),
    ),
    Bad(
        "a link that goes round in a circle",
        f"plan {PICTURES}",
        r"pictures/train/ant/again: the class contains this folder twice, through a link; "
        "remove the link",
        pictures(lambda: Path("pictures/train/ant/again").symlink_to(".")),
    ),
    Bad(
        "class names of other data",
        "plan --data cifar10 --data-root .",
        r"cifar-10-batches-py/batches\.meta: does not list 10 class names; take the file from .*",
        cifar(
            lambda: Path("cifar-10-batches-py/batches.meta").write_bytes(
                pickle.dumps({b"label_names": [b"one"]}, protocol=2)
            )
        ),
    ),
    Bad(
        "a CIFAR file of text",
        "plan --data cifar10 --data-root .",
        r"cifar-10-batches-py/data_batch_5: not a CIFAR file \(damaged: .*\); replace it with .*",
        cifar(file("cifar-10-batches-py/data_batch_5")),
    ),
    Bad(
        "a folder for a CIFAR file",
        "plan --data cifar10 --data-root .",
        r"cifar-10-batches-py/data_batch_2: not a file; complete the data set's folder",
        cifar(
            lambda: (
                Path("cifar-10-batches-py/data_batch_2").unlink(),
                Path("cifar-10-batches-py/data_batch_2").mkdir(),
            )
        ),
    ),
    Bad(
        "a CIFAR folder that lacks a file",
        "train --data cifar10 --data-root .",
        r"cifar-10-batches-py: lacks test_batch; complete it, or move it away .*",
        cifar(lambda: Path("cifar-10-batches-py/test_batch").unlink()),
    ),
]

CHECKPOINTS = [
    Bad(
        "a missing checkpoint",
        "train --resume gone.ckpt",
        r"gone\.ckpt: no such checkpoint; name a \.ckpt file, such as .*",
    ),
    Bad(
        "a run's folder for its checkpoint",
        "train --resume run",
        r"run: no such checkpoint; name a \.ckpt file, such as .*",
    ),
    Bad(
        "a truncated checkpoint",
        f"train --resume {CHECKPOINT}",
        r"run/checkpoints/last\.ckpt: cannot be read as a checkpoint .*; it is damaged or .*",
        truncate(CHECKPOINT),
    ),
    Bad(
        "random bytes for a checkpoint",
        "train --resume noise.ckpt",
        r"noise\.ckpt: cannot be read as a checkpoint .*; it is damaged or not a checkpoint; .*",
        file("noise.ckpt", np.random.default_rng(0).bytes(5000)),
    ),
    Bad(
        "an empty checkpoint",
        "train --resume empty.ckpt",
        r"empty\.ckpt: cannot be read as a checkpoint .*; .*",
        file("empty.ckpt", b""),
    ),
    Bad(
        "bare weights for a checkpoint",
        "train --resume bare.pth",
        r"bare\.pth: was written by torch\.save, not by this framework; .* pass it as --weights",
        torch_file("bare.pth", lambda: {"fc.weight": torch.zeros(2, 2)}),
    ),
    Bad(
        "a checkpoint that would run code",
        "train --resume hostile.ckpt",
        r"hostile\.ckpt: was written by torch\.save, not by this framework; .*",
        torch_file("hostile.ckpt", lambda: {"format_version": 1, "model": Command()}),
    ),
    Bad(
        "a checkpoint of a later format",
        "train --resume later.ckpt",
        r"later\.ckpt: has format version '3', .*reads version 2; "
        "read it with the version of the framework that wrote it",
        lambda: later_checkpoint("later.ckpt"),
    ),
    Bad(
        "a checkpoint that lacks a part",
        "train --resume part.ckpt",
        r"part\.ckpt: is incomplete: 'progress' is missing; .*",
        checkpoint_without("part.ckpt", "progress"),
    ),
    Bad(
        "a checkpoint with a changed bit in its header",
        f"evaluate {CHECKPOINT}",
        r"run/checkpoints/last\.ckpt: cannot be read as a checkpoint .*; it is damaged or .*",
        flipped(CHECKPOINT, 0.0005),
    ),
    Bad(
        "a checkpoint with a changed bit in its weights",
        f"evaluate {CHECKPOINT}",
        r"run/checkpoints/last\.ckpt: cannot be read as a checkpoint \(.* its checksum\); .*",
        flipped(CHECKPOINT, 0.7),
    ),
    Bad(
        "a run's settings for its checkpoint",
        "predict run/config.yaml pictures",
        r"run/config\.yaml: cannot be read as a checkpoint .*; .*",
        pictures(),
    ),
    Bad(
        "weights with a NaN",
        f"train {TINY} --weights nan.pth",
        r"nan\.pth: conv1\.weight contains NaN or infinity; use an earlier checkpoint",
        torch_file(
            "nan.pth",
            lambda: {
                **(s := resnet_state("resnet10")),
                "conv1.weight": s["conv1.weight"] * float("nan"),
            },
        ),
    ),
    Bad(
        "weights that lack a tensor",
        f"train {TINY} --weights part.pth",
        r"part\.pth: bn1\.weight \(\d+ in the model\) is missing; .*",
        torch_file("part.pth", lambda: without(resnet_state("resnet10"), "bn1.weight")),
    ),
    Bad(
        "an empty weight file",
        f"train {TINY} --weights empty.safetensors",
        r"empty\.safetensors: not a readable weight file .*; .*",
        file("empty.safetensors", b""),
    ),
    Bad(
        "a card of nonsense",
        "predict nonsense.safetensors pictures",
        r"nonsense\.safetensors: does not say which network it belongs to; use .*",
        lambda: (
            pictures()(),
            save_file(
                {"a": torch.zeros(2)},
                "nonsense.safetensors",
                metadata={
                    "network": json.dumps(
                        {
                            "model": 1,
                            "stem": "cifar",
                            "share_early_weights": 0,
                            "class_names": [],
                            "image_size": -1,
                            "mean": [],
                            "std": [],
                            "center_crop": 0,
                        }
                    )
                },
            ),
        ),
    ),
    Bad(
        "resuming with another learning rate",
        f"train --resume {CHECKPOINT} --lr 0.5",
        r"run/checkpoints/last\.ckpt: its run had other settings: lr 'auto' -> 0\.5; drop them, .*",
    ),
    Bad(
        "resuming another model",
        f"train --resume {CHECKPOINT} --model resnet18 --allow-config-change",
        r"run/checkpoints/last\.ckpt: does not fit this run's network .*; resume with the .*",
    ),
    Bad(
        "resuming and starting from weights",
        f"train --resume {CHECKPOINT} --weights bare.pth",
        r"command line: resume and weights are both given; .*",
    ),
    Bad(
        "weights of another model",
        f"train {TINY} --weights other.pth",
        r"other\.pth: .* is .* in the model.*; the file is for resnet18 with the cifar stem: .*",
        torch_file("other.pth", lambda: resnet_state("resnet18")),
    ),
    Bad(
        "missing weights",
        f"train {TINY} --weights gone.pth",
        r"gone\.pth: no such file; give the path of a weight file",
    ),
    Bad(
        "weights of an unknown kind",
        f"train {TINY} --weights weights.h5",
        r"weights\.h5: unknown kind of weight file '\.h5'; give one that ends in .*",
        file("weights.h5"),
    ),
    Bad(
        "weights that would run code",
        f"train {TINY} --weights hostile.pth",
        r"hostile\.pth: contains more than tensors \(.*system\) and was not loaded, .*; save .*",
        torch_file("hostile.pth", lambda: {"fc.weight": Command()}),
    ),
    Bad(
        "truncated weights",
        f"train {TINY} --weights run/weights.safetensors",
        r"run/weights\.safetensors: not a readable weight file .*; it may be truncated .*",
        truncate("run/weights.safetensors"),
    ),
    Bad(
        "evaluating on other classes",
        f"evaluate {CHECKPOINT} --data digits",
        r"run/checkpoints/last\.ckpt: the classes of the network differ from those of digits "
        r".*; name .*",
    ),
    Bad(
        "evaluating text",
        "evaluate notes.txt",
        r"notes\.txt: cannot be read as a checkpoint .*; .*",
        file("notes.txt"),
    ),
    Bad(
        "evaluating what is not there",
        "evaluate gone.safetensors",
        r"gone\.safetensors: no such file; .*",
    ),
    Bad(
        "weights that do not say whose they are",
        "evaluate anonymous.safetensors",
        r"anonymous\.safetensors: does not say which network it belongs to; use .*",
        lambda: save_file({"fc.weight": torch.zeros(2)}, "anonymous.safetensors"),
    ),
    Bad(
        "weights whose card is garbled",
        "predict garbled.safetensors .",
        r"garbled\.safetensors: does not say which network it belongs to; use .*",
        lambda: (
            pictures()(),
            save_file({"a": torch.zeros(2)}, "garbled.safetensors", metadata={"network": "{oh"}),
        ),
    ),
    Bad(
        "a card that names no model",
        "predict unknown.ckpt pictures",
        r"unknown\.ckpt: (unknown model 'vgg16'|does not say .*); .*",
        lambda: (pictures()(), unknown_model("unknown.ckpt")),
    ),
    Bad(
        "predicting a missing image",
        f"predict {CHECKPOINT} gone.jpg",
        r"gone\.jpg: no such file or folder; check the path",
    ),
    Bad(
        "predicting an empty folder",
        f"predict {CHECKPOINT} empty",
        r"empty: contains no image files; name another folder",
        lambda: Path("empty").mkdir(),
    ),
    Bad(
        "predicting text",
        f"predict {CHECKPOINT} notes.txt",
        r"notes\.txt: not an image of a known format .*; replace or delete the file",
        file("notes.txt"),
    ),
    Bad(
        "predicting with no classes",
        f"predict {CHECKPOINT} pictures --top 0",
        r"--top is 0; give 1 or more",
        pictures(),
    ),
]

SUBSET = "--classes 2 --train-per-class 2 --val-per-class 1"
COMMANDS = [
    Bad(
        "no command",
        "",
        r"efficient-resnet: .*required: COMMAND; see `efficient-resnet --help`",
    ),
    Bad(
        "an unknown command",
        "trian --epochs 3",
        r"efficient-resnet: there is no command 'trian'; did you mean train\?",
    ),
    Bad(
        "a command like no other",
        "xyzzy",
        r"efficient-resnet: there is no command 'xyzzy'; choose from train, plan, evaluate, .*",
    ),
    Bad(
        "a misspelt flag",
        "train --epoch 3",
        r"efficient-resnet train: unknown flag --epoch; did you mean --epochs\?",
    ),
    Bad(
        "a flag with underscores",
        "train --batch_size=3",
        r"efficient-resnet train: unknown flag --batch_size; did you mean --batch-size\?",
    ),
    Bad(
        "a flag like no other",
        "train --frobnicate",
        r"efficient-resnet train: unknown flag --frobnicate; .* --help` lists them all",
    ),
    Bad(
        "a flag without its value",
        "train --lr --epochs 3",
        r"efficient-resnet train: argument --lr: expected one argument; .*",
    ),
    Bad(
        "a configuration file without its flag",
        "train mine.yaml",
        r"efficient-resnet train: unexpected argument 'mine\.yaml'; did you mean --config .*",
        files(mine="epochs: 3\n"),
    ),
    Bad(
        "text for a count",
        f"predict {CHECKPOINT} pictures --top many",
        r"efficient-resnet predict: argument --top: invalid int value: 'many'; .*",
    ),
    Bad(
        "a subset of more classes than there are",
        "data subset pictures dest --classes 9 --train-per-class 2 --val-per-class 1",
        r"pictures/train: has 2 classes, not 9; ask for at most 2",
        pictures(),
    ),
    Bad(
        "a subset of more images than there are",
        "data subset pictures dest --classes 2 --train-per-class 2 --val-per-class 7",
        r"pictures/val/\w+: has 2 images, not 7; ask for at most 2",
        pictures(),
    ),
    Bad(
        "a subset in the place of something",
        f"data subset pictures dest {SUBSET}",
        r"dest: exists and is not an empty folder; name a new folder",
        pictures(file("dest/mine.txt")),
    ),
    Bad(
        "a subset of nothing",
        f"data subset gone dest {SUBSET}",
        r"gone/train: no such folder; name a folder with train/.*",
    ),
    Bad(
        "a subset of no class",
        "data subset pictures dest --classes 0 --train-per-class 2 --val-per-class 1",
        r"classes is 0; take at least 1",
        pictures(),
    ),
    Bad(
        "a subset below a file",
        f"data subset pictures mine.txt/dest {SUBSET}",
        r"mine\.txt: .*; free some space, or name another folder",
        pictures(file("mine.txt")),
    ),
    Bad(
        "more devices than processes",
        f"train {TINY} --devices 2",
        r"devices: 2 needs one process a device; start it with torchrun --nproc-per-node=2 .*",
    ),
    Bad(
        "more data than memory",
        f"train {TINY} --synthetic-val-images {10**15}",
        r"memory is full: .*; lower batch_size or img_size, .*",
    ),
    Bad(
        "a file where runs shall go",
        f"train {TINY} --output-dir mine.txt",
        r"mine\.txt.*: cannot be written to \(.*\); give another --output-dir",
        file("mine.txt"),
    ),
    Bad(
        "a missing result",
        "report gone.json",
        r"gone\.json: cannot be read \(No such file or directory\); name a file that .*",
    ),
    Bad(
        "text for a result",
        "report notes.txt",
        r"notes\.txt: not JSON \(.*\); name a file that .*",
        file("notes.txt"),
    ),
    Bad(
        "bytes for a result",
        "report bytes.json",
        r"bytes\.json: not JSON \(.*\); name a file that .*",
        file("bytes.json", b"\xff\xfe"),
    ),
    Bad(
        "a folder for a result",
        "report folder",
        r"folder: not a file; name a file that .*",
        lambda: Path("folder").mkdir(),
    ),
    Bad(
        "JSON of something else",
        "report other.json",
        r"other\.json: not a result; name a file that .*",
        file("other.json", b'{"a": 1}'),
    ),
    Bad(
        "a run's record for a result",
        "report run/run.json",
        r"run/run\.json: not a result; name a file that .*",
        file("run/run.json", b'{"config": {}, "results": {}}'),
    ),
    Bad(
        "a result without its variants",
        "report r.json",
        r"r\.json: not a result file of schema version 1 \(experiment: .*\); name a file .*",
        file("r.json", b'{"variants": 3}'),
    ),
    Bad(
        "a run with text for a step",
        "report r.json",
        r"r\.json: metrics: .*row 2: step: 'two' is not a number; name a file that .*",
        file("r.json", run_result(metrics=[{"step": "1"}, {"step": "two"}])),
    ),
    Bad(
        "a run with text for a loss",
        "report r.json",
        r"r\.json: metrics: .*row 1: train/loss: 'low' is not a number; name a file that .*",
        file("r.json", run_result(metrics=[{"step": "1", "train/loss": "low"}])),
    ),
    Bad(
        "a run of minus three epochs",
        "report r.json",
        r"r\.json: plan\.epochs: .*greater than 0.*; name a file that .*",
        file("r.json", run_result(plan={"steps_per_epoch": 2, "epochs": -3})),
    ),
    Bad(
        "a report over its own result",
        "report r.json --output r.json",
        r"--output r\.json: is one of the result files; name an \.html file",
        file("r.json", run_result()),
    ),
    Bad(
        "an experiment without variants",
        "compare mine.yaml",
        r"mine\.yaml: variants is missing; add variants",
        files(mine="rounds: 3\n"),
    ),
    Bad(
        "an experiment that loads a library",
        "compare mine.yaml",
        r"mine\.yaml: .*environment: LD_PRELOAD could load code; set it .*",
        files(mine="variants: [{name: a, environment: {LD_PRELOAD: x.so}}]\n"),
    ),
    Bad(
        "an experiment that is not there",
        "compare gone.yaml",
        r"gone\.yaml: no such experiment; name a YAML file, or one of the included experiments: .*",
    ),
    Bad(
        "a learning rate that leaves all bounds",
        f"train {TINY} --lr 1e30",
        r"the training loss became nan at step \d+, .*; lower lr, .*",
        begins=True,
    ),
]


ALONE = [
    next(bad for bad in CONFIGURATIONS if bad.name == "a misspelt key in a file"),
    next(bad for bad in CHECKPOINTS if bad.name == "a checkpoint that would run code"),
    Bad(
        "an absent set without a network",
        "train --data cifar10",
        r"cifar10 is not in data and cannot be downloaded from https://.* \(ProxyError\); "
        r"put cifar-10-python\.tar"
        r"\.gz \(MD5 .*\) or its folder cifar-10-batches-py into data",
    ),
]


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


def unknown_model(path: str) -> None:
    state = load_checkpoint(Path(CHECKPOINT))
    state["network"]["model"] = "vgg16"
    save_checkpoint(Path(path), state)


def test_there_are_enough_of_them_and_nearly_all_are_met_before_the_first_step() -> None:
    inputs = [*CONFIGURATIONS, *DATA, *CHECKPOINTS, *COMMANDS]
    assert len({bad.name for bad in inputs}) == len(inputs) >= 100
    assert sum(not bad.begins for bad in inputs) >= 0.95 * len(inputs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    place = tmp_path_factory.mktemp("trained")
    # Without momentum the checkpoint is half as large, and so are the times to read it.
    arguments = (
        f"train {TINY} --synthetic-val-images 12 --momentum 0 --save-top-k 0 --output-dir {place}"
    )
    assert main(shlex.split(arguments)) == 0
    return place / "resnet10-synthetic" / "version_0"


@pytest.fixture
def workplace(in_tmp_path: Path, trained: Path) -> Path:
    """A working directory that holds the finished run as `run`."""
    shutil.copytree(trained, in_tmp_path / "run", copy_function=os.link)
    return in_tmp_path


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder, and the folders themselves."""
    found = {}
    for path in sorted(folder.rglob("*")):
        digest = "folder"
        if path.is_file():
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "blake2b").hexdigest()
        found[str(path.relative_to(folder))] = digest
    return found


def the_error(err: str) -> str:
    """The one line of stderr that says what is wrong, which is its last."""
    assert "Traceback" not in err, err
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
    return lines[-1].removeprefix("error: ")


@pytest.mark.parametrize(
    "bad", [*CONFIGURATIONS, *DATA, *CHECKPOINTS, *COMMANDS], ids=lambda bad: bad.name
)
def test_bad_input_is_one_line_with_a_cure_and_harms_nothing(
    bad: Bad, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if bad not in CHECKPOINTS:
        shutil.rmtree("run")  # reading it twice takes longer than all the rest
    bad.prepare()
    before = contents(workplace)
    assert main(shlex.split(bad.command)) == 2
    err = capsys.readouterr().err
    line = the_error(err)
    assert re.fullmatch(bad.says, line), line
    after = contents(workplace)
    if bad.begins:
        assert {path: after.get(path) for path in before} == before
        assert all(path.partition("/")[0] == "logs" for path in after.keys() - before.keys())
    else:
        assert err == f"error: {line}\n"
        assert after == before
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("accelerators", "says"),
    [
        ((), r"accelerator: gpu: this PyTorch finds no GPU; .*accelerator: auto.*"),
        (
            (Accelerator(kind="cuda", name="Old GPU", fault="is too old; install another build"),),
            r"accelerator: gpu: Old GPU is too old; install another build.*",
        ),
    ],
)
def test_a_gpu_that_cannot_be_used_is_named(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    accelerators: tuple[Accelerator, ...],
    says: str,
) -> None:
    hardware = dataclasses.replace(detect_hardware(), accelerators=accelerators)
    monkeypatch.setattr("training_framework.plan.planned_run.detect_hardware", lambda: hardware)
    before = contents(workplace)
    assert main(shlex.split(f"train {TINY} --accelerator gpu")) == 2
    line = the_error(capsys.readouterr().err)
    assert re.fullmatch(says, line), line
    assert contents(workplace) == before


@pytest.mark.parametrize(
    ("world_size", "says"),
    [
        ("3", r"batch_size 4 cannot be shared equally by 3 processes; use a multiple of 3"),
        ("two", r"environment variable WORLD_SIZE is 'two'; start the run with torchrun"),
    ],
)
def test_processes_that_cannot_share_the_work_are_told(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    world_size: str,
    says: str,
) -> None:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**variables, "WORLD_SIZE": world_size}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", world_size)
    before = contents(workplace)
    assert main(shlex.split(f"train {TINY} --accelerator cpu")) == 2
    line = the_error(capsys.readouterr().err)
    assert re.fullmatch(says, line), line
    assert contents(workplace) == before


@pytest.mark.parametrize(
    "bad",
    ALONE,
    ids=lambda bad: bad.name,
)
def test_a_process_of_its_own_says_the_same(bad: Bad, workplace: Path, forks: Forks) -> None:
    bad.prepare()
    before = contents(workplace)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    program = ("-m", "training_framework", *shlex.split(bad.command))
    done = forks.run(*program, env=environment)
    assert done.returncode == 2
    line = the_error(done.stderr)
    assert re.fullmatch(bad.says, line), line
    after = contents(workplace)
    assert {path: after.get(path) for path in before} == before
    assert bad.begins or after == before
    assert not Path("canary").exists()
