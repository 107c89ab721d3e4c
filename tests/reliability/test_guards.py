"""What keeps a run's state whole, each guard by itself; test_guards_bite.py takes them away."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from training_framework.checkpoint import CheckpointKeeper, load_checkpoint, writing
from training_framework.data.sample_digest import digest_of_batches
from training_framework.data.sampling import epoch_order, training_batches
from training_framework.errors import UserError
from training_framework.models import resnet
from training_framework.runs.directory import DirectoryLock
from training_framework.train import EfficientResNet18Trainer, main

STATE = {
    "model": {"weight": torch.arange(4.0)},
    "average": None,
    "optimizer": {},
    "scaler": {},
    "sums": None,
    "progress": {"step": 1},
    "config": {},
    "network": {},
}
TINY = {
    "data": "synthetic", "model": "resnet10", "img_size": 8, "num_classes": 3, "batch_size": 6,
    "synthetic_train_images": 30, "synthetic_val_images": 6, "epochs": 2, "lr": 0.01,
    "threads": 1, "tensorboard": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def narrow_networks(monkeypatch):
    monkeypatch.setattr(resnet, "STAGE_CHANNELS", (4, 8, 16, 32))


def save(folder: Path, step: int) -> None:
    keeper = CheckpointKeeper(folder, prefix="resnet10", keep=1)
    keeper.save({**STATE, "progress": {"step": step}}, epoch=0, val_acc1=None)
    keeper.close()


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name_and_then_the_name_is(
    tmp_path, monkeypatch
):
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        events.append(("flushed", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def record_replace(source, target):
        events.append((Path(target).name, Path(source).stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    save(tmp_path, 1)
    content = (tmp_path / "last.ckpt").stat().st_ino
    renamed = events.index(("last.ckpt", content))
    assert ("flushed", content) in events[:renamed]
    assert ("flushed", tmp_path.stat().st_ino) in events[renamed:]


def test_a_save_that_breaks_off_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "write_header", no_space)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 2)
    assert load_checkpoint(tmp_path / "last.ckpt")["progress"]["step"] == 1


def test_a_network_that_draws_goes_on_with_the_draws_that_are_next(in_tmp_path):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(24, 3, 4, 4, generator=generator), torch.arange(24) % 3
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    weights = {}
    for name, parts in (("straight", [None]), ("stopped", [5, None])):
        for stop_after_steps in parts:
            torch.manual_seed(0)
            network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 3))
            result = EfficientResNet18Trainer(
                network=network, num_classes=3, epochs=2, lr=0.1, threads=1, name=name,
                stop_after_steps=stop_after_steps, channels_last=False, tensorboard=False,
            ).train(loader)  # fmt: skip
        assert result.steps == 12
        weights[name] = load_file(result.run_directory / "weights.safetensors")["2.weight"]
    assert torch.equal(weights["stopped"], weights["straight"])


def test_a_resumed_epoch_takes_the_samples_that_are_left(in_tmp_path):
    for stop_after_steps in (3, None):
        result = main(**TINY, stop_after_steps=stop_after_steps)
    progress = load_checkpoint(result.run_directory / "checkpoints" / "last.ckpt")["progress"]
    for epoch, record in enumerate(progress["epochs"]):
        batches = training_batches(
            epoch_order(30, seed=0, epoch=epoch, shuffle=True), global_batch_size=6
        )
        assert record["sample_digest"] == digest_of_batches(map(torch.from_numpy, batches))
    assert len(progress["epochs"]) == 2


def test_a_directory_has_one_writer_at_a_time(in_tmp_path):
    result = main(**TINY, stop_after_steps=3)
    lock = DirectoryLock.take(result.run_directory)
    try:
        before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="another run is using it"):
            main(**TINY)
        assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    finally:
        lock.release()
    assert main(**TINY).run_directory == result.run_directory
