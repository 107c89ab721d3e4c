"""Runs that go on by themselves, where they stood, in the directory that they had."""

import csv
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from training_framework.checkpoint import load_checkpoint, save_checkpoint
from training_framework.errors import UserError
from training_framework.runs.directory import DirectoryLock
from training_framework.runs.progress import TrainResult
from training_framework.train import EfficientResNet18Trainer, main

pytestmark = pytest.mark.usefixtures("narrow_networks")

SETTINGS: dict[str, Any] = {
    "epochs": 2, "lr": 0.05, "log_every_n_steps": 1, "tensorboard": False, "threads": 1,
}  # fmt: skip
LAST = Path("logs/Sequential-loader/version_0/checkpoints/last.ckpt")


def loader_of(count: int = 24, batch_size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    images = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(count) % 4), batch_size=batch_size)


def train(*, network: nn.Module | None = None, loader: Any = None, **settings: Any) -> TrainResult:
    """Train a network of one layer for two epochs of three batches."""
    if network is None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    trainer = EfficientResNet18Trainer(network=network, **{**SETTINGS, **settings})
    return trainer.train(loader or loader_of(), loader_of(8))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run that stopped after 2 of its 6 steps."""
    place = tmp_path_factory.mktemp("stopped")
    train(output_dir=place / "logs", stop_after_steps=2)
    return place


@pytest.fixture
def workplace(in_tmp_path: Path, stopped: Path) -> Path:
    """A copy of it as working directory."""
    shutil.copytree(stopped / "logs", in_tmp_path / "logs")
    return in_tmp_path


def steps_in(run_directory: Path) -> list[int]:
    with (run_directory / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_the_same_command_goes_on_where_it_stopped_and_then_starts_anew(workplace, capsys):
    result = train()
    assert result.run_directory == LAST.parent.parent
    assert steps_in(result.run_directory) == [1, 2, 3, 4, 5, 6]
    said = capsys.readouterr().err
    assert f"resuming {LAST.parent.parent} at step 2 of 6 (--resume never starts anew)" in said
    record = json.loads((result.run_directory / "run.json").read_text())
    assert record["resumed_from"] == str(LAST)
    again = train()
    assert again.run_directory.name == "version_1"
    assert "resuming" not in capsys.readouterr().err


def test_never_starts_anew(workplace):
    before = LAST.read_bytes()
    assert train(resume="never").run_directory.name == "version_1"
    assert LAST.read_bytes() == before


def test_other_settings_are_all_listed_and_refused(workplace):
    before = LAST.read_bytes()
    changes = {"lr": 0.1, "momentum": 0.5, "log_every_n_steps": 2}
    message = (
        r"last\.ckpt: its run had other settings: lr 0\.05 -> 0\.1, momentum 0\.9 -> 0\.5, "
        r"training images 24 -> 32, batches an epoch 3 -> 4; use those settings, start anew "
        r"with --resume never, or resume with --allow-config-change"
    )
    with pytest.raises(UserError, match=message):
        train(**changes, loader=loader_of(32))
    assert LAST.read_bytes() == before
    result = train(lr=0.1, allow_config_change=True)
    assert (result.run_directory, result.steps) == (LAST.parent.parent, 6)


def test_a_run_without_a_checkpoint_is_passed_over(workplace):
    for name in ("version_1", "version_2"):
        (LAST.parents[2] / name / "checkpoints").mkdir(parents=True)
    assert train().run_directory == LAST.parent.parent
    assert train().run_directory.name == "version_3"


def test_a_run_that_is_under_way_is_left_alone(workplace):
    lock = DirectoryLock.take(LAST.parent.parent)
    assert lock is not None
    with pytest.raises(UserError, match=r"version_0: another run is using it; .*or another"):
        train()
    with pytest.raises(UserError, match=r"version_0: another run is using it; wait"):
        train(resume=LAST)
    before = LAST.read_bytes()
    assert train(resume="never").run_directory.name == "version_1"
    assert LAST.read_bytes() == before
    lock.release()


def test_a_run_is_under_way_while_it_trains(in_tmp_path):
    found = []

    def look(network: nn.Module, images: tuple[Tensor, ...]) -> None:
        if Path("logs/a/version_0").exists():  # not while its costs are counted
            found.append(DirectoryLock.take(Path("logs/a/version_0")))

    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    with network.register_forward_pre_hook(look):
        train(network=network, name="a")
    assert len(found) >= 6
    assert set(found) == {None}
    lock = DirectoryLock.take(Path("logs/a/version_0"))
    assert lock is not None
    lock.release()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(in_tmp_path, capsys):
    straight = train(name="straight")
    train(name="a", save_every_n_steps=1, stop_after_steps=4)
    last = Path("logs/a/version_0/checkpoints/last.ckpt")
    damaged = bytearray(last.read_bytes())
    damaged[-1] ^= 1
    last.write_bytes(damaged)
    capsys.readouterr()
    result = train(name="a")
    said = capsys.readouterr().err
    assert f"warning: {last}: cannot be read as a checkpoint (loader/" in said
    assert "using last-1.ckpt, the one before it" in said
    assert "at step 3 of 6" in said
    assert last.with_name("last.ckpt.damaged").read_bytes() == damaged
    assert steps_in(result.run_directory) == [1, 2, 3, 4, 5, 6]
    same_weights(straight, result)


def same_weights(one: TrainResult, other: TrainResult) -> None:
    assert one.run_directory is not None and other.run_directory is not None
    ours, theirs = (
        load_file(result.run_directory / "weights.safetensors") for result in (one, other)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_without_a_good_checkpoint_nothing_starts_in_silence(workplace):
    LAST.write_bytes(b"noise")
    with pytest.raises(UserError, match=r"last\.ckpt: cannot be read as a checkpoint"):
        train()
    assert not (LAST.parents[2] / "version_1").exists()


def test_what_was_left_to_write_after_the_last_step_is_written(workplace):
    straight = train()
    assert straight.run_directory is not None
    for name in ("run.json", "weights.safetensors"):
        (straight.run_directory / name).rename(name)
    result = train()
    assert result.run_directory == straight.run_directory
    ours, theirs = (
        load_file(result.run_directory / "weights.safetensors"),
        load_file("weights.safetensors"),
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert train(stop_after_steps=1).run_directory.name == "version_1"


def test_a_finished_run_that_goes_on_with_more_epochs_is_unfinished_again(workplace):
    train()
    longer = {"epochs": 3, "allow_config_change": True}
    train(resume=LAST, **longer, stop_after_steps=7)
    os.utime(LAST.parent.parent / "run.json", (1, 1))
    (LAST.parent.parent / "run.json").write_text(
        json.dumps({"results": {"steps": 6, "stopped_by": ""}, "plan": {"total_steps": 6}})
    )
    result = train(epochs=3)
    assert (result.run_directory, result.steps) == (LAST.parent.parent, 9)


def test_the_weights_that_a_run_started_from_are_not_loaded_again(in_tmp_path):
    settings: dict[str, Any] = {
        **SETTINGS, "data": "synthetic", "model": "resnet10", "img_size": 8, "num_classes": 4,
        "synthetic_train_images": 16, "synthetic_val_images": 8, "batch_size": 8, "name": "a",
    }  # fmt: skip
    main(**settings, stop_after_steps=1)
    last = Path("logs/a/version_0/checkpoints/last.ckpt")
    state = load_checkpoint(last)
    save_checkpoint(last, {**state, "config": {**state["config"], "weights": "gone.pth"}})
    with pytest.raises(UserError, match=r"its run had other settings: weights 'gone\.pth' -> None"):
        main(**settings)
    assert main(**settings, weights="gone.pth").steps == 4


def test_saves_between_evaluations_change_no_number(in_tmp_path):
    straight = train(name="straight")
    often = train(name="often", save_every_n_steps=1, save_every_seconds=1e-6)
    same_weights(straight, often)
    folder = Path("logs/often/version_0/checkpoints")
    steps = [load_checkpoint(folder / f"{name}.ckpt")["progress"]["step"] for name in STEMS]
    assert steps[0] < steps[1] == 6  # a save that still waits for the disk gives way to the next


STEMS = ("last-1", "last")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "3"}, {"step": -1}, {"epochs": None}, {"surplus": 1}, {"batch": 1.5},
        {"sample_digest": 3}, {"epoch_seconds": []},
    ],
)  # fmt: skip
def test_a_state_that_no_run_has_is_refused(workplace, changes):
    state = load_checkpoint(LAST)
    save_checkpoint(LAST, {**state, "progress": {**state["progress"], **changes}})
    with pytest.raises(UserError, match=r"last\.ckpt: does not fit this run's network"):
        train()


@pytest.mark.parametrize(
    "changes",
    [
        {"torch": torch.zeros(3, dtype=torch.uint8)},
        {"numpy": ("MT19937", [0] * 624, 10**6, 0, 0.0)},
        {"numpy": ("MT19937", [0] * 3, 1, 0, 0.0)},
        {"python": (3, (1, 2), None)},
        {"python": 5},
    ],
)
def test_states_that_no_generator_has_are_refused(workplace, changes):
    state = load_checkpoint(LAST)
    save_checkpoint(LAST, {**state, "random": {**state["random"], **changes}})
    with pytest.raises(UserError, match=r"last\.ckpt: does not fit this run's network"):
        train()


def test_an_epoch_of_fewer_batches_goes_on_where_as_much_of_it_is_behind(workplace, capsys):
    loader = loader_of(24, batch_size=24)
    with pytest.raises(UserError, match=r"belongs to another run: batches an epoch 3 -> 1"):
        train(loader=loader, resume=str(LAST))
    result = train(loader=loader, allow_config_change=True)
    assert result.steps == 2
    assert "an epoch had 3 steps and now has 1" in capsys.readouterr().err
    assert result.run_directory == LAST.parents[2] / "version_1", "rows count other steps"


def digits(**settings: Any) -> TrainResult:
    fixed = {
        **SETTINGS, "data": "digits", "model": "resnet10", "img_size": 8, "name": "digits",
        "limit_train_images": 64, "epochs": 2, "precision": "32",
    }  # fmt: skip
    return main(**{**fixed, **settings})


@pytest.mark.parametrize(("sizes", "stands_at", "total"), [((8, 32), 2, 4), ((32, 8), 12, 16)])
def test_with_another_batch_size_as_much_of_the_schedule_is_behind(
    in_tmp_path, capsys, sizes, stands_at, total
):
    """Of 16 steps with 8 images 9 are 2 whole ones with 32, of 4; and 3 of these are 12 of 16."""
    before, after = sizes
    digits(batch_size=before, stop_after_steps=9 if before == 8 else 3)
    result = digits(batch_size=after, allow_config_change=True)
    shown = capsys.readouterr().err
    assert f"at step {stands_at} of {total} " in shown
    assert result.steps == total
    assert not result.stopped_by
    directory = result.run_directory
    assert directory is not None
    assert directory.name == "version_1"
    assert steps_in(directory) == list(range(stands_at + 1, total + 1))
    epochs = [
        record["epoch"] for record in json.loads((directory / "run.json").read_text())["epochs"]
    ]
    assert epochs == [0, 1]


def test_fewer_epochs_than_were_made_are_refused_with_the_count(in_tmp_path):
    digits(batch_size=8, stop_after_steps=12)
    with pytest.raises(
        UserError, match=r"is at step 12, in epoch 2, .* has 8 steps in 1 epoch\(s\); raise epochs"
    ):
        digits(batch_size=8, epochs=1, allow_config_change=True)


def test_a_folder_that_vanishes_under_a_run_ends_it_in_one_line(in_tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))

    def remove(module: nn.Module, images: tuple[Tensor, ...]) -> None:
        shutil.rmtree("logs/a", ignore_errors=True)

    with (
        network.register_forward_pre_hook(remove),
        pytest.raises(UserError, match=r"(last\.ckpt|metrics\.csv): .*cannot be written"),
    ):
        train(network=network, name="a", log_every_n_steps=100)


def test_a_place_that_cannot_be_written_to_is_found_at_the_start(in_tmp_path, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"\.: cannot be written to \(No space left on device\)"):
        train()
    assert time.monotonic() - start < 5
    assert not list(in_tmp_path.iterdir())


class Noisy(TensorDataset):
    """Draws from all generators for each image."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = super().__getitem__(index)
        shift = random.random() + np.random.random() + torch.rand(()).item()  # noqa: NPY002
        return image + shift, label


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_users_own_loader_and_dropout_go_on_in_mid_epoch(in_tmp_path, own_generator):
    generator = torch.Generator().manual_seed(0)
    data = Noisy(torch.randn(40, 3, 4, 4, generator=generator), torch.arange(40) % 4)

    def weights(**settings: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 4))
        own = torch.Generator().manual_seed(5) if own_generator else None
        loader = DataLoader(data, batch_size=8, shuffle=True, generator=own)
        train(network=network, loader=loader, epochs=3, num_classes=4, **settings)
        return network.state_dict()

    straight = weights(name="straight")
    weights(name="stopped", stop_after_steps=7)
    resumed = weights(name="stopped")
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name
